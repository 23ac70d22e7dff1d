//! Reading machine code, to see what the compiler made of a kernel before any GPU time is spent.

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::PathBuf;
use std::process::Command;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::CompileError;

/// What the text of a kernel shows.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SassReport {
    counts: BTreeMap<String, u32>,
    lost_operands: Vec<String>,
}

impl SassReport {
    /// How often an opcode without modifiers (`HGMMA`, `UTMALDG`, `LDL`, `STL`, `WARPGROUP`, ...) occurs in the text, not how often
    /// it runs.
    pub fn count(&self, opcode: &str) -> u32 {
        self.counts.get(opcode).copied().unwrap_or(0)
    }

    /// All opcodes with their counts, sorted by name.
    pub fn iter(&self) -> impl Iterator<Item = (&str, u32)> {
        self.counts.iter().map(|(opcode, count)| (opcode.as_str(), *count))
    }

    /// Operands of wgmma that the compiler loses: registers filled from shared memory (ldmatrix) ahead of a loop, read by a wgmma
    /// inside it, and overwritten further down in it with something else, which the next turn then takes for the operand. ptxas of
    /// CUDA 13.0 gives such code away without a warning where registers are short. One line for each, empty in a sound kernel.
    pub fn lost_operands(&self) -> &[String] {
        &self.lost_operands
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

/// Reads the machine code of every kernel in a cubin, by entry.
///
/// # Errors
/// [`CompileError::Sass`] where nvdisasm is missing or refuses the image.
pub fn sass(cubin: &[u8]) -> Result<BTreeMap<String, SassReport>, CompileError> {
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
    Ok(read(&String::from_utf8_lossy(&out.stdout)))
}

/// An instruction: its opcode with modifiers, and its operands.
struct Instruction<'a> {
    opcode: &'a str,
    operands: &'a str,
}

impl Instruction<'_> {
    /// The opcode without its modifiers.
    fn stem(&self) -> &str {
        self.opcode.split_once('.').map_or(self.opcode, |(stem, _)| stem)
    }

    fn is(&self, stem: &str) -> bool {
        self.stem() == stem
    }

    /// The general registers it writes, but for wgmma's accumulators: a result that is a predicate comes first; stores,
    /// comparisons and branches write none.
    fn written(&self) -> Range<u32> {
        let silent = [
            "ST", "STS", "STG", "STL", "STSM", "RED", "SYNCS", "BAR", "BRA", "UTMALDG", "HGMMA", "ISETP",
            "FSETP", "R2P",
        ];
        let target = self.operands.split(',').map(str::trim).find(|word| !is_predicate(word));
        let Some(first) = target.and_then(register).filter(|_| !silent.iter().any(|opcode| self.is(opcode)))
        else {
            return 0..0;
        };
        let has = |modifier: &str| self.opcode.split('.').any(|word| word == modifier);
        let wide = if has("128") || (self.is("LDSM") && has("4")) {
            4
        } else if has("64") || has("WIDE") || (self.is("LDSM") && has("2")) {
            2
        } else {
            1
        };
        first..first + wide
    }

    /// The registers of a wgmma's first operand, where it is no descriptor.
    fn wgmma_operand(&self) -> Range<u32> {
        let first = self.operands.split(',').nth(1).and_then(|word| register(word.trim()));
        first.filter(|_| self.is("HGMMA")).map_or(0..0, |first| first..first + 4)
    }
}

/// The number of a general register, whatever its suffix (`R12.reuse`).
fn register(word: &str) -> Option<u32> {
    word.strip_prefix('R')?.split('.').next()?.parse().ok()
}

fn is_predicate(word: &str) -> bool {
    let word = word.strip_prefix('U').unwrap_or(word);
    word.strip_prefix('P').is_some_and(|rest| rest == "T" || rest.parse::<u32>().is_ok())
}

/// A kernel's instructions, and at which of them each label stands.
#[derive(Default)]
struct Text<'a> {
    instructions: Vec<Instruction<'a>>,
    labels: BTreeMap<&'a str, usize>,
}

