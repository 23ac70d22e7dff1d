//! Non-causal attention over all keys or over listed KV blocks, with its gradients.
//!
//! ```text
//! s_ij = scale * <q_i, k_j>          over the keys j that query i's group lists (all, without lists)
//! lse_i = ln sum_j exp(s_ij)         out_i = sum_j exp(s_ij - lse_i) v_j
//! ```
//!
//! A query whose list is empty has `lse = -inf` and exact zeros for its output and gradients. Query head h reads
//! KV head `h / (num_heads / num_kv_heads)`. Three implementations share these types:
//!
//! * [`oracle`]: f64, plain loops, obviously right; what every engine is compared with.
//! * [`tiled`]: f32 on gemm and rayon; what the trainer runs without a GPU.
//! * [`lowp`]: the kernels' algorithm with their rounding points; where tolerances come from.

pub mod lowp;
pub mod oracle;
pub mod tiled;

#[cfg(test)]
mod tests;

use crate::element::Element;
pub use crate::lists::KvLists;
use crate::lists::ListError;

/// The sizes of one attention problem.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AttnShape {
    /// Sequences.
    pub batch: usize,
    /// Queries of a sequence.
    pub seqlen_q: usize,
    /// Keys of a sequence.
    pub seqlen_kv: usize,
    /// Query heads.
    pub num_heads: usize,
    /// Key and value heads; divides `num_heads`.
    pub num_kv_heads: usize,
    /// Numbers in a row of q, k, v and out.
    pub head_dim: usize,
    /// Factor on <q, k>.
    pub scale: f64,
}

impl AttnShape {
    /// Self-attention sizes with `scale = 1 / sqrt(head_dim)` and as many KV heads as query heads.
    pub fn new(batch: usize, seqlen: usize, num_heads: usize, head_dim: usize) -> Self {
        AttnShape {
            batch,
            seqlen_q: seqlen,
            seqlen_kv: seqlen,
            num_heads,
            num_kv_heads: num_heads,
            head_dim,
            scale: 1.0 / (head_dim as f64).sqrt(),
        }
    }

    /// The same with another number of keys (cross-attention).
    pub fn with_seqlen_kv(self, seqlen_kv: usize) -> Self {
        AttnShape { seqlen_kv, ..self }
    }

    /// The same with grouped-query attention.
    pub fn with_kv_heads(self, num_kv_heads: usize) -> Self {
        AttnShape { num_kv_heads, ..self }
    }

    /// The same with another factor on <q, k>.
    pub fn with_scale(self, scale: f64) -> Self {
        AttnShape { scale, ..self }
    }

    /// The KV head that query head `head` reads.
    pub fn kv_head(&self, head: usize) -> usize {
        head / (self.num_heads / self.num_kv_heads)
    }

    /// Elements of q, out, dout and dq.
    pub fn q_len(&self) -> usize {
        self.batch * self.seqlen_q * self.num_heads * self.head_dim
    }

    /// Elements of k, v, dk and dv.
    pub fn kv_len(&self) -> usize {
        self.batch * self.seqlen_kv * self.num_kv_heads * self.head_dim
    }

    /// Elements of lse, [B, H, Sq].
    pub fn lse_len(&self) -> usize {
        self.batch * self.num_heads * self.seqlen_q
    }

    /// Packed [B, Sq, H, D].
    pub fn q_layout(&self) -> Layout {
        Layout::bshd(self.seqlen_q, self.num_heads, self.head_dim)
    }

    /// Packed [B, Skv, Hkv, D].
    pub fn kv_layout(&self) -> Layout {
        Layout::bshd(self.seqlen_kv, self.num_kv_heads, self.head_dim)
    }

    /// Checks the sizes alone.
    pub fn validate(&self) -> Result<(), AttnError> {
        for (name, size) in [
            ("batch", self.batch),
            ("seqlen_q", self.seqlen_q),
            ("seqlen_kv", self.seqlen_kv),
            ("num_heads", self.num_heads),
            ("num_kv_heads", self.num_kv_heads),
            ("head_dim", self.head_dim),
        ] {
            if size == 0 {
                return Err(AttnError::ZeroSize { name });
            }
        }
        if !self.num_heads.is_multiple_of(self.num_kv_heads) {
            return Err(AttnError::Heads { num_heads: self.num_heads, num_kv_heads: self.num_kv_heads });
        }
        if !self.scale.is_finite() {
            return Err(AttnError::Scale { scale: self.scale });
        }
        Ok(())
    }
}

/// Strides in elements between sequences, tokens and heads; a row is contiguous.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Layout {
    /// From one sequence to the next.
    pub batch: usize,
    /// From one token to the next.
    pub seq: usize,
    /// From one head to the next.
    pub head: usize,
}

