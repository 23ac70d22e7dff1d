//! Files that are either whole or not there: written aside, synced, then renamed into place.

use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};

/// Where files are created. The one seam through which tests put a full disk under a writer.
pub trait Disk {
    /// Creates (or empties) a file for writing.
    fn create(&self, path: &Path) -> io::Result<File>;
}

/// The machine's own file system.
#[derive(Clone, Copy, Debug, Default)]
pub struct RealDisk;

impl Disk for RealDisk {
    fn create(&self, path: &Path) -> io::Result<File> {
        File::create(path)
    }
}

/// Writes `path` through `fill`, atomically: a reader, or a crash at any moment, sees the old file or the whole
/// new one. Parent folders are created. On error nothing is left behind.
pub fn write_file<T>(
    disk: &dyn Disk,
    path: &Path,
    fill: impl FnOnce(&mut BufWriter<File>) -> io::Result<T>,
) -> io::Result<T> {
    let parent = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    std::fs::create_dir_all(parent)?;
    let aside = aside(path);
    let result = write_synced(disk, &aside, fill).and_then(|value| {
        std::fs::rename(&aside, path)?;
        sync_dir(parent)?;
        Ok(value)
    });
    if result.is_err() {
        let _ = std::fs::remove_file(&aside);
    }
    result
}

/// Writes `path` in place through `fill` and syncs it to the disk.
pub fn write_synced<T>(
    disk: &dyn Disk,
    path: &Path,
    fill: impl FnOnce(&mut BufWriter<File>) -> io::Result<T>,
) -> io::Result<T> {
    let mut out = BufWriter::with_capacity(1 << 20, disk.create(path)?);
    let value = fill(&mut out)?;
    let file = out.into_inner().map_err(io::IntoInnerError::into_error)?;
    file.sync_all()?;
    Ok(value)
}

/// Makes renames inside `dir` durable.
pub fn sync_dir(dir: &Path) -> io::Result<()> {
    File::open(dir)?.sync_all()
}

/// A name beside `path` that no other process uses: `.NAME.tmp-PID`.
pub fn aside(path: &Path) -> PathBuf {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    path.with_file_name(format!(".{name}.tmp-{}", std::process::id()))
}

/// A writer that remembers how much went through it, and its blake3.
pub struct Hashing<W> {
    inner: W,
    hasher: blake3::Hasher,
    bytes: u64,
}

impl<W: Write> Hashing<W> {
    /// Wraps a writer.
    pub fn new(inner: W) -> Self {
        Hashing { inner, hasher: blake3::Hasher::new(), bytes: 0 }
    }

    /// Bytes written and their blake3 (hex).
    pub fn finish(self) -> (u64, String) {
        (self.bytes, self.hasher.finalize().to_hex().to_string())
    }
}

impl<W: Write> Write for Hashing<W> {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        let n = self.inner.write(data)?;
        self.hasher.update(&data[..n]);
        self.bytes += n as u64;
        Ok(n)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.inner.flush()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failed_write_leaves_the_old_file_and_nothing_else() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.txt");
        write_file(&RealDisk, &path, |w| w.write_all(b"one")).unwrap();
        let error = write_file(&RealDisk, &path, |w| {
            w.write_all(b"half of tw")?;
            Err::<(), _>(io::Error::from(io::ErrorKind::StorageFull))
        });
        assert_eq!(error.unwrap_err().kind(), io::ErrorKind::StorageFull);
        assert_eq!(std::fs::read(&path).unwrap(), b"one");
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
    }
}
