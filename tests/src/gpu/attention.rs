//! Attention forward and backward over the corpus, faults in lists, CUDA graphs.

use super::tensor::{Flat, Tensor, flag_is, same};
use super::{ARCH, ARCHES, Gpu, GpuTest, Outcome};
use crate::corpus::{ListKind, Variant, variants};
use crate::engines::{compare_grads, compare_output, lines};
use crate::inputs::{Inputs, Placement};
use dsv_reference::attention::{AttnGrads, AttnOutput, oracle};
use dsv_reference::compare::all_passed;
use dsv_reference::lists::KvListsBuf;
use dsv_runtime::{AttnLayouts, AttnPlan, BwdArgs, FwdArgs, Kernel, KeyLists, QueryLists};
use dsv_spec::params::error_bits;
use dsv_spec::{Arch, AttnOp, AttnSpec, Deterministic, Dtype, KernelSpec, Lists, Problem, Schedule, space};
use std::sync::Arc;

/// Each variant with every candidate, and the tests of faults and graphs.
pub(super) fn tests() -> Vec<GpuTest> {
    let mut tests = Vec::new();
    for variant in variants() {
        for spec in candidates(AttnOp::Fwd, &variant) {
            let variant = variant.clone();
            tests.push(GpuTest::new(
                format!("attn_fwd/{}/{}", variant.name(), KernelSpec::Attn(spec)),
                vec![KernelSpec::Attn(spec)],
                move |gpu| forward(gpu, &variant, spec),
            ));
        }
        for op in [AttnOp::Bwd, AttnOp::BwdDq] {
            for spec in candidates(op, &variant) {
                let kernels = backward_kernels(spec);
                let variant = variant.clone();
                tests.push(GpuTest::new(
                    format!("{op}/{}/{}", variant.name(), KernelSpec::Attn(spec)),
                    kernels.clone(),
                    move |gpu| backward(gpu, &variant, spec, &kernels),
                ));
            }
        }
    }
    let served = |v: &Variant| {
        matches!(v.case.name.as_str(), "no_multiple" | "dims_no_multiple" | "fine_no_multiple")
            && is_shipped(v.head_dim, v.lists)
    };
    for variant in variants().into_iter().filter(served) {
        for form in [Deterministic::No, Deterministic::Yes] {
            if variant.lists.is_gather() && form == Deterministic::Yes {
                continue;
            }
            let variant = variant.clone();
            let kernels = shipped(variant.head_dim, variant.lists, form, ARCH).unwrap_or_default();
            tests.push(GpuTest::new(format!("dispatch/{}-{form}", variant.name()), kernels, move |gpu| {
                dispatched(gpu, &variant, form)
            }));
        }
    }
    let forms =
        || ARCHES.into_iter().flat_map(|arch| [Deterministic::No, Deterministic::Yes].map(|d| (arch, d)));
    for lists in space::shipped_lists().chain(space::shipped_gather()).filter(|lists| !lists.is_dense()) {
        // Gather kernels read no inverse.
        for fault in Fault::ALL.into_iter().filter(|fault| !(fault.in_inverse() && lists.is_gather())) {
            let (query_group, kv_block) = lists.block_size();
            let head_dim = 64;
            for (arch, deterministic) in forms() {
                let Some(kernels) = shipped(head_dim, lists, deterministic, arch) else { continue };
                tests.push(GpuTest::new(
                    format!("faults/{fault:?}-qg{query_group}kb{kv_block}-{deterministic}-{arch}"),
                    kernels.clone(),
                    move |gpu| faulty_lists(gpu, head_dim, lists, fault, &kernels, deterministic),
                ));
            }
        }
    }
    // Groups that share a CTA must not harm each other either, nor tiles that one CTA takes.
    let lists = Lists::Blocks { query_group: 64, kv_block: 64 };
    let of = |head_dim| space::candidates(AttnOp::Fwd, Dtype::Bf16, head_dim, lists, ARCH);
    for spec in [64, 128].into_iter().flat_map(of).filter(AttnSpec::is_persistent) {
        let head_dim = spec.head_dim();
        for fault in Fault::ALL.into_iter().filter(|fault| !fault.in_inverse()) {
            let Some(mut kernels) = shipped(head_dim, lists, Deterministic::No, ARCH) else { continue };
            kernels[0] = KernelSpec::Attn(spec);
            tests.push(GpuTest::new(
                format!("faults/{fault:?}-{}", kernels[0]),
                kernels.clone(),
                move |gpu| faulty_lists(gpu, head_dim, lists, fault, &kernels, Deterministic::No),
            ));
        }
    }
    let everything = space::SHIPPED_HEAD_DIMS.into_iter().flat_map(|head_dim| {
        space::shipped_lists().chain(space::shipped_gather()).map(move |lists| (head_dim, lists))
    });
    for (head_dim, lists) in everything.filter(|&(head_dim, lists)| is_shipped(head_dim, lists)) {
        let (query_group, kv_block) = lists.block_size();
        for (arch, deterministic) in forms() {
            let Some(kernels) = shipped(head_dim, lists, deterministic, arch) else { continue };
            tests.push(GpuTest::new(
                format!("graph/d{head_dim}-qg{query_group}kb{kv_block}-{deterministic}-{arch}"),
                kernels.clone(),
                move |gpu| in_a_graph(gpu, head_dim, lists, &kernels, deterministic),
            ));
        }
    }
    tests
}

