//! The GPU's part of measuring: buffers of a case, runs that are checked, and times.

use crate::check::HostInputs;
use crate::plan::{Case, Step};
use crate::reduce::to_nanosecond;
use dsv_reference::lists::{KvInverse, KvListsBuf};
use dsv_reference::rng::SplitMix64;
use dsv_runtime::device::{Event, L2Flush};
use dsv_runtime::{
    AttnLayouts, AttnPlan, BwdArgs, Clocks, Device, DeviceBuffer, Error, FwdArgs, KeyLists, MemoryNeeded,
    Options, QueryLists, Runtime, Stream, TableSource, decode_error_flag, silent,
};
use dsv_spec::{Arch, AttnOp, Problem, Timing};
use half::bf16;
use std::sync::Arc;

/// Why a launch gave no result.
#[derive(Debug)]
pub(crate) enum Failure {
    /// The problem cannot be planned.
    Infeasible(String),
    /// The launch or the GPU failed.
    Launch(String),
    /// It ran, but raised the error flag or gave a wrong result.
    Wrong(String),
}

impl From<Error> for Failure {
    fn from(error: Error) -> Failure {
        match error {
            Error::Plan { .. } => Failure::Infeasible(error.to_string()),
            other => Failure::Launch(other.to_string()),
        }
    }
}

/// One GPU with a stream of its own.
pub(crate) struct Gpu {
    pub(crate) runtime: Runtime,
    pub(crate) stream: Stream,
    flush: L2Flush,
    flag: DeviceBuffer,
    clocks: std::cell::RefCell<Vec<Clocks>>,
}

/// One candidate while it is timed.
pub(crate) struct Timed<'a> {
    /// Makes what it writes NaN.
    pub(crate) poison: Box<dyn Fn() -> Result<(), Error> + 'a>,
    /// Launches one call.
    pub(crate) launch: Box<dyn Fn() -> Result<(), Error> + 'a>,
    /// Compares what the call wrote; the largest error over its tolerance.
    pub(crate) judge: Box<dyn Fn() -> Result<f64, Failure> + 'a>,
}

/// The times of a candidate, and what became of its last timed launch.
pub(crate) struct Judged {
    pub(crate) timing: Timing,
    pub(crate) error_ratio: Result<f64, Failure>,
}

/// Rounds of timed launches: at least and at most this many.
const ROUNDS: std::ops::RangeInclusive<usize> = 5..=30;
/// Candidates slower than this multiple of the fastest are timed in the first rounds only.
const HOPELESS: f64 = 1.4;
/// Rounds for those.
const HOPELESS_ROUNDS: usize = 3;

impl Gpu {
    pub(crate) fn open(ordinal: usize, arch: Option<Arch>) -> Result<Gpu, Error> {
        let table = TableSource::None;
        let runtime = Runtime::open(Options { ordinal, bundle: None, table, arch, report: silent() })?;
        let device = runtime.device();
        let stream = device.new_stream()?;
        let (flush, flag) = (L2Flush::new(device)?, device.alloc(256)?);
        flag.fill(&stream, 0)?;
        stream.synchronize()?;
        Ok(Gpu { stream, flush, flag, clocks: Default::default(), runtime })
    }

    pub(crate) fn device(&self) -> &Arc<Device> {
        self.runtime.device()
    }

    pub(crate) fn flag(&self) -> u64 {
        self.flag.address()
    }

    /// Whether the context still works; after an illegal access it never does again.
    pub(crate) fn alive(&self) -> bool {
        self.device().synchronize().is_ok()
    }

    /// Clocks seen under load, the middle of them.
    pub(crate) fn clocks_under_load(&self) -> String {
        let mut seen = self.clocks.borrow().clone();
        seen.sort_by_key(|c| (c.sm_mhz, c.memory_mhz));
        seen.get(seen.len() / 2).map_or_else(|| "unknown".to_string(), |c| c.to_string())
    }

