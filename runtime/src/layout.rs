//! Where the elements of [batch, seq, head, head_dim] tensors lie, and the TMA descriptors of them.

use crate::error::Error;
use cudarc::driver::sys;
use dsv_spec::params::{TensorMap, TensorView};
use dsv_spec::{Dtype, limits};

/// Strides of a [batch, seq, head, head_dim] tensor in elements; the innermost stride is 1. The stride of a dimension
/// of size 1 is never used and may be anything.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Layout {
    /// Elements between sequences.
    pub batch: i64,
    /// Elements between tokens.
    pub seq: i64,
    /// Elements between heads.
    pub head: i64,
}

impl Layout {
    /// Contiguous [B, S, H, D].
    pub const fn bshd(seqlen: u32, heads: u32, head_dim: u32) -> Layout {
        let (s, h, d) = (seqlen as i64, heads as i64, head_dim as i64);
        Layout { batch: s * h * d, seq: h * d, head: d }
    }

    /// Contiguous [B, H, S, D].
    pub const fn bhsd(seqlen: u32, heads: u32, head_dim: u32) -> Layout {
        let (s, h, d) = (seqlen as i64, heads as i64, head_dim as i64);
        Layout { batch: s * h * d, seq: d, head: s * d }
    }

    /// As kernels with plain loads take it.
    pub const fn view(&self, address: u64) -> TensorView {
        TensorView { ptr: address, stride_batch: self.batch, stride_seq: self.seq, stride_head: self.head }
    }
}

/// A tensor's sizes, apart from where it lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Extent {
    pub(crate) batch: u32,
    pub(crate) seqlen: u32,
    pub(crate) heads: u32,
    pub(crate) head_dim: u32,
    pub(crate) dtype: Dtype,
}

/// Bytes TMA (and 16-byte loads) need addresses and strides to be a multiple of.
pub(crate) const ALIGN_BYTES: u64 = 16;
/// TMA strides are below this many bytes.
const MAX_STRIDE_BYTES: i64 = 1 << 40;

impl Extent {
    /// Every reason why the kernels cannot take this layout; else the layout with legal strides for the dimensions
    /// of size 1.
    pub(crate) fn check(&self, name: &str, layout: Layout, problems: &mut Vec<String>) -> Layout {
        let bytes = self.dtype.bytes() as i64;
        let step = ALIGN_BYTES as i64 / bytes;
        let mut used: Vec<(&str, i64, i64)> = Vec::new();
        let mut legal = layout;
        let dims = [
            ("batch", self.batch, &mut legal.batch),
            ("seq", self.seqlen, &mut legal.seq),
            ("head", self.heads, &mut legal.head),
        ];
        for (dim, size, stride) in dims {
            if size <= 1 {
                *stride = self.head_dim as i64;
                continue;
            }
            if *stride <= 0 || *stride % step != 0 || *stride * bytes >= MAX_STRIDE_BYTES {
                problems.push(format!(
                    "{name}: stride {stride} of {dim} (size {size}); allowed: positive multiples of {step} elements \
                     ({ALIGN_BYTES} bytes, for TMA), below 2^40 bytes"
                ));
            } else {
                used.push((dim, *stride, size as i64));
            }
        }
        used.sort_by_key(|&(_, stride, _)| stride);
        let mut extent = self.head_dim as i64;
        for (dim, stride, size) in used {
            if stride < extent {
                problems.push(format!(
                    "{name}: stride {stride} of {dim} makes rows overlap; allowed: at least {extent}, what the inner \
                     dimensions span"
                ));
                break;
            }
            extent += stride * (size - 1);
        }
        legal
    }