fn candidates(op: AttnOp, variant: &Variant) -> Vec<AttnSpec> {
    let of = |arch| space::candidates(op, variant.case.dtype, variant.head_dim, variant.lists, arch);
    ARCHES.into_iter().flat_map(of).collect()
}

fn default_attn(
    op: AttnOp,
    dtype: Dtype,
    head_dim: u16,
    lists: Lists,
    form: Deterministic,
    arch: Arch,
) -> Option<KernelSpec> {
    space::default_attn(op, dtype, head_dim, lists, form, arch).map(KernelSpec::Attn)
}

/// Whether kernels of this shape are committed.
fn is_shipped(head_dim: u16, lists: Lists) -> bool {
    let (head_dims, sizes): (&[u16], _) = match lists.is_gather() {
        true => (&space::SHIPPED_GATHER_HEAD_DIMS, space::shipped_gather().any(|l| l == lists)),
        false => (&space::SHIPPED_HEAD_DIMS, space::shipped_lists().any(|l| l == lists)),
    };
    head_dims.contains(&head_dim) && sizes
}

/// The shipped forward and backward; none where that form is not shipped.
fn shipped(head_dim: u16, lists: Lists, form: Deterministic, arch: Arch) -> Option<Vec<KernelSpec>> {
    [AttnOp::Fwd, AttnOp::BwdPrep, AttnOp::Bwd, AttnOp::ending(lists, form)]
        .into_iter()
        .map(|op| default_attn(op, Dtype::Bf16, head_dim, lists, form, arch))
        .collect()
}

/// The kernels of a forward and backward in which `spec` is one of the backward's.
fn backward_kernels(spec: AttnSpec) -> Vec<KernelSpec> {
    let form = if spec.op() == AttnOp::BwdDq { Deterministic::Yes } else { spec.deterministic() };
    [AttnOp::Fwd, AttnOp::BwdPrep, AttnOp::Bwd, AttnOp::ending(spec.lists(), form)]
        .into_iter()
        .filter_map(|op| {
            if op == spec.op() {
                Some(KernelSpec::Attn(spec))
            } else {
                default_attn(op, spec.dtype(), spec.head_dim(), spec.lists(), form, spec.arch())
            }
        })
        .collect()
}

/// Where the tensors of a call lie: q, k, v, out, d_out, dq, dk, dv.
struct Places {
    q: Placement,
    k: Placement,
    v: Placement,
    out: Placement,
    d_out: Placement,
    dq: Placement,
    dk: Placement,
    dv: Placement,
    rows: [usize; 4],
    kv_rows: [usize; 4],
}

