//! The CPU engine: every op by `dsv-reference`, in f32 for training without a GPU, in f64 for gradient
//! tests. Synchronous; the same bits on any number of threads.

use super::*;
use dsv_reference::attention::{self, AttnGrads, AttnInputs, AttnOutput, KvLists, Layout};
use dsv_reference::layers::eight_bits;
use dsv_reference::layers::{
    self, GateInputs, Math, MlpForm, ModDims, PatchDims, QkDims, QkInputs, Transpose,
};
use dsv_reference::lists::ListDims;
use dsv_reference::predictor::{PredictorInputs, gram};
use dsv_reference::profile::{HeadProfile, profile_rows, summarise};
use dsv_reference::select::{self, SelectError};
use std::time::Instant;

/// A number the CPU engine can compute in.
pub trait CpuReal: Math + Plain + From<f32> + std::fmt::Debug {
    /// Width of the engine's types.
    const PRECISION: Precision;
    /// Attention forward.
    fn attn_fwd(
        shape: &attention::AttnShape,
        inputs: &AttnInputs<'_, Self>,
        lists: Option<&KvLists<'_>>,
    ) -> Result<AttnOutput<Self>, String>;
    /// Attention backward.
    fn attn_bwd(
        shape: &attention::AttnShape,
        inputs: &AttnInputs<'_, Self>,
        lists: Option<&KvLists<'_>>,
        out: &attention::View<'_, Self>,
        lse: &[Self],
        d_out: &attention::View<'_, Self>,
    ) -> Result<AttnGrads<Self>, String>;
    /// Scores of every group's blocks.
    fn scores(
        dims: &ListDims,
        rank: usize,
        q_lr: &attention::View<'_, Self>,
        k_lr: &attention::View<'_, Self>,
        rule: GroupRule,
    ) -> Result<Vec<Self>, SelectError>;
}

impl CpuReal for f32 {
    const PRECISION: Precision = Precision::F32;
    fn attn_fwd(
        shape: &attention::AttnShape,
        inputs: &AttnInputs<'_, f32>,
        lists: Option<&KvLists<'_>>,
    ) -> Result<AttnOutput<f32>, String> {
        attention::tiled::forward(shape, inputs, lists).map_err(|e| e.to_string())
    }
    fn attn_bwd(
        shape: &attention::AttnShape,
        inputs: &AttnInputs<'_, f32>,
        lists: Option<&KvLists<'_>>,
        out: &attention::View<'_, f32>,
        lse: &[f32],
        d_out: &attention::View<'_, f32>,
    ) -> Result<AttnGrads<f32>, String> {
        attention::tiled::backward(shape, inputs, lists, out, lse, d_out, None).map_err(|e| e.to_string())
    }
    fn scores(
        dims: &ListDims,
        rank: usize,
        q_lr: &attention::View<'_, f32>,
        k_lr: &attention::View<'_, f32>,
        rule: GroupRule,
    ) -> Result<Vec<f32>, SelectError> {
        select::scores_f32(dims, rank, q_lr, k_lr, rule)
    }
}

impl CpuReal for f64 {
    const PRECISION: Precision = Precision::F64;
    fn attn_fwd(
        shape: &attention::AttnShape,
        inputs: &AttnInputs<'_, f64>,
        lists: Option<&KvLists<'_>>,
    ) -> Result<AttnOutput<f64>, String> {
        attention::oracle::forward(shape, inputs, lists).map_err(|e| e.to_string())
    }
    fn attn_bwd(
        shape: &attention::AttnShape,
        inputs: &AttnInputs<'_, f64>,
        lists: Option<&KvLists<'_>>,
        _out: &attention::View<'_, f64>,
        _lse: &[f64],
        d_out: &attention::View<'_, f64>,
    ) -> Result<AttnGrads<f64>, String> {
        attention::oracle::backward(shape, inputs, lists, d_out, None).map_err(|e| e.to_string())
    }
    fn scores(
        dims: &ListDims,
        rank: usize,
        q_lr: &attention::View<'_, f64>,
        k_lr: &attention::View<'_, f64>,
        rule: GroupRule,
    ) -> Result<Vec<f64>, SelectError> {
        select::scores_f64(dims, rank, q_lr, k_lr, rule, None)
    }
}

#[derive(Clone, Copy)]
#[repr(C, align(256))]
struct Line([u8; arena::ALIGN_BYTES]);

/// One of the arenas.
struct Memory {
    lines: Vec<Line>,
    space: Space,
}

impl Memory {
    /// Zeroed memory.
    fn reserve(space: Space, bytes: usize) -> Result<Memory, String> {
        let count = bytes / arena::ALIGN_BYTES;
        let mut lines = Vec::new();
        lines.try_reserve_exact(count).map_err(|e| e.to_string())?;
        lines.resize(count, Line([0; arena::ALIGN_BYTES]));
        Ok(Memory { lines, space })
    }

    fn bytes(&self) -> usize {
        self.lines.len() * arena::ALIGN_BYTES
    }

    fn as_bytes(&self) -> &[u8] {
        // SAFETY: lines are arrays of bytes, one after the other.
        unsafe { std::slice::from_raw_parts(self.lines.as_ptr().cast(), self.bytes()) }
    }

    fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: as above, and borrowed exclusively.
        unsafe { std::slice::from_raw_parts_mut(self.lines.as_mut_ptr().cast(), self.bytes()) }
    }

    fn pointer<U>(&self, buf: Buf) -> *const U {
        assert_eq!(buf.space(), self.space, "{buf:?}: ops work on the device alone");
        assert!(
            buf.offset_bytes() + buf.bytes() <= self.bytes(),
            "buffer ends at byte {} of an arena of {} (reserve() comes first)",
            buf.offset_bytes() + buf.bytes(),
            self.bytes()
        );
        assert_eq!(buf.elem_bytes(), size_of::<U>(), "{:?} buffer read as another type", buf.dtype());
        self.lines.as_ptr().cast::<u8>().wrapping_add(buf.offset_bytes()).cast()
    }

    /// Reads of `U` (any bit pattern of i32, f32 and f64 is a value).
    fn read<U: Plain>(&self, buf: Buf) -> &[U] {
        let pointer = self.pointer::<U>(buf);
        // SAFETY: `pointer` checked that the range lies in the arena and that U has the buffer's width; offsets are
        // multiples of the element width from a 256-byte-aligned base; the arena is initialised (zeroed) and
        // borrowed for the result's life.
        unsafe { std::slice::from_raw_parts(pointer, buf.len()) }
    }

    /// Several ranges at once: any number read, and pairwise disjoint ones written.
    fn split<U: Plain, const R: usize, const W: usize>(
        &mut self,
        reads: [Buf; R],
        writes: [Buf; W],
    ) -> ([&[U]; R], [&mut [U]; W]) {
        for (i, w) in writes.iter().enumerate() {
            let clash = reads.iter().chain(&writes[i + 1..]).find(|other| w.overlaps(other));
            assert!(clash.is_none(), "op writes {w:?} and also uses {clash:?}");
        }
        let from = reads.map(|r| (self.pointer::<U>(r), r.len()));
        let into = writes.map(|w| (self.pointer::<U>(w).cast_mut(), w.len()));
        (
            // SAFETY: as in `read`; no written range overlaps these (checked above).
            from.map(|(pointer, len)| unsafe { std::slice::from_raw_parts(pointer, len) }),
            // SAFETY: as in `read`; each range is disjoint from every other one handed out (checked above), and
            // `self` is borrowed exclusively for the results' life.
            into.map(|(pointer, len)| unsafe { std::slice::from_raw_parts_mut(pointer, len) }),
        )
    }
}

/// Types whose every bit pattern is a value.
pub trait Plain: Copy {}
impl Plain for i32 {}
impl Plain for f32 {}
impl Plain for f64 {}

/// A copy between the arenas. It is made as late as the rules allow, so that what forgets to wait for one is wrong on
/// every run.
struct Transfer {
    number: u64,
    from: Buf,
    to: Buf,
}

impl Transfer {
    fn to_host(&self) -> bool {
        self.to.space() == Space::Host
    }
}

/// Engine on the CPU computing in `T`.
pub struct CpuEngine<T: CpuReal> {
    memory: Memory,
    host: Memory,
    /// Copies that are still to be made, in order.
    queued: Vec<Transfer>,
    /// Copies that were queued so far.
    copies: u64,
    transfers: Transfers,
    /// First error since the last sync.
    error: Option<EngineError>,
    number: std::marker::PhantomData<T>,
}

impl<T: CpuReal> Default for CpuEngine<T> {
    fn default() -> Self {
        let memory = |space| Memory { lines: Vec::new(), space };
        CpuEngine {
            memory: memory(Space::Device),
            host: memory(Space::Host),
            queued: Vec::new(),
            copies: 0,
            transfers: Transfers::default(),
            error: None,
            number: std::marker::PhantomData,
        }
    }
}

impl<T: CpuReal> CpuEngine<T> {
    /// An engine without an arena.
    pub fn new() -> Self {
        Self::default()
    }

    /// A buffer's values at the engine's full precision.
    pub fn values(&self, buf: Buf) -> &[T] {
        self.memory.read(buf)
    }

    /// A buffer's values, writable at the engine's full precision.
    pub fn values_mut(&mut self, buf: Buf) -> &mut [T] {
        self.write(buf)
    }

    fn write(&mut self, buf: Buf) -> &mut [T] {
        let ([], [out]) = self.memory.split([], [buf]);
        out
    }

    fn ints(&self, buf: Buf) -> &[i32] {
        self.memory.read(buf)
    }

    /// The arena of a buffer, with no copy left to be made where it is the host's.
    fn arena_of(&mut self, buf: Buf) -> &mut Memory {
        match buf.space() {
            Space::Device => &mut self.memory,
            Space::Host => {
                self.copy_up_to(u64::MAX, |_| true);
                &mut self.host
            }
        }
    }

    fn queue(&mut self, from: Buf, to: Buf) -> Done {
        assert_eq!(
            (from.len(), from.dtype()),
            (to.len(), to.dtype()),
            "a copy between arenas converts nothing"
        );
        self.copies += 1;
        self.queued.push(Transfer { number: self.copies, from, to });
        Done(DoneAt::Copies(self.copies))
    }

