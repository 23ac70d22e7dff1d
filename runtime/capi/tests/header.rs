//! `dsv.h` against the library: sizes and places of every field, and every function it names.

use dsv::*;
use std::mem::offset_of;
use std::path::{Path, PathBuf};
use std::process::Command;

fn header() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("include")
}

/// The C name of a structure, its bytes, and its fields with their places.
type Structure = (&'static str, usize, Vec<(&'static str, usize)>);

macro_rules! structure {
    ($c:literal, $rust:ident: $($field:ident),+) => {
        ($c, size_of::<$rust>(), vec![$((stringify!($field), offset_of!($rust, $field))),+])
    };
}

fn structures() -> Vec<Structure> {
    vec![
        structure!("dsv_options", COptions: abi_version, device, bundle, table, notice, notice_data),
        structure!("dsv_strides", CStrides: batch, seq, head),
        structure!("dsv_problem", CProblem: dtype, head_dim, query_group, kv_block, batch, num_heads, num_kv_heads, seqlen_q,
            seqlen_kv, max_selected, backward, deterministic, scale),
        structure!("dsv_layouts", CLayouts: q, k, v, out, d_out, dq, dk, dv),
        structure!("dsv_attention_facts", CAttentionFacts: workspace_bytes, num_groups, num_kv_blocks, needs_query_lists,
            needs_key_lists),
        structure!("dsv_forward_args", CForward: q, k, v, out, lse, q2k_index, q2k_count, error_flag),
        structure!("dsv_backward_args", CBackward: q, k, v, out, lse, d_out, d_lse, dq, dk, dv, q2k_index, q2k_count, k2q_offset,
            k2q_index, workspace, error_flag),
        structure!("dsv_selection_problem", CSelectionProblem: rank, query_group, kv_block, group_rule, budget, keep_first,
            keep_own, batch, num_heads, seqlen_q, seqlen_kv, max_selected, scale),
        structure!("dsv_selection_args", CSelect: q_lr, k_lr, budget, keep_mask, q2k_index, q2k_count, error_flag),
        structure!("dsv_lists_shape", CListShape: batch, num_heads, num_groups, num_kv_blocks, max_selected),
    ]
}

fn compile(dir: &Path, source: &str, arguments: &[&str]) -> PathBuf {
    let (from, to) = (dir.join("test.c"), dir.join("test.o"));
    std::fs::write(&from, source).unwrap();
    let output = Command::new("cc")
        .args(["-std=c99", "-Wall", "-Wextra", "-Werror", "-pedantic", "-c", "-I"])
        .arg(header())
        .args(arguments)
        .arg(&from)
        .arg("-o")
        .arg(&to)
        .output()
        .expect("cc, which links Rust programs too, is on this machine");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    to
}

#[test]
fn structures_are_the_headers() {
    let mut source = String::from("#include \"dsv.h\"\n");
    // A size that is not right is an array of -1 elements: C99 has no static assertion.
    let mut wants = |name: String, what: String, bytes: usize| {
        source += &format!("typedef char {name}[({what}) == {bytes} ? 1 : -1];\n");
    };
    for (c, bytes, fields) in structures() {
        wants(format!("size_of_{c}"), format!("sizeof({c})"), bytes);
        for (field, at) in fields {
            wants(format!("{c}_{field}"), format!("offsetof({c}, {field})"), at);
        }
    }
    let dir = tempfile::tempdir().unwrap();
    compile(dir.path(), &source, &[]);
}

