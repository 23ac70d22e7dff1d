//! Lists the templates and device headers, so that adding one is adding a file. Reads nothing but `templates/`.

use std::fmt::Write;
use std::path::{Path, PathBuf};
use std::{env, fs};

/// (name, path) of every file with an ending right in a folder, sorted by name.
fn files(folder: &Path, ending: &str) -> Vec<(String, PathBuf)> {
    println!("cargo::rerun-if-changed={}", folder.display());
    let entries = fs::read_dir(folder).unwrap_or_else(|e| panic!("{}: {e}", folder.display()));
    let mut files: Vec<(String, PathBuf)> = entries
        .map(|entry| entry.expect("a directory that opens lists its entries").path())
        .filter_map(|path| Some((path.file_name()?.to_str()?.strip_suffix(ending)?.to_owned(), path.clone())))
        .collect();
    files.sort();
    files
}

fn main() {
    let templates =
        Path::new(&env::var_os("CARGO_MANIFEST_DIR").expect("cargo sets it")).join("../templates");
    let mut text = String::from(
        "/// (name, text) of every template, sorted.\npub(crate) static KERNELS: &[(&str, &str)] = &[\n",
    );
    for (op, path) in files(&templates.join("kernels"), ".cu.tera") {
        writeln!(text, "    ({op:?}, include_str!({path:?})),").expect("a string takes any text");
    }
    text += "];\n\n/// (`dsv/xxx.cuh`, text) of every device header, sorted, those of some kernels alone in a folder (`dsv/sm80/xxx.cuh`):\n\
             /// given to NVRTC by name beside any source; see [`source_hash`] for what a text is hashed with.\n\
             pub static HEADERS: &[(&str, &str)] = &[\n";
    let include = templates.join("include/dsv");
    let mut headers: Vec<(String, PathBuf)> = ["", "gather/", "persistent/", "select/", "sm80/"]
        .iter()
        .flat_map(|folder| {
            let named = |(name, path)| (format!("dsv/{folder}{name}.cuh"), path);
            files(&include.join(folder), ".cuh").into_iter().map(named).collect::<Vec<_>>()
        })
        .collect();
    headers.sort();
    for (name, path) in headers {
        writeln!(text, "    ({name:?}, include_str!({path:?})),").expect("a string takes any text");
    }
    text += "];\n";
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets it")).join("templates.rs");
    fs::write(&out, text).unwrap_or_else(|e| panic!("{}: {e}", out.display()));
}