impl Text<'_> {
    fn report(&self) -> SassReport {
        let mut counts = BTreeMap::new();
        for instruction in &self.instructions {
            *counts.entry(instruction.stem().to_owned()).or_default() += 1;
        }
        SassReport { counts, lost_operands: self.lost_operands() }
    }

    /// The first and the last instruction of each loop.
    fn loops(&self) -> Vec<(usize, usize)> {
        let target = |i: &Instruction| {
            let label = i.operands.split_once("`(").and_then(|(_, rest)| rest.split_once(')'))?.0;
            self.labels.get(label).copied()
        };
        let branches = self.instructions.iter().enumerate().filter(|(_, i)| i.is("BRA"));
        branches.filter_map(|(end, i)| Some((target(i)?, end))).filter(|(start, end)| start <= end).collect()
    }

    fn lost_operands(&self) -> Vec<String> {
        let loops = self.loops();
        let mut writers: BTreeMap<u32, Vec<usize>> = BTreeMap::new();
        for (at, instruction) in self.instructions.iter().enumerate() {
            instruction.written().for_each(|r| writers.entry(r).or_default().push(at));
        }
        let mut lost = Vec::new();
        for (at, wgmma) in self.instructions.iter().enumerate() {
            let innermost = loops
                .iter()
                .filter(|(start, end)| (*start..=*end).contains(&at))
                .max_by_key(|(start, _)| *start);
            let Some(&(start, end)) = innermost else { continue };
            for r in wgmma.wgmma_operand() {
                let writers = writers.get(&r).map_or(&[][..], Vec::as_slice);
                let loaded = |w: &usize| self.instructions[*w].is("LDSM");
                let made_in_turn = writers.iter().any(|w| (start..at).contains(w));
                let left_by_turn = writers.iter().rfind(|w| (at..=end).contains(w));
                let loaded_before = writers.iter().any(|w| *w < start && loaded(w));
                if let Some(by) = left_by_turn.filter(|w| !loaded(w) && !made_in_turn && loaded_before) {
                    let Instruction { opcode, operands } = &self.instructions[*by];
                    lost.push(format!(
                        "R{r} of {} {} is overwritten by {opcode} {operands}",
                        wgmma.opcode, wgmma.operands
                    ));
                }
            }
        }
        lost
    }
}

/// Reads nvdisasm's listing: a `.text.<entry>:` label, then labels `.L_x_1:` and lines `/*0010*/  @P0 OPCODE.MODIFIER operands ;`.
fn read(listing: &str) -> BTreeMap<String, SassReport> {
    let mut entries: BTreeMap<String, Text> = BTreeMap::new();
    let mut current = None;
    for line in listing.lines().map(str::trim) {
        if let Some(entry) = line.strip_prefix(".text.").and_then(|rest| rest.strip_suffix(':')) {
            current = Some(entries.entry(entry.to_owned()).or_default());
            continue;
        }
        let Some(text) = current.as_mut() else { continue };
        if let Some(label) = line.strip_suffix(':').filter(|label| label.starts_with(".L")) {
            text.labels.insert(label, text.instructions.len());
        } else if let Some((_, rest)) = line.strip_prefix("/*").and_then(|rest| rest.split_once("*/")) {
            let rest = rest.split_once("/*").map_or(rest, |(code, _)| code);
            let rest = rest.trim_start_matches(['{', ' ']).trim_end_matches([' ', ';', '}']);
            let unguarded = rest
                .strip_prefix('@')
                .map_or(rest, |guarded| guarded.split_once(' ').map_or("", |(_, code)| code));
            let (opcode, operands) =
                unguarded.trim_start().split_once(' ').unwrap_or((unguarded.trim_start(), ""));
            if opcode.starts_with(|c: char| c.is_ascii_uppercase()) {
                text.instructions.push(Instruction { opcode, operands: operands.trim() });
            }
        }
    }
    entries.into_iter().map(|(entry, text)| (entry, text.report())).collect()
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
        let entries = read(text);
        let k = &entries["k"];
        assert_eq!((k.count("HGMMA"), k.count("BRA"), k.count("LDC"), k.count("STL")), (2, 1, 1, 0));
        assert_eq!(k.iter().count(), 3);
    }

    /// A loop whose wgmma takes K from R168 to R171, filled before it; `last` is the loop's last instruction but the branch.
    fn a_loop(last: &str) -> SassReport {
        let text = format!(
            ".text.k:\n\
            /*0000*/ LDSM.16.M88.4 R168, [R168] ;\n\
            .L_x_0:\n\
            /*0010*/ HGMMA.64x64x16.F32.BF16 R56, R168, gdesc[UR20], RZ, !UPT ;\n\
            /*0020*/ {last} ;\n\
            /*0030*/ @P0 BRA `(.L_x_0) ;\n\
            /*0040*/ F2FP.BF16.F32.PACK_AB R168, R57, R56 ;\n"
        );
        read(&text).remove("k").expect("one entry")
    }

    #[test]
    fn an_operand_overwritten_in_its_loop_is_lost() {
        let lost = a_loop("F2FP.BF16.F32.PACK_AB R169, R57, R56");
        let expected = "R169 of HGMMA.64x64x16.F32.BF16 R56, R168, gdesc[UR20], RZ, !UPT is overwritten by F2FP.BF16.F32.PACK_AB R169, R57, R56";
        assert_eq!(lost.lost_operands(), [expected]);
        assert_eq!(a_loop("ISETP.NE.AND P0, PT, R170, RZ, PT").lost_operands(), [""; 0]);
        assert_eq!(a_loop("LDSM.16.M88.4 R168, [R2]").lost_operands(), [""; 0]);
        assert_eq!(a_loop("LDS.64 R170, [R2+0x80]").lost_operands().len(), 2);
        assert_eq!(a_loop("STS.64 [R168], R170").lost_operands(), [""; 0]);
    }
}
