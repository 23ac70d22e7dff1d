//! Reads .npy arrays (format 1 to 3, little-endian, C order) of u8, f16, f32 or f64.

use std::path::Path;

/// Element type of an array.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Element {
    /// `|u1`
    U8,
    /// `<f2`
    F16,
    /// `<f4`
    F32,
    /// `<f8`
    F64,
}

/// An array in memory.
#[derive(Clone, Debug, PartialEq)]
pub struct Array {
    /// Element type.
    pub element: Element,
    /// Dimensions.
    pub shape: Vec<usize>,
    /// Row-major little-endian bytes.
    pub data: Vec<u8>,
}

impl Array {
    /// Reads a file; the error is a sentence without the file's name.
    pub fn read(path: &Path) -> Result<Array, String> {
        Array::parse(&std::fs::read(path).map_err(|e| format!("it cannot be read: {e}"))?)
    }

    fn parse(bytes: &[u8]) -> Result<Array, String> {
        if bytes.len() < 10 || &bytes[..6] != b"\x93NUMPY" {
            return Err("it does not begin as a .npy file does".into());
        }
        let (header_at, header_len) = if bytes[6] == 1 {
            (10, usize::from(u16::from_le_bytes([bytes[8], bytes[9]])))
        } else if bytes.len() >= 12 {
            (12, u32::from_le_bytes([bytes[8], bytes[9], bytes[10], bytes[11]]) as usize)
        } else {
            return Err("its header is cut short".into());
        };
        let data_at = header_at + header_len;
        let header = bytes.get(header_at..data_at).ok_or("its header is cut short")?;
        let header = std::str::from_utf8(header).map_err(|_| "its header is not text".to_string())?;
        let after = |key: &str| {
            let at = header.find(&format!("'{key}'")).ok_or(format!("its header lacks '{key}'"))?;
            let rest = &header[at + key.len() + 2..];
            Ok::<&str, String>(rest.trim_start().trim_start_matches(':').trim_start())
        };
        let descr = after("descr")?.split('\'').nth(1).unwrap_or("");
        let (element, size) = match descr {
            "|u1" => (Element::U8, 1),
            "<f2" => (Element::F16, 2),
            "<f4" => (Element::F32, 4),
            "<f8" => (Element::F64, 8),
            other => return Err(format!("its type is {other:?}; allowed: |u1, <f2, <f4, <f8")),
        };
        if after("fortran_order")?.starts_with("True") {
            return Err("it is in Fortran order; save numpy.ascontiguousarray(x)".into());
        }
        let inside = after("shape")?
            .strip_prefix('(')
            .and_then(|s| s.split(')').next())
            .ok_or("its shape is not a tuple".to_string())?;
        let shape = inside
            .split(',')
            .map(str::trim)
            .filter(|s| !s.is_empty())
            .map(|s| s.parse::<usize>().map_err(|_| format!("its shape holds {s:?}")))
            .collect::<Result<Vec<_>, _>>()?;
        let expected = shape
            .iter()
            .try_fold(size, |n: usize, d| n.checked_mul(*d))
            .ok_or("its shape is too large".to_string())?;
        let data = &bytes[data_at..];
        if data.len() != expected {
            return Err(format!(
                "it is truncated or too long: shape {shape:?} needs {expected} bytes, found {}",
                data.len()
            ));
        }
        Ok(Array { element, shape, data: data.to_vec() })
    }

    /// The values as f32.
    pub fn to_f32(&self) -> Vec<f32> {
        match self.element {
            Element::U8 => self.data.iter().map(|x| f32::from(*x)).collect(),
            Element::F16 => {
                crate::tensors::to_f32(safetensors::Dtype::F16, &self.data).expect("f16 is a float type")
            }
            Element::F32 => {
                crate::tensors::to_f32(safetensors::Dtype::F32, &self.data).expect("f32 is a float type")
            }
            Element::F64 => self
                .data
                .chunks_exact(8)
                .map(|b| f64::from_le_bytes(b.try_into().expect("eight bytes")) as f32)
                .collect(),
        }
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// A format 1.0 file as numpy writes it.
    pub(in super::super) fn file(descr: &str, shape: &str, data: &[u8]) -> Vec<u8> {
        let mut header = format!("{{'descr': '{descr}', 'fortran_order': False, 'shape': {shape}, }}");
        while (10 + header.len() + 1) % 64 != 0 {
            header.push(' ');
        }
        header.push('\n');
        let mut out = b"\x93NUMPY\x01\x00".to_vec();
        out.extend((header.len() as u16).to_le_bytes());
        out.extend(header.as_bytes());
        out.extend(data);
        out
    }

    #[test]
    fn arrays_are_read_and_bad_ones_refused() {
        let a = Array::parse(&file("<f4", "(2, 1)", &[0, 0, 128, 63, 0, 0, 0, 192])).unwrap();
        assert_eq!((a.shape.clone(), a.to_f32()), (vec![2, 1], vec![1.0, -2.0]));
        assert_eq!(Array::parse(&file("|u1", "(3,)", &[1, 2, 255])).unwrap().to_f32(), [1.0, 2.0, 255.0]);
        assert_eq!(Array::parse(&file("<f2", "(1,)", &[0, 60])).unwrap().to_f32(), [1.0]);
        assert_eq!(Array::parse(&file("<f8", "()", &1.5f64.to_le_bytes())).unwrap().to_f32(), [1.5]);
        for (bytes, reason) in [
            (file("<f4", "(3,)", &[0; 8]), "shape [3] needs 12 bytes, found 8"),
            (file(">f4", "(2,)", &[0; 8]), "its type is \">f4\"; allowed"),
            (b"hello world".to_vec(), "does not begin"),
            (file("<f4", "(2,)", &[0; 8])[..40].to_vec(), "cut short"),
        ] {
            let error = Array::parse(&bytes).unwrap_err();
            assert!(error.contains(reason), "{error}");
        }
    }
}
