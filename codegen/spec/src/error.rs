use thiserror::Error;

/// A spec that no kernel can be written for: one reason, the value, what is allowed.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[error("{what} {value} is not possible: {allowed}")]
pub struct SpecError {
    /// The field.
    pub what: &'static str,
    /// The value it had.
    pub value: String,
    /// What is allowed, and why.
    pub allowed: String,
}

impl SpecError {
    pub(crate) fn new(what: &'static str, value: impl ToString, allowed: impl Into<String>) -> Self {
        SpecError { what, value: value.to_string(), allowed: allowed.into() }
    }
}

/// A text that is not the name of a kernel.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum NameError {
    /// The text does not follow the grammar.
    #[error("'{name}' is no kernel name: {reason}\n  to see the names: dsv-codegen list")]
    Grammar {
        /// The text.
        name: String,
        /// Where it went wrong.
        reason: String,
    },
    /// The text follows the grammar, but the kernel it names cannot exist.
    #[error("'{name}' names a kernel that cannot exist: {source}\n  to see the names: dsv-codegen list")]
    Infeasible {
        /// The text.
        name: String,
        /// Why not.
        source: SpecError,
    },
}

/// A dispatch table that cannot be used, with every problem found in it.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[error("the dispatch table {origin} cannot be used:\n  {}\n  to make one for this GPU: dsv-autotune", problems.join("\n  "))]
pub struct TableError {
    /// Where the table came from (a path, or "in memory").
    pub origin: String,
    /// Every problem, not the first only.
    pub problems: Vec<String>,
}
