//! Handles into one arena of device memory and one of host memory, and the pure planner that lays them out before they
//! exist.

use std::fmt;

/// Storage type of a buffer.
#[derive(Copy, Clone, Debug, PartialEq, Eq, Hash)]
pub enum Dtype {
    /// The engine's compute type: bf16 on a GPU, f32 on the CPU (f64 in gradient tests).
    Act,
    /// Statistics, modulation, gradients of weights and master weights: f32 (f64 in gradient tests).
    F32,
    /// Indices, counts and keys.
    I32,
}

/// How wide an engine's types are; decides the bytes of every [`Dtype`].
#[derive(Copy, Clone, Debug, PartialEq, Eq, Hash)]
pub enum Precision {
    /// Compute in bf16, accumulate and keep statistics in f32.
    Bf16,
    /// Everything in f32.
    F32,
    /// Everything in f64: gradient tests.
    F64,
}

impl Precision {
    /// Bytes of one element of `dtype`.
    pub const fn bytes(self, dtype: Dtype) -> usize {
        match (self, dtype) {
            (_, Dtype::I32) => 4,
            (Precision::Bf16, Dtype::Act) => 2,
            (Precision::F64, _) => 8,
            _ => 4,
        }
    }
}

/// Where a buffer lies.
#[derive(Copy, Clone, Debug, PartialEq, Eq, Hash)]
pub enum Space {
    /// Memory of the device, where ops read and write.
    Device,
    /// Page-locked memory of the host, from and to which the device copies beside its ops. Ops refuse it.
    Host,
}

/// A typed range of one of the engine's arenas. It is a number, not memory: copying it is free, and only
/// the engine that reserved the arena can follow it.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub struct Buf {
    offset: usize,
    len: usize,
    dtype: Dtype,
    elem_bytes: u8,
    space: Space,
}

impl Buf {
    /// Byte offset from the arena's start (a whole allocation is aligned to [`ALIGN_BYTES`]).
    pub fn offset_bytes(&self) -> usize {
        self.offset
    }
    /// Number of elements.
    pub fn len(&self) -> usize {
        self.len
    }
    /// True for a buffer of no elements.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }
    /// Bytes of one element.
    pub fn elem_bytes(&self) -> usize {
        self.elem_bytes as usize
    }
    /// Bytes of the whole range.
    pub fn bytes(&self) -> usize {
        self.len * self.elem_bytes()
    }
    /// Storage type.
    pub fn dtype(&self) -> Dtype {
        self.dtype
    }
    /// Which arena it lies in.
    pub fn space(&self) -> Space {
        self.space
    }
    /// The elements `start..start + len` of this buffer.
    ///
    /// # Panics
    /// If the range leaves the buffer.
    pub fn slice(&self, start: usize, len: usize) -> Buf {
        assert!(start + len <= self.len, "slice {start}..{} of a buffer of {}", start + len, self.len);
        Buf { offset: self.offset + start * self.elem_bytes(), len, ..*self }
    }
    /// True when the two ranges share a byte.
    pub fn overlaps(&self, other: &Buf) -> bool {
        self.space == other.space
            && self.offset < other.offset + other.bytes()
            && other.offset < self.offset + self.bytes()
    }
}

/// Every allocation starts at a multiple of this many bytes (TMA and 128-bit loads need 16; 256 is
/// what `cuMemAlloc` gives).
pub const ALIGN_BYTES: usize = 256;

/// One named range of the plan, for the memory report.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Allocation {
    /// What it is for, grouped by the part before the first `/`.
    pub label: String,
    /// Where it lies.
    pub space: Space,
    /// Bytes including padding to [`ALIGN_BYTES`].
    pub bytes: usize,
}

/// Lays both arenas out: pure arithmetic, so memory is known before anything is allocated.
#[derive(Clone, Debug)]
pub struct ArenaPlan {
    precision: Precision,
    /// Of the device's arena.
    end: usize,
    /// Of the host's.
    host_end: usize,
    allocations: Vec<Allocation>,
    scratch_bytes: usize,
}

