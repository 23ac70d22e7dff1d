//! `dsv-train`: train a video DiT, prepare its data, plan, evaluate, sample, report.

use anyhow::Context;
use clap::{Args, Parser, Subcommand, ValueEnum};
use dsv_train::bench::{self, Bench, BenchError, BlockTime};
use dsv_train::config::{self, Config};
use dsv_train::crosscheck;
use dsv_train::data::{Dataset, prepare};
use dsv_train::durable::{RealDisk, write_file};
use dsv_train::engine::{self, DeviceFacts, EngineError, PlannedGpu};
use dsv_train::eval::{self, EvalResult};
use dsv_train::granularity::{self, times::Times};
use dsv_train::model::BlockAttention;
use dsv_train::recorder::Recorder;
use dsv_train::report::{self, RunData};
use dsv_train::run::{self, Existing};
use dsv_train::sample;
use dsv_train::tensors;
use std::io::IsTerminal;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

#[derive(Parser)]
#[command(
    name = "dsv-train",
    version,
    about = "Train a video diffusion transformer with dynamic sparse attention"
)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Train, through both stages; leaves checkpoints, metrics, report.html and a sample
    Run(RunArgs),
    /// Turn videos, folders of pictures or .npy arrays into shards of latents
    Prepare(prepare::PrepareArgs),
    /// Sample clips from a trained run
    Sample(SampleArgs),
    /// Validation loss of a trained run on fixed (clip, timestep, noise) triples
    Eval(EvalArgs),
    /// Memory and arithmetic of a run, and every configuration key with its meaning (TOML on standard output)
    Plan(PlanArgs),
    /// Milliseconds a layer, forward and backward: full attention and predicted lists of a fixed share
    Bench(BenchArgs),
    /// Attention mass that KV lists of every granularity cover in a trained run, against the time of a step over them
    Granularity(GranularityArgs),
    /// One HTML report of one run or several compared
    Report(ReportArgs),
    /// One pass of the model with random weights, every gradient included, for tests/crosscheck.py to compute again
    Crosscheck(CrosscheckArgs),
}

#[derive(Args)]
struct ConfigArgs {
    /// TOML file; what it lacks comes from the preset
    #[arg(value_name = "CONFIG")]
    file: Option<PathBuf>,
    /// The same, as an option
    #[arg(long, value_name = "CONFIG", conflicts_with = "file")]
    config: Option<PathBuf>,
    /// Values to start from: tiny, 0.8b, 2.7b, 30b [default: the file's, else tiny]
    #[arg(long)]
    preset: Option<String>,
    /// Overrides, as section.key=value
    #[arg(long = "set", value_name = "KEY=VALUE")]
    sets: Vec<String>,
}

impl ConfigArgs {
    fn load(&self) -> anyhow::Result<Config> {
        let file = self.file.as_deref().or(self.config.as_deref());
        Ok(Config::load(file, self.preset.as_deref(), &self.sets)?)
    }
}

#[derive(Args)]
struct PlanArgs {
    #[command(flatten)]
    config: ConfigArgs,
    /// Plan for this GPU model, which need not be here: h100, h200 [default: the device of the configuration]
    #[arg(long, value_name = "MODEL")]
    gpu: Option<String>,
    /// Spread the memory over so many GPUs (a dry run: training is on one)
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..))]
    gpus: u32,
}

#[derive(Args)]
struct RunArgs {
    #[command(flatten)]
    config: ConfigArgs,
    /// Folder for everything the run writes [default: out.dir]
    #[arg(long)]
    out: Option<PathBuf>,
    /// Go on from the newest valid checkpoint of the folder, with the configuration in it; --set may change all but [model],
    /// [data] (its path and readers excepted), dsv.rank and dsv.attention, so that a copy of the folder goes on as a fork:
    /// with other lists, another dsv.switch
    #[arg(long)]
    resume: bool,
    /// Stop after this step with a checkpoint, as SIGTERM does; --resume goes on [default: train.steps]
    #[arg(long, value_name = "STEP")]
    until: Option<u64>,
    /// Delete the folder's checkpoints and begin anew
    #[arg(long, conflicts_with = "resume")]
    overwrite: bool,
}

#[derive(Args)]
struct TrainedArgs {
    /// Folder of the run
    #[arg(long)]
    out: PathBuf,
    /// One checkpoint's folder [default: the newest valid one]
    #[arg(long)]
    checkpoint: Option<PathBuf>,
    /// Overrides of the run's configuration, as section.key=value
    #[arg(long = "set", value_name = "KEY=VALUE")]
    sets: Vec<String>,
    /// Attention of the blocks
    #[arg(long, value_enum, default_value = "trained")]
    attention: Attention,
}

