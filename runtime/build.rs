//! Lists the committed dispatch tables, so that a new one is part of the program without another edit.

use std::fmt::Write;
use std::path::Path;

fn main() {
    let manifest_dir = std::env::var("CARGO_MANIFEST_DIR").expect("cargo sets it for build scripts");
    let out_dir = std::env::var("OUT_DIR").expect("cargo sets it for build scripts");
    let tables = Path::new(&manifest_dir).join("../generated/tables");
    println!("cargo::rerun-if-changed={}", tables.display());
    println!("cargo::rerun-if-changed=build.rs");
    let mut files: Vec<String> = std::fs::read_dir(&tables)
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|entry| entry.file_name().into_string().ok())
        .filter(|name| name.ends_with(".json"))
        .collect();
    files.sort();
    let mut text = String::from(
        "/// Every committed dispatch table as (file name, JSON), sorted.\n\
         pub static TABLES: &[(&str, &str)] = &[\n",
    );
    for file in files {
        let path = tables.join(&file);
        writeln!(text, "    ({file:?}, include_str!({:?})),", path.display().to_string())
            .expect("writing to a string does not fail");
    }
    text += "];\n";
    std::fs::write(Path::new(&out_dir).join("tables.rs"), text).expect("OUT_DIR is writable");
}
