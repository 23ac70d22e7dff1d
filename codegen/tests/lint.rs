//! What can be checked of how a template reads: the rules of the house style, one test each.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use dsv_codegen::spec::{Arch, AttnOp, Dtype, KernelSpec, space};
use dsv_codegen::{COMMITTED_ARCHES, HEADERS, template_name, template_path};

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().to_path_buf()
}

/// File names with an extension in a folder of templates.
fn names(folder: &str, extension: &str) -> BTreeSet<String> {
    fs::read_dir(root().join("templates").join(folder))
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .filter_map(|name| name.strip_suffix(extension).map(str::to_owned))
        .collect()
}

/// (op, text) of every template.
fn templates() -> Vec<(String, String)> {
    let ops = names("kernels", ".cu.tera");
    assert!(!ops.is_empty());
    ops.into_iter()
        .map(|op| {
            let text = fs::read_to_string(root().join(template_path(&op))).unwrap();
            (op, text)
        })
        .collect()
}

/// Collects every breach before it fails.
fn no_breach(breaches: Vec<String>) {
    assert!(breaches.is_empty(), "\n{}", breaches.join("\n"));
}

/// 1-based lines with their text.
fn lines(text: &str) -> impl Iterator<Item = (usize, &str)> {
    text.lines().enumerate().map(|(i, line)| (i + 1, line))
}

/// Line of the first occurrence.
fn line_of(text: &str, what: &str) -> Option<usize> {
    lines(text).find(|(_, line)| line.contains(what)).map(|(n, _)| n)
}

/// A template is of a kernel that ships, or of one that the tuner tries for a shipped size.
#[test]
fn every_shipped_op_has_a_template_and_every_template_an_op() {
    let shipped = COMMITTED_ARCHES.iter().flat_map(|&arch| space::shipped(arch));
    let tried = space::SHIPPED_HEAD_DIMS.into_iter().flat_map(|head_dim| {
        let ops = [AttnOp::Fwd, AttnOp::BwdDq].into_iter();
        ops.flat_map(move |op| space::shipped_lists().map(move |lists| (op, lists)))
            .flat_map(move |(op, lists)| space::candidates(op, Dtype::Bf16, head_dim, lists, Arch::Sm90a))
    });
    let named: BTreeSet<String> =
        shipped.chain(tried.map(KernelSpec::Attn)).map(|spec| template_name(&spec).to_owned()).collect();
    assert_eq!(names("kernels", ".cu.tera"), named);
}

/// What was tried and measured, in `<op>.md`; the list kernels share `kv.md`, the trainer's small ones `pointwise.md`.
#[test]
fn notes_lie_beside_each_template() {
    let notes = names("kernels", ".md");
    let without: BTreeSet<&str> = space::shipped(Arch::Sm90a)
        .iter()
        .filter(|spec| {
            let family = match spec {
                KernelSpec::Attn(_) => spec.op(),
                KernelSpec::Select(_) | KernelSpec::List(_) => "kv",
                KernelSpec::Pointwise(_) => "pointwise",
            };
            !notes.contains(spec.op()) && !notes.contains(family)
        })
        .map(KernelSpec::op)
        .collect();
    assert!(without.is_empty(), "no notes beside the templates of {without:?}");
}

#[test]
fn the_file_order() {
    let mut breaches = Vec::new();
    for (op, text) in templates() {
        let mut breach = |what: String| breaches.push(format!("{op}: {what}"));
        for once in ["// BEGIN CONFIG", "// END CONFIG", "struct Params {"] {
            if text.matches(once).count() != 1 {
                breach(format!("\"{once}\" must occur once"));
            }
        }
        let place = |what: &str| line_of(&text, what).unwrap_or(usize::MAX);
        let last_include = lines(&text).filter(|(_, l)| l.starts_with("#include")).map(|(n, _)| n).last();
        let order = [
            ("maths", 1),
            ("first include", place("#include")),
            ("last include", last_include.unwrap_or(usize::MAX)),
            ("BEGIN CONFIG", place("// BEGIN CONFIG")),
            ("END CONFIG", place("// END CONFIG")),
            ("struct Params", place("struct Params {")),
            (
                "struct SharedStorage",
                line_of(&text, "struct SharedStorage {").unwrap_or(place("struct Params {") + 1),
            ),
            ("the kernel", place("extern \"C\" __global__")),
        ];
        for pair in order.windows(2) {
            if pair[0].1 > pair[1].1 {
                breach(format!("{} (line {}) stands before {}", pair[1].0, pair[1].1, pair[0].0));
            }
        }
        let maths = text.lines().take_while(|line| line.starts_with("//")).count();
        if !(1..=12).contains(&maths) {
            breach(format!(
                "{maths} lines of maths, floors and budget before the includes; 1 to 12 are allowed"
            ));
        }
        if !text.contains("static_assert(sizeof(Params) == kParamsBytes") {
            breach("no static_assert that Params has the host's size".into());
        }
        let shared = text.contains("struct SharedStorage {");
        if shared && text.contains("kSmemBytes") && !text.contains("static_assert(sizeof(SharedStorage)") {
            breach("no static_assert on the size of SharedStorage".into());
        }
    }
    no_breach(breaches);
}

