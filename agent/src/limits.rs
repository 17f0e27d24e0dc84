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
    /// Largest share of this node's pods that may be hurt at once, 0 to 1.
    pub most_pods: f64,
    /// Namespaces of Kubernetes whose pods are protected.
    pub protect_namespaces: Vec<String>,
    /// Where the kubelet keeps the logs of pods, by which the namespaces are known.
    pub pod_logs: PathBuf,
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
            most_pods: 1.0,
            protect_namespaces: vec![KUBE_SYSTEM.to_owned()],
            pod_logs: POD_LOGS.into(),
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
            "choose a target that it is no part of: a service in a cgroup of its own, and on a network of its own",
        ))
    }

    /// Refuses a fault on `target` where one of the pods that it would hurt is of a protected namespace.
    pub fn check_namespaces<'a>(
        &self,
        target: &str,
        mut hurt: impl Iterator<Item = (&'a str, Option<&'a str>)>,
    ) -> Result<(), Invalid> {
        let is_protected = |namespace: &&str| self.protect_namespaces.iter().any(|name| name == namespace);
        match hurt.find_map(|(uid, namespace)| Some((uid, namespace.filter(is_protected)?))) {
            None => Ok(()),
            Some((uid, namespace)) => Err(Invalid::new(
                "target",
                target,
                format!("it would hurt pod {uid} of the namespace {namespace}, which is protected"),
                "choose a target in another namespace",
            )),
        }
    }

    /// Refuses a fault on `target` with which so many of so many pods would be hurt at once.
    pub fn check_pods(&self, target: &str, hurt: usize, pods: usize) -> Result<(), Invalid> {
        // As shares are written, so that 50% of 4 pods are 2 and no rounding makes them 1.
        let most = (pods as f64 * self.most_pods + 1e-9).floor() as usize;
        if hurt <= most {
            return Ok(());
        }
        let share = self.most_pods * 100.0;
        Err(Invalid::new(
            "target",
            target,
            format!(
                "{hurt} of this node's {pods} pods would be hurt at once, and --most-pods {share}% allows {most}"
            ),
            "take fewer (`replicas` in a plan), revert others first, or start the agent with a larger share",
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

/// The namespace of what runs a cluster.
pub const KUBE_SYSTEM: &str = "kube-system";

/// Where the kubelet keeps the logs of pods unless it is told otherwise.
pub const POD_LOGS: &str = "/var/log/pods";

/// A share as it is written, `50%`, as a number above 0 and up to 1.
pub fn share(text: &str) -> Result<f64, String> {
    let percent = text.strip_suffix('%').and_then(|number| number.parse::<f64>().ok());
    let share = percent.filter(|percent| *percent > 0.0 && *percent <= 100.0);
    share
        .map(|percent| percent / 100.0)
        .ok_or_else(|| "write a share of more than 0% and at most 100%, such as 50%".to_owned())
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
    #[case::half(0.5, 2, 4, true)]
    #[case::more_than_half(0.5, 3, 4, false)]
    #[case::the_only_one(0.5, 1, 1, false)]
    #[case::half_of_three(0.5, 1, 3, true)]
    #[case::a_third(1.0 / 3.0, 1, 3, true)]
    #[case::no_pod(0.01, 0, 0, true)]
    #[case::all(1.0, 7, 7, true)]
    fn no_more_pods_than_agreed(
        #[case] most_pods: f64,
        #[case] hurt: usize,
        #[case] pods: usize,
        #[case] good: bool,
    ) {
        let limits = Limits { most_pods, ..Limits::default() };
        assert_eq!(limits.check_pods("web", hurt, pods).is_ok(), good);
    }

    #[test]
    fn too_many_pods_are_told_with_what_to_do() {
        let limits = Limits { most_pods: 0.5, ..Limits::default() };
        let said = limits.check_pods("web pid 7", 3, 4).unwrap_err().to_string();
        assert_eq!(
            said,
            "target: web pid 7: 3 of this node's 4 pods would be hurt at once, and --most-pods 50% allows 2; take fewer \
             (`replicas` in a plan), revert others first, or start the agent with a larger share",
        );
    }

    #[rstest]
    #[case::by_default(&[("a", Some("kube-system"))], true)]
    #[case::asked_for(&[("a", Some("shop")), ("b", Some("db"))], true)]
    #[case::another(&[("a", Some("shop"))], false)]
    #[case::not_known(&[("a", None)], false)]
    #[case::no_pod(&[], false)]
    fn a_namespace_is_protected(#[case] hurt: &[(&str, Option<&str>)], #[case] protected: bool) {
        let mut limits = Limits::default();
        limits.protect_namespaces.push("db".to_owned());
        let refused = limits.check_namespaces("web", hurt.iter().copied()).err();
        assert_eq!(refused.is_some(), protected, "{refused:?}");
    }

    #[rstest]
    #[case("50%", Some(0.5))]
    #[case("100%", Some(1.0))]
    #[case("0%", None)]
    #[case("101%", None)]
    #[case("NaN%", None)]
    #[case("0.5", None)]
    fn shares(#[case] text: &str, #[case] expected: Option<f64>) {
        assert_eq!(share(text).ok(), expected);
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
