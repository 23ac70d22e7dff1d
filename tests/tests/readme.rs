//! README.md and CONTRIBUTING.md name what exists: every path in them, and the commands that CI runs.

use std::path::{Path, PathBuf};

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

fn read(path: &str) -> String {
    std::fs::read_to_string(root().join(path)).unwrap_or_else(|e| panic!("{path}: {e}"))
}

/// Top-level entries of the repository, as git would list them.
const TOP: [&str; 16] = [
    "codegen",
    "templates",
    "generated",
    "runtime",
    "autotune",
    "tests",
    ".ci",
    "Cargo.toml",
    "Cargo.lock",
    "README.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    "LICENSE-MIT",
    "LICENSE-APACHE",
    "rustfmt.toml",
    ".gitattributes",
];

/// Every path of the repository a text names, in prose, links and code alike. A placeholder (`<op>`, `*`, `NAME`) names
/// the folder it stands in.
fn paths(text: &str) -> Vec<String> {
    let separators = |c: char| c.is_whitespace() || "()[]{}\"'`|,;=".contains(c);
    let mut found = Vec::new();
    for word in text.split(separators) {
        let word = word.trim_start_matches("./").trim_end_matches(['.', ':', '!', '?']);
        let word = word.split(['#', ':']).next().unwrap_or(word);
        let first = word.split('/').next().unwrap_or(word);
        // A bare word such as "tests" is English; a folder is written with its slash.
        let is_path =
            TOP.contains(&first) && (word.contains('/') || first.contains('.') || first.contains('-'));
        if !is_path {
            continue;
        }
        let is_placeholder =
            |part: &&str| part.contains(['<', '>', '*', '$']) || part.contains("...") || *part == "NAME";
        let known: Vec<&str> = word.split('/').take_while(|part| !is_placeholder(part)).collect();
        found.push(known.join("/"));
    }
    found.sort();
    found.dedup();
    found
}

#[test]
fn every_path_exists() {
    for document in ["README.md", "CONTRIBUTING.md"] {
        let paths = paths(&read(document));
        assert!(paths.len() > 5, "{document} names {} paths: the test does not see them", paths.len());
        let missing: Vec<&String> = paths.iter().filter(|path| !root().join(path).exists()).collect();
        assert!(missing.is_empty(), "{document} names what does not exist: {missing:?}");
    }
}

#[test]
fn a_missing_path_is_noticed() {
    let text = "see [it](codegen/spec/src/nowhere.rs), `tests/cases/*.toml`, `templates/kernels/<op>.md` and ./tests/run.sh.";
    assert_eq!(
        paths(text),
        ["codegen/spec/src/nowhere.rs", "templates/kernels", "tests/cases", "tests/run.sh"]
    );
}

/// The commands for all tests and for the tiny model are the very ones CI runs.
#[test]
fn ci_runs_the_commands_of_the_readme() {
    let ci = read(".ci/run");
    let readme = read("README.md");
    for command in
        ["./tests/run.sh", "cargo run --release --bin dsv-train -- run --preset tiny --out target/tiny"]
    {
        assert!(ci.contains(command), ".ci/run does not run: {command}");
        assert!(readme.contains(command), "README.md does not name: {command}");
    }
}
