//! What this agent lets anyone do. Pure.

use std::{
    fmt,
    path::{Path, PathBuf},
    str::FromStr,
    time::Duration,
};

use thiserror::Error;

/// A request that is wrong or not allowed. Nothing was changed.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error("{field}: {value}: {problem}; {fix}")]
pub struct Invalid {
    /// The field, as in the protocol: `network.loss.ratio`.
    pub field: String,
    /// What was given.
    pub value: String,
    /// What is wrong with it.
    pub problem: String,
    /// What to write instead.
    pub fix: String,
}

impl Invalid {
    /// An error that names the field, the value, the problem and the fix.
    pub fn new(
        field: impl Into<String>,
        value: impl ToString,
        problem: impl Into<String>,
        fix: impl Into<String>,
    ) -> Self {
        Self { field: field.into(), value: value.to_string(), problem: problem.into(), fix: fix.into() }
    }
}

/// The limits of this agent, from its command line.
#[derive(Debug, Clone)]
pub struct Limits {
    /// Longest time from Fire to the deadline.
    pub longest: Duration,
    /// Longest lease.
    pub longest_lease: Duration,
    /// Most live injections at once.
    pub most_injections: usize,
    /// Whether a network fault may take every packet of an interface in the agent's own network namespace, which
    /// on a node is everybody's: SSH, the kubelet, this agent.
    pub whole_node_network: bool,
    /// Largest share of a cgroup's memory limit (or of the node's memory) that a memory fault may hold, 0 to 1.
    pub most_memory: f64,
    /// What is protected beside what always is.
    pub protect: Vec<Pattern>,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            longest: Duration::from_secs(3600),
            longest_lease: Duration::from_secs(300),
            most_injections: 32,
            whole_node_network: false,
            most_memory: 0.98,
            protect: Vec::new(),
        }
    }
}

impl Limits {
    /// Refuses a duration or a lease that is zero or longer than allowed.
    pub fn check_times(&self, duration: Duration, lease: Duration) -> Result<(), Invalid> {
        let within = |field: &str, value: Duration, most: Duration| {
            if value.is_zero() {
                return Err(Invalid::new(
                    field,
                    "0s",
                    "there is no \"forever\"",
                    "say how long, for example 30s",
                ));
            }
            if value > most {
                let fix = format!("ask for at most {most:?}, or start the agent with a larger limit");
                return Err(Invalid::new(field, format!("{value:?}"), "longer than this agent allows", fix));
            }
            Ok(())
        };
        within("duration_ns", duration, self.longest)?;
        within("lease_ns", lease, self.longest_lease)
    }

    /// Refuses a fault on `target` where one of those that it would hurt is protected.
    pub fn check_protected(&self, target: &str, hurt: &[Bystander]) -> Result<(), Invalid> {
        let Some((one, why)) = hurt.iter().find_map(|one| Some((one, self.protects(one)?))) else {
            return Ok(());
        };
        let exe = one.exe.file_name().unwrap_or(one.exe.as_os_str()).to_string_lossy();
        Err(Invalid::new(
            "target",
            target,
            format!("it would hurt {exe} (pid {}), which is protected: {why}", one.pid),
            "choose a target that it is no part of: a service in a cgroup of its own",
        ))
    }

    /// Why one is protected, if it is.
    fn protects(&self, one: &Bystander) -> Option<String> {
        if one.pid == 1 {
            return Some("pid 1 is what everything on the node hangs on".to_owned());
        }
        if one.ours {
            return Some("it is this agent, or what started it".to_owned());
        }
        let of_the_node = PROTECTED.iter().map(|name| Pattern::Name((*name).to_owned()));
        let of_the_node = of_the_node.filter(|_| one.of_the_node).find(|pattern| pattern.matches(one));
        if of_the_node.is_some() {
            return Some("the node is run, or reached, through it".to_owned());
        }
        let asked = self.protect.iter().find(|pattern| pattern.matches(one))?;
        Some(format!("the agent was started with --protect {asked}"))
    }
}

/// What a node is run and reached through, by the names of the executables.
const PROTECTED: [&str; 10] = [
    "systemd*",
    "dbus-*",
    "sshd*",
    "kubelet",
    "containerd*",
    "dockerd",
    "crio",
    "k3s*",
    "kube-proxy",
    "squall-agent",
];

