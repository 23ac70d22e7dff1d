//! What a kernel costs: read from ptxas's log and cross-checked against the cubin.

use std::collections::BTreeMap;

use object::{Object, ObjectSection, ObjectSymbol};
use serde::{Deserialize, Serialize};

use crate::CompileError;

/// Resources of one kernel entry.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ResourceReport {
    /// 32-bit registers a thread at launch (before any `setmaxnreg`).
    pub registers: u32,
    /// Bytes a thread stores to local memory for want of registers, counted in the text.
    pub spill_store_bytes: u32,
    /// Bytes a thread loads back.
    pub spill_load_bytes: u32,
    /// Bytes of stack frame a thread.
    pub stack_bytes: u32,
    /// Bytes of static shared memory a CTA; dynamic shared memory is the launch's.
    pub static_smem_bytes: u32,
    /// First argument of `__launch_bounds__`, where given as such.
    pub max_threads: Option<u32>,
    /// Named barriers used.
    pub barriers: u32,
}

/// Kernels that may spill, with how many bytes: one `<kernel name> <bytes>  # why` a line.
#[derive(Clone, Debug, Default)]
pub struct SpillList(BTreeMap<String, u32>);

impl SpillList {
    /// A list with nothing in it: no kernel may spill.
    pub fn none() -> Self {
        Self::default()
    }

    /// Reads a list. Blank lines and lines of comment alone are skipped; the reason after `#` is required.
    ///
    /// # Errors
    /// [`CompileError::SpillLine`] for the first line that is not of the form.
    pub fn parse(text: &str) -> Result<Self, CompileError> {
        let mut list = BTreeMap::new();
        for (i, line) in text.lines().enumerate() {
            let bad = || CompileError::SpillLine { line: i + 1, text: line.to_owned() };
            let (entry, why) = line.split_once('#').unwrap_or((line, ""));
            let words: Vec<&str> = entry.split_whitespace().collect();
            match words[..] {
                [] => {}
                [name, bytes] if !why.trim().is_empty() => {
                    let bytes = bytes.parse().map_err(|_| bad())?;
                    if list.insert(name.to_owned(), bytes).is_some() {
                        return Err(bad());
                    }
                }
                _ => return Err(bad()),
            }
        }
        Ok(Self(list))
    }

    /// Bytes the kernel may spill; 0 where it is not listed.
    pub fn allowed(&self, name: &str) -> u32 {
        self.0.get(name).copied().unwrap_or(0)
    }

    /// Names listed, sorted.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.0.keys().map(String::as_str)
    }
}

/// The log without lines that tell how long something took.
pub(crate) fn without_times(log: &str) -> String {
    let mut text: String =
        log.lines().filter(|line| !line.contains("Compile time =")).flat_map(|line| [line, "\n"]).collect();
    text.truncate(text.trim_end().len());
    text
}

/// Lines with a `(C75..)` note.
pub(crate) fn notes(log: &str) -> Vec<String> {
    log.lines().filter(|line| line.contains("(C75")).map(|line| line.trim().to_owned()).collect()
}

/// Warnings, but for those of `-warn-spills` and the notes, which are judged on their own.
pub(crate) fn warnings(log: &str) -> Vec<String> {
    log.lines()
        .filter(|line| line.contains("warning") && !line.contains("(C75"))
        .filter(|line| !line.contains("Registers are spilled") && !line.starts_with("Remark:"))
        .map(|line| line.trim().to_owned())
        .collect()
}

/// The number that stands before ` <unit>` in a line, as in `32 bytes spill stores`.
fn before(line: &str, unit: &str) -> Option<u32> {
    let at = line.find(unit)?;
    line[..at].split_whitespace().last()?.parse().ok()
}

/// Reports of all entries, from the log of `-v`, checked against the cubin's `.nv.info`.
pub(crate) fn entries(
    name: &str,
    log: &str,
    cubin: &[u8],
) -> Result<BTreeMap<String, ResourceReport>, CompileError> {
    let fail = |what: String| CompileError::Report { name: name.to_owned(), what };
    let mut entries: BTreeMap<String, ResourceReport> = BTreeMap::new();
    let mut current = String::new();
    // Properties of functions that are not inlined follow those of their entry; only the entry's own count as its
    // frame, all of them as its spills.
    let mut in_entry = false;
    for line in log.lines() {
        if let Some(rest) = line.split_once("Compiling entry function '").map(|(_, rest)| rest) {
            current = rest.split('\'').next().unwrap_or_default().to_owned();
            entries.insert(current.clone(), ResourceReport::default());
        } else if let Some((_, function)) = line.split_once("Function properties for ") {
            in_entry = function.trim() == current;
        } else if let Some(report) = entries.get_mut(&current) {
            if let Some(stack) = before(line, " bytes stack frame") {
                let (stores, loads) =
                    (before(line, " bytes spill stores"), before(line, " bytes spill loads"));
                let (Some(stores), Some(loads)) = (stores, loads) else {
                    return Err(fail(format!("cannot read \"{line}\"")));
                };
                report.spill_store_bytes += stores;
                report.spill_load_bytes += loads;
                if in_entry {
                    report.stack_bytes = stack;
                }
            } else if let Some((_, used)) = line.split_once(": Used ") {
                report.registers =
                    before(used, " registers").ok_or_else(|| fail(format!("cannot read \"{line}\"")))?;
                report.barriers = before(used, " barriers").unwrap_or(0);
                report.static_smem_bytes = before(used, " bytes smem").unwrap_or(0);
            }
        }
    }
    for (entry, facts) in cubin_facts(cubin).map_err(fail)? {
        let report = entries
            .get_mut(&entry)
            .ok_or_else(|| fail(format!("the cubin holds {entry}, of which the log says nothing")))?;
        report.max_threads = facts.max_threads;
        if facts.registers.is_some_and(|registers| registers != report.registers) {
            return Err(fail(format!(
                "the log says {} registers for {entry}, the cubin {}",
                report.registers,
                facts.registers.unwrap_or(0)
            )));
        }
    }
    if let Some((entry, _)) = entries.iter().find(|(_, report)| report.registers == 0) {
        return Err(fail(format!("the log names {entry}, but not its registers")));
    }
    Ok(entries)
}