    /// Makes the copies that `with` picks, up to this number.
    fn copy_up_to(&mut self, number: u64, with: impl Fn(&Transfer) -> bool) {
        let began = Instant::now();
        let (now, later): (Vec<Transfer>, Vec<Transfer>) =
            std::mem::take(&mut self.queued).into_iter().partition(|c| c.number <= number && with(c));
        self.queued = later;
        for Transfer { from, to, .. } in now {
            let (start, into, len) = (from.offset_bytes(), to.offset_bytes(), from.bytes());
            let (source, target, bytes) = match to.space() {
                Space::Host => (&self.memory, &mut self.host, &mut self.transfers.to_host_bytes),
                Space::Device => (&self.host, &mut self.memory, &mut self.transfers.to_device_bytes),
            };
            target.bytes_mut()[into..into + len].copy_from_slice(&source.as_bytes()[start..start + len]);
            *bytes += len as u64;
        }
        // Nothing runs beside: whoever asks for a copy waits for it.
        let ms = 1e3 * began.elapsed().as_secs_f64();
        self.transfers.copy_ms += ms;
        self.transfers.waited_ms += ms;
    }

    fn write_ints(&mut self, buf: Buf, values: &[i32]) {
        let ([], [out]) = self.memory.split::<i32, 0, 1>([], [buf]);
        out.copy_from_slice(values);
    }

    fn view(&self, view: &View) -> attention::View<'_, T> {
        attention::View::new(self.memory.read(view.buf), layout(view))
    }

    /// Writes packed `[B,S,H,D]` values through a view.
    fn unpack(&mut self, packed: &[T], view: &View, seqlen: usize, heads: usize, dim: usize) {
        let into = self.write(view.buf);
        layout(view).unpack(packed, seqlen, heads, dim, into);
    }

    fn fail(&mut self, op: &str, reason: String) {
        self.error.get_or_insert(EngineError::Flag { op: op.to_string(), reason });
    }

    fn lists(&self, lists: &Lists) -> KvLists<'_> {
        KvLists {
            query_group: lists.shape.query_group,
            kv_block: lists.shape.kv_block,
            max_selected: lists.shape.max_selected,
            index: self.ints(lists.q2k_index),
            count: self.ints(lists.q2k_count),
        }
    }

    fn inputs(&self, args: &AttnFwd) -> AttnInputs<'_, T> {
        AttnInputs { q: self.view(&args.q), k: self.view(&args.k), v: self.view(&args.v) }
    }

    fn noise_keys(&self, keys: Buf) -> Vec<layers::NoiseKey> {
        self.ints(keys).chunks(2).map(|k| [k[0] as u32, k[1] as u32]).collect()
    }
}

fn layout(view: &View) -> Layout {
    Layout { batch: view.batch_stride, seq: view.seq_stride, head: view.head_stride }
}

fn attn_shape(shape: &AttnShape) -> attention::AttnShape {
    attention::AttnShape::new(shape.batch, shape.seqlen_q, shape.heads, shape.head_dim)
        .with_seqlen_kv(shape.seqlen_kv)
        .with_scale(f64::from(shape.scale))
}

fn list_dims(shape: &ListShape) -> ListDims {
    ListDims {
        batch: shape.batch,
        num_heads: shape.heads,
        seqlen_q: shape.seqlen,
        seqlen_kv: shape.seqlen,
        query_group: shape.query_group,
        kv_block: shape.kv_block,
        max_selected: shape.max_selected,
    }
}

fn mod_dims(batch: usize, seqlen: usize, dim: usize, chunks: usize) -> ModDims {
    ModDims { batch, seqlen, dim, chunks }
}

fn patch_dims(shape: &PatchShape) -> PatchDims {
    PatchDims { batch: shape.batch, channels: shape.channels, latent: shape.latent, patch: shape.patch }
}

fn qk_dims(args: &QkPrep) -> QkDims {
    QkDims { batch: args.batch, seqlen: args.seqlen, heads: args.heads, head_dim: args.head_dim }
}

fn form(act: MlpAct) -> MlpForm {
    match act {
        MlpAct::GeGlu => MlpForm::GeGlu,
        MlpAct::Gelu => MlpForm::Gelu,
    }
}

/// Factor of one f32 argument without the noise of its f32 decimal form.
fn exact<T: CpuReal>(value: f32) -> T {
    T::from_f64(f64::from(value))
}

impl<T: CpuReal> DeviceFacts for CpuEngine<T> {
    fn name(&self) -> String {
        let bits = 8 * size_of::<T>();
        format!("CPU reference, f{bits}, {} threads", rayon::current_num_threads())
    }

    fn precision(&self) -> Precision {
        T::PRECISION
    }

    fn needs_inverse_lists(&self) -> bool {
        false
    }

    fn deterministic(&self) -> bool {
        true
    }

    fn scratch_bytes(&self, _dims: &Dims) -> usize {
        0
    }

    fn free_bytes(&self) -> Option<usize> {
        host_free_bytes()
    }

    fn host_free_bytes(&self) -> Option<usize> {
        host_free_bytes()
    }

    fn sparse_cost(&self, _: &AttnShape, _: usize, _: usize) -> Option<SparseCost> {
        None
    }

    fn rates(&self) -> Option<Rates> {
        None
    }

    fn attention_us(&self, _: &AttnShape, _: Option<(&ListShape, f64)>) -> Option<f64> {
        None
    }

    fn dispatch_table(&self) -> Option<&dsv_spec::DispatchTable> {
        None
    }
}