impl ArenaPlan {
    /// An empty plan for an engine of this precision.
    pub fn new(precision: Precision) -> Self {
        ArenaPlan { precision, end: 0, host_end: 0, allocations: Vec::new(), scratch_bytes: 0 }
    }
    /// Lays several alternatives over each other, from the same byte on: only one of them is in use at a time. The plan
    /// goes on after, and reports, the largest of each arena.
    pub fn alternatives<S, T>(
        &mut self,
        of: impl IntoIterator<Item = S>,
        mut lay: impl FnMut(&mut ArenaPlan, S) -> T,
    ) -> Vec<T> {
        let start = self.clone();
        let (device, host) =
            (|a: &Allocation| a.space == Space::Device, |a: &Allocation| a.space == Space::Host);
        let lay = |s| {
            let mut plan = start.clone();
            let laid = lay(&mut plan, s);
            self.scratch_bytes = self.scratch_bytes.max(plan.scratch_bytes);
            let mut takes = |is: fn(&Allocation) -> bool| {
                self.allocations.retain(|a| !is(a));
                self.allocations.extend(plan.allocations.iter().filter(|a| is(a)).cloned());
            };
            if plan.end > self.end {
                takes(device);
                self.end = plan.end;
            }
            if plan.host_end > self.host_end {
                takes(host);
                self.host_end = plan.host_end;
            }
            laid
        };
        of.into_iter().map(lay).collect()
    }
    /// An engine that is reserved with this plan takes at least so many bytes of scratch: for runs whose largest problem
    /// is not the one that needs most.
    pub fn need_scratch(&mut self, bytes: usize) {
        self.scratch_bytes = self.scratch_bytes.max(bytes);
    }
    /// Bytes of scratch asked for with [`ArenaPlan::need_scratch`].
    pub fn scratch_bytes(&self) -> usize {
        self.scratch_bytes
    }
    /// The precision the plan was made for.
    pub fn precision(&self) -> Precision {
        self.precision
    }
    /// Reserves `len` elements of `dtype` in an arena, under `label` (`component/name`).
    pub fn alloc_in(&mut self, space: Space, label: &str, dtype: Dtype, len: usize) -> Buf {
        let elem_bytes = self.precision.bytes(dtype);
        let bytes = (len * elem_bytes).next_multiple_of(ALIGN_BYTES);
        let end = match space {
            Space::Device => &mut self.end,
            Space::Host => &mut self.host_end,
        };
        let buf = Buf { offset: *end, len, dtype, elem_bytes: elem_bytes as u8, space };
        *end += bytes;
        self.allocations.push(Allocation { label: label.to_string(), space, bytes });
        buf
    }
    /// Reserves `len` elements of `dtype` on the device.
    pub fn alloc(&mut self, label: &str, dtype: Dtype, len: usize) -> Buf {
        self.alloc_in(Space::Device, label, dtype, len)
    }
    /// Reserves host memory for a copy of a device buffer.
    pub fn on_host(&mut self, label: &str, like: Buf) -> Buf {
        self.alloc_in(Space::Host, label, like.dtype, like.len)
    }
    /// Shorthand for an [`Dtype::Act`] buffer.
    pub fn act(&mut self, label: &str, len: usize) -> Buf {
        self.alloc(label, Dtype::Act, len)
    }
    /// Shorthand for an [`Dtype::F32`] buffer.
    pub fn f32(&mut self, label: &str, len: usize) -> Buf {
        self.alloc(label, Dtype::F32, len)
    }
    /// Shorthand for an [`Dtype::I32`] buffer.
    pub fn i32(&mut self, label: &str, len: usize) -> Buf {
        self.alloc(label, Dtype::I32, len)
    }
    /// Bytes of the device's arena.
    pub fn total_bytes(&self) -> usize {
        self.end
    }
    /// Bytes of the host's arena.
    pub fn host_bytes(&self) -> usize {
        self.host_end
    }
    /// Every allocation in order.
    pub fn allocations(&self) -> &[Allocation] {
        &self.allocations
    }
    /// Bytes of the device's arena by component (the part of the label before the first `/`), in order of first use.
    pub fn by_component(&self) -> Vec<(String, usize)> {
        let mut sums: Vec<(String, usize)> = Vec::new();
        for a in self.allocations.iter().filter(|a| a.space == Space::Device) {
            let key = a.label.split('/').next().unwrap_or("");
            match sums.iter_mut().find(|(k, _)| k == key) {
                Some((_, bytes)) => *bytes += a.bytes,
                None => sums.push((key.to_string(), a.bytes)),
            }
        }
        sums
    }
}

