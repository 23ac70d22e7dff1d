//! How state that lies on the host passes through the device: chunk by chunk through a ring of small device buffers, so
//! that copies in both directions and the ops on the chunks run at the same time. What the ops do is the caller's matter.

use crate::engine::{ArenaPlan, Buf, Done, Engine, PARAM_ALIGN};
use std::collections::VecDeque;
use std::ops::Range;

/// Chunks on the device at a time: one comes, one is worked on, one goes, and one more so that none waits.
const SLOTS: usize = 4;
/// Elements of a chunk, at most: 16 MiB of f32, a third of a millisecond over PCIe 5.
const CHUNK: usize = 4 << 20;
/// Chunks of a pass beside other ops, at most. A chunk is five operations of a stream, which takes some thousand ahead: with
/// more, the thread that queues them would stand still in the middle, and the ops beside would not be queued either.
const CHUNKS_BESIDE: usize = 128;

/// Ops on one chunk: its elements, and the device's copies of them.
pub type Work<'a> = dyn FnMut(&mut dyn Engine, Range<usize>, &[Buf]) + 'a;

/// Device buffers through which flat f32 buffers of the host pass.
#[derive(Clone, Debug)]
pub struct Ring {
    /// For each slot a buffer of each host buffer that passes.
    slots: Vec<Vec<Buf>>,
    chunk: usize,
}

impl Ring {
    /// Lays out a ring for `parts` host buffers of `len` elements that pass together, `beside` other ops or in their midst.
    pub fn reserve(plan: &mut ArenaPlan, label: &str, parts: usize, len: usize, beside: bool) -> Ring {
        let most = if beside { CHUNK.max(len.div_ceil(CHUNKS_BESIDE)) } else { CHUNK };
        // Short buffers too are cut, so that their copies and ops overlap.
        let chunk = len.div_ceil(2 * SLOTS).min(most).max(1).next_multiple_of(PARAM_ALIGN);
        let slots = (0..SLOTS).map(|_| (0..parts).map(|_| plan.f32(label, chunk)).collect()).collect();
        Ring { slots, chunk }
    }

    /// Calls `work` with each chunk of `range`, in order, and the device's copies of the host buffers' elements in it; with
    /// `write_back` what it leaves there is copied to the host buffers.
    ///
    /// # Panics
    /// If there are not as many host buffers as the ring was laid out for.
    pub fn pass(
        &self,
        engine: &mut dyn Engine,
        host: &[Buf],
        range: Range<usize>,
        write_back: bool,
        work: &mut Work<'_>,
    ) {
        let chunks: Vec<Range<usize>> =
            range.clone().step_by(self.chunk).map(|at| at..(at + self.chunk).min(range.end)).collect();
        let staged = |i: usize| -> Vec<(Buf, Buf)> {
            let slot = &self.slots[i % SLOTS];
            assert_eq!(slot.len(), host.len(), "host buffers of a ring");
            let Range { start, end } = chunks[i];
            let part =
                |(host, device): (&Buf, &Buf)| (host.slice(start, end - start), device.slice(0, end - start));
            host.iter().zip(slot).map(part).collect()
        };
        // A slot's copies arrive in order: the last one stands for all.
        let fetch = |engine: &mut dyn Engine, i: usize| {
            staged(i).into_iter().map(|(from, to)| engine.fetch(from, to)).last().unwrap_or_default()
        };
        let mut coming: VecDeque<Done> = (0..chunks.len().min(SLOTS)).map(|i| fetch(engine, i)).collect();
        for i in 0..chunks.len() {
            if let Some(here) = coming.pop_front() {
                engine.after(&here);
            }
            let (host, device): (Vec<Buf>, Vec<Buf>) = staged(i).into_iter().unzip();
            work(engine, chunks[i].clone(), &device);
            if write_back {
                for (from, to) in device.into_iter().zip(host) {
                    engine.offload(from, to);
                }
            }
            // Issued here it comes after the work on this slot and after its way back, and waits for nothing else.
            if i + SLOTS < chunks.len() {
                coming.push_back(fetch(engine, i + SLOTS));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::{CpuEngine, Dims, Precision};

    #[test]
    fn every_element_passes_once_and_only_the_range_is_written() {
        let mut plan = ArenaPlan::new(Precision::F32);
        let len = 5000;
        let (like, add) = (plan.f32("like", len), plan.f32("add", len));
        let host = [plan.on_host("a", like), plan.on_host("b", like)];
        let ring = Ring::reserve(&mut plan, "staging", 2, len, false);
        let mut e = CpuEngine::<f32>::new();
        let dims = Dims {
            batch: 1,
            seqlen: 1,
            text_tokens: 0,
            text_copies: 1,
            dim: 1,
            heads: 1,
            head_dim: 1,
            d_lr: 0,
            mlp_width: 0,
            samples: 0,
            params: 0,
            lists: None,
        };
        e.reserve(&plan, &dims).unwrap();
        let values = |from: f32| (0..len).map(|i| from + i as f32).collect::<Vec<_>>();
        e.write_f32(host[0], &values(0.0)).unwrap();
        e.write_f32(host[1], &values(0.5)).unwrap();
        e.write_f32(add, &values(1000.0)).unwrap();
        let mut chunks = 0;
        for write_back in [false, true] {
            ring.pass(&mut e, &host, 64..4900, write_back, &mut |e, at, device| {
                chunks += 1;
                for buf in device {
                    e.axpy(2.0, add.slice(at.start, at.len()), *buf);
                }
            });
        }
        assert!(chunks > 2 * SLOTS, "{chunks} chunks");
        for (buf, from) in host.into_iter().zip([0.0, 0.5]) {
            let wanted = values(from).into_iter().enumerate();
            let wanted =
                wanted.map(|(i, x)| if (64..4900).contains(&i) { x + 2.0 * (1000.0 + i as f32) } else { x });
            assert_eq!(e.read_f32(buf).unwrap(), wanted.collect::<Vec<_>>());
        }
    }
}
