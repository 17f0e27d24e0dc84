//! Who may do what: roles, and limits for those who inject. Default deny.

use std::{
    fs,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context, Result, anyhow, bail};
use serde::Deserialize;

use super::tokens::is_account;
use crate::{
    host::cgroup::Hierarchies,
    limits::Invalid,
    target::{Netns, Scope, Target},
};

/// What somebody may do; each role may also do what those before it may.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// See what is injected, and end it.
    Revert,
    /// See what is measured.
    Observe,
    /// Inject, within the limits of the rule; change and renew what is one's own.
    Inject,
    /// Everything, with no limits but the agent's own.
    Admin,
}

/// The one method for everybody that does much.
pub const DESCRIBE: &str = "/squall.v1.Agent/Describe";

/// Every method there is, and the least role for it. What is not in here is for [`Role::Admin`].
const METHODS: [(&str, Role); 13] = [
    ("/grpc.health.v1.Health/Check", Role::Revert),
    ("/grpc.health.v1.Health/Watch", Role::Revert),
    (DESCRIBE, Role::Revert),
    ("/squall.v1.Agent/List", Role::Revert),
    ("/squall.v1.Agent/Revert", Role::Revert),
    ("/squall.v1.Agent/Stop", Role::Revert),
    ("/squall.v1.Agent/Watch", Role::Observe),
    ("/squall.v1.Agent/Sample", Role::Observe),
    ("/squall.v1.Agent/Arm", Role::Inject),
    ("/squall.v1.Agent/Fire", Role::Inject),
    ("/squall.v1.Agent/Inject", Role::Inject),
    ("/squall.v1.Agent/Update", Role::Inject),
    ("/squall.v1.Agent/Renew", Role::Inject),
];

/// The least role for a method.
#[must_use]
pub fn needed(path: &str) -> Role {
    METHODS.iter().find(|(method, _)| *method == path).map_or(Role::Admin, |(_, role)| *role)
}

/// Everybody who may do anything, from a file. The first rule that is about a caller is his.
#[derive(Debug, Default)]
pub struct Policy(Vec<Rule>);

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    #[serde(rename = "apiVersion")]
    api_version: String,
    kind: String,
    rules: Vec<Rule>,
}

/// What one subject, or a group of them, may do.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
struct Rule {
    who: Subject,
    role: Role,
    /// Kinds of fault; none: any.
    #[serde(default)]
    faults: Vec<String>,
    /// A target must be one of these; none: any.
    #[serde(default)]
    targets: Vec<Place>,
    /// Longest duration.
    longest: Option<Length>,
    /// Most live injections of one caller.
    most_injections: Option<usize>,
}

/// A caller by name, or with `/*` at the end every SPIFFE id below.
#[derive(Debug, Clone, Deserialize)]
#[serde(try_from = "String")]
struct Subject(String);

impl TryFrom<String> for Subject {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        let (kind, name) = text.split_once(':').unwrap_or((&text, ""));
        let known = match kind {
            "dns" | "cn" => !name.is_empty(),
            "uid" => name.parse::<u32>().is_ok(),
            "loopback" => name.is_empty(),
            "serviceaccount" => is_account(name),
            _ => name.len() > 2 && name.starts_with("//"),
        };
        if !known {
            return Err(format!(
                "who: {text}: nobody has such a name; write spiffe://DOMAIN/PATH, dns:NAME, cn:NAME, \
                 serviceaccount:NAMESPACE:NAME, uid:NUMBER or loopback"
            ));
        }
        if text.trim_end_matches("/*").contains('*') || text.contains('*') && !name.starts_with("//") {
            return Err(format!(
                "who: {text}: a * may only be the whole last part of a URI: spiffe://DOMAIN/ci/*"
            ));
        }
        Ok(Self(text))
    }
}

impl Subject {
    fn is(&self, name: &str) -> bool {
        match self.0.strip_suffix('*') {
            Some(above) => name.strip_prefix(above).is_some_and(|rest| !rest.is_empty()),
            None => self.0 == name,
        }
    }
}

#[derive(Debug, Clone, Copy, Deserialize)]
#[serde(try_from = "String")]
struct Length(Duration);

impl TryFrom<String> for Length {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        let length = humantime::parse_duration(&text);
        length.map(Self).map_err(|e| format!("longest: {text}: {e}; write for example 90s or 5m"))
    }
}

