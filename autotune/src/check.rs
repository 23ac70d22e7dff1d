//! Is a kernel right? On a small problem every element is compared with the oracle; on a timed one, rows and keys
//! drawn at random are, each recomputed in f64 from the same inputs. Needs no GPU: it judges what is handed to it.

use crate::plan::{Case, DTYPE};
use dsv_reference::attention::{AttnError, AttnGrads, AttnInputs, AttnOutput, AttnShape, View, lowp, oracle};
use dsv_reference::compare::{Comparison, all_passed, compare};
use dsv_reference::lists::{KvInverse, KvListsBuf, ListDims};
use dsv_reference::rng::SplitMix64;
use dsv_spec::{AttnOp, Deterministic, Dtype, Lists, Problem};
use half::bf16;
use rayon::prelude::*;

/// KV rows one step of the online softmax takes in the rounding model: the smallest tile, which rescales most often.
const MODEL_BLOCK_N: usize = 64;

/// `len` standard normal numbers as bf16, the same for the same seed on every machine and number of threads.
pub fn normals(len: usize, seed: u64) -> Vec<bf16> {
    let mut out = vec![bf16::ZERO; len];
    out.par_chunks_mut(1 << 15).enumerate().for_each(|(chunk, values)| {
        let mut rng = SplitMix64::new(SplitMix64::new(seed ^ ((chunk as u64 + 1) << 24)).next_u64());
        values.iter_mut().for_each(|x| *x = bf16::from_f64(rng.normal()));
    });
    out
}

/// Largest error over its tolerance, or every comparison in words.
fn judge(results: &[Comparison]) -> Result<f64, String> {
    all_passed(results).map_err(|e| e.to_string())?;
    let share = |error: f64, allowed: f64| if error == 0.0 { 0.0 } else { error / allowed };
    let worst = |c: &Comparison| share(c.max_error, c.max_allowed).max(share(c.rms_error, c.rms_allowed));
    Ok(results.iter().map(worst).fold(0.0, f64::max))
}

fn floats(values: &[bf16]) -> Vec<f32> {
    values.iter().map(|x| x.to_f32()).collect()
}

/// A problem small enough for the oracle, with everything that is easily got wrong: two sequences, grouped heads,
/// lengths that no tile divides and that differ, lists of every length from none to all.
pub struct SmallCase {
    /// The forward's problem.
    pub problem: Problem,
    /// Q [B, Sq, H, D].
    pub q: Vec<bf16>,
    /// K [B, Skv, Hkv, D].
    pub k: Vec<bf16>,
    /// V, as K.
    pub v: Vec<bf16>,
    /// Gradient of out, as Q.
    pub d_out: Vec<bf16>,
    /// The lists, unless dense.
    pub lists: Option<KvListsBuf>,
    /// What a right forward may yield, bf16 and f32: the backward's inputs, so that it is judged by itself.
    pub saved_out: Vec<bf16>,
    /// LSE [B, H, Sq].
    pub saved_lse: Vec<f32>,
    out64: AttnOutput<f64>,
    grads64: AttnGrads<f64>,
    out_lowp: AttnOutput<f32>,
    grads_lowp: AttnGrads<f32>,
}

