//! The committed texts and tables, compiled into the program.

#[allow(unreachable_pub)]
mod generated {
    include!(concat!(env!("CARGO_MANIFEST_DIR"), "/../generated/registry.rs"));
    include!(concat!(env!("OUT_DIR"), "/tables.rs"));
}

pub use generated::Kernel as KernelText;

/// Every text and table this program carries.
#[derive(Clone, Copy, Debug)]
pub struct Registry {
    /// Kernels, sorted by name.
    pub kernels: &'static [KernelText],
    /// Headers the texts include, as (`dsv/xxx.cuh`, text).
    pub headers: &'static [(&'static str, &'static str)],
    /// Dispatch tables, as (file name under `generated/tables`, JSON).
    pub tables: &'static [(&'static str, &'static str)],
}

impl Registry {
    /// What lies under `generated/`.
    pub const fn committed() -> Registry {
        Registry { kernels: generated::KERNELS, headers: generated::HEADERS, tables: generated::TABLES }
    }

    /// The kernel of this name.
    pub fn kernel(&self, name: &str) -> Option<&'static KernelText> {
        self.kernels.binary_search_by(|k| k.name.cmp(name)).ok().map(|i| &self.kernels[i])
    }
}
