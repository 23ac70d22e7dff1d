//! Copies that go on by themselves: TMA, bulk copies and reductions, `cp.async`. Each happens at a random moment after
//! its issue; what waits for it makes it happen at the latest.

use crate::block::{Block, Fault, ILLEGAL_ADDRESS, LAUNCH_FAILED, MISALIGNED, Next};
use crate::decode::{At, Atomic, NONE, Op, Ty};
use crate::execute::{atomically, lanes};
use crate::tensor_map::{TensorMap, swizzled};

/// Where a store of the copy engine goes.
#[derive(Clone, Debug)]
enum Target {
    Tensor(Box<TensorMap>, [i32; 5]),
    Line(u64),
}

/// One lane's part of a `cp.async`.
#[derive(Clone, Copy, Debug)]
struct Piece {
    lane: u32,
    to: u32,
    from: u64,
    read: u32,
}

/// Who issued it: warp, lane and instruction, for messages.
type Issuer = (usize, Option<u32>, u32);

/// A load of several CTAs is one for each: they need not have it at the same time. `into` is the CTA.
#[derive(Clone, Debug)]
enum Work {
    TensorLoad {
        map: Box<TensorMap>,
        coordinates: [i32; 5],
        to: u32,
        barrier: u32,
        into: usize,
    },
    BulkLoad {
        from: u64,
        to: u32,
        bytes: u32,
        barrier: u32,
        into: usize,
    },
    ToShared {
        from: u32,
        to: (usize, u32),
        bytes: u32,
        barrier: (usize, u32),
    },
    Store {
        target: Target,
        from: u32,
        bytes: u32,
        reduce: Option<(Atomic, Ty)>,
        thread: u32,
        group: u64,
        data: Option<Vec<u8>>,
    },
    CpAsync {
        pieces: Vec<Piece>,
        bytes: u32,
        warp: usize,
        group: u64,
    },
    CpArrive {
        barrier: u32,
        thread: u32,
        warp: usize,
        lane: u32,
    },
}

/// A copy under way.
#[derive(Clone, Debug)]
pub(crate) struct Async {
    cta: usize,
    issuer: Issuer,
    work: Work,
}

impl Async {
    /// What would go wrong if a CTA's shared memory went away now.
    pub(crate) fn needs_shared_of(&self, cta: usize) -> Option<&'static str> {
        match &self.work {
            Work::TensorLoad { into, .. } | Work::BulkLoad { into, .. } if *into == cta => {
                Some("a bulk load into its shared memory had not been waited for")
            }
            Work::ToShared { to, .. } if to.0 == cta => {
                Some("a bulk copy into its shared memory had not been waited for")
            }
            _ if self.cta != cta => None,
            Work::TensorLoad { .. } | Work::BulkLoad { .. } | Work::Store { data: Some(_), .. } => None,
            Work::Store { .. } | Work::ToShared { .. } => {
                Some("a bulk store of its shared memory had not been waited for")
            }
            Work::CpAsync { .. } | Work::CpArrive { .. } => Some("a cp.async had not been waited for"),
        }
    }
}

