//! The tree of generated files: made in memory, written, or compared with the disk.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use dsv_spec::{Arch, DispatchTable, KernelSpec, space};

use crate::{CodegenError, HEADERS, registry, render, source_hash};

/// Architectures whose kernels are committed under `generated/`.
pub const COMMITTED_ARCHES: [Arch; 2] = [Arch::Sm80, Arch::Sm90a];

/// The committed kernels: the shipped set of every committed architecture, and the winners that the tables in
/// `<generated>/tables` name. Sorted by name.
///
/// # Errors
/// [`CodegenError::Table`] with every problem of the first table that cannot be read, or [`CodegenError::Io`].
pub fn committed_specs(generated: &Path) -> Result<Vec<KernelSpec>, CodegenError> {
    let mut specs: Vec<KernelSpec> = COMMITTED_ARCHES.iter().flat_map(|&arch| space::shipped(arch)).collect();
    let dir = generated.join("tables");
    if dir.is_dir() {
        for path in files_under(&dir)?.into_values() {
            if path.extension().is_some_and(|extension| extension == "json") {
                let text = fs::read_to_string(&path).map_err(CodegenError::io("read", &path))?;
                let table = DispatchTable::from_json(&path.display().to_string(), &text)?;
                specs.extend(table.entries.iter().map(|entry| entry.kernel));
            }
        }
    }
    specs.sort_by_key(ToString::to_string);
    specs.dedup();
    Ok(specs)
}

/// Files of a generated tree, by path with `/`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tree {
    files: BTreeMap<String, String>,
}

/// What [`Tree::write`] did.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Written {
    /// Files written, because they were missing or different.
    pub written: Vec<String>,
    /// Files that were right already, and not touched.
    pub unchanged: usize,
    /// Files removed, because no spec makes them.
    pub removed: Vec<String>,
}

impl Tree {
    /// A tree that stands alone, as a build script wants it in `OUT_DIR`: `kernels/<op>/<name>.cu`,
    /// `include/dsv/*.cuh` and `registry.rs`.
    ///
    /// # Errors
    /// Those of [`render`].
    pub fn of(specs: &[KernelSpec]) -> Result<Tree, CodegenError> {
        let mut tree = Tree::with_headers_in(specs, "include")?;
        for (name, text) in HEADERS {
            tree.files.insert(format!("include/{name}"), (*text).to_owned());
        }
        Ok(tree)
    }

    /// The committed tree, `generated/` of a checkout: as [`Tree::of`], but the headers stay in
    /// `templates/include`.
    ///
    /// # Errors
    /// Those of [`committed_specs`] and [`render`].
    pub fn committed(generated: &Path) -> Result<Tree, CodegenError> {
        Tree::with_headers_in(&committed_specs(generated)?, "../templates/include")
    }

    fn with_headers_in(specs: &[KernelSpec], include: &str) -> Result<Tree, CodegenError> {
        let mut files = BTreeMap::new();
        let mut kernels = BTreeMap::new();
        for spec in specs {
            let text = render(spec)?;
            let path = format!("kernels/{}/{}.cu", spec.op(), spec.name());
            kernels.insert(spec.name(), (path.clone(), source_hash(&text)));
            files.insert(path, text);
        }
        let kernels: Vec<_> = kernels.into_iter().map(|(name, (path, hash))| (name, path, hash)).collect();
        let headers: Vec<_> =
            HEADERS.iter().map(|(name, _)| ((*name).to_owned(), format!("{include}/{name}"))).collect();
        files.insert("registry.rs".to_owned(), registry::registry(&kernels, &headers));
        Ok(Tree { files })
    }

    /// Every file as (path with `/`, text), sorted by path.
    pub fn files(&self) -> impl Iterator<Item = (&str, &str)> {
        self.files.iter().map(|(path, text)| (path.as_str(), text.as_str()))
    }