/// Where faults may go. Every given term must hold.
#[derive(Debug, Clone, Deserialize)]
#[serde(try_from = "PlaceTerms")]
struct Place {
    exe: Option<PathBuf>,
    cgroup: Option<PathBuf>,
    netns: Option<Namespace>,
    interface: Option<String>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct PlaceTerms {
    exe: Option<PathBuf>,
    cgroup: Option<PathBuf>,
    netns: Option<String>,
    interface: Option<String>,
}

#[derive(Debug, Clone)]
enum Namespace {
    /// The agent's own, so on a node everybody's.
    Own,
    At(PathBuf),
}

impl TryFrom<PlaceTerms> for Place {
    type Error = String;

    fn try_from(terms: PlaceTerms) -> Result<Self, String> {
        let PlaceTerms { exe, cgroup, netns, interface } = terms;
        if exe.is_none() && cgroup.is_none() && netns.is_none() {
            return Err("targets: one with neither exe nor cgroup nor netns; give one of them (with an interface its netns: own, \
                        a name in /run/netns or a path)"
                .to_owned());
        }
        if let Some(path) = cgroup
            .as_ref()
            .filter(|path| !path.is_absolute() || path.components().any(|c| c.as_os_str() == ".."))
        {
            return Err(format!(
                "targets.cgroup: {}: not a directory; write it in full: /sys/fs/cgroup/kubepods.slice",
                path.display()
            ));
        }
        let netns = netns.map(|name| match name.as_str() {
            "own" => Namespace::Own,
            name => Namespace::At(Path::new("/run/netns").join(name)),
        });
        Ok(Self { exe, cgroup, netns, interface })
    }
}

impl Place {
    fn holds(&self, target: &Target, scope: Scope) -> bool {
        let named = !target.is_everybody(scope) || matches!(self.netns, Some(Namespace::Own));
        named
            && self.exe.as_ref().is_none_or(|exe| runs(target, exe))
            && self.cgroup.as_ref().is_none_or(|dir| below(target, dir, scope))
            && self.netns.as_ref().is_none_or(|netns| target.netns.as_ref().is_some_and(|n| netns.is(n)))
            && self.interface.as_ref().is_none_or(|name| target.interface.as_ref() == Some(name))
    }
}

impl Namespace {
    fn is(&self, netns: &Netns) -> bool {
        match self {
            Self::Own => netns.own,
            Self::At(path) => fs::metadata(path).is_ok_and(|file| file.ino() == netns.inode),
        }
    }
}

/// Whether the target is a process with this executable: a path, or its last component.
fn runs(target: &Target, exe: &Path) -> bool {
    let Some(process) = &target.process else { return false };
    let link = fs::read_link(format!("/proc/{}/exe", process.pid));
    link.is_ok_and(
        |link| {
            if exe.is_absolute() { link == exe } else { link.file_name() == Some(exe.as_os_str()) }
        },
    )
}

/// Whether the target is in this cgroup or below it, in each hierarchy in which the fault takes hold of one.
fn below(target: &Target, dir: &Path, scope: Scope) -> bool {
    let Some(cgroup) = target.cgroup.as_ref().filter(|cgroup| cgroup.path.starts_with(dir)) else {
        return false;
    };
    let held: Vec<_> = match scope {
        Scope::Cgroup => cgroup.stressed().collect(),
        Scope::Sockets => cgroup.of_sockets().map(|dir| ("", dir)).into_iter().collect(),
        Scope::Process | Scope::Network => Vec::new(),
    };
    let same = Hierarchies::read().unwrap_or_default().by_path(dir);
    let in_its_hierarchy = |name| same.as_ref().and_then(|same| same.controller(name));
    held.into_iter().all(|(name, held)| {
        held.starts_with(dir) || in_its_hierarchy(name).is_some_and(|(_, dir)| held.starts_with(dir))
    })
}

/// What a caller may do now.
#[derive(Debug, Clone)]
pub struct Grant {
    /// The name by which he is known.
    pub who: String,
    /// What he may do.
    pub role: Role,
    rule: Option<Box<Rule>>,
}

impl Policy {
    /// Reads a policy. Errors have the line and the column.
    pub fn parse(text: &str) -> Result<Self> {
        let options = serde_saphyr::options! { with_snippet: false };
        let file: File = serde_saphyr::from_str_with_options(text, options).map_err(|e| anyhow!("{e}"))?;
        if (file.api_version.as_str(), file.kind.as_str()) != ("squall.dev/v1", "AccessPolicy") {
            bail!(
                "apiVersion, kind: {}, {}: no policy of this agent; write squall.dev/v1 and AccessPolicy",
                file.api_version,
                file.kind
            );
        }
        for rule in &file.rules {
            let limited = !rule.faults.is_empty()
                || !rule.targets.is_empty()
                || rule.longest.is_some()
                || rule.most_injections.is_some();
            if limited && rule.role != Role::Inject {
                bail!(
                    "rules: {}: limits are for the role inject, this one is {:?}; leave them out, or change the role",
                    rule.who.0,
                    rule.role
                );
            }
            let unknown =
                rule.faults.iter().find(|name| !crate::fault::KINDS.iter().any(|k| k.name == *name));
            if let Some(name) = unknown {
                let known: Vec<_> = crate::fault::KINDS.iter().map(|k| k.name).collect();
                bail!(
                    "rules: {}: faults: {name}: no kind of fault; choose of {}",
                    rule.who.0,
                    known.join(", ")
                );
            }
        }
        Ok(Self(file.rules))
    }