impl Block<'_> {
    fn push(&mut self, w: usize, lane: u32, work: Work) {
        let issuer = (w, Some(lane), self.here.2);
        let cta = self.cta_of(w);
        self.asyncs.push(Async { cta, issuer, work });
    }

    fn word_of(&self, w: usize, word: u32, lane: u32) -> u32 {
        self.warps[w].word(word)[lane as usize]
    }

    fn map_of(&mut self, w: usize, at: At, lane: u32) -> Result<TensorMap, Fault> {
        let address = self.address_of(w, at, lane);
        if !address.is_multiple_of(64) {
            return Err(Fault::new(
                MISALIGNED,
                format!("a tensor map at {address:#x}; allowed: multiples of 64"),
            ));
        }
        let place = self.global(w, lane, address, 128, false)?;
        // SAFETY: 128 readable bytes, aligned to 64.
        let words = unsafe { *place.cast::<[u64; 16]>() };
        TensorMap::from_words(&words)
            .ok_or_else(|| Fault::new(LAUNCH_FAILED, format!("there is no tensor map at {address:#x}")))
    }

    /// An address in this CTA's shared memory for the copy engine.
    fn engine_address(&mut self, w: usize, at: At, lane: u32, bytes: u32, align: u32) -> Result<u32, Fault> {
        let address = self.address_of(w, at, lane);
        let (cta, place) = self.shared_place(w, address);
        if !place.is_multiple_of(align as u64) {
            return Err(Fault::new(
                MISALIGNED,
                format!("the copy engine at {place:#x} of shared memory; allowed: multiples of {align}"),
            ));
        }
        if cta != self.cta_of(w) || !self.ctas[cta].shared.holds(place, bytes) {
            let end = self.ctas[cta].shared.end();
            return Err(Fault::new(
                ILLEGAL_ADDRESS,
                format!(
                    "the copy engine on {bytes} bytes at {place:#x} of shared memory, which ends at {end:#x}"
                ),
            ));
        }
        Ok(place as u32)
    }

    /// The CTAs a load is for.
    fn multicast(&self, w: usize, multicast: u32, lane: u32) -> Result<Vec<usize>, Fault> {
        if multicast == NONE {
            return Ok(vec![self.cta_of(w)]);
        }
        let mask = self.word_of(w, multicast, lane) & 0xFFFF;
        if mask == 0 || mask >> self.ctas.len() != 0 {
            return Err(Fault::new(
                LAUNCH_FAILED,
                format!("multicast to {mask:#x} in a cluster of {}", self.ctas.len()),
            ));
        }
        let ctas: Vec<usize> = (0..self.ctas.len()).filter(|cta| mask >> cta & 1 != 0).collect();
        ctas.iter().try_for_each(|&cta| self.still_there(w, cta))?;
        Ok(ctas)
    }

    /// Issues, commits and waits. The copies come back to [`Block::perform`].
    pub(crate) fn copy(&mut self, w: usize, op: &Op, active: u32) -> Result<Next, Fault> {
        let cta = self.cta_of(w);
        match op {
            Op::TensorLoad { to, map, barrier, coordinates, rank, multicast } => {
                for lane in lanes(active) {
                    self.here.1 = Some(lane);
                    let map = self.map_of(w, *map, lane)?;
                    if map.rank != *rank {
                        return Err(
                            format!("a map of {} dimensions in an instruction of {rank}", map.rank).into()
                        );
                    }
                    let to = self.engine_address(w, *to, lane, map.box_bytes(), 128)?;
                    let (_, barrier) = self.barrier_address(w, *barrier, lane)?;
                    let coordinates = self.coordinates(w, coordinates, lane);
                    for into in self.multicast(w, *multicast, lane)? {
                        let map = Box::new(map);
                        self.push(w, lane, Work::TensorLoad { map, coordinates, to, barrier, into });
                    }
                }
            }
            Op::TensorStore { from, map, coordinates, rank, reduce } => {
                for lane in lanes(active) {
                    self.here.1 = Some(lane);
                    let map = self.map_of(w, *map, lane)?;
                    if map.rank != *rank {
                        return Err(
                            format!("a map of {} dimensions in an instruction of {rank}", map.rank).into()
                        );
                    }
                    let bytes = map.box_bytes();
                    let from = self.engine_address(w, *from, lane, bytes, 128)?;
                    let coordinates = self.coordinates(w, coordinates, lane);
                    let reduce = reduce.map(|op| (op, map.ty));
                    let target = Target::Tensor(Box::new(map), coordinates);
                    let thread = self.thread_of(w, lane);
                    let group = self.ctas[cta].bulk_group[thread as usize];
                    self.push(
                        w,
                        lane,
                        Work::Store { target, from, bytes, reduce, thread, group, data: None },
                    );
                }
            }
            Op::BulkLoad { to, from, bytes, barrier, multicast } => {
                for lane in lanes(active) {
                    self.here.1 = Some(lane);
                    let bytes = self.bulk_bytes(w, *bytes, lane)?;
                    let to = self.engine_address(w, *to, lane, bytes, 16)?;
                    let from = self.line(w, *from, lane, bytes, false)?;
                    let (_, barrier) = self.barrier_address(w, *barrier, lane)?;
                    for into in self.multicast(w, *multicast, lane)? {
                        self.push(w, lane, Work::BulkLoad { from, to, bytes, barrier, into });
                    }
                }
            }
            Op::BulkStore { to, from, bytes, reduce } => {
                for lane in lanes(active) {
                    self.here.1 = Some(lane);
                    let bytes = self.bulk_bytes(w, *bytes, lane)?;
                    let from = self.engine_address(w, *from, lane, bytes, 16)?;
                    let to = self.line(w, *to, lane, bytes, true)?;
                    let thread = self.thread_of(w, lane);
                    let group = self.ctas[cta].bulk_group[thread as usize];
                    let (target, reduce) = (Target::Line(to), *reduce);
                    self.push(
                        w,
                        lane,
                        Work::Store { target, from, bytes, reduce, thread, group, data: None },
                    );
                }
            }
            Op::BulkToShared { to, from, bytes, barrier } => {
                for lane in lanes(active) {
                    self.here.1 = Some(lane);
                    let bytes = self.bulk_bytes(w, *bytes, lane)?;
                    let from = self.engine_address(w, *from, lane, bytes, 16)?;
                    let to = self.address_of(w, *to, lane);
                    let (cta, place) = self.shared_place(w, to);
                    self.still_there(w, cta)?;
                    if !place.is_multiple_of(16) || !self.ctas[cta].shared.holds(place, bytes) {
                        return Err(Fault::new(
                            ILLEGAL_ADDRESS,
                            format!("a bulk copy to {place:#x} of shared memory"),
                        ));
                    }
                    let barrier = self.barrier_address(w, *barrier, lane)?;
                    self.push(w, lane, Work::ToShared { from, to: (cta, place as u32), bytes, barrier });
                }
            }
            Op::BulkCommit => {
                for lane in lanes(active) {
                    let thread = self.thread_of(w, lane) as usize;
                    self.ctas[cta].bulk_group[thread] += 1;
                }
            }
            Op::BulkWait { groups, read } => {
                for lane in lanes(active) {
                    let thread = self.thread_of(w, lane);
                    let before = self.ctas[cta].bulk_group[thread as usize].saturating_sub(*groups as u64);
                    // In a random order, the ones that are due.
                    loop {
                        let due: Vec<usize> = (0..self.asyncs.len())
                            .filter(|&i| {
                                let one = &self.asyncs[i];
                                matches!(&one.work, Work::Store { thread: t, group, data, .. }
                                    if one.cta == cta && *t == thread && *group < before
                                        && !(*read && data.is_some()))
                            })
                            .collect();
                        if due.is_empty() {
                            break;
                        }
                        let one = due[self.random.below(due.len())];
                        self.perform(one)?;
                    }
                }
            }
            Op::CpAsync { to, from, bytes, size } => {
                let tos = self.addresses(w, *to);
                let froms = self.addresses(w, *from);
                let mut pieces = Vec::new();
                for lane in lanes(active) {
                    let l = lane as usize;
                    self.here.1 = Some(lane);
                    let read = if *size == NONE { *bytes } else { self.word_of(w, *size, lane) };
                    if read > *bytes {
                        return Err(format!("cp.async of {bytes} bytes that reads {read}").into());
                    }
                    let (_, place) = self.shared_place(w, tos[l]);
                    if !place.is_multiple_of(*bytes as u64) || !froms[l].is_multiple_of(*bytes as u64) {
                        return Err(Fault::new(
                            MISALIGNED,
                            format!("cp.async of {bytes} bytes from {:#x} to {place:#x}", froms[l]),
                        ));
                    }
                    if !self.ctas[cta].shared.holds(place, *bytes) {
                        return Err(Fault::new(
                            ILLEGAL_ADDRESS,
                            format!("cp.async to {place:#x}, outside shared memory"),
                        ));
                    }
                    if read > 0 {
                        self.global(w, lane, froms[l], read as u64, false)?;
                    }
                    pieces.push(Piece { lane, to: place as u32, from: froms[l], read });
                }
                let thread = self.thread_of(w, active.trailing_zeros());
                let group = self.ctas[cta].copy_group[thread as usize];
                let work = Work::CpAsync { pieces, bytes: *bytes, warp: w, group };
                self.push(w, active.trailing_zeros(), work);
            }
            Op::CpAsyncCommit => {
                for lane in lanes(active) {
                    let thread = self.thread_of(w, lane) as usize;
                    self.ctas[cta].copy_group[thread] += 1;
                }
            }
            Op::CpAsyncWait { groups } => {
                let thread = self.thread_of(w, active.trailing_zeros()) as usize;
                let before = match *groups {
                    NONE => u64::MAX,
                    groups => self.ctas[cta].copy_group[thread].saturating_sub(groups as u64),
                };
                self.end_cp_async(w, active, before)?;
            }
            Op::MbarCpAsync { at, noinc } => {
                for lane in lanes(active) {
                    self.here.1 = Some(lane);
                    let (cta, barrier) = self.barrier_address(w, *at, lane)?;
                    let one = self.barrier(cta, barrier)?;
                    if !noinc {
                        one.pending += 1;
                    }
                    let thread = self.thread_of(w, lane);
                    self.push(w, lane, Work::CpArrive { barrier, thread, warp: w, lane });
                }
            }
            Op::PrefetchMap { map } => {
                let lane = active.trailing_zeros();
                self.here.1 = Some(lane);
                self.map_of(w, *map, lane)?;
            }
            other => return Err(format!("not emulated: {other:?}").into()),
        }
        Ok(Next::Step)
    }

    fn coordinates(&self, w: usize, registers: &[u32; 5], lane: u32) -> [i32; 5] {
        registers.map(|r| if r == NONE { 0 } else { self.word_of(w, r, lane) as i32 })
    }

    fn bulk_bytes(&self, w: usize, register: u32, lane: u32) -> Result<u32, Fault> {
        let bytes = self.word_of(w, register, lane);
        if !bytes.is_multiple_of(16) {
            return Err(Fault::new(
                MISALIGNED,
                format!("a bulk copy of {bytes} bytes; allowed: multiples of 16"),
            ));
        }
        Ok(bytes)
    }

    /// A line of global memory for the copy engine.
    fn line(&mut self, w: usize, at: At, lane: u32, bytes: u32, write: bool) -> Result<u64, Fault> {
        let address = self.address_of(w, at, lane);
        if !address.is_multiple_of(16) {
            return Err(Fault::new(
                MISALIGNED,
                format!("a bulk copy at {address:#x}; allowed: multiples of 16"),
            ));
        }
        if bytes > 0 {
            self.global(w, lane, address, bytes as u64, write)?;
        }
        Ok(address)
    }

    /// Makes the `cp.async` of these lanes, of groups below `before`, happen.
    fn end_cp_async(&mut self, w: usize, mask: u32, before: u64) -> Result<(), Fault> {
        loop {
            let due: Vec<usize> = (0..self.asyncs.len())
                .filter(|&i| {
                    matches!(&self.asyncs[i].work, Work::CpAsync { pieces, warp, group, .. }
                        if *warp == w && *group < before && pieces.iter().any(|p| mask >> p.lane & 1 != 0))
                })
                .collect();
            if due.is_empty() {
                return Ok(());
            }
            let one = due[self.random.below(due.len())];
            self.perform(one)?;
        }
    }

    /// Makes one copy happen, or, of a store, the next half of it.
    pub(crate) fn perform(&mut self, index: usize) -> Result<(), Fault> {
        let Async { cta, issuer, work } = self.asyncs.swap_remove(index);
        let here = self.here;
        self.here = issuer;
        self.work(cta, issuer, work)?;
        self.here = here;
        Ok(())
    }

    /// What the copy engine writes into shared memory must not have ordinary writes before it that no fence ordered.
    fn engine_writes(&mut self, cta: usize, to: u32, bytes: u32, reader: u32) -> Result<(), Fault> {
        if let Some(writer) = self.ctas[cta].shared.unfenced(to, bytes, reader) {
            return Err(Fault::new(
                LAUNCH_FAILED,
                format!(
                    "the copy engine writes shared memory at {to:#x}, which thread {writer} wrote by an ordinary store \
                     without a fence.proxy.async after it"
                ),
            ));
        }
        self.ctas[cta].shared.note_async_write(to, bytes);
        Ok(())
    }

    fn work(&mut self, cta: usize, issuer: Issuer, work: Work) -> Result<(), Fault> {
        let (w, lane, _) = issuer;
        let thread_of_issuer = self.thread_of(w, lane.unwrap_or(0));
        match work {
            Work::TensorLoad { map, coordinates, to, barrier, into } => {
                let inner = map.inner_bytes();
                let mut tile = vec![0u8; map.box_bytes() as usize];
                if map.nan {
                    tile.fill(0xFF);
                }
                let regions = self.launch.regions;
                map.rows(&coordinates, |offset, address, bytes, skip| {
                    if bytes == 0 {
                        return Ok(());
                    }
                    if regions.find(address, bytes as u64).is_none() {
                        return Err(Fault::new(
                            ILLEGAL_ADDRESS,
                            format!(
                                "a tensor load at {coordinates:?} reads {bytes} bytes at {address:#x}: {}",
                                regions.around(address)
                            ),
                        ));
                    }
                    let row = &mut tile[(offset + skip) as usize..][..bytes as usize];
                    // SAFETY: within an allocation, as just found.
                    unsafe {
                        std::ptr::copy_nonoverlapping(address as *const u8, row.as_mut_ptr(), row.len())
                    };
                    Ok(())
                })?;
                self.engine_writes(into, to, map.box_bytes(), thread_of_issuer)?;
                let shared = &mut self.ctas[into].shared;
                if map.swizzle != 0 && inner != map.swizzle {
                    return Err("a box narrower than its swizzle is not emulated".to_string().into());
                }
                for (i, chunk) in tile.chunks_exact(16).enumerate() {
                    let at = swizzled(to + 16 * i as u32, map.swizzle);
                    if !shared.holds(at as u64, 16) {
                        return Err(Fault::new(ILLEGAL_ADDRESS, format!("a tensor load into {at:#x}")));
                    }
                    shared.at_mut(at, 16).copy_from_slice(chunk);
                }
                self.barrier(into, barrier)?.complete(map.box_bytes() as i64);
            }
            Work::BulkLoad { from, to, bytes, barrier, into } => {
                self.engine_writes(into, to, bytes, thread_of_issuer)?;
                let line = self.ctas[into].shared.at_mut(to, bytes as usize);
                // SAFETY: checked when it was issued; allocations outlive the launch.
                unsafe { std::ptr::copy_nonoverlapping(from as *const u8, line.as_mut_ptr(), line.len()) };
                self.barrier(into, barrier)?.complete(bytes as i64);
            }
            Work::ToShared { from, to, bytes, barrier } => {
                let data = self.engine_reads(cta, from, bytes, thread_of_issuer)?;
                self.ctas[to.0].shared.note_async_write(to.1, bytes);
                self.ctas[to.0].shared.at_mut(to.1, bytes as usize).copy_from_slice(&data);
                self.barrier(barrier.0, barrier.1)?.complete(bytes as i64);
            }
            Work::Store { target, from, bytes, reduce, thread, group, data: None } => {
                let data = match &target {
                    Target::Tensor(map, _) if map.swizzle != 0 => {
                        if map.inner_bytes() != map.swizzle {
                            return Err("a box narrower than its swizzle is not emulated".to_string().into());
                        }
                        let mut tile = Vec::with_capacity(bytes as usize);
                        for i in 0..bytes / 16 {
                            let at = swizzled(from + 16 * i, map.swizzle);
                            tile.extend_from_slice(&self.engine_reads(cta, at, 16, thread)?);
                        }
                        tile
                    }
                    _ => self.engine_reads(cta, from, bytes, thread)?,
                };
                let data = Some(data);
                let work = Work::Store { target, from, bytes, reduce, thread, group, data };
                self.asyncs.push(Async { cta, issuer, work });
            }
            Work::Store { target, reduce, data: Some(data), .. } => {
                let regions = self.launch.regions;
                let write = |address: u64, data: &[u8]| {
                    match regions.find(address, data.len() as u64) {
                        Some(region) if region.writable => {}
                        _ => {
                            return Err(Fault::new(
                                ILLEGAL_ADDRESS,
                                format!(
                                    "the copy engine writes {} bytes at {address:#x}: {}",
                                    data.len(),
                                    regions.around(address)
                                ),
                            ));
                        }
                    }
                    let Some((op, ty)) = reduce else {
                        // SAFETY: within an allocation, as just found.
                        unsafe {
                            std::ptr::copy_nonoverlapping(data.as_ptr(), address as *mut u8, data.len())
                        };
                        return Ok(());
                    };
                    let size = ty.bytes() as usize;
                    if size < 4 {
                        return Err("bulk reductions of halves are not emulated".to_string().into());
                    }
                    for (i, element) in data.chunks_exact(size).enumerate() {
                        let mut bits = [0u8; 8];
                        bits[..size].copy_from_slice(element);
                        let place = (address as usize + i * size) as *mut u8;
                        // SAFETY: within an allocation and aligned to 16.
                        unsafe { atomically(place, ty, op, u64::from_le_bytes(bits), 0) };
                    }
                    Ok(())
                };
                match target {
                    Target::Line(to) => write(to, &data)?,
                    Target::Tensor(map, coordinates) => {
                        map.rows(&coordinates, |offset, address, bytes, skip| match bytes {
                            0 => Ok(()),
                            _ => write(address, &data[(offset + skip) as usize..][..bytes as usize]),
                        })?;
                    }
                }
            }
            Work::CpAsync { pieces, bytes, warp, .. } => {
                for piece in pieces {
                    let thread = self.thread_of(warp, piece.lane);
                    let shared = &mut self.ctas[cta].shared;
                    shared.note_write(piece.to, bytes, thread);
                    let into = shared.at_mut(piece.to, bytes as usize);
                    into.fill(0);
                    let read = piece.read as usize;
                    // SAFETY: checked when it was issued; allocations outlive the launch.
                    unsafe {
                        std::ptr::copy_nonoverlapping(piece.from as *const u8, into.as_mut_ptr(), read)
                    };
                }
            }
            Work::CpArrive { barrier, thread, warp, lane } => {
                let _ = thread;
                self.end_cp_async(warp, 1 << lane, u64::MAX)?;
                let one = self.barrier(cta, barrier)?;
                one.arrive(1, 0).map_err(|why| format!("the barrier at {barrier:#x}: {why}"))?;
            }
        }
        Ok(())
    }

    fn engine_reads(&mut self, cta: usize, from: u32, bytes: u32, reader: u32) -> Result<Vec<u8>, Fault> {
        let shared = &mut self.ctas[cta].shared;
        if !shared.holds(from as u64, bytes) {
            return Err(Fault::new(
                ILLEGAL_ADDRESS,
                format!("the copy engine reads shared memory at {from:#x}"),
            ));
        }
        if let Some(writer) = shared.unfenced(from, bytes, reader) {
            return Err(Fault::new(
                LAUNCH_FAILED,
                format!(
                    "the copy engine reads shared memory at {from:#x}, which thread {writer} wrote by an ordinary store \
                     without a fence.proxy.async after it"
                ),
            ));
        }
        Ok(shared.at(from, bytes as usize).to_vec())
    }
}
