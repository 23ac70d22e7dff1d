//! The CUDA engine: generated kernels through `dsv-runtime`, products by cublasLt, bf16 compute with f32 masters,
//! ops in order on one stream, copies to and from the host beside them.
//!
//! Row-wise sums that cross CTAs (bias and modulation gradients, losses, norms) go through partial sums in scratch
//! that a second launch adds in a fixed order, so every op but the attention backward gives the same bits every
//! time; the attention backward does too when the engine was opened as deterministic.

mod lanes;
mod matmul;
mod planned;
mod scratch;
mod staging;

use super::*;
use dsv_reference::layers::AdamWStep;
use dsv_reference::layers::eight_bits::Numbers;
use dsv_runtime::device::{Event, Graph, PinnedBuffer, Plain};
use dsv_runtime::{
    AttnLayouts, AttnPlan, BwdArgs, Device, DeviceBuffer, Dispatch, FineArgs, FineProblem, FwdArgs, Keep,
    Kernel, KeyLists, Layout, ListPlan, MemoryNeeded, Options, QueryLists, Runtime, SelectProblem, Selection,
    Stream, TableSource, decode_error_flag,
};
use dsv_spec::params;
use dsv_spec::{
    AttnOp, BlockScore, Budget, Deterministic, KernelSpec, PointwiseOp, PointwiseSpec, Problem, space,
};
use half::bf16;
use lanes::{Lanes, mark};
use matmul::{Matmul, Operands, Product};
pub use planned::PlannedGpu;
use scratch::{Bump, GramPlan};
use staging::Staging;
use std::path::PathBuf;
use std::sync::Arc;

/// What to open a [`CudaEngine`] with.
#[derive(Clone, Default)]
pub struct CudaOptions {
    /// Which GPU.
    pub index: usize,
    /// Dispatch table; `None` = the committed one of this GPU.
    pub table: Option<PathBuf>,
    /// Directory made by `dsv-codegen build --out DIR`; `None` = compile kernels on this machine.
    pub bundle: Option<PathBuf>,
    /// Take the attention backward whose sums have a fixed order.
    pub deterministic: bool,
    /// Record repeated work as CUDA graphs ([`Engine::repeat`]).
    pub graphs: bool,
}

/// What is known of repeated work.
enum Repeated {
    /// It ran once, so that its kernels are loaded and its plans made.
    Seen,
    /// Recorded.
    Graph(Graph),
}

/// Graphs kept; the longest unused goes first. A run has one for each way its blocks attend, with and without profile.
const MAX_GRAPHS: usize = 16;

/// Memory of a run: the arenas of the plan, the engine's scratch, and where inputs wait for the GPU.
struct Memory {
    // Freeing the buffers waits for the GPU; nothing copies out of or into host memory after that.
    arena: DeviceBuffer,
    scratch: DeviceBuffer,
    host: PinnedBuffer,
    staging: Staging,
    layout: scratch::Layout,
}

/// Engine on one GPU, bf16 with f32 accumulation.
pub struct CudaEngine {
    // Dropped in this order: cublasLt and buffers before the context.
    matmul: Matmul,
    memory: Option<Memory>,
    kernels: Vec<(PointwiseOp, Arc<Kernel>)>,
    attention: Vec<((Problem, AttnLayouts, u32), AttnPlan)>,
    selections: Vec<((SelectProblem, Layout, Layout), Selection)>,
    lists: Vec<ListPlan>,
    /// Repeated work, the last used at the end; `None` where graphs are off.
    repeated: Option<Vec<(Vec<u32>, Repeated)>>,
    /// Where ops are queued.
    stream: Stream,
    lanes: Lanes,
    runtime: Runtime,
    deterministic: Deterministic,
    /// First error since the last sync.
    error: Option<EngineError>,
}

/// Device memory left to what the driver and cublasLt load when kernels first run.
const LIBRARIES_BYTES: usize = 256 << 20;

/// CTAs of 256 threads that fill a multiprocessor.
const CTAS_PER_SM: usize = 4;

fn device_error(error: dsv_runtime::Error) -> EngineError {
    EngineError::Device(error.to_string())
}

impl CudaEngine {
    /// Opens the GPU, its dispatch table and cublasLt. Notices of the runtime go to stderr.
    ///
    /// # Errors
    /// [`EngineError::NoDevice`] where there is no driver, no such GPU, no kernel for it, or no cublasLt.
    pub fn open(options: &CudaOptions) -> Result<CudaEngine, EngineError> {
        let no_device =
            |e: dsv_runtime::Error| EngineError::NoDevice { index: options.index, reason: e.to_string() };
        let table = options.table.clone().map_or(TableSource::Committed, TableSource::File);
        let runtime = Runtime::open(Options {
            ordinal: options.index,
            bundle: options.bundle.clone(),
            table,
            arch: None,
            report: Arc::new(|notice| eprintln!("{notice}")),
        })
        .map_err(no_device)?;
        let stream = runtime.device().new_stream().map_err(no_device)?;
        let lanes = Lanes::new(runtime.device()).map_err(no_device)?;
        runtime.device().bind().map_err(no_device)?;
        let matmul = Matmul::new(options.index)?;
        Ok(CudaEngine {
            matmul,
            memory: None,
            kernels: Vec::new(),
            attention: Vec::new(),
            selections: Vec::new(),
            lists: Vec::new(),
            repeated: options.graphs.then(Vec::new),
            stream,
            lanes,
            runtime,
            deterministic: if options.deterministic { Deterministic::Yes } else { Deterministic::No },
            error: None,
        })
    }

    /// The runtime, for explaining which kernel serves a problem.
    pub fn runtime(&self) -> &Runtime {
        &self.runtime
    }

    fn device(&self) -> &Arc<Device> {
        self.runtime.device()
    }

    fn ctas(&self) -> usize {
        CTAS_PER_SM * self.device().info().multiprocessors as usize
    }

    fn memory(&self) -> &Memory {
        self.memory.as_ref().expect("reserve() comes before any op")
    }

    fn address(&self, buf: Buf) -> u64 {
        let arena = &self.memory().arena;
        assert_eq!(buf.space(), Space::Device, "{buf:?}: ops work on the device alone");
        assert!(
            buf.offset_bytes() + buf.bytes() <= arena.bytes(),
            "buffer ends at byte {} of an arena of {}",
            buf.offset_bytes() + buf.bytes(),
            arena.bytes()
        );
        arena.address() + buf.offset_bytes() as u64
    }

    /// Address of a buffer that must have this dtype.
    fn typed(&self, buf: Buf, dtype: Dtype) -> u64 {
        assert_eq!(buf.dtype(), dtype, "{buf:?}");
        self.address(buf)
    }

    fn act(&self, buf: Buf) -> u64 {
        self.typed(buf, Dtype::Act)
    }

    fn f32(&self, buf: Buf) -> u64 {
        self.typed(buf, Dtype::F32)
    }

    fn i32(&self, buf: Buf) -> u64 {
        self.typed(buf, Dtype::I32)
    }

    fn flat(&self, buf: Buf) -> params::Flat {
        assert_ne!(buf.dtype(), Dtype::I32, "{buf:?}");
        params::Flat { ptr: self.address(buf), is_f32: i32::from(buf.dtype() == Dtype::F32), reserved: 0 }
    }

    fn view(&self, view: &View) -> params::TensorView {
        layout(view).view(self.act(view.buf))
    }

    fn flag(&self) -> u64 {
        let memory = self.memory();
        memory.scratch.address() + memory.layout.flag as u64
    }

    fn scratch(&self) -> Bump {
        let Memory { scratch, layout, .. } = self.memory();
        Bump::new(scratch.address() + layout.op as u64, layout.bytes - layout.op)
    }

    /// Bytes of the host's arena that a buffer names.
    fn on_host(&self, buf: Buf) -> std::ops::Range<usize> {
        let (start, end, room) =
            (buf.offset_bytes(), buf.offset_bytes() + buf.bytes(), self.memory().host.bytes());
        assert_eq!(buf.space(), Space::Host, "{buf:?} does not lie on the host");
        assert!(end <= room, "buffer ends at byte {end} of a host arena of {room}");
        start..end
    }

    /// The elements of a host buffer, once nothing copies from or to the host any more.
    fn host_elements<T: Plain>(&mut self, buf: Buf) -> Result<&mut [T], EngineError> {
        assert_eq!(buf.bytes(), buf.len() * size_of::<T>(), "{buf:?}");
        let range = self.on_host(buf);
        self.stream.synchronize().and_then(|()| self.lanes.synchronize()).map_err(device_error)?;
        let host = &mut self.memory.as_mut().expect("reserve() comes before any op").host;
        Ok(&mut host.as_mut_slice::<T>()[range.start / size_of::<T>()..][..buf.len()])
    }

