//! Named tensors in safetensors files: a streaming writer, and a mapped reader that says exactly what is wrong
//! with a file that is cut short or was never one.

use half::{bf16, f16};
use memmap2::Mmap;
pub use safetensors::Dtype;
use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

/// A tensor's name, type, shape and little-endian bytes (row-major).
#[derive(Clone, Debug, PartialEq)]
pub struct TensorView<'a> {
    /// Unique in its file.
    pub name: String,
    /// Element type.
    pub dtype: Dtype,
    /// Dimensions; empty for a scalar.
    pub shape: Vec<usize>,
    /// `shape.product() * size_of(dtype)` bytes.
    pub data: &'a [u8],
}

impl<'a> TensorView<'a> {
    /// A view of f32 values.
    ///
    /// # Panics
    /// If `shape` does not hold `data.len()` elements.
    pub fn f32(name: impl Into<String>, shape: &[usize], data: &'a [f32]) -> Self {
        assert_eq!(shape.iter().product::<usize>(), data.len(), "shape {shape:?}");
        // SAFETY: any f32 is four initialised bytes, the slice's memory is contiguous, and u8 needs no alignment.
        let data = unsafe { std::slice::from_raw_parts(data.as_ptr().cast::<u8>(), size_of_val(data)) };
        TensorView { name: name.into(), dtype: Dtype::F32, shape: shape.to_vec(), data }
    }

    /// The values as f32, from f32, f16 or bf16.
    ///
    /// # Errors
    /// The dtype, if it is another one.
    pub fn to_f32(&self) -> Result<Vec<f32>, Dtype> {
        to_f32(self.dtype, self.data).ok_or(self.dtype)
    }
}

/// Little-endian f32, f16 or bf16 bytes as f32 values; `None` for another type.
pub(crate) fn to_f32(dtype: Dtype, data: &[u8]) -> Option<Vec<f32>> {
    Some(match dtype {
        Dtype::F32 => data.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect(),
        Dtype::F16 => data.chunks_exact(2).map(|b| f16::from_le_bytes([b[0], b[1]]).to_f32()).collect(),
        Dtype::BF16 => data.chunks_exact(2).map(|b| bf16::from_le_bytes([b[0], b[1]]).to_f32()).collect(),
        _ => return None,
    })
}

/// f32 values as little-endian f32, f16 or bf16 bytes; `None` for another type.
pub(crate) fn from_f32(dtype: Dtype, values: &[f32]) -> Option<Vec<u8>> {
    Some(match dtype {
        Dtype::F32 => values.iter().flat_map(|x| x.to_le_bytes()).collect(),
        Dtype::F16 => values.iter().flat_map(|x| f16::from_f32(*x).to_le_bytes()).collect(),
        Dtype::BF16 => values.iter().flat_map(|x| bf16::from_f32(*x).to_le_bytes()).collect(),
        _ => return None,
    })
}

/// Writes a safetensors file: header, then each tensor in the order given.
///
/// # Errors
/// The writer's; `InvalidInput` for two tensors of one name, or bytes that do not fill a shape.
pub fn write<W: Write>(
    out: &mut W,
    tensors: &[TensorView<'_>],
    metadata: &BTreeMap<String, String>,
) -> io::Result<()> {
    let mut header = serde_json::Map::new();
    if !metadata.is_empty() {
        header.insert("__metadata__".into(), serde_json::to_value(metadata)?);
    }
    let mut at = 0;
    for t in tensors {
        let bytes = t.shape.iter().product::<usize>() * t.dtype.bitsize() / 8;
        if bytes != t.data.len() {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                format!(
                    "tensor {}: shape {:?} of {:?} needs {bytes} bytes, got {}",
                    t.name,
                    t.shape,
                    t.dtype,
                    t.data.len()
                ),
            ));
        }
        let info =
            serde_json::json!({ "dtype": t.dtype, "shape": t.shape, "data_offsets": [at, at + bytes] });
        if header.insert(t.name.clone(), info).is_some() {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, format!("two tensors named {}", t.name)));
        }
        at += bytes;
    }
    let mut header = serde_json::to_vec(&header)?;
    header.resize(header.len().next_multiple_of(8), b' ');
    out.write_all(&(header.len() as u64).to_le_bytes())?;
    out.write_all(&header)?;
    for t in tensors {
        out.write_all(t.data)?;
    }
    Ok(())
}