impl Places {
    fn of(variant: &Variant) -> Places {
        let s = variant.shape();
        let rows = [s.batch, s.seqlen_q, s.num_heads, s.head_dim];
        let kv_rows = [s.batch, s.seqlen_kv, s.num_kv_heads, s.head_dim];
        let place =
            |n, dims: [usize; 4]| Placement::of(variant.case.layout, n, dims[0], dims[1], dims[2], dims[3]);
        Places {
            q: place(0, rows),
            k: place(1, kv_rows),
            v: place(2, kv_rows),
            out: place(3, rows),
            d_out: place(4, rows),
            dq: place(5, rows),
            dk: place(6, kv_rows),
            dv: place(7, kv_rows),
            rows,
            kv_rows,
        }
    }

    fn layouts(&self) -> AttnLayouts {
        let layout = |place: &Placement| Tensor::layout(place);
        AttnLayouts {
            q: layout(&self.q),
            k: layout(&self.k),
            v: layout(&self.v),
            out: layout(&self.out),
            d_out: layout(&self.d_out),
            dq: layout(&self.dq),
            dk: layout(&self.dk),
            dv: layout(&self.dv),
        }
    }
}

/// What a call reads, on the GPU.
struct Call {
    dtype: Dtype,
    places: Places,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    d_out: Tensor,
    d_lse: Option<Flat>,
    query_lists: Option<(Flat, Flat)>,
    key_lists: Option<(Flat, Flat)>,
    lse_bytes: usize,
    error_flag: Flat,
}

impl Call {
    fn new(gpu: &Gpu, variant: &Variant, inputs: &Inputs) -> Result<Call, super::Failure> {
        let key_lists = match &inputs.lists {
            Some(lists) => {
                let inverse = lists.invert()?;
                Some((
                    Flat::of(gpu, "k2q_offset", &inverse.offset)?,
                    Flat::of(gpu, "k2q_index", &inverse.index)?,
                ))
            }
            None => None,
        };
        let (places, dtype) = (Places::of(variant), variant.case.dtype);
        Ok(Call {
            dtype,
            q: Tensor::with_rows(gpu, "q", dtype, places.q, places.rows, &inputs.q)?,
            k: Tensor::with_rows(gpu, "k", dtype, places.k, places.kv_rows, &inputs.k)?,
            v: Tensor::with_rows(gpu, "v", dtype, places.v, places.kv_rows, &inputs.v)?,
            d_out: Tensor::with_rows(gpu, "d_out", dtype, places.d_out, places.rows, &inputs.d_out)?,
            d_lse: inputs.d_lse.as_ref().map(|d_lse| Flat::of(gpu, "d_lse", d_lse)).transpose()?,
            query_lists: inputs.lists.as_ref().map(|lists| query_lists(gpu, lists)).transpose()?,
            key_lists,
            lse_bytes: 4 * inputs.shape.lse_len(),
            error_flag: Flat::of(gpu, "error_flag", &[0i32])?,
            places,
        })
    }

    fn query_lists(&self) -> Option<QueryLists> {
        self.query_lists
            .as_ref()
            .map(|(index, count)| QueryLists { q2k_index: index.address(), q2k_count: count.address() })
    }

    fn key_lists(&self) -> Option<KeyLists> {
        self.key_lists
            .as_ref()
            .map(|(offset, index)| KeyLists { k2q_offset: offset.address(), k2q_index: index.address() })
    }

    /// Runs the forward into memory filled with `poison`.
    fn forward(&self, gpu: &Gpu, plan: &AttnPlan, poison: u8) -> Result<(Tensor, Flat), super::Failure> {
        let out = Tensor::poisoned(gpu, "out", self.dtype, self.places.out, self.places.rows, poison)?;
        let lse = Flat::poisoned(gpu, "lse", self.lse_bytes, poison)?;
        let args = FwdArgs {
            q: self.q.address(),
            k: self.k.address(),
            v: self.v.address(),
            out: out.address(),
            lse: lse.address(),
            lists: self.query_lists(),
            error_flag: self.error_flag.address(),
        };
        // SAFETY: every buffer was made for this plan's sizes and layouts, and lives past the wait.
        unsafe { plan.forward(&gpu.stream, &args)? };
        gpu.wait()?;
        Ok((out, lse))
    }

