//! `dsv-autotune`: measures every candidate kernel on this machine's GPU and writes the dispatch table and a report.

use anyhow::Context;
use clap::{Args, Parser, Subcommand};
use dsv_autotune::explain::{Question, explain};
use dsv_autotune::listgen::ListKind;
use dsv_autotune::plan::{BenchRequest, Mode, Plan, ServedBy, Step};
use dsv_autotune::records::{Records, Run, RunDir, outcome_name, write_atomic};
use dsv_autotune::reduce::{Reduction, gpu_slug, merge, reduce, rows};
use dsv_autotune::report::Report;
use dsv_autotune::ruler::{self, Peer};
use dsv_autotune::service::Service;
use dsv_autotune::tables::{self, BENCH_FILE, Tables};
use dsv_autotune::{Supervised, TuneError, page, summary, supervise, work};
use dsv_runtime::Registry;
use dsv_spec::{Arch, Budget, Deterministic, DispatchTable, GroupRule, TableError};
use std::collections::BTreeMap;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

/// Tunes the attention kernels for this machine's GPU. Without a command: a new run, then table and report.
#[derive(Parser)]
#[command(name = "dsv-autotune", version)]
struct Cli {
    /// Two lengths, 90 % sparsity, head_dim 64 and 128 alone; under two minutes.
    #[arg(long, conflicts_with = "full")]
    quick: bool,
    /// Every length and sparsity, two of each for head_dim 96 and 256 (the default); under eight minutes.
    #[arg(long)]
    full: bool,
    /// Only cases and steps that have all these words, for example "d128 s32768 kb128 sp90 bwd".
    #[arg(long, value_name = "WORDS")]
    only: Option<String>,
    #[command(flatten)]
    common: Common,
    #[command(subcommand)]
    command: Option<Command>,
}

#[derive(Args)]
struct Common {
    /// Directory of the run: records, kernel reports, HTML report.
    #[arg(long, global = true, value_name = "DIR")]
    out: Option<PathBuf>,
    /// The dispatch table to write; by default generated/tables/<gpu>.json of the checkout. `bench` and `tables`
    /// read it instead: the table that serves, by default the committed one of the GPU.
    #[arg(long, global = true, value_name = "PATH")]
    table: Option<PathBuf>,
    /// JSON rows of a PyTorch run on the same GPU, to compare with.
    #[arg(long, global = true, value_name = "FILE")]
    ruler: Option<PathBuf>,
    /// Writes the tables of `bench --tables` into this Markdown file: between its marks, or, where there is none, a new one.
    #[arg(long, global = true, value_name = "FILE")]
    markdown: Option<PathBuf>,
    /// Hard limit of the run; what is not measured by then is left for `resume`.
    #[arg(long, global = true, value_name = "SECONDS")]
    time_limit: Option<f64>,
    /// Ordinal of the GPU.
    #[arg(long, global = true, default_value_t = 0)]
    device: usize,
}

#[derive(Subcommand)]
enum Command {
    /// Goes on with the run in --out: what is on record is not measured again.
    Resume,
    /// Makes the table from the records, without a GPU.
    Reduce,
    /// Says how far the run in --out is, without a GPU.
    Status,
    /// Writes the HTML report and prints the comparison, without a GPU.
    Report,
    /// Makes the tables of `bench --tables` from the records in --out, without a GPU.
    Tables {
        /// A bench.json to show instead: nothing is made, and of --out nothing is read.
        #[arg(long, value_name = "FILE", conflicts_with_all = ["ruler", "table"])]
        from: Option<PathBuf>,
    },
    /// Checks and times kernels on problems given here; writes no table.
    Bench(Box<Bench>),
    /// Says which kernels serve a problem, from which line of the table, and why; needs no GPU.
    Explain(Explain),
    /// The measuring process of the other commands.
    #[command(hide = true)]
    Worker,
}

