//! A GPU that is planned for, whether or not there is one here: its memory, its committed dispatch table, and the
//! speeds that estimates of time rest on.

use super::super::{AttnShape, DeviceFacts, Dims, ListShape, Precision, Rates, SparseCost};
use super::{CTAS_PER_SM, LIBRARIES_BYTES, scratch_layout, sparse_cost};
use dsv_runtime::{Dispatch, Gpu, Registry, TableSource, silent};
use dsv_spec::{Arch, Deterministic, Dtype};

/// What is known of a GPU model.
struct ModelFacts {
    /// As the user names it.
    label: &'static str,
    /// As the driver names it, and the dispatch tables.
    name: &'static str,
    /// Bytes that a process finds free on an idle one.
    free_bytes: usize,
    rates: Rates,
}

/// Streaming multiprocessors of every model below.
const MULTIPROCESSORS: usize = 132;
const MIB: usize = 1 << 20;

/// The models that can be planned for. Products and copies are what 8192^3 bf16 products and large copies sustain;
/// row-wise kernels reach nine tenths of the copy. Attention without a table line: dense, and of units below 64 tokens
/// (`attn_fwd_gather.md`, `attn_bwd_gather.md`), head_dim 128, forward and backward.
const MODELS: [ModelFacts; 2] = [
    ModelFacts {
        label: "h100",
        name: "NVIDIA H100 80GB HBM3",
        free_bytes: 80_500 * MIB,
        rates: Rates { matmul: 650e12, memory: 2.7e12, attention: 500e12, gather: [220e12, 380e12] },
    },
    ModelFacts {
        label: "h200",
        name: "NVIDIA H200",
        free_bytes: 142_600 * MIB,
        rates: Rates { matmul: 650e12, memory: 3.8e12, attention: 500e12, gather: [220e12, 380e12] },
    },
];

/// Speeds of the GPU with this driver name.
pub(super) fn rates(name: &str) -> Option<Rates> {
    MODELS.iter().find(|m| m.name == name).map(|m| m.rates.clone())
}

/// Microseconds of forward + backward from the nearest line of the dispatch's table.
pub(super) fn attention_us(
    dispatch: &Dispatch,
    shape: &AttnShape,
    lists: Option<(&ListShape, f64)>,
) -> Option<f64> {
    let table = dispatch.table()?;
    let blocks = lists.map(|(l, _)| (l.query_group as u16, l.kv_block as u16));
    // Any block size's line has the dense time.
    let (query_group, kv_block) = blocks.or_else(|| {
        table
            .crossovers
            .iter()
            .find(|c| c.head_dim as usize == shape.head_dim)
            .map(|c| (c.query_group, c.kv_block))
    })?;
    let line =
        table.crossover(Dtype::Bf16, shape.head_dim as u16, query_group, kv_block, shape.seqlen_kv as u32)?;
    let pairs = shape.seqlen_q as f64 * shape.seqlen_kv as f64 / f64::from(line.seqlen).powi(2);
    let heads = (shape.batch * shape.heads) as f64 / f64::from(line.num_heads);
    let us = match lists {
        None => line.dense_us,
        Some((_, skipped)) => between(&line.sparse_us, 100.0 * skipped)?,
    };
    Some(us * pairs * heads)
}

/// The value at `x` on straight lines through ascending points, the first and the last of which go on.
fn between(points: &[(u8, f64)], x: f64) -> Option<f64> {
    let at =
        points.partition_point(|&(p, _)| f64::from(p) < x).clamp(1, points.len().saturating_sub(1).max(1));
    let (left, right) = (points.get(at - 1)?, points.get(at).or(points.first())?);
    let span = f64::from(right.0) - f64::from(left.0);
    if span == 0.0 {
        return Some(left.1);
    }
    let y = left.1 + (right.1 - left.1) * (x - f64::from(left.0)) / span;
    // Beyond the last point a line would fall below what selection and launches take.
    Some(y.max(points.iter().map(|p| p.1).fold(f64::INFINITY, f64::min) / 2.0))
}

/// A GPU model as [`DeviceFacts`]: lays runs out and estimates, runs nothing.
pub struct PlannedGpu {
    model: &'static ModelFacts,
    dispatch: Dispatch,
    deterministic: Deterministic,
}

impl PlannedGpu {
    /// Names that [`PlannedGpu::new`] knows.
    pub fn known() -> Vec<&'static str> {
        MODELS.iter().map(|m| m.label).collect()
    }

    /// The model of this name; `None` for one that is not known. Without a committed table of it, defaults are
    /// planned with.
    pub fn new(label: &str, deterministic: bool) -> Option<PlannedGpu> {
        let model = MODELS.iter().find(|m| m.label == label)?;
        let gpu = Gpu { name: model.name.to_string(), capability: (9, 0), arch: Arch::Sm90a };
        let dispatch = Dispatch::new(gpu, &TableSource::Committed, Registry::committed(), &silent());
        let deterministic = if deterministic { Deterministic::Yes } else { Deterministic::No };
        Some(PlannedGpu { model, dispatch, deterministic })
    }
}