    /// Runs the backward into memory, workspace included, filled with `poison`.
    fn backward(
        &self,
        gpu: &Gpu,
        plan: &AttnPlan,
        out: &Tensor,
        lse: &Flat,
        poison: u8,
    ) -> Result<Grads, super::Failure> {
        let (rows, kv_rows) = (self.places.rows, self.places.kv_rows);
        let grads = Grads {
            dq: Tensor::poisoned(gpu, "dq", self.dtype, self.places.dq, rows, poison)?,
            dk: Tensor::poisoned(gpu, "dk", self.dtype, self.places.dk, kv_rows, poison)?,
            dv: Tensor::poisoned(gpu, "dv", self.dtype, self.places.dv, kv_rows, poison)?,
        };
        let workspace = Flat::poisoned(gpu, "workspace", plan.workspace_bytes() as usize, poison)?;
        let args = self.backward_args(out, lse, &grads, &workspace);
        // SAFETY: as above.
        unsafe { plan.backward(&gpu.stream, &args)? };
        gpu.wait()?;
        let left = workspace.read::<u8>(gpu)?;
        if let (Some(place), Some((offset, _))) = (plan.kv_order(), &self.key_lists) {
            let order: Vec<i32> = left[place.start as usize..place.end as usize]
                .chunks_exact(4)
                .map(|x| i32::from_ne_bytes([x[0], x[1], x[2], x[3]]))
                .collect();
            longest_first(plan.problem(), &offset.read::<i32>(gpu)?, &order)?;
        }
        Ok(grads)
    }

    fn backward_args(&self, out: &Tensor, lse: &Flat, grads: &Grads, workspace: &Flat) -> BwdArgs {
        BwdArgs {
            q: self.q.address(),
            k: self.k.address(),
            v: self.v.address(),
            out: out.address(),
            lse: lse.address(),
            d_out: self.d_out.address(),
            d_lse: self.d_lse.as_ref().map(Flat::address),
            dq: grads.dq.address(),
            dk: grads.dk.address(),
            dv: grads.dv.address(),
            lists: self.key_lists(),
            query_lists: self.query_lists(),
            workspace: workspace.address(),
            error_flag: self.error_flag.address(),
        }
    }

    fn flag(&self, gpu: &Gpu) -> Result<i32, super::Failure> {
        Ok(self.error_flag.read::<i32>(gpu)?[0])
    }
}

/// Whether `order` [B, Hkv, N] has every KV block once, those that most groups of the heads sharing a KV head list first, equal ones by
/// their index.
fn longest_first(p: &Problem, offset: &[i32], order: &[i32]) -> Result<(), super::Failure> {
    let blocks = p.num_kv_blocks() as usize;
    let shared = (p.num_heads / p.num_kv_heads) as usize;
    for (kv_head, order) in order.chunks_exact(blocks).enumerate() {
        // A faulty inverse may hold anything; the kernel's sums wrap too.
        let lengths: Vec<i32> = (0..blocks)
            .map(|block| {
                (0..shared).fold(0i32, |sum, head| {
                    let at = (kv_head * shared + head) * (blocks + 1) + block;
                    sum.wrapping_add(offset[at + 1].wrapping_sub(offset[at]))
                })
            })
            .collect();
        let mut wanted: Vec<i32> = (0..blocks as i32).collect();
        wanted.sort_by_key(|&block| (std::cmp::Reverse(lengths[block as usize]), block));
        if order != wanted {
            let at = order.iter().zip(&wanted).position(|(a, b)| a != b).unwrap_or(0);
            return Err(format!(
                "KV blocks of KV head {kv_head} are walked as {:?}..., by the lengths of their lists from place {at} on {:?}",
                &order[at..blocks.min(at + 4)],
                &wanted[at..blocks.min(at + 4)]
            )
            .into());
        }
    }
    Ok(())
}

struct Grads {
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
}

impl Grads {
    fn values(&self, gpu: &Gpu) -> Result<AttnGrads<f32>, super::Failure> {
        let rows = |tensor: &Tensor| tensor.rows(gpu);
        Ok(AttnGrads { dq: rows(&self.dq)?, dk: rows(&self.dk)?, dv: rows(&self.dv)? })
    }
}