#[test]
fn pointers_of_params_carry_their_shape() {
    let mut breaches = Vec::new();
    for (op, text) in templates() {
        let params = text
            .split("struct Params {")
            .nth(1)
            .and_then(|rest| rest.split("\n};").next())
            .unwrap_or_default();
        for line in params
            .lines()
            .filter(|line| line.contains("* ") || line.contains("TensorMap ") || line.contains("TensorView "))
        {
            let comment = line.split_once("//").map(|(_, comment)| comment).unwrap_or_default();
            if !comment.contains('[') && !comment.contains(" like ") {
                breaches.push(format!("{op}: no shape in \"{}\"", line.trim()));
            }
        }
    }
    no_breach(breaches);
}

#[test]
fn substitutions_stand_in_config_and_in_the_kernels_name() {
    let mut breaches = Vec::new();
    for (op, text) in templates() {
        let config =
            line_of(&text, "// BEGIN CONFIG").unwrap_or(0)..line_of(&text, "// END CONFIG").unwrap_or(0);
        for (n, line) in lines(&text) {
            for tag in line.split("<{").skip(1).map(|rest| rest.split("}>").next().unwrap_or_default()) {
                let name = tag.strip_prefix(' ').and_then(|tag| tag.strip_suffix(' ')).unwrap_or_default();
                if name.is_empty()
                    || !name.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'_')
                {
                    breaches.push(format!("{op}:{n}: <{{{tag}}}> is more than a variable"));
                }
                let is_symbol = name == "name" && line.contains("__global__");
                if !config.contains(&n) && !is_symbol {
                    breaches.push(format!("{op}:{n}: <{{{tag}}}> outside CONFIG and the kernel's name"));
                }
            }
        }
    }
    no_breach(breaches);
}

#[test]
fn branches_are_the_only_tera_statements() {
    let mut breaches = Vec::new();
    for (op, text) in templates() {
        for (n, line) in lines(&text) {
            for tag in line.split("<%").skip(1).map(|rest| rest.trim_start_matches(['-', ' '])) {
                if !["if ", "elif ", "else", "endif"].iter().any(|word| tag.starts_with(word)) {
                    breaches.push(format!("{op}:{n}: {}", line.trim()));
                }
            }
        }
    }
    no_breach(breaches);
}

#[test]
fn constants_are_k_camel() {
    let mut breaches = Vec::new();
    for (op, text) in templates() {
        for (n, line) in lines(&text).filter(|(_, line)| line.starts_with("constexpr ")) {
            let name = line.split('=').next().unwrap_or_default().split('[').next().unwrap_or_default();
            let name = name.split_whitespace().last().unwrap_or_default();
            let camel = name.strip_prefix('k').is_some_and(|rest| {
                rest.starts_with(|c: char| c.is_ascii_uppercase())
                    && rest.bytes().all(|b| b.is_ascii_alphanumeric())
            });
            if line.contains('=') && !camel {
                breaches.push(format!("{op}:{n}: {name} is not kCamel"));
            }
        }
    }
    no_breach(breaches);
}

/// Templates and headers alike.
#[test]
fn no_macros_no_foreign_includes_no_leftovers() {
    let mut breaches = Vec::new();
    let headers = HEADERS.iter().map(|(name, text)| ((*name).to_owned(), (*text).to_owned()));
    for (file, text) in templates().into_iter().chain(headers) {
        for (n, line) in lines(&text) {
            let trimmed = line.trim_start();
            if trimmed.starts_with("#define") || trimmed.starts_with("#if") {
                breaches.push(format!("{file}:{n}: a macro: {trimmed}"));
            }
            if trimmed.starts_with("#include") && !trimmed.starts_with("#include \"dsv/") {
                breaches.push(format!("{file}:{n}: includes something else than dsv/: {trimmed}"));
            }
            if trimmed.starts_with("typedef ") {
                breaches.push(format!("{file}:{n}: write using, not typedef"));
            }
            if ["TODO", "FIXME", "XXX"].iter().any(|word| line.contains(word)) {
                breaches.push(format!("{file}:{n}: {trimmed}"));
            }
            if line.ends_with(' ') || line.contains('\t') || line.chars().count() > 132 {
                breaches.push(format!("{file}:{n}: trailing blank, tab, or over 132 columns"));
            }
        }
    }
    no_breach(breaches);
}

#[test]
fn headers_guard_themselves_and_stay_in_their_namespace() {
    let mut breaches = Vec::new();
    for (name, text) in HEADERS {
        if text.matches("#pragma once").count() != 1 {
            breaches.push(format!("{name}: no #pragma once"));
        }
        if !text.contains("namespace dsv {") {
            breaches.push(format!("{name}: not in namespace dsv"));
        }
        if ["<{", "<%", "<#"].iter().any(|tag| text.contains(tag)) {
            breaches.push(format!("{name}: a header is not a template"));
        }
    }
    no_breach(breaches);
}