impl SmallCase {
    /// Makes inputs and expected results.
    ///
    /// # Errors
    /// What the reference refuses.
    pub fn new(head_dim: u16, lists: Lists) -> Result<SmallCase, AttnError> {
        let (batch, heads, kv_heads, seqlen_q, seqlen_kv) = (2usize, 4usize, 2usize, 390usize, 450usize);
        let dim = head_dim as usize;
        let shape =
            AttnShape::new(batch, seqlen_q, heads, dim).with_seqlen_kv(seqlen_kv).with_kv_heads(kv_heads);
        let seed = 1000 + head_dim as u64;
        let q = normals(shape.q_len(), seed);
        let k = normals(shape.kv_len(), seed + 1);
        let v = normals(shape.kv_len(), seed + 2);
        let d_out = normals(shape.q_len(), seed + 3);
        let lists_buf = match lists {
            Lists::Dense => None,
            Lists::Blocks { query_group, kv_block } => {
                let (query_group, kv_block) = (query_group as usize, kv_block as usize);
                let blocks = seqlen_kv.div_ceil(kv_block);
                let max_selected = blocks;
                let dims = ListDims {
                    batch,
                    num_heads: heads,
                    seqlen_q,
                    seqlen_kv,
                    query_group,
                    kv_block,
                    max_selected,
                };
                Some(KvListsBuf::random_counts(dims, 0..=blocks, &mut SplitMix64::new(seed + 4)))
            }
        };
        let view = lists_buf.as_ref().map(KvListsBuf::view);
        let inputs = AttnInputs::packed(&shape, &q, &k, &v);
        let dout = View::new(&d_out, shape.q_layout());
        let out64 = oracle::forward(&shape, &inputs, view.as_ref())?;
        let grads64 = oracle::backward(&shape, &inputs, view.as_ref(), &dout, None)?;
        let out_lowp = lowp::forward(&shape, &inputs, view.as_ref(), DTYPE, MODEL_BLOCK_N)?;
        let grads_lowp = lowp::backward(&shape, &inputs, view.as_ref(), &out_lowp, &dout, None, DTYPE)?;
        let problem = Problem {
            op: AttnOp::Fwd,
            dtype: DTYPE,
            head_dim,
            lists,
            batch: batch as u32,
            num_heads: heads as u32,
            num_kv_heads: kv_heads as u32,
            seqlen_q: seqlen_q as u32,
            seqlen_kv: seqlen_kv as u32,
            max_selected: lists_buf.as_ref().map_or(0, |l| l.dims.max_selected as u32),
            deterministic: Deterministic::No,
        };
        Ok(SmallCase {
            problem,
            saved_out: out_lowp.out.iter().map(|&x| bf16::from_f32(x)).collect(),
            saved_lse: out_lowp.lse.clone(),
            q,
            k,
            v,
            d_out,
            lists: lists_buf,
            out64,
            grads64,
            out_lowp,
            grads_lowp,
        })
    }

    fn dims(&self, heads: u32, seqlen: u32) -> [usize; 4] {
        [self.problem.batch, seqlen, heads, self.problem.head_dim as u32].map(|n| n as usize)
    }

    /// Judges out [B, Sq, H, D] and LSE [B, H, Sq]; the largest error over its tolerance.
    ///
    /// # Errors
    /// What is outside tolerance, by tensor, with the worst coordinate.
    pub fn judge_forward(&self, out: &[bf16], lse: &[f32]) -> Result<f64, String> {
        let p = &self.problem;
        let rows = [p.batch, p.num_heads, p.seqlen_q].map(|n| n as usize);
        let (reference, model) = (&self.out64, &self.out_lowp);
        judge(&[
            compare(
                "out",
                &self.dims(p.num_heads, p.seqlen_q),
                &floats(out),
                &reference.out,
                &model.out,
                DTYPE,
            ),
            compare("lse", &rows, lse, &reference.lse, &model.lse, Dtype::F32),
        ])
    }

    /// Judges dQ [B, Sq, H, D], dK and dV [B, Skv, Hkv, D]; the largest error over its tolerance.
    ///
    /// # Errors
    /// As [`SmallCase::judge_forward`].
    pub fn judge_backward(&self, dq: &[bf16], dk: &[bf16], dv: &[bf16]) -> Result<f64, String> {
        let p = &self.problem;
        let (q_dims, kv_dims) = (self.dims(p.num_heads, p.seqlen_q), self.dims(p.num_kv_heads, p.seqlen_kv));
        let (reference, model) = (&self.grads64, &self.grads_lowp);
        judge(&[
            compare("dq", &q_dims, &floats(dq), &reference.dq, &model.dq, DTYPE),
            compare("dk", &kv_dims, &floats(dk), &reference.dk, &model.dk, DTYPE),
            compare("dv", &kv_dims, &floats(dv), &reference.dv, &model.dv, DTYPE),
        ])
    }
}

/// The inputs of a timed case on the host, packed [B, S, H, D].
pub(crate) struct HostInputs {
    pub(crate) q: Vec<bf16>,
    pub(crate) k: Vec<bf16>,
    pub(crate) v: Vec<bf16>,
    pub(crate) d_out: Vec<bf16>,
}

impl HostInputs {
    pub(crate) fn random(case: &Case) -> HostInputs {
        let len =
            case.batch as usize * case.seqlen as usize * case.num_heads as usize * case.head_dim as usize;
        let seed = (case.seqlen as u64) << 20 ^ (case.head_dim as u64) << 8;
        HostInputs {
            q: normals(len, seed),
            k: normals(len, seed + 1),
            v: normals(len, seed + 2),
            d_out: normals(len, seed + 3),
        }
    }
}

