//! Which kernel a caller gets: the lookup of a dispatch table on this GPU, for benchmarks of what is served. Unlike the
//! runtime it also serves winners whose text is not committed yet, and says so: a table can be judged before it is.

use crate::error::TuneError;
use crate::plan::ServedBy;
use dsv_runtime::Registry;
use dsv_spec::{Arch, DispatchTable, Found, KernelSpec, Problem, TableError, space};
use std::path::Path;

/// The kernel a problem gets, and from where.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Serving {
    /// The kernel.
    pub kernel: KernelSpec,
    /// `exact`, `nearest` or `default`; then what a reader should know, such as `, stale`.
    pub found: String,
}

/// One table, or the reason why there is none.
#[derive(Clone, Debug)]
pub struct Service {
    arch: Arch,
    table: Option<DispatchTable>,
    origin: String,
}

impl Service {
    /// Finds the table of a GPU. Where none is committed the shipped defaults serve, which [`Service::origin`] says.
    ///
    /// # Errors
    /// A table that cannot be read, or that is of another GPU.
    pub fn new(gpu: &str, arch: Arch, by: &ServedBy) -> Result<Service, TuneError> {
        let checked = |origin: &str, json: &str| -> Result<DispatchTable, TableError> {
            let table = DispatchTable::from_json(origin, json)?;
            let (major, minor) = match arch {
                Arch::Sm90a => (9, 0),
                Arch::Sm80 => (8, 0),
            };
            table.check_gpu(origin, gpu, major, minor)?;
            Ok(table)
        };
        let (origin, table) = match by {
            ServedBy::File(path) => (path.display().to_string(), checked_file(path, checked)?),
            ServedBy::Committed => {
                let of_this = |(_, json): &&(&str, &str)| {
                    serde_json::from_str::<serde_json::Value>(json)
                        .is_ok_and(|table| table["meta"]["gpu"].as_str() == Some(gpu))
                };
                match Registry::committed().tables.iter().find(of_this) {
                    None => return Ok(Service::defaults(gpu, arch)),
                    Some((file, json)) => {
                        let origin = format!("generated/tables/{file}");
                        let table = checked(&origin, json)?;
                        (origin, table)
                    }
                }
            }
        };
        let origin = format!("{origin} ({})", table.meta.date);
        Ok(Service { arch, table: Some(table), origin })
    }

    /// The shipped defaults.
    pub fn defaults(gpu: &str, arch: Arch) -> Service {
        Service { arch, table: None, origin: format!("shipped defaults: no table of '{gpu}' is committed") }
    }

    /// Architecture of the kernels.
    pub fn arch(&self) -> Arch {
        self.arch
    }

    /// The table in use and its date, or why there is none.
    pub fn origin(&self) -> &str {
        &self.origin
    }

    /// The kernel of a problem; `None` where no kernel serves it.
    pub fn serve(&self, problem: &Problem) -> Option<Serving> {
        let entry = match self.table.as_ref().map(|table| table.lookup(problem)) {
            Some(Found::Exact(entry)) => Some(("exact", entry)),
            Some(Found::Nearest(entry)) => Some(("nearest", entry)),
            Some(Found::Nothing) | None => None,
        };
        if let Some((how, entry)) = entry {
            let text = Registry::committed().kernel(&entry.kernel.name());
            let note = match text {
                None => ", text not committed",
                Some(text) if text.source_hash != entry.source_hash => ", stale",
                Some(_) => "",
            };
            return Some(Serving { kernel: entry.kernel, found: format!("{how}{note}") });
        }
        let Problem { op, dtype, head_dim, lists, deterministic, .. } = *problem;
        // As the runtime has it: what is not shipped is no default, though a candidate may exist.
        let spec = space::default_attn(op, dtype, head_dim, lists, deterministic, self.arch);
        let kernel = spec.map(KernelSpec::Attn)?;
        Registry::committed().kernel(&kernel.name())?;
        Some(Serving { kernel, found: "default".to_string() })
    }
}

fn checked_file(
    path: &Path,
    checked: impl Fn(&str, &str) -> Result<DispatchTable, TableError>,
) -> Result<DispatchTable, TuneError> {
    let origin = path.display().to_string();
    let json = std::fs::read_to_string(path).map_err(|why| TableError {
        origin: origin.clone(),
        problems: vec![format!("it cannot be read: {why}")],
    })?;
    Ok(checked(&origin, &json)?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plan::Case;
    use dsv_spec::{AttnOp, Deterministic};

    #[test]
    fn serves_what_the_runtime_serves() {
        use dsv_runtime::{Dispatch, Gpu, TableSource, silent};
        for (file, json) in Registry::committed().tables {
            let table = DispatchTable::from_json(file, json).unwrap();
            let (name, arch) = (table.meta.gpu.clone(), table.meta.arch);
            let service = Service::new(&name, arch, &ServedBy::Committed).unwrap();
            assert!(service.origin().contains(file), "{}", service.origin());
            let gpu = Gpu { name, capability: (9, 0), arch };
            let dispatch = Dispatch::new(gpu, &TableSource::Committed, Registry::committed(), &silent());
            let mut served = 0;
            for head_dim in [64, 96, 128, 256] {
                for case in [
                    Case::dense(head_dim, 16, 32768),
                    Case::mixed(head_dim, 16, 32768, (64, 64)),
                    Case::sparse(head_dim, 8, 100, (128, 128), 0.3, crate::listgen::ListKind::Random),
                    Case::sparse(head_dim, 8, 4096, (128, 8), 0.1, crate::listgen::ListKind::Random),
                    Case::sparse(head_dim, 8, 4096, (64, 16), 0.1, crate::listgen::ListKind::Random),
                ] {
                    for op in [AttnOp::Fwd, AttnOp::Bwd, AttnOp::BwdDq] {
                        for &deterministic in Deterministic::ALL {
                            let problem = Problem { deterministic, ..case.problem(op) };
                            let theirs = dispatch.explain(&problem).ok().map(|e| e.kernel);
                            let ours = service.serve(&problem).map(|s| s.kernel);
                            assert_eq!(ours, theirs, "{problem:?}");
                            served += usize::from(ours.is_some());
                        }
                    }
                }
            }
            assert!(served >= 2 * 3 * 3 * 2, "{served}");
        }
        assert!(!Registry::committed().tables.is_empty());
    }

    #[test]
    fn no_table_is_said_and_a_wrong_one_is_refused() {
        let service = Service::new("NVIDIA Abacus", Arch::Sm90a, &ServedBy::Committed).unwrap();
        assert_eq!(service.origin(), "shipped defaults: no table of 'NVIDIA Abacus' is committed");
        let problem = Case::dense(128, 16, 32768).problem(AttnOp::Fwd);
        assert_eq!(service.serve(&problem).unwrap().found, "default");
        let unshipped = Problem { head_dim: 72, ..problem };
        assert_eq!(service.serve(&unshipped), None);
        let temp = tempfile::tempdir().unwrap();
        let path = temp.path().join("t.json");
        let by = ServedBy::File(path.clone());
        let error = Service::new("NVIDIA Abacus", Arch::Sm90a, &by).unwrap_err().to_string();
        assert!(error.contains("t.json") && error.contains("cannot be read"), "{error}");
        std::fs::write(&path, Registry::committed().tables[0].1).unwrap();
        let error = Service::new("NVIDIA Abacus", Arch::Sm90a, &by).unwrap_err().to_string();
        assert!(error.contains("NVIDIA Abacus"), "{error}");
    }
}
