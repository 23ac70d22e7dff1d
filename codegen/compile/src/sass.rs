//! Counting machine instructions, to see what the compiler made of a kernel before any GPU time is spent.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::process::Command;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::CompileError;

/// How often each instruction occurs in the text of a kernel (not how often it runs). Keys are opcodes without
/// modifiers: `HGMMA`, `UTMALDG`, `LDL`, `STL`, `WARPGROUP`, ...
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SassHistogram {
    counts: BTreeMap<String, u32>,
}

impl SassHistogram {
    /// Occurrences of one opcode.
    pub fn count(&self, opcode: &str) -> u32 {
        self.counts.get(opcode).copied().unwrap_or(0)
    }

    /// All opcodes with their counts, sorted by name.
    pub fn iter(&self) -> impl Iterator<Item = (&str, u32)> {
        self.counts.iter().map(|(opcode, count)| (opcode.as_str(), *count))
    }
}

/// Finds nvdisasm: the environment variable `DSV_NVDISASM`, `.cuda/nvidia/cu13/bin` of the checkout and of the
/// current directory's ancestors, then `PATH` and `/usr/local/cuda/bin`.
///
/// # Errors
/// [`CompileError::Sass`] with the command that fetches it.
pub fn find_nvdisasm() -> Result<PathBuf, CompileError> {
    if let Some(path) = std::env::var_os("DSV_NVDISASM").filter(|value| !value.is_empty()).map(PathBuf::from)
    {
        if path.is_file() {
            return Ok(path);
        }
        return Err(CompileError::Sass { why: format!("DSV_NVDISASM names {}, no file", path.display()) });
    }
    let mut dirs: Vec<PathBuf> =
        crate::nvrtc::dot_cuda_dirs().into_iter().map(|dir| dir.join("nvidia/cu13/bin")).collect();
    dirs.extend(std::env::var_os("PATH").iter().flat_map(std::env::split_paths));
    dirs.push(PathBuf::from("/usr/local/cuda/bin"));
    dirs.into_iter()
        .map(|dir| dir.join("nvdisasm"))
        .find(|path| path.is_file())
        .ok_or_else(|| CompileError::Sass { why: "nvdisasm was not found".into() })
}

/// Counts the instructions of every kernel in a cubin, by entry.
///
/// # Errors
/// [`CompileError::Sass`] where nvdisasm is missing or refuses the image.
pub fn sass(cubin: &[u8]) -> Result<BTreeMap<String, SassHistogram>, CompileError> {
    static COUNT: AtomicU64 = AtomicU64::new(0);
    let nvdisasm = find_nvdisasm()?;
    let fail = |why: String| CompileError::Sass { why };
    let serial = COUNT.fetch_add(1, Ordering::Relaxed);
    let file = std::env::temp_dir().join(format!("dsv-sass-{}-{serial}.cubin", std::process::id()));
    std::fs::write(&file, cubin).map_err(|e| fail(format!("{}: {e}", file.display())))?;
    let out = Command::new(&nvdisasm).arg("--print-code").arg(&file).output();
    let _ = std::fs::remove_file(&file);
    let out = out.map_err(|e| fail(format!("{} does not start: {e}", nvdisasm.display())))?;
    if !out.status.success() {
        return Err(fail(String::from_utf8_lossy(&out.stderr).trim().to_owned()));
    }
    Ok(histogram(&String::from_utf8_lossy(&out.stdout)))
}

/// Reads nvdisasm's listing: a `.text.<entry>:` label, then lines `/*0010*/  @P0 OPCODE.MODIFIER operands ;`.
fn histogram(listing: &str) -> BTreeMap<String, SassHistogram> {
    let mut entries: BTreeMap<String, SassHistogram> = BTreeMap::new();
    let mut current = String::new();
    for line in listing.lines().map(str::trim) {
        if let Some(entry) = line.strip_prefix(".text.").and_then(|rest| rest.strip_suffix(':')) {
            current = entry.to_owned();
            entries.entry(current.clone()).or_default();
        } else if let Some((_, rest)) = line.strip_prefix("/*").and_then(|rest| rest.split_once("*/")) {
            let rest = rest.trim_start().trim_start_matches(['{', ' ']);
            let opcode = rest.split_whitespace().find(|word| !word.starts_with('@')).unwrap_or_default();
            let opcode = opcode.split('.').next().unwrap_or_default().trim_end_matches(';');
            if opcode.starts_with(|c: char| c.is_ascii_uppercase())
                && let Some(entry) = entries.get_mut(&current)
            {
                *entry.counts.entry(opcode.to_owned()).or_default() += 1;
            }
        }
    }
    entries
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn listing() {
        let text = "\t.section\t.text.k,\"ax\"\n.text.k:\n\
            \t/*0000*/                   LDC R1, c[0x0][0x28] ;\n\
            \t/*0010*/              @!P0 BRA `(.L_x_1) ;\n\
            .L_x_0:\n\
            \t/*0020*/                   HGMMA.64x64x16.F32.BF16 R24, gdesc[UR4], !UPT ;\n\
            \t/*0030*/                   HGMMA.64x64x16.F32.BF16 R24, gdesc[UR8], R24 ;\n";
        let entries = histogram(text);
        let k = &entries["k"];
        assert_eq!((k.count("HGMMA"), k.count("BRA"), k.count("LDC"), k.count("STL")), (2, 1, 1, 0));
        assert_eq!(k.iter().count(), 3);
    }
}
