//! `dsv-autotune`: measures every candidate kernel on this machine's GPU and writes the dispatch table and a report.

use anyhow::Context;
use clap::{Args, Parser, Subcommand};
use dsv_autotune::explain::{Question, explain};
use dsv_autotune::plan::{BenchRequest, ListKind, Mode, Plan, Step};
use dsv_autotune::records::{Records, Run, RunDir, outcome_name, write_atomic};
use dsv_autotune::reduce::{Reduction, gpu_slug, merge, reduce, rows};
use dsv_autotune::report::Report;
use dsv_autotune::ruler::{self, Peer};
use dsv_autotune::{Supervised, TuneError, summary, supervise, work};
use dsv_spec::{Arch, DispatchTable};
use std::collections::BTreeMap;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

/// Tunes the attention kernels for this machine's GPU. Without a command: a new run, then table and report.
#[derive(Parser)]
#[command(name = "dsv-autotune", version)]
struct Cli {
    /// Two lengths and 90 % sparsity alone; under two minutes.
    #[arg(long, conflicts_with = "full")]
    quick: bool,
    /// Every length and sparsity (the default); under eight minutes.
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
    /// The dispatch table to write; by default generated/tables/<gpu>.json of the checkout.
    #[arg(long, global = true, value_name = "PATH")]
    table: Option<PathBuf>,
    /// JSON rows of a PyTorch run on the same GPU, to compare with.
    #[arg(long, global = true, value_name = "FILE")]
    ruler: Option<PathBuf>,
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
    /// Checks and times kernels on problems given here; writes no table.
    Bench(Bench),
    /// Says which kernels serve a problem, from which line of the table, and why; needs no GPU.
    Explain(Explain),
    /// The measuring process of the other commands.
    #[command(hide = true)]
    Worker,
}

#[derive(Args)]
struct Bench {
    /// Columns of Q, K, V.
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
    /// dense, or QUERY_GROUPxKV_BLOCK.
    #[arg(long, value_delimiter = ',', default_value = "dense,64x64,128x128")]
    block: Vec<String>,
    /// Shares of the KV blocks kept.
    #[arg(long, value_delimiter = ',', default_value = "0.1")]
    keep: Vec<f64>,
    /// How lists are made: random, clustered.
    #[arg(long, value_delimiter = ',', default_value = "random")]
    lists: Vec<String>,
    /// fwd, bwd, dq, select, invert.
    #[arg(long, value_delimiter = ',', default_value = "fwd,bwd")]
    op: Vec<String>,
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
    let bench = matches!(cli.command, Some(Command::Bench(_)));
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
    if mode == Mode::Bench {
        print(&summary::records(&dir.read_records()?.records));
    } else {
        reduce_run(dir, common)?;
        report(dir, peers)?;
    }
    if ended == Supervised::TimeLimit {
        eprintln!(
            "the time limit of {seconds:.0} s came before the end; table and report hold what was measured\n  to measure the rest: dsv-autotune resume --out {}",
            dir.path().display()
        );
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
        run.plan.mode == Mode::Full && run.plan.only.is_none() && open_measurements(&run, &records) == 0;
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
fn open_measurements(run: &Run, records: &Records) -> usize {
    let arch = run.machine.as_ref().map_or(Arch::Sm90a, |m| m.arch);
    let done: std::collections::HashSet<_> =
        records.records.iter().map(|r| (r.spec, r.problem, r.lists.as_str())).collect();
    run.plan
        .contests(arch)
        .iter()
        .flat_map(|c| {
            let (problem, lists) = (c.case.problem(c.step.op()), c.case.kind.name());
            c.specs.iter().map(move |spec| (*spec, problem, lists))
        })
        .filter(|key| !done.contains(key))
        .count()
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
    let open = open_measurements(&run, &records);
    print(&format!("{}: {:?} run of {} cases", dir.path().display(), run.plan.mode, run.plan.cases.len()));
    print(&format!("  machine: {machine}"));
    print(&format!("  on record: {} ({})", records.records.len(), outcomes.join(", ")));
    print(&format!("  to measure: {open}"));
    let next = if open > 0 { "resume" } else { "report" };
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

fn run_bench(dir: &RunDir, request: &Bench, common: &Common, peers: &[Peer]) -> anyhow::Result<ExitCode> {
    let word = |what: &str, value: &str, allowed: &str| {
        anyhow::anyhow!(
            "{what} {value} is not possible\n  allowed: {allowed}\n  to see every option: dsv-autotune bench --help"
        )
    };
    let kinds = request
        .lists
        .iter()
        .map(|text| match text.as_str() {
            "random" => Ok(ListKind::Random),
            "clustered" => Ok(ListKind::Clustered),
            other => Err(word("--lists", other, "random, clustered")),
        })
        .collect::<anyhow::Result<Vec<ListKind>>>()?;
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
        arch,
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
    write_atomic(&dir.file("bench.json"), &json)?;
    if request.json {
        print(&json);
    }
    Ok(code)
}