impl<T: CpuReal> Engine for CpuEngine<T> {
    fn reserve(&mut self, plan: &ArenaPlan, _dims: &Dims) -> Result<(), EngineError> {
        assert_eq!(plan.precision(), T::PRECISION, "the plan was made for another precision");
        let (needed_bytes, on_host) = (plan.total_bytes(), plan.host_bytes());
        self.memory = Memory::reserve(Space::Device, needed_bytes)
            .map_err(|reason| EngineError::Reserve { needed_bytes, reason })?;
        self.host = Memory::reserve(Space::Host, on_host)
            .map_err(|reason| EngineError::ReserveHost { needed_bytes: on_host, reason })?;
        self.queued.clear();
        Ok(())
    }

    fn repeat(&mut self, _key: &[u32], work: &mut dyn FnMut(&mut dyn Engine)) {
        work(self);
    }

    fn sync(&mut self) -> Result<(), EngineError> {
        self.error.take().map_or(Ok(()), Err)
    }

    fn write_f32(&mut self, buf: Buf, data: &[f32]) -> Result<(), EngineError> {
        let ([], [out]) = self.arena_of(buf).split::<T, 0, 1>([], [buf]);
        assert_eq!(out.len(), data.len(), "host data of another length");
        out.iter_mut().zip(data).for_each(|(o, &x)| *o = exact(x));
        Ok(())
    }

    fn write_i32(&mut self, buf: Buf, data: &[i32]) -> Result<(), EngineError> {
        self.write_ints(buf, data);
        Ok(())
    }

    fn read_f32(&mut self, buf: Buf) -> Result<Vec<f32>, EngineError> {
        self.sync()?;
        Ok(self.arena_of(buf).read::<T>(buf).iter().map(|x| x.to_f32()).collect())
    }

    fn read_i32(&mut self, buf: Buf) -> Result<Vec<i32>, EngineError> {
        self.sync()?;
        Ok(self.arena_of(buf).read::<i32>(buf).to_vec())
    }

    fn offload(&mut self, from: Buf, to: Buf) -> Done {
        assert_eq!((from.space(), to.space()), (Space::Device, Space::Host), "{from:?} to {to:?}");
        self.queue(from, to)
    }

    fn fetch(&mut self, from: Buf, to: Buf) -> Done {
        assert_eq!((from.space(), to.space()), (Space::Host, Space::Device), "{from:?} to {to:?}");
        self.queue(from, to)
    }

    fn after(&mut self, done: &Done) {
        let DoneAt::Copies(number) = done.0 else { return };
        match self.queued.iter().find(|c| c.number == number).map(Transfer::to_host) {
            Some(true) => self.copy_up_to(number, Transfer::to_host),
            Some(false) => self.copy_up_to(number, |_| true),
            None => {}
        }
    }

    fn beside(&mut self, work: &mut dyn FnMut(&mut dyn Engine)) -> Done {
        work(self);
        Done::default()
    }

    fn transfers(&mut self) -> Transfers {
        std::mem::take(&mut self.transfers)
    }

    fn fill(&mut self, dst: Buf, value: f32) {
        let arena = self.arena_of(dst);
        match dst.dtype() {
            Dtype::I32 => arena.split::<i32, 0, 1>([], [dst]).1[0].fill(value as i32),
            _ => arena.split::<T, 0, 1>([], [dst]).1[0].fill(exact(value)),
        }
    }

    fn copy(&mut self, src: Buf, dst: Buf) {
        let ([src], [dst]) = self.memory.split::<T, 1, 1>([src], [dst]);
        dst.copy_from_slice(src);
    }

    fn axpy(&mut self, alpha: f32, x: Buf, y: Buf) {
        let alpha: T = exact(alpha);
        if x == y {
            self.write(y).iter_mut().for_each(|y| *y += alpha * *y);
            return;
        }
        let ([x], [y]) = self.memory.split::<T, 1, 1>([x], [y]);
        assert_eq!(x.len(), y.len(), "axpy of different lengths");
        y.iter_mut().zip(x).for_each(|(y, &x)| *y += alpha * x);
    }

    fn add_rows(&mut self, rows: usize, a: Buf, b: Buf, out: Buf) {
        if a != out {
            self.copy(a, out);
        }
        let ([b], [out]) = self.memory.split::<T, 1, 1>([b], [out]);
        assert_eq!(out.len(), rows * b.len(), "add_rows of {rows} rows");
        for row in out.chunks_mut(b.len()) {
            row.iter_mut().zip(b).for_each(|(o, &b)| *o += b);
        }
    }

    fn sum_rows(&mut self, rows: usize, src: Buf, dst: Buf) {
        let ([src], [dst]) = self.memory.split::<T, 1, 1>([src], [dst]);
        assert_eq!(src.len(), rows * dst.len(), "sum_rows of {rows} rows");
        layers::sum_rows(src, dst);
    }

