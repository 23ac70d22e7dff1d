//! Global memory as a table of allocations, and the shared memory of one CTA with what is known of each of its words.

use crate::decode::SHARED_START;

/// A device allocation, or memory that a kernel may only read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Region {
    pub(crate) start: u64,
    pub(crate) end: u64,
    pub(crate) writable: bool,
}

/// The allocations of a launch, sorted by address.
#[derive(Clone, Debug, Default)]
pub(crate) struct Regions(Vec<Region>);

impl Regions {
    pub(crate) fn new(mut regions: Vec<Region>) -> Regions {
        regions.sort_by_key(|r| r.start);
        Regions(regions)
    }

    /// The allocation that holds all `bytes` bytes at `address`.
    #[inline]
    pub(crate) fn find(&self, address: u64, bytes: u64) -> Option<Region> {
        let at = self.0.partition_point(|r| r.start <= address);
        let region = self.0[..at].last()?;
        (address.checked_add(bytes)? <= region.end).then_some(*region)
    }

    /// What lies around an address that no allocation holds, for messages.
    pub(crate) fn around(&self, address: u64) -> String {
        let at = self.0.partition_point(|r| r.start <= address);
        let before = self.0[..at].last().map(|r| {
            let size = r.end - r.start;
            if address < r.end {
                format!("{} bytes before the end of an allocation of {size} bytes", r.end - address)
            } else {
                format!("{} bytes after the end of an allocation of {size} bytes", address - r.end)
            }
        });
        let after = self.0.get(at).map(|r| {
            format!("{} bytes before an allocation of {} bytes", r.start - address, r.end - r.start)
        });
        let parts: Vec<String> = [before, after].into_iter().flatten().collect();
        if parts.is_empty() { "there is no allocation".to_string() } else { parts.join(", ") }
    }
}

/// Who wrote a word of shared memory through ordinary instructions, and when: fences count the time.
const WRITER_BITS: u32 = 11;

/// Shared memory of one CTA. Addresses start at [`SHARED_START`].
pub(crate) struct Shared {
    bytes: Vec<u8>,
    /// One entry for 4 bytes: 0, or (epoch << 11 | thread) + 1 of an ordinary write.
    written: Vec<u32>,
    /// Fences of the async proxy executed so far, from 1.
    epoch: u32,
    /// By thread: the epoch its last fence began.
    fenced: Vec<u32>,
    end: u32,
}

/// What every byte of shared memory holds before it is written: NaN as any float.
const POISON: u8 = 0xFF;

impl Shared {
    pub(crate) fn new(end: u32, threads: u32) -> Shared {
        let size = (end - SHARED_START) as usize;
        Shared {
            bytes: vec![POISON; size + 64],
            written: vec![0; size / 4 + 16],
            epoch: 1,
            fenced: vec![0; threads as usize],
            end,
        }
    }

    pub(crate) fn end(&self) -> u32 {
        self.end
    }

    /// Forgets everything, for the next CTA.
    pub(crate) fn reset(&mut self) {
        self.bytes.fill(POISON);
        self.written.fill(0);
        self.epoch = 1;
        self.fenced.fill(0);
    }

    #[inline]
    pub(crate) fn holds(&self, address: u64, bytes: u32) -> bool {
        address >= SHARED_START as u64 && address + bytes as u64 <= self.end as u64
    }

    /// The bytes at an address that [`Shared::holds`] says is inside.
    #[inline]
    pub(crate) fn at(&self, address: u32, bytes: usize) -> &[u8] {
        let at = (address - SHARED_START) as usize;
        &self.bytes[at..at + bytes]
    }

    #[inline]
    pub(crate) fn at_mut(&mut self, address: u32, bytes: usize) -> &mut [u8] {
        let at = (address - SHARED_START) as usize;
        &mut self.bytes[at..at + bytes]
    }

    /// Remembers an ordinary write by `thread`.
    #[inline]
    pub(crate) fn note_write(&mut self, address: u32, bytes: u32, thread: u32) {
        let entry = (self.epoch << WRITER_BITS | thread) + 1;
        let at = (address - SHARED_START) as usize;
        for word in &mut self.written[at / 4..(at + bytes as usize).div_ceil(4)] {
            *word = entry;
        }
    }

    /// The copy engine wrote here: nobody has to fence these bytes.
    #[inline]
    pub(crate) fn note_async_write(&mut self, address: u32, bytes: u32) {
        let at = (address - SHARED_START) as usize;
        self.written[at / 4..(at + bytes as usize).div_ceil(4)].fill(0);
    }

    /// Fences of many threads of a warp at once.
    pub(crate) fn fence_warp(&mut self, first: u32, mask: u32) {
        self.epoch += 1;
        for lane in (0..32).filter(|lane| mask >> lane & 1 != 0) {
            self.fenced[(first + lane) as usize] = self.epoch;
        }
    }

    /// The async proxy (tensor cores, copy engine), on behalf of `reader`, reads or overwrites these bytes: the
    /// thread that wrote some of them without a fence since, neither its own nor the reader's.
    #[inline]
    pub(crate) fn unfenced(&mut self, address: u32, bytes: u32, reader: u32) -> Option<u32> {
        let at = (address - SHARED_START) as usize;
        let words = &mut self.written[at / 4..(at + bytes as usize).div_ceil(4)];
        if words.iter().all(|&w| w == 0) {
            return None;
        }
        let reader_fenced = self.fenced[reader as usize];
        for word in words {
            if *word == 0 {
                continue;
            }
            let (epoch, thread) = ((*word - 1) >> WRITER_BITS, (*word - 1) & ((1 << WRITER_BITS) - 1));
            if self.fenced[thread as usize] > epoch || reader_fenced > epoch {
                *word = 0;
            } else {
                return Some(thread);
            }
        }
        None
    }
}