/// What the cubin itself says of an entry.
#[derive(Default)]
struct CubinFacts {
    registers: Option<u32>,
    max_threads: Option<u32>,
}

/// Attribute numbers of `.nv.info`, as `cuobjdump -elf` names them.
const EIATTR_MAX_THREADS: u8 = 0x05;
const EIATTR_REGCOUNT: u8 = 0x2f;
/// The one attribute format that carries a length and bytes.
const EIFMT_SVAL: u8 = 0x04;

/// Facts of each kernel entry (a `.nv.info.<entry>` section says it is one).
fn cubin_facts(cubin: &[u8]) -> Result<BTreeMap<String, CubinFacts>, String> {
    let elf = object::File::parse(cubin).map_err(|e| format!("the cubin is no ELF image: {e}"))?;
    let mut facts: BTreeMap<String, CubinFacts> = BTreeMap::new();
    for section in elf.sections() {
        let Some(entry) = section.name().ok().and_then(|name| name.strip_prefix(".nv.info.")) else {
            continue;
        };
        let data = section.data().map_err(|e| e.to_string())?;
        let mut max_threads = None;
        attributes(data, |attribute, value| {
            if attribute == EIATTR_MAX_THREADS {
                max_threads = word(value, 0);
            }
        });
        // Functions that are called rather than inlined have an .nv.info too; entries have a .nv.constant0.
        if elf.section_by_name(&format!(".nv.constant0.{entry}")).is_some() {
            facts.insert(entry.to_owned(), CubinFacts { registers: None, max_threads });
        }
    }
    let names: BTreeMap<usize, &str> =
        elf.symbols().filter_map(|symbol| Some((symbol.index().0, symbol.name().ok()?))).collect();
    if let Some(section) = elf.section_by_name(".nv.info") {
        attributes(section.data().map_err(|e| e.to_string())?, |attribute, value| {
            if attribute == EIATTR_REGCOUNT
                && let (Some(symbol), Some(registers)) = (word(value, 0), word(value, 4))
                && let Some(facts) = names.get(&(symbol as usize)).and_then(|name| facts.get_mut(*name))
            {
                facts.registers = Some(registers);
            }
        });
    }
    Ok(facts)
}

fn word(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_le_bytes(bytes.get(at..at + 4)?.try_into().ok()?))
}

/// Walks the attributes of an `.nv.info` section: format, attribute, then a 16-bit value or a length and bytes.
fn attributes(mut data: &[u8], mut each: impl FnMut(u8, &[u8])) {
    while let [format, attribute, low, high, rest @ ..] = data {
        let length = if *format == EIFMT_SVAL { u16::from_le_bytes([*low, *high]) as usize } else { 0 };
        if rest.len() < length {
            return;
        }
        each(*attribute, &rest[..length]);
        data = &rest[length..];
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spill_list() {
        let list =
            SpillList::parse("# header\n\nattn_fwd_x 64  # measured faster than a smaller tile\n").unwrap();
        assert_eq!(list.allowed("attn_fwd_x"), 64);
        assert_eq!(list.allowed("other"), 0);
        for bad in ["attn 64", "attn 64 #", "attn # why", "attn x # why", "a 1 # y\na 2 # y"] {
            assert!(SpillList::parse(bad).is_err(), "{bad:?} was accepted");
        }
    }

    #[test]
    fn log_lines() {
        let log = "k.cu(1): warning #186-D: pointless comparison\n\
                   Remark: The warnings can be suppressed with \"-diag-suppress <warning-number>\"\n\
                   ptxas warning : Registers are spilled to local memory in function 'k', 4 bytes spill stores\n\
                   ptxas info    : (C7511) Potential Performance Loss: wgmma.mma_async instructions are serialized\n\
                   ptxas info    : Compile time = 3.1 ms\n";
        let log = without_times(log);
        assert!(!log.contains("Compile time"));
        assert_eq!(warnings(&log), ["k.cu(1): warning #186-D: pointless comparison"]);
        assert_eq!(notes(&log).len(), 1);
    }
}
