//! The committed tree is exact, and every text and error it can show is pinned.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use dsv_codegen::spec::{Arch, AttnOp, Dtype, KernelSpec, Lists, space};
use dsv_codegen::{COMMITTED_ARCHES, HEADERS, Tree, attention, committed_specs, render, source_hash};

/// The registry, included as dsv-runtime includes it.
mod registry {
    #![allow(dead_code, unreachable_pub)]
    include!(concat!(env!("CARGO_MANIFEST_DIR"), "/../generated/registry.rs"));
}

fn generated() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../generated")
}

/// The text without its banner and with its own name taken out: what two specs are compared by.
fn body(spec: &KernelSpec) -> String {
    let text = render(spec).unwrap_or_else(|e| panic!("{e}"));
    let (_, body) = text.split_once("\n\n").expect("a blank line ends the banner");
    body.replace(&spec.name(), "<name>")
}

#[test]
fn the_committed_tree_is_exact() {
    let tree = Tree::committed(&generated()).unwrap_or_else(|e| panic!("{e}"));
    tree.check(&generated()).unwrap_or_else(|e| panic!("{e}"));
}

#[test]
fn the_committed_tree_is_small() {
    let of_hopper = 105 + 15 * space::SHIPPED_HEAD_DIMS.len();
    for (arch, most) in [(Arch::Sm90a, of_hopper), (Arch::Sm80, 30)] {
        let of_arch = |spec: &&KernelSpec| spec.arch() == arch;
        let kernels = committed_specs(&generated()).unwrap().iter().filter(of_arch).count();
        assert!(kernels < most, "{kernels} committed kernels of {arch}: render rare ones on demand instead");
    }
}

#[test]
fn generating_takes_under_a_second() {
    let start = std::time::Instant::now();
    Tree::committed(&generated()).unwrap();
    assert!(start.elapsed().as_secs_f64() < 1.0, "{:?}", start.elapsed());
}

#[test]
fn the_registry_holds_every_kernel_sorted_with_its_hash() {
    let specs = committed_specs(&generated()).unwrap();
    let names: Vec<&str> = registry::KERNELS.iter().map(|kernel| kernel.name).collect();
    assert_eq!(names, specs.iter().map(KernelSpec::name).collect::<Vec<_>>());
    assert!(names.is_sorted(), "dsv-runtime searches by bisection");
    for (kernel, spec) in registry::KERNELS.iter().zip(&specs) {
        assert_eq!(kernel.source, render(spec).unwrap());
        assert_eq!(kernel.source_hash, source_hash(kernel.source), "{}", kernel.name);
    }
    assert_eq!(registry::HEADERS, HEADERS);
}

/// One whole kernel for each op and architecture, the first by name.
#[test]
fn one_kernel_of_each_op() {
    let mut first: BTreeMap<(&str, Arch), KernelSpec> = BTreeMap::new();
    for spec in committed_specs(&generated()).unwrap() {
        first.entry((spec.op(), spec.arch())).or_insert(spec);
    }
    for ((op, arch), spec) in first {
        insta::assert_snapshot!(format!("kernel_{op}_{arch}"), render(&spec).unwrap());
    }
}

#[test]
fn the_registry_as_text() {
    let specs: Vec<KernelSpec> =
        ["kv_validate_sm90a", "kv_invert_sm90a"].map(|name| name.parse().unwrap()).to_vec();
    let tree = Tree::of(&specs).unwrap();
    let (_, text) = tree.files().find(|(path, _)| *path == "registry.rs").unwrap();
    let mut text = text.to_owned();
    for spec in &specs {
        let hash = source_hash(&render(spec).unwrap());
        assert!(text.contains(&hash));
        text = text.replace(&hash, "<hash>");
    }
    insta::assert_snapshot!(text);
}