impl Layout {
    /// Packed [B, S, H, D].
    pub fn bshd(seqlen: usize, heads: usize, dim: usize) -> Self {
        Layout { batch: seqlen * heads * dim, seq: heads * dim, head: dim }
    }

    /// Packed [B, H, S, D].
    pub fn bhsd(seqlen: usize, heads: usize, dim: usize) -> Self {
        Layout { batch: seqlen * heads * dim, seq: dim, head: seqlen * dim }
    }

    /// Where row (batch, token, head) starts.
    pub fn offset(&self, batch: usize, token: usize, head: usize) -> usize {
        batch * self.batch + token * self.seq + head * self.head
    }

    /// Elements a buffer needs so that every row of [batch, seqlen, heads, dim] lies inside.
    pub fn extent(&self, batch: usize, seqlen: usize, heads: usize, dim: usize) -> usize {
        self.offset(batch - 1, seqlen - 1, heads - 1) + dim
    }

    /// Copies strided rows into a packed [B, S, H, D] tensor.
    pub fn pack<T: Copy>(&self, data: &[T], batch: usize, seqlen: usize, heads: usize, dim: usize) -> Vec<T> {
        let mut packed = Vec::with_capacity(batch * seqlen * heads * dim);
        for b in 0..batch {
            for s in 0..seqlen {
                for h in 0..heads {
                    packed.extend_from_slice(&data[self.offset(b, s, h)..][..dim]);
                }
            }
        }
        packed
    }

    /// Copies a packed [B, S, H, D] tensor into strided rows; what lies between rows is untouched.
    pub fn unpack<T: Copy>(&self, packed: &[T], seqlen: usize, heads: usize, dim: usize, data: &mut [T]) {
        for (row, values) in packed.chunks_exact(dim).enumerate() {
            let start = self.offset(row / (seqlen * heads), row / heads % seqlen, row % heads);
            data[start..][..dim].copy_from_slice(values);
        }
    }
}

/// A tensor of rows as the caller holds it.
#[derive(Clone, Copy, Debug)]
pub struct View<'a, T> {
    /// The elements.
    pub data: &'a [T],
    /// Where the rows are.
    pub layout: Layout,
}

impl<'a, T> View<'a, T> {
    /// `data` read through `layout`.
    pub fn new(data: &'a [T], layout: Layout) -> Self {
        View { data, layout }
    }

    /// Row (batch, token, head) of `dim` elements.
    pub fn row(&self, batch: usize, token: usize, head: usize, dim: usize) -> &'a [T] {
        &self.data[self.layout.offset(batch, token, head)..][..dim]
    }

    /// The slice from row (batch, token, head) on, for strided products.
    pub(crate) fn from(&self, batch: usize, token: usize, head: usize) -> &'a [T] {
        &self.data[self.layout.offset(batch, token, head)..]
    }

    pub(crate) fn check(
        &self,
        name: &'static str,
        batch: usize,
        seqlen: usize,
        heads: usize,
        dim: usize,
    ) -> Result<(), AttnError> {
        let needed = self.layout.extent(batch, seqlen, heads, dim);
        if self.data.len() < needed {
            return Err(AttnError::TooShort { name, found: self.data.len(), needed, layout: self.layout });
        }
        Ok(())
    }
}

/// q [B, Sq, H, D], k and v [B, Skv, Hkv, D], each with its own strides.
#[derive(Clone, Copy, Debug)]
pub struct AttnInputs<'a, T> {
    /// Queries.
    pub q: View<'a, T>,
    /// Keys.
    pub k: View<'a, T>,
    /// Values.
    pub v: View<'a, T>,
}

impl<'a, T> AttnInputs<'a, T> {
    /// Packed [B, S, H, D] tensors of `shape`.
    pub fn packed(shape: &AttnShape, q: &'a [T], k: &'a [T], v: &'a [T]) -> Self {
        AttnInputs {
            q: View::new(q, shape.q_layout()),
            k: View::new(k, shape.kv_layout()),
            v: View::new(v, shape.kv_layout()),
        }
    }
}

/// What the forward pass yields.
#[derive(Clone, Debug, PartialEq)]
pub struct AttnOutput<T> {
    /// Packed [B, Sq, H, D].
    pub out: Vec<T>,
    /// [B, H, Sq]: natural log of the sum of exponentials of scaled logits; -inf for an empty row.
    pub lse: Vec<T>,
}

/// What the backward pass yields, packed [B, S, H, D] (KV heads for dk and dv).
#[derive(Clone, Debug, PartialEq)]
pub struct AttnGrads<T> {
    /// Gradient of q.
    pub dq: Vec<T>,
    /// Gradient of k, summed over the query heads that share it.
    pub dk: Vec<T>,
    /// Gradient of v, summed over the query heads that share it.
    pub dv: Vec<T>,
}

