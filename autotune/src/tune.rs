//! The measuring process: compile, check, time, record. One GPU, one run, until all is measured, the time is over, or
//! a kernel has taken the GPU's context down.

use crate::check::{HostInputs, KeySamples, RowSamples, SmallCase, normals};
use crate::error::TuneError;
use crate::gpu::{DeviceLists, Failure, Gpu, Judged, Tensors, Timed, layouts, read_rows};
use crate::listgen::{head_counts, host_lists};
use crate::plan::{Case, Contest, DTYPE, Step};
use crate::progress::Progress;
use crate::records::{
    self, KernelNote, Key, RECORD_FILE, RecordFile, Run, RunDir, outcome_message, to_line, today,
};
use crate::selection::{RANK, SCALE, SelectSamples};
use crate::service::Service;
use crate::watchdog::Watchdog;
use dsv_compile::{CompileJob, Compiler, SpillList};
use dsv_reference::lists::{KvInverse, KvListsBuf};
use dsv_runtime::{
    AttnPlan, BackwardKernels, FineArgs, FineProblem, Keep, Kernel, KeyLists, Layout, ListShape,
    MemoryNeeded, Origin, SelectProblem, Selection,
};
use dsv_spec::{
    Arch, AttnOp, AttnSpec, Budget, Deterministic, KernelSpec, Lists, Outcome, Problem, SCHEMA, SelectOp,
    SelectSpec, TableMeta, TuneRecord, space,
};
use half::bf16;
use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Exit status of the measuring process when the time limit came first.
pub(crate) const EXIT_TIME_LIMIT: i32 = 4;
/// Exit status when a kernel has taken the GPU's context down; what it was is on record.
pub(crate) const EXIT_DEVICE_LOST: i32 = 5;

/// How the measuring process ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ended {
    /// Everything planned is on record.
    Finished,
    /// The time limit came first.
    TimeLimit,
    /// A kernel has taken the GPU's context down.
    DeviceLost,
}

impl Ended {
    /// The process's exit status.
    pub fn exit_code(self) -> i32 {
        match self {
            Ended::Finished => 0,
            Ended::TimeLimit => EXIT_TIME_LIMIT,
            Ended::DeviceLost => EXIT_DEVICE_LOST,
        }
    }
}

/// A single run that takes longer than this hangs.
const HANG: Duration = Duration::from_secs(20);
/// Longest message kept in a record.
const MESSAGE_CHARS: usize = 1200;
/// The kernels that may spill.
const SPILLS: &str = include_str!("../../codegen/spills.txt");

/// Measures what the run in `dir` plans and has not on record yet, for at most `seconds`.
///
/// # Errors
/// No driver, no NVRTC, another GPU than the run's, a disk that takes no record. Kernels that fail are records.
pub fn work(dir: &RunDir, seconds: f64) -> Result<Ended, TuneError> {
    let deadline = Instant::now() + Duration::from_secs_f64(seconds);
    let run = dir.read_run()?;
    let gpu = Gpu::open(run.device, run.plan.arch)?;
    let compiler = Compiler::new()?;
    let mut session = Session::open(dir, run, gpu, &compiler, deadline)?;
    let ended = session.all(&compiler);
    session.finish()?;
    ended
}

/// Ends a case early: nothing more can be measured, for a reason that is no error.
enum Stop {
    Ended(Ended),
    Error(TuneError),
}

impl From<TuneError> for Stop {
    fn from(error: TuneError) -> Stop {
        Stop::Error(error)
    }
}

struct Session<'a> {
    dir: &'a RunDir,
    run: Run,
    arch: Arch,
    /// The table whose kernels are measured; none where candidates are.
    service: Option<Service>,
    gpu: Gpu,
    watchdog: Watchdog,
    file: RecordFile,
    records: Vec<TuneRecord>,
    done: HashSet<Key>,
    contests: Vec<Contest>,
    /// Source and hash of every kernel that may run, or why there is none.
    texts: BTreeMap<KernelSpec, Result<(String, String), String>>,
    /// The loaded kernels, or how each failed.
    kernels: BTreeMap<KernelSpec, Result<Arc<Kernel>, Outcome>>,
    /// Error over tolerance on the small case.
    small: BTreeMap<KernelSpec, f64>,
    progress: Progress,
    deadline: Instant,
}

/// What the steps of one case share.
struct CaseData<'a> {
    case: Case,
    inputs: &'a HostInputs,
    tensors: &'a Tensors,
    lists: Option<(KvListsBuf, KvInverse, DeviceLists)>,
    rows: RowSamples,
}

impl CaseData<'_> {
    fn device_lists(&self) -> Option<&DeviceLists> {
        self.lists.as_ref().map(|l| &l.2)
    }
}

fn shorten(message: impl Into<String>) -> String {
    let message = message.into();
    match message.char_indices().nth(MESSAGE_CHARS) {
        Some((at, _)) => format!("{} ...", &message[..at]),
        None => message,
    }
}

/// A failure for the terminal: the record has it all.
fn first_lines(name: &str, outcome: &Outcome) -> String {
    let lines: Vec<&str> = outcome_message(outcome).unwrap_or_default().lines().take(4).collect();
    format!("{name}: {}: {}", records::outcome_name(outcome), lines.join("\n  "))
}

fn launch_failure(message: impl Into<String>) -> Outcome {
    Outcome::Launch { message: shorten(message) }
}

impl From<Failure> for Outcome {
    fn from(failure: Failure) -> Outcome {
        match failure {
            Failure::Infeasible(message) => Outcome::Infeasible { message: shorten(message) },
            Failure::Launch(message) => Outcome::Launch { message: shorten(message) },
            Failure::Wrong(message) => Outcome::Wrong { message: shorten(message) },
        }
    }
}

fn default_attn(op: AttnOp, case: &Case, deterministic: Deterministic, arch: Arch) -> Option<KernelSpec> {
    space::default_attn(op, DTYPE, case.head_dim, case.lists, deterministic, arch).map(KernelSpec::Attn)
}

fn attn(spec: &KernelSpec) -> Option<&AttnSpec> {
    match spec {
        KernelSpec::Attn(s) => Some(s),
        _ => None,
    }
}

fn is_fine(spec: &KernelSpec) -> bool {
    matches!(spec, KernelSpec::Select(s) if s.op() == SelectOp::Fine)
}