    /// Queues the copy of host values into a buffer.
    fn write<T: Plain>(&mut self, buf: Buf, element: impl Fn(usize) -> T) -> Result<(), EngineError> {
        assert_eq!(buf.bytes(), buf.len() * size_of::<T>(), "{buf:?}");
        if buf.space() == Space::Host {
            self.host_elements::<T>(buf)?.iter_mut().enumerate().for_each(|(i, to)| *to = element(i));
            return Ok(());
        }
        let address = self.address(buf);
        let memory = self.memory.as_mut().expect("reserve() comes before any op");
        // SAFETY: the range lies in the arena (checked by `address`), and there is one stream.
        unsafe { memory.staging.queue(&self.stream, address, buf.len(), element) }.map_err(device_error)
    }

    fn fail(&mut self, error: EngineError) {
        self.error.get_or_insert(error);
    }

    /// The end of something that was queued beside the ops; an error is kept for the next sync.
    fn done(&mut self, queued: Result<Arc<Event>, dsv_runtime::Error>) -> Done {
        let event = self.check(queued.map_err(device_error));
        Done(event.map_or(DoneAt::Over, DoneAt::Event))
    }

    fn check<T, E: Into<EngineError>>(&mut self, result: Result<T, E>) -> Option<T> {
        result.map_err(|e| self.fail(e.into())).ok()
    }

    /// Takes ranges of the op's scratch; where they do not fit, the op is not run and the next sync says so.
    fn take<const N: usize>(&mut self, op: &str, bytes: [usize; N]) -> Option<[u64; N]> {
        let mut scratch = self.scratch();
        let taken = bytes.map(|bytes| scratch.take(bytes));
        if taken.iter().any(Option::is_none) {
            let Memory { layout, .. } = self.memory();
            let (room, needed) = (layout.bytes - layout.op, bytes.iter().sum::<usize>());
            self.fail(EngineError::Device(format!(
                "{op} needs {needed} bytes of scratch; reserved for the largest problem of the run: {room}"
            )));
            return None;
        }
        Some(taken.map(Option::unwrap_or_default))
    }

    fn launch_with<P: Copy>(&mut self, op: PointwiseOp, grid: [usize; 3], params: &P) {
        let Some((_, kernel)) = self.kernels.iter().find(|(o, _)| *o == op) else {
            let reason = format!("kernel {op} was not loaded: reserve() comes before any op");
            return self.fail(EngineError::Device(reason));
        };
        let grid = grid.map(|n| u32::try_from(n).unwrap_or(u32::MAX));
        // SAFETY: every op builds the struct of its own kernel (the size is checked) from buffers of the arena and
        // of the scratch, which live until the engine is dropped and were reserved for these sizes.
        let answer = unsafe { kernel.launch(&self.stream, grid, kernel.facts().smem_bytes, params) }
            .map_err(device_error);
        self.check(answer);
    }

    /// CTAs of 256 threads that stride over `count` elements, `vector` at a time.
    fn strided(&self, count: usize, vector: usize) -> usize {
        count.div_ceil(256 * vector).clamp(1, 2 * self.ctas())
    }

    /// Launches a kernel whose threads stride over `count` elements.
    fn launch<P: Copy>(&mut self, op: PointwiseOp, count: usize, params: &P) {
        self.launch_per(op, count, 1, params);
    }

    /// The same with a second grid axis.
    fn launch_per<P: Copy>(&mut self, op: PointwiseOp, count: usize, y: usize, params: &P) {
        if count == 0 || y == 0 {
            return;
        }
        let vector = if op.shipped_vector() == 1 { 4 } else { op.shipped_vector() as usize };
        let x = self.strided(count, vector).div_ceil(y.min(CTAS_PER_SM));
        self.launch_with(op, [x, y, 1], params);
    }

    /// Column sums, in one launch or in two with a fixed order. `to` has the destination's fields and the source;
    /// chunks are chosen here.
    fn reduce(&mut self, segments: usize, to: params::SumRows) {
        const COLUMNS_PER_CTA: usize = 128;
        let (rows, columns) = (to.rows as usize, to.columns as usize);
        if rows == 0 || columns == 0 || segments == 0 {
            return;
        }
        let tiles = columns.div_ceil(COLUMNS_PER_CTA);
        let wanted = self.ctas().div_ceil(tiles * segments);
        let room = (scratch::PARTIAL_SUMS / (segments * columns)).max(1);
        let most = wanted.min(rows.div_ceil(64)).min(room).clamp(1, 65_535);
        let rows_per_chunk = rows.div_ceil(most);
        let chunks = rows.div_ceil(rows_per_chunk);
        let grid = [tiles, chunks, segments];
        if chunks == 1 {
            let params = params::SumRows { rows_per_chunk: rows as i32, dst_chunk_stride: 0, ..to };
            return self.launch_with(PointwiseOp::SumRows, grid, &params);
        }
        let partial = {
            let memory = self.memory();
            memory.scratch.address() + memory.layout.partial as u64
        };
        let first = params::SumRows {
            dst: partial,
            dst_segment_stride: (chunks * columns) as i64,
            dst_chunk_stride: columns as i64,
            rows_per_chunk: rows_per_chunk as i32,
            accumulate: 0,
            factor: 1.0,
            ..to
        };
        let second = params::SumRows {
            src: params::Flat { ptr: partial, is_f32: 1, reserved: 0 },
            rows: chunks as i64,
            row_stride: columns as i64,
            segment_stride: (chunks * columns) as i64,
            dst_chunk_stride: 0,
            rows_per_chunk: chunks as i32,
            ..to
        };
        self.launch_with(PointwiseOp::SumRows, grid, &first);
        self.launch_with(PointwiseOp::SumRows, [tiles, 1, segments], &second);
    }

    /// Sums f32 partials `[segments, rows, row_stride]` to `dst`.
    #[allow(clippy::too_many_arguments)]
    fn reduce_partials(
        &mut self,
        partial: u64,
        [segments, rows, row_stride, columns]: [usize; 4],
        dst: u64,
        dst_segment_stride: usize,
        accumulate: bool,
        factor: f32,
    ) {
        let to = params::SumRows {
            src: params::Flat { ptr: partial, is_f32: 1, reserved: 0 },
            dst,
            rows: rows as i64,
            columns: columns as i64,
            row_stride: row_stride as i64,
            segment_stride: (rows * row_stride) as i64,
            dst_segment_stride: dst_segment_stride as i64,
            accumulate: i32::from(accumulate),
            factor,
            ..Default::default()
        };
        self.reduce(segments, to);
    }

    /// Queues a product; an error is kept for the next sync.
    fn multiply(&mut self, product: &Product, operands: &Operands) {
        let workspace = {
            let memory = self.memory();
            memory.scratch.address() + memory.layout.matmul as u64
        };
        if let Err(e) = self.device().bind() {
            return self.fail(device_error(e));
        }
        // SAFETY: the caller's buffers belong to the arena or the scratch and have the product's sizes; the stream
        // belongs to the context made current above, and lives as long as the engine.
        let answer = unsafe { self.matmul.multiply(product, operands, workspace, self.stream.raw().cast()) };
        self.check(answer);
    }

    fn problem(&self, op: AttnOp, shape: &AttnShape, lists: Option<&ListShape>) -> Problem {
        problem(op, shape, lists, self.deterministic)
    }

    /// Index of the plan of this problem, layout and scale, made at its first use.
    fn attention_plan(
        &mut self,
        problem: &Problem,
        layouts: &AttnLayouts,
        scale: f32,
    ) -> Result<usize, EngineError> {
        let key = (*problem, *layouts, scale.to_bits());
        if let Some(at) = self.attention.iter().position(|(k, _)| *k == key) {
            return Ok(at);
        }
        let plan = self.runtime.attention(problem, layouts, Some(scale)).map_err(device_error)?;
        self.attention.push((key, plan));
        Ok(self.attention.len() - 1)
    }

    /// Plans of selection (with either rule that makes one query of a group's) and inversion, and their kernels.
    fn load_list_kernels(&mut self, shape: &ListShape, d_lr: usize) -> Result<(), EngineError> {
        let layout = Layout::bshd(shape.seqlen as u32, shape.heads as u32, d_lr as u32);
        for rule in GroupRule::PROXIES {
            self.plan_selection(shape, &selection_problem(shape, d_lr, rule, false)?, layout, layout)?;
        }
        match shape.kernel_lists().is_gather() {
            true => Ok(()),
            false => self.list_plan(shape).map(|_| ()),
        }
    }

    fn plan_selection(
        &self,
        shape: &ListShape,
        problem: &SelectProblem,
        q_lr: Layout,
        k_lr: Layout,
    ) -> Result<Selection, EngineError> {
        match shape.kernel_lists().is_gather() {
            true => self.runtime.fine_selection(&fine_problem(problem), q_lr, k_lr).map(Selection::Fine),
            false => self.runtime.selection(problem, q_lr, k_lr).map(Selection::Blocks),
        }
        .map_err(device_error)
    }

