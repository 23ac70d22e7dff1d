//! Tensor maps: what `cuTensorMapEncodeTiled` checks, how a map is kept in its 128 bytes, and how a box is walked.

use crate::decode::Ty;

/// First bytes of every map made here.
const MAGIC: u64 = 0x5044_4D41_5053_4D55;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct TensorMap {
    pub(crate) ty: Ty,
    /// Whether what lies outside arrives as NaN.
    pub(crate) nan: bool,
    /// Bytes of the swizzle's span: 0, 32, 64 or 128.
    pub(crate) swizzle: u32,
    pub(crate) rank: u32,
    pub(crate) address: u64,
    pub(crate) dims: [u64; 5],
    /// Bytes; that of the innermost dimension is an element's size.
    pub(crate) strides: [u64; 5],
    pub(crate) window: [u32; 5],
}

/// The element types of `CUtensorMapDataType`, by value.
fn ty_of(value: u32) -> Option<Ty> {
    Some(match value {
        0 => Ty::U8,
        1 => Ty::U16,
        2 => Ty::U32,
        3 => Ty::S32,
        4 => Ty::U64,
        5 => Ty::S64,
        6 => Ty::F16,
        7 => Ty::F32,
        8 => Ty::F64,
        9 => Ty::Bf16,
        10..=12 => Ty::F32,
        _ => return None,
    })
}

fn code_of(ty: Ty) -> u32 {
    match ty {
        Ty::U8 | Ty::S8 => 0,
        Ty::U16 | Ty::S16 => 1,
        Ty::U32 => 2,
        Ty::S32 => 3,
        Ty::U64 => 4,
        Ty::S64 => 5,
        Ty::F16 => 6,
        Ty::F32 => 7,
        Ty::F64 => 8,
        Ty::Bf16 => 9,
    }
}

impl TensorMap {
    /// Makes a map of what the driver is given. `dims` and `window` have `rank` entries, `strides` one less.
    ///
    /// # Errors
    /// What the driver refuses (`CUDA_ERROR_INVALID_VALUE` there), and what is not emulated.
    #[allow(clippy::too_many_arguments)]
    pub(crate) fn encode(
        ty: u32,
        rank: u32,
        address: u64,
        dims: &[u64],
        strides: &[u64],
        window: &[u32],
        element_strides: &[u32],
        interleave: u32,
        swizzle: u32,
        nan: bool,
    ) -> Result<TensorMap, String> {
        let ty = ty_of(ty).ok_or_else(|| format!("data type {ty}"))?;
        let size = ty.bytes() as u64;
        if !(1..=5).contains(&rank) {
            return Err(format!("{rank} dimensions; allowed: 1 to 5"));
        }
        if !address.is_multiple_of(16) {
            return Err(format!("address {address:#x}; allowed: multiples of 16"));
        }
        if interleave != 0 {
            return Err("interleaved layouts are not emulated".into());
        }
        let swizzle = match swizzle {
            0 => 0,
            1 => 32,
            2 => 64,
            3 => 128,
            other => return Err(format!("swizzle {other} is not emulated")),
        };
        let mut map =
            TensorMap { ty, nan, swizzle, rank, address, dims: [1; 5], strides: [size; 5], window: [1; 5] };
        for i in 0..rank as usize {
            if dims[i] == 0 || dims[i] > 1 << 32 {
                return Err(format!("dimension {i} of size {}; allowed: 1 to 2^32", dims[i]));
            }
            if window[i] == 0 || window[i] > 256 {
                return Err(format!("box of {} in dimension {i}; allowed: 1 to 256", window[i]));
            }
            if element_strides[i] != 1 {
                return Err(format!(
                    "element stride {} in dimension {i}: only 1 is emulated",
                    element_strides[i]
                ));
            }
            (map.dims[i], map.window[i]) = (dims[i], window[i]);
            if i > 0 {
                let stride = strides[i - 1];
                if !stride.is_multiple_of(16) || stride >= 1 << 40 {
                    return Err(format!(
                        "stride {stride} of dimension {i}; allowed: multiples of 16 bytes below 2^40"
                    ));
                }
                map.strides[i] = stride;
            }
        }
        let inner = map.inner_bytes();
        if !inner.is_multiple_of(16) {
            return Err(format!("{inner} bytes in the box's innermost dimension; allowed: multiples of 16"));
        }
        if swizzle != 0 && inner > swizzle {
            return Err(format!(
                "{inner} bytes in the box's innermost dimension; the swizzle allows {swizzle}"
            ));
        }
        if nan && !ty.is_float() {
            return Err("NaN outside a tensor of integers".into());
        }
        Ok(map)
    }

