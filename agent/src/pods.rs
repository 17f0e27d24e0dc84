//! Pods of Kubernetes on this node, known by the cgroups of their processes, and their namespaces, known by their logs.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::{Component, Path},
};

use crate::{
    host::proc,
    limits::Bystander,
    target::{Scope, Target},
};

/// The pods of which a process lives.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Pods {
    members: Vec<Member>,
    /// Namespaces by the UID of a pod.
    namespaces: BTreeMap<String, String>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct Member {
    pid: i32,
    uid: String,
}

impl Pods {
    /// Reads all of /proc, which takes milliseconds, and the names in the directory where the kubelet keeps the logs of pods:
    /// `NAMESPACE_POD_UID`. Where there is no such directory the namespaces are not known.
    pub fn read(logs: &Path) -> Self {
        let member = |pid| {
            let uid = of_process(pid)?;
            proc::stat(pid)?;
            Some(Member { pid, uid })
        };
        let members = proc::pids().unwrap_or_default().into_iter().filter_map(member).collect();
        let entries = fs::read_dir(logs).into_iter().flatten().flatten();
        let namespaces = entries.filter_map(|entry| namespace_in(entry.file_name().to_str()?)).collect();
        Self { members, namespaces }
    }

    /// How many there are.
    pub fn count(&self) -> usize {
        self.all().len()
    }

    /// Their UIDs.
    pub fn all(&self) -> BTreeSet<String> {
        self.members.iter().map(|member| member.uid.clone()).collect()
    }

    /// Those of whoever suffers. Who else uses the node's own network is not told: see [`Self::beyond`].
    pub fn hurt(&self, hurt: &[Bystander]) -> BTreeSet<String> {
        let is_hurt = |member: &&Member| hurt.iter().any(|one| one.pid == member.pid);
        self.members.iter().filter(is_hurt).map(|member| member.uid.clone()).collect()
    }

    /// As [`Self::hurt`]; but where a fault is about the packets of everybody on the node's own network, all of them.
    pub fn beyond(&self, target: &Target, scope: Scope, hurt: BTreeSet<String>) -> BTreeSet<String> {
        if target.is_everybody(scope) { self.all() } else { hurt }
    }

    /// The namespace of a pod, where it is known.
    pub fn namespace(&self, uid: &str) -> Option<&str> {
        self.namespaces.get(uid).map(String::as_str)
    }
}

/// The UID of the pod that a process is of.
pub fn of_process(pid: i32) -> Option<String> {
    let text = fs::read_to_string(format!("/proc/{pid}/cgroup")).ok()?;
    text.lines().find_map(|line| of_cgroup(Path::new(line.splitn(3, ':').nth(2)?)))
}

/// The UID of the pod that a cgroup is of, from its path: `…/kubepods/burstable/podUID/…`, as the kubelet names them by itself, or
/// `…/kubepods-burstable-podUID.slice/…`, with `_` for `-`, as it names them for systemd.
///
/// Seen from a cgroup namespace, what is above both is not in the path, which begins with `/..` then.
pub fn of_cgroup(path: &Path) -> Option<String> {
    let mut below = false;
    for part in path.components() {
        match part {
            Component::ParentDir => below = true,
            Component::Normal(name) => {
                let name = name.to_str()?;
                let slice = name.strip_suffix(".slice").filter(|name| name.starts_with("kubepods"));
                let uid = match slice {
                    Some(slice) => slice.rsplit_once("-pod").map(|(_, uid)| uid.replace('_', "-")),
                    None => name.strip_prefix("pod").filter(|_| below).map(str::to_owned),
                };
                if let Some(uid) = uid.filter(|uid| is_uid(uid)) {
                    return Some(uid);
                }
                below |= name == "kubepods" || slice.is_some();
            }
            _ => {}
        }
    }
    None
}

/// A UUID; of a static pod a hash of its manifest, without dashes.
fn is_uid(text: &str) -> bool {
    matches!(text.len(), 32 | 36) && text.chars().all(|c| c.is_ascii_hexdigit() || c == '-')
}

/// UID and namespace, from the name of a directory of logs.
fn namespace_in(name: &str) -> Option<(String, String)> {
    let (namespace, rest) = name.split_once('_')?;
    let (_, uid) = rest.rsplit_once('_')?;
    is_uid(uid).then(|| (uid.to_owned(), namespace.to_owned()))
}

#[cfg(test)]
mod tests {
    use rstest::rstest;

    use super::*;
    use crate::target::Netns;

