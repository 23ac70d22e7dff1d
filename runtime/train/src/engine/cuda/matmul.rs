//! Matrix products by cublasLt: bf16 x bf16, accumulated in f32, stored in bf16 or f32.

use super::EngineError;
use cudarc::cublaslt::{result, sys};
use std::collections::HashMap;
use std::ffi::c_void;

/// One (batched, strided) product `c[m,n] (+)= sum_k a b` of row-major matrices; strides in elements.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Product {
    /// `a` is stored `[k, m]` rather than `[m, k]`.
    pub(super) a_transposed: bool,
    /// `b` is stored `[n, k]` rather than `[k, n]`.
    pub(super) b_transposed: bool,
    pub(super) m: usize,
    pub(super) n: usize,
    pub(super) k: usize,
    /// Elements between the rows of a, b and c.
    pub(super) row_strides: [usize; 3],
    /// Number of products, and elements between their a, b and c.
    pub(super) batch: usize,
    pub(super) batch_strides: [usize; 3],
    /// `c` is f32 rather than bf16.
    pub(super) c_is_f32: bool,
    /// Add to `c`, or to [`Operands::add`] instead.
    pub(super) accumulate: bool,
    /// A bf16 bias `[n]` is added to every row; only where `c` is bf16.
    pub(super) bias: bool,
}

/// Device addresses of one product.
#[derive(Clone, Copy, Debug)]
pub(super) struct Operands {
    pub(super) a: u64,
    pub(super) b: u64,
    pub(super) c: u64,
    /// What the product is added to, laid out as `c`; `None` = `c` itself. Only where the product accumulates.
    pub(super) add: Option<u64>,
    pub(super) bias: Option<u64>,
}

impl Operands {
    /// Largest power of two to 256 that divides the addresses of all of the batch's a, of its b, of its c.
    fn alignments(&self, product: &Product) -> [u32; 3] {
        let [a, b, c] = product.batch_strides.map(|stride| if product.batch > 1 { stride as u64 } else { 0 });
        let c_bytes = if product.c_is_f32 { 4 } else { 2 };
        [self.a | (2 * a), self.b | (2 * b), self.c | self.add.unwrap_or(0) | (c_bytes * c)]
            .map(|bits| 1 << bits.trailing_zeros().min(8))
    }
}

/// Bytes of workspace cublasLt may use; 32 MiB is what its Hopper kernels want.
pub(super) const WORKSPACE_BYTES: usize = 32 << 20;

/// A product with its descriptors and the algorithm cublasLt chose.
struct Plan {
    desc: sys::cublasLtMatmulDesc_t,
    layouts: [sys::cublasLtMatrixLayout_t; 3],
    algo: sys::cublasLtMatmulAlgo_t,
}

impl Drop for Plan {
    fn drop(&mut self) {
        // SAFETY: created by the plan and destroyed once.
        unsafe {
            let _ = result::destroy_matmul_desc(self.desc);
            for layout in self.layouts.into_iter().filter(|layout| !layout.is_null()) {
                let _ = result::destroy_matrix_layout(layout);
            }
        }
    }
}

/// cublasLt with a plan for every product seen.
pub(super) struct Matmul {
    handle: sys::cublasLtHandle_t,
    plans: HashMap<(Product, [u32; 3]), Plan>,
}

impl Matmul {
    /// Loads the library; the GPU's context must be current.
    pub(super) fn new(index: usize) -> Result<Matmul, EngineError> {
        // SAFETY: asks the loader for the library; its initialisers have no precondition.
        if !unsafe { sys::is_culib_present() } {
            return Err(EngineError::NoDevice {
                index,
                reason: "libcublasLt.so was not found; it comes with the CUDA toolkit, or with pip install \
                         nvidia-cublas (put its lib folder on LD_LIBRARY_PATH)"
                    .into(),
            });
        }
        let handle = result::create_handle()
            .map_err(|e| EngineError::Device(format!("cublasLtCreate on GPU {index}: {e}")))?;
        Ok(Matmul { handle, plans: HashMap::new() })
    }

