//! What selecting KV costs: every shipped granularity of `kv_select_fine` on one problem, timed by events.
//! On a GPU machine: `cargo run --release -p dsv-runtime --example fine_selection -- [SEQLEN [HEADS]]`.

use std::error::Error;
use std::process::ExitCode;
use std::sync::Arc;

use dsv_runtime::{FineArgs, FineProblem, Keep, Layout, Options, Runtime, decode_error_flag};
use dsv_spec::{BlockScore, Budget, GroupRule, space};
use half::bf16;

const RUNS: u32 = 20;
/// Columns of the low-rank queries and keys.
const RANK: u8 = 16;

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{error}");
            ExitCode::FAILURE
        }
    }
}

/// Roughly normal numbers: the sum of four uniform ones.
fn normals(count: usize, mut state: u64) -> Vec<bf16> {
    let mut uniform = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as f32 / (1u64 << 24) as f32 - 0.5
    };
    (0..count).map(|_| bf16::from_f32(1.73 * (uniform() + uniform() + uniform() + uniform()))).collect()
}

fn run() -> Result<(), Box<dyn Error>> {
    let numbers: Vec<u32> = std::env::args().skip(1).map(|a| a.parse()).collect::<Result<_, _>>()?;
    let seqlen = numbers.first().copied().unwrap_or(32_768);
    let heads = numbers.get(1).copied().unwrap_or(16);
    let options = Options { report: Arc::new(|notice| eprintln!("{notice}")), ..Options::default() };
    let runtime = Runtime::open(options)?;
    let device = runtime.device();
    let stream = device.new_stream()?;
    let layout = Layout::bshd(seqlen, heads, u32::from(RANK));
    let elements = seqlen as usize * heads as usize * usize::from(RANK);
    let q_lr = device.upload(&stream, &normals(elements, 1))?;
    let k_lr = device.upload(&stream, &normals(elements, 2))?;
    let flag = device.upload(&stream, &[0i32])?;

    println!("H {heads}, S {seqlen}, 10 % kept, ids; ms, mean of {RUNS}");
    for (query_group, kv_block) in space::SHIPPED_GRANULARITIES {
        for group_rule in GroupRule::PROXIES {
            let kept = seqlen.div_ceil(kv_block as u32).div_ceil(10);
            let problem = FineProblem {
                rank: RANK,
                query_group,
                kv_block,
                group_rule,
                block_score: BlockScore::Max,
                budget: Budget::TopK,
                scale: 1.0,
                keep: Keep::default(),
                batch: 1,
                num_heads: heads,
                seqlen_q: seqlen,
                seqlen_kv: seqlen,
                max_selected: kept,
            };
            let plan = runtime.fine_selection(&problem, layout, layout)?;
            let lists = problem.lists();
            let top_k = device.upload(&stream, &vec![kept as i32; heads as usize])?;
            let index = device.alloc(lists.index_bytes() as usize)?;
            let count = device.alloc(lists.count_bytes() as usize)?;
            let args = FineArgs {
                q_lr: q_lr.address(),
                k_lr: k_lr.address(),
                budget: top_k.address(),
                q2k_index: Some(index.address()),
                q2k_count: count.address(),
                bitmap: None,
                scores: None,
                keep_mask: None,
                capped: None,
                error_flag: flag.address(),
            };
            let (start, end) = (device.new_event()?, device.new_event()?);
            for run in 0..=RUNS {
                if run == 1 {
                    stream.record(&start)?;
                }
                // SAFETY: every buffer was made for this plan's sizes and lives past the synchronisation.
                unsafe { plan.select(&stream, &args)? };
            }
            stream.record(&end)?;
            end.synchronize()?;
            let ms = end.microseconds_since(&start)? / 1e3 / f64::from(RUNS);
            println!("query_group {query_group:3}, kv_block {kv_block:2}, {group_rule:6}: {ms:.3}");
        }
    }
    decode_error_flag(flag.read::<i32>(&stream, 0, 1)?[0])?;
    Ok(())
}
