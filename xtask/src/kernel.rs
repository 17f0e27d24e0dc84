//! Kernels: Debian's packages, fetched once, and the modules in them.

use std::{
    cmp::Ordering,
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result, bail};
use squall_lab::{output, stdout};

use crate::{setup, target_dir, tools};

/// Where a series is, if not in a suite that apt here knows.
const SUITES: [(&str, &str); 4] =
    [("5.10", "bullseye"), ("6.1", "bookworm"), ("6.12", "trixie"), ("7.2", "sid")];
/// The keys of Debian's archives, from the package debian-archive-keyring.
const KEYRING: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";

/// A kernel that can be booted.
#[derive(Debug)]
pub(crate) struct Kernel {
    /// The kernel image.
    pub(crate) image: PathBuf,
    /// Its modules: `/lib/modules/RELEASE`.
    modules: PathBuf,
}

impl Kernel {
    /// The newest kernel of a series (`6.1`) among Debian's packages; from the cache, where it has been fetched.
    pub(crate) fn fetch(series: &str) -> Result<Self> {
        let dir = target_dir().join("vm").join(series);
        let root = dir.join("root");
        if let Ok(kernel) = Self::unpacked(&root) {
            return Ok(kernel);
        }
        fs::create_dir_all(&root)?;
        if packages_in(&dir)?.is_empty() {
            download(series, &dir)?;
        }
        for package in packages_in(&dir)? {
            output(Command::new("dpkg-deb").arg("--extract").arg(&package).arg(&root))?;
        }
        Self::unpacked(&root)
    }

    fn unpacked(root: &Path) -> Result<Self> {
        let find = |dir: PathBuf, prefix: &str| -> Result<PathBuf> {
            let mut entries = fs::read_dir(&dir).with_context(|| format!("no {}", dir.display()))?.flatten();
            let found = entries.find(|entry| entry.file_name().to_string_lossy().starts_with(prefix));
            Ok(found.with_context(|| format!("no {prefix}* in {}", dir.display()))?.path())
        };
        // Packages of merged-/usr releases have their modules there.
        let modules =
            find(root.join("lib/modules"), "").or_else(|_| find(root.join("usr/lib/modules"), ""))?;
        let image = find(root.join("boot"), "vmlinuz-").or_else(|_| find(modules.clone(), "vmlinuz"))?;
        Ok(Self { image, modules })
    }

    /// Release, as in `uname -r`.
    pub(crate) fn release(&self) -> String {
        self.modules.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default()
    }

    /// These modules with all they depend on, each after its dependencies, uncompressed. What is built in, or not there at
    /// all, is left out.
    pub(crate) fn modules(&self, names: &[&str]) -> Result<Vec<(String, Vec<u8>)>> {
        let mut files = Vec::new();
        walk(&self.modules, &mut files)?;
        let mut loaded = Vec::new();
        for name in names {
            add(name, &files, &mut loaded)?;
        }
        Ok(loaded)
    }
}

/// Adds a module after its dependencies.
fn add(name: &str, files: &[PathBuf], modules: &mut Vec<(String, Vec<u8>)>) -> Result<()> {
    if modules.iter().any(|(known, _)| known == name) {
        return Ok(());
    }
    let file = files.iter().find(|file| module_name(file).as_deref() == Some(name));
    let Some(file) = file else { return Ok(()) };
    let module = match file.extension().and_then(|ext| ext.to_str()) {
        Some("xz") => output(Command::new("xz").args(["--decompress", "--stdout"]).arg(file))?.stdout,
        _ => fs::read(file)?,
    };
    for dependency in dependencies(&module) {
        add(&dependency, files, modules)?;
    }
    modules.push((name.to_owned(), module));
    Ok(())
}

fn download(series: &str, dir: &Path) -> Result<()> {
    let by_hand = format!("put the .deb files of a {series} kernel for amd64 into {}", dir.display());
    if tools::find("apt-get").is_none() || tools::find("dpkg-deb").is_none() {
        bail!("kernels come as Debian packages, and there is no apt here; {by_hand}");
    }
    let mut apt = Apt::default();
    let mut names = apt.search(series)?;
    if names.is_empty() {
        setup::refresh_packages()?;
        names = apt.search(series)?;
    }
    if names.is_empty()
        && let Some((_, suite)) = SUITES.iter().find(|(known, _)| *known == series)
    {
        apt = Apt::of(suite)?;
        names = apt.search(series)?;
    }
    // Lists can name a package that its archive has dropped; so the newest few.
    for name in names.iter().take(3) {
        println!("fetching {name}");
        // A kernel may come in two packages.
        let modules = name.strip_prefix("linux-binary-").map(|rest| format!("linux-modules-{rest}"));
        let mut command = apt.command("apt-get");
        command.args(["download", "--quiet", name]).args(modules).current_dir(dir);
        match output(&mut command) {
            Ok(_) => return Ok(()),
            Err(e) => println!("{e:#}"),
        }
    }
    bail!(
        "the package lists of this machine have no kernel {series} for amd64 that can be fetched; {by_hand}"
    )
}

/// apt, as it is set up here, or with another suite of the same mirror and lists of its own.
#[derive(Debug, Default)]
struct Apt {
    options: Vec<String>,
}

