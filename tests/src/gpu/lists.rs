//! `kv_invert` and `kv_validate` over the corpus's lists, and their answer to each kind of fault.

use super::tensor::{Flat, flag_is, same};
use super::{ARCH, Failure, Gpu, GpuTest, Outcome};
use crate::corpus::variants;
use crate::inputs::Inputs;
use dsv_reference::lists::{KvListsBuf, ListDims};
use dsv_reference::rng::SplitMix64;
use dsv_runtime::{KeyLists, ListPlan, ListShape, QueryLists};
use dsv_spec::params::error_bits;
use dsv_spec::{KernelSpec, ListOp, ListSpec};

/// Every list of the corpus (one head_dim: lists do not depend on it), larger ones, and faults.
pub(super) fn tests() -> Vec<GpuTest> {
    let kernel = |op| KernelSpec::List(ListSpec { op, arch: ARCH });
    let both = [ListOp::Invert, ListOp::Validate].map(kernel).to_vec();
    let mut tests = Vec::new();
    for variant in variants() {
        if variant.lists.is_dense() || variant.head_dim != variant.case.head_dim[0] {
            continue;
        }
        let name = variant.name().replace(&format!("-d{}", variant.head_dim), "");
        tests.push(GpuTest::new(format!("kv_lists/{name}"), both.clone(), move |gpu| {
            let inputs = Inputs::of(&variant);
            good(gpu, inputs.lists.as_ref().ok_or("the variant has lists")?)
        }));
    }
    for (name, groups, blocks, width) in
        [("wide", 1027, 1500, 300), ("many_groups", 20_000, 70, 5), ("many_blocks", 40, 20_001, 64)]
    {
        tests.push(GpuTest::new(format!("kv_lists/{name}"), both.clone(), move |gpu| {
            let dims = ListDims {
                batch: 2,
                num_heads: 3,
                seqlen_q: groups,
                seqlen_kv: blocks,
                query_group: 1,
                kv_block: 1,
                max_selected: width,
            };
            good(gpu, &KvListsBuf::random_counts(dims, 0..=width, &mut SplitMix64::new(width as u64)))
        }));
    }
    for fault in Fault::ALL {
        tests.push(GpuTest::new(format!("kv_lists/{fault:?}"), both.clone(), move |gpu| faulty(gpu, fault)));
    }
    tests
}

struct Run {
    offset: Vec<i32>,
    index: Vec<i32>,
    invert_flag: i32,
    validate_flag: i32,
}

fn shape(dims: &ListDims) -> ListShape {
    ListShape {
        batch: dims.batch as u32,
        num_heads: dims.num_heads as u32,
        num_groups: dims.groups() as u32,
        num_kv_blocks: dims.blocks() as u32,
        max_selected: dims.max_selected as u32,
    }
}

fn run(gpu: &Gpu, plan: &ListPlan, lists: &KvListsBuf) -> Result<Run, Failure> {
    let shape = *plan.shape();
    let index = Flat::of(gpu, "q2k_index", &lists.index)?;
    let count = Flat::of(gpu, "q2k_count", &lists.count)?;
    // 0xFF: -1 past the last offset, as the reference leaves it.
    let k2q_offset = Flat::poisoned(gpu, "k2q_offset", shape.offset_bytes() as usize, 0xFF)?;
    let k2q_index = Flat::poisoned(gpu, "k2q_index", shape.index_bytes() as usize, 0xFF)?;
    let flags = [Flat::of(gpu, "error_flag", &[0i32])?, Flat::of(gpu, "error_flag", &[0i32])?];
    let from = QueryLists { q2k_index: index.address(), q2k_count: count.address() };
    let to = KeyLists { k2q_offset: k2q_offset.address(), k2q_index: k2q_index.address() };
    // SAFETY: every buffer was made for this plan's sizes and lives past the wait.
    unsafe {
        plan.invert(&gpu.stream, &from, &to, flags[0].address())?;
        plan.validate(&gpu.stream, &from, flags[1].address())?;
    }
    gpu.wait()?;
    same("q2k_index, which is only read", &index.read::<i32>(gpu)?, &lists.index)?;
    same("q2k_count, which is only read", &count.read::<i32>(gpu)?, &lists.count)?;
    Ok(Run {
        offset: k2q_offset.read(gpu)?,
        index: k2q_index.read(gpu)?,
        invert_flag: flags[0].read::<i32>(gpu)?[0],
        validate_flag: flags[1].read::<i32>(gpu)?[0],
    })
}

