//! Compiles the eBPF programs from source and leaves the object where `host/bpf.rs` embeds it.

use std::{
    env,
    ffi::OsString,
    fs, io,
    os::unix::fs::symlink,
    path::{Path, PathBuf},
    process::{Command, exit},
};

const TARGET: &str = "bpfel-unknown-none";
/// bpf-linker 0.10 reads the bitcode of this LLVM and older.
const NEWEST_LLVM: u32 = 22;

fn main() {
    if let Err(problem) = build() {
        eprintln!("{problem}\n\n`cargo xtask setup` installs what the eBPF programs need.");
        exit(1);
    }
}

fn build() -> Result<(), String> {
    let root = PathBuf::from(var("CARGO_MANIFEST_DIR")?)
        .parent()
        .ok_or("the agent's crate is not in the workspace")?
        .to_owned();
    let out = PathBuf::from(var("OUT_DIR")?);
    for path in ["agent-ebpf", "Cargo.lock"] {
        println!("cargo:rerun-if-changed={}", root.join(path).display());
    }
    for name in ["SQUALL_EBPF_RUSTC", "PATH"] {
        println!("cargo:rerun-if-env-changed={name}");
    }

    let rustc = find_rustc()?;
    let linker = find_linker()?;
    let llvm = only_llvm(&rustc, &out)?;
    // What is built there is the same for every build of the agent, so all of them share it. A directory of its own: the outer
    // cargo holds the lock of the usual one, the root of which it marks.
    let root_of_target = out.ancestors().find(|dir| dir.join("CACHEDIR.TAG").is_file());
    let target_dir = root_of_target.unwrap_or(&out).join("ebpf");
    let mut cargo = Command::new(var("CARGO")?);
    cargo
        .current_dir(&root)
        .args(["build", "--release", "--package", "squall-agent-ebpf", "--bins", "--target", TARGET])
        .args(["-Z", "build-std=core", "--quiet", "--locked"])
        .arg("--target-dir")
        .arg(&target_dir);
    // What the outer cargo, rustup, clippy or a user's shell chose is for the host, not for eBPF.
    for (name, _) in env::vars_os() {
        if is_for_the_host(&name.to_string_lossy()) {
            cargo.env_remove(name);
        }
    }
    cargo
        .env("RUSTC", &rustc)
        .env("RUSTC_BOOTSTRAP", "1")
        .env("CARGO_ENCODED_RUSTFLAGS", "-Cdebuginfo=2\u{1f}-Clink-arg=--btf")
        .env("CARGO_TARGET_BPFEL_UNKNOWN_NONE_LINKER", &linker)
        .env("LD_LIBRARY_PATH", &llvm);
    let status = cargo.status().map_err(|e| format!("cannot run {cargo:?}: {e}"))?;
    if !status.success() {
        return Err(format!("compiling the eBPF programs with {} failed: {status}", rustc.display()));
    }
    let object = target_dir.join(TARGET).join("release").join("squall-tc");
    let copy = out.join("squall-tc");
    fs::copy(&object, &copy)
        .map_err(|e| format!("copying {} to {}: {e}", object.display(), copy.display()))?;
    Ok(())
}

/// Whether a variable of the environment is about the outer build.
fn is_for_the_host(name: &str) -> bool {
    let kept =
        ["CARGO_HOME", "CARGO_HTTP_", "CARGO_HTTPS_", "CARGO_NET_", "CARGO_REGISTRIES_", "CARGO_REGISTRY_"];
    let ours =
        ["CARGO", "RUSTC", "RUSTFLAGS", "RUSTUP_TOOLCHAIN", "RUST_RECURSION_COUNT", "CLIPPY_", "__CARGO"];
    let build = [
        "TARGET",
        "HOST",
        "OPT_LEVEL",
        "PROFILE",
        "DEBUG",
        "NUM_JOBS",
        "OUT_DIR",
        "RUSTDOC",
        "LD_LIBRARY_PATH",
    ];
    !kept.iter().any(|prefix| name.starts_with(prefix))
        && (ours.iter().any(|prefix| name.starts_with(prefix)) || build.contains(&name))
}