/// What is wrong with a tensor file.
#[derive(Debug, thiserror::Error)]
pub enum TensorFileError {
    /// It cannot be opened or mapped.
    #[error("cannot open {path}: {source}")]
    Open {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Its length is not what its header promises.
    #[error("{path} is {}: its header promises {expected} bytes, the file has {found}", if found < expected { "truncated" } else { "too long" })]
    Length {
        /// The file.
        path: PathBuf,
        /// Bytes promised.
        expected: u64,
        /// Bytes there.
        found: u64,
    },
    /// Its header is not a safetensors header.
    #[error("{path} is not a safetensors file: {reason}")]
    Header {
        /// The file.
        path: PathBuf,
        /// Why.
        reason: String,
    },
}

#[derive(Clone, Debug)]
struct Entry {
    dtype: Dtype,
    shape: Vec<usize>,
    start: usize,
    end: usize,
}

/// A mapped safetensors file whose header and length have been checked.
#[derive(Debug)]
pub struct TensorFile {
    path: PathBuf,
    map: Mmap,
    entries: BTreeMap<String, Entry>,
    metadata: BTreeMap<String, String>,
}

impl TensorFile {
    /// Maps a file and checks that header, offsets and length agree. Tensor bytes are not read.
    pub fn open(path: &Path) -> Result<TensorFile, TensorFileError> {
        let opening = |source| TensorFileError::Open { path: path.to_path_buf(), source };
        let file = File::open(path).map_err(opening)?;
        let found = file.metadata().map_err(opening)?.len();
        if found < 8 {
            return Err(TensorFileError::Length { path: path.to_path_buf(), expected: 8, found });
        }
        // SAFETY: the map is read-only; these files are replaced by rename, never changed in place, so the mapped
        // bytes do not change under us.
        let map = unsafe { Mmap::map(&file) }.map_err(opening)?;
        let bad = |reason: String| TensorFileError::Header { path: path.to_path_buf(), reason };
        let header_len = u64::from_le_bytes(map[..8].try_into().expect("eight bytes"));
        if header_len > 100_000_000 {
            return Err(bad(format!("its first 8 bytes give a header of {header_len} bytes")));
        }
        let base = 8 + header_len as usize;
        if map.len() < base {
            return Err(TensorFileError::Length { path: path.to_path_buf(), expected: base as u64, found });
        }
        let header: BTreeMap<String, serde_json::Value> =
            serde_json::from_slice(&map[8..base]).map_err(|e| bad(format!("its header is not JSON: {e}")))?;
        let mut entries = BTreeMap::new();
        let mut metadata = BTreeMap::new();
        for (name, value) in header {
            if name == "__metadata__" {
                metadata = serde_json::from_value(value)
                    .map_err(|e| bad(format!("its metadata is not text: {e}")))?;
                continue;
            }
            let info: safetensors::tensor::TensorInfo =
                serde_json::from_value(value).map_err(|e| bad(format!("tensor {name}: {e}")))?;
            let (start, end) = info.data_offsets;
            let bytes = info
                .shape
                .iter()
                .try_fold(1usize, |n, d| n.checked_mul(*d))
                .and_then(|n| n.checked_mul(info.dtype.bitsize()))
                .map(|bits| bits / 8);
            if end < start || bytes != Some(end - start) {
                return Err(bad(format!(
                    "tensor {name}: {:?} of shape {:?} does not fill bytes {start}..{end}",
                    info.dtype, info.shape
                )));
            }
            entries.insert(name, Entry { dtype: info.dtype, shape: info.shape, start, end });
        }
        let mut spans: Vec<(usize, usize)> = entries.values().map(|e| (e.start, e.end)).collect();
        spans.sort_unstable();
        let mut at = 0;
        for (start, end) in spans {
            if start != at {
                return Err(bad(format!("tensor bytes overlap or leave a hole at offset {at}")));
            }
            at = end;
        }
        let expected = (base as u64).saturating_add(at as u64);
        if expected != found {
            return Err(TensorFileError::Length { path: path.to_path_buf(), expected, found });
        }
        for e in entries.values_mut() {
            e.start += base;
            e.end += base;
        }
        Ok(TensorFile { path: path.to_path_buf(), map, entries, metadata })
    }

    /// Where the file is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Names, in alphabetical order.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.entries.keys().map(String::as_str)
    }