/// A gradient's name, whether its bits are the same in every run, and it in two of them.
type Beside<'a> = (&'static str, bool, &'a [f32], &'a [f32]);

/// Each gradient of two runs, by name, and whether its order of summing is fixed: of a gather it is dQ's, else dK's and
/// dV's unless CTAs walk in a ring, and dQ's too in a deterministic form.
fn beside<'a>(
    a: &'a AttnGrads<f32>,
    b: &'a AttnGrads<f32>,
    plan: &AttnPlan,
) -> Result<[Beside<'a>; 3], super::Failure> {
    let main = plan.backward_kernels().ok_or("a plan without a backward")?.main.spec();
    let KernelSpec::Attn(main) = main else { return Err("the backward is no attention kernel".into()) };
    let gather = main.lists().is_gather();
    let keys = !gather && main.tile().schedule != Schedule::Ring;
    Ok([
        ("dq", gather || main.deterministic() == Deterministic::Yes, &a.dq, &b.dq),
        ("dk", keys, &a.dk, &b.dk),
        ("dv", keys, &a.dv, &b.dv),
    ])
}

fn query_lists(gpu: &Gpu, lists: &KvListsBuf) -> Result<(Flat, Flat), super::Failure> {
    Ok((Flat::of(gpu, "q2k_index", &lists.index)?, Flat::of(gpu, "q2k_count", &lists.count)?))
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|x| x.to_bits()).collect()
}

/// NaN as floats, and a large finite number: what memory holds before a kernel writes it.
const POISONS: [u8; 2] = [0xFF, 0x7B];

fn forward(gpu: &mut Gpu, variant: &Variant, spec: AttnSpec) -> Outcome {
    let kernel = gpu.kernel(&KernelSpec::Attn(spec))?;
    let block_n = usize::from(spec.tile().block_n);
    gpu.expect(variant)?;
    gpu.expect_rounding(block_n, false)?;
    let gpu = &*gpu;
    let expected = gpu.expected()?;
    let (inputs, lowp) = (&expected.inputs, expected.lowp(block_n)?);
    let call = Call::new(gpu, variant, inputs)?;
    let problem = variant.problem(AttnOp::Fwd, inputs.max_selected());
    let plan = gpu.runtime.attention_with(&problem, &call.places.layouts(), None, &[kernel])?;
    let mut runs = Vec::new();
    for poison in POISONS {
        let (out, lse) = call.forward(gpu, &plan, poison)?;
        runs.push(AttnOutput { out: out.rows(gpu)?, lse: lse.read(gpu)? });
        flag_is(call.flag(gpu)?, 0)?;
    }
    let results = compare_output(inputs, &expected.oracle, lowp, &runs[0]);
    all_passed(&results)?;
    same("out of a second run", &bits(&runs[1].out), &bits(&runs[0].out))?;
    same("lse of a second run", &bits(&runs[1].lse), &bits(&runs[0].lse))?;
    Ok(lines(&results))
}

fn load(gpu: &mut Gpu, kernels: &[KernelSpec]) -> Result<Vec<Arc<Kernel>>, super::Failure> {
    kernels.iter().map(|spec| gpu.kernel(spec)).collect()
}

fn backward(gpu: &mut Gpu, variant: &Variant, spec: AttnSpec, kernels: &[KernelSpec]) -> Outcome {
    let loaded = load(gpu, kernels)?;
    let form = if spec.op() == AttnOp::BwdDq { Deterministic::Yes } else { spec.deterministic() };
    forward_and_backward(gpu, variant, form, &loaded)
}