/// (query_group, kv_block) a case is walked by; dense cases as if in pieces of 64.
fn pieces(case: &Case) -> (usize, usize) {
    match case.lists.block_size() {
        (0, _) => (64, 64),
        (query_group, kv_block) => (query_group as usize, kv_block as usize),
    }
}

/// Where row (batch, token, head) begins in a packed tensor of a case.
fn row_start(case: &Case, batch: usize, token: usize, head: usize) -> usize {
    let (s, h, d) = (case.seqlen as usize, case.num_heads as usize, case.head_dim as usize);
    ((batch * s + token) * h + head) * d
}

/// Rows of one head, one after another.
pub(crate) fn gather(
    case: &Case,
    data: &[bf16],
    batch: usize,
    head: usize,
    tokens: impl Iterator<Item = usize>,
) -> Vec<bf16> {
    let d = case.head_dim as usize;
    tokens.flat_map(|token| &data[row_start(case, batch, token, head)..][..d]).copied().collect()
}

/// Query rows of a timed case with what their out, LSE and dQ should be.
pub struct RowSamples {
    /// (batch, token, head) of each row.
    pub rows: Vec<(usize, usize, usize)>,
    head_dim: usize,
    out64: AttnOutput<f64>,
    out_lowp: AttnOutput<f32>,
    dq64: Vec<f64>,
    dq_lowp: Vec<f32>,
}

/// Groups drawn, and rows drawn from each.
const SAMPLED_GROUPS: usize = 8;
const ROWS_OF_A_GROUP: usize = 4;

impl RowSamples {
    /// Draws groups (the first and the last of the sequence among them) and rows of each, and recomputes them in f64
    /// and by the rounding model over the keys they list.
    ///
    /// # Errors
    /// What the reference refuses.
    pub(crate) fn new(
        case: &Case,
        inputs: &HostInputs,
        lists: Option<&KvListsBuf>,
    ) -> Result<RowSamples, AttnError> {
        let dim = case.head_dim as usize;
        let (query_group, kv_block) = pieces(case);
        let (seqlen, heads) = (case.seqlen as usize, case.num_heads as usize);
        let groups = seqlen.div_ceil(query_group);
        let mut rng = SplitMix64::new(7 + case.max_selected as u64);
        let drawn: Vec<(usize, usize, usize, Vec<usize>)> = (0..SAMPLED_GROUPS)
            .map(|n| {
                let group = match n {
                    0 => 0,
                    1 => groups - 1,
                    _ => rng.below(groups),
                };
                let rows: Vec<usize> =
                    (group * query_group..((group + 1) * query_group).min(seqlen)).collect();
                let rows = rng.sample(&rows, ROWS_OF_A_GROUP);
                (rng.below(case.batch as usize), rng.below(heads), group, rows)
            })
            .collect();
        type Part = (AttnOutput<f64>, AttnOutput<f32>, Vec<f64>, Vec<f32>);
        let parts: Vec<Part> = drawn
            .par_iter()
            .map(|(b, h, group, rows)| {
                let keys: Vec<usize> = match lists {
                    None => (0..seqlen).collect(),
                    Some(lists) => lists
                        .view()
                        .blocks_of((b * heads + h) * groups + group)
                        .iter()
                        .flat_map(|&n| n as usize * kv_block..((n as usize + 1) * kv_block).min(seqlen))
                        .collect(),
                };
                let shape = AttnShape::new(1, rows.len(), 1, dim).with_seqlen_kv(keys.len());
                let of = |data: &[bf16], tokens: &[usize]| gather(case, data, *b, *h, tokens.iter().copied());
                let (q, d_out) = (of(&inputs.q, rows), of(&inputs.d_out, rows));
                let (k, v) = (of(&inputs.k, &keys), of(&inputs.v, &keys));
                let inputs = AttnInputs::packed(&shape, &q, &k, &v);
                let dout = View::new(&d_out, shape.q_layout());
                let out64 = oracle::forward(&shape, &inputs, None)?;
                let out_lowp = lowp::forward(&shape, &inputs, None, DTYPE, MODEL_BLOCK_N)?;
                let dq64 = oracle::backward(&shape, &inputs, None, &dout, None)?.dq;
                let dq_lowp = lowp::backward(&shape, &inputs, None, &out_lowp, &dout, None, DTYPE)?.dq;
                Ok((out64, out_lowp, dq64, dq_lowp))
            })
            .collect::<Result<_, AttnError>>()?;
        let mut samples = RowSamples {
            rows: Vec::new(),
            head_dim: dim,
            out64: AttnOutput { out: Vec::new(), lse: Vec::new() },
            out_lowp: AttnOutput { out: Vec::new(), lse: Vec::new() },
            dq64: Vec::new(),
            dq_lowp: Vec::new(),
        };
        for ((b, h, _, rows), (out64, out_lowp, dq64, dq_lowp)) in drawn.into_iter().zip(parts) {
            samples.rows.extend(rows.into_iter().map(|row| (b, row, h)));
            samples.out64.out.extend(out64.out);
            samples.out64.lse.extend(out64.lse);
            samples.out_lowp.out.extend(out_lowp.out);
            samples.out_lowp.lse.extend(out_lowp.lse);
            samples.dq64.extend(dq64);
            samples.dq_lowp.extend(dq_lowp);
        }
        Ok(samples)
    }