#[derive(Args)]
struct Bench {
    /// Columns of Q, K, V; kernels that do not ship are made here.
    #[arg(long, value_delimiter = ',', default_value = "128")]
    head_dim: Vec<u16>,
    /// Tokens.
    #[arg(long, value_delimiter = ',', default_value = "32768")]
    seqlen: Vec<u32>,
    /// Heads.
    #[arg(long, default_value_t = 16)]
    heads: u32,
    /// Sequences.
    #[arg(long, default_value_t = 1)]
    batch: u32,
    /// dense, or QUERY_GROUPxKV_BLOCK; KV blocks of 1 (tokens) and 8 ship for head_dim 64, 96 and 128, others below 64 are made
    /// here.
    #[arg(long, value_delimiter = ',', default_value = "dense,64x64,128x128")]
    block: Vec<String>,
    /// Shares of the KV blocks kept.
    #[arg(long, value_delimiter = ',', default_value = "0.1")]
    keep: Vec<f64>,
    /// How lists are made: random, clustered (8 neighbouring groups share 80 % of their blocks), popular (some blocks are
    /// listed by most groups), mixed (heads of 50 % to 99 % sparsity in one launch, whatever --keep says).
    #[arg(long, value_delimiter = ',', default_value = "random")]
    lists: Vec<String>,
    /// fwd, bwd, dq, select, invert.
    #[arg(long, value_delimiter = ',', default_value = "fwd,bwd")]
    op: Vec<String>,
    /// How --op select chooses: by the centre or the mean query of a group, by the largest score of four (max4), or by
    /// their softmax mass (mass4).
    #[arg(long, value_delimiter = ',', default_value = "centre")]
    rule: Vec<String>,
    /// How much --op select keeps: top_k units, or the fewest that hold the share of the predicted mass that top_k units hold
    /// on average (top_p).
    #[arg(long, value_delimiter = ',', default_value = "top_k")]
    budget: Vec<String>,
    /// Forms of the backward: default, deterministic.
    #[arg(long, value_delimiter = ',', default_value = "default,deterministic")]
    form: Vec<String>,
    /// Only the kernels that the table (--table, else the committed one of this GPU) serves.
    #[arg(long)]
    served: bool,
    /// The tables of the project's figures instead: dense and sparse at 32k and 64k tokens, 5 % and 20 % kept, clustered,
    /// mixed and fine lists, each with the kernels the table serves, and selections. About three minutes.
    #[arg(long, conflicts_with_all = [
        "head_dim", "seqlen", "heads", "batch", "block", "keep", "lists", "op", "rule", "budget", "form", "served",
        "kernel"
    ])]
    tables: bool,
    /// Names of kernels, feasible ones that are no candidates included; by default every candidate.
    #[arg(long, value_delimiter = ',')]
    kernel: Vec<String>,
    /// The architecture whose kernels are timed, where it is not the GPU's own: sm80 runs on an H100 too.
    #[arg(long)]
    arch: Option<String>,
    /// Print the records as JSON after the table.
    #[arg(long)]
    json: bool,
}

#[derive(Args)]
struct Explain {
    /// Columns of Q, K, V.
    #[arg(long, default_value_t = 128)]
    head_dim: u16,
    /// Tokens.
    #[arg(long, default_value_t = 32768)]
    seqlen: u32,
    /// Heads.
    #[arg(long, default_value_t = 16)]
    heads: u32,
    /// Sequences.
    #[arg(long, default_value_t = 1)]
    batch: u32,
    /// dense, or QUERY_GROUPxKV_BLOCK.
    #[arg(long, default_value = "64x64")]
    block: String,
    /// Share of the KV blocks kept.
    #[arg(long, default_value_t = 0.1)]
    keep: f64,
    /// The same bits every time.
    #[arg(long)]
    deterministic: bool,
}

fn main() -> ExitCode {
    match run(Cli::parse()) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("{error:#}");
            ExitCode::FAILURE
        }
    }
}

/// A reader that stops early (head) is no error.
fn print(text: &str) {
    let _ = writeln!(std::io::stdout(), "{text}");
}