/// Why an attention problem is refused.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum AttnError {
    /// A size is zero.
    #[error("attention with {name} = 0\n  allowed: 1 or more\n  next: skip the call for an empty sequence")]
    ZeroSize {
        /// Which size.
        name: &'static str,
    },
    /// Query heads do not divide into KV heads.
    #[error(
        "num_heads {num_heads} is no multiple of num_kv_heads {num_kv_heads}\n  \
         allowed: any divisor of {num_heads}\n  next: correct num_kv_heads of the model"
    )]
    Heads {
        /// Query heads.
        num_heads: usize,
        /// KV heads.
        num_kv_heads: usize,
    },
    /// The factor on the logits is not a number.
    #[error("scale is {scale}\n  allowed: a finite number\n  next: use 1 / sqrt(head_dim)")]
    Scale {
        /// The value found.
        scale: f64,
    },
    /// A tensor is too short for its strides.
    #[error(
        "{name} holds {found} elements\n  needed: {needed} for its shape with {layout:?}\n  \
         next: pass the whole tensor, or correct its strides (in elements, not bytes)"
    )]
    TooShort {
        /// The tensor.
        name: &'static str,
        /// Elements found.
        found: usize,
        /// Elements needed.
        needed: usize,
        /// The strides.
        layout: Layout,
    },
    /// A [B, H, Sq] tensor has the wrong length.
    #[error(
        "{name} holds {found} entries\n  needed: {needed} (batch * num_heads * seqlen_q)\n  \
         next: pass the tensor the forward pass returned"
    )]
    RowTensor {
        /// The tensor.
        name: &'static str,
        /// Entries found.
        found: usize,
        /// Entries needed.
        needed: usize,
    },
    /// The lists are not valid for this problem.
    #[error(transparent)]
    Lists(#[from] ListError),
}

/// Checks everything a forward pass reads: sizes, extents of the tensors, lists.
pub fn validate<T>(
    shape: &AttnShape,
    inputs: &AttnInputs<'_, T>,
    lists: Option<&KvLists<'_>>,
) -> Result<(), AttnError> {
    shape.validate()?;
    let AttnShape { batch, seqlen_q, seqlen_kv, num_heads, num_kv_heads, head_dim, .. } = *shape;
    inputs.q.check("q", batch, seqlen_q, num_heads, head_dim)?;
    inputs.k.check("k", batch, seqlen_kv, num_kv_heads, head_dim)?;
    inputs.v.check("v", batch, seqlen_kv, num_kv_heads, head_dim)?;
    if let Some(lists) = lists {
        lists.validate(batch, num_heads, seqlen_q, seqlen_kv)?;
    }
    Ok(())
}

/// Checks what a backward pass reads besides: an output-shaped tensor.
fn validate_rows<T>(shape: &AttnShape, name: &'static str, view: &View<'_, T>) -> Result<(), AttnError> {
    view.check(name, shape.batch, shape.seqlen_q, shape.num_heads, shape.head_dim)
}

/// Checks a [B, H, Sq] tensor.
fn validate_lse<T>(shape: &AttnShape, name: &'static str, values: &[T]) -> Result<(), AttnError> {
    if values.len() != shape.lse_len() {
        return Err(AttnError::RowTensor { name, found: values.len(), needed: shape.lse_len() });
    }
    Ok(())
}

/// The keys that query (batch, head, row) attends to, ascending. For validated lists.
pub(crate) fn keys_of_row(
    shape: &AttnShape,
    lists: Option<&KvLists<'_>>,
    batch: usize,
    head: usize,
    row: usize,
) -> Vec<usize> {
    match lists {
        None => (0..shape.seqlen_kv).collect(),
        Some(lists) => {
            let dims = lists.dims(shape.batch, shape.num_heads, shape.seqlen_q, shape.seqlen_kv);
            let list = (batch * shape.num_heads + head) * dims.groups() + row / lists.query_group;
            lists.blocks_of(list).iter().flat_map(|&n| dims.block_keys(n as usize)).collect()
        }
    }
}

/// <a, b> in f64. Eight running sums, so that the compiler can use vector registers.
pub(crate) fn dot_f64<A: Element, B: Element>(a: &[A], b: &[B]) -> f64 {
    let mut sums = [0.0f64; 8];
    let (a8, b8) = (a.chunks_exact(8), b.chunks_exact(8));
    let tail: f64 = a8.remainder().iter().zip(b8.remainder()).map(|(x, y)| x.to_f64() * y.to_f64()).sum();
    for (x, y) in a8.zip(b8) {
        for lane in 0..8 {
            sums[lane] += x[lane].to_f64() * y[lane].to_f64();
        }
    }
    sums.iter().sum::<f64>() + tail
}
