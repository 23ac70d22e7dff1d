//! Text embeddings without a text encoder: each word becomes a fixed pseudo-random vector of its hash.
//!
//! Equal words give equal vectors and different ones nearly orthogonal vectors, so captions carry their
//! attributes, but no meaning beyond equality. Real embeddings come with shards, or beside a video
//! (`dsv-train prepare --help`).

/// A caption as f32 `[tokens, dim]`, unit variance per value where a word stands, zeros where none does. Words
/// are lower-cased runs of letters and digits; word `i` goes to token `i % tokens`, where several add up (scaled
/// to keep unit variance). The empty caption is all zeros, which is also what caption drop-out feeds.
pub fn embed(caption: &str, tokens: usize, dim: usize) -> Vec<f32> {
    let mut out = vec![0f32; tokens * dim];
    let mut count = vec![0u32; tokens];
    let lower = caption.to_lowercase();
    let words = lower.split(|c: char| !c.is_alphanumeric()).filter(|w| !w.is_empty());
    for (i, word) in words.enumerate() {
        let token = i % tokens;
        count[token] += 1;
        let mut bits = blake3::Hasher::new().update(word.as_bytes()).finalize_xof();
        // Uniform on [-sqrt 3, sqrt 3): unit variance, and the same on every machine.
        let mut raw = vec![0u8; dim * 4];
        bits.fill(&mut raw);
        for (o, b) in out[token * dim..].iter_mut().zip(raw.chunks_exact(4)) {
            let u = u32::from_le_bytes([b[0], b[1], b[2], b[3]]);
            *o += ((f64::from(u) / 4_294_967_296.0 - 0.5) * 12f64.sqrt()) as f32;
        }
    }
    for (token, n) in count.iter().enumerate().filter(|(_, n)| **n > 1) {
        let scale = 1.0 / (*n as f32).sqrt();
        out[token * dim..(token + 1) * dim].iter_mut().for_each(|x| *x *= scale);
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_are_fixed_unit_variance_vectors() {
        let a = embed("Red, ball!", 4, 512);
        let b = embed("red cube", 4, 512);
        assert_eq!(a[..512], b[..512]);
        assert!(a[1024..].iter().all(|x| *x == 0.0));
        let variance = a[..512].iter().map(|x| x * x).sum::<f32>() / 512.0;
        assert!((variance - 1.0).abs() < 0.15, "{variance}");
        let dot = a[512..1024].iter().zip(&b[512..1024]).map(|(x, y)| x * y).sum::<f32>() / 512.0;
        assert!(dot.abs() < 0.2, "{dot}");
        assert!(embed("", 4, 8).iter().all(|x| *x == 0.0));
        let folded = embed("one two three", 2, 512);
        let (one, three) = (embed("one", 1, 512), embed("three", 1, 512));
        for i in 0..512 {
            assert!((folded[i] - (one[i] + three[i]) / 2f32.sqrt()).abs() < 1e-6);
        }
    }
}
