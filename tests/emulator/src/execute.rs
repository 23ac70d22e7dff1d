//! Instructions that touch more than a warp's registers.

use crate::block::{Block, Fault, ILLEGAL_ADDRESS, LAUNCH_FAILED, MISALIGNED, Mbarrier, Named, Next};
use crate::decode::{At, Atomic, BarRed, NONE, Op, SHARED_WINDOW, Shuffle, Ty, Vote, Wgmma, Where};
use crate::parse::Class;
use crate::product::{
    Descriptor, columns_of_registers, columns_of_shared, multiply, rows_of_registers, rows_of_shared,
};
use crate::warp::{FULL, Issued, LANES, Wait};
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

/// The lanes of a mask.
pub(crate) fn lanes(mask: u32) -> impl Iterator<Item = u32> {
    (0..LANES as u32).filter(move |lane| mask >> lane & 1 != 0)
}

fn refuse<T>(text: impl Into<String>) -> Result<T, Fault> {
    Err(Fault::new(LAUNCH_FAILED, text))
}

/// `old op value` of an atomic on a value of this type; both and the result as bits.
fn combine(op: Atomic, ty: Ty, old: u64, a: u64, b: u64) -> u64 {
    let (x32, y32) = (old as u32, a as u32);
    match (op, ty) {
        (Atomic::Exch, _) => a,
        (Atomic::Cas, Ty::U32 | Ty::S32 | Ty::F32) => {
            if x32 == y32 {
                b
            } else {
                old
            }
        }
        (Atomic::Cas, _) => {
            if old == a {
                b
            } else {
                old
            }
        }
        (Atomic::And, _) => old & a,
        (Atomic::Or, _) => old | a,
        (Atomic::Xor, _) => old ^ a,
        (Atomic::Add, Ty::F32) => crate::float::bits_of(f32::from_bits(x32) + f32::from_bits(y32)) as u64,
        (Atomic::Add, Ty::F64) => (f64::from_bits(old) + f64::from_bits(a)).to_bits(),
        (Atomic::Add, _) => old.wrapping_add(a),
        (Atomic::Min, Ty::S32) => (x32 as i32).min(y32 as i32) as u32 as u64,
        (Atomic::Max, Ty::S32) => (x32 as i32).max(y32 as i32) as u32 as u64,
        (Atomic::Min, Ty::U32) => x32.min(y32) as u64,
        (Atomic::Max, Ty::U32) => x32.max(y32) as u64,
        (Atomic::Min, Ty::S64) => (old as i64).min(a as i64) as u64,
        (Atomic::Max, Ty::S64) => (old as i64).max(a as i64) as u64,
        (Atomic::Min, Ty::F32) => {
            crate::float::min(f32::from_bits(x32), f32::from_bits(y32)).to_bits() as u64
        }
        (Atomic::Max, Ty::F32) => {
            crate::float::max(f32::from_bits(x32), f32::from_bits(y32)).to_bits() as u64
        }
        (Atomic::Min, _) => old.min(a),
        (Atomic::Max, _) => old.max(a),
        (Atomic::Inc, _) => {
            if x32 >= y32 {
                0
            } else {
                x32 as u64 + 1
            }
        }
        (Atomic::Dec, _) => {
            if x32 == 0 || x32 > y32 {
                y32 as u64
            } else {
                x32 as u64 - 1
            }
        }
    }
}

/// An atomic on real memory, which other host threads may share.
///
/// # Safety
/// `place` is aligned and valid.
pub(crate) unsafe fn atomically(place: *mut u8, ty: Ty, op: Atomic, a: u64, b: u64) -> u64 {
    // SAFETY: the caller's promise; the memory is only accessed by atomics or by launches that race.
    unsafe {
        if ty.bytes() == 4 {
            let cell = AtomicU32::from_ptr(place.cast());
            let change = |old: u32| Some(combine(op, ty, old as u64, a, b) as u32);
            cell.fetch_update(Ordering::SeqCst, Ordering::SeqCst, change).unwrap_or_else(|old| old) as u64
        } else {
            let cell = AtomicU64::from_ptr(place.cast());
            let change = |old: u64| Some(combine(op, ty, old, a, b));
            cell.fetch_update(Ordering::SeqCst, Ordering::SeqCst, change).unwrap_or_else(|old| old)
        }
    }
}