#[derive(Clone, Copy, ValueEnum)]
enum Attention {
    /// As the dispatcher had it when the checkpoint was made
    Trained,
    /// Full attention in every block
    Dense,
}

#[derive(Args)]
struct SampleArgs {
    #[command(flatten)]
    trained: TrainedArgs,
    /// Captions, one clip each [default: those of the first held-out clips]
    #[arg(long = "caption")]
    captions: Vec<String>,
    /// Clips, where no captions are given
    #[arg(long, default_value_t = 4)]
    count: usize,
    /// Seed of the noise
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Folder for sample.gif [default: the run's folder, in samples/]
    #[arg(long)]
    to: Option<PathBuf>,
}

#[derive(Args)]
struct EvalArgs {
    #[command(flatten)]
    trained: TrainedArgs,
    /// Clips at a time [default: data.batch_size]
    #[arg(long)]
    batch: Option<usize>,
    /// Write every triple's loss to this JSON file
    #[arg(long)]
    json: Option<PathBuf>,
    /// JSON file of another evaluation to pair this one with
    #[arg(long)]
    against: Option<PathBuf>,
}

#[derive(Args)]
struct GranularityArgs {
    #[command(flatten)]
    trained: TrainedArgs,
    /// Samples: held-out clips in turn, each at the next of four timesteps
    #[arg(long, default_value_t = 4, value_parser = clap::value_parser!(u32).range(1..))]
    samples: u32,
    /// Query groups looked at in each sample, block and head
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..))]
    groups: u32,
    /// Queries of a group whose mass is measured
    #[arg(long, default_value_t = 64, value_parser = clap::value_parser!(u32).range(1..))]
    queries: u32,
    /// Also measure cubes of other shapes, as many tokens as a query group
    #[arg(long)]
    cubes: bool,
    /// Share of the attention mass that lists must cover
    #[arg(long, default_value_t = 0.95, value_parser = share)]
    mass: f64,
    /// Lengths whose times are told, in tokens, several with commas [default: the run's, 32768, 131072]
    #[arg(long, value_name = "N,...", value_delimiter = ',')]
    lengths: Vec<usize>,
    /// Times of this GPU model's committed table: h100, h200 [default: the table of the GPU that is here]
    #[arg(long, value_name = "MODEL")]
    gpu: Option<String>,
    /// Times of this dispatch table
    #[arg(long, value_name = "FILE", conflicts_with = "gpu")]
    table: Option<PathBuf>,
    /// Times of this run of dsv-autotune on the same GPU (its records.jsonl), on top of the table's; may be repeated
    #[arg(long, value_name = "FILE")]
    record: Vec<PathBuf>,
    /// Folder for granularity.json, .md and .svg [default: the run's, where report finds them]
    #[arg(long)]
    to: Option<PathBuf>,
}

fn share(word: &str) -> Result<f64, String> {
    let share: Option<f64> = word.parse().ok().filter(|x| *x > 0.0 && *x <= 1.0);
    share.ok_or_else(|| "allowed: above 0, at most 1, as in 0.95".to_string())
}

#[derive(Args)]
struct BenchArgs {
    #[command(flatten)]
    config: ConfigArgs,
    /// Video tokens of a clip, several with commas: latent frames are added or left out [default: the configuration's]
    #[arg(long, value_name = "N,...", value_delimiter = ',')]
    tokens: Vec<usize>,
    /// Attention of every layer, several with commas: full, fixed (dsv.keep of the keys, or a tenth), dsv (its stage 1),
    /// wa-m, wa-l
    #[arg(long, value_name = "A,...", value_delimiter = ',', default_value = "full,fixed", value_parser = attention)]
    attention: Vec<config::Attention>,
    /// Block sizes of the lists, several with commas, query_group x kv_block: 64x64,128x128 [default: the configuration's]
    #[arg(long, value_name = "GxK,...", value_delimiter = ',', value_parser = block_size)]
    blocks: Vec<(usize, usize)>,
    /// Layers laid out and timed together
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u16).range(1..))]
    layers: u16,
    /// Timed passes of each
    #[arg(long, default_value_t = 10, value_parser = clap::value_parser!(u16).range(1..))]
    repeats: u16,
    /// Seconds of passes before the timed ones, so that the GPU has the clocks that it can hold
    #[arg(long, default_value_t = 1.0, value_name = "SECONDS", value_parser = warm_up)]
    warm_up: f64,
    /// Print every op, not only what they are for
    #[arg(long)]
    ops: bool,
    /// Also time whole optimizer steps of the whole model, beside what its layers take
    #[arg(long)]
    whole: bool,
    /// Write everything to this JSON file, after each measurement
    #[arg(long)]
    json: Option<PathBuf>,
}

