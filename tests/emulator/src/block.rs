//! One cluster of CTAs (mostly a cluster of one) run to its end: warps in a random order, copies of the copy engine and
//! wgmmas at random moments between their issue and the wait that covers them.

use crate::copies::Async;
use crate::decode::{At, Kernel, LOCAL_WINDOW, NONE, Op, SHARED_START, SHARED_WINDOW, Special, Where};
use crate::memory::{Regions, Shared};
use crate::parse::Class;
use crate::product::Columns;
use crate::warp::{FULL, Fragment, LANES, Wait, Warp};
use std::collections::HashMap;

/// Why a launch ended.
#[derive(Clone, Debug)]
pub(crate) struct Fault {
    /// The driver's code.
    pub(crate) code: u32,
    pub(crate) text: String,
}

/// `CUDA_ERROR_ILLEGAL_ADDRESS`.
pub(crate) const ILLEGAL_ADDRESS: u32 = 700;
/// `CUDA_ERROR_MISALIGNED_ADDRESS`.
pub(crate) const MISALIGNED: u32 = 716;
/// `CUDA_ERROR_LAUNCH_FAILED`.
pub(crate) const LAUNCH_FAILED: u32 = 719;

impl Fault {
    pub(crate) fn new(code: u32, text: impl Into<String>) -> Fault {
        Fault { code, text: text.into() }
    }
}

impl From<String> for Fault {
    fn from(text: String) -> Fault {
        Fault::new(LAUNCH_FAILED, text)
    }
}

/// Instructions that all warps of a cluster may execute: far above what a test needs, far below what a user would wait
/// for.
const BUDGET: u64 = 2_000_000_000;

/// One launch.
pub(crate) struct Launch<'a> {
    pub(crate) kernel: &'a Kernel,
    pub(crate) grid: [u32; 3],
    pub(crate) block: [u32; 3],
    pub(crate) cluster: [u32; 3],
    pub(crate) dynamic_shared: u32,
    pub(crate) regions: &'a Regions,
    pub(crate) seed: u64,
    pub(crate) multiprocessors: u32,
}

impl Launch<'_> {
    pub(crate) fn threads(&self) -> u32 {
        self.block.iter().product()
    }
}

/// A small generator of random numbers, the same on every machine.
pub(crate) struct Random(u64);

impl Random {
    pub(crate) fn new(seed: u64) -> Random {
        Random(seed.wrapping_add(0x9E37_79B9_7F4A_7C15))
    }

    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ z >> 30).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ z >> 27).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ z >> 31
    }

    pub(crate) fn below(&mut self, n: usize) -> usize {
        ((self.next() >> 32) as usize * n) >> 32
    }
}

/// A barrier in shared memory.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Mbarrier {
    pub(crate) count: i64,
    pub(crate) pending: i64,
    pub(crate) bytes: i64,
    pub(crate) phase: u64,
}

impl Mbarrier {
    fn settle(&mut self) {
        if self.pending == 0 && self.bytes == 0 {
            self.phase += 1;
            self.pending = self.count;
        }
    }

    pub(crate) fn arrive(&mut self, count: i64, bytes: i64) -> Result<(), String> {
        self.bytes += bytes;
        self.pending -= count;
        if self.pending < 0 {
            return Err(format!("more arrivals in a phase than the {} the barrier was made for", self.count));
        }
        self.settle();
        Ok(())
    }

    pub(crate) fn complete(&mut self, bytes: i64) {
        self.bytes -= bytes;
        self.settle();
    }
}

/// A named barrier.
#[derive(Clone, Debug, Default)]
pub(crate) struct Named {
    pub(crate) expected: u32,
    pub(crate) arrived: u32,
    pub(crate) round: u64,
    pub(crate) all: bool,
    pub(crate) any: bool,
    pub(crate) count: u32,
    /// Of the last round.
    pub(crate) last: (bool, bool, u32),
    /// Whether all threads of the CTA are waited for.
    pub(crate) default: bool,
}