    fn selection_plan(&mut self, args: &KvSelect) -> Result<usize, EngineError> {
        let problem = selection_problem(&args.lists.shape, args.d_lr, args.rule, args.keep_own)?;
        let key = (problem, layout(&args.q_lr), layout(&args.k_lr));
        if let Some(at) = self.selections.iter().position(|(k, _)| *k == key) {
            return Ok(at);
        }
        let plan = self.plan_selection(&args.lists.shape, &problem, key.1, key.2)?;
        self.selections.push((key, plan));
        Ok(self.selections.len() - 1)
    }

    fn list_plan(&mut self, shape: &ListShape) -> Result<usize, EngineError> {
        let shape = dsv_runtime::ListShape {
            batch: shape.batch as u32,
            num_heads: shape.heads as u32,
            num_groups: shape.groups() as u32,
            num_kv_blocks: shape.kv_blocks() as u32,
            max_selected: shape.max_selected as u32,
        };
        if let Some(at) = self.lists.iter().position(|plan| *plan.shape() == shape) {
            return Ok(at);
        }
        let plan = self.runtime.lists(&shape).map_err(device_error)?;
        self.lists.push(plan);
        Ok(self.lists.len() - 1)
    }

    fn query_lists(&self, lists: &Lists) -> QueryLists {
        QueryLists { q2k_index: self.i32(lists.q2k_index), q2k_count: self.i32(lists.q2k_count) }
    }

    /// The inverse; none of units below 64 tokens. The plan of a backward that reads it refuses lists without.
    fn key_lists(&self, lists: &Lists) -> Option<KeyLists> {
        let (offset, index) = lists.inverse?;
        Some(KeyLists { k2q_offset: self.i32(offset), k2q_index: self.i32(index) })
    }

    fn run_attention_fwd(&mut self, args: &AttnFwd) -> Result<(), EngineError> {
        let lists = args.lists.as_ref();
        let problem = self.problem(AttnOp::Fwd, &args.shape, lists.map(|l| &l.shape));
        let (q, kv) = (layout(&args.q), layout(&args.k));
        let layouts = AttnLayouts {
            q,
            k: kv,
            v: layout(&args.v),
            out: layout(&args.out),
            d_out: q,
            dq: q,
            dk: kv,
            dv: kv,
        };
        let at = self.attention_plan(&problem, &layouts, args.shape.scale)?;
        let launch = FwdArgs {
            q: self.act(args.q.buf),
            k: self.act(args.k.buf),
            v: self.act(args.v.buf),
            out: self.act(args.out.buf),
            lse: self.f32(args.lse),
            lists: lists.map(|l| self.query_lists(l)),
            error_flag: self.flag(),
        };
        // SAFETY: buffers of the arena with the plan's sizes and layouts, alive as long as the engine.
        unsafe { self.attention[at].1.forward(&self.stream, &launch) }.map_err(device_error)
    }

    fn run_attention_bwd(&mut self, args: &AttnBwd) -> Result<(), EngineError> {
        let fwd = &args.fwd;
        let lists = fwd.lists.as_ref();
        let problem = self.problem(AttnOp::Bwd, &fwd.shape, lists.map(|l| &l.shape));
        let layouts = AttnLayouts {
            q: layout(&fwd.q),
            k: layout(&fwd.k),
            v: layout(&fwd.v),
            out: layout(&fwd.out),
            d_out: layout(&args.d_out),
            dq: layout(&args.d_q),
            dk: layout(&args.d_k),
            dv: layout(&args.d_v),
        };
        let at = self.attention_plan(&problem, &layouts, fwd.shape.scale)?;
        let bytes = self.attention[at].1.workspace_bytes() as usize;
        let Some([workspace]) = self.take("attn_bwd", [bytes]) else { return Ok(()) };
        let launch = BwdArgs {
            q: self.act(fwd.q.buf),
            k: self.act(fwd.k.buf),
            v: self.act(fwd.v.buf),
            out: self.act(fwd.out.buf),
            lse: self.f32(fwd.lse),
            d_out: self.act(args.d_out.buf),
            d_lse: None,
            dq: self.act(args.d_q.buf),
            dk: self.act(args.d_k.buf),
            dv: self.act(args.d_v.buf),
            lists: lists.and_then(|l| self.key_lists(l)),
            query_lists: lists.map(|l| self.query_lists(l)),
            workspace,
            error_flag: self.flag(),
        };
        // SAFETY: buffers of the arena with the plan's sizes and layouts, and scratch of the plan's workspace size.
        unsafe { self.attention[at].1.backward(&self.stream, &launch) }.map_err(device_error)
    }

    fn adamw_coded(&mut self, args: &AdamW, m: Coded, v: Coded) {
        let count = args.master.len();
        assert!(count.is_multiple_of(PARAM_ALIGN), "{count} elements: {args:?}");
        for c in [m, v] {
            assert_eq!((c.codes.len() * 4, c.scales.len() * PARAM_ALIGN), (count, count), "{args:?}");
        }
        let Numbers { keep, size, root, beta1, beta2, eps, seed } = Numbers::from(&AdamWStep {
            lr: f64::from(args.lr),
            beta1: f64::from(args.beta1),
            beta2: f64::from(args.beta2),
            eps: f64::from(args.eps),
            weight_decay: f64::from(args.weight_decay),
            step: args.step,
        });
        let params = params::AdamW8 {
            master: self.f32(args.master),
            codes1: self.i32(m.codes),
            scales1: self.f32(m.scales),
            codes2: self.i32(v.codes),
            scales2: self.f32(v.scales),
            grad: self.f32(args.grad),
            weight: self.act(args.copy),
            grad_factor: self.f32(args.clip) + 4,
            count: count as i64,
            first: args.first as i64,
            keep,
            size,
            root,
            beta1,
            beta2,
            eps,
            seed,
            reserved: 0,
        };
        self.launch(PointwiseOp::AdamW8, count, &params);
    }

    fn run_selection(&mut self, args: &KvSelect) -> Result<(), EngineError> {
        let at = self.selection_plan(args)?;
        let lists = self.query_lists(&args.lists);
        let (q_lr, k_lr) = (self.act(args.q_lr.buf), self.act(args.k_lr.buf));
        let (top_k, error_flag) = (self.i32(args.top_k), self.flag());
        let keep_mask = args.keep_mask.map(|mask| self.i32(mask));
        let launch = FineArgs {
            q_lr,
            k_lr,
            budget: top_k,
            q2k_index: Some(lists.q2k_index),
            q2k_count: lists.q2k_count,
            bitmap: None,
            scores: None,
            keep_mask,
            capped: None,
            error_flag,
        };
        // SAFETY: buffers of the arena with the plan's sizes and layouts.
        unsafe { self.selections[at].1.select(&self.stream, &launch) }.map_err(device_error)?;
        if let Some(to) = self.key_lists(&args.lists) {
            let at = self.list_plan(&args.lists.shape)?;
            // SAFETY: as above.
            unsafe { self.lists[at].invert(&self.stream, &lists, &to, error_flag) }.map_err(device_error)?;
        }
        Ok(())
    }

    /// The attention problems of a run, for its kernels and its workspace.
    fn problems(&self, dims: &Dims) -> Vec<Problem> {
        problems(dims, self.deterministic)
    }

    fn scratch_layout(&self, dims: &Dims) -> scratch::Layout {
        scratch_layout(dims, self.deterministic, self.runtime.dispatch(), self.ctas())
    }

    /// Loads every kernel a run may launch, and finds out what it cannot do.
    fn load_kernels(&mut self, dims: &Dims) -> Result<(), EngineError> {
        if !dims.dim.is_multiple_of(8) {
            return Err(EngineError::Device(format!(
                "model width {}; the kernels serve multiples of 8: --set model.heads, model.head_dim",
                dims.dim
            )));
        }
        if let Some(lists) = dims.lists.as_ref()
            && lists.kernel_lists().is_gather()
            && self.deterministic()
        {
            return Err(EngineError::Device(crate::config::no_deterministic_gather(lists.kv_block)));
        }
        for problem in self.problems(dims) {
            let layouts = AttnLayouts::bshd(&problem);
            self.runtime.attention(&problem, &layouts, None).map_err(device_error)?;
        }
        if let Some(lists) = dims.lists.as_ref().filter(|_| dims.d_lr > 0) {
            self.load_list_kernels(lists, dims.d_lr)?;
        }
        let arch = self.device().arch().map_err(device_error)?;
        // Without predictors a run has no rank.
        let rank = if dims.d_lr > 0 { served_rank(dims.d_lr)? } else { 0 };
        for &op in PointwiseOp::ALL.iter().filter(|op| rank > 0 || !op.bakes_rank()) {
            let spec = PointwiseSpec::shipped(op, dsv_spec::Dtype::Bf16, dims.head_dim as u16, rank, arch)
                .map_err(|e| EngineError::Device(format!("no kernel for {op}: {e}")))?;
            if self.kernels.iter().any(|(_, k)| *k.spec() == KernelSpec::Pointwise(spec)) {
                continue;
            }
            let kernel = self.runtime.kernels().load(&KernelSpec::Pointwise(spec)).map_err(device_error)?;
            self.kernels.retain(|(o, _)| *o != op);
            self.kernels.push((op, kernel));
        }
        Ok(())
    }
}

