use crate::error::SpecError;
use crate::types::{Arch, Dtype, tokens};

tokens! {
    /// The trainer's elementwise and row-wise kernels.
    PointwiseOp {
        /// AdamW on f32 master weights with a compute-dtype copy.
        AdamW = "adamw",
    }
}

/// Everything baked into one elementwise or row-wise kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PointwiseSpec {
    /// Which kernel.
    pub op: PointwiseOp,
    /// Compute dtype of the activations or weights it reads and writes.
    pub dtype: Dtype,
    /// Row length baked in; 0 when it is a launch parameter.
    pub dim: u16,
    /// Elements a thread moves at once.
    pub vector: u8,
    /// The architecture.
    pub arch: Arch,
}

impl PointwiseSpec {
    /// Checks the fields against each other.
    ///
    /// # Errors
    /// A vector that is not 1, 2, 4 or 8, or a row that is no multiple of it.
    pub fn new(op: PointwiseOp, dtype: Dtype, dim: u16, vector: u8, arch: Arch) -> Result<Self, SpecError> {
        if !matches!(vector, 1 | 2 | 4 | 8) {
            return Err(SpecError::new("vector", vector, "1, 2, 4 or 8 elements"));
        }
        if !dim.is_multiple_of(vector as u16) {
            return Err(SpecError::new("dim", dim, format!("a multiple of vector {vector}")));
        }
        Ok(PointwiseSpec { op, dtype, dim, vector, arch })
    }
}