    /// What a caller with these names may do; nothing where no rule is about him. Root on this host is admin unless a rule
    /// says otherwise.
    #[must_use]
    pub fn grant(&self, names: &[String]) -> Option<Grant> {
        for rule in &self.0 {
            if let Some(who) = names.iter().find(|name| rule.who.is(name)) {
                return Some(Grant { who: who.clone(), role: rule.role, rule: Some(Box::new(rule.clone())) });
            }
        }
        let root = names.iter().find(|name| *name == "uid:0")?;
        Some(Grant { who: root.clone(), role: Role::Admin, rule: None })
    }
}

impl Grant {
    /// The limits of his rule, where it has any.
    fn limits(&self) -> Option<&Rule> {
        self.rule.as_deref().filter(|_| self.role != Role::Admin)
    }

    /// Refuses a kind of fault, or a time for it, that is beyond the limits of the caller's rule.
    pub fn check_fault(&self, kind: &str, duration: Duration) -> Result<(), Invalid> {
        let Some(rule) = self.limits() else { return Ok(()) };
        if !rule.faults.is_empty() && !rule.faults.iter().any(|allowed| allowed == kind) {
            let kinds = rule.faults.join(", ");
            return beyond("fault", kind, format!("{} may inject {kinds}", self.who));
        }
        if let Some(Length(longest)) = rule.longest.filter(|longest| duration > longest.0) {
            let value = format!("{duration:?}");
            return beyond("duration_ns", value, format!("{} may inject for {longest:?}", self.who));
        }
        Ok(())
    }

    /// Refuses targets beyond the limits of the caller's rule, and more of them than he may have, who has so many live ones.
    pub fn check_targets(&self, scope: Scope, targets: &[Target], live: usize) -> Result<(), Invalid> {
        let Some(rule) = self.limits() else { return Ok(()) };
        let outside = |target: &&Target| !rule.targets.iter().any(|place| place.holds(target, scope));
        if let Some(target) = targets.iter().find(outside).filter(|_| !rule.targets.is_empty()) {
            return beyond("target", target, format!("none of the targets that {} may hurt", self.who));
        }
        if let Some(most) = rule.most_injections.filter(|most| live + targets.len() > *most) {
            let problem = format!("{} has {live} injections and may have {most}", self.who);
            return beyond("target", format!("{} more", targets.len()), problem);
        }
        Ok(())
    }