/// What the warps of one CTA share.
pub(crate) struct Cta {
    pub(crate) shared: Shared,
    pub(crate) mbarriers: HashMap<u32, Mbarrier>,
    pub(crate) named: Vec<Named>,
    pub(crate) live_warps: u32,
    /// By thread: groups of bulk copies and of cp.async committed so far.
    pub(crate) bulk_group: Vec<u64>,
    pub(crate) copy_group: Vec<u64>,
    /// Its place in the grid.
    index: [u32; 3],
}

pub(crate) struct Block<'a> {
    pub(crate) launch: &'a Launch<'a>,
    pub(crate) ctas: Vec<Cta>,
    /// CTA by CTA.
    pub(crate) warps: Vec<Warp>,
    pub(crate) warps_a_cta: u32,
    pub(crate) asyncs: Vec<Async>,
    pub(crate) random: Random,
    pub(crate) columns: Columns,
    /// Warps that have arrived at the cluster's barrier, and how often it has completed.
    pub(crate) cluster_arrived: u32,
    pub(crate) cluster_round: u64,
    steps: u64,
    /// Warp, lane and instruction at work, for messages.
    pub(crate) here: (usize, Option<u32>, u32),
}

/// What comes after an instruction.
pub(crate) enum Next {
    Step,
    Jump,
    Exit,
    /// The fragment waits; `true`: at the next instruction.
    Wait(Wait, bool),
    Yield,
}

