//! Tensors on the GPU, with NaN wherever no row lies and a check that it is still there afterwards.

use super::{Failure, Gpu};
use crate::inputs::Placement;
use dsv_runtime::device::Plain;
use dsv_runtime::{DeviceBuffer, Layout};
use dsv_spec::Dtype;
use half::{bf16, f16};

/// A [batch, seq, heads, dim] tensor of bf16 or f16.
pub(super) struct Tensor {
    name: &'static str,
    buffer: DeviceBuffer,
    dtype: Dtype,
    place: Placement,
    dims: [usize; 4],
    /// The byte everything that is no row is filled with.
    poison: u8,
}

impl Tensor {
    /// With these rows (packed), and NaN around them.
    pub(super) fn with_rows(
        gpu: &Gpu,
        name: &'static str,
        dtype: Dtype,
        place: Placement,
        dims: [usize; 4],
        rows: &[f32],
    ) -> Result<Tensor, Failure> {
        let rows: Vec<u16> = rows.iter().map(|&x| to_bits(dtype, x)).collect();
        let mut data = vec![0xFFFFu16; place.elements];
        place.layout.unpack(&rows, dims[1], dims[2], dims[3], &mut data[place.first..]);
        let buffer = gpu.runtime.device().upload(&gpu.stream, &data)?;
        Ok(Tensor { name, buffer, dtype, place, dims, poison: 0xFF })
    }

    /// Filled with `poison`.
    pub(super) fn poisoned(
        gpu: &Gpu,
        name: &'static str,
        dtype: Dtype,
        place: Placement,
        dims: [usize; 4],
        poison: u8,
    ) -> Result<Tensor, Failure> {
        let buffer = gpu.runtime.device().alloc(2 * place.elements)?;
        buffer.fill(&gpu.stream, poison)?;
        Ok(Tensor { name, buffer, dtype, place, dims, poison })
    }

    /// Address of row (0, 0, 0).
    pub(super) fn address(&self) -> u64 {
        self.buffer.address() + 2 * self.place.first as u64
    }

    /// The rows, packed. An error where anything else was written.
    pub(super) fn rows(&self, gpu: &Gpu) -> Result<Vec<f32>, Failure> {
        let mut data: Vec<u16> = self.buffer.read(&gpu.stream, 0, self.place.elements)?;
        let [batch, seqlen, heads, dim] = self.dims;
        let body = &mut data[self.place.first..];
        let rows = self.place.layout.pack(body, batch, seqlen, heads, dim);
        let poison = u16::from_le_bytes([self.poison; 2]);
        let blank = vec![poison; rows.len()];
        self.place.layout.unpack(&blank, seqlen, heads, dim, body);
        let touched: Vec<usize> = (0..data.len()).filter(|&i| data[i] != poison).collect();
        match touched.first() {
            None => Ok(rows.into_iter().map(|bits| from_bits(self.dtype, bits)).collect()),
            Some(&first) => Err(format!(
                "{}: {} elements outside its rows were written, the first at element {} from row (0, 0, 0)",
                self.name,
                touched.len(),
                first as i64 - self.place.first as i64
            )
            .into()),
        }
    }

    /// Strides as the runtime takes them.
    pub(super) fn layout(place: &Placement) -> Layout {
        let l = place.layout;
        Layout { batch: l.batch as i64, seq: l.seq as i64, head: l.head as i64 }
    }
}

/// A value of a 16-bit type, rounded to nearest.
fn to_bits(dtype: Dtype, value: f32) -> u16 {
    match dtype {
        Dtype::Bf16 => bf16::from_f32(value).to_bits(),
        Dtype::F16 => f16::from_f32(value).to_bits(),
        Dtype::F32 => unreachable!("no tensor of the corpus is f32"),
    }
}

fn from_bits(dtype: Dtype, bits: u16) -> f32 {
    match dtype {
        Dtype::Bf16 => bf16::from_bits(bits).to_f32(),
        Dtype::F16 => f16::from_bits(bits).to_f32(),
        Dtype::F32 => unreachable!("no tensor of the corpus is f32"),
    }
}

/// A flat array with a guard of 256 poisoned bytes before and after.
pub(super) struct Flat {
    name: &'static str,
    buffer: DeviceBuffer,
    bytes: usize,
    poison: u8,
}

const GUARD_BYTES: usize = 256;

impl Flat {
    /// `bytes` bytes of `poison`.
    pub(super) fn poisoned(gpu: &Gpu, name: &'static str, bytes: usize, poison: u8) -> Result<Flat, Failure> {
        let buffer = gpu.runtime.device().alloc(bytes + 2 * GUARD_BYTES)?;
        buffer.fill(&gpu.stream, poison)?;
        Ok(Flat { name, buffer, bytes, poison })
    }

    /// These elements.
    pub(super) fn of<T: Plain>(gpu: &Gpu, name: &'static str, data: &[T]) -> Result<Flat, Failure> {
        let flat = Flat::poisoned(gpu, name, size_of_val(data), 0xFF)?;
        flat.buffer.write(&gpu.stream, GUARD_BYTES, data)?;
        Ok(flat)
    }

    /// Address of the first element.
    pub(super) fn address(&self) -> u64 {
        self.buffer.address() + GUARD_BYTES as u64
    }

    /// The elements. An error where the guards were written.
    pub(super) fn read<T: Plain>(&self, gpu: &Gpu) -> Result<Vec<T>, Failure> {
        for (side, at) in [("before", 0), ("after", GUARD_BYTES + self.bytes)] {
            let guard: Vec<u8> = self.buffer.read(&gpu.stream, at, GUARD_BYTES)?;
            if guard.iter().any(|&byte| byte != self.poison) {
                return Err(
                    format!("{}: memory {side} its {} bytes was written", self.name, self.bytes).into()
                );
            }
        }
        Ok(self.buffer.read(&gpu.stream, GUARD_BYTES, self.bytes / size_of::<T>())?)
    }
}

/// An error that shows where two arrays differ first.
pub(super) fn same<T: PartialEq + std::fmt::Debug>(
    name: &str,
    found: &[T],
    wanted: &[T],
) -> Result<(), Failure> {
    if found.len() != wanted.len() {
        return Err(format!("{name}: {} entries, wanted {}", found.len(), wanted.len()).into());
    }
    let differing: Vec<usize> = (0..found.len()).filter(|&i| found[i] != wanted[i]).collect();
    match differing.first() {
        None => Ok(()),
        Some(&first) => {
            let around = first.saturating_sub(2)..(first + 6).min(found.len());
            Err(format!(
                "{name}: {} of {} entries differ, the first at {first}: entries {around:?} are {:?}, wanted {:?}",
                differing.len(),
                found.len(),
                &found[around.clone()],
                &wanted[around.clone()]
            )
            .into())
        }
    }
}

/// An error unless the flag has exactly these bits.
pub(super) fn flag_is(found: i32, wanted: i32) -> Result<(), Failure> {
    if found == wanted {
        return Ok(());
    }
    let text = match dsv_runtime::decode_error_flag(found) {
        Ok(()) => "nothing was raised".to_string(),
        Err(flag) => flag.to_string(),
    };
    Err(format!("the error flag is {found:#x}, wanted {wanted:#x}: {text}").into())
}