    /// The descriptor [`dsv_spec::params::AttnFwd`] documents, with boxes of `rows` tokens; what lies outside the tensor
    /// reads as zeros. Work of the host alone.
    pub(crate) fn tensor_map(&self, address: u64, layout: &Layout, rows: u32) -> Result<TensorMap, Error> {
        if !self.head_dim.is_multiple_of(limits::SLAB_COLUMNS) {
            return self.slab_map(address, layout, rows);
        }
        let (columns, bytes) = (limits::SLAB_COLUMNS, self.dtype.bytes() as i64);
        let slabs = self.head_dim / columns;
        Tiled {
            dtype: self.dtype,
            address,
            dims: [columns, self.seqlen, slabs, self.heads, self.batch].map(u64::from),
            strides: [layout.seq, columns as i64, layout.head, layout.batch]
                .map(|stride| (stride * bytes) as u64),
            window: [columns, rows, slabs, 1, 1],
            swizzle: sys::CUtensorMapSwizzle_enum::CU_TENSOR_MAP_SWIZZLE_128B,
        }
        .encode()
    }

    /// The 4-D descriptor of the same: a copy brings one slab of 64 columns.
    pub(crate) fn slab_map(&self, address: u64, layout: &Layout, rows: u32) -> Result<TensorMap, Error> {
        let bytes = self.dtype.bytes() as i64;
        Tiled {
            dtype: self.dtype,
            address,
            dims: [self.head_dim, self.seqlen, self.heads, self.batch].map(u64::from),
            strides: [layout.seq, layout.head, layout.batch].map(|stride| (stride * bytes) as u64),
            window: [limits::SLAB_COLUMNS, rows, 1, 1],
            swizzle: sys::CUtensorMapSwizzle_enum::CU_TENSOR_MAP_SWIZZLE_128B,
        }
        .encode()
    }
}

/// The descriptor of two f32 arrays of `len` values, `distance` bytes apart, read 64 values of one of them at a time.
pub(crate) fn pair_of_rows_map(address: u64, len: u64, distance: u64) -> Result<TensorMap, Error> {
    Tiled {
        dtype: Dtype::F32,
        address,
        dims: [len, 2],
        strides: [distance],
        window: [64, 1],
        swizzle: sys::CUtensorMapSwizzle_enum::CU_TENSOR_MAP_SWIZZLE_NONE,
    }
    .encode()
}

/// What `cuTensorMapEncodeTiled` asks for: sizes of each of `RANK` dimensions, byte strides of all but the innermost
/// (`OUTER` = `RANK` - 1), and the box one load brings.
#[derive(Debug)]
struct Tiled<const RANK: usize, const OUTER: usize> {
    dtype: Dtype,
    address: u64,
    dims: [u64; RANK],
    strides: [u64; OUTER],
    window: [u32; RANK],
    swizzle: sys::CUtensorMapSwizzle_enum,
}

impl<const RANK: usize, const OUTER: usize> Tiled<RANK, OUTER> {
    fn encode(&self) -> Result<TensorMap, Error> {
        let steps = [1u32; RANK];
        let kind = match self.dtype {
            Dtype::Bf16 => sys::CUtensorMapDataType_enum::CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
            Dtype::F16 => sys::CUtensorMapDataType_enum::CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
            Dtype::F32 => sys::CUtensorMapDataType_enum::CU_TENSOR_MAP_DATA_TYPE_FLOAT32,
        };
        let mut map = std::mem::MaybeUninit::<sys::CUtensorMap>::uninit();
        // SAFETY: reads RANK sizes, box sizes and steps, and OUTER strides; writes the map alone. The address is
        // stored, not followed.
        let answer = unsafe {
            sys::cuTensorMapEncodeTiled(
                map.as_mut_ptr(),
                kind,
                RANK as u32,
                self.address as *mut std::ffi::c_void,
                self.dims.as_ptr(),
                self.strides.as_ptr(),
                self.window.as_ptr(),
                steps.as_ptr(),
                sys::CUtensorMapInterleave_enum::CU_TENSOR_MAP_INTERLEAVE_NONE,
                self.swizzle,
                sys::CUtensorMapL2promotion_enum::CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                sys::CUtensorMapFloatOOBfill_enum::CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
            )
        };
        match answer {
            // SAFETY: the call above has written it.
            sys::CUresult::CUDA_SUCCESS => Ok(TensorMap(unsafe { map.assume_init() }.opaque)),
            _ => crate::device::driver(format!("cuTensorMapEncodeTiled of {self:?}"), answer.result())
                .map(|()| TensorMap::default()),
        }
    }
}