impl<'a> Session<'a> {
    fn open(
        dir: &'a RunDir,
        mut run: Run,
        gpu: Gpu,
        compiler: &Compiler,
        deadline: Instant,
    ) -> Result<Session<'a>, TuneError> {
        let arch = gpu.device().arch_or(run.plan.arch)?;
        let info = gpu.device().info().clone();
        if let Some(machine) = &run.machine
            && machine.gpu != info.name
        {
            let theirs = machine.gpu.clone();
            return Err(TuneError::OtherGpu { dir: dir.path().to_path_buf(), theirs, ours: info.name });
        }
        let service = run.plan.served.as_ref().map(|by| Service::new(&info.name, arch, by)).transpose()?;
        let contests = match &service {
            Some(service) => run.plan.contests_served(service),
            None => run.plan.contests(arch),
        };
        if !contests.iter().any(|c| matches!(c.step, Step::Forward | Step::BackwardDq | Step::Backward))
            && run.plan.steps.iter().any(|s| matches!(s, Step::Forward | Step::BackwardDq | Step::Backward))
        {
            return Err(
                dsv_runtime::Error::UnsupportedGpu { gpu: info.name, capability: info.capability }.into()
            );
        }
        run.machine = Some(TableMeta {
            schema: SCHEMA,
            gpu: info.name,
            arch,
            driver: info.driver,
            compiler: compiler.version().to_string(),
            clocks: run.machine.map_or_else(|| "unknown".to_string(), |m| m.clocks),
            date: today(),
        });
        dir.write_run(&run)?;
        let past = dir.read_records()?;
        for bad in &past.bad {
            eprintln!("{bad}");
        }
        let path = dir.file(RECORD_FILE);
        let (file, watchdog) = (RecordFile::open(&path)?, Watchdog::start(&path)?);
        let done = past.keys();
        let mut session = Session {
            dir,
            run,
            arch,
            service,
            gpu,
            watchdog,
            file,
            records: past.records,
            done,
            contests,
            texts: BTreeMap::new(),
            kernels: BTreeMap::new(),
            small: BTreeMap::new(),
            progress: Progress::new(1.0),
            deadline,
        };
        session.render_all();
        Ok(session)
    }

    fn over(&self) -> bool {
        Instant::now() >= self.deadline
    }

    /// Notes the clocks for the table.
    fn finish(&mut self) -> Result<(), TuneError> {
        let clocks = self.gpu.clocks_under_load();
        if let Some(machine) = &mut self.run.machine
            && clocks != "unknown"
        {
            machine.clocks = clocks;
            self.dir.write_run(&self.run)?;
        }
        Ok(())
    }

    // ---- kernels ----

    /// The kernel of an op that runs beside one under test, in its deterministic form: what the table serves, where a table
    /// is measured, else the default.
    fn beside(&self, op: AttnOp, case: &Case) -> Option<KernelSpec> {
        let deterministic = Deterministic::Yes;
        match &self.service {
            Some(service) => {
                service.serve(&Problem { deterministic, ..case.problem(op) }).map(|found| found.kernel)
            }
            None => default_attn(op, case, deterministic, self.arch),
        }
    }

    /// The kernels a backward of this case needs beside the one under test.
    fn support(&self, case: &Case) -> Vec<KernelSpec> {
        let no = Deterministic::No;
        let mut specs: Vec<KernelSpec> = [
            default_attn(AttnOp::BwdPrep, case, no, self.arch),
            default_attn(AttnOp::BwdPost, case, no, self.arch),
            default_attn(AttnOp::BwdPostKv, case, no, self.arch),
            self.beside(AttnOp::Bwd, case),
            self.beside(AttnOp::BwdDq, case),
            self.beside(AttnOp::Fwd, case),
        ]
        .into_iter()
        .flatten()
        .collect();
        specs.extend(self.recorded_best(case, AttnOp::Fwd));
        specs.extend(self.recorded_best(case, AttnOp::BwdDq));
        specs
    }

    /// The fastest kernel of an op on record for exactly this case and of this version's text.
    fn recorded_best(&self, case: &Case, op: AttnOp) -> Option<KernelSpec> {
        let problem = case.problem(op);
        let fresh = |r: &&TuneRecord| {
            let hash = self.texts.get(&r.spec).and_then(|t| t.as_ref().ok()).map(|(_, hash)| hash);
            r.problem == problem && r.lists == case.kind.name() && hash.is_some_and(|h| *h == r.source_hash)
        };
        self.records
            .iter()
            .filter(fresh)
            .filter_map(|r| match (&r.outcome, attn(&r.spec)) {
                (Outcome::Ok { timing, .. }, Some(s)) if s.op() == op => Some((timing.median_us, r.spec)),
                _ => None,
            })
            .min_by(|a, b| a.0.total_cmp(&b.0))
            .map(|(_, spec)| spec)
    }

    fn render_all(&mut self) {
        let mut specs: BTreeSet<KernelSpec> =
            self.contests.iter().flat_map(|c| c.specs.iter().copied()).collect();
        for contest in self.contests.iter().filter(|c| c.step != Step::Select) {
            specs.extend(self.support(&contest.case));
        }
        let registry = *self.gpu.runtime.kernels().registry();
        for spec in specs {
            // The runtime launches its own texts of the list kernels; ours are rendered here and now.
            let text = match (attn(&spec), registry.kernel(&spec.name())) {
                (None, Some(text)) => Ok((text.source.to_string(), text.source_hash.to_string())),
                _ => dsv_codegen::render(&spec)
                    .map(|source| {
                        let hash = dsv_codegen::source_hash(&source);
                        (source, hash)
                    })
                    .map_err(|e| e.to_string()),
            };
            self.texts.insert(spec, text);
        }
    }

    fn hash(&self, spec: &KernelSpec) -> String {
        match self.texts.get(spec) {
            Some(Ok((_, hash))) => hash.clone(),
            _ => "none".to_string(),
        }
    }

    /// The kernels of a contest that are not on record yet.
    fn todo(&self, contest: &Contest) -> Vec<KernelSpec> {
        records::todo(contest, &self.done, |spec| self.hash(spec))
    }

    fn record_of(&self, case: &Case, step: Step, spec: KernelSpec, outcome: Outcome) -> TuneRecord {
        TuneRecord {
            spec,
            problem: case.problem(step.op()),
            sparsity: case.sparsity(),
            lists: case.kind.name().to_string(),
            source_hash: self.hash(&spec),
            outcome,
        }
    }

    fn record(
        &mut self,
        case: &Case,
        step: Step,
        spec: KernelSpec,
        outcome: Outcome,
    ) -> Result<(), TuneError> {
        let record = self.record_of(case, step, spec, outcome);
        self.file.append(&record)?;
        self.done.insert(Key::of(&record));
        self.records.push(record);
        Ok(())
    }

    /// Every contest in which a kernel is still to be measured.
    fn appearances(&self, spec: KernelSpec) -> Vec<(Case, Step)> {
        let open = |c: &&Contest| c.specs.contains(&spec) && self.todo(c).contains(&spec);
        self.contests.iter().filter(open).map(|c| (c.case, c.step)).collect()
    }

    fn timeout_lines(&self, where_to: &[(Case, Step)], specs: &[KernelSpec], message: &str) -> String {
        where_to
            .iter()
            .flat_map(|(case, step)| specs.iter().map(move |spec| (case, step, spec)))
            .map(|(case, step, spec)| {
                let outcome = Outcome::Timeout { message: message.to_string() };
                to_line(&self.record_of(case, *step, *spec, outcome))
            })
            .collect()
    }

    /// Compiles and loads every kernel that is still needed.
    fn compile(&mut self, compiler: &Compiler) -> Result<(), TuneError> {
        let mut wanted = BTreeSet::new();
        for contest in &self.contests {
            let todo = self.todo(contest);
            match contest.step {
                _ if todo.is_empty() => {}
                Step::Forward => wanted.extend(todo),
                Step::BackwardDq | Step::Backward => {
                    wanted.extend(todo);
                    wanted.extend(self.support(&contest.case));
                }
                // Not all of kv_select_fine is committed; the others are, and the runtime loads them.
                Step::Select => wanted.extend(todo.into_iter().filter(is_fine)),
                Step::Invert => {}
            }
        }
        let wanted: Vec<KernelSpec> = wanted.into_iter().collect();
        let spills = SpillList::parse(SPILLS)?;
        let mut sources: Vec<(KernelSpec, String, &str)> = Vec::new();
        for spec in &wanted {
            match &self.texts[spec] {
                Ok((source, _)) => sources.push((*spec, spec.name(), source)),
                Err(message) => {
                    self.kernels.insert(*spec, Err(Outcome::Compile { message: shorten(message.clone()) }));
                }
            }
        }
        let (major, minor) = self.gpu.device().info().capability;
        let jobs: Vec<CompileJob<'_>> = sources
            .iter()
            .map(|(spec, name, source)| CompileJob {
                name,
                source,
                headers: dsv_codegen::HEADERS,
                arch: spec.arch().nvrtc_for(major, minor).unwrap_or(spec.arch().nvrtc()),
            })
            .collect();
        let threads = std::thread::available_parallelism().map_or(1, |n| n.get());
        self.progress.doing(&format!("compiling {} kernels on {threads} threads", jobs.len()));
        let results = compiler.compile_all(&jobs, threads, |_, _| {});
        let mut notes = BTreeMap::new();
        for ((spec, name, _), result) in sources.iter().zip(results) {
            let kernel = match result {
                Err(e) => Err(Outcome::Compile { message: shorten(e.to_string()) }),
                Ok(compiled) => {
                    let report = compiled.report;
                    let note = KernelNote {
                        registers: report.registers,
                        spill_bytes: report.spill_store_bytes.max(report.spill_load_bytes),
                        stack_bytes: report.stack_bytes,
                        smem_bytes: spec.facts().smem_bytes,
                        source_hash: self.hash(spec),
                    };
                    notes.insert(name.clone(), note);
                    match compiled.check(&spills) {
                        Err(e) => Err(Outcome::Compile { message: shorten(e.to_string()) }),
                        Ok(()) => {
                            let origin = Origin::Compiled(compiled.compiler.clone());
                            Kernel::load(self.gpu.device(), *spec, &compiled.cubin, origin)
                                .map(Arc::new)
                                .map_err(|e| launch_failure(e.to_string()))
                        }
                    }
                }
            };
            if let Err(outcome) = &kernel {
                self.progress.note(&first_lines(name, outcome));
            }
            self.kernels.insert(*spec, kernel);
        }
        self.dir.add_kernels(notes)
    }

    fn kernel(&self, spec: Option<KernelSpec>, what: &str) -> Result<Arc<Kernel>, Outcome> {
        let missing = || launch_failure(format!("there is no {what} kernel to run it with"));
        let spec = spec.ok_or_else(missing)?;
        match self.kernels.get(&spec) {
            Some(Ok(kernel)) => Ok(kernel.clone()),
            Some(Err(outcome)) => Err(launch_failure(format!(
                "{spec}, which it runs with, failed: {}",
                outcome_message(outcome).unwrap_or_default()
            ))),
            None => Err(missing()),
        }
    }

    /// A deterministic kernel of an op for this case: that of [`Session::beside`], or, on the small case, whose bucket no one
    /// asked about, any that is loaded.
    fn any(&self, op: AttnOp, case: &Case) -> Result<Arc<Kernel>, Outcome> {
        let loaded = |spec: KernelSpec| self.kernels.get(&spec)?.as_ref().ok().cloned();
        let fits = |s: &AttnSpec| {
            (s.op(), s.dtype(), s.head_dim(), s.lists(), s.deterministic())
                == (op, DTYPE, case.head_dim, case.lists, Deterministic::Yes)
        };
        let mut others = self.kernels.keys().copied().filter(|spec| attn(spec).is_some_and(fits));
        self.beside(op, case).and_then(loaded).or_else(|| others.find_map(loaded)).ok_or_else(|| {
            launch_failure(format!("no {op} kernel of this head_dim and block size could be loaded"))
        })
    }

    /// The plan that runs one kernel: the forward alone, or a whole backward around it.
    fn plan(
        &self,
        case: &Case,
        problem: &Problem,
        spec: KernelSpec,
        forward: Option<Arc<Kernel>>,
    ) -> Result<AttnPlan, Outcome> {
        let own = match self.kernels.get(&spec) {
            Some(Ok(kernel)) => kernel.clone(),
            Some(Err(outcome)) => return Err(outcome.clone()),
            None => return Err(launch_failure("it was not compiled")),
        };
        let Some(s) = attn(&spec) else { return Err(launch_failure("it is no kernel of attention")) };
        let helper = |op| default_attn(op, case, Deterministic::No, self.arch);
        let (problem, forward, backward) = match s.op() {
            AttnOp::Fwd => (Problem { op: AttnOp::Fwd, ..*problem }, own, None),
            op => {
                let prep = self.kernel(helper(AttnOp::BwdPrep), "attn_bwd_prep")?;
                let (main, ending) = if op == AttnOp::BwdDq {
                    (self.any(AttnOp::Bwd, case)?, own)
                } else if s.deterministic() == Deterministic::Yes {
                    // A table names its own; else the best that was measured before.
                    let best = match &self.service {
                        Some(_) => None,
                        None => self.recorded_best(case, AttnOp::BwdDq),
                    };
                    match best.and_then(|b| self.kernels.get(&b)?.as_ref().ok().cloned()) {
                        Some(best) => (own, best),
                        None => (own, self.any(AttnOp::BwdDq, case)?),
                    }
                } else {
                    let ending = AttnOp::ending(s.lists(), s.deterministic());
                    (own, self.kernel(helper(ending), ending.name())?)
                };
                let forward = match forward {
                    Some(kernel) => kernel,
                    None => self.any(AttnOp::Fwd, case)?,
                };
                (
                    Problem { op: AttnOp::Bwd, ..*problem },
                    forward,
                    Some(BackwardKernels { prep, main, ending }),
                )
            }
        };
        AttnPlan::new(&problem, &layouts(&problem), None, forward, backward)
            .map_err(|e| Failure::from(e).into())
    }

    // ---- the run ----

    fn all(&mut self, compiler: &Compiler) -> Result<Ended, TuneError> {
        let threads = std::thread::available_parallelism().map_or(1, |n| n.get()) as f64;
        let open: BTreeSet<KernelSpec> = self.contests.iter().flat_map(|c| self.todo(c)).collect();
        if open.is_empty() {
            return Ok(Ended::Finished);
        }
        let compile_us = open.len() as f64 * 4e6 / threads;
        let small_us = open.len() as f64 * 30e3 + 2e6;
        let contests_us: f64 = self.contests.iter().map(|c| self.expected_us(c)).sum();
        self.progress = Progress::new(compile_us + small_us + contests_us);
        self.compile(compiler)?;
        self.progress.advance(compile_us);
        let result = self.small_checks().and_then(|()| {
            self.progress.advance(small_us);
            self.cases()
        });
        match result {
            Ok(()) => Ok(Ended::Finished),
            Err(Stop::Ended(ended)) => Ok(ended),
            Err(Stop::Error(error)) => Err(error),
        }
    }

    /// What a contest should take, for the time left.
    fn expected_us(&self, contest: &Contest) -> f64 {
        let n = self.todo(contest).len() as f64;
        if n == 0.0 {
            return 0.0;
        }
        let one = match contest.step {
            Step::Forward | Step::BackwardDq | Step::Backward => {
                contest.case.flops(contest.step.op()) / 400e6
            }
            Step::Select | Step::Invert => 300.0,
        };
        let rounds_us = (n * one * 15.0).min(self.run.plan.mode.budget_us()).max(n * one * 5.0);
        rounds_us + n * one * 3.0 + 60e3
    }

    /// Records a failure. When it took the context down, nothing more can be measured in this process, and the kernel is
    /// not tried on any other case.
    fn failed(&mut self, case: &Case, step: Step, spec: KernelSpec, outcome: Outcome) -> Result<(), Stop> {
        let launch = matches!(outcome, Outcome::Launch { .. });
        let message = outcome_message(&outcome).unwrap_or_default().to_string();
        self.record(case, step, spec, outcome)?;
        if launch && !self.gpu.alive() {
            let everywhere =
                launch_failure(format!("it took the GPU's context down on {}: {message}", case.label()));
            for (case, step) in self.appearances(spec) {
                self.record(&case, step, spec, everywhere.clone())?;
            }
            self.progress.note(&format!("{spec} took the GPU's context down; going on in a new process"));
            return Err(Stop::Ended(Ended::DeviceLost));
        }
        Ok(())
    }

    /// Runs every loaded kernel on the small case of its head_dim and block size and compares every element.
    fn small_checks(&mut self) -> Result<(), Stop> {
        let shape = |s: &AttnSpec| (s.head_dim(), s.lists());
        // Forward kernels first, then attn_bwd, then attn_bwd_dq, which runs with a checked attn_bwd.
        let order = |s: &AttnSpec| match s.op() {
            AttnOp::Fwd => 0,
            AttnOp::Bwd => 1,
            _ => 2,
        };
        let mut specs: Vec<KernelSpec> = self
            .kernels
            .iter()
            .filter(|(_, k)| k.is_ok())
            .map(|(spec, _)| *spec)
            .filter(|spec| {
                attn(spec).is_some_and(|s| matches!(s.op(), AttnOp::Fwd | AttnOp::Bwd | AttnOp::BwdDq))
            })
            .collect();
        specs.sort_by_key(|spec| attn(spec).map(|s| (shape(s), order(s), *spec)));
        for group in specs.chunk_by(|a, b| attn(a).map(shape) == attn(b).map(shape)) {
            let Some((head_dim, lists)) = group.first().and_then(attn).map(shape) else { continue };
            self.small_group(head_dim, lists, group)?;
            if self.over() {
                return Err(Stop::Ended(Ended::TimeLimit));
            }
        }
        Ok(())
    }

    fn small_group(&mut self, head_dim: u16, lists: Lists, specs: &[KernelSpec]) -> Result<(), Stop> {
        let small = SmallCase::new(head_dim, lists).expect("the small case is one the reference takes");
        let gpu = &self.gpu;
        let SmallCase { q, k, v, d_out, problem, .. } = &small;
        let workspace = MemoryNeeded::of(&Problem { op: AttnOp::Bwd, ..*problem }).workspace;
        let tensors = Tensors::upload(gpu, problem, q, k, v, d_out, workspace).map_err(TuneError::from)?;
        let device_lists = match &small.lists {
            None => None,
            Some(buf) => {
                let inverse = buf.invert().expect("generated lists are valid");
                Some(DeviceLists::upload(gpu, buf, &inverse).map_err(TuneError::from)?)
            }
        };
        // Only its head_dim and block size are looked at.
        let case = Case { head_dim, lists, ..Case::dense(head_dim, 4, 390) };
        for &spec in specs {
            let Some(op) = attn(&spec).map(AttnSpec::op) else { continue };
            let name = spec.name();
            self.progress.doing(&format!("checking {name}"));
            let appearances = self.appearances(spec);
            let lines = self.timeout_lines(&appearances, &[spec], "it hung on the small case of the check");
            let gpu = &self.gpu;
            let result = self.plan(&case, &small.problem, spec, None).and_then(|plan| {
                let _watched = self.watchdog.watch(HANG, &name, lines);
                let run = || -> Result<f64, Failure> {
                    if op == AttnOp::Fwd {
                        tensors.poison(gpu, Step::Forward)?;
                        gpu.checked_run(|| tensors.launch_forward(gpu, &plan, device_lists.as_ref()))?;
                        let out = tensors.out.read::<bf16>(&gpu.stream, 0, small.q.len())?;
                        let lse = tensors.lse.read::<f32>(&gpu.stream, 0, small.saved_lse.len())?;
                        small.judge_forward(&out, &lse).map_err(Failure::Wrong)
                    } else {
                        tensors.out.write(&gpu.stream, 0, &small.saved_out)?;
                        tensors.lse.write(&gpu.stream, 0, &small.saved_lse)?;
                        tensors.poison(gpu, Step::Backward)?;
                        gpu.checked_run(|| tensors.launch_backward(gpu, &plan, device_lists.as_ref()))?;
                        let dq = tensors.dq.read::<bf16>(&gpu.stream, 0, small.q.len())?;
                        let dk = tensors.dk.read::<bf16>(&gpu.stream, 0, small.k.len())?;
                        let dv = tensors.dv.read::<bf16>(&gpu.stream, 0, small.v.len())?;
                        small.judge_backward(&dq, &dk, &dv).map_err(Failure::Wrong)
                    }
                };
                run().map_err(|failure| match Outcome::from(failure) {
                    Outcome::Wrong { message } => Outcome::Wrong {
                        message: shorten(format!(
                            "batch 2, 4 heads on 2 KV heads, 390 queries, 450 keys, against the f64 oracle: {message}"
                        )),
                    },
                    other => other,
                })
            });
            match result {
                Ok(ratio) => {
                    self.small.insert(spec, ratio);
                }
                Err(outcome) => {
                    self.progress.note(&first_lines(&name, &outcome));
                    if matches!(outcome, Outcome::Launch { .. }) && !self.gpu.alive() {
                        for (case, step) in appearances {
                            self.record(&case, step, spec, outcome.clone())?;
                        }
                        return Err(Stop::Ended(Ended::DeviceLost));
                    }
                    self.kernels.insert(spec, Err(outcome));
                }
            }
        }
        Ok(())
    }

    fn cases(&mut self) -> Result<(), Stop> {
        let contests = self.contests.clone();
        let shape = |c: &Case| (c.head_dim, c.batch, c.num_heads, c.seqlen);
        let mut held: Option<(Case, HostInputs, Tensors)> = None;
        for group in contests.chunk_by(|a, b| a.case == b.case) {
            if group.iter().all(|c| self.todo(c).is_empty()) {
                continue;
            }
            if self.over() {
                return Err(Stop::Ended(Ended::TimeLimit));
            }
            let case = group[0].case;
            self.progress.doing(&case.label());
            let (choices, others): (Vec<Contest>, Vec<Contest>) =
                group.iter().cloned().partition(|c| c.step == Step::Select);
            if others.iter().any(|c| !self.todo(c).is_empty()) {
                if held.as_ref().is_none_or(|(of, ..)| shape(of) != shape(&case)) {
                    drop(held.take());
                    let free = self.gpu.device().memory().map_err(TuneError::from)?.0;
                    // Lists of later cases are wider: leave room.
                    let alike = contests.iter().map(|c| c.case).filter(|c| shape(c) == shape(&case));
                    let workspace = Tensors::workspace_bytes(alike);
                    let needed = Tensors::bytes(&case, workspace) + (1 << 30);
                    if needed > free {
                        let message = format!("it needs {needed} bytes of device memory, {free} are free");
                        self.refuse(&others, Outcome::Infeasible { message })?;
                    } else {
                        let inputs = HostInputs::random(&case);
                        let tensors = Tensors::upload_case(&self.gpu, &case, &inputs, workspace)
                            .map_err(TuneError::from)?;
                        held = Some((case, inputs, tensors));
                    }
                }
                if let Some((_, inputs, tensors)) = &held {
                    self.case(case, &others, inputs, tensors)?;
                }
            }
            for contest in &choices {
                let expected = self.expected_us(contest);
                for spec in self.todo(contest) {
                    if self.over() {
                        return Err(Stop::Ended(Ended::TimeLimit));
                    }
                    self.progress.doing(&format!("{} {}", case.label(), contest.step.name()));
                    self.select(&case, spec)?;
                }
                self.progress.advance(expected);
            }
        }
        Ok(())
    }

    /// The same outcome for everything still to be measured of a case.
    fn refuse(&mut self, group: &[Contest], outcome: Outcome) -> Result<(), TuneError> {
        for contest in group {
            for spec in self.todo(contest) {
                self.record(&contest.case, contest.step, spec, outcome.clone())?;
            }
        }
        Ok(())
    }

    fn case(
        &mut self,
        case: Case,
        group: &[Contest],
        inputs: &HostInputs,
        tensors: &Tensors,
    ) -> Result<(), Stop> {
        let lists = if case.lists.is_dense() {
            None
        } else {
            let host = host_lists(&case);
            let inverse = host.invert().expect("generated lists are valid");
            let device = DeviceLists::upload(&self.gpu, &host, &inverse).map_err(TuneError::from)?;
            Some((host, inverse, device))
        };
        let rows = RowSamples::new(&case, inputs, lists.as_ref().map(|l| &l.0))
            .expect("the tuner's cases are ones the reference takes");
        let data = CaseData { case, inputs, tensors, lists, rows };
        let mut keys: Option<KeySamples> = None;
        let mut forward: Option<Arc<Kernel>> = None;
        for contest in group {
            let expected = self.expected_us(contest);
            let todo = self.todo(contest);
            if todo.is_empty() {
                continue;
            }
            if self.over() {
                return Err(Stop::Ended(Ended::TimeLimit));
            }
            self.progress.doing(&format!("{} {}", case.label(), contest.step.name()));
            match contest.step {
                Step::Forward => self.attention(&data, contest.step, &todo, None, None)?,
                Step::BackwardDq | Step::Backward => {
                    if keys.is_none() {
                        match self.backward_inputs(&data)? {
                            Ok((kernel, samples)) => (forward, keys) = (Some(kernel), Some(samples)),
                            Err(outcome) => {
                                for spec in todo {
                                    self.record(&case, contest.step, spec, outcome.clone())?;
                                }
                                continue;
                            }
                        }
                    }
                    self.attention(&data, contest.step, &todo, forward.clone(), keys.as_ref())?;
                }
                // Done apart: it needs nothing of the case's data.
                Step::Select => {}
                Step::Invert => self.invert(&data, todo[0])?,
            }
            self.progress.advance(expected);
        }
        Ok(())
    }

    /// Runs the best forward on record, so that the backward has its out and LSE, and says what dK and dV should be.
    fn backward_inputs(
        &mut self,
        data: &CaseData<'_>,
    ) -> Result<Result<(Arc<Kernel>, KeySamples), Outcome>, Stop> {
        let case = data.case;
        let choices = [self.recorded_best(&case, AttnOp::Fwd), self.beside(AttnOp::Fwd, &case)];
        let Some(kernel) =
            choices.into_iter().flatten().find_map(|spec| self.kernels.get(&spec)?.as_ref().ok().cloned())
        else {
            let message = "no forward kernel is right on this case, so the backward has no input";
            return Ok(Err(launch_failure(message)));
        };
        let spec = *kernel.spec();
        let gpu = &self.gpu;
        let lines = self.timeout_lines(
            &[(case, Step::Forward)],
            &[spec],
            "it hung while making the backward's input",
        );
        let watched = self.watchdog.watch(HANG, kernel.name(), lines);
        let run = || -> Result<(Vec<bf16>, Vec<f32>), Failure> {
            let problem = case.problem(AttnOp::Fwd);
            let plan = AttnPlan::new(&problem, &layouts(&problem), None, kernel.clone(), None)?;
            data.tensors.poison(gpu, Step::Forward)?;
            gpu.checked_run(|| data.tensors.launch_forward(gpu, &plan, data.device_lists()))?;
            self.judge_rows(data, Step::Forward, None)?;
            let out = data.tensors.out.read::<bf16>(&gpu.stream, 0, data.inputs.q.len())?;
            let rows = case.batch as usize * case.num_heads as usize * case.seqlen as usize;
            Ok((out, data.tensors.lse.read::<f32>(&gpu.stream, 0, rows)?))
        };
        let result = run();
        drop(watched);
        match result {
            Ok((out, lse)) => {
                let inverse = data.lists.as_ref().map(|l| &l.1);
                let samples = KeySamples::new(&case, data.inputs, inverse, &out, &lse)
                    .expect("the tuner's cases are ones the reference takes");
                Ok(Ok((kernel, samples)))
            }
            Err(failure) => {
                let outcome = Outcome::from(failure);
                let message = outcome_message(&outcome).unwrap_or_default().to_string();
                self.failed(&case, Step::Forward, spec, outcome)?;
                Ok(Err(launch_failure(format!(
                    "{spec}, which makes the backward's input, failed: {message}"
                ))))
            }
        }
    }

    /// Compares the sampled rows (and keys) of the last run.
    fn judge_rows(&self, data: &CaseData<'_>, step: Step, keys: Option<&KeySamples>) -> Result<f64, Failure> {
        let (gpu, case, t) = (&self.gpu, &data.case, data.tensors);
        let width = case.head_dim as usize;
        let starts = data.rows.starts(case);
        if step == Step::Forward {
            let out = read_rows(gpu, &t.out, &starts, width)?;
            let mut lse = Vec::with_capacity(starts.len());
            for at in data.rows.lse_at(case) {
                lse.extend(t.lse.read::<f32>(&gpu.stream, at * size_of::<f32>(), 1)?);
            }
            return data.rows.judge_forward(&out, &lse).map_err(Failure::Wrong);
        }
        let dq = data.rows.judge_dq(&read_rows(gpu, &t.dq, &starts, width)?).map_err(Failure::Wrong)?;
        let Some(keys) = keys else { return Ok(dq) };
        let starts = keys.starts(case);
        let (dk, dv) = (read_rows(gpu, &t.dk, &starts, width)?, read_rows(gpu, &t.dv, &starts, width)?);
        Ok(dq.max(keys.judge(&dk, &dv).map_err(Failure::Wrong)?))
    }

    /// Checks the kernels of one contest of attention on the timed case, then times those that are right.
    fn attention(
        &mut self,
        data: &CaseData<'_>,
        step: Step,
        todo: &[KernelSpec],
        forward: Option<Arc<Kernel>>,
        keys: Option<&KeySamples>,
    ) -> Result<(), Stop> {
        let case = data.case;
        let problem = case.problem(step.op());
        let mut right: Vec<(KernelSpec, AttnPlan, f64)> = Vec::new();
        for &spec in todo {
            let lines = {
                let message = format!("one run did not end within 20 s on {}", case.label());
                self.timeout_lines(&self.appearances(spec), &[spec], &message)
            };
            let gpu = &self.gpu;
            let result = self.plan(&case, &problem, spec, forward.clone()).and_then(|plan| {
                let _watched = self.watchdog.watch(HANG, &spec.name(), lines);
                let run = || -> Result<f64, Failure> {
                    data.tensors.poison(gpu, step)?;
                    gpu.checked_run(|| match step {
                        Step::Forward => data.tensors.launch_forward(gpu, &plan, data.device_lists()),
                        _ => data.tensors.launch_backward(gpu, &plan, data.device_lists()),
                    })?;
                    self.judge_rows(data, step, keys)
                };
                let sampled = run().map_err(Outcome::from)?;
                Ok((plan, sampled))
            });
            match result {
                Ok((plan, sampled)) => {
                    let small = self.small.get(&spec).copied().unwrap_or(0.0);
                    right.push((spec, plan, sampled.max(small)));
                }
                Err(outcome) => self.failed(&case, step, spec, outcome)?,
            }
        }
        if right.is_empty() {
            return Ok(());
        }
        let specs: Vec<KernelSpec> = right.iter().map(|r| r.0).collect();
        let ratios: Vec<f64> = right.iter().map(|r| r.2).collect();
        let result = {
            let gpu = &self.gpu;
            let work: Vec<Timed<'_>> = right
                .iter()
                .map(|(_, plan, _)| Timed {
                    poison: Box::new(|| data.tensors.poison(gpu, step)),
                    launch: Box::new(move || match step {
                        Step::Forward => data.tensors.launch_forward(gpu, plan, data.device_lists()),
                        _ => data.tensors.launch_backward(gpu, plan, data.device_lists()),
                    }),
                    judge: Box::new(|| self.judge_rows(data, step, keys)),
                })
                .collect();
            self.time(&case, step, &specs, &work)
        };
        self.record_times(&case, step, &specs, &ratios, result)
    }

    fn time(
        &self,
        case: &Case,
        step: Step,
        specs: &[KernelSpec],
        work: &[Timed<'_>],
    ) -> Result<Vec<Judged>, dsv_runtime::Error> {
        let message = format!("one of {} kernels timed together did not end in time", specs.len());
        let lines = self.timeout_lines(&[(*case, step)], specs, &message);
        let budget_us = self.run.plan.mode.budget_us();
        let limit = 2 * HANG + Duration::from_micros(4 * budget_us as u64);
        let _watched = self.watchdog.watch(limit, &format!("{} {}", case.label(), step.name()), lines);
        self.gpu.time(work, budget_us, || self.over())
    }

    fn record_times(
        &mut self,
        case: &Case,
        step: Step,
        specs: &[KernelSpec],
        ratios: &[f64],
        result: Result<Vec<Judged>, dsv_runtime::Error>,
    ) -> Result<(), Stop> {
        match result {
            Ok(judged) => {
                for ((&spec, &before), Judged { timing, error_ratio }) in specs.iter().zip(ratios).zip(judged)
                {
                    match error_ratio {
                        Ok(ratio) => {
                            let error_ratio = before.max(ratio);
                            self.record(case, step, spec, Outcome::Ok { timing, error_ratio })?;
                        }
                        Err(failure) => {
                            let outcome = match Outcome::from(failure) {
                                Outcome::Wrong { message } => Outcome::Wrong {
                                    message: shorten(format!(
                                        "right at first, wrong when it was timed: {message}"
                                    )),
                                },
                                other => other,
                            };
                            self.failed(case, step, spec, outcome)?;
                        }
                    }
                }
                Ok(())
            }
            Err(e) => {
                let outcome = launch_failure(format!("while being timed together: {e}"));
                for &spec in &specs[..specs.len() - 1] {
                    self.record(case, step, spec, outcome.clone())?;
                }
                self.failed(case, step, specs[specs.len() - 1], outcome)
            }
        }
    }

    /// A list kernel: one checked run, then its times.
    fn list_kernel(
        &mut self,
        case: &Case,
        step: Step,
        spec: KernelSpec,
        poison: &dyn Fn(&Gpu) -> Result<(), dsv_runtime::Error>,
        launch: &dyn Fn(&Gpu) -> Result<(), dsv_runtime::Error>,
        judge: &dyn Fn(&Gpu) -> Result<f64, Failure>,
    ) -> Result<(), Stop> {
        let result = {
            let gpu = &self.gpu;
            let lines = self.timeout_lines(&[(*case, step)], &[spec], "one run did not end within 20 s");
            let _watched = self.watchdog.watch(HANG, &spec.name(), lines);
            poison(gpu)
                .map_err(Failure::from)
                .and_then(|()| gpu.checked_run(|| launch(gpu)))
                .and_then(|()| judge(gpu))
        };
        let ratio = match result {
            Ok(ratio) => ratio,
            Err(failure) => return self.failed(case, step, spec, failure.into()),
        };
        let result = {
            let gpu = &self.gpu;
            let work = [Timed {
                poison: Box::new(|| poison(gpu)),
                launch: Box::new(|| launch(gpu)),
                judge: Box::new(|| judge(gpu)),
            }];
            self.time(case, step, &[spec], &work)
        };
        self.record_times(case, step, &[spec], &[ratio], result)
    }

    /// The plan of a selection: `kv_select` as the runtime has it, `kv_select_fine` as it was compiled here.
    fn choice(&self, case: &Case, spec: &SelectSpec) -> Result<Selection, Outcome> {
        let layout = Layout::bshd(case.seqlen, case.num_heads, RANK as u32);
        let (query_group, kv_block, group_rule) = (spec.query_group(), spec.kv_block(), spec.group_rule());
        let Case { batch, num_heads, seqlen, max_selected, .. } = *case;
        if spec.op() == SelectOp::Rows {
            let problem = SelectProblem {
                rank: spec.rank(),
                query_group,
                kv_block,
                group_rule,
                keep: Keep::default(),
                batch,
                num_heads,
                seqlen_q: seqlen,
                seqlen_kv: seqlen,
                max_selected,
            };
            return match self.gpu.runtime.selection(&problem, layout, layout) {
                Ok(plan) => Ok(Selection::Blocks(plan)),
                Err(e) => Err(Failure::from(e).into()),
            };
        }
        let problem = FineProblem {
            rank: spec.rank(),
            query_group,
            kv_block,
            group_rule,
            block_score: spec.block_score(),
            budget: spec.budget(),
            scale: SCALE,
            keep: Keep::default(),
            batch,
            num_heads,
            seqlen_q: seqlen,
            seqlen_kv: seqlen,
            max_selected,
        };
        let kernel = match self.kernels.get(&KernelSpec::Select(*spec)) {
            Some(Ok(kernel)) => kernel.clone(),
            Some(Err(outcome)) => return Err(outcome.clone()),
            None => return Err(launch_failure("it was not compiled")),
        };
        match self.gpu.runtime.fine_selection_with(&problem, layout, layout, kernel) {
            Ok(plan) => Ok(Selection::Fine(plan)),
            Err(e) => Err(Failure::from(e).into()),
        }
    }

    /// Checks a selection with its scores written, then without, then times it without.
    fn select(&mut self, case: &Case, spec: KernelSpec) -> Result<(), Stop> {
        let KernelSpec::Select(select) = spec else { return Ok(()) };
        let choice = match self.choice(case, &select) {
            Ok(choice) => choice,
            Err(outcome) => return self.failed(case, Step::Select, spec, outcome),
        };
        let len = case.batch as usize * case.seqlen as usize * case.num_heads as usize * RANK;
        let (q_lr, k_lr) = (normals(len, 21), normals(len, 22));
        let samples = SelectSamples::new(case, select, &q_lr, &k_lr)
            .expect("the tuner's cases are ones the reference takes");
        let share = samples.share();
        let shape = ListShape::of(&case.problem(AttnOp::Fwd));
        let (width, units) = (case.max_selected as usize, shape.num_kv_blocks as usize);
        let upload = |gpu: &Gpu| {
            let (device, stream) = (gpu.device(), &gpu.stream);
            let budget = match select.budget() {
                Budget::TopK => {
                    let top_k: Vec<i32> = head_counts(case).into_iter().map(|n| n as i32).collect();
                    device.upload(stream, &top_k)?
                }
                Budget::TopP => device.upload(stream, &vec![share; case.num_heads as usize])?,
            };
            Ok::<_, dsv_runtime::Error>((
                device.upload(stream, &q_lr)?,
                device.upload(stream, &k_lr)?,
                budget,
                device.alloc(shape.index_bytes() as usize)?,
                device.alloc(shape.count_bytes() as usize)?,
            ))
        };
        let scores_bytes = shape.count_bytes() * u64::from(shape.num_kv_blocks);
        let needed = scores_bytes + shape.index_bytes() + shape.count_bytes() + (1 << 28);
        let free = self.gpu.device().memory().map_err(TuneError::from)?.0;
        if needed > free {
            let message = format!(
                "it needs {needed} bytes of device memory, {free} are free; all scores are written once, for the check"
            );
            return self.failed(case, Step::Select, spec, Outcome::Infeasible { message });
        }
        let (q, k, budget, index, count) = upload(&self.gpu).map_err(TuneError::from)?;
        let poison = |gpu: &Gpu| index.poison(&gpu.stream).and_then(|()| count.poison(&gpu.stream));
        let launch_with = |gpu: &Gpu, scores: Option<u64>| {
            let args = FineArgs {
                q_lr: q.address(),
                k_lr: k.address(),
                budget: budget.address(),
                q2k_index: Some(index.address()),
                q2k_count: count.address(),
                bitmap: None,
                scores,
                keep_mask: None,
                capped: None,
                error_flag: gpu.flag(),
            };
            // SAFETY: the buffers were made for this problem, and outlive the wait that ends every step.
            unsafe { choice.select(&gpu.stream, &args) }
        };
        let judge_lists = |gpu: &Gpu, scores: &[Vec<f32>]| -> Result<(), Failure> {
            let counts = count.read::<i32>(&gpu.stream, 0, shape.count_bytes() as usize / 4)?;
            let (mut ids, mut of_lists) = (Vec::new(), Vec::new());
            for list in samples.places() {
                ids.push(index.read::<i32>(&gpu.stream, list * width * size_of::<i32>(), width)?);
                of_lists.push(counts[list]);
            }
            samples.judge_lists(scores, &ids, &of_lists, share).map_err(Failure::Wrong)
        };
        let checked = {
            let gpu = &self.gpu;
            let lines =
                self.timeout_lines(&[(*case, Step::Select)], &[spec], "one run did not end within 20 s");
            let _watched = self.watchdog.watch(HANG, &spec.name(), lines);
            let run = || -> Result<(Vec<Vec<f32>>, f64), Failure> {
                let scores = gpu.device().alloc(scores_bytes as usize)?;
                scores.poison(&gpu.stream)?;
                poison(gpu)?;
                gpu.checked_run(|| launch_with(gpu, Some(scores.address())))?;
                let of_list =
                    |list: usize| scores.read::<f32>(&gpu.stream, list * units * size_of::<f32>(), units);
                let found = samples.places().map(of_list).collect::<Result<Vec<_>, _>>()?;
                let ratio = samples.judge_scores(&found).map_err(Failure::Wrong)?;
                judge_lists(gpu, &found)?;
                Ok((found, ratio))
            };
            run()
        };
        let (scores, ratio) = match checked {
            Ok(found) => found,
            Err(failure) => return self.failed(case, Step::Select, spec, failure.into()),
        };
        let launch = |gpu: &Gpu| launch_with(gpu, None);
        let judge = |gpu: &Gpu| judge_lists(gpu, &scores).map(|()| ratio);
        self.list_kernel(case, Step::Select, spec, &poison, &launch, &judge)
    }

    fn invert(&mut self, data: &CaseData<'_>, spec: KernelSpec) -> Result<(), Stop> {
        let case = data.case;
        let Some((_, expected, lists)) = &data.lists else { return Ok(()) };
        let shape = ListShape::of(&case.problem(AttnOp::Bwd));
        let plan = match self.gpu.runtime.lists(&shape) {
            Ok(plan) => plan,
            Err(e) => return self.failed(&case, Step::Invert, spec, Failure::from(e).into()),
        };
        let alloc = |bytes: u64| self.gpu.device().alloc(bytes as usize).map_err(TuneError::from);
        let (offset, index) = (alloc(shape.offset_bytes())?, alloc(shape.index_bytes())?);
        let poison = |gpu: &Gpu| offset.poison(&gpu.stream).and_then(|()| index.poison(&gpu.stream));
        let launch = |gpu: &Gpu| {
            let to = KeyLists { k2q_offset: offset.address(), k2q_index: index.address() };
            // SAFETY: the buffers were made for these lists, and outlive the wait that ends every step.
            unsafe { plan.invert(&gpu.stream, &lists.query(), &to, gpu.flag()) }
        };
        let judge = |gpu: &Gpu| {
            let found = offset.read::<i32>(&gpu.stream, 0, expected.offset.len())?;
            if let Some(at) = (0..found.len()).find(|&i| found[i] != expected.offset[i]) {
                return Err(Failure::Wrong(format!(
                    "k2q_offset[{at}] is {} instead of {}",
                    found[at], expected.offset[at]
                )));
            }
            let found = index.read::<i32>(&gpu.stream, 0, expected.index.len())?;
            // Past the last offset of a slab the reference has -1, and a kernel may have anything.
            match (0..found.len()).find(|&i| expected.index[i] >= 0 && found[i] != expected.index[i]) {
                None => Ok(0.0),
                Some(at) => Err(Failure::Wrong(format!(
                    "k2q_index[{at}] is {} instead of {}",
                    found[at], expected.index[at]
                ))),
            }
        };
        self.list_kernel(&case, Step::Invert, spec, &poison, &launch, &judge)
    }
}