fn warm_up(word: &str) -> Result<f64, String> {
    let allowed = || "allowed: 0 to 60".to_string();
    word.parse().ok().filter(|s| (0.0..=60.0).contains(s)).ok_or_else(allowed)
}

fn attention(word: &str) -> Result<config::Attention, String> {
    serde_json::from_value(word.into()).map_err(|_| "allowed: full, fixed, dsv, wa-m, wa-l".to_string())
}

fn block_size(word: &str) -> Result<(usize, usize), String> {
    let form = || "the form is query_group x kv_block, as in 64x64".to_string();
    let (group, block) = word.split_once('x').ok_or_else(form)?;
    Ok((group.parse().map_err(|_| form())?, block.parse().map_err(|_| form())?))
}

#[derive(Args)]
struct CrosscheckArgs {
    #[command(flatten)]
    config: ConfigArgs,
    /// The safetensors file to write
    #[arg(long)]
    to: PathBuf,
}

#[derive(Args)]
struct ReportArgs {
    /// Folders of runs
    #[arg(required = true)]
    runs: Vec<PathBuf>,
    /// The file [default: report.html in the first folder]
    #[arg(long)]
    out: Option<PathBuf>,
}

fn main() {
    let result = match Cli::parse().command {
        Command::Run(args) => train(&args),
        Command::Prepare(args) => prepare_shards(&args),
        Command::Sample(args) => sample_clips(&args),
        Command::Eval(args) => evaluate(&args),
        Command::Plan(args) => plan(&args),
        Command::Bench(args) => time_blocks(&args),
        Command::Granularity(args) => measure_granularity(&args),
        Command::Report(args) => write_report(&args.runs, args.out),
        Command::Crosscheck(args) => write_pass(&args),
    };
    if let Err(error) = result {
        eprintln!("error: {error:#}");
        std::process::exit(1);
    }
}

fn train(args: &RunArgs) -> anyhow::Result<()> {
    let mut config = args.config.load()?;
    if args.resume
        && args.config.file.is_none()
        && args.config.config.is_none()
        && args.config.preset.is_none()
    {
        // A resumed run goes on with the configuration it began with.
        let dir = args.out.clone().unwrap_or(config.out.dir.clone());
        let file = dir.join("config.toml");
        if file.exists() {
            config = Config::load(Some(&file), None, &args.config.sets)?;
            config.out.dir = dir;
        }
    }
    if let Some(out) = &args.out {
        config.out.dir = out.clone();
    }
    let stop = Arc::new(AtomicBool::new(false));
    for signal in [signal_hook::consts::SIGTERM, signal_hook::consts::SIGINT] {
        // The second signal ends the program at once; the first asks for a checkpoint.
        signal_hook::flag::register_conditional_shutdown(signal, 1, stop.clone())?;
        signal_hook::flag::register(signal, stop.clone())?;
    }
    let existing = match (args.resume, args.overwrite) {
        (true, _) => Existing::Resume,
        (_, true) => Existing::Overwrite,
        _ => Existing::Refuse,
    };
    let engine = engine::open(&config.device, config.train.deterministic)?;
    let mut recorder = Recorder::new(&config);
    let outcome = run::run(&config, engine, existing, args.until, &stop, &mut recorder);
    recorder.finish();
    let outcome = outcome?;
    let out = &config.out.dir;
    let page = out.join("report.html");
    let data = RunData::load(out)?;
    report::write(&page, &[data]).with_context(|| format!("cannot write {}", page.display()))?;
    println!("checkpoint  {}", outcome.checkpoint.display());
    println!("report      {}", page.display());
    match outcome.sample {
        Some(sample) => println!("sample      {}", sample.display()),
        None => println!(
            "stopped after {} of {} steps; to go on: dsv-train run --resume --out {}",
            outcome.step,
            config.train.steps,
            out.display()
        ),
    }
    Ok(())
}

