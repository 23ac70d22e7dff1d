//! Rules that no single crate can check: who may depend on whom, and that specs, generated kernels and the registry
//! that the runtime carries are one thing.

use dsv_runtime::Registry;
use dsv_spec::{Arch, AttnOp, Deterministic, KernelSpec, space};
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

fn read(path: &str) -> String {
    let path = root().join(path);
    std::fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

/// Folder, and the crates of this workspace it may depend on. Nothing may depend on autotune, capi, train or tests.
const CRATES: [(&str, &[&str]); 10] = [
    ("codegen/spec", &[]),
    ("codegen/compile", &["dsv-spec"]),
    ("codegen", &["dsv-spec", "dsv-compile"]),
    ("runtime/reference", &["dsv-spec"]),
    ("runtime", &["dsv-spec", "dsv-compile"]),
    ("runtime/capi", &["dsv-spec", "dsv-runtime"]),
    ("runtime/train", &["dsv-spec", "dsv-reference", "dsv-runtime"]),
    ("autotune", &["dsv-spec", "dsv-codegen", "dsv-compile", "dsv-reference", "dsv-runtime"]),
    ("tests", &["dsv-spec", "dsv-codegen", "dsv-compile", "dsv-reference", "dsv-runtime"]),
    ("tests/emulator", &["dsv-spec", "dsv-codegen", "dsv-compile"]),
];

/// Crates that only some folders may use.
const RESERVED: [(&str, &[&str]); 8] = [
    ("tera", &["codegen"]),
    ("quote", &["codegen"]),
    ("syn", &["codegen"]),
    ("prettyplease", &["codegen"]),
    ("proc-macro2", &["codegen"]),
    ("cudarc", &["runtime", "runtime/train"]),
    ("gemm", &["runtime/reference"]),
    ("anyhow", &["codegen", "autotune", "runtime/train"]),
];

/// Every dependency of a crate, whatever its section: (name, its value).
fn dependencies(folder: &str) -> BTreeMap<String, toml::Value> {
    fn collect(table: &toml::Table, found: &mut BTreeMap<String, toml::Value>) {
        for (key, value) in table {
            let Some(inner) = value.as_table() else { continue };
            if key.ends_with("dependencies") {
                found.extend(inner.iter().map(|(name, value)| (name.clone(), value.clone())));
            } else if key == "target" || table.contains_key("target") || key.starts_with("cfg(") {
                collect(inner, found);
            }
        }
    }
    let manifest: toml::Table = read(&format!("{folder}/Cargo.toml")).parse().unwrap();
    let mut found = BTreeMap::new();
    collect(&manifest, &mut found);
    found
}

#[test]
fn crates_depend_downwards_only() {
    let workspace: toml::Table = read("Cargo.toml").parse().unwrap();
    let members: BTreeSet<&str> =
        workspace["workspace"]["members"].as_array().unwrap().iter().map(|m| m.as_str().unwrap()).collect();
    assert_eq!(members, CRATES.iter().map(|(folder, _)| *folder).collect(), "CRATES lists the members");
    let mut breaches = Vec::new();
    for (folder, allowed) in CRATES {
        let found = dependencies(folder);
        assert!(!found.is_empty(), "{folder}/Cargo.toml shows no dependency: the test does not see them");
        for name in found.keys() {
            if name.starts_with("dsv-") && !allowed.contains(&name.as_str()) {
                breaches.push(format!("{folder} depends on {name}; allowed: {allowed:?}"));
            }
            if let Some((_, folders)) = RESERVED.iter().find(|(reserved, _)| reserved == name)
                && !folders.contains(&folder)
            {
                breaches.push(format!("{folder} depends on {name}; allowed in {folders:?}"));
            }
        }
    }
    assert!(breaches.is_empty(), "{}", breaches.join("\n"));
}

#[test]
fn versions_stand_in_the_root_alone() {
    let mut breaches = Vec::new();
    for (folder, _) in CRATES {
        for (name, value) in dependencies(folder) {
            let from_workspace =
                value.as_table().and_then(|table| table.get("workspace")).and_then(toml::Value::as_bool);
            if from_workspace != Some(true) {
                breaches.push(format!("{folder}: {name} = {value}; allowed: {name}.workspace = true"));
            }
        }
    }
    assert!(breaches.is_empty(), "{}", breaches.join("\n"));
}

/// Files with an ending below a folder; not those of crates nested in it.
fn sources(folder: &Path, ending: &str, found: &mut Vec<PathBuf>) {
    for entry in std::fs::read_dir(folder).unwrap_or_else(|e| panic!("{}: {e}", folder.display())) {
        let path = entry.unwrap().path();
        if path.is_dir() {
            sources(&path, ending, found);
        } else if path.to_string_lossy().ends_with(ending) {
            found.push(path);
        }
    }
}

#[test]
fn libraries_have_typed_errors_and_say_what_they_own() {
    let mut breaches = Vec::new();
    for (folder, _) in CRATES {
        let lib = format!("{folder}/src/lib.rs");
        let text = read(&lib);
        let head: Vec<&str> = text.lines().take_while(|line| line.starts_with("//!")).collect();
        let head = head.join(" ");
        if !head.to_lowercase().contains("start ") {
            breaches
                .push(format!("{lib}: its head says what it owns, what it must never know, where to start"));
        }
        // anyhow is for programs: what a library's caller could match on is an enum.
        let mut files = Vec::new();
        sources(&root().join(folder).join("src"), ".rs", &mut files);
        for file in files {
            let name = file.strip_prefix(root()).unwrap_or(&file).display().to_string();
            let is_program = name.ends_with("main.rs") || folder == "autotune";
            if !is_program && std::fs::read_to_string(&file).unwrap().contains("anyhow::") {
                breaches.push(format!("{name} uses anyhow; allowed in programs"));
            }
            let stem = file.file_stem().unwrap_or_default().to_string_lossy().to_string();
            if ["utils", "util", "common", "misc", "helpers"].contains(&stem.as_str()) {
                breaches.push(format!("{name}: a module is named after what it owns"));
            }
        }
    }
    assert!(breaches.is_empty(), "{}", breaches.join("\n"));
}

#[test]
fn the_registry_is_what_the_specs_render() {
    let registry = Registry::committed();
    let wanted = dsv_codegen::committed_specs(&root().join("generated")).unwrap();
    let names: Vec<&str> = registry.kernels.iter().map(|kernel| kernel.name).collect();
    assert_eq!(names, wanted.iter().map(KernelSpec::name).collect::<Vec<_>>());
    assert_eq!(registry.headers, dsv_codegen::HEADERS, "headers of registry and generator");
    for kernel in registry.kernels {
        let spec: KernelSpec = kernel.name.parse().unwrap_or_else(|e| panic!("{e}"));
        let text = dsv_codegen::render(&spec).unwrap_or_else(|e| panic!("{e}"));
        assert!(
            kernel.source == text,
            "{}: registry and template differ; to generate: dsv-codegen --arch sm90",
            kernel.name
        );
        assert_eq!(kernel.source_hash, dsv_codegen::source_hash(&text), "{}", kernel.name);
    }
}

#[test]
fn launch_parameters_have_one_size() {
    for kernel in Registry::committed().kernels {
        let spec: KernelSpec = kernel.name.parse().unwrap();
        let size = spec.facts().params_bytes;
        assert!(
            kernel.source.contains(&format!("constexpr int kParamsBytes = {size};")),
            "{}: its text does not say the {size} bytes the host passes",
            kernel.name
        );
        assert!(
            kernel.source.contains("static_assert(sizeof(Params) == kParamsBytes"),
            "{}: its text does not check the size of Params",
            kernel.name
        );
        // The parameter space of a kernel is 4096 bytes on every driver; every struct here holds 8-byte addresses.
        assert!(size > 0 && size <= 4096 && size.is_multiple_of(8), "{}: {size} bytes", kernel.name);
    }
}

#[test]
fn every_shipped_problem_has_its_kernels() {
    let registry = Registry::committed();
    for &arch in &dsv_codegen::COMMITTED_ARCHES {
        // sm80 has fewer templates.
        let all = space::SHIPPED_HEAD_DIMS.to_vec();
        let head_dims = if arch == Arch::Sm80 { vec![64, 128] } else { all };
        for head_dim in head_dims {
            for dtype in space::SHIPPED_DTYPES {
                for lists in space::shipped_lists() {
                    for &form in Deterministic::ALL {
                        // sm80 has no deterministic backward.
                        if (arch, form) == (Arch::Sm80, Deterministic::Yes) {
                            continue;
                        }
                        for op in [AttnOp::Fwd, AttnOp::BwdPrep, AttnOp::Bwd, AttnOp::ending(lists, form)] {
                            let spec = space::default_attn(op, dtype, head_dim, lists, form, arch)
                                .unwrap_or_else(|| panic!("{op} {dtype} {head_dim} {lists:?} {form} {arch}"));
                            let name = KernelSpec::Attn(spec).name();
                            assert!(registry.kernel(&name).is_some(), "{name} is not committed");
                        }
                    }
                }
            }
        }
    }
}
