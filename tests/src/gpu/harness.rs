//! Runs the tests one after the other in a second process, so that a kernel that hangs or loses the GPU's context costs
//! its own test and no other.

use super::{Gpu, GpuTest, LIMIT, Outcome, compile_ahead, is_overdue, tests};
use dsv_spec::KernelSpec;
use libtest_mimic::{Arguments, Trial};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};
use std::io::{BufRead, BufReader, Write};
use std::process::{Child, ChildStdin, Command, ExitCode, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

/// Set for the process that runs tests.
const WORKER: &str = "DSV_GPU_TEST_WORKER";
/// Seconds a worker may take for one test, the start of its process and the oracle included. Kernels that hang are
/// noticed sooner, by the worker itself.
const PATIENCE: Duration = Duration::from_secs(300);
/// A file that gets one JSON line a test: name, whether it passed, seconds, comparison.
const LOG: &str = "DSV_GPU_TEST_LOG";
/// A file of names, one a line: the other tests are left out. How a run of part of the corpus is written down.
const ONLY: &str = "DSV_GPU_TEST_ONLY";
/// Set to run tests in this process, for compute-sanitizer and debuggers.
const IN_PROCESS: &str = "DSV_GPU_TEST_IN_PROCESS";

/// The test program: libtest's arguments (filters, `--exact`, `--skip`, `--list`), tests one at a time.
pub fn main() -> ExitCode {
    if std::env::var_os(WORKER).is_some() {
        return work();
    }
    let mut args = Arguments::from_args();
    args.test_threads = Some(1);
    let tests = match listed(tests()) {
        Ok(tests) => tests,
        Err(error) => {
            eprintln!("{error}");
            return ExitCode::FAILURE;
        }
    };
    let chosen: Vec<&GpuTest> = tests.iter().filter(|test| is_chosen(&args, &test.name)).collect();
    if !args.list && !chosen.is_empty() {
        let kernels: BTreeSet<KernelSpec> =
            chosen.iter().flat_map(|test| test.kernels.iter().copied()).collect();
        let kernels: Vec<KernelSpec> = kernels.into_iter().collect();
        let start = Instant::now();
        match compile_ahead(&kernels) {
            Ok(()) => {
                eprintln!("{} kernels compiled in {:.1} s", kernels.len(), start.elapsed().as_secs_f64())
            }
            Err(error) => eprintln!("kernels are not compiled ahead: {error}"),
        }
    }
    let runner = Arc::new(Mutex::new(Runner::default()));
    let trials = tests
        .into_iter()
        .map(|test| {
            let runner = runner.clone();
            let name = test.name.clone();
            Trial::test(name, move || {
                let mut runner = runner.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
                runner.run(&test).map_err(Into::into)
            })
        })
        .collect();
    libtest_mimic::run(&args, trials).exit_code()
}

/// The tests that [`ONLY`] names, or all without it. A name that is no test's is an error: the list has aged.
fn listed(tests: Vec<GpuTest>) -> Result<Vec<GpuTest>, String> {
    let Some(path) = std::env::var_os(ONLY) else { return Ok(tests) };
    let path = std::path::PathBuf::from(path);
    let text =
        std::fs::read_to_string(&path).map_err(|error| format!("{ONLY}: {}: {error}", path.display()))?;
    let mut names: BTreeSet<&str> = text.lines().filter(|line| !line.is_empty()).collect();
    let tests: Vec<GpuTest> = tests.into_iter().filter(|test| names.remove(test.name.as_str())).collect();
    match names.first() {
        None => Ok(tests),
        Some(name) => Err(format!("{ONLY}: {}: no test is called {name}; names: --list", path.display())),
    }
}

/// libtest's rule.
fn is_chosen(args: &Arguments, name: &str) -> bool {
    let matches = |filter: &String| if args.exact { name == filter } else { name.contains(filter.as_str()) };
    args.filter.as_ref().is_none_or(matches) && !args.skip.iter().any(matches)
}

/// What the worker answers.
#[derive(Serialize, Deserialize)]
struct Answer {
    name: String,
    passed: bool,
    seconds: f64,
    text: String,
    /// Whether the worker can go on.
    usable: bool,
    /// Whether a kernel did not end.
    hung: bool,
}

fn answer(gpu: &mut Gpu, test: &GpuTest) -> Answer {
    let start = Instant::now();
    let outcome: Outcome = (test.run)(gpu);
    // A fault that a later call would only show then: wait for it here.
    let usable = gpu.runtime.device().synchronize();
    let (passed, text) = match (outcome, &usable) {
        (Ok(text), Ok(())) => (true, text),
        (Ok(_), Err(error)) => (false, error.to_string()),
        (Err(error), _) => (false, error.to_string()),
    };
    Answer {
        name: test.name.clone(),
        passed,
        seconds: start.elapsed().as_secs_f64(),
        text,
        usable: usable.is_ok(),
        hung: false,
    }
}

/// Writes an answer to standard output.
fn say(answer: &Answer) {
    println!("{}", serde_json::to_string(answer).unwrap_or_default());
}

/// The test this process runs.
static RUNNING: Mutex<String> = Mutex::new(String::new());

/// Ends this process, with an answer, when what it waits for is overdue: a kernel that hangs cannot be stopped.
fn watch() {
    loop {
        std::thread::sleep(Duration::from_millis(50));
        if is_overdue() {
            let name = RUNNING.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).clone();
            let text = format!("a kernel does not end ({LIMIT} sets the seconds it may take)");
            say(&Answer { name, passed: false, seconds: 0.0, text, usable: false, hung: true });
            let _ = std::io::stdout().flush();
            std::process::abort();
        }
    }
}