    /// One tensor, if it is there.
    pub fn get(&self, name: &str) -> Option<TensorView<'_>> {
        let e = self.entries.get(name)?;
        Some(TensorView {
            name: name.to_string(),
            dtype: e.dtype,
            shape: e.shape.clone(),
            data: &self.map[e.start..e.end],
        })
    }

    /// Asks the system to read bytes `range` of a tensor ahead. A hint: it waits for nothing, and where it is not
    /// followed the bytes are read when they are used.
    pub fn will_need(&self, name: &str, range: std::ops::Range<usize>) {
        if let Some(e) = self.entries.get(name) {
            let (start, end) = (e.start + range.start, (e.start + range.end).min(e.end));
            let _ = self.map.advise_range(memmap2::Advice::WillNeed, start, end.saturating_sub(start));
        }
    }

    /// Every tensor, in alphabetical order.
    pub fn views(&self) -> Vec<TensorView<'_>> {
        self.names().filter_map(|n| self.get(n)).collect()
    }

    /// A line of the header's metadata.
    pub fn metadata(&self, key: &str) -> Option<&str> {
        self.metadata.get(key).map(String::as_str)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(dir: &Path) -> PathBuf {
        let path = dir.join("a.safetensors");
        let values = [1.0f32, -2.5, 3.25, 0.0, 5.0, 6.0];
        let half = from_f32(Dtype::BF16, &values[..2]).unwrap();
        let tensors = [
            TensorView::f32("w", &[2, 3], &values),
            TensorView { name: "b".into(), dtype: Dtype::BF16, shape: vec![2], data: &half },
            TensorView { name: "empty".into(), dtype: Dtype::I32, shape: vec![0, 4], data: &[] },
        ];
        let metadata = BTreeMap::from([("schema".to_string(), "x".to_string())]);
        crate::durable::write_file(&crate::durable::RealDisk, &path, |w| write(w, &tensors, &metadata))
            .unwrap();
        path
    }

    #[test]
    fn what_is_written_is_read_here_and_by_the_safetensors_crate() {
        let dir = tempfile::tempdir().unwrap();
        let path = file(dir.path());
        let ours = TensorFile::open(&path).unwrap();
        assert_eq!(ours.names().collect::<Vec<_>>(), ["b", "empty", "w"]);
        assert_eq!(ours.get("w").unwrap().to_f32().unwrap(), [1.0, -2.5, 3.25, 0.0, 5.0, 6.0]);
        assert_eq!(ours.get("b").unwrap().to_f32().unwrap(), [1.0, -2.5]);
        assert_eq!(ours.get("empty").unwrap().to_f32(), Err(Dtype::I32));
        assert_eq!(ours.metadata("schema"), Some("x"));
        let bytes = std::fs::read(&path).unwrap();
        let theirs = safetensors::SafeTensors::deserialize(&bytes).unwrap();
        assert_eq!(theirs.tensor("w").unwrap().shape(), [2, 3]);
        assert_eq!(theirs.tensor("w").unwrap().data(), ours.get("w").unwrap().data);
    }

    #[test]
    fn every_way_of_being_cut_or_damaged_is_an_error() {
        let dir = tempfile::tempdir().unwrap();
        let path = file(dir.path());
        let good = std::fs::read(&path).unwrap();
        for cut in 0..good.len() {
            std::fs::write(&path, &good[..cut]).unwrap();
            let error = TensorFile::open(&path).unwrap_err();
            let TensorFileError::Length { expected, found, .. } = &error else { panic!("{cut}: {error}") };
            assert!(*found == cut as u64 && expected > found, "{error}");
        }
        std::fs::write(&path, &good[..good.len() - 3]).unwrap();
        let text = TensorFile::open(&path).unwrap_err().to_string();
        assert!(text.ends_with(&format!(
            "is truncated: its header promises {} bytes, the file has {}",
            good.len(),
            good.len() - 3
        )));
        let mut long = good.clone();
        long.push(0);
        std::fs::write(&path, &long).unwrap();
        assert!(TensorFile::open(&path).unwrap_err().to_string().contains("too long"));
        let mut broken = good.clone();
        broken[9] = 0xff;
        std::fs::write(&path, &broken).unwrap();
        assert!(matches!(TensorFile::open(&path), Err(TensorFileError::Header { .. })));
        std::fs::write(&path, b"GIF89a, certainly not tensors").unwrap();
        assert!(TensorFile::open(&path).unwrap_err().to_string().contains("not a safetensors file"));
        let at = good.windows(5).position(|w| w == b"[2,3]").unwrap();
        let mut misfit = good.clone();
        misfit[at + 1] = b'3';
        std::fs::write(&path, &misfit).unwrap();
        assert!(TensorFile::open(&path).unwrap_err().to_string().contains("does not fill bytes"));
    }
}