#[test]
fn every_field_of_the_header_is_compared() {
    let text = std::fs::read_to_string(header().join("dsv.h")).unwrap();
    let all = structures();
    let mut seen = 0;
    for part in text.split("typedef struct {").skip(1) {
        let (body, rest) = part.split_once("\n} ").unwrap();
        let name = rest.split(';').next().unwrap();
        let (_, _, fields) =
            all.iter().find(|(c, ..)| *c == name).unwrap_or_else(|| panic!("{name} is not compared"));
        // Comments end before the line does, or go on to the next: names are what stands before a comma or semicolon.
        let mut code = String::new();
        let mut rest = body;
        while let Some((before, comment)) = rest.split_once("/*") {
            code += before;
            rest = comment.split_once("*/").unwrap().1;
        }
        code += rest;
        let names: Vec<&str> = code
            .split(';')
            .filter(|line| !line.trim().is_empty())
            .flat_map(|line| match line.split_once("(*") {
                Some((_, pointer)) => vec![pointer.split(')').next().unwrap()],
                None => line
                    .split(',')
                    .map(|x| x.rsplit([' ', '*', '\n']).find(|w| !w.is_empty()).unwrap())
                    .collect(),
            })
            .collect();
        assert_eq!(names, fields.iter().map(|(f, _)| *f).collect::<Vec<_>>(), "{name}");
        seen += 1;
    }
    assert_eq!(seen, all.len());
}

#[test]
fn the_version_is_the_headers() {
    let dir = tempfile::tempdir().unwrap();
    let source =
        format!("#include \"dsv.h\"\ntypedef char version[DSV_ABI_VERSION == {ABI_VERSION} ? 1 : -1];\n");
    compile(dir.path(), &source, &[]);
    assert_eq!(dsv_abi_version(), ABI_VERSION);
}

#[test]
fn wrong_arguments_are_answers() {
    let last = || {
        // SAFETY: a string of the library's.
        unsafe { std::ffi::CStr::from_ptr(dsv_last_error()) }.to_str().unwrap().to_string()
    };
    let mut runtime = std::ptr::null_mut();
    let options = COptions {
        abi_version: ABI_VERSION + 1,
        device: 0,
        bundle: std::ptr::null(),
        table: std::ptr::null(),
        notice: None,
        notice_data: std::ptr::null_mut(),
    };
    // SAFETY: null where the function refuses null, else live values.
    unsafe {
        assert_eq!(dsv_open(std::ptr::null(), &mut runtime), -1);
        assert!(last().contains("options is NULL"), "{}", last());
        assert_eq!(dsv_open(&options, &mut runtime), -1);
        assert!(last().contains("abi_version is 2; allowed: 1"), "{}", last());
        assert_eq!(dsv_open(&options, std::ptr::null_mut()), -1);
        assert!(last().contains("NULL"), "{}", last());
        assert_eq!(dsv_attention_forward(std::ptr::null(), std::ptr::null_mut(), std::ptr::null()), -1);
        assert!(last().contains("attention is NULL"), "{}", last());
        dsv_close(std::ptr::null_mut());
        dsv_attention_free(std::ptr::null_mut());
    }
    assert!(runtime.is_null());
    assert_eq!(dsv_check_error_flag(0), 0);
    assert_eq!(dsv_check_error_flag(1 << 30), -1);
    assert!(last().contains("bits no kernel raises"), "{}", last());
}

/// Every function of the header is in the shared library, and the example builds against both without a warning.
#[test]
fn the_example_links() {
    let text = std::fs::read_to_string(header().join("dsv.h")).unwrap();
    let library = std::env::current_exe().unwrap().with_file_name("libdsv.so");
    assert!(library.exists(), "{} is built with the tests", library.display());
    let dir = tempfile::tempdir().unwrap();
    let functions: Vec<&str> = text
        .split(|c: char| !(c.is_ascii_alphanumeric() || c == '_' || c == '('))
        .filter_map(|word| word.split_once('('))
        .map(|(name, _)| name)
        .filter(|name| name.starts_with("dsv_"))
        .collect();
    assert_eq!(functions.len(), 18, "{functions:?}");
    let calls: String = functions.iter().map(|f| format!("    sum += (size_t)&{f};\n")).collect();
    let source = format!(
        "#include \"dsv.h\"\nint main(void) {{\n    size_t sum = 0;\n{calls}    return sum == 0;\n}}\n"
    );
    let object = compile(dir.path(), &source, &[]);
    let program = dir.path().join("test");
    let output = Command::new("cc").arg(&object).arg(&library).arg("-o").arg(&program).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let example = Path::new(env!("CARGO_MANIFEST_DIR")).join("examples/attention.c");
    compile(dir.path(), &std::fs::read_to_string(example).unwrap(), &[]);
}