/// Valid lists: no flag, and exactly the reference's inverse.
fn good(gpu: &mut Gpu, lists: &KvListsBuf) -> Outcome {
    let plan = gpu.runtime.lists(&shape(&lists.dims))?;
    let found = run(gpu, &plan, lists)?;
    flag_is(found.validate_flag, 0)?;
    flag_is(found.invert_flag, 0)?;
    let wanted = lists.invert()?;
    same("k2q_offset", &found.offset, &wanted.offset)?;
    same("k2q_index", &found.index, &wanted.index)?;
    Ok(format!("  {} lists, {} entries", lists.count.len(), lists.count.iter().sum::<i32>()))
}

#[derive(Clone, Copy, Debug)]
enum Fault {
    IndexTooLarge,
    IndexNegative,
    CountTooLarge,
    CountNegative,
    Repeated,
    Descending,
}

impl Fault {
    const ALL: [Fault; 6] = [
        Fault::IndexTooLarge,
        Fault::IndexNegative,
        Fault::CountTooLarge,
        Fault::CountNegative,
        Fault::Repeated,
        Fault::Descending,
    ];
}

/// A fault in one list: both kernels raise the bits they should, the other groups' entries stay, and what the inverse
/// holds is safe to follow.
fn faulty(gpu: &mut Gpu, fault: Fault) -> Outcome {
    let dims = ListDims {
        batch: 2,
        num_heads: 2,
        seqlen_q: 200,
        seqlen_kv: 150,
        query_group: 1,
        kv_block: 1,
        max_selected: 12,
    };
    // Full lists, so that a count one too large still ends in real entries of the next list.
    let good = KvListsBuf::random(dims, 12, &mut SplitMix64::new(3));
    let mut bad = good.clone();
    let (list, at) = (dims.groups() + 77, (dims.groups() + 77) * 12);
    let (validate, invert) = match fault {
        Fault::IndexTooLarge => {
            bad.index[at + 11] = dims.blocks() as i32;
            (error_bits::INDEX_OUT_OF_RANGE, error_bits::INDEX_OUT_OF_RANGE)
        }
        Fault::IndexNegative => {
            bad.index[at] = -1;
            (error_bits::INDEX_OUT_OF_RANGE, error_bits::INDEX_OUT_OF_RANGE)
        }
        Fault::CountTooLarge => {
            bad.count[list] = 13;
            (error_bits::COUNT_OUT_OF_RANGE, error_bits::COUNT_OUT_OF_RANGE)
        }
        Fault::CountNegative => {
            bad.count[list] = -1;
            (error_bits::COUNT_OUT_OF_RANGE, error_bits::COUNT_OUT_OF_RANGE)
        }
        Fault::Repeated => {
            bad.index[at + 5] = bad.index[at + 4];
            (error_bits::LIST_NOT_ASCENDING, error_bits::LIST_NOT_ASCENDING)
        }
        Fault::Descending => {
            bad.index.swap(at + 4, at + 5);
            // The inverse of unique ids does not depend on their order.
            (error_bits::LIST_NOT_ASCENDING, 0)
        }
    };
    if bad.validate().is_ok() {
        return Err("the reference accepts the fault: the case tests nothing".into());
    }
    let plan = gpu.runtime.lists(&shape(&dims))?;
    let found = run(gpu, &plan, &bad)?;
    flag_is(found.validate_flag, validate)?;
    flag_is(found.invert_flag, invert)?;
    // What the inverse should hold: the lists with the faulty entries left out, repeated ones kept once.
    let mut cleaned = bad.clone();
    let kept = (bad.count[list].clamp(0, 12)) as usize;
    let mut ids: Vec<i32> = bad.index[at..at + kept]
        .iter()
        .copied()
        .filter(|&n| n >= 0 && (n as usize) < dims.blocks())
        .collect();
    ids.sort_unstable();
    ids.dedup();
    cleaned.index[at..at + 12].fill(-1);
    cleaned.index[at..at + ids.len()].copy_from_slice(&ids);
    cleaned.count[list] = ids.len() as i32;
    let wanted = cleaned.invert()?;
    let (slab, width) = (dims.groups() * dims.max_selected, dims.blocks() + 1);
    for s in 0..dims.batch * dims.num_heads {
        let offset = &found.offset[s * width..][..width];
        if offset[0] != 0 || !offset.is_sorted() || offset[width - 1] as usize > slab {
            return Err(format!("k2q_offset of slab {s} is not ascending within 0..={slab}").into());
        }
        let index = &found.index[s * slab..][..offset[width - 1] as usize];
        if let Some(group) = index.iter().find(|&&g| g < 0 || g as usize >= dims.groups()) {
            return Err(format!("k2q_index of slab {s} names group {group}").into());
        }
        // The faulty slab is list 77 of (batch 0, head 1); a repeated id may leave a filler behind it.
        if s != 1 || !matches!(fault, Fault::Repeated) {
            same("k2q_offset", offset, &wanted.offset[s * width..][..width])?;
            same("k2q_index", index, &wanted.index[s * slab..][..index.len()])?;
        }
    }
    Ok(String::new())
}