    /// Queues the product on `stream`. `workspace` has [`WORKSPACE_BYTES`] bytes and is free for this product.
    ///
    /// # Safety
    /// The operands are device memory of the product's sizes until the work is done; `stream` is alive and belongs
    /// to the context the library was loaded in, which is current.
    pub(super) unsafe fn multiply(
        &mut self,
        product: &Product,
        operands: &Operands,
        workspace: u64,
        stream: *mut c_void,
    ) -> Result<(), EngineError> {
        assert_eq!(product.bias, operands.bias.is_some(), "a bias exactly where the product has one");
        assert!(product.accumulate || operands.add.is_none(), "what is added to needs a product that adds");
        let key = (*product, operands.alignments(product));
        if !self.plans.contains_key(&key) {
            let plan = self.plan(product, key.1)?;
            self.plans.insert(key, plan);
        }
        let plan = &self.plans[&key];
        if let Some(bias) = operands.bias {
            set_desc(
                plan.desc,
                sys::cublasLtMatmulDescAttributes_t::CUBLASLT_MATMUL_DESC_BIAS_POINTER,
                &bias,
            )
            .map_err(|e| failed("bias", product, e))?;
        }
        let (alpha, beta) = (1.0f32, if product.accumulate { 1.0f32 } else { 0.0 });
        let [first, second, out] = plan.layouts;
        // SAFETY: the descriptors live in the plan; the addresses are the caller's promise. Column-major, c^T = b^T
        // a^T: cublasLt's first operand is b.
        unsafe {
            result::matmul(
                self.handle,
                plan.desc,
                (&raw const alpha).cast(),
                (&raw const beta).cast(),
                operands.b as *const c_void,
                first,
                operands.a as *const c_void,
                second,
                operands.add.unwrap_or(operands.c) as *const c_void,
                out,
                operands.c as *mut c_void,
                out,
                &plan.algo,
                workspace as *mut c_void,
                WORKSPACE_BYTES,
                stream.cast(),
            )
        }
        .map_err(|e| failed("cublasLtMatmul", product, e))
    }

    fn plan(&self, p: &Product, alignments: [u32; 3]) -> Result<Plan, EngineError> {
        use sys::cublasLtMatmulDescAttributes_t as Desc;
        use sys::cublasLtMatmulPreferenceAttributes_t as Pref;
        use sys::cudaDataType as Type;
        let fail = |what: &'static str| move |e| failed(what, p, e);
        let desc = result::create_matmul_desc(sys::cublasComputeType_t::CUBLAS_COMPUTE_32F, Type::CUDA_R_32F)
            .map_err(fail("cublasLtMatmulDescCreate"))?;
        // From here on the plan owns the descriptor; layouts that do not exist yet are null.
        let mut plan = Plan {
            desc,
            layouts: [std::ptr::null_mut(); 3],
            algo: sys::cublasLtMatmulAlgo_t { data: [0; 8] },
        };
        let transpose = |yes: bool| i32::from(yes); // CUBLAS_OP_N = 0, CUBLAS_OP_T = 1
        // A row-major [r, c] matrix is a column-major [c, r] one; the first operand is b, [n, k] without a transpose.
        set_desc(desc, Desc::CUBLASLT_MATMUL_DESC_TRANSA, &transpose(p.b_transposed))
            .map_err(fail("TRANSA"))?;
        set_desc(desc, Desc::CUBLASLT_MATMUL_DESC_TRANSB, &transpose(p.a_transposed))
            .map_err(fail("TRANSB"))?;
        if p.bias {
            assert!(!p.c_is_f32, "a bias is added by cublasLt only to bf16 results");
            let epilogue = sys::cublasLtEpilogue_t::CUBLASLT_EPILOGUE_BIAS;
            set_desc(desc, Desc::CUBLASLT_MATMUL_DESC_EPILOGUE, &epilogue).map_err(fail("EPILOGUE"))?;
        }
        let (bf16, c_type) =
            (Type::CUDA_R_16BF, if p.c_is_f32 { Type::CUDA_R_32F } else { Type::CUDA_R_16BF });
        let [a_stride, b_stride, c_stride] = p.row_strides;
        let [a_batch, b_batch, c_batch] = p.batch_strides;
        let (b_rows, b_cols) = if p.b_transposed { (p.k, p.n) } else { (p.n, p.k) };
        let (a_rows, a_cols) = if p.a_transposed { (p.m, p.k) } else { (p.k, p.m) };
        plan.layouts = [
            layout(bf16, b_rows, b_cols, b_stride, p.batch, b_batch).map_err(fail("layout of b"))?,
            layout(bf16, a_rows, a_cols, a_stride, p.batch, a_batch).map_err(fail("layout of a"))?,
            layout(c_type, p.n, p.m, c_stride, p.batch, c_batch).map_err(fail("layout of c"))?,
        ];
        let preference = result::create_matmul_pref().map_err(fail("cublasLtMatmulPreferenceCreate"))?;
        let chosen = (|| {
            // Partial sums only in f32, added in a fixed order: never in bf16, never in place by atomics.
            let reductions = sys::cublasLtReductionScheme_t::CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE as u32;
            let [a, b, c] = alignments;
            set_pref(preference, Pref::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &WORKSPACE_BYTES)?;
            set_pref(preference, Pref::CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK, &reductions)?;
            set_pref(preference, Pref::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, &b)?;
            set_pref(preference, Pref::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, &a)?;
            set_pref(preference, Pref::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, &c)?;
            set_pref(preference, Pref::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, &c)?;
            let [first, second, out] = plan.layouts;
            // SAFETY: all descriptors are alive.
            unsafe {
                result::get_matmul_algo_heuristic(self.handle, desc, first, second, out, out, preference)
            }
        })();
        // SAFETY: created above and destroyed once.
        unsafe { result::destroy_matmul_pref(preference) }
            .map_err(fail("cublasLtMatmulPreferenceDestroy"))?;
        plan.algo = chosen.map_err(fail("choosing an algorithm"))?.algo;
        Ok(plan)
    }
}