    pub(crate) fn inner_bytes(&self) -> u32 {
        self.window[0] * self.ty.bytes()
    }

    /// Bytes a box takes in shared memory.
    pub(crate) fn box_bytes(&self) -> u32 {
        self.ty.bytes() * self.window[..self.rank as usize].iter().product::<u32>()
    }

    /// As 128 bytes.
    pub(crate) fn to_words(self) -> [u64; 16] {
        let mut words = [0; 16];
        words[0] = MAGIC;
        words[1] = code_of(self.ty) as u64
            | (self.nan as u64) << 8
            | (self.swizzle as u64) << 16
            | (self.rank as u64) << 32;
        words[2] = self.address;
        for i in 0..5 {
            words[3 + i] = self.dims[i] | (self.window[i] as u64) << 40;
            words[8 + i] = self.strides[i];
        }
        words
    }

    /// The map in these words, where [`TensorMap::to_words`] made them.
    pub(crate) fn from_words(words: &[u64; 16]) -> Option<TensorMap> {
        if words[0] != MAGIC {
            return None;
        }
        let ty = ty_of(words[1] as u8 as u32)?;
        let mut map = TensorMap {
            ty,
            nan: words[1] >> 8 & 1 != 0,
            swizzle: (words[1] >> 16) as u16 as u32,
            rank: (words[1] >> 32) as u32,
            address: words[2],
            dims: [1; 5],
            strides: [0; 5],
            window: [1; 5],
        };
        for i in 0..5 {
            map.dims[i] = words[3 + i] & ((1 << 40) - 1);
            map.window[i] = (words[3 + i] >> 40) as u32;
            map.strides[i] = words[8 + i];
        }
        Some(map)
    }

    /// Calls `row(offset in the box, address in global memory, bytes of it inside the tensor, from where)` for each
    /// innermost row of the box at `coordinates`. Where nothing is inside, the bytes are 0.
    pub(crate) fn rows<E>(
        &self,
        coordinates: &[i32; 5],
        mut row: impl FnMut(u32, u64, u32, u32) -> Result<(), E>,
    ) -> Result<(), E> {
        let size = self.ty.bytes() as i64;
        let first = coordinates[0] as i64;
        // Elements [from, to) of the innermost row are inside.
        let from = (-first).clamp(0, self.window[0] as i64);
        let to = (self.dims[0] as i64 - first).clamp(0, self.window[0] as i64).max(from);
        let mut offset = 0;
        let mut index = [0u32; 5];
        loop {
            let mut inside = to > from;
            let mut address = self.address as i64 + (first + from) * size;
            for i in 1..5 {
                let at = if i < self.rank as usize { coordinates[i] as i64 + index[i] as i64 } else { 0 };
                inside &= at >= 0 && at < self.dims[i] as i64;
                address += at * if i < self.rank as usize { self.strides[i] as i64 } else { 0 };
            }
            let bytes = if inside { ((to - from) * size) as u32 } else { 0 };
            row(offset, address as u64, bytes, (from * size) as u32)?;
            offset += self.inner_bytes();
            let mut i = 1;
            loop {
                if i >= self.rank as usize {
                    return Ok(());
                }
                index[i] += 1;
                if index[i] < self.window[i] {
                    break;
                }
                index[i] = 0;
                i += 1;
            }
        }
    }
}

/// Where a swizzle puts the byte at this address of shared memory.
#[inline]
pub(crate) fn swizzled(address: u32, span: u32) -> u32 {
    match span {
        128 => address ^ (address >> 3 & 0x70),
        64 => address ^ (address >> 3 & 0x30),
        32 => address ^ (address >> 3 & 0x10),
        _ => address,
    }
}