fn run(cli: Cli) -> anyhow::Result<ExitCode> {
    let common = &cli.common;
    if let Some(limit) = common.time_limit
        && !(limit.is_finite() && limit > 0.0)
    {
        anyhow::bail!(
            "--time-limit {limit} is not possible\n  allowed: seconds above 0\n  to see every option: dsv-autotune --help"
        );
    }
    if cli.command.is_some() && (cli.quick || cli.full || cli.only.is_some()) {
        anyhow::bail!(
            "--quick, --full and --only belong to a new run\n  to start one: dsv-autotune --quick\n  a command (resume, reduce, status, report) takes them from the run in --out"
        );
    }
    let bench = matches!(cli.command, Some(Command::Bench(_) | Command::Tables { .. }));
    let default = if bench { ".dsv/bench" } else { ".dsv/autotune" };
    let dir = RunDir::new(common.out.as_deref().unwrap_or(Path::new(default)));
    // Read before anything is measured: a typo should not cost a run.
    let peers = common.ruler.as_deref().map(ruler::read).transpose()?.unwrap_or_default();
    match &cli.command {
        None => {
            let mode = if cli.quick { Mode::Quick } else { Mode::Full };
            let plan = Plan::tune(mode, cli.only.as_deref())?;
            begin(&dir, plan, common.device)?;
            tune(&dir, common, &peers)
        }
        Some(Command::Resume) => {
            dir.read_run()?;
            tune(&dir, common, &peers)
        }
        Some(Command::Reduce) => {
            reduce_run(&dir, common)?;
            Ok(ExitCode::SUCCESS)
        }
        Some(Command::Status) => {
            status(&dir)?;
            Ok(ExitCode::SUCCESS)
        }
        Some(Command::Report) => {
            report(&dir, &peers)?;
            Ok(ExitCode::SUCCESS)
        }
        Some(Command::Tables { from: Some(path) }) => {
            show_tables(path, common, &Tables::read(path)?)?;
            Ok(ExitCode::SUCCESS)
        }
        Some(Command::Tables { from: None }) => {
            write_tables(&dir, common, &peers)?;
            Ok(ExitCode::SUCCESS)
        }
        Some(Command::Explain(asked)) => {
            let question = Question {
                head_dim: asked.head_dim,
                seqlen: asked.seqlen,
                num_heads: asked.heads,
                batch: asked.batch,
                block: asked.block.clone(),
                keep: asked.keep,
                deterministic: asked.deterministic,
            };
            let report: dsv_runtime::Report = std::sync::Arc::new(|notice| eprintln!("{notice}"));
            print(&explain(&question, common.device, common.table.as_deref(), &report)?);
            Ok(ExitCode::SUCCESS)
        }
        Some(Command::Bench(request)) => run_bench(&dir, request, common, &peers),
        Some(Command::Worker) => {
            let seconds = common.time_limit.unwrap_or(Mode::Full.time_limit_s());
            let ended = work(&dir, seconds)?;
            Ok(ExitCode::from(ended.exit_code() as u8))
        }
    }
}

fn begin(dir: &RunDir, plan: Plan, device: usize) -> anyhow::Result<()> {
    if let Some(kept) = dir.begin(&Run { plan, device, machine: None })? {
        eprintln!("records of the run before are kept in {}", kept.display());
    }
    Ok(())
}