    /// Runs once, waits, and reads the error flag.
    pub(crate) fn checked_run(&self, launch: impl FnOnce() -> Result<(), Error>) -> Result<(), Failure> {
        self.flag.fill(&self.stream, 0)?;
        launch()?;
        let flag = self.flag.read::<i32>(&self.stream, 0, 1)?;
        decode_error_flag(flag[0]).map_err(|e| Failure::Wrong(e.to_string()))
    }

    /// Times candidates in rounds, in each in another order: at the GPU's power limit a launch is faster behind one that
    /// took less power. The L2 cache is written over before every launch (which also keeps the host ahead of the GPU, so
    /// that launch overhead is not measured). Every candidate has run before. `over` ends the rounds early, never
    /// before the first three. The last timed launch of each is judged: it writes over poisoned results, and its error
    /// flag is read.
    pub(crate) fn time(
        &self,
        work: &[Timed<'_>],
        budget_us: f64,
        over: impl Fn() -> bool,
    ) -> Result<Vec<Judged>, Error> {
        let device = self.device();
        let events: Vec<(Event, Event)> = work
            .iter()
            .map(|_| Ok((device.new_event()?, device.new_event()?)))
            .collect::<Result<_, Error>>()?;
        let mut rng = SplitMix64::new(work.len() as u64);
        let mut round =
            |with_clocks: bool, chosen: &dyn Fn(usize) -> bool| -> Result<Vec<Option<f64>>, Error> {
                for i in rng.permutation(work.len()).into_iter().filter(|&i| chosen(i)) {
                    self.timed_launch(&work[i], &events[i])?;
                }
                if with_clocks {
                    // Read while the work queued above is running.
                    self.clocks.borrow_mut().extend(device.clocks());
                }
                self.stream.synchronize()?;
                (0..work.len())
                    .map(|i| chosen(i).then(|| events[i].1.microseconds_since(&events[i].0)).transpose())
                    .collect()
            };
        let estimate: Vec<f64> =
            round(true, &|_| true)?.into_iter().map(|t| t.unwrap_or(f64::INFINITY)).collect();
        let fastest = estimate.iter().copied().fold(f64::INFINITY, f64::min);
        let hopeful = |i: usize| estimate[i] <= HOPELESS * fastest;
        let of_a_round: f64 = (0..work.len()).filter(|&i| hopeful(i)).map(|i| estimate[i] + 60.0).sum();
        let rounds = ((budget_us / of_a_round) as usize).clamp(*ROUNDS.start(), *ROUNDS.end());
        let mut samples: Vec<Vec<f64>> = vec![Vec::with_capacity(rounds); work.len()];
        // All but the last launch of each.
        for n in 0..rounds - 1 {
            if n + 1 >= HOPELESS_ROUNDS && over() {
                break;
            }
            let times = round(false, &|i| hopeful(i) || n + 1 < HOPELESS_ROUNDS)?;
            for (samples, time) in samples.iter_mut().zip(times) {
                samples.extend(time);
            }
        }
        let mut judged = Vec::with_capacity(work.len());
        for ((timed, events), mut samples) in work.iter().zip(&events).zip(samples) {
            (timed.poison)()?;
            let launched = self.checked_run(|| self.timed_launch(timed, events));
            // A launch that failed has no time.
            if !matches!(launched, Err(Failure::Launch(_))) {
                samples.push(events.1.microseconds_since(&events.0)?);
            }
            let error_ratio = launched.and_then(|()| (timed.judge)());
            judged.push(Judged { timing: timing(samples), error_ratio });
        }
        Ok(judged)
    }

    fn timed_launch(&self, timed: &Timed<'_>, events: &(Event, Event)) -> Result<(), Error> {
        self.flush.flush(&self.stream)?;
        self.stream.record(&events.0)?;
        (timed.launch)()?;
        self.stream.record(&events.1)
    }
}

/// Median and the distance from the 10th to the 90th percentile.
fn timing(mut samples: Vec<f64>) -> Timing {
    samples.sort_by(f64::total_cmp);
    let at = |share: f64| {
        let position = share * (samples.len() - 1) as f64;
        let (low, part) = (position.floor() as usize, position.fract());
        let high = (low + 1).min(samples.len() - 1);
        samples[low] + (samples[high] - samples[low]) * part
    };
    Timing {
        median_us: to_nanosecond(at(0.5)),
        spread_us: to_nanosecond(at(0.9) - at(0.1)),
        samples: samples.len() as u32,
    }
}

/// Device memory of one attention problem, everything [`AttnPlan`] may ask for.
pub(crate) struct Tensors {
    q: DeviceBuffer,
    k: DeviceBuffer,
    v: DeviceBuffer,
    d_out: DeviceBuffer,
    pub(crate) out: DeviceBuffer,
    pub(crate) lse: DeviceBuffer,
    pub(crate) dq: DeviceBuffer,
    pub(crate) dk: DeviceBuffer,
    pub(crate) dv: DeviceBuffer,
    workspace: DeviceBuffer,
}

/// Lists on the device, as both passes read them.
pub(crate) struct DeviceLists {
    q2k_index: DeviceBuffer,
    q2k_count: DeviceBuffer,
    k2q_offset: DeviceBuffer,
    k2q_index: DeviceBuffer,
}

impl DeviceLists {
    pub(crate) fn upload(gpu: &Gpu, lists: &KvListsBuf, inverse: &KvInverse) -> Result<DeviceLists, Error> {
        let device = gpu.device();
        Ok(DeviceLists {
            q2k_index: device.upload(&gpu.stream, &lists.index)?,
            q2k_count: device.upload(&gpu.stream, &lists.count)?,
            k2q_offset: device.upload(&gpu.stream, &inverse.offset)?,
            k2q_index: device.upload(&gpu.stream, &inverse.index)?,
        })
    }