/// The kernels that the runtime chooses by itself, from the committed table or its defaults.
fn dispatched(gpu: &mut Gpu, variant: &Variant, form: Deterministic) -> Outcome {
    let max_selected = gpu.expect(variant)?.inputs.max_selected();
    let problem = Problem { deterministic: form, ..variant.problem(AttnOp::Bwd, max_selected) };
    let explained = gpu.runtime.explain(&problem)?;
    let KernelSpec::Attn(chosen) = explained.kernel else {
        return Err(format!("attn_bwd is served by {}", explained.kernel).into());
    };
    if chosen.deterministic() < form {
        return Err(format!("a {form} problem is served by {}", explained.kernel).into());
    }
    Ok(format!("{explained}\n{}", forward_and_backward(gpu, variant, form, &[])?))
}

/// Forward, then two backwards, with these kernels where the runtime would choose others.
fn forward_and_backward(
    gpu: &mut Gpu,
    variant: &Variant,
    form: Deterministic,
    kernels: &[Arc<Kernel>],
) -> Outcome {
    let max_selected = gpu.expect(variant)?.inputs.max_selected();
    let problem = Problem { deterministic: form, ..variant.problem(AttnOp::Bwd, max_selected) };
    let plan = gpu.runtime.attention_with(&problem, &Places::of(variant).layouts(), None, kernels)?;
    let KernelSpec::Attn(forward) = plan.forward_kernel().spec() else {
        return Err("the forward is no attention kernel".into());
    };
    let block_n = usize::from(forward.tile().block_n);
    gpu.expect_rounding(block_n, true)?;
    let gpu = &*gpu;
    let expected = gpu.expected()?;
    let (inputs, lowp) = (&expected.inputs, expected.lowp(block_n)?);
    let lowp_grads = expected.grads.as_ref().ok_or("gradients were asked for")?;
    let call = Call::new(gpu, variant, inputs)?;
    let (out, lse) = call.forward(gpu, &plan, POISONS[0])?;
    let found = AttnOutput { out: out.rows(gpu)?, lse: lse.read(gpu)? };
    let mut runs = Vec::new();
    for poison in POISONS {
        runs.push(call.backward(gpu, &plan, &out, &lse, poison)?.values(gpu)?);
        flag_is(call.flag(gpu)?, 0)?;
    }
    let mut results = compare_output(inputs, &expected.oracle, lowp, &found);
    results.extend(compare_grads(inputs, &expected.oracle, lowp_grads, &runs[0]));
    // Of two runs the gradients of fixed order are the same bits, and the others within tolerance again.
    results.extend(compare_grads(inputs, &expected.oracle, lowp_grads, &runs[1]));
    all_passed(&results)?;
    for (name, fixed, second, first) in beside(&runs[1], &runs[0], &plan)? {
        if fixed {
            same(&format!("{name} of a second run"), &bits(second), &bits(first))?;
        }
    }
    // What was read is as it was.
    for tensor in [&call.q, &call.k, &call.v, &call.d_out, &out] {
        tensor.rows(gpu)?;
    }
    Ok(lines(&results[..5]))
}

/// A fault in one group's list, or in the inverse.
#[derive(Clone, Copy, Debug)]
enum Fault {
    IndexTooLarge,
    IndexNegative,
    CountTooLarge,
    CountNegative,
    InverseGroupTooLarge,
    InverseGroupNegative,
    InverseOffsetTooLarge,
    InverseOffsetDescending,
}

impl Fault {
    const ALL: [Fault; 8] = [
        Fault::IndexTooLarge,
        Fault::IndexNegative,
        Fault::CountTooLarge,
        Fault::CountNegative,
        Fault::InverseGroupTooLarge,
        Fault::InverseGroupNegative,
        Fault::InverseOffsetTooLarge,
        Fault::InverseOffsetDescending,
    ];

    /// Whether only the backward's lists are spoiled.
    fn in_inverse(self) -> bool {
        !matches!(
            self,
            Fault::IndexTooLarge | Fault::IndexNegative | Fault::CountTooLarge | Fault::CountNegative
        )
    }

    fn bit(self) -> i32 {
        match self {
            Fault::IndexTooLarge
            | Fault::IndexNegative
            | Fault::InverseGroupTooLarge
            | Fault::InverseGroupNegative => error_bits::INDEX_OUT_OF_RANGE,
            Fault::CountTooLarge
            | Fault::CountNegative
            | Fault::InverseOffsetTooLarge
            | Fault::InverseOffsetDescending => error_bits::COUNT_OUT_OF_RANGE,
        }
    }
}

