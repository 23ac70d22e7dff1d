//! The fused optimizer step.

use crate::attention::aligned;
use crate::device::Stream;
use crate::error::Error;
use crate::kernels::Kernel;
use dsv_spec::KernelSpec;
use dsv_spec::params::AdamW;
use std::sync::Arc;

/// The AdamW kernel of one compute dtype.
#[derive(Clone, Debug)]
pub struct AdamWPlan {
    kernel: Arc<Kernel>,
    vector: u64,
    max_ctas: u64,
}

impl AdamWPlan {
    pub(crate) fn new(kernel: Arc<Kernel>, multiprocessors: u32) -> AdamWPlan {
        let vector = match kernel.spec() {
            KernelSpec::Pointwise(spec) => spec.vector as u64,
            _ => 1,
        };
        // Threads stride over the rest; eight CTAs of 256 threads fill a multiprocessor.
        AdamWPlan { kernel, vector, max_ctas: 8 * multiprocessors as u64 }
    }

    /// The kernel.
    pub fn kernel(&self) -> &Arc<Kernel> {
        &self.kernel
    }

    /// Queues one step over `params.count` elements. Allocates nothing, waits for nothing, may be captured.
    ///
    /// # Safety
    /// Every address is device memory of `params.count` elements (one for `grad_factor`) until the work is done.
    ///
    /// # Errors
    /// A null or misaligned address, a negative count, or what the driver answers.
    pub unsafe fn step(&self, stream: &Stream, params: &AdamW) -> Result<(), Error> {
        let Ok(count) = u64::try_from(params.count) else {
            return Err(Error::Argument {
                kernel: self.kernel.name().to_string(),
                what: "count",
                value: params.count.to_string(),
                allowed: "0 or more".to_string(),
            });
        };
        if count == 0 {
            return Ok(());
        }
        let wide = [
            ("master", params.master),
            ("moment1", params.moment1),
            ("moment2", params.moment2),
            ("grad", params.grad),
            ("weight", params.weight),
        ];
        aligned(&self.kernel, &wide, crate::layout::ALIGN_BYTES)?;
        aligned(&self.kernel, &[("grad_factor", params.grad_factor)], 4)?;
        let ctas = count.div_ceil(self.vector * self.kernel.facts().threads as u64).min(self.max_ctas);
        // SAFETY: the caller's promise; the parameters are those of adamw.
        unsafe { self.kernel.launch(stream, [ctas as u32, 1, 1], 0, params) }
    }
}
