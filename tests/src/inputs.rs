//! The numbers and lists of a variant, the same on every machine.

use crate::corpus::{LayoutKind, ListKind, Values, Variant};
use dsv_reference::attention::{AttnInputs, AttnShape, Layout, View};
use dsv_reference::element::Rounding;
use dsv_reference::lists::{KvLists, KvListsBuf, ListDims};
use dsv_reference::rng::SplitMix64;

/// Packed [B, S, H, D] tensors of 16-bit values, held as f32, and the lists.
#[derive(Clone, Debug)]
pub struct Inputs {
    /// Sizes.
    pub shape: AttnShape,
    /// Queries.
    pub q: Vec<f32>,
    /// Keys.
    pub k: Vec<f32>,
    /// Values.
    pub v: Vec<f32>,
    /// Gradient of out.
    pub d_out: Vec<f32>,
    /// Gradient of LSE, f32 [B, H, Sq].
    pub d_lse: Option<Vec<f32>>,
    /// The lists; none when dense.
    pub lists: Option<KvListsBuf>,
}

impl Inputs {
    /// Those of a variant.
    pub fn of(variant: &Variant) -> Inputs {
        let shape = variant.shape();
        let mut rng = SplitMix64::new(variant.case.seed);
        let dim = shape.head_dim;
        let (mut q, mut k) = (rng.normals(shape.q_len(), 1.0), rng.normals(shape.kv_len(), 1.0));
        let v = rng.normals(shape.kv_len(), 1.0);
        let d_out = rng.normals(shape.q_len(), 1.0);
        match variant.case.values {
            Values::Normal => {}
            Values::X16 => q.iter_mut().for_each(|x| *x *= 16.0),
            Values::EqualRows => {
                for rows in [&mut q, &mut k] {
                    let (first, rest) = rows.split_at_mut(dim);
                    rest.chunks_exact_mut(dim).for_each(|row| row.copy_from_slice(first));
                }
            }
            Values::OneHot => {
                // Query (b, i, h) is eight times key (b, 37 i mod Skv) of its KV head: that key's logit is near
                // 8 sqrt(dim), the others' a random 8 N(0, 1).
                for (row, q) in q.chunks_exact_mut(dim).enumerate() {
                    let (b, i, h) = (
                        row / (shape.num_heads * shape.seqlen_q),
                        row / shape.num_heads % shape.seqlen_q,
                        row % shape.num_heads,
                    );
                    let at = shape.kv_layout().offset(b, 37 * i % shape.seqlen_kv, shape.kv_head(h));
                    q.iter_mut().zip(&k[at..at + dim]).for_each(|(q, k)| *q = 8.0 * k);
                }
            }
            Values::Up | Values::Down => {
                let sign = if variant.case.values == Values::Up { 1.0 } else { -1.0 };
                let shift = (180.0 / (16.0 * shape.scale)) as f32;
                q.chunks_exact_mut(dim).for_each(|row| row[0] = 16.0);
                k.chunks_exact_mut(dim).for_each(|row| row[0] = sign * shift);
            }
            Values::Zero => q.fill(0.0),
        }
        let d_lse = variant.case.d_lse.then(|| rng.normals(shape.lse_len(), 1.0));
        let round = |values: Vec<f32>| values.into_iter().map(|x| variant.case.dtype.round(x)).collect();
        let (q, k, v, d_out) = (round(q), round(k), round(v), round(d_out));
        let lists = lists(variant, &mut rng);
        Inputs { shape, q, k, v, d_out, d_lse, lists }
    }

    /// q, k and v as the reference takes them.
    pub fn attn(&self) -> AttnInputs<'_, f32> {
        AttnInputs::packed(&self.shape, &self.q, &self.k, &self.v)
    }

    /// The gradient of out as the reference takes it.
    pub fn d_out(&self) -> View<'_, f32> {
        View::new(&self.d_out, self.shape.q_layout())
    }

    /// The lists as the reference takes them.
    pub fn lists(&self) -> Option<KvLists<'_>> {
        self.lists.as_ref().map(KvListsBuf::view)
    }

    /// Width of the lists; 0 when dense.
    pub fn max_selected(&self) -> u32 {
        self.lists.as_ref().map_or(0, |lists| lists.dims.max_selected as u32)
    }
}