    /// Whether the number of his injections is limited.
    #[must_use]
    pub fn is_counted(&self) -> bool {
        self.rule.as_ref().is_some_and(|rule| rule.most_injections.is_some())
    }
}

fn beyond(field: &str, value: impl ToString, problem: String) -> Result<(), Invalid> {
    Err(Invalid::new(field, value, problem, "ask for less, or have the agent's policy changed"))
}

/// Reads a policy file's content.
pub fn load(content: &[u8]) -> Result<Policy> {
    Policy::parse(std::str::from_utf8(content).context("not a text")?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::target::{Cgroup, Process};

    const POLICY: &str = "\
apiVersion: squall.dev/v1
kind: AccessPolicy
rules:
  - { who: spiffe://squall/ci/deploy, role: observe }
  - who: spiffe://squall/ci/*
    role: inject
    faults: [network]
    targets: [{ exe: recommender }, { netns: own, interface: eth9 }, { cgroup: /sys/fs/cgroup/shop }]
    longest: 5m
    mostInjections: 2
  - { who: dns:ops.example, role: admin }
  - { who: uid:1000, role: revert }
  - { who: 'serviceaccount:ci:deployer', role: inject }
";

    fn grant(names: &[&str]) -> Option<Grant> {
        let names: Vec<String> = names.iter().map(|&name| name.to_owned()).collect();
        Policy::parse(POLICY).unwrap().grant(&names)
    }

    fn role(name: &str) -> Option<Role> {
        grant(&[name]).map(|grant| grant.role)
    }

    #[test]
    fn the_first_rule_counts_and_nobody_else_may_anything() {
        assert_eq!(role("spiffe://squall/ci/deploy"), Some(Role::Observe));
        assert_eq!(role("spiffe://squall/ci/test"), Some(Role::Inject));
        assert_eq!(role("dns:ops.example"), Some(Role::Admin));
        assert_eq!(role("uid:1000"), Some(Role::Revert));
        assert_eq!(role("uid:0"), Some(Role::Admin));
        assert_eq!(role("serviceaccount:ci:deployer"), Some(Role::Inject));
        for nobody in [
            "spiffe://squall/ci/",
            "spiffe://squall/ci",
            "dns:OPS.example",
            "cn:ops.example",
            "uid:10000",
            "loopback",
            "serviceaccount:ci:deployer-2",
        ] {
            assert_eq!(role(nobody), None, "{nobody}");
        }
        assert!(Policy::default().grant(&["spiffe://squall/ci/deploy".to_owned()]).is_none());
        assert_eq!(grant(&["dns:x", "dns:ops.example"]).unwrap().who, "dns:ops.example");
    }

    #[test]
    fn every_method_of_the_protocol_has_a_role_and_who_may_observe_may_revert() {
        let proto = include_str!("../../../proto/squall/v1/agent.proto");
        let methods = proto.lines().filter_map(|line| line.trim().strip_prefix("rpc "));
        let mut found = 0;
        for method in methods.filter_map(|line| line.split_once('(')).map(|(name, _)| name) {
            found += 1;
            let path = format!("/squall.v1.Agent/{method}");
            assert!(METHODS.iter().any(|(known, _)| *known == path), "{path} needs a role");
        }
        assert!(found > 5);
        assert!(needed("/squall.v1.Agent/Revert") <= needed("/squall.v1.Agent/Watch"));
        assert_eq!(needed("/grpc.reflection.v1.ServerReflection/ServerReflectionInfo"), Role::Admin);
        assert_eq!(needed("/squall.v1.Agent/revert"), Role::Admin);
    }

    fn target(cgroup: &str, own: bool, interface: Option<&str>) -> Target {
        Target {
            name: "t".to_owned(),
            process: None,
            cgroup: Some(Cgroup { unified: None, v1: vec![], path: cgroup.into(), inode: 1 }),
            netns: Some(Netns { path: "/run/netns/none".into(), inode: 1, own }),
            interface: interface.map(str::to_owned),
        }
    }

    #[test]
    fn the_example_is_a_policy() {
        let policy = Policy::parse(include_str!("../../../deploy/policy.yaml")).unwrap();
        let gate = policy.grant(&["serviceaccount:ci:release-gate".to_owned()]).unwrap();
        assert_eq!((gate.role, gate.is_counted()), (Role::Inject, true));
    }

    #[test]
    fn limits_are_kept() {
        let grant = grant(&["spiffe://squall/ci/test"]).unwrap();
        let check = |kind: &str, scope, target: Target, seconds, live| {
            let checked = grant.check_fault(kind, Duration::from_secs(seconds));
            checked.and_then(|()| grant.check_targets(scope, &[target], live)).map_err(|e| e.field)
        };
        let shop = || target("/sys/fs/cgroup/shop/a", false, None);
        assert_eq!(check("network", Scope::Network, shop(), 300, 1), Ok(()));
        assert_eq!(check("cpu", Scope::Network, shop(), 300, 1), Err("fault".to_owned()));
        assert_eq!(check("network", Scope::Network, shop(), 301, 1), Err("duration_ns".to_owned()));
        assert_eq!(check("network", Scope::Network, shop(), 300, 2), Err("target".to_owned()));
        let outside = || Err("target".to_owned());
        assert_eq!(
            check("network", Scope::Network, target("/sys/fs/cgroup/shopping", false, None), 1, 0),
            outside()
        );
        // By its cgroup it may hurt the cgroup, not everybody on the node.
        assert_eq!(
            check("network", Scope::Network, target("/sys/fs/cgroup/shop", true, None), 1, 0),
            outside()
        );
        assert_eq!(check("network", Scope::Network, target("/", true, Some("eth9")), 1, 0), Ok(()));
        assert_eq!(check("network", Scope::Network, target("/", true, Some("eth0")), 1, 0), outside());
        assert_eq!(check("network", Scope::Network, target("/", false, Some("eth9")), 1, 0), outside());
    }

    /// On v1 a process may be in one cgroup for memory, and in another for CPU time.
    #[test]
    fn a_cgroup_that_a_stressor_moves_into_is_no_other() {
        let top = tempfile::tempdir().unwrap();
        let dir = |name: &str| {
            let dir = top.path().join(name);
            fs::create_dir_all(&dir).unwrap();
            for dir in [&dir, dir.parent().unwrap()] {
                fs::write(dir.join("cgroup.procs"), "").unwrap();
            }
            dir
        };
        let with_cpu = |cpu: PathBuf| {
            let memory = dir("memory/shop");
            let v1 = vec![("cpu".to_owned(), cpu), ("memory".to_owned(), memory.clone())];
            let cgroup = Cgroup { unified: None, v1, path: memory, inode: 1 };
            Target { cgroup: Some(cgroup), ..target("/", true, None) }
        };
        let shop = dir("memory/shop");
        let others = with_cpu(dir("cpu/others"));
        assert!(!below(&others, &shop, Scope::Cgroup) && below(&others, &shop, Scope::Process));
        assert!(below(&with_cpu(dir("memory/shop/cpu")), &shop, Scope::Cgroup));
        let root = dir("cpu/root").parent().unwrap().to_owned();
        assert!(below(&with_cpu(root), &shop, Scope::Cgroup), "as one more process of the node");
    }

    #[test]
    fn an_executable_is_told_by_its_path_or_its_last_part() {
        let exe = std::env::current_exe().unwrap();
        let me = Process { pid: std::process::id().cast_signed(), start_time: 0 };
        let me = Target { process: Some(me), ..target("/", false, None) };
        assert!(runs(&me, &exe) && runs(&me, Path::new(exe.file_name().unwrap())));
        assert!(!runs(&me, Path::new("/bin/sh")) && !runs(&me, Path::new("sh")));
    }

    #[rstest::rstest]
    #[case("who: spiffe://a/*", "wo: spiffe://a/*", "at line 4, column")]
    #[case("role: inject", "role: root", "at line 4, column")]
    #[case("who: spiffe://a/*", "who: somebody", "who: somebody")]
    #[case("who: spiffe://a/*", "who: spiffe://*/x", "a * may only")]
    #[case("who: spiffe://a/*", "who: 'dns:*'", "a * may only")]
    #[case("who: spiffe://a/*", "who: 'serviceaccount:ci'", "serviceaccount:NAMESPACE:NAME")]
    #[case("who: spiffe://a/*", "who: 'serviceaccount:ci:*'", "serviceaccount:NAMESPACE:NAME")]
    #[case("longest: 5m", "longest: 5", "longest: 5")]
    #[case("faults: [cpu]", "faults: [weather]", "choose of network")]
    #[case("{ exe: x }", "{ interface: x }", "neither exe nor cgroup nor netns")]
    #[case("{ exe: x }", "{ cgroup: shop }", "write it in full")]
    #[case("{ exe: x }", "{ pid: 1 }", "at line 4, column")]
    #[case("role: inject", "role: observe", "limits are for the role inject")]
    #[case("v1", "v2", "AccessPolicy")]
    fn what_is_wrong_is_named(#[case] from: &str, #[case] to: &str, #[case] why: &str) {
        let good = "apiVersion: squall.dev/v1\nkind: AccessPolicy\nrules:\n  - { who: spiffe://a/*, role: inject, longest: 5m, \
                    faults: [cpu], targets: [{ exe: x }] }\n";
        Policy::parse(good).unwrap();
        let error = format!("{:#}", Policy::parse(&good.replace(from, to)).unwrap_err());
        assert!(error.contains(why), "{error}");
    }
}