    pub(crate) fn query(&self) -> QueryLists {
        QueryLists { q2k_index: self.q2k_index.address(), q2k_count: self.q2k_count.address() }
    }

    fn key(&self) -> KeyLists {
        KeyLists { k2q_offset: self.k2q_offset.address(), k2q_index: self.k2q_index.address() }
    }
}

impl Tensors {
    /// Bytes of the tensors of a case, lists included.
    pub(crate) fn bytes(case: &Case, workspace_bytes: u64) -> u64 {
        let problem = case.problem(AttnOp::Bwd);
        let elements = case.batch as u64 * case.seqlen as u64 * case.num_heads as u64 * case.head_dim as u64;
        let MemoryNeeded { query_lists, key_lists, lse, .. } = MemoryNeeded::of(&problem);
        8 * 2 * elements + query_lists + key_lists + lse + workspace_bytes
    }

    /// The workspace that serves every one of these cases, bytes: what a backward needs depends on its lists.
    pub(crate) fn workspace_bytes(cases: impl Iterator<Item = Case>) -> u64 {
        cases.map(|case| MemoryNeeded::of(&case.problem(AttnOp::Bwd)).workspace).max().unwrap_or(0)
    }

    /// Uploads inputs; results are uninitialised. `q_like` and `kv_like` are as long as those of the problem.
    pub(crate) fn upload(
        gpu: &Gpu,
        problem: &Problem,
        q: &[bf16],
        k: &[bf16],
        v: &[bf16],
        d_out: &[bf16],
        workspace_bytes: u64,
    ) -> Result<Tensors, Error> {
        let (device, stream) = (gpu.device(), &gpu.stream);
        let needed = MemoryNeeded::of(&Problem { op: AttnOp::Bwd, ..*problem });
        Ok(Tensors {
            q: device.upload(stream, q)?,
            k: device.upload(stream, k)?,
            v: device.upload(stream, v)?,
            d_out: device.upload(stream, d_out)?,
            out: device.alloc(size_of_val(q))?,
            lse: device.alloc(needed.lse as usize)?,
            dq: device.alloc(size_of_val(q))?,
            dk: device.alloc(size_of_val(k))?,
            dv: device.alloc(size_of_val(v))?,
            workspace: device.alloc(workspace_bytes as usize)?,
        })
    }

    pub(crate) fn upload_case(
        gpu: &Gpu,
        case: &Case,
        inputs: &HostInputs,
        workspace_bytes: u64,
    ) -> Result<Tensors, Error> {
        let HostInputs { q, k, v, d_out } = inputs;
        Tensors::upload(gpu, &case.problem(AttnOp::Bwd), q, k, v, d_out, workspace_bytes)
    }