    fn gemm(&mut self, g: &Gemm) {
        let transpose = match g.layout {
            GemmLayout::NN => Transpose::None,
            GemmLayout::NT => Transpose::Right,
            GemmLayout::TN => Transpose::Left,
        };
        let product = match g.epilogue {
            Epilogue::None => g.c,
            Epilogue::Gelu { pre } => pre,
        };
        assert!(!g.accumulate || g.epilogue == Epilogue::None, "an epilogue cannot accumulate");
        assert!(g.add.is_none() || g.epilogue == Epilogue::None && !g.accumulate, "one sum a product: {g:?}");
        let ([a, b], [c]) = self.memory.split::<T, 2, 1>([g.a, g.b], [product]);
        layers::matmul(transpose, [g.m, g.n, g.k], a, b, c, g.accumulate);
        if let Some(bias) = g.bias {
            self.add_rows(g.m, product, bias, product);
        }
        if let Some(residual) = g.add {
            self.axpy(1.0, residual, product);
        }
        if let Epilogue::Gelu { pre } = g.epilogue {
            let ([pre], [out]) = self.memory.split::<T, 1, 1>([pre], [g.c]);
            layers::mlp_act_fwd(MlpForm::Gelu, g.n, pre, out);
        }
    }

    fn norm_mod_fwd(&mut self, args: &NormMod, out: Buf) {
        let dims = mod_dims(args.batch, args.seqlen, args.dim, args.chunks);
        let ([x, modulation], [out, mean, rstd]) =
            self.memory.split::<T, 2, 3>([args.x, args.modulation], [out, args.mean, args.rstd]);
        let eps = f64::from(args.eps);
        layers::norm_mod_fwd(dims, (args.shift, args.scale), eps, x, modulation, out, mean, rstd);
    }

    fn norm_mod_bwd(&mut self, args: &NormMod, d_out: Buf, d_x: Buf, d_modulation: Buf) {
        let dims = mod_dims(args.batch, args.seqlen, args.dim, args.chunks);
        let reads = [args.x, args.modulation, args.mean, args.rstd, d_out];
        let ([x, modulation, mean, rstd, d_out], [d_x, d_mod]) =
            self.memory.split::<T, 5, 2>(reads, [d_x, d_modulation]);
        let chunks = (args.shift, args.scale);
        layers::norm_mod_bwd(dims, chunks, x, modulation, (mean, rstd), d_out, d_x, d_mod);
    }

    fn gate_weight(&mut self, args: &Gated, gated_weight: Buf, gated_bias: Buf) {
        let ([weight, bias, gate], [out, out_bias]) =
            self.memory.split::<T, 3, 2>([args.weight, args.bias, args.gate], [gated_weight, gated_bias]);
        layers::gate_weight(gate, weight, bias, out, out_bias);
    }

    fn gate_grad(&mut self, args: &Gated, grad: &GatedGrad) {
        let reads = [args.gate, args.weight, args.bias, grad.product, grad.sum];
        let ([gate, weight, bias, product, sum], [d_weight, d_bias, d_gate]) =
            self.memory.split::<T, 5, 3>(reads, [grad.d_weight, grad.d_bias, grad.d_gate]);
        let inputs = GateInputs { gate, weight, bias, product, sum };
        layers::gate_grad(&inputs, d_weight, d_bias, d_gate);
    }

    fn qk_prep_fwd(&mut self, args: &QkPrep, q: Buf, k: Buf) {
        let reads = [args.qkv, args.q_weight, args.k_weight, args.cos, args.sin];
        let ([qkv, wq, wk, cos, sin], [q, k, q_rstd, k_rstd]) =
            self.memory.split::<T, 5, 4>(reads, [q, k, args.q_rstd, args.k_rstd]);
        let inputs = QkInputs { qkv, weight: [wq, wk], cos, sin };
        layers::qk_prep_fwd(qk_dims(args), f64::from(args.eps), inputs, [q, k], [q_rstd, k_rstd]);
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
        let reads =
            [args.qkv, args.q_weight, args.k_weight, args.cos, args.sin, args.q_rstd, args.k_rstd, d_q, d_k];
        let ([qkv, wq, wk, cos, sin, q_rstd, k_rstd, d_q, d_k], [d_qkv, d_wq, d_wk]) =
            self.memory.split::<T, 9, 3>(reads, [d_qkv, d_q_weight, d_k_weight]);
        let inputs = QkInputs { qkv, weight: [wq, wk], cos, sin };
        layers::qk_prep_bwd(qk_dims(args), inputs, [q_rstd, k_rstd], [d_q, d_k], d_qkv, [d_wq, d_wk]);
    }

    fn attn_fwd(&mut self, args: &AttnFwd) {
        let lists = args.lists.as_ref().map(|l| self.lists(l));
        match T::attn_fwd(&attn_shape(&args.shape), &self.inputs(args), lists.as_ref()) {
            Ok(result) => {
                let s = &args.shape;
                self.unpack(&result.out, &args.out, s.seqlen_q, s.heads, s.head_dim);
                self.write(args.lse).copy_from_slice(&result.lse);
            }
            Err(reason) => self.fail("attn_fwd", reason),
        }
    }

    fn attn_bwd(&mut self, args: &AttnBwd) {
        let fwd = &args.fwd;
        let lists = fwd.lists.as_ref().map(|l| self.lists(l));
        let grads = T::attn_bwd(
            &attn_shape(&fwd.shape),
            &self.inputs(fwd),
            lists.as_ref(),
            &self.view(&fwd.out),
            self.values(fwd.lse),
            &self.view(&args.d_out),
        );
        match grads {
            Ok(grads) => {
                let s = &fwd.shape;
                self.unpack(&grads.dq, &args.d_q, s.seqlen_q, s.heads, s.head_dim);
                self.unpack(&grads.dk, &args.d_k, s.seqlen_kv, s.heads, s.head_dim);
                self.unpack(&grads.dv, &args.d_v, s.seqlen_kv, s.heads, s.head_dim);
            }
            Err(reason) => self.fail("attn_bwd", reason),
        }
    }

