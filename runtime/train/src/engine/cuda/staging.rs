//! Page-locked memory through which the host hands inputs to the GPU without waiting for it.

use dsv_runtime::device::{PinnedBuffer, Plain};
use dsv_runtime::{Device, Error, Stream};

/// Bytes of the staging memory: the inputs of several steps.
const BYTES: usize = 64 << 20;
/// Copies begin at multiples of this many bytes.
const ALIGN: usize = 256;

/// Staging memory, filled from its start to its end; then, or when the engine waits anyway, from its start again.
pub(super) struct Staging {
    memory: PinnedBuffer,
    room: Room,
}

impl Staging {
    pub(super) fn new(device: &Device) -> Result<Staging, Error> {
        Ok(Staging { memory: device.alloc_pinned(BYTES)?, room: Room { bytes: BYTES, used: 0 } })
    }

    /// Queues the copy of `len` elements to device memory. Waits for the stream only when the room is used up.
    ///
    /// # Safety
    /// The target is device memory of that size that stays allocated until the work is done; every copy out of this
    /// memory goes to the same stream.
    pub(super) unsafe fn queue<T: Plain>(
        &mut self,
        stream: &Stream,
        address: u64,
        len: usize,
        element: impl Fn(usize) -> T,
    ) -> Result<(), Error> {
        let mut done = 0;
        while done < len {
            let Some((start, count)) = self.room.take(len - done, size_of::<T>()) else {
                stream.synchronize()?;
                self.room.used = 0;
                continue;
            };
            let part = &mut self.memory.as_mut_slice::<T>()[start..start + count];
            part.iter_mut().enumerate().for_each(|(i, to)| *to = element(done + i));
            // SAFETY: the caller's promise; the part is not written again before the stream has been waited for.
            unsafe { stream.copy_to_device(address + (done * size_of::<T>()) as u64, part)? };
            done += count;
        }
        Ok(())
    }

    /// All copies are done: the stream was waited for.
    pub(super) fn all_copied(&mut self) {
        self.room.used = 0;
    }
}

/// What is left of the memory.
struct Room {
    bytes: usize,
    used: usize,
}

impl Room {
    /// First element and number of elements of the next copy of up to `left` elements of `size` bytes (a power of
    /// two, to 8); `None` where the stream must be waited for first.
    fn take(&mut self, left: usize, size: usize) -> Option<(usize, usize)> {
        let fits = self.bytes.saturating_sub(self.used) / size;
        // What does not fit in one piece begins with the whole memory free.
        if fits == 0 || (fits < left && self.used > 0) {
            return None;
        }
        let (start, count) = (self.used / size, fits.min(left));
        self.used = (self.used + count * size).next_multiple_of(ALIGN);
        Some((start, count))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_never_overlap_before_a_wait_and_cover_everything() {
        for (len, size) in [(1, 4), (7, 2), (300, 4), (1024, 2), (5000, 4), (513, 2)] {
            let mut room = Room { bytes: 2048, used: 0 };
            let (mut done, mut waits, mut end) = (0, 0, 0);
            // Twice, so that the second begins in the middle.
            while done < 2 * len {
                match room.take(if done < len { len - done } else { 2 * len - done }, size) {
                    Some((start, count)) => {
                        assert!(start * size >= end && (start + count) * size <= 2048 && count > 0);
                        (end, done) = ((start + count) * size, done + count);
                    }
                    None => {
                        assert!(room.used > 0, "a wait that frees nothing");
                        (room.used, end, waits) = (0, 0, waits + 1);
                    }
                }
            }
            assert_eq!(done, 2 * len);
            assert!(waits <= 2 * len * size / 2048 + 2, "{len} of {size} bytes: {waits} waits");
        }
    }
}