impl Block<'_> {
    /// The one value that all active lanes hold in a word.
    fn uniform(&self, w: usize, word: u32, active: u32, what: &str) -> Result<u32, Fault> {
        let values = self.warps[w].word(word);
        let first = values[active.trailing_zeros() as usize];
        match lanes(active).find(|&lane| values[lane as usize] != first) {
            None => Ok(first),
            Some(lane) => refuse(format!(
                "{what} differs within the warp: {first:#x}, {:#x} in lane {lane}",
                values[lane as usize]
            )),
        }
    }

    /// Whether all lanes of `members` are here; else what this fragment waits for.
    fn together(&self, w: usize, members: u32, active: u32, fragment: u32) -> Result<Option<Next>, Fault> {
        let need = members & self.warps[w].live;
        if need & !fragment != 0 {
            return Ok(Some(Next::Wait(Wait::Lanes(need), false)));
        }
        if need & !active != 0 {
            return refuse(format!(
                "lanes {:#010x} of the member mask do not execute the instruction (their guard is false)",
                need & !active
            ));
        }
        Ok(None)
    }

    /// As [`Block::together`] for an instruction that names its members.
    fn members(&self, w: usize, members: u32, active: u32, fragment: u32) -> Result<Option<Next>, Fault> {
        let mask = self.uniform(w, members, active, "the member mask")?;
        if active & !mask != 0 {
            return refuse(format!(
                "lanes {:#010x} execute it and are not in the member mask {mask:#010x}",
                active & !mask
            ));
        }
        self.together(w, mask, active, fragment)
    }

    /// As [`Block::together`] for `.aligned` instructions.
    fn aligned(&self, w: usize, active: u32, fragment: u32) -> Result<Option<Next>, Fault> {
        self.together(w, FULL, active, fragment)
    }

    /// Every instruction that is not arithmetic. `fragment` are the lanes at it, `active` those whose guard holds.
    #[inline(never)]
    pub(crate) fn execute(&mut self, w: usize, op: &Op, active: u32, fragment: u32) -> Result<Next, Fault> {
        macro_rules! gather {
            ($e:expr) => {
                if let Some(next) = $e? {
                    return Ok(next);
                }
            };
        }
        match op {
            Op::Ld { at, space, ty, d, count, wide } => {
                self.load(w, *at, *space, *ty, d, *count, *wide, active)?
            }
            Op::St { at, space, ty, a, count, wide } => {
                self.store(w, *at, *space, *ty, a, *count, *wide, active)?
            }
            Op::Atom { at, space, ty, op, d, a, b, count } => {
                let addresses = self.addresses(w, *at);
                let bytes = ty.bytes();
                let mut out = [0u64; LANES];
                for lane in lanes(active) {
                    let l = lane as usize;
                    // The whole vector is aligned, each element is an atomic of its own.
                    self.resolve(w, lane, addresses[l], bytes * count, *space, true)?;
                    for (i, &a) in a.iter().enumerate().take(*count as usize) {
                        let address = addresses[l] + i as u64 * bytes as u64;
                        let place = self.resolve(w, lane, address, bytes, *space, true)?;
                        let warp = &self.warps[w];
                        let value = |r: u32| match bytes {
                            8 => warp.double(r)[l],
                            _ => warp.word(r)[l] as u64,
                        };
                        let other = if *b == NONE { 0 } else { value(*b) };
                        // SAFETY: resolve checked alignment and bounds.
                        out[l] = unsafe { atomically(place, *ty, *op, value(a), other) };
                    }
                }
                let warp = &mut self.warps[w];
                match bytes {
                    8 => warp.set_double(*d, &out, active),
                    _ => warp.set_word(*d, &out.map(|x| x as u32), active),
                }
            }
            Op::Trap => return refuse("trap"),
            Op::Yield => return Ok(Next::Yield),
            Op::Shfl { mode, d, p, a, b, c, members } => {
                gather!(self.members(w, *members, active, fragment));
                let warp = &self.warps[w];
                let (x, to, clamp) = (*warp.word(*a), *warp.word(*b), *warp.word(*c));
                let (mut out, mut inside) = (x, 0u32);
                for lane in lanes(active) {
                    let l = lane as usize;
                    let segment = clamp[l] >> 8 & 0x1F;
                    let most = lane & segment | clamp[l] & 0x1F & !segment;
                    let least = lane & segment;
                    let by = to[l] & 0x1F;
                    let (source, good) = match mode {
                        Shuffle::Up => {
                            let s = lane as i32 - by as i32;
                            (s, s >= most as i32)
                        }
                        Shuffle::Down => ((lane + by) as i32, lane + by <= most),
                        Shuffle::Butterfly => ((lane ^ by) as i32, lane ^ by <= most),
                        Shuffle::Index => {
                            let s = least | by & !segment;
                            (s as i32, s <= most)
                        }
                    };
                    if good {
                        if active >> source & 1 == 0 {
                            self.here.1 = Some(lane);
                            return refuse(format!("shfl reads lane {source}, which does not take part"));
                        }
                        out[l] = x[source as usize];
                        inside |= 1 << lane;
                    }
                }
                let warp = &mut self.warps[w];
                warp.set_word(*d, &out, active);
                warp.set_predicate(*p, inside, active);
            }
            Op::Vote { mode, d, a, a_not, members } => {
                gather!(self.members(w, *members, active, fragment));
                let warp = &mut self.warps[w];
                let p = warp.predicate(*a);
                let p = if *a_not { !p } else { p } & active;
                let truth = |b: bool| if b { FULL } else { 0 };
                match mode {
                    Vote::Ballot => warp.set_word(*d, &[p; LANES], active),
                    Vote::All => warp.set_predicate(*d, truth(p == active), active),
                    Vote::Any => warp.set_predicate(*d, truth(p != 0), active),
                    Vote::Uni => warp.set_predicate(*d, truth(p == 0 || p == active), active),
                }
            }
            Op::MatchAny { wide, all, d, p, a, members } => {
                gather!(self.members(w, *members, active, fragment));
                let warp = &mut self.warps[w];
                let values: [u64; LANES] = match wide {
                    true => *warp.double(*a),
                    false => warp.word(*a).map(|x| x as u64),
                };
                let out: [u32; LANES] = std::array::from_fn(|l| {
                    lanes(active).filter(|&o| values[o as usize] == values[l]).fold(0, |m, o| m | 1 << o)
                });
                if *all {
                    let same = out[active.trailing_zeros() as usize] == active;
                    warp.set_word(*d, &[if same { active } else { 0 }; LANES], active);
                    warp.set_predicate(*p, if same { FULL } else { 0 }, active);
                } else {
                    warp.set_word(*d, &out, active);
                }
            }
            Op::Redux { op, signed, d, a, members } => {
                gather!(self.members(w, *members, active, fragment));
                let warp = &mut self.warps[w];
                let values = *warp.word(*a);
                let ty = if *signed { Ty::S32 } else { Ty::U32 };
                let all = lanes(active).map(|lane| values[lane as usize] as u64);
                let value = all.reduce(|x, y| combine(*op, ty, x & 0xFFFF_FFFF, y, 0)).unwrap_or(0);
                warp.set_word(*d, &[value as u32; LANES], active);
            }
            Op::Elect { d, p, members } => {
                gather!(self.members(w, *members, active, fragment));
                let leader = active.trailing_zeros();
                let warp = &mut self.warps[w];
                warp.set_word(*d, &[leader; LANES], active);
                warp.set_predicate(*p, 1 << leader, active);
            }
            Op::ActiveMask { d } => self.warps[w].set_word(*d, &[active; LANES], active),
            Op::WarpSync { members } => gather!(self.members(w, *members, active, fragment)),
            Op::Bar { id, threads, wait, red, d, a, a_not } => {
                gather!(self.aligned(w, active, fragment));
                return self.named(w, *id, *threads, *wait, *red, *d, (*a, *a_not), active);
            }
            Op::MbarInit { at, count } => {
                for lane in lanes(active) {
                    let (cta, address) = self.barrier_address(w, *at, lane)?;
                    let count = self.warps[w].word(*count)[lane as usize] as i64;
                    if count == 0 || count >= 1 << 20 {
                        return refuse(format!(
                            "mbarrier.init with {count} arrivals; allowed: 1 to 2^20 - 1"
                        ));
                    }
                    let fresh = Mbarrier { count, pending: count, bytes: 0, phase: 0 };
                    self.ctas[cta].mbarriers.insert(address, fresh);
                }
            }
            Op::MbarInval { at } => {
                for lane in lanes(active) {
                    let (cta, address) = self.barrier_address(w, *at, lane)?;
                    if self.ctas[cta].mbarriers.remove(&address).is_none() {
                        return refuse(format!("there is no barrier at {address:#x} to invalidate"));
                    }
                }
            }
            Op::MbarArrive { at, state, count, bytes, arrive, drop } => {
                let mut phases = [0u64; LANES];
                for lane in lanes(active) {
                    self.here.1 = Some(lane);
                    let (cta, address) = self.barrier_address(w, *at, lane)?;
                    let warp = &self.warps[w];
                    let pick = |r: u32, otherwise: i64| match r {
                        NONE => otherwise,
                        r => warp.word(r)[lane as usize] as i64,
                    };
                    let (count, bytes) = (if *arrive { pick(*count, 1) } else { 0 }, pick(*bytes, 0));
                    let barrier = self.barrier(cta, address)?;
                    phases[lane as usize] = barrier.phase;
                    if *drop {
                        barrier.count -= count;
                    }
                    barrier
                        .arrive(count, bytes)
                        .map_err(|why| format!("the barrier at {address:#x}: {why}"))?;
                }
                self.warps[w].set_double(*state, &phases, active);
            }
            Op::MbarWait { at, d, phase, state, block } => {
                // Lanes may wait for different barriers; one that waits holds the others of its fragment.
                let mut done = 0u32;
                for lane in lanes(active) {
                    self.here.1 = Some(lane);
                    let (cta, address) = self.barrier_address(w, *at, lane)?;
                    let barrier = *self.barrier(cta, address)?;
                    let warp = &self.warps[w];
                    let ended = if *state {
                        barrier.phase != warp.double(*phase)[lane as usize]
                    } else {
                        (barrier.phase & 1) as u32 != warp.word(*phase)[lane as usize] & 1
                    };
                    if ended {
                        done |= 1 << lane;
                    } else if *block {
                        let parity = (barrier.phase & 1) as u32;
                        return Ok(Next::Wait(Wait::Phase { cta: cta as u32, address, parity }, false));
                    }
                }
                self.warps[w].set_predicate(*d, done, active);
                if done != active {
                    return Ok(Next::Yield);
                }
            }
            Op::FenceProxy => {
                let first = self.thread_of(w, 0);
                let cta = self.cta_of(w);
                self.ctas[cta].shared.fence_warp(first, active);
            }
            Op::Clock { d } => {
                let now = self.random.next() & 0xFFFF;
                let now = self.warps.len() as u64 * 1000 + now;
                match d.class {
                    Class::Double => self.warps[w].set_double(d.index, &[now; LANES], active),
                    _ => self.warps[w].set_word(d.index, &[now as u32; LANES], active),
                }
            }
            Op::LdMatrix { at, d, count, transpose } => {
                gather!(self.aligned(w, active, fragment));
                let addresses = self.addresses(w, *at);
                for (m, &d) in d.iter().enumerate().take(*count as usize) {
                    let mut rows = [[0u16; 8]; 8];
                    for (r, row) in rows.iter_mut().enumerate() {
                        let lane = 8 * m + r;
                        let place =
                            self.resolve(w, lane as u32, addresses[lane], 16, Where::Shared, false)?;
                        for (i, x) in row.iter_mut().enumerate() {
                            // SAFETY: resolve checked 16 bytes.
                            *x = unsafe { place.cast::<u16>().add(i).read_unaligned() };
                        }
                    }
                    let out: [u32; LANES] = std::array::from_fn(|l| {
                        let (r, c) = (l / 4, 2 * (l % 4));
                        let (x, y) = match transpose {
                            false => (rows[r][c], rows[r][c + 1]),
                            true => (rows[c][r], rows[c + 1][r]),
                        };
                        x as u32 | (y as u32) << 16
                    });
                    self.warps[w].set_word(d, &out, active);
                }
            }
            Op::StMatrix { at, a, count, transpose } => {
                gather!(self.aligned(w, active, fragment));
                let addresses = self.addresses(w, *at);
                for (m, &a) in a.iter().enumerate().take(*count as usize) {
                    let values = *self.warps[w].word(a);
                    let mut rows = [[0u16; 8]; 8];
                    for (l, x) in values.iter().enumerate() {
                        let (r, c) = (l / 4, 2 * (l % 4));
                        for e in 0..2 {
                            let half = (x >> (16 * e)) as u16;
                            match transpose {
                                false => rows[r][c + e] = half,
                                true => rows[c + e][r] = half,
                            }
                        }
                    }
                    for (r, row) in rows.iter().enumerate() {
                        let lane = 8 * m + r;
                        let place = self.resolve(w, lane as u32, addresses[lane], 16, Where::Shared, true)?;
                        for (i, x) in row.iter().enumerate() {
                            // SAFETY: resolve checked 16 bytes.
                            unsafe { place.cast::<u16>().add(i).write_unaligned(*x) };
                        }
                    }
                }
            }
            Op::Mma { d, a, b, c, k, half } => {
                gather!(self.aligned(w, active, fragment));
                let warp = &mut self.warps[w];
                let zero = [0u32; LANES];
                let pick = |r: u32| if r == NONE { &zero } else { warp.word(r) };
                let rows = rows_of_registers(std::array::from_fn(|i| pick(a[i])), *half, false, *k as usize);
                let b = [pick(b[0]), pick(b[1])];
                columns_of_registers(b, *half, *k as usize, &mut self.columns);
                let mut sums: [[u32; LANES]; 4] = std::array::from_fn(|i| *warp.word(c[i]));
                let places: [*mut [u32; LANES]; 4] = {
                    let first = sums.as_mut_ptr();
                    // SAFETY: four arrays.
                    std::array::from_fn(|i| unsafe { first.add(i) })
                };
                // SAFETY: four distinct registers for one tile of columns.
                unsafe { multiply(&places, &rows, &self.columns) };
                for (d, sum) in d.iter().zip(&sums) {
                    self.warps[w].set_word(*d, sum, active);
                }
            }
            Op::Wgmma(product) => {
                gather!(self.aligned(w, active, fragment));
                self.issue_wgmma(w, product, active)?;
            }
            Op::WgmmaFence => gather!(self.aligned(w, active, fragment)),
            Op::WgmmaCommit => {
                gather!(self.aligned(w, active, fragment));
                self.warps[w].group += 1;
            }
            Op::WgmmaWait { groups } => {
                gather!(self.aligned(w, active, fragment));
                let group = self.warps[w].group;
                self.end_wgmma(w, group.saturating_sub(*groups as u64))?;
            }
            Op::SetMaxReg { count } => {
                gather!(self.aligned(w, active, fragment));
                if !(24..=256).contains(count) || !count.is_multiple_of(8) {
                    return refuse(format!("setmaxnreg {count}; allowed: multiples of 8 from 24 to 256"));
                }
            }
            Op::MapA { d, a, rank } => {
                let ranks = *self.warps[w].word(*rank);
                let count = self.ctas.len() as u32;
                if let Some(lane) = lanes(active).find(|&lane| ranks[lane as usize] >= count) {
                    return refuse(format!("mapa of rank {} in a cluster of {count}", ranks[lane as usize]));
                }
                let from = self.addresses(w, At { base: *a, offset: 0 });
                let out: [u64; LANES] = std::array::from_fn(|l| {
                    let window = from[l] & SHARED_WINDOW;
                    from[l] & 0xFF_FFFF | (ranks[l] as u64 + 1) << 24 | window
                });
                match d.class {
                    Class::Double => self.warps[w].set_double(d.index, &out, active),
                    _ => self.warps[w].set_word(d.index, &out.map(|x| x as u32), active),
                }
            }
            Op::IsSpace { d, a, space } => {
                let values = *self.warps[w].double(*a);
                let is = |x: u64| match space {
                    Where::Shared => x >> 56 == 1,
                    Where::Local => x >> 57 == 1,
                    _ => x >> 56 == 0,
                };
                let out = (0..LANES).fold(0, |m, l| m | (is(values[l]) as u32) << l);
                self.warps[w].set_predicate(*d, out, active);
            }
            Op::ClusterArrive => {
                gather!(self.aligned(w, active, fragment));
                self.warps[w].cluster_round = self.cluster_round;
                self.cluster_arrived += 1;
                self.settle_cluster();
            }
            Op::ClusterWait => {
                gather!(self.aligned(w, active, fragment));
                let round = self.warps[w].cluster_round;
                return Ok(Next::Wait(Wait::Cluster { round }, true));
            }
            other => return self.copy(w, other, active),
        }
        Ok(Next::Step)
    }

    fn load(
        &mut self,
        w: usize,
        at: At,
        space: Where,
        ty: Ty,
        d: &[u32; 8],
        count: u32,
        wide: bool,
        active: u32,
    ) -> Result<(), Fault> {
        let addresses = self.addresses(w, at);
        let bytes = ty.bytes();
        for lane in lanes(active) {
            let l = lane as usize;
            let place = self.resolve(w, lane, addresses[l], bytes * count, space, false)?;
            let warp = &mut self.warps[w];
            for (i, &d) in d.iter().enumerate().take(count as usize) {
                if d == NONE {
                    continue;
                }
                // SAFETY: resolve checked bounds; every type here may hold any bits.
                unsafe {
                    let place = place.add(i * bytes as usize);
                    match ty {
                        _ if wide => {
                            let mut bits = [0u8; 8];
                            std::ptr::copy_nonoverlapping(place, bits.as_mut_ptr(), bytes as usize);
                            let value = u64::from_le_bytes(bits);
                            let above = 64 - 8 * bytes;
                            let signed = ((value << above) as i64 >> above) as u64;
                            warp.doubles[d as usize][l] = if ty.is_signed() { signed } else { value };
                        }
                        Ty::U8 => warp.words[d as usize][l] = place.read() as u32,
                        Ty::S8 => warp.words[d as usize][l] = place.cast::<i8>().read() as i32 as u32,
                        Ty::U16 | Ty::F16 | Ty::Bf16 => {
                            warp.words[d as usize][l] = place.cast::<u16>().read_unaligned() as u32;
                        }
                        Ty::S16 => {
                            warp.words[d as usize][l] = place.cast::<i16>().read_unaligned() as i32 as u32;
                        }
                        Ty::U32 | Ty::S32 | Ty::F32 => {
                            warp.words[d as usize][l] = place.cast::<u32>().read_unaligned();
                        }
                        _ => warp.doubles[d as usize][l] = place.cast::<u64>().read_unaligned(),
                    }
                }
            }
        }
        Ok(())
    }

    fn store(
        &mut self,
        w: usize,
        at: At,
        space: Where,
        ty: Ty,
        a: &[u32; 8],
        count: u32,
        wide: bool,
        active: u32,
    ) -> Result<(), Fault> {
        let addresses = self.addresses(w, at);
        let bytes = ty.bytes();
        for lane in lanes(active) {
            let l = lane as usize;
            let place = self.resolve(w, lane, addresses[l], bytes * count, space, true)?;
            let warp = &self.warps[w];
            for (i, &a) in a.iter().enumerate().take(count as usize) {
                // SAFETY: resolve checked bounds.
                unsafe {
                    let place = place.add(i * bytes as usize);
                    match bytes {
                        _ if wide => {
                            let bits = warp.double(a)[l].to_le_bytes();
                            std::ptr::copy_nonoverlapping(bits.as_ptr(), place, bytes as usize);
                        }
                        1 => place.write(warp.word(a)[l] as u8),
                        2 => place.cast::<u16>().write_unaligned(warp.word(a)[l] as u16),
                        4 => place.cast::<u32>().write_unaligned(warp.word(a)[l]),
                        _ => place.cast::<u64>().write_unaligned(warp.double(a)[l]),
                    }
                }
            }
        }
        Ok(())
    }

    #[allow(clippy::too_many_arguments)]
    fn named(
        &mut self,
        w: usize,
        id: u32,
        threads: u32,
        wait: bool,
        red: Option<BarRed>,
        d: u32,
        (a, a_not): (u32, bool),
        active: u32,
    ) -> Result<Next, Fault> {
        let id = self.uniform(w, id, active, "the barrier's number")?;
        if id > 15 {
            return refuse(format!("named barrier {id}; allowed: 0 to 15"));
        }
        let cta = self.cta_of(w);
        let default = threads == NONE;
        let expected = match default {
            true => 32 * self.ctas[cta].live_warps,
            false => self.uniform(w, threads, active, "the barrier's thread count")?,
        };
        if expected == 0 || !expected.is_multiple_of(32) || expected > 32 * self.warps_a_cta {
            return refuse(format!(
                "named barrier {id} of {expected} threads; allowed: multiples of 32 up to {}",
                32 * self.warps_a_cta
            ));
        }
        let p = match a {
            NONE => 0,
            a => (if a_not { !self.warps[w].predicate(a) } else { self.warps[w].predicate(a) }) & active,
        };
        let b = &mut self.ctas[cta].named[id as usize];
        if b.arrived == 0 {
            *b = Named { round: b.round, last: b.last, expected, all: true, default, ..Named::default() };
        }
        if b.expected != expected || b.default != default {
            let text =
                format!("named barrier {id}: {expected} threads here, {} before in this round", b.expected);
            return refuse(text);
        }
        b.arrived += 32;
        b.all &= p == active;
        b.any |= p != 0;
        b.count += p.count_ones();
        if b.arrived > b.expected {
            let text =
                format!("named barrier {id}: {} threads arrived where it takes {}", b.arrived, b.expected);
            return refuse(text);
        }
        let round = b.round;
        self.settle_named(cta, id as usize);
        if !wait {
            return Ok(Next::Step);
        }
        let (destination, word) = match red {
            None => (NONE, false),
            Some(BarRed::Popc) => (d, true),
            Some(BarRed::And) => (d | 1 << 31, false),
            Some(BarRed::Or) => (d, false),
        };
        // Also where the round is over: the fragment is woken at once.
        Ok(Next::Wait(Wait::Barrier { id, round, red: destination, word }, true))
    }

    /// Where a barrier in shared memory lies that a lane names.
    pub(crate) fn barrier_address(&mut self, w: usize, at: At, lane: u32) -> Result<(usize, u32), Fault> {
        let address = self.address_of(w, at, lane);
        let (cta, place) = self.shared_place(w, address);
        self.still_there(w, cta)?;
        if !place.is_multiple_of(8) {
            return Err(Fault::new(MISALIGNED, format!("a barrier at {place:#x}; allowed: multiples of 8")));
        }
        if !self.ctas[cta].shared.holds(place, 8) {
            return Err(Fault::new(
                ILLEGAL_ADDRESS,
                format!("a barrier at {place:#x}, outside shared memory"),
            ));
        }
        Ok((cta, place as u32))
    }

    pub(crate) fn barrier(&mut self, cta: usize, address: u32) -> Result<&mut Mbarrier, Fault> {
        self.ctas[cta]
            .mbarriers
            .get_mut(&address)
            .ok_or_else(|| Fault::new(LAUNCH_FAILED, format!("no barrier was initialised at {address:#x}")))
    }

    /// An instruction while wgmmas are in flight: none may touch their registers, but for moves, which ptxas makes
    /// disappear, and for products that add to the same accumulators.
    pub(crate) fn check_in_flight(&mut self, w: usize, pc: u32, active: u32) -> Result<(), Fault> {
        let kernel = self.launch.kernel;
        let i = &kernel.code[pc as usize];
        let warp = &mut self.warps[w];
        let list = |(from, to): (u32, u32)| &kernel.operands[from as usize..to as usize];
        match &i.op {
            Op::Wgmma(product) => {
                if let Some(a) = &product.a
                    && let Some(r) = a.iter().find(|&&r| warp.accumulating[r as usize] > 0)
                {
                    return refuse(format!("operand register {r} is an accumulator of a wgmma in flight"));
                }
                for issued in &warp.issued {
                    let Op::Wgmma(earlier) = &kernel.code[issued.pc as usize].op else { continue };
                    if earlier.d != product.d && earlier.d.iter().any(|r| product.d.contains(r)) {
                        return refuse(format!(
                            "its accumulators overlap in another shape with those of the wgmma in flight of line {}",
                            kernel.code[issued.pc as usize].line
                        ));
                    }
                }
                return Ok(());
            }
            Op::Alu { f: crate::decode::Arith::MovW, d, a, .. } if warp.accumulating[*a as usize] > 0 => {
                if warp.accumulating[*d as usize] + warp.feeding[*d as usize] > 0 || active != FULL {
                    return refuse(format!("register {d} of a wgmma in flight is written by a move"));
                }
                // The newest product that writes the source takes the copy along.
                for issued in warp.issued.iter_mut().rev() {
                    let Op::Wgmma(product) = &kernel.code[issued.pc as usize].op else { continue };
                    let from = product.d.iter().position(|r| r == a);
                    let from = from.or_else(|| {
                        issued.copies.iter().find(|(_, to)| to == a).map(|(from, _)| *from as usize)
                    });
                    if let Some(from) = from {
                        issued.copies.push((from as u32, *d));
                        warp.accumulating[*d as usize] += 1;
                        break;
                    }
                }
                return Ok(());
            }
            _ => {}
        }
        let line =
            |warp: &crate::warp::Warp| warp.issued.front().map_or(0, |i| kernel.code[i.pc as usize].line);
        if let Some(r) = list(i.reads).iter().find(|&&r| warp.accumulating[r as usize] > 0) {
            let line = line(warp);
            return refuse(format!(
                "reads accumulator register {r} of a wgmma in flight (the oldest issued at line {line}) before a \
                 wgmma.wait_group that covers it"
            ));
        }
        if let Some(r) =
            list(i.writes).iter().find(|&&r| warp.accumulating[r as usize] + warp.feeding[r as usize] > 0)
        {
            let line = line(warp);
            return refuse(format!(
                "writes register {r} of a wgmma in flight (the oldest issued at line {line}) before a \
                 wgmma.wait_group that covers it"
            ));
        }
        Ok(())
    }

    fn issue_wgmma(&mut self, w: usize, product: &Wgmma, active: u32) -> Result<(), Fault> {
        if active != FULL {
            return refuse("wgmma by a warp that is not whole");
        }
        if !self.warps_a_cta.is_multiple_of(4) {
            return refuse("wgmma in a CTA that is not whole warpgroups");
        }
        let warp = &mut self.warps[w];
        let same = |index: u32| {
            let values = warp.double(index);
            match values.iter().all(|v| *v == values[0]) {
                true => Ok(values[0]),
                false => Err("a wgmma descriptor differs within the warp".to_string()),
            }
        };
        let desc_a = if product.a.is_some() { 0 } else { same(product.desc_a)? };
        let desc_b = same(product.desc_b)?;
        let scale = warp.predicate(product.scale_d);
        if scale != 0 && scale != FULL {
            return refuse("wgmma's scale-d differs within the warp");
        }
        let issued = Issued {
            pc: self.here.2,
            group: warp.group,
            done: false,
            descriptors: [desc_a, desc_b],
            accumulate: scale != 0,
            copies: Vec::new(),
        };
        for &r in &product.d {
            warp.accumulating[r as usize] += 1;
        }
        if let Some(a) = &product.a {
            a.iter().for_each(|&r| warp.feeding[r as usize] += 1);
        }
        warp.issued.push_back(issued);
        // At once, or as late as the wait allows, or in between.
        if self.random.below(2) == 0 {
            self.flush_wgmma(w, u64::MAX)?;
        }
        Ok(())
    }

    /// Executes the products in flight of groups below `group`, in their order.
    pub(crate) fn flush_wgmma(&mut self, w: usize, group: u64) -> Result<(), Fault> {
        let here = self.here;
        for index in 0..self.warps[w].issued.len() {
            let issued = &self.warps[w].issued[index];
            if issued.done || issued.group >= group {
                continue;
            }
            let kernel = self.launch.kernel;
            let Op::Wgmma(product) = &kernel.code[issued.pc as usize].op else { continue };
            self.here = (w, None, issued.pc);
            let (descriptors, accumulate) = (issued.descriptors, issued.accumulate);
            let copies = issued.copies.clone();
            let reader = self.thread_of(w, 0);
            let cta = self.cta_of(w);
            let shared = &mut self.ctas[cta].shared;
            let b = Descriptor::of(descriptors[1])?;
            columns_of_shared(
                shared,
                b,
                product.n,
                product.transpose_b,
                product.half,
                product.negate_b,
                reader,
                &mut self.columns,
            )?;
            let rows = match &product.a {
                Some(a) => {
                    let warp = &self.warps[w];
                    let a = std::array::from_fn(|i| warp.word(a[i]));
                    rows_of_registers(a, product.half, product.negate_a, 16)
                }
                None => {
                    let a = Descriptor::of(descriptors[0])?;
                    let first = (w as u32 % self.warps_a_cta % 4) * 16;
                    rows_of_shared(
                        shared,
                        a,
                        first,
                        product.transpose_a,
                        product.half,
                        product.negate_a,
                        reader,
                    )?
                }
            };
            let words = self.warps[w].words.as_mut_ptr();
            // SAFETY: the decoder numbered the registers.
            let d: Vec<*mut [u32; LANES]> =
                product.d.iter().map(|&r| unsafe { words.add(r as usize) }).collect();
            if !accumulate {
                for &d in &d {
                    // SAFETY: a register of this warp.
                    unsafe { (*d).fill(0) };
                }
            }
            // SAFETY: n / 2 distinct registers for n columns; the decoder checked their count.
            unsafe { multiply(&d, &rows, &self.columns) };
            for (from, to) in copies {
                let value = *self.warps[w].word(product.d[from as usize]);
                self.warps[w].words[to as usize] = value;
            }
            self.warps[w].issued[index].done = true;
        }
        self.here = here;
        Ok(())
    }

    /// `wgmma.wait_group`: groups below `group` are over.
    fn end_wgmma(&mut self, w: usize, group: u64) -> Result<(), Fault> {
        self.flush_wgmma(w, group)?;
        let kernel = self.launch.kernel;
        let warp = &mut self.warps[w];
        while warp.issued.front().is_some_and(|issued| issued.group < group) {
            let Some(issued) = warp.issued.pop_front() else { break };
            let Op::Wgmma(product) = &kernel.code[issued.pc as usize].op else { continue };
            for &r in &product.d {
                warp.accumulating[r as usize] -= 1;
            }
            for (_, r) in &issued.copies {
                warp.accumulating[*r as usize] -= 1;
            }
            if let Some(a) = &product.a {
                a.iter().for_each(|&r| warp.feeding[r as usize] -= 1);
            }
        }
        Ok(())
    }
}