fn problem(
    op: AttnOp,
    shape: &AttnShape,
    lists: Option<&ListShape>,
    deterministic: Deterministic,
) -> Problem {
    let list_kind = lists.map_or(dsv_spec::Lists::Dense, ListShape::kernel_lists);
    Problem {
        op,
        dtype: dsv_spec::Dtype::Bf16,
        head_dim: shape.head_dim as u16,
        lists: list_kind,
        batch: shape.batch as u32,
        num_heads: shape.heads as u32,
        num_kv_heads: shape.heads as u32,
        seqlen_q: shape.seqlen_q as u32,
        seqlen_kv: shape.seqlen_kv as u32,
        max_selected: lists.map_or(0, |l| l.max_selected as u32),
        deterministic: if op == AttnOp::Bwd { deterministic } else { Deterministic::No },
    }
}

/// The backwards of self-attention, dense and over lists, and of cross-attention.
fn problems(dims: &Dims, deterministic: Deterministic) -> Vec<Problem> {
    let shape = AttnShape {
        batch: dims.batch,
        heads: dims.heads,
        seqlen_q: dims.seqlen,
        seqlen_kv: dims.seqlen,
        head_dim: dims.head_dim,
        scale: 1.0,
    };
    let cross = shape.to_text(dims.text_tokens, dims.text_copies);
    let backward = |shape, lists| problem(AttnOp::Bwd, shape, lists, deterministic);
    let mut problems = vec![backward(&shape, None)];
    if dims.text_tokens > 0 {
        problems.push(backward(&cross, None));
    }
    if let Some(lists) = &dims.lists {
        problems.push(backward(&shape, Some(lists)));
    }
    problems
}

/// What a run's ops take beside their operands. A problem that no kernel serves counts with the most any could take:
/// loading the kernels says that there is none.
fn scratch_layout(
    dims: &Dims,
    deterministic: Deterministic,
    dispatch: &Dispatch,
    ctas: usize,
) -> scratch::Layout {
    let workspace = |p: &Problem| {
        MemoryNeeded::chosen(p, dispatch).unwrap_or_else(|_| MemoryNeeded::of(p)).workspace as usize
    };
    let attention = problems(dims, deterministic).iter().map(workspace).max().unwrap_or(0);
    scratch::Layout::new(attention.max(scratch::op_bytes(dims, ctas)))
}

/// The low-rank width as a kernel's.
fn served_rank(d_lr: usize) -> Result<u8, EngineError> {
    let rank = space::SHIPPED_RANKS.into_iter().find(|&rank| usize::from(rank) == d_lr);
    rank.ok_or_else(|| EngineError::Device(crate::config::rank_not_served(d_lr)))
}

fn selection_problem(
    shape: &ListShape,
    d_lr: usize,
    rule: GroupRule,
    keep_own: bool,
) -> Result<SelectProblem, EngineError> {
    Ok(SelectProblem {
        rank: served_rank(d_lr)?,
        query_group: shape.query_group as u16,
        kv_block: shape.kv_block as u16,
        group_rule: rule,
        keep: Keep { first: 0, own: keep_own },
        batch: shape.batch as u32,
        num_heads: shape.heads as u32,
        seqlen_q: shape.seqlen as u32,
        seqlen_kv: shape.seqlen as u32,
        max_selected: shape.max_selected as u32,
    })
}

/// The same choice by the kernels that recompute their scores: the largest score of a unit, a number a head.
fn fine_problem(problem: &SelectProblem) -> FineProblem {
    let SelectProblem {
        rank,
        query_group,
        kv_block,
        group_rule,
        keep,
        batch,
        num_heads,
        seqlen_q,
        seqlen_kv,
        max_selected,
    } = *problem;
    FineProblem {
        rank,
        query_group,
        kv_block,
        group_rule,
        block_score: BlockScore::Max,
        budget: Budget::TopK,
        scale: 1.0,
        keep,
        batch,
        num_heads,
        seqlen_q,
        seqlen_kv,
        max_selected,
    }
}

/// A view's strides as the runtime takes them.
fn layout(view: &View) -> Layout {
    Layout { batch: view.batch_stride as i64, seq: view.seq_stride as i64, head: view.head_stride as i64 }
}

fn patches(shape: &PatchShape) -> params::Patches {
    params::Patches {
        channels: shape.channels as i32,
        latent: shape.latent.map(|n| n as i32),
        patch: shape.patch.map(|n| n as i32),
        reserved: 0,
    }
}

/// A product of plain row-major matrices.
fn plain(layout: GemmLayout, m: usize, n: usize, k: usize, c: Buf) -> Product {
    let (a_transposed, b_transposed) = match layout {
        GemmLayout::NN => (false, false),
        GemmLayout::NT => (false, true),
        GemmLayout::TN => (true, false),
    };
    Product {
        a_transposed,
        b_transposed,
        m,
        n,
        k,
        row_strides: [if a_transposed { m } else { k }, if b_transposed { k } else { n }, n],
        batch: 1,
        batch_strides: [0; 3],
        c_is_f32: c.dtype() == Dtype::F32,
        accumulate: false,
        bias: false,
    }
}

/// Rows and columns of a gated map's weight.
fn shape_of(args: &Gated) -> (usize, usize) {
    let rows = args.gate.len();
    let columns = args.weight.len() / rows;
    assert_eq!((args.weight.len(), args.bias.len()), (rows * columns, rows), "{args:?}");
    assert!(columns.is_multiple_of(8), "{columns} columns; the kernels serve multiples of 8");
    (rows, columns)
}

impl DeviceFacts for CudaEngine {
    fn name(&self) -> String {
        format!("{}, bf16", self.device().info().name)
    }

    fn precision(&self) -> Precision {
        Precision::Bf16
    }

    fn needs_inverse_lists(&self) -> bool {
        true
    }

    fn deterministic(&self) -> bool {
        self.deterministic == Deterministic::Yes
    }

    fn scratch_bytes(&self, dims: &Dims) -> usize {
        self.scratch_layout(dims).bytes
    }

    fn free_bytes(&self) -> Option<usize> {
        self.device().memory().ok().map(|(free, _)| (free as usize).saturating_sub(LIBRARIES_BYTES))
    }

    fn host_free_bytes(&self) -> Option<usize> {
        host_free_bytes()
    }

    fn sparse_cost(&self, shape: &AttnShape, query_group: usize, kv_block: usize) -> Option<SparseCost> {
        sparse_cost(self.runtime.dispatch(), shape, query_group, kv_block)
    }

    fn rates(&self) -> Option<Rates> {
        planned::rates(&self.device().info().name)
    }

    fn attention_us(&self, shape: &AttnShape, lists: Option<(&ListShape, f64)>) -> Option<f64> {
        planned::attention_us(self.runtime.dispatch(), shape, lists)
    }

    fn dispatch_table(&self) -> Option<&dsv_spec::DispatchTable> {
        self.runtime.dispatch().table()
    }
}

fn sparse_cost(
    dispatch: &Dispatch,
    shape: &AttnShape,
    query_group: usize,
    kv_block: usize,
) -> Option<SparseCost> {
    let line = dispatch.table()?.crossover(
        dsv_spec::Dtype::Bf16,
        shape.head_dim as u16,
        query_group as u16,
        kv_block as u16,
        shape.seqlen_kv as u32,
    )?;
    // More than 1: sparse never wins.
    let percent = line.crossover.unwrap_or(200.0);
    let source = format!("dispatch table at {} tokens, {} heads", line.seqlen, line.num_heads);
    Some(SparseCost { crossover_sparsity: (percent / 100.0) as f32, source })
}