/// A faulty list raises its bit, harms no other group, and nothing is read or written out of place.
fn faulty_lists(
    gpu: &mut Gpu,
    head_dim: u16,
    lists: Lists,
    fault: Fault,
    kernels: &[KernelSpec],
    form: Deterministic,
) -> Outcome {
    const GROUP: usize = 1;
    let loaded = load(gpu, kernels)?;
    let case = crate::corpus::cases()
        .into_iter()
        .find(|case| case.name == "counts_differ")
        .ok_or("the corpus has no case counts_differ")?;
    // Every group lists three blocks, so that the bad one has a list to spoil.
    let variant = Variant { case, head_dim, kind: ListKind::Three, lists };
    let mut inputs = Inputs::of(&variant);
    let good = inputs.lists.clone().ok_or("the variant has lists")?;
    let dims = good.dims;
    let blocks = dims.blocks() as i32;
    let gpu = &*gpu;
    let mut call = Call::new(gpu, &variant, &inputs)?;
    let mut bad = good.clone();
    let list = GROUP * dims.max_selected;
    match fault {
        Fault::IndexTooLarge => bad.index[list + 2] = blocks,
        Fault::IndexNegative => bad.index[list] = i32::MIN,
        Fault::CountTooLarge => {
            // What the clamped count then reads is in range.
            bad.index[list + 3..list + dims.max_selected].fill(0);
            bad.count[GROUP] = dims.max_selected as i32 + 1;
        }
        Fault::CountNegative => bad.count[GROUP] = -1,
        _ => {}
    }
    call.query_lists = Some(query_lists(gpu, &bad)?);
    let mut inverse = good.invert()?;
    let in_inverse = fault.in_inverse();
    match fault {
        Fault::InverseGroupTooLarge => inverse.index[0] = dims.groups() as i32,
        Fault::InverseGroupNegative => inverse.index[0] = -7,
        Fault::InverseOffsetTooLarge => {
            let last = dims.blocks();
            inverse.offset[last] = (dims.groups() * dims.max_selected) as i32 + 1;
        }
        Fault::InverseOffsetDescending => inverse.offset[1] = -1,
        _ => {}
    }
    call.key_lists =
        Some((Flat::of(gpu, "k2q_offset", &inverse.offset)?, Flat::of(gpu, "k2q_index", &inverse.index)?));
    let problem = Problem { deterministic: form, ..variant.problem(AttnOp::Bwd, dims.max_selected as u32) };
    let plan = gpu.runtime.attention_with(&problem, &call.places.layouts(), None, &loaded)?;
    let (out, lse) = call.forward(gpu, &plan, 0xFF)?;
    flag_is(call.flag(gpu)?, if in_inverse { 0 } else { fault.bit() })?;
    let found = out.rows(gpu)?;
    let found_lse: Vec<f32> = lse.read(gpu)?;

    // All groups but the spoiled one are as with good lists.
    inputs.lists = Some(good);
    let exact = oracle::forward(&inputs.shape, &inputs.attn(), inputs.lists().as_ref())?;
    let s = inputs.shape;
    let spoiled = dims.group_rows(GROUP);
    for row in 0..s.seqlen_q {
        for head in 0..s.num_heads {
            let ours = head == 0 && spoiled.contains(&row) && !in_inverse;
            let at = s.q_layout().offset(0, row, head);
            for (x, y) in found[at..at + s.head_dim].iter().zip(&exact.out[at..]) {
                if !x.is_finite() || (!ours && (f64::from(*x) - y).abs() > 0.02) {
                    return Err(format!("out of row {row}, head {head} is {x}, with good lists {y}").into());
                }
            }
            let (x, y) = (found_lse[head * s.seqlen_q + row], exact.lse[head * s.seqlen_q + row]);
            if x.is_nan() || (!ours && (f64::from(x) - y).abs() > 1e-3) {
                return Err(format!("lse of row {row}, head {head} is {x}, with good lists {y}").into());
            }
        }
    }

    // The backward ends, writes nothing out of place, and raises the bit.
    let grads = call.backward(gpu, &plan, &out, &lse, 0xFF)?.values(gpu)?;
    let raised = call.flag(gpu)?;
    flag_is(raised & fault.bit(), fault.bit())?;
    if let Some(at) = [&grads.dq, &grads.dk, &grads.dv].iter().position(|g| g.iter().any(|x| !x.is_finite()))
    {
        return Err(format!("{} is not finite everywhere", ["dq", "dk", "dv"][at]).into());
    }
    Ok(String::new())
}

