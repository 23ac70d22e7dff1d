//! Owns the way from a problem to a launch: the GPU, cubins (from a bundle, else compiled here), the dispatch table,
//! and plans that hold checked shapes and loaded kernels; it is the only crate that launches a generated kernel.
//! It must never know how a kernel's text is made, what a trainer is, or a tensor library; its hot calls allocate
//! nothing and wait for nothing.
//! Start at [`Runtime`]: [`Runtime::attention`] gives an [`AttnPlan`], [`Runtime::explain`] says which kernel serves
//! a problem and why.

mod attention;
pub mod device;
mod dispatch;
mod error;
mod kernels;
mod layout;
mod lists;
mod memory;
mod nvml;
mod optimizer;
mod registry;
mod report;
mod select;

pub use attention::{AttnLayouts, AttnPlan, BackwardKernels, BwdArgs, FwdArgs, KeyLists, QueryLists};
pub use device::{Device, DeviceBuffer, Stream};
pub use dispatch::{Choice, Dispatch, Explanation, Gpu, TableSource};
pub use error::{Error, FlagError, decode_error_flag};
pub use kernels::{Bundle, Kernel, Kernels, Origin};
pub use layout::Layout;
pub use lists::{Keep, ListPlan, ListShape, SelectArgs, SelectPlan, SelectProblem};
pub use memory::MemoryNeeded;
pub use nvml::Clocks;
pub use optimizer::AdamWPlan;
pub use registry::{KernelText, Registry};
pub use report::{Notice, Report, silent};
pub use select::{FineArgs, FinePlan, FineProblem, Selection};

use dsv_spec::{
    Arch, AttnOp, Dtype, KernelSpec, ListOp, ListSpec, PointwiseOp, PointwiseSpec, Problem, space,
};
use std::path::PathBuf;
use std::sync::Arc;

/// What to open a [`Runtime`] with.
#[derive(Clone)]
pub struct Options {
    /// The GPU.
    pub ordinal: usize,
    /// Directory made by `dsv-codegen build --out DIR`; without it kernels are compiled on this machine.
    pub bundle: Option<PathBuf>,
    /// The dispatch table.
    pub table: TableSource,
    /// The architecture whose kernels serve, where it is not the GPU's own: [`Arch::Sm80`] runs on an H100 too, compiled
    /// there, slower than its own kernels. For tests and comparisons.
    pub arch: Option<Arch>,
    /// Receives notices.
    pub report: Report,
}

impl Default for Options {
    fn default() -> Options {
        Options { ordinal: 0, bundle: None, table: TableSource::Committed, arch: None, report: silent() }
    }
}

/// One GPU with its kernels and its dispatch table.
pub struct Runtime {
    device: Arc<Device>,
    kernels: Kernels,
    dispatch: Dispatch,
    arch: Arch,
}

impl Runtime {
    /// Opens the GPU, the bundle and the table. A bundle or a table that cannot be used is reported, not an error:
    /// kernels are then compiled on this machine, and defaults serve.
    ///
    /// # Errors
    /// [`Error::NoDriver`], [`Error::NoSuchGpu`], [`Error::UnsupportedGpu`], or what the driver answers.
    /// [`Error::Architecture`] for an `arch` whose instructions the GPU lacks.
    pub fn open(options: Options) -> Result<Runtime, Error> {
        let device = Device::open(options.ordinal)?;
        let arch = device.arch_or(options.arch)?;
        let registry = Registry::committed();
        let info = device.info();
        let usable =
            |dir| Bundle::usable(dir, &registry, info.capability, device.driver_major(), &options.report);
        let bundle = options.bundle.as_deref().and_then(usable);
        let kernels = Kernels::new(&device, registry, bundle, options.report.clone());
        let gpu = Gpu { name: info.name.clone(), capability: info.capability, arch };
        let dispatch = Dispatch::new(gpu, &options.table, registry, &options.report);
        Ok(Runtime { device, kernels, dispatch, arch })
    }

    /// The GPU.
    pub fn device(&self) -> &Arc<Device> {
        &self.device
    }

    /// The kernels.
    pub fn kernels(&self) -> &Kernels {
        &self.kernels
    }

    /// The dispatch.
    pub fn dispatch(&self) -> &Dispatch {
        &self.dispatch
    }

    /// Which kernel serves a problem, and why.
    ///
    /// # Errors
    /// As [`Dispatch::explain`].
    pub fn explain(&self, problem: &Problem) -> Result<Explanation, Error> {
        self.dispatch.explain(problem)
    }

    /// A plan for an attention problem: `attn_fwd` plans the forward, `attn_bwd` the forward and the backward. The
    /// scale is 1 / sqrt(head_dim) unless given. Everything that can be wrong with shapes, strides and lists is found
    /// here, before any address is taken; kernels are loaded here too.
    ///
    /// # Errors
    /// [`Error::Plan`] with every problem, [`Error::NoKernel`], or why a kernel cannot be loaded.
    pub fn attention(
        &self,
        problem: &Problem,
        layouts: &AttnLayouts,
        scale: Option<f32>,
    ) -> Result<AttnPlan, Error> {
        self.attention_with(problem, layouts, scale, &[])
    }