impl Drop for Matmul {
    fn drop(&mut self) {
        self.plans.clear();
        // SAFETY: created by the value and destroyed once, after the plans.
        let _ = unsafe { result::destroy_handle(self.handle) };
    }
}

fn failed(what: &str, p: &Product, error: result::CublasError) -> EngineError {
    EngineError::Device(format!("cublasLt, {what} of {p:?}: {error}"))
}

fn layout(
    kind: sys::cudaDataType,
    rows: usize,
    cols: usize,
    stride: usize,
    batch: usize,
    batch_stride: usize,
) -> Result<sys::cublasLtMatrixLayout_t, result::CublasError> {
    use sys::cublasLtMatrixLayoutAttribute_t as Attribute;
    let layout = result::create_matrix_layout(kind, rows as u64, cols as u64, stride as i64)?;
    if batch > 1 {
        let (count, offset) = (batch as i32, batch_stride as i64);
        let set = |attribute, value: *const c_void, bytes| {
            // SAFETY: the layout is alive, and the value has the attribute's type.
            unsafe { result::set_matrix_layout_attribute(layout, attribute, value, bytes) }
        };
        set(Attribute::CUBLASLT_MATRIX_LAYOUT_BATCH_COUNT, (&raw const count).cast(), 4)?;
        set(Attribute::CUBLASLT_MATRIX_LAYOUT_STRIDED_BATCH_OFFSET, (&raw const offset).cast(), 8)?;
    }
    Ok(layout)
}

fn set_desc<T>(
    desc: sys::cublasLtMatmulDesc_t,
    attribute: sys::cublasLtMatmulDescAttributes_t,
    value: &T,
) -> Result<(), result::CublasError> {
    // SAFETY: the descriptor is alive; every caller gives a value of the attribute's type.
    unsafe {
        result::set_matmul_desc_attribute(desc, attribute, std::ptr::from_ref(value).cast(), size_of::<T>())
    }
}

fn set_pref<T>(
    preference: sys::cublasLtMatmulPreference_t,
    attribute: sys::cublasLtMatmulPreferenceAttributes_t,
    value: &T,
) -> Result<(), result::CublasError> {
    // SAFETY: the preference is alive; every caller gives a value of the attribute's type.
    unsafe {
        result::set_matmul_pref_attribute(
            preference,
            attribute,
            std::ptr::from_ref(value).cast(),
            size_of::<T>(),
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn alignment_is_that_of_every_product_of_the_batch() {
        let product = Product {
            a_transposed: true,
            b_transposed: false,
            m: 16,
            n: 128,
            k: 1000,
            row_strides: [64, 512, 128],
            batch: 4,
            batch_strides: [16, 128, 2048],
            c_is_f32: true,
            accumulate: false,
            bias: false,
        };
        let operands = Operands { a: 0x1000, b: 0x1010, c: 0x2000, add: None, bias: None };
        assert_eq!(operands.alignments(&product), [32, 16, 256]);
        assert_eq!(operands.alignments(&Product { batch: 1, ..product }), [256, 16, 256]);
        let added = Operands { add: Some(0x3020), ..operands };
        assert_eq!(added.alignments(&Product { batch: 1, ..product }), [256, 16, 32]);
    }
}
