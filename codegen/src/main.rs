//! `dsv-codegen`: writes, checks, lists and shows the generated kernels, and builds the offline bundle.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::{Parser, Subcommand};
use dsv_codegen::spec::{Arch, KernelSpec};
use dsv_codegen::{COMMITTED_ARCHES, CodegenError, Tree, build_bundle, committed_specs, render};
use dsv_compile::{Compiler, SpillList, fetch_nvrtc};

/// From kernel specs to CUDA text. Without a command: writes generated/.
#[derive(Parser)]
#[command(name = "dsv-codegen", version)]
struct Cli {
    /// Write generated/, in which this architecture has kernels: sm90 (which means sm90a) or sm80. All are written.
    #[arg(long)]
    arch: Option<String>,
    /// The checkout; by default the one this program was built from, else the current directory.
    #[arg(long, global = true)]
    root: Option<PathBuf>,
    #[command(subcommand)]
    command: Option<Command>,
}

#[derive(Subcommand)]
enum Command {
    /// Compare generated/ with the specs and templates; fails on any missing, extra or different file.
    Check,
    /// List the committed kernels.
    List,
    /// Print the CUDA text of any feasible kernel.
    Show {
        /// The kernel's name.
        name: String,
    },
    /// Compile the committed kernels into an offline bundle: cubins and manifest.json.
    Build {
        /// The bundle's directory.
        #[arg(long)]
        out: PathBuf,
        /// Compiler threads.
        #[arg(long, default_value_t = std::thread::available_parallelism().map_or(1, |n| n.get()))]
        threads: usize,
    },
    /// Fetch NVRTC and nvdisasm (Python wheels) into .cuda of the checkout, where they are missing.
    FetchNvrtc,
}

fn main() -> ExitCode {
    match run(Cli::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{error}");
            ExitCode::FAILURE
        }
    }
}

fn root(given: Option<PathBuf>) -> PathBuf {
    let built_from =
        Path::new(env!("CARGO_MANIFEST_DIR")).parent().filter(|dir| dir.join("generated").is_dir());
    given.unwrap_or_else(|| built_from.unwrap_or(Path::new(".")).to_path_buf())
}

fn run(cli: Cli) -> anyhow::Result<()> {
    if let (Some(_), Some(arch)) = (&cli.command, &cli.arch) {
        anyhow::bail!(
            "--arch {arch} writes generated/ and goes with no command\n  to write: dsv-codegen --arch {arch}\n  else: check, list, show NAME, build --out DIR, fetch-nvrtc, without --arch"
        );
    }
    let root = root(cli.root);
    let generated = root.join("generated");
    // A reader that stops early (head) is no error.
    let print = |text: String| drop(writeln!(std::io::stdout(), "{text}"));
    match cli.command {
        None => {
            let Some(asked) = cli.arch else {
                anyhow::bail!(
                    "nothing asked\n  to write generated/: dsv-codegen --arch sm90\n  else: check, list, show NAME, build --out DIR, fetch-nvrtc"
                );
            };
            if !Arch::from_name(&asked).is_some_and(|arch| COMMITTED_ARCHES.contains(&arch)) {
                let available = COMMITTED_ARCHES.map(|arch| arch.to_string()).to_vec();
                return Err(CodegenError::Arch { arch: asked, available }.into());
            }
            let done = Tree::committed(&generated)?.write(&generated)?;
            for path in &done.written {
                print(format!("wrote {path}"));
            }
            for path in &done.removed {
                print(format!("removed {path}"));
            }
            print(format!(
                "{}: {} written, {} unchanged, {} removed",
                generated.display(),
                done.written.len(),
                done.unchanged,
                done.removed.len()
            ));
        }
        Some(Command::Check) => {
            let tree = Tree::committed(&generated)?;
            tree.check(&generated)?;
            print(format!("{}: {} files, all as the specs say", generated.display(), tree.files().count()));
        }
        Some(Command::List) => {
            for spec in committed_specs(&generated)? {
                print(spec.name());
            }
        }
        Some(Command::Show { name }) => {
            let spec: KernelSpec = name.parse()?;
            print(render(&spec)?.trim_end().to_owned());
        }
        Some(Command::Build { out, threads }) => {
            let specs = committed_specs(&generated)?;
            let path = root.join("codegen/spills.txt");
            let text =
                std::fs::read_to_string(&path).map_err(|why| CodegenError::Io { what: "read", path, why })?;
            let compiler = Compiler::new()?;
            build_bundle(&specs, &compiler, &SpillList::parse(&text)?, threads, &out, |name| {
                print(format!("compiled {name}"));
            })?;
            print(format!("{}: {} kernels, NVRTC {}", out.display(), specs.len(), compiler.version()));
        }
        Some(Command::FetchNvrtc) => print(fetch_nvrtc(&root)?.display().to_string()),
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn root_is_taken_before_and_after_the_command() {
        for words in [["dsv-codegen", "--root", "x", "check"], ["dsv-codegen", "check", "--root", "x"]] {
            let cli = Cli::try_parse_from(words).unwrap();
            assert!(cli.root == Some("x".into()) && matches!(cli.command, Some(Command::Check)), "{words:?}");
        }
        let cli = Cli::try_parse_from(["dsv-codegen", "--root", "x", "--arch", "sm90"]).unwrap();
        assert!(cli.root == Some("x".into()) && cli.arch == Some("sm90".into()) && cli.command.is_none());
    }

    #[test]
    fn an_arch_with_a_command_is_refused_with_both_ways_on() {
        let cli = Cli::try_parse_from(["dsv-codegen", "--arch", "sm90", "check"]).unwrap();
        let error = run(cli).unwrap_err().to_string();
        assert!(
            error.contains("goes with no command") && error.contains("dsv-codegen --arch sm90"),
            "{error}"
        );
    }
}