impl Apt {
    /// Another suite of the mirror that this host's apt uses for Debian. What the host has configured stays as it is.
    fn of(suite: &str) -> Result<Self> {
        let targets = ["indextargets", "--format", "$(REPO_URI) $(ORIGIN)", "Created-By: Packages"];
        let listed = stdout(Command::new("apt-get").args(targets))?;
        let mirror = listed.lines().find_map(|line| line.strip_suffix(" Debian"));
        let mirror = mirror.context("apt here has no mirror of Debian")?;
        let dir = target_dir().join("vm/apt").join(suite);
        fs::create_dir_all(dir.join("lists/partial"))?;
        let source = dir.join("sources.list");
        fs::write(&source, format!("deb [signed-by={KEYRING}] {mirror} {suite} main\n"))?;
        let option = |name: &str, value: String| ["-o".to_owned(), format!("{name}={value}")];
        let options = [
            option("Dir::Etc::SourceList", source.display().to_string()),
            option("Dir::Etc::SourceParts", "-".to_owned()),
            option("Dir::State::Lists", dir.join("lists").display().to_string()),
            option("Dir::Cache", dir.display().to_string()),
        ];
        let apt = Self { options: options.into_iter().flatten().collect() };
        tools::show(apt.command("apt-get").args(["update", "--quiet"]))?;
        Ok(apt)
    }

    fn command(&self, program: &str) -> Command {
        let mut command = Command::new(program);
        command.args(&self.options);
        command
    }

    /// Names of the kernel packages of a series, newest first.
    fn search(&self, series: &str) -> Result<Vec<String>> {
        let pattern = format!("^linux-(image|binary)-{}[.+-]", series.replace('.', "\\."));
        let found = stdout(self.command("apt-cache").args(["search", "--names-only", &pattern]))?;
        let mut names: Vec<String> = found
            .lines()
            .filter_map(|line| line.split_whitespace().next())
            // 6, 1, 0, 56, 64; a meta package has only 6, 1, 64.
            .filter(|name| name.ends_with("-cloud-amd64") && numbers(name).len() > 3)
            .map(ToOwned::to_owned)
            .collect();
        // Where there is a linux-binary-…, the linux-image-… of that name is empty.
        names.sort_by(|a, b| natural(b, a).then_with(|| a.cmp(b)));
        Ok(names)
    }
}

/// Compares runs of digits as numbers: 6.1.0-9 comes before 6.1.0-10.
fn natural(a: &str, b: &str) -> Ordering {
    numbers(a).cmp(&numbers(b))
}

fn numbers(name: &str) -> Vec<u64> {
    name.split(|c: char| !c.is_ascii_digit()).filter_map(|run| run.parse().ok()).collect()
}

fn packages_in(dir: &Path) -> Result<Vec<PathBuf>> {
    let mut packages = Vec::new();
    for entry in fs::read_dir(dir)? {
        let path = entry?.path();
        if path.extension().is_some_and(|ext| ext == "deb") {
            packages.push(path);
        }
    }
    Ok(packages)
}

fn walk(dir: &Path, files: &mut Vec<PathBuf>) -> Result<()> {
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            walk(&entry.path(), files)?;
        } else {
            files.push(entry.path());
        }
    }
    Ok(())
}

/// `sch_fq` for `…/sch_fq.ko.xz`. The kernel takes - and _ for the same.
fn module_name(file: &Path) -> Option<String> {
    let name = file.file_name()?.to_str()?;
    Some(name.split_once(".ko")?.0.replace('-', "_"))
}

/// The `depends=` of its .modinfo section, which is a list of `key=value`, each ended by a zero byte.
fn dependencies(module: &[u8]) -> Vec<String> {
    const KEY: &[u8] = b"\0depends=";
    let Some(at) = module.windows(KEY.len()).position(|window| window == KEY) else { return Vec::new() };
    let value = module[at + KEY.len()..].split(|byte| *byte == 0).next().unwrap_or_default();
    let names = String::from_utf8_lossy(value);
    names.split(',').filter(|name| !name.is_empty()).map(|name| name.replace('-', "_")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn newer_kernels_come_later() {
        let mut names = ["linux-image-6.1.0-10-cloud-amd64", "linux-image-6.1.0-9-cloud-amd64"];
        names.sort_by(|a, b| natural(a, b));
        assert_eq!(names[0], "linux-image-6.1.0-9-cloud-amd64");
    }

    #[test]
    fn dependencies_are_read_from_the_module() {
        let module = b"\x7fELF..license=GPL\0depends=nf-tables,libcrc32c\0name=x\0";
        assert_eq!(dependencies(module), ["nf_tables", "libcrc32c"]);
        assert!(dependencies(b"license=GPL\0depends=\0name=x\0").is_empty());
        assert!(dependencies(b"").is_empty());
    }

    #[test]
    fn a_module_is_known_by_its_file() {
        assert_eq!(module_name(Path::new("/lib/modules/x/act-mirred.ko.xz")).as_deref(), Some("act_mirred"));
        assert_eq!(module_name(Path::new("/lib/modules/x/modules.dep")), None);
    }
}