fn prepare_shards(args: &prepare::PrepareArgs) -> anyhow::Result<()> {
    let report = prepare::prepare(args, |source, clips| eprintln!("{clips:>6} clips  {}", source.display()))?;
    for (source, why) in &report.skipped {
        eprintln!("skipped {}: {why}", source.display());
    }
    let [channels, frames, height, width] = args.latent_shape();
    println!("{} clips from {} sources in {} shards", report.clips, report.sources, report.shards.len());
    println!(
        "to train on them: dsv-train run --set data.kind=shards --set data.path={} --set data.frames={frames} --set data.height={height} --set data.width={width} --set model.latent_channels={channels} --set model.text_tokens={} --set model.text_dim={}",
        args.out.display(),
        args.text_tokens,
        args.text_dim
    );
    Ok(())
}

fn open(args: &TrainedArgs, batch: Option<usize>) -> anyhow::Result<(run::Inference, Dataset)> {
    let batch = match batch {
        Some(batch) => batch,
        None => Config::load(Some(&args.out.join("config.toml")), None, &args.sets)?.data.batch_size,
    };
    let mut trained = run::open_trained(&args.out, args.checkpoint.as_deref(), batch, &args.sets)?;
    if matches!(args.attention, Attention::Dense) {
        trained.attention.fill(BlockAttention::Dense);
    }
    let data = Dataset::open(&trained.config)?;
    Ok((trained, data))
}

fn sample_clips(args: &SampleArgs) -> anyhow::Result<()> {
    let count = if args.captions.is_empty() { args.count.max(1) } else { args.captions.len() };
    let (mut trained, data) = open(&args.trained, Some(count))?;
    let texts = if args.captions.is_empty() {
        run::texts_of(&data, count)?
    } else {
        let embed = |caption: &String| {
            data.embed(caption).with_context(|| {
                format!(
                    "the caption {caption:?} cannot be embedded: the shards in {} carry a text encoder's embeddings\n  next: leave --caption away to use the held-out clips' texts",
                    trained.config.data.path.display()
                )
            })
        };
        args.captions.iter().map(embed).collect::<anyhow::Result<Vec<_>>>()?
    };
    let (model, config) = (trained.model.clone(), trained.config.clone());
    let steps = config.sample.steps;
    let live = std::io::stderr().is_terminal();
    let began = Instant::now();
    let (latents, seconds, speed) = eval::with_averaged(&mut *trained.engine, &model, |engine| {
        let show = |i| {
            if live {
                eprint!("\rsampling {i}/{steps} ");
            }
        };
        let latents = sample::sample(engine, &model, &config, &texts, args.seed, &trained.attention, show)?;
        let seconds = began.elapsed().as_secs_f64();
        Ok::<_, EngineError>((latents, seconds, sample::speed(engine, &model, &trained.attention)?))
    })??;
    if live {
        eprintln!();
    }
    let to = args.to.clone().unwrap_or_else(|| args.trained.out.join("samples"));
    println!("{count} clips in {seconds:.2} s; {speed}");
    println!("{}", run::write_sample(&data, &config, &latents, &to)?.display());
    Ok(())
}

fn evaluate(args: &EvalArgs) -> anyhow::Result<()> {
    let (mut trained, data) = open(&args.trained, args.batch)?;
    let (model, config, attention, step) =
        (trained.model.clone(), trained.config.clone(), trained.attention.clone(), trained.step);
    let result = eval::with_averaged(&mut *trained.engine, &model, |engine| {
        eval::evaluate(engine, &model, &config, &data, &attention, step)
    })??;
    println!("validation loss {:.6} after {} steps, {} triples", result.mean(), step, result.triples.len());
    if let Some(path) = &args.json {
        let text = serde_json::to_vec_pretty(&result)?;
        std::fs::write(path, text).with_context(|| format!("cannot write {}", path.display()))?;
    }
    if let Some(path) = &args.against {
        let paired = result.paired(&read_eval(path)?)?;
        println!(
            "against {}: {:.6}; difference {:+.6} +- {:.6} (paired, standard error)",
            path.display(),
            paired.b,
            paired.difference,
            paired.standard_error
        );
    }
    Ok(())
}