    /// Element offset of each row in a packed tensor.
    pub fn starts(&self, case: &Case) -> Vec<usize> {
        self.rows.iter().map(|&(b, token, h)| row_start(case, b, token, h)).collect()
    }

    /// Element offset of each row's LSE in [B, H, S].
    pub fn lse_at(&self, case: &Case) -> Vec<usize> {
        let (s, heads) = (case.seqlen as usize, case.num_heads as usize);
        self.rows.iter().map(|&(b, token, h)| (b * heads + h) * s + token).collect()
    }

    /// Judges out and LSE of the rows.
    ///
    /// # Errors
    /// What is outside tolerance.
    pub fn judge_forward(&self, out: &[bf16], lse: &[f32]) -> Result<f64, String> {
        let dims = [self.rows.len(), self.head_dim];
        judge(&[
            compare("out", &dims, &floats(out), &self.out64.out, &self.out_lowp.out, DTYPE),
            compare("lse", &dims[..1], lse, &self.out64.lse, &self.out_lowp.lse, Dtype::F32),
        ])
        .map_err(|e| self.located(&e))
    }

    /// Judges dQ of the rows.
    ///
    /// # Errors
    /// What is outside tolerance.
    pub fn judge_dq(&self, dq: &[bf16]) -> Result<f64, String> {
        let dims = [self.rows.len(), self.head_dim];
        judge(&[compare("dq", &dims, &floats(dq), &self.dq64, &self.dq_lowp, DTYPE)])
            .map_err(|e| self.located(&e))
    }

    fn located(&self, message: &str) -> String {
        format!("{message}\n  rows sampled, as (batch, token, head): {:?}", self.rows)
    }
}

/// Keys of a timed case with what their dK and dV should be, given the forward's out and LSE.
pub struct KeySamples {
    /// (batch, token, head) of each key.
    pub keys: Vec<(usize, usize, usize)>,
    head_dim: usize,
    grads64: AttnGrads<f64>,
    grads_lowp: AttnGrads<f32>,
}

/// KV blocks drawn, and keys drawn from each.
const SAMPLED_BLOCKS: usize = 4;
const KEYS_OF_A_BLOCK: usize = 2;