    /// Files that lie on disk where this tree's would: everything under `kernels` and `include`, and the registry.
    /// Tables are not the generator's.
    fn on_disk(dir: &Path) -> Result<BTreeMap<String, PathBuf>, CodegenError> {
        let mut found = BTreeMap::new();
        for folder in ["kernels", "include"] {
            let root = dir.join(folder);
            if root.is_dir() {
                found.extend(
                    files_under(&root)?.into_iter().map(|(path, file)| (format!("{folder}/{path}"), file)),
                );
            }
        }
        let registry = dir.join("registry.rs");
        if registry.is_file() {
            found.insert("registry.rs".to_owned(), registry);
        }
        Ok(found)
    }

    /// Makes `dir` hold exactly this tree (tables aside). A file that is right already is not touched.
    ///
    /// # Errors
    /// [`CodegenError::Io`] with the path.
    pub fn write(&self, dir: &Path) -> Result<Written, CodegenError> {
        let mut done = Written::default();
        for (path, text) in &self.files {
            let file = dir.join(path);
            if fs::read(&file).is_ok_and(|bytes| bytes == text.as_bytes()) {
                done.unchanged += 1;
                continue;
            }
            if let Some(parent) = file.parent() {
                fs::create_dir_all(parent).map_err(CodegenError::io("write", parent))?;
            }
            fs::write(&file, text).map_err(CodegenError::io("write", &file))?;
            done.written.push(path.clone());
        }
        for (path, file) in Tree::on_disk(dir)? {
            if !self.files.contains_key(&path) {
                fs::remove_file(&file).map_err(CodegenError::io("remove", &file))?;
                // Fails, as it should, where the folder still holds a kernel.
                let _ = file.parent().map(fs::remove_dir);
                done.removed.push(path);
            }
        }
        Ok(done)
    }

    /// Compares `dir` with this tree.
    ///
    /// # Errors
    /// [`CodegenError::Stale`] with every missing, extra and different file.
    pub fn check(&self, dir: &Path) -> Result<(), CodegenError> {
        let found = Tree::on_disk(dir)?;
        let paths: BTreeSet<&String> = self.files.keys().chain(found.keys()).collect();
        let mut problems = [Vec::new(), Vec::new(), Vec::new()];
        for path in paths {
            match (self.files.get(path), found.get(path)) {
                (Some(_), None) => problems[0].push(format!("  missing: {path}")),
                (None, Some(_)) => problems[1].push(format!("  extra: {path} (no spec makes it)")),
                (Some(text), Some(file)) => {
                    let bytes = fs::read(file).map_err(CodegenError::io("read", file))?;
                    if bytes != text.as_bytes() {
                        let line = first_difference(text, &String::from_utf8_lossy(&bytes));
                        problems[2].push(format!("  different: {path}, line {line}"));
                    }
                }
                (None, None) => {}
            }
        }
        let problems = problems.concat();
        if problems.is_empty() {
            Ok(())
        } else {
            Err(CodegenError::Stale { dir: dir.to_path_buf(), problems })
        }
    }
}

/// 1-based number of the first line in which two texts differ.
fn first_difference(a: &str, b: &str) -> usize {
    let same = a.split('\n').zip(b.split('\n')).take_while(|(a, b)| a == b).count();
    same + 1
}

/// Every file below a directory, by its path relative to it, with `/`.
fn files_under(dir: &Path) -> Result<BTreeMap<String, PathBuf>, CodegenError> {
    let mut found = BTreeMap::new();
    let mut folders = vec![(String::new(), dir.to_path_buf())];
    while let Some((prefix, folder)) = folders.pop() {
        for entry in fs::read_dir(&folder).map_err(CodegenError::io("read", &folder))? {
            let path = entry.map_err(CodegenError::io("read", &folder))?.path();
            let name = format!("{prefix}{}", path.file_name().unwrap_or_default().to_string_lossy());
            if path.is_dir() {
                folders.push((format!("{name}/"), path));
            } else if !name.ends_with(".gitkeep") {
                found.insert(name, path);
            }
        }
    }
    Ok(found)
}