fn measure_granularity(args: &GranularityArgs) -> anyhow::Result<()> {
    let (mut trained, data) = open(&args.trained, Some(1))?;
    let mut times = Times::default();
    match (&args.table, &args.gpu) {
        (Some(path), _) => times.read_table(path)?,
        (None, Some(label)) => {
            let gpu = planned(label, false)?;
            let table = gpu.dispatch_table().with_context(|| {
                format!("no dispatch table of {label} is committed\n  next: dsv-autotune on one, then --table FILE")
            })?;
            times.add_table("the committed dispatch table", table);
        }
        (None, None) => {
            if let Some(table) = trained.engine.dispatch_table() {
                times.add_table("the dispatch table of the GPU here", table);
            }
        }
    }
    for path in &args.record {
        times.read_records(path)?;
    }
    let mut lengths = if args.lengths.is_empty() {
        vec![trained.config.tokens(), 32_768, 131_072]
    } else {
        args.lengths.clone()
    };
    lengths.dedup();
    let options = granularity::Options {
        samples: args.samples as usize,
        groups: args.groups as usize,
        queries: args.queries as usize,
        cubes: args.cubes,
        mass: args.mass,
        lengths,
    };
    let found = granularity::measure(&mut trained, &data, &options, &times)?;
    let dir = args.to.as_ref().unwrap_or(&args.trained.out);
    let written = found.write(dir).with_context(|| format!("cannot write into {}", dir.display()))?;
    println!("{}", granularity::page::text(&found));
    written.iter().for_each(|path| println!("{}", path.display()));
    Ok(())
}

fn planned(label: &str, deterministic: bool) -> anyhow::Result<PlannedGpu> {
    let known = || PlannedGpu::known().join(", ");
    PlannedGpu::new(label, deterministic).with_context(|| {
        format!("--gpu {label} is not known\n  allowed: {}\n  next: dsv-train plan --gpu h100", known())
    })
}

fn read_eval(path: &Path) -> anyhow::Result<EvalResult> {
    let text = std::fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
    serde_json::from_slice(&text).with_context(|| {
        format!(
            "{} is no evaluation\n  next: dsv-train eval --out RUN --json {}",
            path.display(),
            path.display()
        )
    })
}

fn plan(args: &PlanArgs) -> anyhow::Result<()> {
    let config = args.config.load()?;
    let (name, plan) = match &args.gpu {
        Some(label) => {
            let gpu = planned(label, config.train.deterministic)?;
            (gpu.name(), dsv_train::plan::plan(&config, &gpu, args.gpus as usize))
        }
        None => {
            let engine = engine::open(&config.device, config.train.deterministic)?;
            (engine.name(), dsv_train::plan::plan(&config, &*engine, args.gpus as usize))
        }
    };
    let plan = plan.to_string();
    println!("# {name}");
    plan.lines().for_each(|line| println!("{}", format!("# {line}").trim_end()));
    println!();
    print!("{}", config.documented_toml());
    Ok(())
}

/// What one line of `bench` is about, and what came of it.
struct Measured {
    config: Config,
    time: Result<BlockTime, BenchError>,
    whole: Option<Result<bench::Spread, BenchError>>,
}