/// Reads names from standard input, one a line, and answers each with a line of JSON.
fn work() -> ExitCode {
    let tests: BTreeMap<String, GpuTest> =
        tests().into_iter().map(|test| (test.name.clone(), test)).collect();
    let mut gpu = Gpu::open();
    std::thread::spawn(watch);
    for name in std::io::stdin().lock().lines() {
        let Some(test) = name.ok().and_then(|name| tests.get(&name)) else { return ExitCode::FAILURE };
        *RUNNING.lock().unwrap_or_else(|poisoned| poisoned.into_inner()) = test.name.clone();
        let answer = match &mut gpu {
            Ok(gpu) => answer(gpu, test),
            Err(error) => Answer {
                name: test.name.clone(),
                passed: false,
                seconds: 0.0,
                text: error.to_string(),
                usable: true,
                hung: false,
            },
        };
        say(&answer);
        if !answer.usable {
            // The context is lost; do not wait for what its destructors would say.
            std::process::abort();
        }
    }
    ExitCode::SUCCESS
}

struct Worker {
    child: Child,
    names: ChildStdin,
    answers: Receiver<String>,
}

impl Worker {
    fn start() -> std::io::Result<Worker> {
        let mut child = Command::new(std::env::current_exe()?)
            .env(WORKER, "1")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()?;
        let (Some(names), Some(output)) = (child.stdin.take(), child.stdout.take()) else {
            return Err(std::io::Error::other("a worker without pipes"));
        };
        let (sender, answers) = channel();
        std::thread::spawn(move || {
            for line in BufReader::new(output).lines().map_while(Result::ok) {
                if sender.send(line).is_err() {
                    return;
                }
            }
        });
        Ok(Worker { child, names, answers })
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        // A worker that hangs in a kernel does not see its input end.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[derive(Default)]
struct Runner {
    worker: Option<Worker>,
    local: Option<Gpu>,
    /// Kernels (the last part of a test's name) that did not end, by the test that found it.
    hung: BTreeMap<String, String>,
}

impl Runner {
    fn run(&mut self, test: &GpuTest) -> Result<(), String> {
        *RUNNING.lock().unwrap_or_else(|poisoned| poisoned.into_inner()) = test.name.clone();
        let answer = if std::env::var_os(IN_PROCESS).is_some() {
            self.run_here(test)?
        } else {
            self.run_in_worker(&test.name)
        };
        log(&answer);
        if answer.passed { Ok(()) } else { Err(answer.text) }
    }

    fn run_here(&mut self, test: &GpuTest) -> Result<Answer, String> {
        if self.local.is_none() {
            self.local = Some(Gpu::open().map_err(|error| error.to_string())?);
            std::thread::spawn(watch);
        }
        match &mut self.local {
            Some(gpu) => Ok(answer(gpu, test)),
            None => Err("no GPU".to_string()),
        }
    }

    fn run_in_worker(&mut self, name: &str) -> Answer {
        let start = Instant::now();
        let failed = |text: String, usable| Answer {
            name: name.to_string(),
            passed: false,
            seconds: start.elapsed().as_secs_f64(),
            text,
            usable,
            hung: false,
        };
        let kernel = name.rsplit('/').next().unwrap_or(name);
        if let Some(by) = self.hung.get(kernel) {
            return failed(format!("not run: this kernel did not end in {by}"), true);
        }
        let answer = self.ask(name).unwrap_or_else(|text| failed(text, false));
        if !answer.usable {
            self.worker = None;
        }
        if answer.hung {
            self.hung.insert(kernel.to_string(), name.to_string());
        }
        answer
    }

    fn ask(&mut self, name: &str) -> Result<Answer, String> {
        if self.worker.is_none() {
            self.worker =
                Some(Worker::start().map_err(|error| format!("the worker does not start: {error}"))?);
        }
        let worker = self.worker.as_mut().ok_or("a worker was started above")?;
        // A worker that has died is noticed by the answer that does not come.
        let _ = writeln!(worker.names, "{name}").and_then(|()| worker.names.flush());
        match worker.answers.recv_timeout(PATIENCE) {
            Ok(line) => serde_json::from_str(&line).map_err(|error| format!("{error} in the answer {line}")),
            Err(std::sync::mpsc::RecvTimeoutError::Timeout) => {
                Err(format!("no answer within {} s", PATIENCE.as_secs()))
            }
            Err(std::sync::mpsc::RecvTimeoutError::Disconnected) => {
                let status = worker.child.wait().map_or_else(|e| e.to_string(), |status| status.to_string());
                Err(format!("the worker ended ({status}); what it said is above"))
            }
        }
    }
}

fn log(answer: &Answer) {
    let Some(path) = std::env::var_os(LOG) else { return };
    let file = std::fs::OpenOptions::new().create(true).append(true).open(&path);
    let line = serde_json::to_string(answer).unwrap_or_default();
    if let Err(error) = file.and_then(|mut file| writeln!(file, "{line}")) {
        eprintln!("{}: {error}", path.display());
    }
}
