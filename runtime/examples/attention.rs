//! Sparse attention from a Rust program: select KV lists, attend, invert the lists, differentiate.
//! On a GPU machine: `cargo run --release -p dsv-runtime --example attention`.

use std::error::Error;
use std::process::ExitCode;
use std::sync::Arc;

use dsv_runtime::{
    AttnLayouts, BwdArgs, FwdArgs, Keep, KeyLists, Layout, ListShape, Options, QueryLists, Runtime,
    SelectArgs, SelectProblem, decode_error_flag,
};
use dsv_spec::{AttnOp, Deterministic, Dtype, GroupRule, Lists, Problem};
use half::bf16;

const SEQLEN: u32 = 8192;
const HEADS: u32 = 8;
const HEAD_DIM: u16 = 128;
const RANK: u8 = 16;
const KEPT_BLOCKS: u32 = 13; // of 128: 10 %

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{error}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<(), Box<dyn Error>> {
    // Notices (no table for this GPU, kernels compiled here) go where the program wants them.
    let options = Options { report: Arc::new(|notice| eprintln!("{notice}")), ..Options::default() };
    let runtime = Runtime::open(options)?;
    let device = runtime.device();
    let stream = device.new_stream()?;

    // 1. Plans: shapes, strides and list widths are checked, kernels chosen and loaded, once.
    let problem = Problem {
        op: AttnOp::Bwd, // the forward comes with it
        dtype: Dtype::Bf16,
        head_dim: HEAD_DIM,
        lists: Lists::Blocks { query_group: 64, kv_block: 64 },
        batch: 1,
        num_heads: HEADS,
        num_kv_heads: HEADS,
        seqlen_q: SEQLEN,
        seqlen_kv: SEQLEN,
        max_selected: KEPT_BLOCKS,
        deterministic: Deterministic::No,
    };
    let selected = SelectProblem {
        rank: RANK,
        query_group: 64,
        kv_block: 64,
        group_rule: GroupRule::Centre,
        keep: Keep::default(),
        batch: 1,
        num_heads: HEADS,
        seqlen_q: SEQLEN,
        seqlen_kv: SEQLEN,
        max_selected: KEPT_BLOCKS,
    };
    println!("{}", runtime.explain(&problem)?);
    let low_rank = Layout::bshd(SEQLEN, HEADS, u32::from(RANK));
    let selection = runtime.selection(&selected, low_rank, low_rank)?;
    let shape = ListShape::of(&problem);
    let inversion = runtime.lists(&shape)?;
    let attention = runtime.attention(&problem, &AttnLayouts::bshd(&problem), None)?;

    // 2. Memory is the caller's. A trainer carves these from an arena of its own.
    let columns = HEADS as usize * HEAD_DIM as usize;
    let mut seed = 1;
    let mut random = |columns: usize| device.upload(&stream, &normal(SEQLEN as usize * columns, &mut seed));
    let (q, k, v, d_out) = (random(columns)?, random(columns)?, random(columns)?, random(columns)?);
    let low_rank_columns = HEADS as usize * usize::from(RANK);
    let (q_lr, k_lr) = (random(low_rank_columns)?, random(low_rank_columns)?);
    let tensor = || device.alloc(SEQLEN as usize * columns * size_of::<bf16>());
    let (out, dq, dk, dv) = (tensor()?, tensor()?, tensor()?, tensor()?);
    let lse = device.alloc((HEADS * SEQLEN) as usize * size_of::<f32>())?;
    let top_k = device.upload(&stream, &[KEPT_BLOCKS as i32; HEADS as usize])?;
    let q2k_index = device.alloc(shape.index_bytes() as usize)?;
    let q2k_count = device.alloc(shape.count_bytes() as usize)?;
    let k2q_offset = device.alloc(shape.offset_bytes() as usize)?;
    let k2q_index = device.alloc(shape.index_bytes() as usize)?;
    let workspace = device.alloc(attention.workspace_bytes() as usize)?;
    let error_flag = device.upload(&stream, &[0i32])?;

    // 3. The hot calls: they allocate nothing and wait for nothing, and may be captured in a CUDA graph.
    let lists = QueryLists { q2k_index: q2k_index.address(), q2k_count: q2k_count.address() };
    let inverted = KeyLists { k2q_offset: k2q_offset.address(), k2q_index: k2q_index.address() };
    let select = SelectArgs {
        q_lr: q_lr.address(),
        k_lr: k_lr.address(),
        top_k: top_k.address(),
        lists,
        scores: None,
        keep_mask: None,
        error_flag: error_flag.address(),
    };
    let forward = FwdArgs {
        q: q.address(),
        k: k.address(),
        v: v.address(),
        out: out.address(),
        lse: lse.address(),
        lists: Some(lists),
        error_flag: error_flag.address(),
    };
    let backward = BwdArgs {
        q: q.address(),
        k: k.address(),
        v: v.address(),
        out: out.address(),
        lse: lse.address(),
        d_out: d_out.address(),
        d_lse: None,
        dq: dq.address(),
        dk: dk.address(),
        dv: dv.address(),
        lists: Some(inverted),
        query_lists: attention.needs_query_lists().then_some(lists),
        workspace: workspace.address(),
        error_flag: error_flag.address(),
    };
    // SAFETY: every address is a live allocation of the size its plan asks for, and all work is on one stream.
    unsafe {
        selection.select(&stream, &select)?;
        attention.forward(&stream, &forward)?;
        inversion.invert(&stream, &lists, &inverted, error_flag.address())?;
        attention.backward(&stream, &backward)?;
    }

    // 4. The next natural synchronisation: the error flag first, then results.
    decode_error_flag(error_flag.read::<i32>(&stream, 0, 1)?[0])?;
    let counts: Vec<i32> = q2k_count.read(&stream, 0, (HEADS * shape.num_groups) as usize)?;
    let lse: Vec<f32> = lse.read(&stream, 0, (HEADS * SEQLEN) as usize)?;
    println!("each group of 64 queries attends to {} of {} KV blocks", counts[0], shape.num_kv_blocks);
    println!("lse[0, 0, 0] = {:.4}", lse[0]);
    for (name, gradient) in [("dq", &dq), ("dk", &dk), ("dv", &dv)] {
        let values: Vec<bf16> = gradient.read(&stream, 0, SEQLEN as usize * columns)?;
        let squares: f64 = values.iter().map(|x| x.to_f64() * x.to_f64()).sum();
        println!("|{name}| = {:.4}", squares.sqrt());
    }
    Ok(())
}

/// Pseudo-random numbers with mean 0 and variance 1: sums of twelve uniform ones.
fn normal(len: usize, seed: &mut u64) -> Vec<bf16> {
    let mut uniform = || {
        *seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (*seed >> 40) as f32 / (1u64 << 24) as f32
    };
    (0..len).map(|_| bf16::from_f32((0..12).map(|_| uniform()).sum::<f32>() - 6.0)).collect()
}
