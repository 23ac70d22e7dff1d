//! The templates and headers, embedded, and the one function that renders.

use std::collections::BTreeMap;
use std::sync::OnceLock;

use dsv_spec::KernelSpec;
use tera::{Context, Delimiters, Tera};

use crate::CodegenError;
use crate::context::{describe, variables};

// KERNELS and HEADERS, listed by the build script.
include!(concat!(env!("OUT_DIR"), "/templates.rs"));

/// Name of a spec's template: `<op>_gather` for lists of units smaller than a tile, `<op>_persistent` for that schedule;
/// else `<op>_<arch>` where the architecture has one of its own, else `<op>`.
pub fn template_name(spec: &KernelSpec) -> &'static str {
    let own = match spec {
        KernelSpec::Attn(s) if s.lists().is_gather() => format!("{}_gather", spec.op()),
        KernelSpec::Attn(s) if s.is_persistent() => format!("{}_persistent", spec.op()),
        _ => format!("{}_{}", spec.op(), spec.arch()),
    };
    KERNELS.iter().map(|(name, _)| *name).find(|name| *name == own).unwrap_or(spec.op())
}

/// Path of a template within the checkout, by [`template_name`].
pub fn template_path(name: &str) -> String {
    format!("templates/kernels/{name}.cu.tera")
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

/// Templates, each parsed once and on its own: a mistake in one stops no other.
struct Templates(BTreeMap<&'static str, Result<Tera, String>>);

impl Templates {
    fn new(templates: &[(&'static str, &'static str)]) -> Self {
        let parse = |op, text| engine([(op, text)]).map_err(|error| error.to_string());
        Self(templates.iter().map(|&(op, text)| (op, parse(op, text))).collect())
    }

    fn render(&self, spec: &KernelSpec) -> Result<String, CodegenError> {
        let (op, name) = (template_name(spec), spec.name());
        let Some(engine) = self.0.get(op) else {
            let available = self.0.keys().map(|op| (*op).to_owned()).collect();
            return Err(CodegenError::NoTemplate { op: op.to_owned(), available });
        };
        let variables = variables(spec);
        let fail = |report: String| CodegenError::Template {
            op: op.to_owned(),
            name: name.clone(),
            report: report.trim_end().to_owned(),
        };
        let mut context = Context::new();
        for (key, value) in &variables {
            context.insert(*key, value);
        }
        let engine = engine.as_ref().map_err(|report| fail(report.clone()))?;
        let text = engine.render(op, &context).map_err(|error| fail(error.to_string()))?;
        Ok(format!(
            "// {name}\n\
             // Generated from {} by dsv-codegen: do not edit, change the template or the spec.\n\
             // {}\n\
             \n{text}",
            template_path(op),
            describe(spec)
        ))
    }
}

/// The CUDA text of a spec: a banner, then its op's template with every value substituted. The same spec gives the
/// same text, always and everywhere.
///
/// # Errors
/// [`CodegenError::NoTemplate`] where the op has none; [`CodegenError::Template`] where the template does not parse
/// or names a variable the spec does not have.
pub fn render(spec: &KernelSpec) -> Result<String, CodegenError> {
    static TEMPLATES: OnceLock<Templates> = OnceLock::new();
    TEMPLATES.get_or_init(|| Templates::new(KERNELS)).render(spec)
}

/// blake3, in hex, of a kernel's text and the headers it may include: what the registry, the dispatch table and the
/// bundle call the source hash. A changed template makes exactly its own kernels stale, and a changed header in a folder
/// (`dsv/sm80/`) exactly those that include from it.
pub fn source_hash(source: &str) -> String {
    let folder = |name: &str| name.rfind('/').map_or(0, |at| at + 1);
    let included = |name: &str| {
        let folder = &name[..folder(name)];
        folder == "dsv/" || source.contains(&format!("#include \"{folder}"))
    };
    let mut hasher = blake3::Hasher::new();
    for (name, text) in [("", source)].iter().chain(HEADERS.iter().filter(|(name, _)| included(name))) {
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

    fn spec() -> KernelSpec {
        "kv_invert_sm90a".parse().unwrap()
    }

    #[test]
    fn template_errors_say_where_and_what_there_is() {
        let undefined = Templates::new(&[(
            "kv_invert",
            "constexpr int kThreads = <{ threads }>;\nint x = <{ head_dim }>;",
        )]);
        insta::assert_snapshot!("error_undefined_variable", undefined.render(&spec()).unwrap_err());
        let unclosed = Templates::new(&[("kv_invert", "int x = <{ threads ;\n")]);
        insta::assert_snapshot!("error_template_syntax", unclosed.render(&spec()).unwrap_err());
        let missing = Templates::new(&[("attn_fwd", ""), ("kv_select", "")]);
        insta::assert_snapshot!("error_no_template", missing.render(&spec()).unwrap_err());
    }

    #[test]
    fn the_banner_is_the_name_the_template_and_the_spec() {
        let templates = Templates::new(&[("kv_invert", "int threads = <{ threads }>;\n")]);
        insta::assert_snapshot!("banner", templates.render(&spec()).unwrap());
    }

    #[test]
    fn a_header_or_a_byte_of_text_changes_the_hash() {
        assert_eq!(source_hash("a"), source_hash("a"));
        assert_ne!(source_hash("a"), source_hash("b"));
        assert_ne!(source_hash("a").as_str(), blake3::hash(b"a").to_hex().as_str(), "headers are not hashed");
        // Headers of an architecture belong to the texts that include from their folder.
        let by_hand = |source: &str| {
            let mut plain = blake3::Hasher::new();
            for (name, text) in [("", source)].iter().chain(HEADERS) {
                if ["sm80", "gather", "persistent", "select"]
                    .iter()
                    .any(|f| name.starts_with(&format!("dsv/{f}/")) && !source.contains(f))
                {
                    continue;
                }
                for part in [name, text] {
                    plain.update(&(part.len() as u64).to_le_bytes());
                    plain.update(part.as_bytes());
                }
            }
            plain.finalize().to_hex().to_string()
        };
        for source in ["types", "sm80/cp_async", "gather/load", "persistent/lists", "select/operand"]
            .map(|h| format!("#include \"dsv/{h}.cuh\""))
        {
            assert_eq!(source_hash(&source), by_hand(&source), "{source}");
        }
        assert!(HEADERS.iter().any(|(name, _)| name.starts_with("dsv/sm80/")));
    }
}