/// Measures, then table, report and comparison of whatever is on record.
fn tune(dir: &RunDir, common: &Common, peers: &[Peer]) -> anyhow::Result<ExitCode> {
    let mode = dir.read_run()?.plan.mode;
    let seconds = common.time_limit.unwrap_or(mode.time_limit_s());
    let program =
        std::env::current_exe().context("cannot find this program to start its measuring process")?;
    let ended = supervise(&program, dir, seconds)?;
    if ended == Supervised::Failed {
        return Ok(ExitCode::FAILURE);
    }
    if ended == Supervised::TimeLimit {
        eprintln!(
            "the time limit of {seconds:.0} s came before the end; what follows holds what was measured\n  to measure the rest: dsv-autotune resume --out {}",
            dir.path().display()
        );
    }
    match mode {
        Mode::Bench => print(&summary::records(&dir.read_records()?.records)),
        Mode::Tables => write_tables(dir, common, peers)?,
        Mode::Quick | Mode::Full => {
            reduce_run(dir, common)?;
            report(dir, peers)?;
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn read(dir: &RunDir) -> anyhow::Result<(Run, Records)> {
    let (run, records) = (dir.read_run()?, dir.read_records()?);
    for bad in &records.bad {
        eprintln!("{bad}");
    }
    Ok((run, records))
}

fn reduction(dir: &RunDir, run: &Run, records: &Records) -> anyhow::Result<Reduction> {
    let machine =
        run.machine.clone().ok_or_else(|| TuneError::NotStarted { dir: dir.path().to_path_buf() })?;
    Ok(reduce(&records.records, machine))
}

/// Where the table of a GPU lies: in the checkout at hand, or the one this program was built from, else in the run.
fn table_path(common: &Common, dir: &RunDir, gpu: &str) -> PathBuf {
    let file = format!("{}.json", gpu_slug(gpu));
    let built_from = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap_or(Path::new("."));
    common.table.clone().unwrap_or_else(|| {
        [Path::new("."), built_from]
            .into_iter()
            .map(|root| root.join("generated"))
            .find(|generated| generated.join("kernels").is_dir())
            .map_or_else(|| dir.file(&file), |generated| generated.join("tables").join(&file))
    })
}

fn reduce_run(dir: &RunDir, common: &Common) -> anyhow::Result<()> {
    let (run, records) = read(dir)?;
    let Reduction { table, notes } = reduction(dir, &run, &records)?;
    for note in &notes {
        eprintln!("{note}");
    }
    if table.entries.is_empty() {
        let failures = records.failures();
        return Err(TuneError::NothingMeasured { dir: dir.path().to_path_buf(), failures }.into());
    }
    let path = table_path(common, dir, &table.meta.gpu);
    let measured = table.entries.len();
    let whole =
        run.plan.mode == Mode::Full && run.plan.only.is_none() && open_measurements(&run, &records)? == 0;
    let table = match std::fs::read_to_string(&path) {
        Ok(text) if !whole => {
            let old = DispatchTable::from_json(&path.display().to_string(), &text).context(
                "the table there is left as it is; to write elsewhere: dsv-autotune reduce --table PATH",
            )?;
            let (merged, dropped) = merge(old, table);
            if let Some(why) = dropped {
                eprintln!("{why}");
            }
            merged
        }
        _ => table,
    };
    write_atomic(&path, &table.to_json())?;
    eprintln!(
        "{}: {measured} lines from this run, {} in all, {} crossovers\n  to commit its winners' texts: dsv-codegen --arch sm90",
        path.display(),
        table.entries.len(),
        table.crossovers.len()
    );
    Ok(())
}

/// Measurements planned and not on record, by kernel and case; source changes since count as measured.
fn open_measurements(run: &Run, records: &Records) -> Result<usize, TuneError> {
    let arch = run.machine.as_ref().map_or(Arch::Sm90a, |m| m.arch);
    let service = match (&run.plan.served, &run.machine) {
        (None, _) => None,
        (Some(by), Some(machine)) => Some(Service::new(&machine.gpu, arch, by)?),
        // Which table it will be is not known yet; that it serves one kernel a form is.
        (Some(_), None) => Some(Service::defaults("a GPU not reached yet", arch)),
    };
    let contests = match &service {
        Some(service) => run.plan.contests_served(service),
        None => run.plan.contests(arch),
    };
    let done: std::collections::HashSet<_> =
        records.records.iter().map(|r| (r.spec, r.problem, r.lists.as_str())).collect();
    Ok(contests
        .iter()
        .flat_map(|c| {
            let (problem, lists) = (c.case.problem(c.step.op()), c.case.kind.name());
            c.specs.iter().map(move |spec| (*spec, problem, lists))
        })
        .filter(|key| !done.contains(key))
        .count())
}

fn status(dir: &RunDir) -> anyhow::Result<()> {
    let (run, records) = read(dir)?;
    let machine = run.machine.as_ref().map_or("no GPU reached yet".to_string(), |m| {
        format!("{} ({}), driver {}, NVRTC {}, {}", m.gpu, m.arch, m.driver, m.compiler, m.date)
    });
    let mut outcomes: BTreeMap<&str, usize> = BTreeMap::new();
    for record in &records.records {
        *outcomes.entry(outcome_name(&record.outcome)).or_default() += 1;
    }
    let outcomes: Vec<String> = outcomes.into_iter().map(|(name, n)| format!("{n} {name}")).collect();
    let open = open_measurements(&run, &records)?;
    print(&format!("{}: {:?} run of {} cases", dir.path().display(), run.plan.mode, run.plan.cases.len()));
    print(&format!("  machine: {machine}"));
    print(&format!("  on record: {} ({})", records.records.len(), outcomes.join(", ")));
    print(&format!("  to measure: {open}"));
    let next = match run.plan.mode {
        _ if open > 0 => "resume",
        Mode::Tables => "tables",
        _ => "report",
    };
    print(&format!("  next: dsv-autotune {next} --out {}", dir.path().display()));
    Ok(())
}

fn report(dir: &RunDir, peers: &[Peer]) -> anyhow::Result<()> {
    let (run, records) = read(dir)?;
    let Reduction { table, notes } = reduction(dir, &run, &records)?;
    let page = Report {
        meta: &table.meta,
        records: &records.records,
        crossovers: &table.crossovers,
        kernels: &dir.read_kernels(),
        peers,
        bad: &records.bad,
        notes: &notes,
    }
    .html()?;
    let path = dir.file("report.html");
    write_atomic(&path, &page)?;
    print(&summary::comparison(&rows(&records.records), peers));
    let failures = records.failures();
    eprintln!("{}: {} measurements, {failures} failures", path.display(), records.records.len());
    Ok(())
}

/// The tables of whatever is on record: [`BENCH_FILE`], the Markdown asked for, and on standard output.
fn write_tables(dir: &RunDir, common: &Common, peers: &[Peer]) -> anyhow::Result<()> {
    let (run, records) = read(dir)?;
    let machine = run.machine.ok_or_else(|| TuneError::NotStarted { dir: dir.path().to_path_buf() })?;
    let by = common.table.clone().map(ServedBy::File).or(run.plan.served).unwrap_or(ServedBy::Committed);
    let service = Service::new(&machine.gpu, machine.arch, &by)?;
    let bench = Tables::new(&machine, &records.records, &service, peers);
    let path = dir.file(BENCH_FILE);
    write_atomic(&path, &bench.to_json())?;
    let changed = bench.changed(&Registry::committed());
    if !changed.is_empty() {
        eprintln!("measured with another text than this program carries: {}", changed.join(", "));
    }
    show_tables(&path, common, &bench)
}

fn show_tables(path: &Path, common: &Common, bench: &Tables) -> anyhow::Result<()> {
    if let Some(document) = &common.markdown {
        write_markdown(document, path, bench)?;
    }
    print(&page::text(bench));
    Ok(())
}

fn write_markdown(document: &Path, record: &Path, bench: &Tables) -> anyhow::Result<()> {
    let old = match std::fs::read_to_string(document) {
        Ok(text) => Some(text),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => None,
        Err(why) => {
            return Err(TuneError::Io { what: "cannot read", path: document.to_path_buf(), why }.into());
        }
    };
    // The record as the document's reader finds it, where it lies beside or below.
    let folder = document.parent().filter(|dir| !dir.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let below = || {
        let (record, folder) = (record.canonicalize().ok()?, folder.canonicalize().ok()?);
        Some(record.strip_prefix(folder).ok()?.to_path_buf())
    };
    let name = below().unwrap_or_else(|| record.to_path_buf());
    let text = page::place(document, old.as_deref(), &name.display().to_string(), &page::markdown(bench))?;
    write_atomic(document, &text)?;
    eprintln!("{}: the tables of {}", document.display(), name.display());
    Ok(())
}

fn run_bench(dir: &RunDir, request: &Bench, common: &Common, peers: &[Peer]) -> anyhow::Result<ExitCode> {
    let word = |what: &str, value: &str, allowed: &str| {
        anyhow::anyhow!(
            "{what} {value} is not possible\n  allowed: {allowed}\n  to see every option: dsv-autotune bench --help"
        )
    };
    let served = common.table.clone().map_or(ServedBy::Committed, ServedBy::File);
    if let ServedBy::File(path) = &served {
        // Read before anything is measured.
        let fail = |why: String| TableError { origin: path.display().to_string(), problems: vec![why] };
        let json = std::fs::read_to_string(path).map_err(|e| fail(format!("it cannot be read: {e}")))?;
        DispatchTable::from_json(&path.display().to_string(), &json)?;
    }
    if request.tables {
        begin(dir, tables::plan(served), common.device)?;
        return tune(dir, common, peers);
    }
    let kinds = request
        .lists
        .iter()
        .map(|text| {
            let names = ListKind::WITH_LISTS.map(ListKind::name);
            let kind = ListKind::WITH_LISTS.into_iter().find(|kind| kind.name() == text);
            kind.ok_or_else(|| word("--lists", text, &names.join(", ")))
        })
        .collect::<anyhow::Result<Vec<ListKind>>>()?;
    let mut forms = request
        .form
        .iter()
        .map(|text| match text.as_str() {
            "default" => Ok(Deterministic::No),
            "deterministic" => Ok(Deterministic::Yes),
            other => Err(word("--form", other, "default, deterministic")),
        })
        .collect::<anyhow::Result<Vec<Deterministic>>>()?;
    forms.sort();
    forms.dedup();
    let mut steps = request
        .op
        .iter()
        .map(|text| {
            Step::ALL
                .into_iter()
                .find(|step| step.name() == text)
                .ok_or_else(|| word("--op", text, "fwd, bwd, dq, select, invert"))
        })
        .collect::<anyhow::Result<Vec<Step>>>()?;
    steps.sort();
    steps.dedup();
    let rules = request
        .rule
        .iter()
        .map(|text| {
            GroupRule::from_name(text).ok_or_else(|| word("--rule", text, "centre, mean, max4, mass4"))
        })
        .collect::<anyhow::Result<Vec<GroupRule>>>()?;
    let budgets = request
        .budget
        .iter()
        .map(|text| match text.as_str() {
            "top_k" => Ok(Budget::TopK),
            "top_p" => Ok(Budget::TopP),
            other => Err(word("--budget", other, "top_k, top_p")),
        })
        .collect::<anyhow::Result<Vec<Budget>>>()?;
    let arch = request
        .arch
        .as_ref()
        .map(|text| Arch::from_name(text).ok_or_else(|| word("--arch", text, "sm80, sm90")))
        .transpose()?;
    let plan = BenchRequest {
        head_dims: request.head_dim.clone(),
        seqlens: request.seqlen.clone(),
        num_heads: request.heads,
        batch: request.batch,
        blocks: request.block.clone(),
        keeps: request.keep.clone(),
        kinds,
        steps,
        kernels: request.kernel.clone(),
        forms,
        served: request.served.then_some(served),
        arch,
        rules,
        budgets,
    }
    .plan()?;
    begin(dir, plan, common.device)?;
    let code = tune(dir, common, peers)?;
    let records = dir.read_records()?;
    if records.records.is_empty() {
        return Ok(code);
    }
    if !peers.is_empty() {
        print(&summary::comparison(&rows(&records.records), peers));
    }
    let json = summary::json(&records.records);
    write_atomic(&dir.file("rows.json"), &json)?;
    if request.json {
        print(&json);
    }
    Ok(code)
}