    const UID: &str = "0b5ec1f2-6d1a-4c57-9d0e-5f6f3c2a1b00";

    #[rstest]
    #[case::cgroupfs("/kubepods/burstable/pod0b5ec1f2-6d1a-4c57-9d0e-5f6f3c2a1b00/4f1c", Some(UID))]
    #[case::guaranteed("/kubepods/pod0b5ec1f2-6d1a-4c57-9d0e-5f6f3c2a1b00", Some(UID))]
    #[case::systemd(
        "/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod0b5ec1f2_6d1a_4c57_9d0e_5f6f3c2a1b00.slice/cri-containerd-4f1c.scope",
        Some(UID)
    )]
    #[case::guaranteed_by_systemd(
        "/kubepods.slice/kubepods-pod0b5ec1f2_6d1a_4c57_9d0e_5f6f3c2a1b00.slice",
        Some(UID)
    )]
    #[case::mounted("/sys/fs/cgroup/memory/kubepods/pod0b5ec1f2-6d1a-4c57-9d0e-5f6f3c2a1b00/4f1c", Some(UID))]
    #[case::in_a_node_that_is_a_container(
        "/docker/ab/kubelet/kubepods/pod0b5ec1f2-6d1a-4c57-9d0e-5f6f3c2a1b00/4f1c",
        Some(UID)
    )]
    #[case::beside_us("/../../pod0b5ec1f2-6d1a-4c57-9d0e-5f6f3c2a1b00/4f1c", Some(UID))]
    #[case::beside_us_by_systemd(
        "/../../kubepods-besteffort-pod0b5ec1f2_6d1a_4c57_9d0e_5f6f3c2a1b00.slice/x.scope",
        Some(UID)
    )]
    #[case::a_static_pod(
        "/kubepods/burstable/poda1b2c3d4a1b2c3d4a1b2c3d4a1b2c3d4/4f1c",
        Some("a1b2c3d4a1b2c3d4a1b2c3d4a1b2c3d4")
    )]
    #[case::no_pods("/system.slice/podman.service", None)]
    #[case::elsewhere("/user/pod0b5ec1f2-6d1a-4c57-9d0e-5f6f3c2a1b00", None)]
    #[case::all_pods("/kubepods.slice/kubepods-burstable.slice", None)]
    #[case::no_uid("/kubepods/podium", None)]
    fn a_pod_is_known_by_its_cgroup(#[case] path: &str, #[case] uid: Option<&str>) {
        assert_eq!(of_cgroup(Path::new(path)).as_deref(), uid);
    }

    #[test]
    fn a_namespace_is_known_by_the_logs() {
        let dir = tempfile::tempdir().unwrap();
        for name in
            ["kube-system_coredns-7f_0b5ec1f2-6d1a-4c57-9d0e-5f6f3c2a1b00", "shop_web_nonsense", "shop"]
        {
            fs::create_dir(dir.path().join(name)).unwrap();
        }
        let pods = Pods::read(dir.path());
        assert_eq!(pods.namespace(UID), Some("kube-system"));
        assert_eq!(pods.namespaces.len(), 1);
        assert!(Pods::read(&dir.path().join("none")).namespaces.is_empty());
    }

    #[test]
    fn pods_are_hurt_with_their_processes_and_all_of_them_by_a_fault_on_everybody() {
        let member = |pid, uid: &str| Member { pid, uid: uid.to_owned() };
        let members = vec![member(1, "a"), member(2, "a"), member(3, "b"), member(4, "c")];
        let pods = Pods { members, namespaces: BTreeMap::new() };
        let on = |own| Target {
            name: "t".to_owned(),
            process: None,
            cgroup: None,
            netns: Some(Netns { path: "/run/netns/x".into(), inode: 1, own }),
            interface: Some("eth0".to_owned()),
        };
        let hurt = |target: &Target, scope, pids: &[i32]| {
            let hurt: Vec<_> = pids.iter().map(|&pid| Bystander { pid, ..Bystander::default() }).collect();
            let hurt = pods.hurt(&hurt);
            (hurt.iter().cloned().collect::<String>(), pods.beyond(target, scope, hurt).len())
        };
        assert_eq!(pods.count(), 3);
        assert_eq!(hurt(&on(false), Scope::Network, &[1, 2]), ("a".to_owned(), 1));
        assert_eq!(hurt(&on(true), Scope::Network, &[]), (String::new(), 3), "everybody's packets");
        assert_eq!(hurt(&on(true), Scope::Cgroup, &[4]), ("c".to_owned(), 1));
    }
}