fn time_blocks(args: &BenchArgs) -> anyhow::Result<()> {
    let config = args.config.load()?;
    let some = |empty: bool, n: usize| if empty { 1 } else { n };
    let mut cases = Vec::new();
    for t in 0..some(args.tokens.is_empty(), args.tokens.len()) {
        for &attention in &args.attention {
            let lists = attention.predicts() || attention.window().is_some();
            let sizes = if lists { some(args.blocks.is_empty(), args.blocks.len()) } else { 1 };
            for b in 0..sizes {
                let tokens = args.tokens.get(t).copied();
                cases.push(bench::config_of(&config, tokens, attention, args.blocks.get(b).copied())?);
            }
        }
    }
    let open = || engine::open(&config.device, config.train.deterministic);
    let mut engine = open()?;
    let m = &config.model;
    let about = format!(
        "{}; preset {}: {} heads of {}, {} MLP of {} widths, {} text tokens; batch {}, graphs {}",
        engine.name(),
        config.preset,
        m.heads,
        m.head_dim,
        if m.mlp == config::Mlp::Geglu { "GeGLU" } else { "GELU" },
        m.mlp_ratio,
        m.text_tokens,
        config.data.batch_size,
        if config.device.graphs { "on" } else { "off" }
    );
    println!("{about}");
    let mut done = Vec::new();
    {
        let mut bench = Bench::new(&mut *engine, Duration::from_secs_f64(args.warm_up));
        for config in cases {
            let time = bench.block(&config, args.layers.into(), args.repeats.into());
            println!();
            match &time {
                Ok(time) => {
                    println!("{time}");
                    for op in time.ops.iter().filter(|_| args.ops) {
                        let rate = if op.flop > 0.0 && op.ms > 0.0 { op.flop / op.ms * 1e-9 } else { 0.0 };
                        println!("    {:>6.1} x {:<44} {:>9.4} ms {rate:>7.1} TF", op.calls, op.op, op.ms);
                    }
                }
                Err(e) => println!("{}: {e}", case_name(&config)),
            }
            done.push(Measured { config, time, whole: None });
            write_times(args, &about, &done)?;
        }
    }
    drop(engine);
    for i in 0..if args.whole { done.len() } else { 0 } {
        let whole = bench::whole_step(&done[i].config, open()?, args.repeats.into());
        let name = match &done[i].time {
            Ok(time) => format!("{} tokens, {}", time.tokens, time.label()),
            Err(_) => case_name(&done[i].config),
        };
        match &whole {
            Ok(step) => {
                let layers = done[i].config.model.layers as f64;
                let blocks = done[i].time.as_ref().map_or(f64::NAN, |t| layers * t.pass.median);
                println!(
                    "\n{name}: {:.1} ms a step ({:.1} to {:.1} in {} steps), {layers} layers alone {blocks:.1} ms: {:.3} times",
                    step.median,
                    step.min,
                    step.max,
                    step.runs,
                    step.median / blocks
                );
            }
            Err(e) => println!("\n{name}, a whole step: {e}"),
        }
        done[i].whole = Some(whole);
        write_times(args, &about, &done)?;
    }
    println!(
        "\n{:>8}  {:<36} {:>10} {:>9} {:>9} {:>9}",
        "tokens", "ms a layer", "all", "forward", "backward", "speed-up"
    );
    for m in &done {
        let Ok(time) = &m.time else { continue };
        let mut ok = done.iter().filter_map(|d| d.time.as_ref().ok());
        let full = ok.rfind(|t| t.tokens == time.tokens && t.attention == config::Attention::Full);
        let speed = full.map_or(String::new(), |full| format!("{:.2}", full.ms / time.ms));
        let (forward, backward) = (time.forward.median, time.backward.median);
        println!(
            "{:>8}  {:<36} {:>10.3} {forward:>9.3} {backward:>9.3} {speed:>9}",
            time.tokens,
            time.label(),
            time.ms
        );
    }
    let failed = done.iter().filter(|m| m.time.is_err() || matches!(m.whole, Some(Err(_)))).count();
    anyhow::ensure!(failed == 0, "{failed} of {} measurements failed, see above", done.len());
    Ok(())
}

fn case_name(config: &Config) -> String {
    format!("{} tokens, {}", config.tokens(), config.dsv.attention.name())
}

fn write_times(args: &BenchArgs, about: &str, done: &[Measured]) -> anyhow::Result<()> {
    let Some(path) = &args.json else { return Ok(()) };
    let cases: Vec<serde_json::Value> = done
        .iter()
        .map(|m| {
            let whole = m.whole.as_ref().map(|w| w.as_ref().map_err(|e| e.to_string()));
            serde_json::json!({
                "case": case_name(&m.config),
                "time": m.time.as_ref().ok(),
                "error": m.time.as_ref().err().map(|e| e.to_string()),
                "model_layers": m.config.model.layers,
                "whole_step": whole,
            })
        })
        .collect();
    let text = serde_json::to_vec_pretty(&serde_json::json!({ "about": about, "cases": cases }))?;
    std::fs::write(path, text).with_context(|| format!("cannot write {}", path.display()))
}

fn write_pass(args: &CrosscheckArgs) -> anyhow::Result<()> {
    let config = args.config.load()?;
    let mut engine = engine::open(&config.device, config.train.deterministic)?;
    let pass = crosscheck::pass(&config, &mut *engine)?;
    write_file(&RealDisk, &args.to, |f| tensors::write(f, &pass.tensors(), &pass.metadata))
        .with_context(|| format!("cannot write {}", args.to.display()))?;
    println!("{}", args.to.display());
    println!("next: python3 runtime/train/tests/crosscheck.py {}", args.to.display());
    Ok(())
}

fn write_report(runs: &[PathBuf], out: Option<PathBuf>) -> anyhow::Result<()> {
    let data = runs.iter().map(|dir| RunData::load(dir)).collect::<Result<Vec<_>, _>>()?;
    let page = out.unwrap_or_else(|| runs[0].join("report.html"));
    report::write(&page, &data).with_context(|| format!("cannot write {}", page.display()))?;
    println!("{}", page.display());
    Ok(())
}