impl Engine for CudaEngine {
    fn reserve(&mut self, plan: &ArenaPlan, dims: &Dims) -> Result<(), EngineError> {
        assert_eq!(plan.precision(), Precision::Bf16, "the plan was made for another precision");
        self.load_kernels(dims)?;
        // What an earlier reserve took is free for this one.
        self.stream.synchronize().map_err(device_error)?;
        self.lanes.synchronize().map_err(device_error)?;
        self.repeated.iter_mut().for_each(Vec::clear);
        self.memory = None;
        let mut layout = self.scratch_layout(dims);
        layout.bytes = layout.bytes.max(plan.scratch_bytes());
        let needed_bytes = plan.total_bytes() + layout.bytes;
        let reserve = |bytes: usize| {
            self.device()
                .alloc(bytes)
                .map_err(|e| EngineError::Reserve { needed_bytes, reason: e.to_string() })
        };
        let (arena, scratch) = (reserve(plan.total_bytes())?, reserve(layout.bytes)?);
        arena.fill(&self.stream, 0).map_err(device_error)?;
        scratch.fill(&self.stream, 0).map_err(device_error)?;
        let staging = Staging::new(self.device()).map_err(device_error)?;
        let on_host = plan.host_bytes();
        let host = self
            .device()
            .alloc_pinned(on_host)
            .map_err(|e| EngineError::ReserveHost { needed_bytes: on_host, reason: e.to_string() })?;
        self.memory = Some(Memory { arena, scratch, host, staging, layout });
        self.sync()
    }

    fn repeat(&mut self, key: &[u32], work: &mut dyn FnMut(&mut dyn Engine)) {
        let Some(known) = &mut self.repeated else { return work(self) };
        let found = known.iter().position(|(k, _)| k == key).map(|at| known.remove(at).1);
        let graph = match found {
            None => {
                work(self);
                None
            }
            Some(Repeated::Graph(graph)) => Some(graph),
            Some(Repeated::Seen) => {
                let stream = self.stream.clone();
                let before = self.error.take();
                let captured = stream.capture(|| {
                    work(self);
                    Ok(())
                });
                let failed = match (captured, self.error.take()) {
                    (Ok(graph), None) => Ok(graph),
                    (Err(e), _) => Err(e.to_string()),
                    (_, Some(e)) => Err(e.to_string()),
                };
                self.error = before;
                match failed {
                    Ok(graph) => Some(graph),
                    Err(reason) => {
                        eprintln!("device.graphs: recording failed, every op is launched instead; {reason}");
                        self.repeated = None;
                        return work(self);
                    }
                }
            }
        };
        if let Some(graph) = &graph {
            let launched = graph.launch(&self.stream).map_err(device_error);
            self.check(launched);
        }
        if let Some(known) = &mut self.repeated {
            if known.len() == MAX_GRAPHS {
                // Destroying a graph that still runs is allowed: the driver keeps it until it has.
                known.remove(0);
            }
            known.push((key.to_vec(), graph.map_or(Repeated::Seen, Repeated::Graph)));
        }
    }

    fn sync(&mut self) -> Result<(), EngineError> {
        let done = self.stream.synchronize().map_err(device_error);
        if let Some(error) = self.error.take() {
            return Err(error);
        }
        done?;
        let Some(memory) = &mut self.memory else { return Ok(()) };
        memory.staging.all_copied();
        let flag = memory.scratch.read::<i32>(&self.stream, memory.layout.flag, 1).map_err(device_error)?[0];
        if flag == 0 {
            return Ok(());
        }
        memory.scratch.write(&self.stream, memory.layout.flag, &[0i32]).map_err(device_error)?;
        match decode_error_flag(flag) {
            Ok(()) => Ok(()),
            Err(e) => {
                Err(EngineError::Flag { op: "an op since the last sync".into(), reason: e.to_string() })
            }
        }
    }

    fn write_f32(&mut self, buf: Buf, data: &[f32]) -> Result<(), EngineError> {
        assert_eq!(buf.len(), data.len(), "host data of another length");
        match buf.dtype() {
            Dtype::F32 => self.write(buf, |i| data[i]),
            Dtype::Act => self.write(buf, |i| bf16::from_f32(data[i])),
            Dtype::I32 => panic!("write_f32 to {buf:?}"),
        }
    }

    fn write_i32(&mut self, buf: Buf, data: &[i32]) -> Result<(), EngineError> {
        assert_eq!((buf.dtype(), buf.len()), (Dtype::I32, data.len()), "host data of another type or length");
        self.write(buf, |i| data[i])
    }

    fn read_f32(&mut self, buf: Buf) -> Result<Vec<f32>, EngineError> {
        self.sync()?;
        if buf.space() == Space::Host {
            assert_eq!(buf.dtype(), Dtype::F32, "read_f32 of {buf:?}");
            return self.host_elements::<f32>(buf).map(|values| values.to_vec());
        }
        let arena = &self.memory().arena;
        match buf.dtype() {
            Dtype::F32 => arena.read(&self.stream, buf.offset_bytes(), buf.len()).map_err(device_error),
            Dtype::Act => {
                let values: Vec<bf16> =
                    arena.read(&self.stream, buf.offset_bytes(), buf.len()).map_err(device_error)?;
                Ok(values.into_iter().map(bf16::to_f32).collect())
            }
            Dtype::I32 => panic!("read_f32 of {buf:?}"),
        }
    }

    fn read_i32(&mut self, buf: Buf) -> Result<Vec<i32>, EngineError> {
        self.sync()?;
        assert_eq!((buf.dtype(), buf.space()), (Dtype::I32, Space::Device), "{buf:?}");
        self.memory().arena.read(&self.stream, buf.offset_bytes(), buf.len()).map_err(device_error)
    }

    fn offload(&mut self, from: Buf, to: Buf) -> Done {
        assert_eq!(
            (from.len(), from.dtype()),
            (to.len(), to.dtype()),
            "a copy between arenas converts nothing"
        );
        let (address, range) = (self.address(from), self.on_host(to));
        let memory = self.memory.as_mut().expect("reserve() comes before any op");
        // SAFETY: both ranges lie in arenas whose freeing waits for the GPU; the rest is the trait's rule for its callers.
        let queued = unsafe {
            self.lanes.offload(self.runtime.device(), &self.stream, address, (&mut memory.host, range))
        };
        self.done(queued)
    }

    fn fetch(&mut self, from: Buf, to: Buf) -> Done {
        assert_eq!(
            (from.len(), from.dtype()),
            (to.len(), to.dtype()),
            "a copy between arenas converts nothing"
        );
        let (range, address) = (self.on_host(from), self.address(to));
        let memory = self.memory.as_ref().expect("reserve() comes before any op");
        // SAFETY: as in `offload`.
        let queued =
            unsafe { self.lanes.fetch(self.runtime.device(), &self.stream, (&memory.host, range), address) };
        self.done(queued)
    }

    fn after(&mut self, done: &Done) {
        if let DoneAt::Event(event) = &done.0 {
            let waits = self.lanes.wait(self.runtime.device(), &self.stream, event).map_err(device_error);
            self.check(waits);
        }
    }

    fn beside(&mut self, work: &mut dyn FnMut(&mut dyn Engine)) -> Done {
        let begins = mark(self.device(), &self.stream).and_then(|begin| self.lanes.side.wait(&begin));
        self.check(begins.map_err(device_error));
        assert!(!self.lanes.beside, "ops beside ops beside ops");
        std::mem::swap(&mut self.stream, &mut self.lanes.side);
        self.lanes.beside = true;
        work(self);
        let end = mark(self.device(), &self.stream);
        self.lanes.beside = false;
        std::mem::swap(&mut self.stream, &mut self.lanes.side);
        self.done(end)
    }

    fn transfers(&mut self) -> Transfers {
        let sums = self.lanes.take_sums().map_err(device_error);
        self.check(sums).unwrap_or_default()
    }

    fn fill(&mut self, dst: Buf, value: f32) {
        if dst.space() == Space::Host {
            assert_eq!(dst.dtype(), Dtype::F32, "fill of {dst:?}");
            let filled = self.host_elements::<f32>(dst).map(|values| values.fill(value));
            self.check(filled);
            return;
        }
        let answer = if value == 0.0 && value.is_sign_positive() {
            let address = self.address(dst);
            // SAFETY: the range lies in the arena (checked by `address`).
            unsafe { self.stream.fill(address, 0, dst.bytes()) }.map_err(device_error)
        } else {
            // Only at initialisation: from the host.
            match dst.dtype() {
                Dtype::I32 => self.write_i32(dst, &vec![value as i32; dst.len()]),
                _ => self.write_f32(dst, &vec![value; dst.len()]),
            }
        };
        self.check(answer);
    }

    fn copy(&mut self, src: Buf, dst: Buf) {
        assert_eq!(src.len(), dst.len(), "copy of different lengths");
        assert!(!src.overlaps(&dst), "op writes {dst:?} and also uses {src:?}");
        if src.dtype() == dst.dtype() {
            let (from, to) = (self.address(src), self.address(dst));
            // SAFETY: both ranges lie in the arena and do not overlap.
            let answer = unsafe { self.stream.copy(to, from, src.bytes()) }.map_err(device_error);
            self.check(answer);
            return;
        }
        let params = params::Cast { src: self.flat(src), dst: self.flat(dst), count: src.len() as i64 };
        self.launch(PointwiseOp::Cast, src.len(), &params);
    }

