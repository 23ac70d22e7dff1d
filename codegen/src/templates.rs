//! The templates and headers, embedded, and the one function that renders.

use std::sync::OnceLock;

use dsv_spec::KernelSpec;
use tera::{Context, Delimiters, Tera};

use crate::CodegenError;
use crate::context::{describe, variables};

/// Embeds the template of each op. A test compares the list with the directory.
macro_rules! kernels {
    ($($op:literal),+ $(,)?) => {
        &[$(($op, include_str!(concat!(env!("CARGO_MANIFEST_DIR"), "/../templates/kernels/", $op, ".cu.tera")))),+]
    };
}

/// Embeds the device headers. A test compares the list with the directory.
macro_rules! headers {
    ($($name:literal),+ $(,)?) => {
        &[$(($name, include_str!(concat!(env!("CARGO_MANIFEST_DIR"), "/../templates/include/", $name)))),+]
    };
}

/// (op, text of its template), sorted.
pub(crate) static KERNELS: &[(&str, &str)] = kernels![
    "attn_bwd",
    "attn_bwd_post",
    "attn_bwd_prep",
    "attn_fwd",
    "kv_invert",
    "kv_select",
    "kv_validate"
];

/// (`dsv/xxx.cuh`, text) of every device header, sorted: given to NVRTC by name beside any source, and part of
/// every source hash.
pub static HEADERS: &[(&str, &str)] = headers![
    "dsv/attention.cuh",
    "dsv/fragment.cuh",
    "dsv/mbarrier.cuh",
    "dsv/mma.cuh",
    "dsv/tma.cuh",
    "dsv/types.cuh",
    "dsv/warp.cuh",
    "dsv/wgmma.cuh",
    "dsv/wgmma_shapes.cuh",
];

/// Path of an op's template within the checkout.
pub fn template_path(op: &str) -> String {
    format!("templates/kernels/{op}.cu.tera")
}

/// Tera with the delimiters that no CUDA text contains, and no escaping.
pub(crate) fn engine<'a>(
    templates: impl IntoIterator<Item = (&'a str, &'a str)>,
) -> Result<Tera, tera::Error> {
    let mut tera = Tera::new();
    tera.set_delimiters(Delimiters {
        block_start: "<%".into(),
        block_end: "%>".into(),
        variable_start: "<{".into(),
        variable_end: "}>".into(),
        comment_start: "<#".into(),
        comment_end: "#>".into(),
    })?;
    tera.autoescape_on(Vec::<&str>::new());
    tera.add_raw_templates(templates)?;
    Ok(tera)
}

/// The CUDA text of a spec: a banner, then its op's template with every value substituted. The same spec gives the
/// same text, always and everywhere.
///
/// # Errors
/// [`CodegenError::NoTemplate`] where the op has none; [`CodegenError::Template`] where the template does not parse
/// or names a variable the spec does not have.
pub fn render(spec: &KernelSpec) -> Result<String, CodegenError> {
    static ENGINE: OnceLock<Result<Tera, String>> = OnceLock::new();
    let engine = ENGINE.get_or_init(|| engine(KERNELS.iter().copied()).map_err(|e| e.to_string()));
    render_with(engine.as_ref().map_err(String::as_str), spec)
}

fn render_with(engine: Result<&Tera, &str>, spec: &KernelSpec) -> Result<String, CodegenError> {
    let (op, name) = (spec.op(), spec.name());
    if !KERNELS.iter().any(|(known, _)| *known == op) {
        let available = KERNELS.iter().map(|(op, _)| (*op).to_owned()).collect();
        return Err(CodegenError::NoTemplate { op: op.to_owned(), available });
    }
    let variables = variables(spec);
    let fail = |report: String| CodegenError::Template {
        op: op.to_owned(),
        name: name.clone(),
        report,
        available: variables.keys().map(|key| (*key).to_owned()).collect(),
    };
    let mut context = Context::new();
    for (key, value) in &variables {
        context.insert(*key, value);
    }
    let text = engine
        .map_err(|report| fail(report.to_owned()))?
        .render(op, &context)
        .map_err(|error| fail(error.to_string()))?;
    Ok(format!(
        "// {name}\n\
         // Generated from {} by dsv-codegen: do not edit, change the template or the spec.\n\
         // {}\n\
         \n{text}",
        template_path(op),
        describe(spec)
    ))
}

/// blake3, in hex, of a kernel's text and every header: what the registry, the dispatch table and the bundle call
/// the source hash. A changed template makes exactly its own kernels stale.
pub fn source_hash(source: &str) -> String {
    let mut hasher = blake3::Hasher::new();
    for (name, text) in [("", source)].iter().chain(HEADERS) {
        for part in [name, text] {
            hasher.update(&(part.len() as u64).to_le_bytes());
            hasher.update(part.as_bytes());
        }
    }
    hasher.finalize().to_hex().to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Renders one line of template with `a = "3"` and `on = "true"`.
    fn one(template: &str) -> Result<String, tera::Error> {
        let mut context = Context::new();
        context.insert("a", "3");
        context.insert("on", "true");
        engine([("t", template)])?.render("t", &context)
    }

    #[test]
    fn cuda_passes_through() {
        let cuda = "asm(\"{%0, %1}\" : : \"r\"(x)); /* {# {{ }} #} */ a << b >> c; f<<<1, 2>>>(); \
                    Tile<{3}> t; if (a <b% c) x = \"<&'\";\n\n";
        // `<{` and `<%` are the delimiters; everything else of CUDA arrives untouched, the last newlines included.
        let cuda = cuda.replace("Tile<{3}> t; ", "");
        assert_eq!(one(&cuda).unwrap(), cuda);
    }

    #[test]
    fn values_are_not_escaped() {
        let mut context = Context::new();
        context.insert("a", "<&\"'>");
        let engine = engine([("t.html", "<{ a }>")]).unwrap();
        assert_eq!(engine.render("t.html", &context).unwrap(), "<&\"'>");
    }

    #[test]
    fn an_undefined_variable_is_an_error() {
        assert_eq!(one("x = <{ a }>;").unwrap(), "x = 3;");
        let error = one("x = <{ b }>;").unwrap_err().to_string();
        assert!(error.contains('b'), "{error}");
    }

    #[test]
    fn arithmetic_is_an_error() {
        for sum in ["a + 1", "a * 2", "a - 1", "a / 2"] {
            assert!(one(&format!("<{{ {sum} }}>")).is_err(), "{sum} was computed");
        }
    }

    #[test]
    fn whitespace_is_kept_unless_trimmed() {
        assert_eq!(one("x\n<% if on == \"true\" %>\ny\n<% endif %>\nz\n").unwrap(), "x\n\ny\n\nz\n");
        assert_eq!(one("x\n<%- if on == \"true\" %>\ny\n<%- endif %>\nz\n").unwrap(), "x\ny\nz\n");
    }

    #[test]
    fn numbers_arrive_as_written() {
        let mut context = Context::new();
        context.insert("x", "1.0e-05f");
        assert_eq!(engine([("t", "<{ x }>")]).unwrap().render("t", &context).unwrap(), "1.0e-05f");
    }

    #[test]
    fn a_template_error_names_the_variables() {
        let spec: KernelSpec = "kv_invert_sm90a".parse().unwrap();
        if KERNELS.iter().any(|(op, _)| *op == "kv_invert") {
            let broken = engine([("kv_invert", "constexpr int kHeadDim = <{ head_dim }>;")]).unwrap();
            insta::assert_snapshot!(render_with(Ok(&broken), &spec).unwrap_err());
        }
    }
}