impl<'a> Block<'a> {
    pub(crate) fn new(launch: &'a Launch<'a>) -> Block<'a> {
        let ctas_a_cluster: u32 = launch.cluster.iter().product();
        let threads = launch.threads();
        let warps_a_cta = threads.div_ceil(32);
        let end = launch.kernel.dynamic_at + launch.dynamic_shared;
        let end = end.max(SHARED_START + launch.kernel.static_shared);
        let ctas = (0..ctas_a_cluster)
            .map(|_| Cta {
                shared: Shared::new(end, warps_a_cta * 32),
                mbarriers: HashMap::new(),
                named: vec![Named::default(); 16],
                live_warps: 0,
                bulk_group: vec![0; warps_a_cta as usize * 32],
                copy_group: vec![0; warps_a_cta as usize * 32],
                index: [0; 3],
            })
            .collect();
        let warps = (0..ctas_a_cluster * warps_a_cta).map(|id| Warp::new(id, launch.kernel)).collect();
        Block {
            launch,
            ctas,
            warps,
            warps_a_cta,
            asyncs: Vec::new(),
            random: Random::new(0),
            columns: Vec::new(),
            cluster_arrived: 0,
            cluster_round: 0,
            steps: 0,
            here: (0, None, 0),
        }
    }

    /// Which CTA of the cluster a warp belongs to.
    pub(crate) fn cta_of(&self, warp: usize) -> usize {
        warp / self.warps_a_cta as usize
    }

    /// A thread's number in its CTA.
    pub(crate) fn thread_of(&self, warp: usize, lane: u32) -> u32 {
        warp as u32 % self.warps_a_cta * 32 + lane
    }

    /// Prepares everything for the cluster with this number.
    fn start(&mut self, cluster: u64) {
        let launch = self.launch;
        let [cx, cy, cz] = launch.cluster;
        let clusters = [launch.grid[0] / cx, launch.grid[1] / cy, launch.grid[2] / cz];
        let id = [
            (cluster % clusters[0] as u64) as u32,
            (cluster / clusters[0] as u64 % clusters[1] as u64) as u32,
            (cluster / clusters[0] as u64 / clusters[1] as u64) as u32,
        ];
        self.random = Random::new(launch.seed ^ cluster.wrapping_mul(0xD129_42F7_9C1D_4C2B));
        self.asyncs.clear();
        self.steps = 0;
        (self.cluster_arrived, self.cluster_round) = (0, 0);
        for (rank, cta) in self.ctas.iter_mut().enumerate() {
            let rank = rank as u32;
            cta.shared.reset();
            cta.mbarriers.clear();
            cta.named.fill(Named::default());
            cta.live_warps = self.warps_a_cta;
            cta.bulk_group.fill(0);
            cta.copy_group.fill(0);
            cta.index = [id[0] * cx + rank % cx, id[1] * cy + rank / cx % cy, id[2] * cz + rank / cx / cy];
        }
        let kernel = launch.kernel;
        let [bx, by, _] = launch.block;
        let threads = launch.threads();
        let sm = self.random.below(launch.multiprocessors as usize) as u32;
        for warp in &mut self.warps {
            let rank = warp.id / self.warps_a_cta;
            let within = warp.id % self.warps_a_cta;
            let cta = &self.ctas[rank as usize];
            let live = threads - (within * 32).min(threads);
            warp.live = if live >= 32 { FULL } else { (1 << live) - 1 };
            warp.fragments.clear();
            warp.fragments.push(Fragment { pc: 0, mask: warp.live, wait: Wait::Nothing, yielded: false });
            warp.issued.clear();
            warp.group = 0;
            warp.cluster_round = 0;
            warp.region = (0, 0, false);
            warp.accumulating.fill(0);
            warp.feeding.fill(0);
            // What no instruction wrote must not be read: it differs from run to run.
            let poison = self.random.next();
            warp.words.iter_mut().for_each(|r| r.fill(poison as u32 | 0x7FC0_0000));
            warp.doubles.iter_mut().for_each(|r| r.fill(poison | 0x7FF8_0000_0000_0000));
            warp.predicates.fill(poison as u32);
            for &(index, value) in &kernel.constant_words {
                warp.words[index as usize] = [value; LANES];
            }
            for &(index, value) in &kernel.constant_doubles {
                warp.doubles[index as usize] = [value; LANES];
            }
            for &(index, value) in &kernel.constant_predicates {
                warp.predicates[index as usize] = if value { FULL } else { 0 };
            }
            let [gx, gy, gz] = launch.grid;
            for &(special, index) in &kernel.specials {
                warp.words[index as usize] = std::array::from_fn(|lane| {
                    let lane = lane as u32;
                    let thread = within * 32 + lane;
                    match special {
                        Special::TidX => thread % bx,
                        Special::TidY => thread / bx % by,
                        Special::TidZ => thread / bx / by,
                        Special::NtidX => launch.block[0],
                        Special::NtidY => launch.block[1],
                        Special::NtidZ => launch.block[2],
                        Special::CtaidX => cta.index[0],
                        Special::CtaidY => cta.index[1],
                        Special::CtaidZ => cta.index[2],
                        Special::NctaidX => gx,
                        Special::NctaidY => gy,
                        Special::NctaidZ => gz,
                        Special::Lane => lane,
                        Special::Warp => within,
                        Special::Warps => self.warps_a_cta,
                        Special::LaneEq => 1 << lane,
                        Special::LaneLt => (1 << lane) - 1,
                        Special::LaneLe => ((2u64 << lane) - 1) as u32,
                        Special::LaneGt => !(((2u64 << lane) - 1) as u32),
                        Special::LaneGe => !((1u32 << lane) - 1),
                        Special::Sm => sm,
                        Special::Sms => launch.multiprocessors,
                        Special::ClusterRank => rank,
                        Special::ClusterSize => cx * cy * cz,
                        Special::ClusterIdX => id[0],
                        Special::ClusterIdY => id[1],
                        Special::ClusterIdZ => id[2],
                        Special::ClusterCtaX => rank % cx,
                        Special::ClusterCtaY => rank / cx % cy,
                        Special::ClusterCtaZ => rank / cx / cy,
                        Special::ClusterNctaX => cx,
                        Special::ClusterNctaY => cy,
                        Special::ClusterNctaZ => cz,
                        Special::DynamicShared => launch.dynamic_shared,
                        Special::TotalShared => launch.dynamic_shared + kernel.static_shared,
                    }
                });
            }
        }
    }

    /// Runs the cluster with this number to its end.
    ///
    /// # Errors
    /// The first thing that a GPU, or a sanitizer, would not let pass.
    pub(crate) fn run(&mut self, cluster: u64) -> Result<(), Fault> {
        self.start(cluster);
        let outcome = self.schedule();
        outcome.map_err(|fault| Fault { code: fault.code, text: self.place(&fault.text) })
    }

    /// A message with the place it is about.
    fn place(&self, text: &str) -> String {
        let (warp, lane, pc) = self.here;
        let kernel = self.launch.kernel;
        let index = self.ctas[self.cta_of(warp)].index;
        let line = kernel.code.get(pc as usize).map_or(0, |i| i.line);
        let who = match lane {
            Some(lane) => format!("thread {}", self.thread_of(warp, lane)),
            None => format!("warp {}", warp as u32 % self.warps_a_cta),
        };
        format!("{}, CTA {index:?}, {who}, line {line} of the PTX: {text}", kernel.name)
    }

    fn is_ready(&self, fragment: &Fragment, warp: usize) -> bool {
        match fragment.wait {
            Wait::Nothing => true,
            Wait::Phase { cta, address, parity } => {
                // A barrier that is gone is found out when the wait is executed again.
                let barrier = self.ctas[cta as usize].mbarriers.get(&address);
                barrier.is_none_or(|b| (b.phase & 1) as u32 != parity)
            }
            Wait::Barrier { id, round, .. } => self.ctas[self.cta_of(warp)].named[id as usize].round != round,
            Wait::Lanes(need) => need & self.warps[warp].live & !fragment.mask == 0,
            Wait::Cluster { round } => self.cluster_round != round,
        }
    }

    fn schedule(&mut self) -> Result<(), Fault> {
        let mut ready: Vec<usize> = Vec::new();
        loop {
            ready.clear();
            let mut alive = false;
            for (w, warp) in self.warps.iter().enumerate() {
                alive |= !warp.fragments.is_empty();
                if warp.fragments.iter().any(|f| self.is_ready(f, w)) {
                    ready.push(w);
                }
            }
            if !alive {
                return self.finish();
            }
            if ready.is_empty() {
                if self.release_warp_syncs() {
                    continue;
                }
                if !self.asyncs.is_empty() {
                    let one = self.random.below(self.asyncs.len());
                    self.perform(one)?;
                    continue;
                }
                return Err(self.deadlock());
            }
            let warp = ready[self.random.below(ready.len())];
            // Mostly long runs, sometimes a single instruction.
            let most = 1 << self.random.below(10);
            let quantum = 1 + self.random.below(most) as u64;
            self.run_warp(warp, quantum)?;
            if self.steps > BUDGET {
                return Err(Fault::new(
                    702,
                    format!("{BUDGET} instructions and no end: it waits for what never comes"),
                ));
            }
            // The copy engine and the tensor cores get on at their own pace.
            let mut rounds = self.random.below(4);
            while rounds > 0 && !self.asyncs.is_empty() {
                let one = self.random.below(self.asyncs.len());
                self.perform(one)?;
                rounds -= 1;
            }
            if self.launch.kernel.uses_wgmma && self.random.below(4) == 0 {
                let warp = self.random.below(self.warps.len());
                if !self.warps[warp].issued.is_empty() {
                    self.flush_wgmma(warp, u64::MAX)?;
                }
            }
        }
    }

    /// `bar.warp.sync` joins lanes at different instructions, where nothing else moves.
    fn release_warp_syncs(&mut self) -> bool {
        let code = &self.launch.kernel.code;
        let mut released = false;
        for warp in &mut self.warps {
            let at_sync = |f: &Fragment| {
                matches!(f.wait, Wait::Lanes(_)) && matches!(code[f.pc as usize].op, Op::WarpSync { .. })
            };
            let union = warp.fragments.iter().filter(|f| at_sync(f)).fold(0, |m, f| m | f.mask);
            let live = warp.live;
            for f in &mut warp.fragments {
                if at_sync(f)
                    && let Wait::Lanes(need) = f.wait
                    && need & live & !union == 0
                {
                    (f.wait, f.pc) = (Wait::Nothing, f.pc + 1);
                    released = true;
                }
            }
        }
        released
    }

    fn deadlock(&self) -> Fault {
        let mut lines = vec!["nothing can go on and no copy is under way:".to_string()];
        for (w, warp) in self.warps.iter().enumerate() {
            let cta = &self.ctas[self.cta_of(w)];
            for f in &warp.fragments {
                let line = self.launch.kernel.code[f.pc as usize].line;
                let why = match f.wait {
                    Wait::Nothing => "nothing".to_string(),
                    Wait::Phase { cta, address, parity } => {
                        match self.ctas[cta as usize].mbarriers.get(&address) {
                            Some(b) => format!(
                                "the end of a phase of parity {parity} of the barrier at {address:#x} (phase {}, {} of \
                                 {} arrivals and {} bytes to come)",
                                b.phase, b.pending, b.count, b.bytes
                            ),
                            None => format!("a barrier at {address:#x} that does not exist"),
                        }
                    }
                    Wait::Barrier { id, .. } => {
                        let b = &cta.named[id as usize];
                        format!("named barrier {id} ({} of {} threads arrived)", b.arrived, b.expected)
                    }
                    Wait::Lanes(need) => format!("its lanes {:#010x}", need & !f.mask & warp.live),
                    Wait::Cluster { .. } => "the cluster's barrier".to_string(),
                };
                let warp = w as u32 % self.warps_a_cta;
                lines.push(format!("  warp {warp}, lanes {:#010x}, line {line}: waits for {why}", f.mask));
            }
        }
        Fault::new(LAUNCH_FAILED, lines.join("\n"))
    }

    /// Lets the stores of CTAs that have ended end.
    fn finish(&mut self) -> Result<(), Fault> {
        while !self.asyncs.is_empty() {
            let one = self.random.below(self.asyncs.len());
            self.perform(one)?;
        }
        Ok(())
    }

    fn run_warp(&mut self, warp: usize, quantum: u64) -> Result<(), Fault> {
        // One form only: the body is long, and every x86 of the last ten years has AVX2.
        #[cfg(target_arch = "x86_64")]
        // SAFETY: `launch` refuses a machine without the features.
        return unsafe { self.run_warp_avx2(warp, quantum) };
        #[cfg(not(target_arch = "x86_64"))]
        self.run_warp_body(warp, quantum)
    }

    /// # Safety
    /// On a machine with AVX2 and FMA.
    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx2,fma")]
    unsafe fn run_warp_avx2(&mut self, warp: usize, quantum: u64) -> Result<(), Fault> {
        self.run_warp_body(warp, quantum)
    }

    #[inline(always)]
    fn run_warp_body(&mut self, w: usize, quantum: u64) -> Result<(), Fault> {
        let kernel = self.launch.kernel;
        let end = self.steps + quantum;
        'choose: while self.steps < end {
            // The fragment that is furthest behind, so that lanes meet again; those that yielded come last.
            let mut chosen: Option<usize> = None;
            for (i, f) in self.warps[w].fragments.iter().enumerate() {
                let before = |other: &Fragment| (f.yielded, f.pc) < (other.yielded, other.pc);
                if self.is_ready(f, w) && chosen.is_none_or(|c| before(&self.warps[w].fragments[c])) {
                    chosen = Some(i);
                }
            }
            let Some(chosen) = chosen else { return Ok(()) };
            self.wake(w, chosen);
            if self.warps[w].fragments[chosen].yielded {
                // All have yielded: let other warps run before the next round.
                self.warps[w].fragments.iter_mut().for_each(|f| f.yielded = false);
            }
            let alone = self.warps[w].fragments.len() == 1;
            loop {
                let Fragment { pc, mask, .. } = self.warps[w].fragments[chosen];
                let i = &kernel.code[pc as usize];
                self.steps += 1;
                self.here = (w, None, pc);
                let mut active = mask;
                if i.guard != 0 {
                    let p = self.warps[w].predicates[(i.guard >> 1) as usize - 1];
                    active &= if i.guard & 1 != 0 { !p } else { p };
                    if active == 0 {
                        if self.step_to(w, chosen, pc + 1, alone) {
                            continue 'choose;
                        }
                        if self.steps >= end {
                            return Ok(());
                        }
                        continue;
                    }
                }
                let warp = &mut self.warps[w];
                if !warp.issued.is_empty() {
                    self.check_in_flight(w, pc, active)?;
                }
                let warp = &mut self.warps[w];
                let next = match &i.op {
                    Op::Alu { f, d, a, b, c, extra } => {
                        warp.alu(*f, *d, *a, *b, *c, *extra, active);
                        Next::Step
                    }
                    Op::Setp { ty, compare, d, q, a, b, logic, c, c_not } => {
                        warp.setp(*ty, *compare, (*d, *q), (*a, *b), *logic, (*c, *c_not), active);
                        Next::Step
                    }
                    Op::Cvt { d, a, wide, to, from, round, saturate } => {
                        warp.cvt(*d, (*a, *wide), *to, *from, *round, *saturate, active);
                        Next::Step
                    }
                    Op::Bra => Next::Jump,
                    Op::Exit => Next::Exit,
                    Op::Nop | Op::Fence => Next::Step,
                    other => self.execute(w, other, active, mask)?,
                };
                match next {
                    Next::Step => {
                        if self.step_to(w, chosen, pc + 1, alone) {
                            continue 'choose;
                        }
                    }
                    Next::Jump => {
                        let fragments = &mut self.warps[w].fragments;
                        if active == mask {
                            fragments[chosen].pc = i.target;
                        } else {
                            fragments[chosen].mask &= !active;
                            fragments[chosen].pc = pc + 1;
                            let wait = Wait::Nothing;
                            fragments.push(Fragment { pc: i.target, mask: active, wait, yielded: false });
                        }
                        if !alone || active != mask {
                            self.merge(w);
                            continue 'choose;
                        }
                    }
                    Next::Exit => {
                        self.exit_lanes(w, active)?;
                        let fragment = &mut self.warps[w].fragments[chosen];
                        fragment.mask &= !active;
                        fragment.pc += 1;
                        if fragment.mask == 0 {
                            self.warps[w].fragments.swap_remove(chosen);
                        }
                        continue 'choose;
                    }
                    Next::Wait(wait, after) => {
                        let fragment = &mut self.warps[w].fragments[chosen];
                        fragment.wait = wait;
                        fragment.pc += after as u32;
                        if matches!(wait, Wait::Lanes(_)) {
                            self.merge(w);
                        }
                        continue 'choose;
                    }
                    Next::Yield => {
                        self.warps[w].fragments[chosen].yielded = true;
                        self.step_to(w, chosen, pc + 1, alone);
                        if alone {
                            return Ok(());
                        }
                        continue 'choose;
                    }
                }
                if self.steps >= end {
                    return Ok(());
                }
            }
        }
        Ok(())
    }

    /// A fragment whose wait is over: results of the barrier arrive.
    fn wake(&mut self, w: usize, fragment: usize) {
        let f = self.warps[w].fragments[fragment];
        if let Wait::Barrier { id, red, word, .. } = f.wait
            && red != NONE
        {
            let (all, any, count) = self.ctas[self.cta_of(w)].named[(id & 0xFF) as usize].last;
            let warp = &mut self.warps[w];
            match word {
                true => warp.set_word(red & 0xFFF_FFFF, &[count; LANES], f.mask),
                false => {
                    let value = if red >> 31 != 0 { all } else { any };
                    warp.set_predicate(red & 0x7FFF_FFFF, if value { FULL } else { 0 }, f.mask);
                }
            }
        }
        self.warps[w].fragments[fragment].wait = Wait::Nothing;
    }

    /// Moves a fragment on; `true` where it met another one.
    #[inline(always)]
    fn step_to(&mut self, w: usize, fragment: usize, pc: u32, alone: bool) -> bool {
        self.warps[w].fragments[fragment].pc = pc;
        if alone {
            return false;
        }
        let met = self.warps[w].fragments.iter().filter(|f| f.pc == pc).count() > 1;
        if met {
            self.merge(w);
        }
        met
    }

    /// Joins fragments at one place that wait for nothing but each other.
    fn merge(&mut self, w: usize) {
        let fragments = &mut self.warps[w].fragments;
        let joins = |f: &Fragment| matches!(f.wait, Wait::Nothing | Wait::Lanes(_));
        let mut i = 0;
        while i < fragments.len() {
            let mut k = i + 1;
            while k < fragments.len() {
                if fragments[k].pc == fragments[i].pc && joins(&fragments[k]) && joins(&fragments[i]) {
                    fragments[i].mask |= fragments[k].mask;
                    fragments[i].wait = Wait::Nothing;
                    fragments.swap_remove(k);
                } else {
                    k += 1;
                }
            }
            i += 1;
        }
    }

    fn exit_lanes(&mut self, w: usize, lanes: u32) -> Result<(), Fault> {
        let cta = self.cta_of(w);
        let warp = &mut self.warps[w];
        warp.live &= !lanes;
        if warp.live == 0 {
            if !warp.issued.is_empty() {
                return Err(Fault::new(LAUNCH_FAILED, "the warp ends with a wgmma in flight"));
            }
            self.ctas[cta].live_warps -= 1;
            if self.ctas[cta].live_warps == 0
                && let Some(what) = self.asyncs.iter().find_map(|one| one.needs_shared_of(cta))
            {
                return Err(Fault::new(LAUNCH_FAILED, format!("the CTA ended while {what}")));
            }
            for id in 0..16 {
                self.settle_named(cta, id);
            }
            self.settle_cluster();
        }
        Ok(())
    }

    /// Ends the barrier's round where all have arrived.
    pub(crate) fn settle_named(&mut self, cta: usize, id: usize) {
        let cta = &mut self.ctas[cta];
        let b = &mut cta.named[id];
        if b.default {
            b.expected = 32 * cta.live_warps;
        }
        if b.arrived > 0 && b.arrived >= b.expected {
            b.last = (b.all, b.any, b.count);
            let round = b.round + 1;
            let last = b.last;
            *b = Named { round, last, ..Named::default() };
        }
    }

    /// Ends a round of the cluster's barrier where every warp that has not ended has arrived.
    pub(crate) fn settle_cluster(&mut self) {
        let live: u32 = self.ctas.iter().map(|cta| cta.live_warps).sum();
        if self.cluster_arrived > 0 && self.cluster_arrived >= live {
            self.cluster_arrived = 0;
            self.cluster_round += 1;
        }
    }

    /// The addresses of an instruction's lanes.
    #[inline(always)]
    pub(crate) fn addresses(&self, w: usize, at: At) -> [u64; LANES] {
        let warp = &self.warps[w];
        let offset = at.offset as u64;
        match at.base.class {
            Class::Double => warp.double(at.base.index).map(|a| a.wrapping_add(offset)),
            _ => warp.word(at.base.index).map(|a| (a as u64).wrapping_add(offset)),
        }
    }

    /// The address an instruction has that one thread issues for all.
    pub(crate) fn address_of(&mut self, w: usize, at: At, lane: u32) -> u64 {
        self.addresses(w, at)[lane as usize]
    }

    /// The CTA and the address there of an address of shared memory.
    pub(crate) fn shared_place(&self, w: usize, address: u64) -> (usize, u64) {
        let address = address & !SHARED_WINDOW;
        match address >> 24 {
            0 => (self.cta_of(w), address),
            rank if rank as usize <= self.ctas.len() => (rank as usize - 1, address & 0xFF_FFFF),
            _ => (self.cta_of(w), address),
        }
    }

    /// The shared memory of a CTA of the cluster goes with its last warp.
    #[inline(always)]
    pub(crate) fn still_there(&self, w: usize, cta: usize) -> Result<(), Fault> {
        if cta != self.cta_of(w) && self.ctas[cta].live_warps == 0 {
            let text = format!("shared memory of CTA {:?}, which has ended", self.ctas[cta].index);
            return Err(Fault::new(ILLEGAL_ADDRESS, text));
        }
        Ok(())
    }

    /// Where an access of `bytes` bytes really goes. Checks alignment and bounds.
    #[inline(always)]
    pub(crate) fn resolve(
        &mut self,
        w: usize,
        lane: u32,
        address: u64,
        bytes: u32,
        space: Where,
        write: bool,
    ) -> Result<*mut u8, Fault> {
        if address & (bytes as u64 - 1) != 0 {
            self.here.1 = Some(lane);
            return Err(Fault::new(MISALIGNED, format!("an access of {bytes} bytes at {address:#x}")));
        }
        let space = match space {
            Where::Generic if address >> 56 == 1 => Where::Shared,
            Where::Generic if address >> 57 == 1 => Where::Local,
            Where::Generic => Where::Global,
            known => known,
        };
        match space {
            Where::Shared => {
                let (cta, place) = self.shared_place(w, address);
                self.still_there(w, cta)?;
                let inside = self.ctas[cta].shared.holds(place, bytes);
                if !inside {
                    self.here.1 = Some(lane);
                    let end = self.ctas[cta].shared.end();
                    return Err(Fault::new(
                        ILLEGAL_ADDRESS,
                        format!(
                            "{} {bytes} bytes of shared memory at {address:#x}, outside {SHARED_START:#x} to {end:#x}",
                            if write { "writes" } else { "reads" }
                        ),
                    ));
                }
                if write && cta == self.cta_of(w) {
                    let thread = self.thread_of(w, lane);
                    self.ctas[cta].shared.note_write(place as u32, bytes, thread);
                }
                Ok(self.ctas[cta].shared.at_mut(place as u32, bytes as usize).as_mut_ptr())
            }
            Where::Local => {
                let local = self.launch.kernel.local_bytes as u64;
                let place = address & !LOCAL_WINDOW;
                if place + bytes as u64 > local {
                    self.here.1 = Some(lane);
                    return Err(Fault::new(
                        ILLEGAL_ADDRESS,
                        format!("local memory at {place:#x}, outside its {local} bytes"),
                    ));
                }
                let at = lane as usize * local as usize + place as usize;
                Ok(self.warps[w].local[at..].as_mut_ptr())
            }
            _ => {
                let (start, end, writable) = self.warps[w].region;
                if address >= start && address + bytes as u64 <= end && (writable || !write) {
                    return Ok(address as *mut u8);
                }
                self.global(w, lane, address, bytes as u64, write)
            }
        }
    }

    /// The slow way to an allocation.
    pub(crate) fn global(
        &mut self,
        w: usize,
        lane: u32,
        address: u64,
        bytes: u64,
        write: bool,
    ) -> Result<*mut u8, Fault> {
        match self.launch.regions.find(address, bytes) {
            Some(region) if region.writable || !write => {
                self.warps[w].region = (region.start, region.end, region.writable);
                Ok(address as *mut u8)
            }
            found => {
                self.here.1 = Some(lane);
                let what = if write { "writes" } else { "reads" };
                let why = match found {
                    Some(_) => "memory that a kernel may only read".to_string(),
                    None => self.launch.regions.around(address),
                };
                Err(Fault::new(ILLEGAL_ADDRESS, format!("{what} {bytes} bytes at {address:#x}: {why}")))
            }
        }
    }
}