/// A compiler with the source of its own `core`: what the user says, else rustup's nightly, else the system's.
fn find_rustc() -> Result<PathBuf, String> {
    if let Some(chosen) = env::var_os("SQUALL_EBPF_RUSTC") {
        let rustc = PathBuf::from(chosen);
        return check_rustc(&rustc)
            .map(|()| rustc.clone())
            .map_err(|e| format!("SQUALL_EBPF_RUSTC={}: {e}", rustc.display()));
    }
    let mut tried = Vec::new();
    let nightly = output(Command::new("rustup").args(["which", "--toolchain", "nightly", "rustc"]))
        .map_err(|e| tried.push(format!("rustup's nightly: {e}")));
    for rustc in nightly.ok().map(PathBuf::from).into_iter().chain([PathBuf::from("/usr/bin/rustc")]) {
        match check_rustc(&rustc) {
            Ok(()) => return Ok(rustc),
            Err(e) => tried.push(format!("{}: {e}", rustc.display())),
        }
    }
    Err(format!("no Rust compiler for eBPF:\n  {}", tried.join("\n  ")))
}

/// Whether a compiler can build `core` for eBPF, and in a form that bpf-linker reads.
fn check_rustc(rustc: &Path) -> Result<(), String> {
    let sysroot = output(Command::new(rustc).args(["--print", "sysroot"]))?;
    let source = Path::new(&sysroot).join("lib/rustlib/src/rust/library/core/Cargo.toml");
    if !source.exists() {
        return Err(format!("it has no source of the standard library ({} is missing)", source.display()));
    }
    let version = output(Command::new(rustc).arg("-vV"))?;
    let llvm = version
        .lines()
        .find_map(|line| line.strip_prefix("LLVM version: ")?.split('.').next()?.parse::<u32>().ok())
        .ok_or("it does not say which LLVM it uses")?;
    if llvm > NEWEST_LLVM {
        return Err(format!("its LLVM {llvm} is newer than bpf-linker's {NEWEST_LLVM}"));
    }
    Ok(())
}

/// bpf-linker, from PATH or from cargo's own directory, which need not be in PATH.
fn find_linker() -> Result<PathBuf, String> {
    let home = env::var_os("CARGO_HOME")
        .map(PathBuf::from)
        .or_else(|| Some(PathBuf::from(env::var_os("HOME")?).join(".cargo")));
    let path = env::var_os("PATH").unwrap_or_default();
    env::split_paths(&path)
        .chain(home.map(|home| home.join("bin")))
        .map(|dir| dir.join("bpf-linker"))
        .find(|file| file.is_file())
        .ok_or_else(|| "bpf-linker is neither in PATH nor in cargo's bin directory".to_owned())
}

/// A directory with nothing in it but the LLVM of this compiler. bpf-linker loads the first `libLLVM*` that it finds in
/// `LD_LIBRARY_PATH` or beside a directory of PATH, which may well be another version.
fn only_llvm(rustc: &Path, out: &Path) -> Result<PathBuf, String> {
    let libraries = output(Command::new("ldd").arg(rustc))?;
    let llvm = libraries
        .lines()
        .filter(|line| line.trim_start().starts_with("libLLVM"))
        .find_map(|line| line.split_whitespace().find(|word| word.starts_with('/')))
        .ok_or_else(|| format!("{} does not use a shared LLVM, which bpf-linker needs", rustc.display()))?;
    let dir = out.join("llvm");
    let link = dir.join("libLLVM.so");
    let made = fs::create_dir_all(&dir).and_then(|()| match fs::remove_file(&link) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(e),
        _ => symlink(llvm, &link),
    });
    made.map_err(|e| format!("linking {} to {llvm}: {e}", link.display()))?;
    Ok(dir)
}

fn var(name: &str) -> Result<OsString, String> {
    env::var_os(name).ok_or_else(|| format!("{name} is not set: run this through cargo"))
}

fn output(command: &mut Command) -> Result<String, String> {
    let name = format!("{command:?}");
    let output = command.output().map_err(|e| match e.kind() {
        io::ErrorKind::NotFound => "not found".to_owned(),
        _ => format!("cannot run {name}: {e}"),
    })?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        return Err(said.lines().next().unwrap_or("it failed without a word").to_owned());
    }
    Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
}