/// Captured once and launched three times, forward and backward give the bits of a direct run.
fn in_a_graph(
    gpu: &mut Gpu,
    head_dim: u16,
    lists: Lists,
    kernels: &[KernelSpec],
    form: Deterministic,
) -> Outcome {
    let loaded = load(gpu, kernels)?;
    let case = crate::corpus::cases()
        .into_iter()
        .find(|case| case.name == "two_sequences")
        .ok_or("the corpus has no case two_sequences")?;
    let kind = if lists.is_dense() { ListKind::Dense } else { ListKind::Random };
    let variant = Variant { case, head_dim, kind, lists };
    let inputs = Inputs::of(&variant);
    let gpu = &*gpu;
    let call = Call::new(gpu, &variant, &inputs)?;
    let problem = Problem { deterministic: form, ..variant.problem(AttnOp::Bwd, inputs.max_selected()) };
    let plan = gpu.runtime.attention_with(&problem, &call.places.layouts(), None, &loaded)?;
    let (out, lse) = call.forward(gpu, &plan, 0xFF)?;
    let direct = call.backward(gpu, &plan, &out, &lse, 0xFF)?.values(gpu)?;

    let places = &call.places;
    let graph_out = Tensor::poisoned(gpu, "out", call.dtype, places.out, places.rows, 0xFF)?;
    let graph_lse = Flat::poisoned(gpu, "lse", call.lse_bytes, 0xFF)?;
    let graph_grads = Grads {
        dq: Tensor::poisoned(gpu, "dq", call.dtype, places.dq, places.rows, 0xFF)?,
        dk: Tensor::poisoned(gpu, "dk", call.dtype, places.dk, places.kv_rows, 0xFF)?,
        dv: Tensor::poisoned(gpu, "dv", call.dtype, places.dv, places.kv_rows, 0xFF)?,
    };
    let workspace = Flat::poisoned(gpu, "workspace", plan.workspace_bytes() as usize, 0xFF)?;
    gpu.wait()?;
    let forward = FwdArgs {
        q: call.q.address(),
        k: call.k.address(),
        v: call.v.address(),
        out: graph_out.address(),
        lse: graph_lse.address(),
        lists: call.query_lists(),
        error_flag: call.error_flag.address(),
    };
    let backward = call.backward_args(&graph_out, &graph_lse, &graph_grads, &workspace);
    // SAFETY: every buffer was made for this plan and outlives the graph's launches below.
    let graph = gpu.stream.capture(|| unsafe {
        plan.forward(&gpu.stream, &forward)?;
        plan.backward(&gpu.stream, &backward)
    })?;
    for _ in 0..3 {
        graph.launch(&gpu.stream)?;
    }
    gpu.wait()?;
    flag_is(call.flag(gpu)?, 0)?;
    let replayed = graph_grads.values(gpu)?;
    same("out of the graph", &bits(&graph_out.rows(gpu)?), &bits(&out.rows(gpu)?))?;
    same("lse of the graph", &bits(&graph_lse.read(gpu)?), &bits(&lse.read(gpu)?))?;
    for (name, fixed, ours, theirs) in beside(&replayed, &direct, &plan)? {
        let near = |(a, b): (&f32, &f32)| (a - b).abs() <= 0.02 * (1.0 + b.abs());
        if fixed {
            same(&format!("{name} of the graph"), &bits(ours), &bits(theirs))?;
        } else if !ours.iter().zip(theirs).all(near) {
            return Err(format!("{name} of the graph differs from the direct run").into());
        }
    }
    Ok(String::new())
}