/// A process that a fault would hurt.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Bystander {
    /// Its pid.
    pub pid: i32,
    /// Its executable.
    pub exe: PathBuf,
    /// Its cgroups, as in /proc/PID/cgroup.
    pub cgroups: Vec<PathBuf>,
    /// Whether it is the agent or one of its ancestors.
    pub ours: bool,
    /// Whether it is in the agent's pid namespace, and so none of a container's.
    pub of_the_node: bool,
}

/// What else is protected.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Pattern {
    /// The name of an executable; with a `*` at its end all that begin so.
    Name(String),
    /// The absolute path of an executable, or of a cgroup and all below it.
    Path(PathBuf),
}

impl Pattern {
    fn matches(&self, one: &Bystander) -> bool {
        match self {
            Self::Name(name) => one.exe.file_name().is_some_and(|file| {
                let file = file.to_string_lossy();
                name.strip_suffix('*').map_or(file == name.as_str(), |start| file.starts_with(start))
            }),
            Self::Path(path) => one.exe == *path || one.cgroups.iter().any(|cgroup| cgroup.starts_with(path)),
        }
    }
}

impl FromStr for Pattern {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text.starts_with('/') {
            return Ok(Self::Path(Path::new(text).components().collect()));
        }
        let name = text.strip_suffix('*').unwrap_or(text);
        if name.is_empty() || name.contains(['/', '*']) {
            return Err(
                "write the name of an executable (etcd, or kube-*), or an absolute path of an executable \
                        or a cgroup (/kubepods.slice/…)"
                    .to_owned(),
            );
        }
        Ok(Self::Name(text.to_owned()))
    }
}

impl fmt::Display for Pattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Name(name) => f.write_str(name),
            Self::Path(path) => write!(f, "{}", path.display()),
        }
    }
}

#[cfg(test)]
mod tests {
    use rstest::rstest;

    use super::*;

    fn one(exe: &str, cgroup: &str) -> Bystander {
        Bystander {
            pid: 7,
            exe: exe.into(),
            cgroups: vec!["/".into(), cgroup.into()],
            ours: false,
            of_the_node: true,
        }
    }

    #[rstest]
    #[case::daemon(one("/usr/bin/kubelet", "/"), true)]
    #[case::family(one("/usr/lib/systemd/systemd-journald", "/"), true)]
    #[case::name_asked_for(one("/usr/bin/etcd", "/"), true)]
    #[case::path_asked_for(one("/opt/db", "/"), true)]
    #[case::cgroup_asked_for(one("/usr/bin/java", "/kube-system/pod-1/x"), true)]
    #[case::no_part_of_it(one("/usr/bin/java", "/kube-system-2/pod-1"), false)]
    #[case::another(one("/usr/bin/redis-server", "/"), false)]
    #[case::init(Bystander { pid: 1, ..one("/sbin/init", "/") }, true)]
    #[case::ourselves(Bystander { ours: true, ..one("/bin/bash", "/") }, true)]
    #[case::ssh_of_a_container(Bystander { of_the_node: false, ..one("/usr/sbin/sshd", "/") }, false)]
    fn what_a_node_is_run_through_is_never_hurt(#[case] hurt: Bystander, #[case] protected: bool) {
        let protect = ["etcd", "/opt/db", "/kube-system/"].map(|text| text.parse().unwrap()).into();
        let limits = Limits { protect, ..Limits::default() };
        let others = [one("/usr/bin/nginx", "/"), hurt];
        let refused = limits.check_protected("cgroup /x", &others).err().map(|e| e.to_string());
        assert_eq!(refused.is_some(), protected, "{refused:?}");
        let exe = others[1].exe.file_name().unwrap().to_string_lossy().into_owned();
        assert!(refused.is_none_or(|why| {
            why.starts_with("target: cgroup /x: ") && why.contains(&exe) && why.contains("of its own")
        }));
    }

    #[rstest]
    #[case("", false)]
    #[case("*", false)]
    #[case("a/b", false)]
    #[case("a*b", false)]
    #[case("kube-*", true)]
    #[case("/kubepods.slice", true)]
    fn patterns(#[case] text: &str, #[case] good: bool) {
        assert_eq!(text.parse::<Pattern>().is_ok(), good);
    }
}