#[test]
fn a_tree_for_a_build_script_stands_alone() {
    let dir = tempfile::tempdir().unwrap();
    let lists = Lists::Blocks { query_group: 128, kv_block: 128 };
    let specs = attention(Dtype::Bf16, 128, lists, Arch::Sm90a).unwrap_or_else(|e| panic!("{e}"));
    let ops: BTreeSet<&str> = specs.iter().map(KernelSpec::op).collect();
    let expected = AttnOp::ALL.iter().filter(|&&op| op != AttnOp::BwdPostKv);
    assert_eq!(ops, expected.map(|op| op.name()).collect());
    let lists = Lists::Blocks { query_group: 128, kv_block: 8 };
    let gather = attention(Dtype::Bf16, 128, lists, Arch::Sm90a).unwrap_or_else(|e| panic!("{e}"));
    let ops: Vec<&str> = gather.iter().map(KernelSpec::op).collect();
    assert_eq!(ops, ["attn_bwd", "attn_bwd_post_kv", "attn_bwd_prep", "attn_fwd"]);
    let tree = Tree::of(&specs).unwrap();
    tree.write(dir.path()).unwrap();
    tree.check(dir.path()).unwrap();
    // Every path the registry includes is there, relative to it.
    let registry = fs::read_to_string(dir.path().join("registry.rs")).unwrap();
    let paths: Vec<&str> =
        registry.split("include_str!(").skip(1).map(|rest| rest.split('"').nth(1).unwrap()).collect();
    assert_eq!(paths.len(), specs.len() + HEADERS.len());
    for path in paths {
        assert!(dir.path().join(path).is_file(), "{path}");
    }
}

#[test]
fn writing_touches_only_what_differs() {
    let dir = tempfile::tempdir().unwrap();
    let specs: Vec<KernelSpec> =
        ["kv_validate_sm90a", "kv_invert_sm90a"].map(|name| name.parse().unwrap()).to_vec();
    let tree = Tree::of(&specs).unwrap();
    let all = tree.files().count();
    assert_eq!(tree.write(dir.path()).unwrap().written.len(), all);
    let again = tree.write(dir.path()).unwrap();
    assert_eq!((again.written.len(), again.unchanged, again.removed.len()), (0, all, 0));

    // A table is not the generator's to remove; a kernel without a spec is.
    fs::create_dir_all(dir.path().join("tables")).unwrap();
    fs::write(dir.path().join("tables/x.json"), "").unwrap();
    fs::write(dir.path().join("kernels/kv_invert/kv_invert_sm90a.cu"), "changed").unwrap();
    let less = Tree::of(&specs[1..]).unwrap().write(dir.path()).unwrap();
    assert_eq!(less.written, ["kernels/kv_invert/kv_invert_sm90a.cu", "registry.rs"]);
    assert_eq!(less.removed, ["kernels/kv_validate/kv_validate_sm90a.cu"]);
    assert!(dir.path().join("tables/x.json").is_file());
    assert!(!dir.path().join("kernels/kv_validate").exists(), "an empty folder is left");
}

#[test]
fn missing_extra_and_different_are_three_messages() {
    let dir = tempfile::tempdir().unwrap();
    let specs: Vec<KernelSpec> =
        ["kv_validate_sm90a", "kv_invert_sm90a"].map(|name| name.parse().unwrap()).to_vec();
    let tree = Tree::of(&specs).unwrap();
    tree.write(dir.path()).unwrap();
    fs::remove_file(dir.path().join("kernels/kv_validate/kv_validate_sm90a.cu")).unwrap();
    fs::write(dir.path().join("kernels/kv_invert/orphan.cu"), "").unwrap();
    let changed = dir.path().join("kernels/kv_invert/kv_invert_sm90a.cu");
    fs::write(&changed, fs::read_to_string(&changed).unwrap().replacen("do not edit", "edited", 1)).unwrap();
    let message = tree.check(dir.path()).unwrap_err().to_string();
    insta::assert_snapshot!("error_stale", message.replace(&dir.path().display().to_string(), "<DIR>"));
}