    fn mlp_act_fwd(&mut self, act: MlpAct, rows: usize, hidden: usize, pre: Buf, out: Buf) {
        let ([pre], [out]) = self.memory.split::<T, 1, 1>([pre], [out]);
        assert_eq!(out.len(), rows * hidden, "mlp_act_fwd of {rows} rows");
        layers::mlp_act_fwd(form(act), hidden, pre, out);
    }

    fn mlp_act_bwd(&mut self, act: MlpAct, rows: usize, hidden: usize, pre: Buf, out: Buf, d_bias: Buf) {
        let ([], [d_out, d_pre]) = self.memory.split::<T, 0, 2>([], [out, pre]);
        assert_eq!(d_out.len(), rows * hidden, "mlp_act_bwd of {rows} rows");
        layers::mlp_act_bwd(form(act), hidden, d_out, d_pre);
        self.sum_rows(rows, pre, d_bias);
    }

    fn silu_fwd(&mut self, x: Buf, out: Buf) {
        let ([x], [out]) = self.memory.split::<T, 1, 1>([x], [out]);
        layers::silu_fwd(x, out);
    }

    fn silu_bwd(&mut self, x: Buf, d_out: Buf, d_x: Buf) {
        if d_out != d_x {
            self.copy(d_out, d_x);
        }
        let ([x], [d_x]) = self.memory.split::<T, 1, 1>([x], [d_x]);
        layers::silu_bwd(x, d_x);
    }

    fn time_embed(&mut self, t: Buf, width: usize, out: Buf) {
        let ([t], [out]) = self.memory.split::<T, 1, 1>([t], [out]);
        layers::time_embed(t, width, out);
    }

    fn flow_prepare(&mut self, args: &FlowPrepare) {
        let order = self.ints(args.order).to_vec();
        let keys = self.noise_keys(args.keys);
        let ([latents, t], [x_t, target]) =
            self.memory.split::<T, 2, 2>([args.latents, args.t], [args.x_t, args.target]);
        layers::flow_prepare(patch_dims(&args.shape), &order, latents, t, &keys, x_t, target);
    }

    fn flow_loss(&mut self, args: &FlowLoss) {
        let reads = [args.pred, args.target];
        let weight = f64::from(args.weight);
        assert_eq!(args.pred.len(), args.batch * args.per_element, "flow_loss of {args:?}");
        match args.d_pred {
            Some(d_pred) => {
                let ([pred, target], [loss, d_pred]) =
                    self.memory.split::<T, 2, 2>(reads, [args.loss, d_pred]);
                layers::flow_loss(pred, target, loss, Some(d_pred), weight);
            }
            None => {
                let ([pred, target], [loss]) = self.memory.split::<T, 2, 1>(reads, [args.loss]);
                layers::flow_loss(pred, target, loss, None, weight);
            }
        }
    }

    fn normal(&mut self, keys: Buf, dst: Buf) {
        let key = self.noise_keys(keys)[0];
        layers::normal(key, self.write(dst));
    }

    fn unpatchify(&mut self, shape: &PatchShape, order: Buf, tokens: Buf, latents: Buf) {
        let order = self.ints(order).to_vec();
        let ([tokens], [latents]) = self.memory.split::<T, 1, 1>([tokens], [latents]);
        layers::unpatchify(patch_dims(shape), &order, tokens, latents);
    }

    fn text_select_fwd(&mut self, args: &TextSelect, text: Buf, null: Buf, out: Buf) {
        let drop = self.ints(args.drop).to_vec();
        let ([text, null], [out]) = self.memory.split::<T, 2, 1>([text, null], [out]);
        assert_eq!((null.len(), drop.len()), (args.per_element, args.batch), "{args:?}");
        layers::text_select_fwd(&drop, text, null, out);
    }

    fn text_select_bwd(&mut self, args: &TextSelect, d_out: Buf, d_null: Buf) {
        let drop = self.ints(args.drop).to_vec();
        let ([d_out], [d_null]) = self.memory.split::<T, 1, 1>([d_out], [d_null]);
        layers::text_select_bwd(&drop, d_out, d_null);
    }

    fn rope(&mut self, args: &Rope, x: Buf, inverse: bool) {
        let ([cos, sin], [x]) = self.memory.split::<T, 2, 1>([args.cos, args.sin], [x]);
        layers::rope_in_place(args.seqlen, args.vectors, args.dim, cos, sin, inverse, x);
    }

    fn kv_select(&mut self, args: &KvSelect) {
        let dims = list_dims(&args.lists.shape);
        let (q_lr, k_lr) = (self.view(&args.q_lr), self.view(&args.k_lr));
        let mask: &[i32] = args.keep_mask.map_or(&[], |mask| self.ints(mask));
        let mask: Vec<u32> = mask.iter().map(|&word| word as u32).collect();
        let keep = select::Keep { first: 0, own: args.keep_own, mask: &mask };
        let lists = T::scores(&dims, args.d_lr, &q_lr, &k_lr, args.rule).and_then(|mut scores| {
            select::keep(&dims, keep, &mut scores)?;
            select::top_k(&dims, &scores, self.ints(args.top_k))
        });
        match lists {
            Ok(lists) => {
                self.write_ints(args.lists.q2k_index, &lists.index);
                self.write_ints(args.lists.q2k_count, &lists.count);
            }
            Err(reason) => self.fail("kv_select", reason.to_string()),
        }
    }