    fn axpy(&mut self, alpha: f32, x: Buf, y: Buf) {
        assert_eq!(x.len(), y.len(), "axpy of different lengths");
        let params =
            params::Axpy { x: self.flat(x), y: self.flat(y), count: x.len() as i64, alpha, reserved: 0 };
        self.launch(PointwiseOp::Axpy, x.len(), &params);
    }

    fn add_rows(&mut self, rows: usize, a: Buf, b: Buf, out: Buf) {
        assert_eq!((a.len(), out.len()), (rows * b.len(), rows * b.len()), "add_rows of {rows} rows");
        if out.is_empty() {
            return;
        }
        let params = params::AddRows {
            a: self.flat(a),
            b: self.flat(b),
            out: self.flat(out),
            rows: rows as i64,
            columns: b.len() as i64,
        };
        let grid = [self.strided(b.len(), 8), rows.min(65_535), 1];
        self.launch_with(PointwiseOp::AddRows, grid, &params);
    }

    fn sum_rows(&mut self, rows: usize, src: Buf, dst: Buf) {
        assert_eq!(src.len(), rows * dst.len(), "sum_rows of {rows} rows");
        let to = params::SumRows {
            src: self.flat(src),
            dst: self.f32(dst),
            rows: rows as i64,
            columns: dst.len() as i64,
            row_stride: dst.len() as i64,
            accumulate: 1,
            factor: 1.0,
            ..Default::default()
        };
        self.reduce(1, to);
    }

    fn gemm(&mut self, g: &Gemm) {
        let out = match g.epilogue {
            Epilogue::None => g.c,
            Epilogue::Gelu { pre } => pre,
        };
        assert!(!g.accumulate || g.epilogue == Epilogue::None, "an epilogue cannot accumulate");
        assert!(g.add.is_none() || g.epilogue == Epilogue::None && !g.accumulate, "one sum a product: {g:?}");
        assert!(
            g.add.is_none_or(|add| (add.len(), add.dtype()) == (g.m * g.n, out.dtype())),
            "residual of {g:?}"
        );
        assert_eq!((g.a.len(), g.b.len(), out.len()), (g.m * g.k, g.k * g.n, g.m * g.n), "operands of {g:?}");
        let mut product = plain(g.layout, g.m, g.n, g.k, out);
        product.accumulate = g.accumulate || g.add.is_some();
        product.bias = g.bias.is_some() && !product.c_is_f32;
        let operands = Operands {
            a: self.act(g.a),
            b: self.act(g.b),
            c: self.address(out),
            add: g.add.map(|add| self.address(add)),
            bias: g.bias.filter(|_| product.bias).map(|bias| self.act(bias)),
        };
        self.multiply(&product, &operands);
        if let Some(bias) = g.bias.filter(|_| !product.bias) {
            self.add_rows(g.m, out, bias, out);
        }
        if let Epilogue::Gelu { pre } = g.epilogue {
            self.mlp_act_fwd(MlpAct::Gelu, g.m, g.n, pre, g.c);
        }
    }

    fn norm_mod_fwd(&mut self, args: &NormMod, out: Buf) {
        let rows = args.batch * args.seqlen;
        assert_eq!((args.x.len(), out.len()), (rows * args.dim, rows * args.dim), "{args:?}");
        let params = params::NormModFwd {
            x: self.act(args.x),
            out: self.act(out),
            modulation: self.f32(args.modulation),
            mean: self.f32(args.mean),
            rstd: self.f32(args.rstd),
            batch: args.batch as i32,
            seqlen: args.seqlen as i32,
            dim: args.dim as i32,
            chunks: args.chunks as i32,
            shift: args.shift as i32,
            scale: args.scale as i32,
            eps: args.eps,
            reserved: 0,
        };
        self.launch_with(PointwiseOp::NormModFwd, [rows.div_ceil(8), 1, 1], &params);
    }

    fn norm_mod_bwd(&mut self, args: &NormMod, d_out: Buf, d_x: Buf, d_modulation: Buf) {
        let NormMod { batch, seqlen, dim, chunks, .. } = *args;
        let ctas = self.ctas().div_ceil(batch);
        let (rows_per_chunk, parts) = scratch::chunks(seqlen, ctas);
        let Some([partial]) = self.take("norm_mod_bwd", [4 * batch * parts * 2 * dim]) else { return };
        let params = params::NormModBwd {
            x: self.act(args.x),
            d_out: self.act(d_out),
            d_x: self.act(d_x),
            modulation: self.f32(args.modulation),
            mean: self.f32(args.mean),
            rstd: self.f32(args.rstd),
            partial,
            batch: batch as i32,
            seqlen: seqlen as i32,
            dim: dim as i32,
            chunks: chunks as i32,
            scale: args.scale as i32,
            rows_per_chunk: rows_per_chunk as i32,
        };
        self.launch_with(PointwiseOp::NormModBwd, [parts, batch, 1], &params);
        let d_modulation = self.f32(d_modulation);
        for (part, chunk) in [args.shift, args.scale].into_iter().enumerate() {
            self.reduce_partials(
                partial + (4 * part * dim) as u64,
                [batch, parts, 2 * dim, dim],
                d_modulation + (4 * chunk * dim) as u64,
                chunks * dim,
                false,
                1.0,
            );
        }
    }

    fn gate_weight(&mut self, args: &Gated, gated_weight: Buf, gated_bias: Buf) {
        let (rows, columns) = shape_of(args);
        assert_eq!((gated_weight.len(), gated_bias.len()), (args.weight.len(), rows), "{args:?}");
        let params = params::GateWeight {
            weight: self.act(args.weight),
            bias: self.act(args.bias),
            gate: self.f32(args.gate),
            gated_weight: self.act(gated_weight),
            gated_bias: self.act(gated_bias),
            columns: columns as i32,
            reserved: 0,
        };
        self.launch_with(PointwiseOp::GateWeight, [rows, 1, 1], &params);
    }

    fn gate_grad(&mut self, args: &Gated, grad: &GatedGrad) {
        let (rows, columns) = shape_of(args);
        let lens =
            [grad.product.len(), grad.d_weight.len(), grad.sum.len(), grad.d_bias.len(), grad.d_gate.len()];
        assert_eq!(lens, [rows * columns, rows * columns, rows, rows, rows], "{grad:?} of {args:?}");
        let params = params::GateGrad {
            product: self.f32(grad.product),
            sum: self.f32(grad.sum),
            weight: self.act(args.weight),
            bias: self.act(args.bias),
            gate: self.f32(args.gate),
            d_weight: self.f32(grad.d_weight),
            d_bias: self.f32(grad.d_bias),
            d_gate: self.f32(grad.d_gate),
            columns: columns as i32,
            reserved: 0,
        };
        self.launch_with(PointwiseOp::GateGrad, [rows, 1, 1], &params);
    }

    fn qk_prep_fwd(&mut self, args: &QkPrep, q: Buf, k: Buf) {
        let params = params::QkPrepFwd {
            qkv: self.act(args.qkv),
            weight: [self.act(args.q_weight), self.act(args.k_weight)],
            cosine: self.f32(args.cos),
            sine: self.f32(args.sin),
            out: [self.act(q), self.act(k)],
            rstd: [self.f32(args.q_rstd), self.f32(args.k_rstd)],
            batch: args.batch as i32,
            seqlen: args.seqlen as i32,
            heads: args.heads as i32,
            head_dim: args.head_dim as i32,
            eps: args.eps,
            reserved: 0,
        };
        self.launch_with(PointwiseOp::QkPrepFwd, [args.batch * args.seqlen, 1, 1], &params);
    }

    fn qk_prep_bwd(
        &mut self,
        args: &QkPrep,
        d_q: Buf,
        d_k: Buf,
        d_qkv: Buf,
        d_q_weight: Buf,
        d_k_weight: Buf,
    ) {
        let dim = args.head_dim;
        let (rows_per_chunk, parts) = scratch::chunks(args.batch * args.seqlen, self.ctas());
        let Some([partial]) = self.take("qk_prep_bwd", [4 * parts * 2 * dim]) else { return };
        let params = params::QkPrepBwd {
            qkv: self.act(args.qkv),
            weight: [self.act(args.q_weight), self.act(args.k_weight)],
            cosine: self.f32(args.cos),
            sine: self.f32(args.sin),
            rstd: [self.f32(args.q_rstd), self.f32(args.k_rstd)],
            d_out: [self.act(d_q), self.act(d_k)],
            d_qkv: self.act(d_qkv),
            partial,
            batch: args.batch as i32,
            seqlen: args.seqlen as i32,
            heads: args.heads as i32,
            head_dim: dim as i32,
            rows_per_chunk: rows_per_chunk as i32,
            reserved: 0,
        };
        self.launch_with(PointwiseOp::QkPrepBwd, [parts, 1, 1], &params);
        for (part, weight) in [d_q_weight, d_k_weight].into_iter().enumerate() {
            let dst = self.f32(weight);
            let from = partial + (4 * part * dim) as u64;
            self.reduce_partials(from, [1, parts, 2 * dim, dim], dst, 0, true, 1.0);
        }
    }