    /// As [`Runtime::attention`], with the caller's own kernels for their ops (the tuner's candidates).
    ///
    /// # Errors
    /// As [`Runtime::attention`]; also a kernel that does not serve the problem.
    pub fn attention_with(
        &self,
        problem: &Problem,
        layouts: &AttnLayouts,
        scale: Option<f32>,
        kernels: &[Arc<Kernel>],
    ) -> Result<AttnPlan, Error> {
        layouts.check(problem)?;
        let choose = |op: AttnOp| match kernels.iter().find(|k| k.spec().op() == op.name()) {
            Some(kernel) => Ok(kernel.clone()),
            None => self.kernels.load(&self.dispatch.explain(&Problem { op, ..*problem })?.kernel),
        };
        let backward = match problem.op {
            AttnOp::Bwd => {
                let main = choose(AttnOp::Bwd)?;
                let ending = choose(AttnOp::ending(problem.lists, attention::form(&main)))?;
                Some(BackwardKernels { prep: choose(AttnOp::BwdPrep)?, main, ending })
            }
            _ => None,
        };
        AttnPlan::new(problem, layouts, scale, choose(AttnOp::Fwd)?, backward)
    }

    /// A plan for selecting KV lists from low-rank queries and keys.
    ///
    /// # Errors
    /// [`Error::Plan`] with every problem, [`Error::NoKernel`], or why the kernel cannot be loaded.
    pub fn selection(
        &self,
        problem: &SelectProblem,
        q_lr: Layout,
        k_lr: Layout,
    ) -> Result<SelectPlan, Error> {
        let SelectProblem { rank, query_group, kv_block, group_rule, .. } = *problem;
        let spec =
            space::default_select(rank, query_group, kv_block, group_rule, self.arch).ok_or_else(|| {
                let what = format!(
                    "kv_select, rank {rank}, query_group {query_group}, kv_block {kv_block}, {group_rule}"
                );
                no_selection(what, &space::SHIPPED_BLOCK_SIZES, "SHIPPED_BLOCK_SIZES", self.arch)
            })?;
        SelectPlan::new(problem, q_lr, k_lr, self.kernels.load(&KernelSpec::Select(spec))?)
    }

    /// As [`Runtime::selection`], with the caller's own `kv_select`.
    ///
    /// # Errors
    /// As [`Runtime::selection`]; also a kernel that does not serve the problem.
    pub fn selection_with(
        &self,
        problem: &SelectProblem,
        q_lr: Layout,
        k_lr: Layout,
        kernel: Arc<Kernel>,
    ) -> Result<SelectPlan, Error> {
        SelectPlan::new(problem, q_lr, k_lr, kernel)
    }

    /// A plan for selecting KV lists of any granularity, single tokens included.
    ///
    /// # Errors
    /// [`Error::Plan`] with every problem, [`Error::NoKernel`], or why the kernel cannot be loaded.
    pub fn fine_selection(
        &self,
        problem: &FineProblem,
        q_lr: Layout,
        k_lr: Layout,
    ) -> Result<FinePlan, Error> {
        let FineProblem { rank, query_group, kv_block, group_rule, block_score, budget, .. } = *problem;
        let spec = space::select_fine(
            rank,
            query_group,
            kv_block,
            group_rule,
            block_score,
            budget,
            self.arch,
        )
        .ok_or_else(|| {
            let what = format!(
                "kv_select_fine, rank {rank}, query_group {query_group}, kv_block {kv_block}, {group_rule}, \
                     {block_score}, {budget}"
            );
            no_selection(what, &space::SHIPPED_GRANULARITIES, "SHIPPED_GRANULARITIES", self.arch)
        })?;
        FinePlan::new(problem, q_lr, k_lr, self.kernels.load(&KernelSpec::Select(spec))?)
    }

    /// As [`Runtime::fine_selection`], with the caller's own `kv_select_fine`.
    ///
    /// # Errors
    /// As [`Runtime::fine_selection`]; also a kernel that does not serve the problem.
    pub fn fine_selection_with(
        &self,
        problem: &FineProblem,
        q_lr: Layout,
        k_lr: Layout,
        kernel: Arc<Kernel>,
    ) -> Result<FinePlan, Error> {
        FinePlan::new(problem, q_lr, k_lr, kernel)
    }

    /// A plan for inverting and validating KV lists.
    ///
    /// # Errors
    /// [`Error::Plan`] with every problem, or why a kernel cannot be loaded.
    pub fn lists(&self, shape: &ListShape) -> Result<ListPlan, Error> {
        let load = |op| self.kernels.load(&KernelSpec::List(ListSpec { op, arch: self.arch }));
        shape.check()?;
        ListPlan::new(shape, load(ListOp::Invert)?, load(ListOp::Validate)?)
    }

    /// The fused AdamW step with weights of this dtype.
    ///
    /// # Errors
    /// [`Error::NoKernel`], or why the kernel cannot be loaded.
    pub fn adamw(&self, weight: Dtype) -> Result<AdamWPlan, Error> {
        let spec = PointwiseSpec::new(PointwiseOp::AdamW, weight, 0, 0, 4, self.arch)
            .map_err(|e| Error::NoKernel(format!("no kernel for adamw, {weight} on {}: {e}", self.arch)))?;
        let kernel = self.kernels.load(&KernelSpec::Pointwise(spec))?;
        Ok(AdamWPlan::new(kernel, self.device.info().multiprocessors))
    }
}

/// No spec is what was asked: `what` says it, `sizes` and `constant` which (query_group, kv_block) are shipped.
fn no_selection(what: String, sizes: &[(u16, u16)], constant: &str, arch: Arch) -> Error {
    Error::NoKernel(format!(
        "no kernel for {what} on {arch}\n  rank available: {:?}; (query_group, kv_block) available: {sizes:?}\n  to add one: \
         SHIPPED_RANKS and {constant} (codegen/spec/src/space.rs), then dsv-codegen --arch {arch}",
        space::SHIPPED_RANKS
    ))
}