    fn gram_loss(&mut self, args: &GramLoss) {
        let s = &args.shape;
        let part = |part| View::packed(args.lowrank, 2, part, s.seqlen_q, s.heads, args.d_lr);
        let inputs = PredictorInputs {
            q_lr: self.view(&part(0)),
            k_lr: self.view(&part(1)),
            q: self.view(&args.q),
            k: self.view(&args.k),
        };
        match gram(&attn_shape(s), args.d_lr, &inputs) {
            Ok(mut result) => {
                let loss: Vec<T> = result.heads.iter().map(|h| T::from_f64(h.loss)).collect();
                self.write(args.loss).copy_from_slice(&loss);
                let weight: T = exact(args.weight);
                for (part, grad) in [&mut result.d_q_lr, &mut result.d_k_lr].into_iter().enumerate() {
                    grad.iter_mut().for_each(|g| *g *= weight);
                    let view = View::packed(args.d_lowrank, 2, part, s.seqlen_q, s.heads, args.d_lr);
                    self.unpack(grad, &view, s.seqlen_q, s.heads, args.d_lr);
                }
            }
            Err(reason) => self.fail("gram_loss", reason.to_string()),
        }
    }

    fn profile(&mut self, args: &Profile) {
        let s = &args.shape;
        let rows: Vec<usize> = self.ints(args.samples).iter().map(|&i| i as usize).collect();
        let lists = args.lists.as_ref().map(|l| self.lists(&l.lists));
        let (q, k) = (self.view(&args.q), self.view(&args.k));
        match profile_rows(&attn_shape(s), &q, &k, &rows, f64::from(args.theta), lists.as_ref()) {
            Ok(rows) => {
                let heads = summarise(&rows, s.heads);
                let needed: Vec<T> = heads.iter().map(|h| T::from_f64(1.0 - h.sparsity)).collect();
                self.write(args.needed).copy_from_slice(&needed);
                if let Some(ProfiledLists { covered, recall, .. }) = args.lists {
                    let of = |value: &dyn Fn(&HeadProfile) -> Option<f64>| -> Vec<T> {
                        heads.iter().map(|h| T::from_f64(value(h).unwrap_or(0.0))).collect()
                    };
                    self.write(covered).copy_from_slice(&of(&|h| h.covered_mass));
                    self.write(recall).copy_from_slice(&of(&|h| h.recall));
                }
            }
            Err(reason) => self.fail("profile", reason.to_string()),
        }
    }

    fn grad_norm(&mut self, args: &GradNorm) {
        let segments: Vec<usize> =
            self.ints(args.segments).iter().map(|&s| s as usize * PARAM_ALIGN).collect();
        let result = layers::grad_norm(self.values(args.grad), &segments, f64::from(args.max_norm));
        self.write(args.clip).copy_from_slice(&[T::from_f64(result.norm), T::from_f64(result.factor)]);
        self.write_ints(args.culprit, &[result.culprit.map_or(-1, |c| c as i32)]);
    }

    fn adamw(&mut self, args: &AdamW) {
        let step = layers::AdamWStep {
            lr: f64::from(args.lr),
            beta1: f64::from(args.beta1),
            beta2: f64::from(args.beta2),
            eps: f64::from(args.eps),
            weight_decay: f64::from(args.weight_decay),
            step: args.step,
        };
        match args.moments {
            Moments::Full { m, v } => {
                let ([grad, clip], [master, m, v, copy]) =
                    self.memory.split::<T, 2, 4>([args.grad, args.clip], [args.master, m, v, args.copy]);
                layers::adamw(&step, clip[1], master, grad, m, v);
                copy.copy_from_slice(master);
            }
            Moments::Coded { m, v } => {
                // In f32 whatever the engine computes in: codes have three bits of mantissa.
                let numbers = eight_bits::Numbers::from(&step);
                let narrow = |values: &[T]| values.iter().map(|x| x.to_f32()).collect::<Vec<f32>>();
                let factor = self.values(args.clip)[1].to_f32();
                let (mut master, grad) = (narrow(self.values(args.master)), narrow(self.values(args.grad)));
                let mut state = [m, v].map(|c| (codes_of(self.ints(c.codes)), narrow(self.values(c.scales))));
                let [(m_codes, m_scales), (v_codes, v_scales)] = &mut state;
                let (coded_m, coded_v) =
                    ((&mut m_codes[..], &mut m_scales[..]), (&mut v_codes[..], &mut v_scales[..]));
                eight_bits::adamw(&numbers, factor, args.first as u64, &mut master, &grad, coded_m, coded_v);
                for (to, (codes, scales)) in [m, v].into_iter().zip(&state) {
                    self.write_ints(to.codes, &words_of(codes));
                    self.write(to.scales).iter_mut().zip(scales).for_each(|(o, &x)| *o = exact(x));
                }
                self.write(args.master).iter_mut().zip(&master).for_each(|(o, &x)| *o = exact(x));
                self.write(args.copy).iter_mut().zip(&master).for_each(|(o, &x)| *o = exact(x));
            }
        }
    }