    fn attn_fwd(&mut self, args: &AttnFwd) {
        let answer = self.run_attention_fwd(args);
        self.check(answer);
    }

    fn attn_bwd(&mut self, args: &AttnBwd) {
        let answer = self.run_attention_bwd(args);
        self.check(answer);
    }

    fn mlp_act_fwd(&mut self, act: MlpAct, rows: usize, hidden: usize, pre: Buf, out: Buf) {
        assert_eq!((pre.len(), out.len()), (rows * act.pre_width(hidden), rows * hidden), "mlp_act_fwd");
        assert!(hidden.is_multiple_of(8), "{hidden} columns; the kernel serves multiples of 8");
        let params = params::MlpActFwd {
            pre: self.act(pre),
            out: self.act(out),
            rows: rows as i64,
            hidden: hidden as i32,
            is_glu: i32::from(act == MlpAct::GeGlu),
        };
        self.launch(PointwiseOp::MlpActFwd, rows * hidden, &params);
    }

    fn mlp_act_bwd(&mut self, act: MlpAct, rows: usize, hidden: usize, pre: Buf, out: Buf, d_bias: Buf) {
        let width = act.pre_width(hidden);
        assert_eq!((pre.len(), d_bias.len(), out.len()), (rows * width, width, rows * hidden), "mlp_act_bwd");
        assert!(hidden.is_multiple_of(8), "{hidden} columns; the kernel serves multiples of 8");
        let (rows_per_chunk, parts) = scratch::mlp_chunks(rows, hidden, self.ctas());
        let Some([partial]) = self.take("mlp_act_bwd", [4 * parts * width]) else { return };
        let params = params::MlpActBwd {
            pre: self.act(pre),
            out: self.act(out),
            partial,
            rows: rows as i64,
            hidden: hidden as i32,
            is_glu: i32::from(act == MlpAct::GeGlu),
            rows_per_chunk: rows_per_chunk as i32,
            reserved: 0,
        };
        let tiles = hidden.div_ceil(scratch::MLP_COLUMNS);
        self.launch_with(PointwiseOp::MlpActBwd, [tiles, parts, 1], &params);
        let dst = self.f32(d_bias);
        self.reduce_partials(partial, [1, parts, width, width], dst, 0, true, 1.0);
    }

    fn silu_fwd(&mut self, x: Buf, out: Buf) {
        assert_eq!(x.len(), out.len(), "silu_fwd of different lengths");
        let params = params::SiluFwd { x: self.flat(x), out: self.flat(out), count: x.len() as i64 };
        self.launch(PointwiseOp::SiluFwd, x.len(), &params);
    }

    fn silu_bwd(&mut self, x: Buf, d_out: Buf, d_x: Buf) {
        assert_eq!((x.len(), d_out.len()), (d_x.len(), d_x.len()), "silu_bwd of different lengths");
        let params = params::SiluBwd {
            x: self.flat(x),
            d_out: self.flat(d_out),
            d_x: self.flat(d_x),
            count: x.len() as i64,
        };
        self.launch(PointwiseOp::SiluBwd, x.len(), &params);
    }

    fn time_embed(&mut self, t: Buf, width: usize, out: Buf) {
        assert_eq!(out.len(), t.len() * width, "time_embed of {} times", t.len());
        let params = params::TimeEmbed {
            t: self.f32(t),
            out: self.act(out),
            batch: t.len() as i32,
            width: width as i32,
        };
        self.launch(PointwiseOp::TimeEmbed, t.len() * width, &params);
    }

    fn flow_prepare(&mut self, args: &FlowPrepare) {
        let shape = &args.shape;
        let count = shape.tokens() * shape.width();
        assert_eq!(
            (args.x_t.len(), args.target.len(), args.latents.len(), args.order.len()),
            (shape.batch * count, shape.batch * count, shape.batch * shape.latent_len(), shape.tokens()),
            "{args:?}"
        );
        let params = params::FlowPrepare {
            latents: self.f32(args.latents),
            order: self.i32(args.order),
            t: self.f32(args.t),
            keys: self.i32(args.keys),
            x_t: self.act(args.x_t),
            target: self.f32(args.target),
            patches: patches(shape),
            batch: shape.batch as i32,
            reserved: 0,
        };
        self.launch_per(PointwiseOp::FlowPrepare, count, shape.batch, &params);
    }

    fn flow_loss(&mut self, args: &FlowLoss) {
        let FlowLoss { batch, per_element, .. } = *args;
        assert_eq!(
            (args.pred.len(), args.target.len(), args.loss.len()),
            (batch * per_element, batch * per_element, batch),
            "{args:?}"
        );
        let ctas = self.strided(per_element, 8);
        let Some([partial]) = self.take("flow_loss", [4 * batch * ctas]) else { return };
        let params = params::FlowLoss {
            pred: self.act(args.pred),
            target: self.f32(args.target),
            d_pred: args.d_pred.map_or(0, |d| self.act(d)),
            partial,
            per_element: per_element as i64,
            gradient_factor: (2.0 * f64::from(args.weight) / (batch * per_element) as f64) as f32,
            reserved: 0,
        };
        self.launch_with(PointwiseOp::FlowLoss, [ctas, batch, 1], &params);
        let loss = self.f32(args.loss);
        let factor = (1.0 / per_element as f64) as f32;
        self.reduce_partials(partial, [batch, ctas, 1, 1], loss, 1, false, factor);
    }

    fn normal(&mut self, keys: Buf, dst: Buf) {
        let params = params::Normal { keys: self.i32(keys), dst: self.f32(dst), count: dst.len() as i64 };
        self.launch(PointwiseOp::Normal, dst.len(), &params);
    }

    fn unpatchify(&mut self, shape: &PatchShape, order: Buf, tokens: Buf, latents: Buf) {
        let count = shape.tokens() * shape.width();
        assert_eq!(
            (order.len(), tokens.len(), latents.len()),
            (shape.tokens(), shape.batch * count, shape.batch * shape.latent_len()),
            "{shape:?}"
        );
        let params = params::Unpatchify {
            order: self.i32(order),
            tokens: self.f32(tokens),
            latents: self.f32(latents),
            patches: patches(shape),
            batch: shape.batch as i32,
            reserved: 0,
        };
        self.launch_per(PointwiseOp::Unpatchify, count, shape.batch, &params);
    }

    fn text_select_fwd(&mut self, args: &TextSelect, text: Buf, null: Buf, out: Buf) {
        let all = args.batch * args.per_element;
        assert_eq!((text.len(), out.len(), null.len()), (all, all, args.per_element), "{args:?}");
        let params = params::TextSelectFwd {
            text: self.act(text),
            null: self.act(null),
            out: self.act(out),
            drop: self.i32(args.drop),
            per_element: args.per_element as i64,
        };
        self.launch_per(PointwiseOp::TextSelectFwd, args.per_element, args.batch, &params);
    }

    fn text_select_bwd(&mut self, args: &TextSelect, d_out: Buf, d_null: Buf) {
        assert_eq!(
            (d_out.len(), d_null.len()),
            (args.batch * args.per_element, args.per_element),
            "{args:?}"
        );
        let params = params::TextSelectBwd {
            d_out: self.flat(d_out),
            drop: self.i32(args.drop),
            d_null: self.f32(d_null),
            per_element: args.per_element as i64,
            batch: args.batch as i32,
            reserved: 0,
        };
        self.launch(PointwiseOp::TextSelectBwd, args.per_element, &params);
    }

    fn rope(&mut self, args: &Rope, x: Buf, inverse: bool) {
        let count = args.batch * args.seqlen * args.vectors * args.dim;
        assert_eq!(x.len(), count, "{args:?}");
        let params = params::Rope {
            x: self.act(x),
            cosine: self.f32(args.cos),
            sine: self.f32(args.sin),
            batch: args.batch as i32,
            seqlen: args.seqlen as i32,
            vectors: args.vectors as i32,
            dim: args.dim as i32,
            inverse: i32::from(inverse),
            reserved: 0,
        };
        self.launch(PointwiseOp::Rope, count / 2, &params);
    }

    fn kv_select(&mut self, args: &KvSelect) {
        let answer = self.run_selection(args);
        self.check(answer);
    }

