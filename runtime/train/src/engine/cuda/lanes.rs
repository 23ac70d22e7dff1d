//! What runs beside the ops: copies to and from host memory, each direction on a stream of its own, and ops on a third.
//! Events order them; which bytes are copied and why is not known here.

use super::super::Transfers;
use dsv_runtime::device::{Event, PinnedBuffer};
use dsv_runtime::{Device, Error, Stream};
use std::collections::VecDeque;
use std::ops::Range;
use std::sync::Arc;

/// A stretch of time on the GPU.
type Span = (Arc<Event>, Arc<Event>);

/// The streams beside the engine's own.
pub(super) struct Lanes {
    /// For [`super::Engine::beside`].
    pub(super) side: Stream,
    to_device: Stream,
    to_host: Stream,
    /// The last copy to the host.
    offloaded: Option<Arc<Event>>,
    /// Copies and waits for them that were not yet seen to be over, oldest first.
    copies: VecDeque<Span>,
    waits: VecDeque<Span>,
    /// Whether the ops queued now are those of [`super::Engine::beside`], whose waits hold nobody up.
    pub(super) beside: bool,
    sums: Transfers,
}

impl Lanes {
    pub(super) fn new(device: &Device) -> Result<Lanes, Error> {
        Ok(Lanes {
            side: device.new_stream()?,
            to_device: device.new_stream()?,
            to_host: device.new_stream()?,
            offloaded: None,
            copies: VecDeque::new(),
            waits: VecDeque::new(),
            beside: false,
            sums: Transfers::default(),
        })
    }

    /// Queues a copy of device memory to bytes of the host's arena, after what `ops` has queued so far.
    ///
    /// # Safety
    /// Both stay allocated until the copy is over, and its source is not written nor its target touched before.
    pub(super) unsafe fn offload(
        &mut self,
        device: &Device,
        ops: &Stream,
        from: u64,
        (host, to): (&mut PinnedBuffer, Range<usize>),
    ) -> Result<Arc<Event>, Error> {
        self.to_host.wait(&*mark(device, ops)?)?;
        let start = mark(device, &self.to_host)?;
        self.sums.to_host_bytes += to.len() as u64;
        // SAFETY: the caller's promise.
        unsafe { self.to_host.copy_to_host(&mut host.as_mut_slice::<u8>()[to], from)? };
        let end = mark(device, &self.to_host)?;
        self.offloaded = Some(end.clone());
        self.copies.push_back((start, end.clone()));
        self.add_up()?;
        Ok(end)
    }

    /// Queues a copy of bytes of the host's arena to device memory, after what `ops` and the copies to the host have queued
    /// so far.
    ///
    /// # Safety
    /// As [`Lanes::offload`].
    pub(super) unsafe fn fetch(
        &mut self,
        device: &Device,
        ops: &Stream,
        (host, from): (&PinnedBuffer, Range<usize>),
        to: u64,
    ) -> Result<Arc<Event>, Error> {
        self.to_device.wait(&*mark(device, ops)?)?;
        if let Some(offloaded) = &self.offloaded {
            self.to_device.wait(offloaded)?;
        }
        let start = mark(device, &self.to_device)?;
        self.sums.to_device_bytes += from.len() as u64;
        // SAFETY: the caller's promise.
        unsafe { self.to_device.copy_to_device(to, &host.as_slice::<u8>()[from])? };
        let end = mark(device, &self.to_device)?;
        self.copies.push_back((start, end.clone()));
        self.add_up()?;
        Ok(end)
    }

    /// What `ops` queues from now on comes after the event. The time it stands still for that is taken.
    pub(super) fn wait(&mut self, device: &Device, ops: &Stream, event: &Event) -> Result<(), Error> {
        if self.beside {
            return ops.wait(event);
        }
        let start = mark(device, ops)?;
        ops.wait(event)?;
        self.waits.push_back((start, mark(device, ops)?));
        Ok(())
    }

    /// Waits for everything here.
    pub(super) fn synchronize(&self) -> Result<(), Error> {
        [&self.side, &self.to_device, &self.to_host].into_iter().try_for_each(Stream::synchronize)
    }

    /// What was copied and waited for since the last call, as far as it is over.
    pub(super) fn take_sums(&mut self) -> Result<Transfers, Error> {
        self.add_up()?;
        Ok(std::mem::take(&mut self.sums))
    }

    /// Adds up, and forgets, what is over.
    fn add_up(&mut self) -> Result<(), Error> {
        let sums = &mut self.sums;
        for (spans, ms) in [(&mut self.copies, &mut sums.copy_ms), (&mut self.waits, &mut sums.waited_ms)] {
            while let Some((start, end)) = spans.front()
                && end.happened()?
            {
                *ms += end.microseconds_since(start)? * 1e-3;
                spans.pop_front();
            }
        }
        Ok(())
    }
}

/// A new event after what the stream has queued so far.
pub(super) fn mark(device: &Device, stream: &Stream) -> Result<Arc<Event>, Error> {
    let event = Arc::new(device.new_event()?);
    stream.record(&event)?;
    Ok(event)
}
