//! An initramfs: a cpio archive in the "newc" form (kernel: Documentation/driver-api/early-userspace/buffer-format.rst).

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result, bail};
use squall_lab::{output, stdout};

use crate::tools;

/// The files of an initramfs, by absolute path.
#[derive(Debug, Default)]
pub(crate) struct Initramfs {
    files: BTreeMap<PathBuf, Entry>,
}

#[derive(Debug)]
enum Entry {
    Directory,
    File(Vec<u8>),
}

impl Initramfs {
    /// Adds a file that anyone may run.
    pub(crate) fn file(&mut self, path: impl Into<PathBuf>, content: Vec<u8>) {
        let path = path.into();
        for dir in path.ancestors().skip(1).filter(|dir| *dir != Path::new("/")) {
            self.files.entry(dir.to_owned()).or_insert(Entry::Directory);
        }
        self.files.insert(path, Entry::File(content));
    }

    /// Adds a program of this host by its name, below /bin, with the libraries it needs.
    pub(crate) fn tool(&mut self, name: &str) -> Result<()> {
        let program = tools::find(name).with_context(|| format!("no program {name} on this host"))?;
        self.program(Path::new("/bin").join(name), &fs::canonicalize(program)?)
    }

    /// Adds a program with the libraries it needs, without its debugging information.
    pub(crate) fn program(&mut self, path: impl Into<PathBuf>, program: &Path) -> Result<()> {
        for library in libraries(program)? {
            if !self.files.contains_key(&library) {
                let content =
                    fs::read(&library).with_context(|| format!("cannot read {}", library.display()))?;
                self.file(library, content);
            }
        }
        let stripped = tempfile::NamedTempFile::new()?;
        output(Command::new("strip").arg("--strip-debug").arg("-o").arg(stripped.path()).arg(program))?;
        self.file(path, fs::read(stripped.path())?);
        Ok(())
    }

    /// The archive.
    pub(crate) fn archive(&self) -> Vec<u8> {
        let mut archive = Vec::new();
        for (inode, (path, entry)) in (1..).zip(&self.files) {
            let name = path.to_string_lossy();
            let name = name.trim_start_matches('/');
            match entry {
                Entry::Directory => append(&mut archive, inode, name, 0o040_755, &[]),
                Entry::File(content) => append(&mut archive, inode, name, 0o100_755, content),
            }
        }
        append(&mut archive, 0, "TRAILER!!!", 0, &[]);
        archive
    }
}

/// Appends one member: a header of hexadecimal fields, the name, the content, each padded to four bytes.
fn append(archive: &mut Vec<u8>, inode: u32, name: &str, mode: u32, content: &[u8]) {
    archive.extend_from_slice(b"070701");
    let size = content.len() as u32;
    let name_size = name.len() as u32 + 1;
    // inode, mode, uid, gid, links, mtime, size, device (2), special device (2), size of the name, checksum
    for field in [inode, mode, 0, 0, 1, 0, size, 0, 0, 0, 0, name_size, 0] {
        archive.extend_from_slice(format!("{field:08X}").as_bytes());
    }
    archive.extend_from_slice(name.as_bytes());
    archive.push(0);
    pad(archive);
    archive.extend_from_slice(content);
    pad(archive);
}

fn pad(archive: &mut Vec<u8>) {
    archive.resize(archive.len().next_multiple_of(4), 0);
}

/// The shared libraries that a program needs, and its loader, by the paths at which it looks for them.
fn libraries(program: &Path) -> Result<BTreeSet<PathBuf>> {
    // ldd fails for what is statically linked, and says so.
    let Ok(listed) = stdout(Command::new("ldd").arg(program)) else { return Ok(BTreeSet::new()) };
    let mut found = BTreeSet::new();
    for line in listed.lines() {
        if line.contains("not found") {
            bail!("{} needs a library that is not here: {}", program.display(), line.trim());
        }
        found.extend(line.split_whitespace().find(|word| word.starts_with('/')).map(PathBuf::from));
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_archive_lists_what_was_put_in() -> Result<()> {
        if tools::find("cpio").is_none() {
            // The format is checked by booting it, in `cargo xtask vm`; this is only the quicker way to find out.
            return Ok(());
        }
        let mut initramfs = Initramfs::default();
        initramfs.file("/init", b"abc".to_vec());
        initramfs.file("/lib/x/y.so", vec![7; 1001]);
        let dir = tempfile::tempdir()?;
        let archive = dir.path().join("archive");
        fs::write(&archive, initramfs.archive())?;
        let listed = stdout(Command::new("cpio").arg("-itF").arg(&archive))?;
        assert_eq!(listed.lines().collect::<Vec<_>>(), ["init", "lib", "lib/x", "lib/x/y.so"]);
        Ok(())
    }
}