fn lists(variant: &Variant, rng: &mut SplitMix64) -> Option<KvListsBuf> {
    let (query_group, kv_block) = variant.lists.block_size();
    if variant.lists.is_dense() {
        return None;
    }
    let shape = variant.shape();
    let mut dims = ListDims {
        batch: shape.batch,
        num_heads: shape.num_heads,
        seqlen_q: shape.seqlen_q,
        seqlen_kv: shape.seqlen_kv,
        query_group: usize::from(query_group),
        kv_block: usize::from(kv_block),
        max_selected: 1,
    };
    let blocks = dims.blocks();
    let spare = variant.case.spare_width as usize;
    let widest = match variant.kind {
        ListKind::Dense | ListKind::Empty | ListKind::One | ListKind::Last | ListKind::Alternate => 1,
        ListKind::Full | ListKind::Extremes | ListKind::Random => blocks,
        ListKind::Three => blocks.min(3),
        ListKind::Clustered => blocks.div_ceil(5),
    };
    dims.max_selected = widest + spare;
    if variant.kind == ListKind::Clustered {
        return Some(KvListsBuf::clustered(dims, widest, rng));
    }
    let all: Vec<i32> = (0..blocks as i32).collect();
    Some(KvListsBuf::from_fn(dims, |_, _, group| {
        let count = match (variant.kind, group) {
            (ListKind::Full, _) | (ListKind::Extremes, 0) => blocks,
            (ListKind::Dense | ListKind::Empty, _) | (ListKind::Extremes, 1) => 0,
            (ListKind::Alternate, _) => group % 2,
            (ListKind::Last, _) => return vec![blocks as i32 - 1],
            (ListKind::One, _) | (ListKind::Extremes, 2) => 1,
            (ListKind::Extremes | ListKind::Random, _) => rng.below(blocks + 1),
            (ListKind::Three | ListKind::Clustered, _) => widest,
        };
        let mut ids = rng.sample(&all, count);
        ids.sort_unstable();
        ids
    }))
}

/// Where the rows of one tensor lie in a buffer of `elements` elements that begins before and ends after them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Placement {
    /// Elements before row (0, 0, 0); a multiple of 8, so that rows keep their alignment.
    pub first: usize,
    /// Strides.
    pub layout: Layout,
    /// Elements of the buffer.
    pub elements: usize,
}

/// Elements that no kernel may touch before and after every tensor.
const GUARD: usize = 256;