    fn ema(&mut self, decay: f32, master: Buf, ema: Buf) {
        let ([master], [ema]) = self.memory.split::<T, 1, 1>([master], [ema]);
        layers::ema(f64::from(decay), master, ema);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    #[should_panic(expected = "op writes")]
    fn an_op_cannot_write_what_it_reads() {
        let mut plan = ArenaPlan::new(Precision::F32);
        let x = plan.f32("x", 8);
        let mut engine = CpuEngine::<f32>::new();
        engine.memory = Memory::reserve(Space::Device, plan.total_bytes()).unwrap();
        engine.copy(x.slice(0, 4), x.slice(2, 4));
    }

    #[test]
    fn copies_between_the_arenas_are_made_no_earlier_than_they_are_waited_for() {
        let mut plan = ArenaPlan::new(Precision::F32);
        let (x, y) = (plan.f32("x", 4), plan.f32("y", 4));
        let (a, b) = (plan.on_host("a", x), plan.on_host("b", x));
        let dims = Dims {
            batch: 1,
            seqlen: 1,
            text_tokens: 0,
            text_copies: 1,
            dim: 1,
            heads: 1,
            head_dim: 1,
            d_lr: 0,
            mlp_width: 0,
            samples: 0,
            params: 0,
            lists: None,
        };
        let mut e = CpuEngine::<f32>::new();
        e.reserve(&plan, &dims).unwrap();
        e.write_f32(x, &[1.0; 4]).unwrap();
        let out = e.offload(x, a);
        let back = e.fetch(a, y);
        // Overwritten before anyone waited: the copy gets what should not have been written yet.
        e.fill(x, 2.0);
        assert_eq!(e.values(y), [0.0; 4]);
        e.after(&back);
        assert_eq!(e.values(y), [2.0; 4], "a copy to the device comes after those to the host before it");
        e.after(&out);
        let _ = e.offload(y, b);
        assert_eq!(e.read_f32(b).unwrap(), [2.0; 4], "reading the host's arena waits for all copies");
        let moved = e.transfers();
        assert_eq!((moved.to_host_bytes, moved.to_device_bytes), (32, 16));
        assert_eq!((moved.overlap(), e.transfers().to_host_bytes), (Some(0.0), 0));
    }

    #[test]
    #[should_panic(expected = "ops work on the device alone")]
    fn an_op_refuses_host_memory() {
        let mut plan = ArenaPlan::new(Precision::F32);
        let x = plan.f32("x", 4);
        let a = plan.on_host("a", x);
        let mut e = CpuEngine::<f32>::new();
        e.memory = Memory::reserve(Space::Device, plan.total_bytes()).unwrap();
        e.host = Memory::reserve(Space::Host, plan.host_bytes()).unwrap();
        e.copy(x, a);
    }

    #[test]
    fn gelu_epilogue_keeps_the_pre_activation() {
        let mut plan = ArenaPlan::new(Precision::F64);
        let (a, b, bias) = (plan.act("a", 6), plan.act("b", 6), plan.act("bias", 2));
        let (c, pre) = (plan.act("c", 4), plan.act("pre", 4));
        let mut e = CpuEngine::<f64>::new();
        e.memory = Memory::reserve(Space::Device, plan.total_bytes()).unwrap();
        e.write_f32(a, &[1.0, 2.0, 3.0, 4.0, 5.0, 6.0]).unwrap();
        e.write_f32(b, &[1.0, 0.0, 0.0, 0.0, 0.0, -1.0]).unwrap();
        e.write_f32(bias, &[0.5, 0.0]).unwrap();
        e.gemm(&Gemm::new(GemmLayout::NT, 2, 2, 3, a, b, c).bias(bias).gelu(pre));
        assert_eq!(e.values(pre), [1.5, -3.0, 4.5, -6.0]);
        assert!(e.values(c).iter().zip(e.values(pre)).all(|(&c, &p)| c == layers::gelu(p)));
    }

    #[test]
    fn a_failed_op_is_reported_once_at_the_next_sync() {
        let mut plan = ArenaPlan::new(Precision::F32);
        let shape = ListShape { batch: 1, heads: 1, seqlen: 8, query_group: 4, kv_block: 2, max_selected: 2 };
        let lists = shape.reserve(&mut plan, "lists", false);
        let (low, top_k) = (plan.act("low", 8 * 2 * 4), plan.i32("k", 1));
        let mut e = CpuEngine::<f32>::new();
        e.memory = Memory::reserve(Space::Device, plan.total_bytes()).unwrap();
        e.write_i32(top_k, &[3]).unwrap();
        let view = |part| View::packed(low, 2, part, 8, 1, 4);
        e.kv_select(&KvSelect {
            q_lr: view(0),
            k_lr: view(1),
            d_lr: 4,
            top_k,
            rule: GroupRule::Centre,
            keep_own: false,
            keep_mask: None,
            lists,
        });
        let error = e.sync().unwrap_err().to_string();
        assert!(error.contains("kv_select") && error.contains("max_selected"), "{error}");
        e.sync().unwrap();
    }
}
