//! What a template is told of a spec: every value as the CUDA literal it becomes.

use std::collections::BTreeMap;

use dsv_spec::{
    AttnTile, BlockScore, Budget, Deterministic, Dtype, Facts, GroupRule, KernelSpec, Schedule, SelectOp,
    Sparsity,
};

/// Variables of a template by name.
pub(crate) type Variables = BTreeMap<&'static str, String>;

/// The device type of `dsv/types.cuh`.
fn element(dtype: Dtype) -> &'static str {
    match dtype {
        Dtype::Bf16 => "dsv::Bf16",
        Dtype::F16 => "dsv::F16",
        Dtype::F32 => "float",
    }
}

/// All variables of a spec: its name, its fields, and every number derived from them.
pub(crate) fn variables(spec: &KernelSpec) -> Variables {
    let Facts { threads, ctas_per_sm, smem_bytes, params_bytes, consumer_registers, producer_registers } =
        spec.facts();
    let mut v = Variables::new();
    v.insert("name", spec.name());
    v.insert("threads", threads.to_string());
    v.insert("ctas_per_sm", ctas_per_sm.to_string());
    v.insert("smem_bytes", smem_bytes.to_string());
    v.insert("params_bytes", params_bytes.to_string());
    v.insert("consumer_registers", consumer_registers.to_string());
    v.insert("producer_registers", producer_registers.to_string());
    match spec {
        KernelSpec::Attn(s) => {
            let AttnTile { block_m, block_n, groups, consumers, stages, cluster, schedule } = s.tile();
            let (query_group, kv_block) = s.lists().block_size();
            v.insert("dtype_type", element(s.dtype()).into());
            v.insert("head_dim", s.head_dim().to_string());
            v.insert("query_group", query_group.to_string());
            v.insert("kv_block", kv_block.to_string());
            v.insert("block_m", block_m.to_string());
            v.insert("block_n", block_n.to_string());
            v.insert("groups_per_cta", groups.to_string());
            v.insert("consumers", consumers.to_string());
            v.insert("stages", stages.to_string());
            v.insert("cluster", cluster.to_string());
            v.insert("out_apart", s.has_out_apart().to_string());
            v.insert("ring", (schedule == Schedule::Ring).to_string());
            v.insert("deterministic", (s.deterministic() == Deterministic::Yes).to_string());
            // A text for any sparsity is not told one: a template that asks is a mistake.
            if let Sparsity::Percent(percent) = s.sparsity() {
                v.insert("sparsity", percent.to_string());
            }
        }
        KernelSpec::Select(s) => {
            v.insert("dtype_type", element(s.dtype()).into());
            v.insert("rank", s.rank().to_string());
            v.insert("query_group", s.query_group().to_string());
            v.insert("kv_block", s.kv_block().to_string());
            v.insert("groups_per_cta", s.tile().groups.to_string());
            v.insert("warps", s.tile().warps.to_string());
            match s.op() {
                SelectOp::Rows => {
                    v.insert("group_rule_centre", (s.group_rule() == GroupRule::Centre).to_string());
                }
                SelectOp::Fine => {
                    v.insert("group_rule_mean", (s.group_rule() == GroupRule::Mean).to_string());
                    v.insert("group_rule_mass", (s.group_rule() == GroupRule::Mass4).to_string());
                    v.insert("block_score_mass", (s.block_score() == BlockScore::Mass).to_string());
                    v.insert("stored_steps", s.stored_steps().to_string());
                    v.insert("kept_scores", s.kept_scores().to_string());
                    v.insert("queries", s.group_rule().queries().to_string());
                    v.insert("budget_top_p", (s.budget() == Budget::TopP).to_string());
                }
            }
        }
        KernelSpec::List(_) => {}
        KernelSpec::Pointwise(s) => {
            v.insert("dtype_type", element(s.dtype).into());
            v.insert("dim", s.dim.to_string());
            v.insert("rank", s.rank.to_string());
            v.insert("vector", s.vector.to_string());
        }
    }
    v
}

/// The spec in one line of prose, for the banner.
pub(crate) fn describe(spec: &KernelSpec) -> String {
    match spec {
        KernelSpec::Attn(s) => {
            let AttnTile { block_m, block_n, groups, consumers, stages, cluster, schedule } = s.tile();
            let lists = match s.lists().block_size() {
                (0, 0) => "dense".to_owned(),
                (query_group, kv_block) => format!("query_group {query_group}, kv_block {kv_block}"),
            };
            let sparsity = match s.sparsity() {
                Sparsity::Any => "any sparsity".to_owned(),
                Sparsity::Percent(percent) => format!("sparsity {percent} %"),
            };
            let order = match s.deterministic() {
                Deterministic::Yes => "deterministic",
                Deterministic::No => "not deterministic",
            };
            format!(
                "{}, {}, head_dim {}, {lists}, {sparsity}, {order}, {};\n\
                 // block_m {block_m}, block_n {block_n}, groups per CTA {groups}, consumers {consumers}, stages {stages}, \
                 cluster {cluster}, schedule {schedule}",
                s.op(),
                s.dtype(),
                s.head_dim(),
                s.arch()
            )
        }
        KernelSpec::Select(s) => format!(
            "{}, {}, rank {}, query_group {}, kv_block {}, {} query, {} score, {};\n\
             // groups per CTA {}, warps {}",
            s.op(),
            s.dtype(),
            s.rank(),
            s.query_group(),
            s.kv_block(),
            s.group_rule(),
            s.block_score(),
            s.arch(),
            s.tile().groups,
            s.tile().warps
        ),
        KernelSpec::List(s) => format!("{}, {}", s.op, s.arch),
        KernelSpec::Pointwise(s) => match s.dim {
            0 => format!("{}, {}, vector {}, {}", s.op, s.dtype, s.vector, s.arch),
            dim => {
                let rank = if s.op.bakes_rank() { format!(", rank {}", s.rank) } else { String::new() };
                format!("{}, {}, rows of {dim}{rank}, vector {}, {}", s.op, s.dtype, s.vector, s.arch)
            }
        },
    }
}