impl DeviceFacts for PlannedGpu {
    fn name(&self) -> String {
        let table = match self.dispatch.table() {
            Some(table) => format!("its dispatch table of {}", table.meta.date),
            None => "no dispatch table of it".to_string(),
        };
        format!("{}, bf16, planned for: {table}", self.model.name)
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
        scratch_layout(dims, self.deterministic, &self.dispatch, CTAS_PER_SM * MULTIPROCESSORS).bytes
    }

    fn free_bytes(&self) -> Option<usize> {
        Some(self.model.free_bytes - LIBRARIES_BYTES)
    }

    fn host_free_bytes(&self) -> Option<usize> {
        None
    }

    fn sparse_cost(&self, shape: &AttnShape, query_group: usize, kv_block: usize) -> Option<SparseCost> {
        sparse_cost(&self.dispatch, shape, query_group, kv_block)
    }

    fn rates(&self) -> Option<Rates> {
        Some(self.model.rates.clone())
    }

    fn attention_us(&self, shape: &AttnShape, lists: Option<(&ListShape, f64)>) -> Option<f64> {
        attention_us(&self.dispatch, shape, lists)
    }

    fn dispatch_table(&self) -> Option<&dsv_spec::DispatchTable> {
        self.dispatch.table()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use dsv_runtime::MemoryNeeded;

    fn dims(head_dim: usize) -> Dims {
        Dims {
            batch: 1,
            seqlen: 32_768,
            text_tokens: 120,
            text_copies: 1,
            dim: 16 * head_dim,
            heads: 16,
            head_dim,
            d_lr: 16,
            mlp_width: 128 * head_dim,
            samples: 64,
            params: 0,
            lists: None,
        }
    }

    #[test]
    fn an_accumulator_is_counted_where_the_table_takes_a_backward_that_has_one() {
        for head_dim in [64, 96, 128] {
            let dims = dims(head_dim);
            let accumulator = 4 * 16 * 32_768 * head_dim;
            let exact = PlannedGpu::new("h100", true).unwrap();
            let any = PlannedGpu::new("h100", false).unwrap();
            let problem = super::super::problems(&dims, Deterministic::No)[0];
            let chosen = MemoryNeeded::chosen(&problem, &any.dispatch).unwrap();
            let kernel = any.dispatch.explain(&problem).unwrap().kernel.to_string();
            let has = kernel.contains("_nondet_");
            assert_eq!(chosen.workspace as usize >= accumulator, has, "{kernel}: {chosen:?}");
            assert!(exact.scratch_bytes(&dims) <= any.scratch_bytes(&dims));
        }
        assert!(PlannedGpu::new("b200", true).is_none());
    }

    #[test]
    fn times_scale_with_heads_and_pairs_and_fall_with_sparsity() {
        let gpu = PlannedGpu::new("h100", false).unwrap();
        let shape = |heads, seqlen| AttnShape {
            batch: 1,
            heads,
            seqlen_q: seqlen,
            seqlen_kv: seqlen,
            head_dim: 128,
            scale: 1.0,
        };
        let lists = ListShape {
            batch: 1,
            heads: 16,
            seqlen: 1 << 15,
            query_group: 64,
            kv_block: 64,
            max_selected: 51,
        };
        let dense = gpu.attention_us(&shape(16, 1 << 15), None).unwrap();
        // 3.5 * 4 S^2 D H at 300 to 900 TFLOP/s.
        let flop = 14.0 * f64::from(1 << 30) * 128.0 * 16.0;
        assert!((300e12..900e12).contains(&(flop / dense * 1e6)), "{dense} us");
        let twice = gpu.attention_us(&shape(32, 1 << 15), None).unwrap();
        assert!((twice / dense - 2.0).abs() < 1e-9);
        let sparse = |skipped| gpu.attention_us(&shape(16, 1 << 15), Some((&lists, skipped))).unwrap();
        assert!(sparse(0.5) > sparse(0.8) && sparse(0.8) > sparse(0.9) && sparse(0.9) > sparse(0.98));
        assert!(sparse(0.9) < dense / 4.0 && sparse(0.999) > 0.0);
        assert_eq!(gpu.attention_us(&AttnShape { head_dim: 80, ..shape(16, 1 << 15) }, None), None);
    }
}