    fn gram_loss(&mut self, args: &GramLoss) {
        let AttnShape { batch, heads, seqlen_q: seqlen, head_dim, scale, .. } = args.shape;
        let rank = args.d_lr;
        assert_eq!(args.shape.seqlen_kv, seqlen, "{args:?}");
        let slabs = batch * heads;
        let multiprocessors = self.device().info().multiprocessors as usize;
        let plan = GramPlan::new([batch, heads, seqlen, head_dim, rank], multiprocessors);
        let Some(taken) = self.take("gram_loss", plan.floats.map(|n| 4 * n)) else { return };
        let [sum_parts, sums, weight_parts, weights, loss] = taken;
        let [of_sums, of_query, of_key] = plan.splits;

        let low = |buf: Buf, part: usize| View::packed(buf, 2, part, seqlen, heads, rank);
        let (q_lr, k_lr) = (low(args.lowrank, 0), low(args.lowrank, 1));
        let (rows_per_cta, parts) = of_sums;
        let of_keys = params::GramSums {
            k: self.view(&args.k),
            k_lr: self.view(&k_lr),
            partial: sum_parts,
            num_heads: heads as i32,
            seqlen: seqlen as i32,
            rows_per_cta: rows_per_cta as i32,
            reserved: 0,
        };
        self.launch_with(
            PointwiseOp::GramSums,
            [parts, heads, batch * params::gram_slices(head_dim)],
            &of_keys,
        );
        let columns = plan.record;
        self.reduce_partials(sum_parts, [slabs, parts, columns, columns], sums, columns, false, 1.0);

        let (rows_per_cta, parts) = of_query;
        let query = params::GramQuery {
            q: self.view(&args.q),
            q_lr: self.view(&q_lr),
            d_q_lr: self.view(&low(args.d_lowrank, 0)),
            sums,
            weights: weight_parts,
            loss,
            num_heads: heads as i32,
            seqlen: seqlen as i32,
            rows_per_cta: rows_per_cta as i32,
            scale,
            gradient_factor: (f64::from(args.weight) / (slabs * seqlen) as f64) as f32,
            reserved: 0,
        };
        let sharing = params::gram_slices(head_dim) * rank / 16;
        self.launch_with(PointwiseOp::GramQuery, [parts, heads, batch * sharing], &query);
        let columns = plan.weights;
        self.reduce_partials(weight_parts, [slabs, parts, columns, columns], weights, columns, false, 1.0);
        let loss_parts = batch * parts;

        let (_, parts) = of_key;
        let key = params::GramKey {
            k: self.view(&args.k),
            k_lr: self.view(&k_lr),
            d_k_lr: self.view(&low(args.d_lowrank, 1)),
            weights,
            sums,
            loss_partial: loss,
            loss: self.f32(args.loss),
            num_heads: heads as i32,
            seqlen: seqlen as i32,
            rows_per_chunk: of_sums.0 as i32,
            loss_parts: loss_parts as i32,
            loss_factor: (1.0 / (batch * seqlen) as f64) as f32,
            reserved: 0,
        };
        self.launch_with(PointwiseOp::GramKey, [parts, heads, batch], &key);
    }

    fn profile(&mut self, args: &Profile) {
        let shape = &args.shape;
        let AttnShape { batch, heads, seqlen_q, seqlen_kv, scale, .. } = *shape;
        let samples = args.samples.len();
        if samples == 0 {
            return;
        }
        assert!(seqlen_kv <= 1 << 22, "profile of {seqlen_kv} keys; the kernel counts up to 4,194,304");
        let rows = batch * samples;
        let Some([needed, covered, recall]) = self.take("profile", [4 * rows * heads; 3]) else { return };
        let (index, count, lists) = match &args.lists {
            Some(ProfiledLists { lists, .. }) => {
                (self.i32(lists.q2k_index), self.i32(lists.q2k_count), Some(lists.shape))
            }
            None => (0, 0, None),
        };
        let row_params = params::Profile {
            q: self.view(&args.q),
            k: self.view(&args.k),
            samples: self.i32(args.samples),
            lse: args.lse.map_or(0, |lse| self.f32(lse)),
            q2k_index: index,
            q2k_count: count,
            needed,
            covered: if lists.is_some() { covered } else { 0 },
            recall: if lists.is_some() { recall } else { 0 },
            error_flag: self.flag(),
            num_samples: samples as i32,
            num_heads: heads as i32,
            seqlen_q: seqlen_q as i32,
            seqlen_kv: seqlen_kv as i32,
            num_groups: lists.map_or(0, |l| l.groups() as i32),
            query_group: lists.map_or(0, |l| l.query_group as i32),
            kv_block: lists.map_or(0, |l| l.kv_block as i32),
            max_selected: lists.map_or(0, |l| l.max_selected as i32),
            scale_log2: (f64::from(scale) * std::f64::consts::LOG2_E) as f32,
            theta: args.theta,
        };
        self.launch_with(PointwiseOp::Profile, [samples.div_ceil(8), heads, batch], &row_params);
        let factor = (1.0 / rows as f64) as f32;
        let dst = self.f32(args.needed);
        self.reduce_partials(needed, [1, rows, heads, heads], dst, 0, false, factor);
        if let Some(ProfiledLists { covered: to_covered, recall: to_recall, .. }) = args.lists {
            for (from, to) in [(covered, to_covered), (recall, to_recall)] {
                let dst = self.f32(to);
                self.reduce_partials(from, [1, rows, heads, heads], dst, 0, false, factor);
            }
        }
    }

    fn grad_norm(&mut self, args: &GradNorm) {
        let count = args.grad.len();
        let parts = self.strided(count, 8);
        let Some([partial, culprit]) = self.take("grad_norm", [8 * parts, 4 * parts]) else { return };
        let sums = params::GradNorm {
            grad: self.f32(args.grad),
            segments: self.i32(args.segments),
            partial,
            culprit,
            count: count as i64,
            tensors: args.segments.len().saturating_sub(1) as i32,
            segment_unit: PARAM_ALIGN as i32,
        };
        self.launch_with(PointwiseOp::GradNorm, [parts, 1, 1], &sums);
        let clip = params::GradClip {
            partial,
            partial_culprit: culprit,
            clip: self.f32(args.clip),
            culprit: self.i32(args.culprit),
            parts: parts as i32,
            max_norm: args.max_norm,
        };
        self.launch_with(PointwiseOp::GradClip, [1, 1, 1], &clip);
    }

    fn adamw(&mut self, args: &AdamW) {
        let count = args.master.len();
        assert_eq!([args.grad.len(), args.copy.len()], [count; 2], "adamw of different lengths: {args:?}");
        let (m, v) = match args.moments {
            Moments::Full { m, v } => (m, v),
            Moments::Coded { m, v } => return self.adamw_coded(args, m, v),
        };
        assert_eq!([m.len(), v.len()], [count; 2], "adamw of different lengths: {args:?}");
        let power = i32::try_from(args.step).unwrap_or(i32::MAX);
        let correction = |beta: f32| (1.0 - f64::from(beta).powi(power)) as f32;
        let params = params::AdamW {
            master: self.f32(args.master),
            moment1: self.f32(m),
            moment2: self.f32(v),
            grad: self.f32(args.grad),
            weight: self.act(args.copy),
            grad_factor: self.f32(args.clip) + 4,
            count: count as i64,
            lr: args.lr,
            beta1: args.beta1,
            beta2: args.beta2,
            eps: args.eps,
            weight_decay: args.weight_decay,
            bias_correction1: correction(args.beta1),
            bias_correction2: correction(args.beta2),
            reserved: 0,
        };
        self.launch(PointwiseOp::AdamW, count, &params);
    }

    fn ema(&mut self, decay: f32, master: Buf, ema: Buf) {
        assert_eq!(master.len(), ema.len(), "ema of different lengths");
        let params = params::Ema {
            master: self.f32(master),
            ema: self.f32(ema),
            count: master.len() as i64,
            decay,
            reserved: 0,
        };
        self.launch(PointwiseOp::Ema, master.len(), &params);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_gpu_that_is_not_there_is_an_error_with_the_next_command() {
        // Without a driver, and with fewer GPUs than that.
        let Err(error) = CudaEngine::open(&CudaOptions { index: 4711, ..CudaOptions::default() }) else {
            panic!("GPU 4711 exists")
        };
        let text = error.to_string();
        assert!(text.contains("index 4711") && text.contains("device.kind=cpu"), "{text}");
    }

    #[test]
    fn auto_takes_the_cpu_where_there_is_no_such_gpu() {
        let device = crate::config::Device {
            kind: crate::config::DeviceKind::Auto,
            index: 4711,
            table: None,
            bundle: None,
            graphs: false,
        };
        let engine = open(&device, false).unwrap();
        assert!(engine.name().contains("CPU"), "{}", engine.name());
    }

    #[test]
    fn a_low_rank_the_kernels_do_not_serve_is_refused_with_the_setting() {
        let shape =
            ListShape { batch: 1, heads: 1, seqlen: 64, query_group: 64, kv_block: 64, max_selected: 1 };
        let error = selection_problem(&shape, 8, GroupRule::Centre, false).unwrap_err().to_string();
        assert!(error.contains("dsv.rank is 8") && error.contains("SHIPPED_RANKS"), "{error}");
    }
}
