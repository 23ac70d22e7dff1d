use crate::types::{Arch, tokens};

tokens! {
    /// Kernels that work on KV lists alone.
    ListOp {
        /// q2k lists to the k2q CSR, ascending and deterministic.
        Invert = "kv_invert",
        /// Checks that lists are ascending, unique and in range.
        Validate = "kv_validate",
    }
}

/// Everything baked into a list kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ListSpec {
    /// Which kernel.
    pub op: ListOp,
    /// The architecture.
    pub arch: Arch,
}