#[test]
fn errors_of_the_library() {
    let blocks = |query_group, kv_block| Lists::Blocks { query_group, kv_block };
    let no = |dtype, head_dim, lists, arch| attention(dtype, head_dim, lists, arch).unwrap_err();
    insta::assert_snapshot!("error_head_dim", no(Dtype::Bf16, 72, blocks(64, 64), Arch::Sm90a));
    insta::assert_snapshot!("error_block_size", no(Dtype::Bf16, 128, blocks(64, 128), Arch::Sm90a));
    insta::assert_snapshot!("error_gather_size", no(Dtype::Bf16, 128, blocks(256, 8), Arch::Sm90a));
    insta::assert_snapshot!("error_three_axes", no(Dtype::F16, 72, blocks(256, 16), Arch::Sm90a));
    insta::assert_snapshot!("error_head_dim_of_sm80", no(Dtype::Bf16, 96, blocks(64, 64), Arch::Sm80));

    let dir = tempfile::tempdir().unwrap();
    let hidden = |error: dsv_codegen::CodegenError| {
        error.to_string().replace(&dir.path().display().to_string(), "<DIR>")
    };
    fs::create_dir_all(dir.path().join("tables")).unwrap();
    fs::write(dir.path().join("tables/gpu.json"), "{\"meta\": 3}").unwrap();
    insta::assert_snapshot!("error_table", hidden(Tree::committed(dir.path()).unwrap_err()));
    fs::write(dir.path().join("kernels"), "a file where a folder should be").unwrap();
    let tree = Tree::of(&["kv_invert_sm90a".parse().unwrap()]).unwrap();
    insta::assert_snapshot!("error_write", hidden(tree.write(dir.path()).unwrap_err()));
}

/// dQ is always accumulated on sm80.
#[test]
fn sm80_has_all_of_attention_but_a_deterministic_backward() {
    for lists in space::shipped_lists() {
        let specs = attention(Dtype::Bf16, 128, lists, Arch::Sm80).unwrap_or_else(|e| panic!("{e}"));
        let ops: Vec<&str> = specs.iter().map(KernelSpec::op).collect();
        assert_eq!(ops, ["attn_bwd", "attn_bwd_post", "attn_bwd_prep", "attn_fwd"]);
    }
}

/// The user asks for kernels by dtype, head_dim and block size, and for lists by group rule: each of these that has
/// more than one shipped value changes the text all by itself.
#[test]
fn each_axis_earns_its_place() {
    /// A name's fields, with those of one axis taken out as its value.
    fn split<'a>(fields: &[&'a str], axis: &str) -> Option<(Vec<&'a str>, Vec<&'a str>)> {
        let is_axis = |field: &str| match axis {
            "dtype" => Dtype::from_name(field).is_some(),
            "head_dim" => field.strip_prefix('d').is_some_and(|n| n.parse::<u16>().is_ok()),
            // sp0 goes with dense, so it is part of the block size.
            "block size" => ["qg", "kb", "sp"].iter().any(|prefix| field.starts_with(prefix)),
            "group rule" => ["centre", "mean"].contains(&field),
            _ => unreachable!("{axis}"),
        };
        let (value, rest): (Vec<&str>, Vec<&str>) = fields.iter().partition(|field| is_axis(field));
        (!value.is_empty()).then_some((value, rest))
    }
    let specs: Vec<KernelSpec> = COMMITTED_ARCHES.iter().flat_map(|&arch| space::shipped(arch)).collect();
    for axis in ["dtype", "head_dim", "block size", "group rule"] {
        let mut values = BTreeSet::new();
        let mut by_rest: BTreeMap<(&str, String), Vec<&KernelSpec>> = BTreeMap::new();
        for spec in &specs {
            let name = spec.name();
            let fields: Vec<&str> = name.split('_').collect();
            if let Some((value, rest)) = split(&fields, axis) {
                values.insert((spec.op(), value.join("_")));
                by_rest.entry((spec.op(), rest.join("_"))).or_default().push(spec);
            }
        }
        let ops: BTreeSet<&str> = values.iter().map(|(op, _)| *op).collect();
        let several: Vec<&str> =
            ops.into_iter().filter(|op| values.iter().filter(|(o, _)| o == op).count() > 1).collect();
        for op in several {
            let earned = by_rest
                .iter()
                .filter(|((o, _), _)| *o == op)
                .any(|(_, alike)| alike.iter().any(|spec| body(spec) != body(alike[0])));
            assert!(earned, "{axis} has several shipped values for {op}, but changes no text by itself");
        }
    }
}