    /// Makes every result NaN, so that what a kernel does not write is noticed.
    pub(crate) fn poison(&self, gpu: &Gpu, step: Step) -> Result<(), Error> {
        let results: &[&DeviceBuffer] = match step {
            Step::Forward => &[&self.out, &self.lse],
            _ => &[&self.dq, &self.dk, &self.dv, &self.workspace],
        };
        results.iter().try_for_each(|buffer| buffer.poison(&gpu.stream))
    }

    pub(crate) fn launch_forward(
        &self,
        gpu: &Gpu,
        plan: &AttnPlan,
        lists: Option<&DeviceLists>,
    ) -> Result<(), Error> {
        let args = FwdArgs {
            q: self.q.address(),
            k: self.k.address(),
            v: self.v.address(),
            out: self.out.address(),
            lse: self.lse.address(),
            lists: lists.map(DeviceLists::query),
            error_flag: gpu.flag(),
        };
        // SAFETY: the buffers were made for this plan's problem, and outlive the wait that ends every step.
        unsafe { plan.forward(&gpu.stream, &args) }
    }

    pub(crate) fn launch_backward(
        &self,
        gpu: &Gpu,
        plan: &AttnPlan,
        lists: Option<&DeviceLists>,
    ) -> Result<(), Error> {
        if plan.workspace_bytes() > self.workspace.bytes() as u64 {
            return Err(Error::Argument {
                kernel: plan.forward_kernel().name().to_string(),
                what: "workspace",
                value: format!("{} bytes", self.workspace.bytes()),
                allowed: format!("{} bytes", plan.workspace_bytes()),
            });
        }
        let args = BwdArgs {
            q: self.q.address(),
            k: self.k.address(),
            v: self.v.address(),
            out: self.out.address(),
            lse: self.lse.address(),
            d_out: self.d_out.address(),
            d_lse: None,
            dq: self.dq.address(),
            dk: self.dk.address(),
            dv: self.dv.address(),
            lists: lists.map(DeviceLists::key),
            query_lists: lists.map(DeviceLists::query),
            workspace: self.workspace.address(),
            error_flag: gpu.flag(),
        };
        // SAFETY: as above; the workspace was compared with what the plan asks for.
        unsafe { plan.backward(&gpu.stream, &args) }
    }
}

/// Reads rows of `width` elements that begin at the given element offsets.
pub(crate) fn read_rows(
    gpu: &Gpu,
    buffer: &DeviceBuffer,
    starts: &[usize],
    width: usize,
) -> Result<Vec<bf16>, Error> {
    let mut out = Vec::with_capacity(starts.len() * width);
    for start in starts {
        out.extend(buffer.read::<bf16>(&gpu.stream, start * size_of::<bf16>(), width)?);
    }
    Ok(out)
}

/// The layouts of every problem here: packed [B, S, H, D].
pub(crate) fn layouts(problem: &Problem) -> AttnLayouts {
    AttnLayouts::bshd(problem)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::listgen::ListKind;

    #[test]
    fn one_workspace_serves_all_lists_of_a_shape() {
        let fine = Case::sparse(128, 16, 32768, (128, 8), 0.1, ListKind::Random);
        let cases = [Case::dense(128, 16, 32768), fine];
        let [dense, gather] = cases.map(|case| Tensors::workspace_bytes([case].into_iter()));
        assert!(gather > dense, "dK and dV are added up in f32 there");
        assert_eq!(Tensors::workspace_bytes(cases.into_iter()), gather);
        assert_eq!(Tensors::bytes(&fine, gather) - Tensors::bytes(&fine, dense), gather - dense);
    }

    #[test]
    fn median_and_spread() {
        let t = timing(vec![5.0, 1.0, 3.0, 2.0, 4.0]);
        assert_eq!((t.median_us, t.samples), (3.0, 5));
        assert!((t.spread_us - (4.6 - 1.4)).abs() < 1e-12);
        assert_eq!(timing(vec![2.0]), Timing { median_us: 2.0, spread_us: 0.0, samples: 1 });
    }
}