impl fmt::Display for ArenaPlan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (component, bytes) in self.by_component() {
            writeln!(f, "{component:<24} {:>12.3} MiB", bytes as f64 / (1 << 20) as f64)?;
        }
        write!(f, "{:<24} {:>12.3} MiB", "total", self.end as f64 / (1 << 20) as f64)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn allocations_are_aligned_and_disjoint() {
        let mut plan = ArenaPlan::new(Precision::Bf16);
        let a = plan.act("x/a", 3);
        let b = plan.f32("x/b", 65);
        let c = plan.i32("y/c", 1);
        assert_eq!((a.offset_bytes(), b.offset_bytes(), c.offset_bytes()), (0, 256, 256 + 512));
        assert_eq!((a.elem_bytes(), b.elem_bytes(), c.elem_bytes()), (2, 4, 4));
        assert!(!a.overlaps(&b) && !b.overlaps(&c) && b.overlaps(&b.slice(64, 1)));
        assert_eq!(plan.by_component(), vec![("x".into(), 768), ("y".into(), 256)]);
        assert_eq!(plan.total_bytes(), 1024);
    }

    #[test]
    fn alternatives_share_their_bytes_and_the_largest_counts() {
        let mut plan = ArenaPlan::new(Precision::F32);
        let shared = plan.f32("x/shared", 64);
        let laid = plan.alternatives([64, 640, 128], |plan, len| (plan.f32("y/a", len), plan.f32("y/b", 1)));
        let after = plan.f32("z", 1);
        assert!(laid.iter().all(|(a, b)| a.offset_bytes() == 256 && !a.overlaps(b) && !a.overlaps(&shared)));
        assert_eq!(after.offset_bytes(), 256 + 4 * 640 + 256);
        assert_eq!(plan.allocations().iter().map(|a| a.bytes).sum::<usize>(), plan.total_bytes());
        assert_eq!(plan.by_component()[1], ("y".into(), 4 * 640 + 256));
    }

    #[test]
    fn host_memory_is_counted_apart_and_overlaps_none_of_the_device() {
        let mut plan = ArenaPlan::new(Precision::F32);
        let a = plan.f32("x/a", 64);
        let laid = plan.alternatives([(640, 64), (64, 640)], |plan, (device, host)| {
            (plan.f32("y/device", device), plan.alloc_in(Space::Host, "y/host", Dtype::F32, host))
        });
        let b = plan.on_host("x/a on the host", a);
        assert_eq!((b.space(), b.len(), b.dtype()), (Space::Host, 64, Dtype::F32));
        assert_eq!((b.offset_bytes(), plan.total_bytes(), plan.host_bytes()), (2560, 256 + 2560, 2560 + 256));
        assert!(!a.overlaps(&laid[0].1) && laid[0].1.offset_bytes() == 0);
        // The largest of each arena is what is reported.
        let of =
            |space| plan.allocations().iter().filter(|a| a.space == space).map(|a| a.bytes).sum::<usize>();
        assert_eq!((of(Space::Device), of(Space::Host)), (plan.total_bytes(), plan.host_bytes()));
    }

    #[test]
    #[should_panic(expected = "slice 2..4")]
    fn a_slice_cannot_leave_its_buffer() {
        ArenaPlan::new(Precision::F32).f32("x", 3).slice(2, 2);
    }
}