/// No two kernels of an op, shipped or tried by the tuner, are the same text under two names.
#[test]
fn every_spec_has_its_own_text() {
    let mut specs = committed_specs(&generated()).unwrap();
    let lists = || space::shipped_lists().chain(space::shipped_gather());
    for (&op, lists) in AttnOp::ALL.iter().flat_map(|op| lists().map(move |lists| (op, lists))) {
        for (dtype, head_dim) in [(Dtype::Bf16, 64), (Dtype::Bf16, 128), (Dtype::F16, 128)] {
            for &arch in Arch::ALL {
                specs.extend(
                    space::candidates(op, dtype, head_dim, lists, arch).into_iter().map(KernelSpec::Attn),
                );
            }
        }
    }
    specs.sort();
    specs.dedup();
    assert!(specs.len() > 40, "only {} candidates", specs.len());
    let mut seen: BTreeMap<String, String> = BTreeMap::new();
    for spec in specs {
        // A text that uses no instruction of its own is the same for every architecture.
        let key = format!("{} {}\n{}", spec.op(), spec.arch(), body(&spec));
        if let Some(twin) = seen.insert(key, spec.name()) {
            panic!("{} and {twin} are the same text", spec.name());
        }
    }
}

/// Rendered on demand: any candidate's text, with its name as the symbol.
#[test]
fn the_symbol_is_the_name() {
    for spec in committed_specs(&generated()).unwrap() {
        let text = render(&spec).unwrap();
        let name = spec.name();
        assert!(text.starts_with(&format!("// {name}\n")), "{name}");
        let kernel =
            text.split("extern \"C\" __global__").nth(1).unwrap_or_else(|| panic!("{name} has no kernel"));
        assert!(kernel.contains(&format!(" {name}(")), "{name} is not the symbol");
    }
}

fn command(arguments: &[&str]) -> (bool, String) {
    let out = Command::new(env!("CARGO_BIN_EXE_dsv-codegen")).args(arguments).output().unwrap();
    let text = if out.status.success() { out.stdout } else { out.stderr };
    (out.status.success(), String::from_utf8(text).unwrap())
}

#[test]
fn the_command_line() {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path().to_str().unwrap();
    let hidden = |text: String| text.replace(root, "<ROOT>");

    // On an empty checkout: check fails, generate writes, check passes, list and show agree with what was written.
    fs::create_dir(dir.path().join("generated")).unwrap();
    let (ok, message) = command(&["check", "--root", root]);
    assert!(!ok && message.contains("missing: registry.rs"), "{message}");
    let (ok, message) = command(&["--arch", "sm90", "--root", root]);
    assert!(ok, "{message}");
    let (ok, message) = command(&["check", "--root", root]);
    assert!(ok, "{message}");
    let (ok, names) = command(&["list", "--root", root]);
    assert!(ok);
    assert_eq!(names.lines().count(), committed_specs(&dir.path().join("generated")).unwrap().len());
    let name = names.lines().next().unwrap();
    let spec: KernelSpec = name.parse().unwrap();
    let (ok, text) = command(&["show", name]);
    assert!(ok);
    let written = dir.path().join(format!("generated/kernels/{}/{name}.cu", spec.op()));
    assert_eq!(text.trim_end(), fs::read_to_string(written).unwrap().trim_end());

    for (snapshot, arguments) in [
        ("cli_nothing", vec![]),
        ("cli_arch", vec!["--arch", "sm75"]),
        ("cli_show_grammar", vec!["show", "attn_fwd_v2"]),
        (
            "cli_show_infeasible",
            vec!["show", "attn_fwd_bf16_d72_qg64_kb64_spany_m64n64_g1c1s2x1_grid_det_sm90a"],
        ),
        ("cli_build_without_spills", vec!["build", "--out", "unused", "--root", root]),
    ] {
        let (ok, message) = command(&arguments);
        assert!(!ok, "{arguments:?} succeeded: {message}");
        insta::assert_snapshot!(snapshot, hidden(message));
    }
}