impl KeySamples {
    /// Draws KV blocks (the first and the last among them) and keys of each, and sums their gradients over every
    /// query that lists them, in f64 and by the rounding model. `out` [B, S, H, D] and `lse` [B, H, S] are what the
    /// backward is given.
    ///
    /// # Errors
    /// What the reference refuses.
    pub(crate) fn new(
        case: &Case,
        inputs: &HostInputs,
        inverse: Option<&KvInverse>,
        out: &[bf16],
        lse: &[f32],
    ) -> Result<KeySamples, AttnError> {
        let dim = case.head_dim as usize;
        let (query_group, kv_block) = pieces(case);
        let (seqlen, heads) = (case.seqlen as usize, case.num_heads as usize);
        let blocks = seqlen.div_ceil(kv_block);
        let mut rng = SplitMix64::new(11 + case.max_selected as u64);
        let drawn: Vec<(usize, usize, usize, Vec<usize>)> = (0..SAMPLED_BLOCKS)
            .map(|n| {
                let block = match n {
                    0 => 0,
                    1 => blocks - 1,
                    _ => rng.below(blocks),
                };
                let keys: Vec<usize> = (block * kv_block..((block + 1) * kv_block).min(seqlen)).collect();
                let keys = rng.sample(&keys, KEYS_OF_A_BLOCK);
                (rng.below(case.batch as usize), rng.below(heads), block, keys)
            })
            .collect();
        let parts: Vec<(AttnGrads<f64>, AttnGrads<f32>)> = drawn
            .par_iter()
            .map(|(b, h, block, keys)| {
                let queries: Vec<usize> = match inverse {
                    None => (0..seqlen).collect(),
                    Some(inverse) => inverse
                        .groups_of(*b, *h, *block)
                        .iter()
                        .flat_map(|&g| g as usize * query_group..((g as usize + 1) * query_group).min(seqlen))
                        .collect(),
                };
                let of = |data: &[bf16], tokens: &[usize]| gather(case, data, *b, *h, tokens.iter().copied());
                let (k, v) = (of(&inputs.k, keys), of(&inputs.v, keys));
                let none = || AttnGrads { dq: Vec::new(), dk: vec![0.0; k.len()], dv: vec![0.0; k.len()] };
                if queries.is_empty() {
                    let model = AttnGrads { dq: Vec::new(), dk: vec![0.0; k.len()], dv: vec![0.0; k.len()] };
                    return Ok((none(), model));
                }
                let (q, d_out, o) = (of(&inputs.q, &queries), of(&inputs.d_out, &queries), of(out, &queries));
                let saved = AttnOutput {
                    out: floats(&o),
                    lse: queries.iter().map(|&i| lse[(b * heads + h) * seqlen + i]).collect(),
                };
                let shape = AttnShape::new(1, queries.len(), 1, dim).with_seqlen_kv(keys.len());
                let packed = AttnInputs::packed(&shape, &q, &k, &v);
                let dout = View::new(&d_out, shape.q_layout());
                let model = lowp::backward(&shape, &packed, None, &saved, &dout, None, DTYPE)?;
                let mut grads = none();
                for (n, (dk, dv)) in grads.dk.chunks_mut(dim).zip(grads.dv.chunks_mut(dim)).enumerate() {
                    let row = |data: &[bf16], i: usize| -> Vec<f64> {
                        data[i * dim..][..dim].iter().map(|x| x.to_f64()).collect()
                    };
                    let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(x, y)| x * y).sum::<f64>();
                    let (key, value) = (row(&k, n), row(&v, n));
                    for i in 0..queries.len() {
                        let (q, d_out, out) = (row(&q, i), row(&d_out, i), row(&o, i));
                        let p = (shape.scale * dot(&q, &key) - f64::from(saved.lse[i])).exp();
                        let ds = p * (dot(&d_out, &value) - dot(&d_out, &out));
                        for c in 0..dim {
                            dv[c] += p * d_out[c];
                            dk[c] += shape.scale * ds * q[c];
                        }
                    }
                }
                Ok((grads, model))
            })
            .collect::<Result<_, AttnError>>()?;
        let mut samples = KeySamples {
            keys: Vec::new(),
            head_dim: dim,
            grads64: AttnGrads { dq: Vec::new(), dk: Vec::new(), dv: Vec::new() },
            grads_lowp: AttnGrads { dq: Vec::new(), dk: Vec::new(), dv: Vec::new() },
        };
        for ((b, h, _, keys), (exact, model)) in drawn.into_iter().zip(parts) {
            samples.keys.extend(keys.into_iter().map(|key| (b, key, h)));
            samples.grads64.dk.extend(exact.dk);
            samples.grads64.dv.extend(exact.dv);
            samples.grads_lowp.dk.extend(model.dk);
            samples.grads_lowp.dv.extend(model.dv);
        }
        Ok(samples)
    }

    /// Element offset of each key in a packed tensor.
    pub fn starts(&self, case: &Case) -> Vec<usize> {
        self.keys.iter().map(|&(b, token, h)| row_start(case, b, token, h)).collect()
    }

    /// Judges dK and dV of the keys.
    ///
    /// # Errors
    /// What is outside tolerance.
    pub fn judge(&self, dk: &[bf16], dv: &[bf16]) -> Result<f64, String> {
        let dims = [self.keys.len(), self.head_dim];
        judge(&[
            compare("dk", &dims, &floats(dk), &self.grads64.dk, &self.grads_lowp.dk, DTYPE),
            compare("dv", &dims, &floats(dv), &self.grads64.dv, &self.grads_lowp.dv, DTYPE),
        ])
        .map_err(|e| format!("{e}\n  keys sampled, as (batch, token, head): {:?}", self.keys))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::listgen::ListKind;

    const BLOCKS: Lists = Lists::Blocks { query_group: 64, kv_block: 64 };

    #[test]
    fn the_rounding_model_passes_and_a_wrong_result_does_not() {
        let case = SmallCase::new(64, BLOCKS).unwrap();
        let counts = &case.lists.as_ref().unwrap().count;
        assert!(counts.contains(&0), "an empty list is among the cases");
        assert!(case.judge_forward(&case.saved_out, &case.saved_lse).unwrap() <= 1.0);
        let bf = |x: &[f32]| -> Vec<bf16> { x.iter().map(|&x| bf16::from_f32(x)).collect() };
        let (dq, dk, dv) = (bf(&case.grads_lowp.dq), bf(&case.grads_lowp.dk), bf(&case.grads_lowp.dv));
        assert!(case.judge_backward(&dq, &dk, &dv).unwrap() <= 1.0);
        // What a kernel that never wrote leaves behind.
        let poison = vec![bf16::from_bits(0xFFFF); dq.len()];
        let error = case.judge_backward(&poison, &dk, &dv).unwrap_err();
        assert!(error.contains("dq") && error.contains("pattern"), "{error}");
        // dK and dV exchanged.
        assert!(case.judge_backward(&dq, &dv, &dk).is_err());
        let mut lse = case.saved_lse.clone();
        let finite = lse.iter().position(|x| x.is_finite()).unwrap();
        lse[finite] += 0.01;
        assert!(case.judge_forward(&case.saved_out, &lse).unwrap_err().contains("lse"));
    }

    /// A case whose rows the oracle can all compute, with its samples judged against it.
    fn sampled(case: Case) {
        let inputs = HostInputs::random(&case);
        let (s, heads, dim) = (case.seqlen as usize, case.num_heads as usize, case.head_dim as usize);
        let shape = AttnShape::new(case.batch as usize, s, heads, dim);
        let lists = (!case.lists.is_dense()).then(|| crate::listgen::host_lists(&case));
        let view = lists.as_ref().map(KvListsBuf::view);
        let packed = AttnInputs::packed(&shape, &inputs.q, &inputs.k, &inputs.v);
        let dout = View::new(&inputs.d_out, shape.q_layout());
        let out = lowp::forward(&shape, &packed, view.as_ref(), DTYPE, 128).unwrap();
        let grads = lowp::backward(&shape, &packed, view.as_ref(), &out, &dout, None, DTYPE).unwrap();
        let bf = |x: &[f32]| -> Vec<bf16> { x.iter().map(|&x| bf16::from_f32(x)).collect() };
        let pick = |data: &[f32], starts: &[usize]| -> Vec<bf16> {
            starts.iter().flat_map(|&at| bf(&data[at..][..dim])).collect()
        };
        let rows = RowSamples::new(&case, &inputs, lists.as_ref()).unwrap();
        let starts = rows.starts(&case);
        let lse: Vec<f32> = rows.lse_at(&case).iter().map(|&at| out.lse[at]).collect();
        assert!(rows.judge_forward(&pick(&out.out, &starts), &lse).unwrap() <= 1.0);
        assert!(rows.judge_dq(&pick(&grads.dq, &starts)).unwrap() <= 1.0);
        let inverse = lists.as_ref().map(|l| l.invert().unwrap());
        let keys = KeySamples::new(&case, &inputs, inverse.as_ref(), &bf(&out.out), &out.lse).unwrap();
        let starts = keys.starts(&case);
        let (dk, dv) = (pick(&grads.dk, &starts), pick(&grads.dv, &starts));
        assert!(keys.judge(&dk, &dv).unwrap() <= 1.0);
        // Neighbouring rows are not mistaken for the right ones.
        let off: Vec<usize> = rows.starts(&case).iter().map(|at| at ^ (heads * dim)).collect();
        assert!(rows.judge_dq(&pick(&grads.dq, &off)).is_err());
        assert!(keys.judge(&dv, &dk).is_err());
    }

    #[test]
    fn samples_agree_with_the_whole_problem() {
        sampled(Case { batch: 2, ..Case::dense(64, 2, 256) });
        sampled(Case { batch: 2, ..Case::sparse(64, 2, 512, (64, 64), 0.25, ListKind::Random) });
        sampled(Case::sparse(64, 2, 500, (128, 128), 0.5, ListKind::Clustered));
    }
}