impl Placement {
    /// Tensor number `tensor` of a call ([`LayoutKind::Mixed`] gives each its own).
    pub fn of(
        kind: LayoutKind,
        tensor: usize,
        batch: usize,
        seqlen: usize,
        heads: usize,
        dim: usize,
    ) -> Placement {
        let kind = match kind {
            LayoutKind::Mixed => {
                [LayoutKind::Bhsd, LayoutKind::Padded, LayoutKind::Packed, LayoutKind::Bshd][tensor % 4]
            }
            other => other,
        };
        let layout = match kind {
            LayoutKind::Bshd | LayoutKind::Mixed => Layout::bshd(seqlen, heads, dim),
            LayoutKind::Bhsd => Layout::bhsd(seqlen, heads, dim),
            LayoutKind::Padded => {
                let head = dim + 8;
                let seq = heads * head + 16;
                Layout { batch: seqlen * seq + 64, seq, head }
            }
            LayoutKind::Packed => Layout { batch: seqlen * 3 * heads * dim, seq: 3 * heads * dim, head: dim },
        };
        let extent = layout.extent(batch, seqlen, heads, dim);
        Placement { first: GUARD, layout, elements: GUARD + extent + GUARD }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::corpus::{cases, variants};
    use dsv_spec::Dtype;
    use std::collections::BTreeSet;

    #[test]
    fn names_are_unique() {
        let names: BTreeSet<String> = variants().iter().map(Variant::name).collect();
        assert_eq!(names.len(), variants().len());
        let cases: BTreeSet<String> = cases().into_iter().map(|case| case.name).collect();
        assert_eq!(cases.len(), super::super::corpus::cases().len());
    }

    #[test]
    fn lists_are_valid_and_as_their_kind_says() {
        for variant in variants() {
            let Some(lists) = Inputs::of(&variant).lists else { continue };
            let name = variant.name();
            lists.validate().unwrap_or_else(|e| panic!("{name}: {e}"));
            let blocks = lists.dims.blocks() as i32;
            let groups = lists.dims.groups();
            let all = |count: i32| lists.count.iter().all(|&c| c == count);
            match variant.kind {
                ListKind::Dense => unreachable!("{name} has lists"),
                ListKind::Full => assert!(all(blocks), "{name}"),
                ListKind::Empty => assert!(all(0), "{name}"),
                ListKind::One => assert!(all(1), "{name}"),
                ListKind::Last => {
                    assert!(
                        all(1) && lists.index.chunks(lists.dims.max_selected).all(|l| l[0] == blocks - 1)
                    );
                }
                ListKind::Alternate => {
                    let by_group = |(i, &c): (usize, &i32)| c == (i % groups % 2) as i32;
                    assert!(lists.count.iter().enumerate().all(by_group), "{name}");
                }
                ListKind::Extremes => {
                    assert_eq!(lists.count[0], blocks, "{name}");
                    assert!(groups < 2 || lists.count[1] == 0, "{name}");
                }
                ListKind::Random => assert!(lists.count.iter().all(|c| (0..=blocks).contains(c)), "{name}"),
                ListKind::Three => assert!(all(blocks.min(3)), "{name}"),
                ListKind::Clustered => assert!(all((blocks + 4) / 5), "{name}"),
            }
        }
    }

    /// What a corpus of attention needs, each by a property rather than a name.
    #[test]
    fn the_corpus_holds_every_kind_of_case() {
        let variants = variants();
        let has = |what: &str, property: &dyn Fn(&Variant) -> bool| {
            assert!(variants.iter().any(property), "no case: {what}");
        };
        has("length 1", &|v| v.case.seqlen_q == 1 && v.case.seqlen_kv == 1);
        has("no multiple of any block or group", &|v| v.case.seqlen_q % 8 != 0 && v.case.seqlen_kv % 8 != 0);
        has("empty groups", &|v| v.kind == ListKind::Empty);
        has("everything listed", &|v| v.kind == ListKind::Full);
        has("counts 0 and 1 adjacent", &|v| v.kind == ListKind::Alternate && v.case.seqlen_q > 256);
        has("counts that differ", &|v| v.kind == ListKind::Extremes && v.case.seqlen_q > 256);
        has("grouped heads", &|v| v.num_kv_heads() < v.case.num_heads && v.num_kv_heads() > 1);
        has("seqlen_q above 65,535", &|v| v.case.seqlen_q > 65_535);
        has("two lengths", &|v| v.case.seqlen_q != v.case.seqlen_kv);
        has(
            "a last block of one token",
            &|v| matches!(v.lists.block_size(), (_, kb) if kb > 1 && v.case.seqlen_kv % u32::from(kb) == 1),
        );
        has("batch above 1", &|v| v.case.batch > 1);
        has("d_lse", &|v| v.case.d_lse);
        for layout in [LayoutKind::Bhsd, LayoutKind::Padded, LayoutKind::Packed, LayoutKind::Mixed] {
            has(&format!("{layout:?}"), &|v| v.case.layout == layout);
        }
        for values in [Values::X16, Values::EqualRows, Values::OneHot, Values::Up, Values::Down, Values::Zero]
        {
            for dense in [true, false] {
                has(&format!("{values:?}"), &|v| v.case.values == values && v.lists.is_dense() == dense);
            }
        }
        for head_dim in [64, 96, 128, 256] {
            for dtype in [Dtype::Bf16, Dtype::F16] {
                for dense in [true, false] {
                    has("every head_dim and dtype", &|v| {
                        (v.head_dim, v.case.dtype, v.lists.is_dense()) == (head_dim, dtype, dense)
                    });
                }
            }
            for block_size in [(64, 64), (128, 128), (128, 64), (64, 128), (256, 128)] {
                has("every block size", &|v| v.head_dim == head_dim && v.lists.block_size() == block_size);
            }
        }
        for head_dim in dsv_spec::space::SHIPPED_HEAD_DIMS {
            for lists in dsv_spec::space::shipped_lists() {
                has("every shipped shape", &|v| v.head_dim == head_dim && v.lists == lists);
            }
        }
        for (query_group, kv_block) in
            [64, 128, 256].into_iter().flat_map(|group| [1, 8, 16].map(|block| (group, block)))
        {
            let lists = dsv_spec::Lists::Blocks { query_group, kv_block };
            has("every gathered shape", &|v| v.lists == lists);
        }
    }

    #[test]
    fn placements_keep_rows_apart_and_aligned() {
        for kind in [LayoutKind::Bshd, LayoutKind::Bhsd, LayoutKind::Padded, LayoutKind::Packed] {
            let (batch, seqlen, heads, dim) = (2, 5, 3, 64);
            let place = Placement::of(kind, 0, batch, seqlen, heads, dim);
            let rows: Vec<u32> = (0..(batch * seqlen * heads * dim) as u32).collect();
            let mut data = vec![u32::MAX; place.elements];
            place.layout.unpack(&rows, seqlen, heads, dim, &mut data[place.first..]);
            assert_eq!(place.layout.pack(&data[place.first..], batch, seqlen, heads, dim), rows, "{kind:?}");
            assert_eq!(data.iter().filter(|&&x| x != u32::MAX).count(), rows.len(), "{kind:?}");
            let l = place.layout;
            assert!([place.first, l.batch, l.seq, l.head].iter().all(|n| n % 8 == 0), "{kind:?}");
        }
    }
}
