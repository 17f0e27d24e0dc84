//! `squall certs`: a CA and certificates for a start. Whoever has a CA of his own needs none of this.

use std::{
    fs::{self, File},
    io::{self, Write as _},
    os::unix::fs::{DirBuilderExt, OpenOptionsExt},
    path::{Path, PathBuf},
    str::FromStr,
    time::{Duration, SystemTime},
};

use anyhow::{Context, Result};
use clap::{Args, ValueEnum};
use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose, SanType,
};

use crate::{cli::exit, commands::out, wrong::Wrong};

/// A name that every agent's certificate has, for agents reached by addresses that nobody knows beforehand.
const AGENT: &str = "squall-agent";
/// How long a CA is valid.
const CA_DAYS: u64 = 3650;
const DAY: Duration = Duration::from_hours(24);
/// Clocks differ: certificates are valid from a little before now.
const EARLIER: Duration = Duration::from_mins(5);

/// `squall certs`.
#[derive(Debug, Args)]
pub(crate) struct Certs {
    /// Directory for them. A CA that is there already is used again
    #[arg(long, value_name = "DIR", default_value = "squall-certs")]
    dir: PathBuf,
    /// Another name or address by which agents are reached. Repeatable; one certificate has them all
    #[arg(long = "agent", value_name = "HOST", value_delimiter = ',')]
    hosts: Vec<String>,
    /// A client and his role, as `NAME:ROLE`. Repeatable
    #[arg(long = "client", value_name = "NAME:ROLE", value_delimiter = ',', default_value = "admin:admin")]
    clients: Vec<Client>,
    /// How long they are valid. Nothing revokes them but their end
    #[arg(long, value_name = "DAYS", default_value = "30", value_parser = clap::value_parser!(u64).range(1..=825))]
    days: u64,
    /// Write over certificates and keys that are there, the CA's excepted
    #[arg(long)]
    force: bool,
}

/// Somebody who calls agents.
#[derive(Debug, Clone)]
struct Client {
    name: String,
    role: Role,
}

/// Roles in an agent's policy.
#[derive(Debug, Clone, Copy, ValueEnum)]
enum Role {
    Revert,
    Observe,
    Inject,
    Admin,
}

impl Role {
    fn name(self) -> &'static str {
        match self {
            Self::Revert => "revert",
            Self::Observe => "observe",
            Self::Inject => "inject",
            Self::Admin => "admin",
        }
    }
}

impl FromStr for Client {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (name, role) = text.split_once(':').ok_or("write NAME:ROLE, for example ci:inject")?;
        let plain = |c: char| c.is_ascii_alphanumeric() || c == '-' || c == '_';
        if name.is_empty() || !name.chars().all(plain) || ["ca", "agent"].contains(&name) {
            return Err(format!(
                "`{name}` is no name for a client: use letters, digits, - and _ (not ca, not agent)"
            ));
        }
        let roles = "revert, observe, inject or admin";
        let role = Role::from_str(role, false).map_err(|_| format!("`{role}` is no role: write {roles}"))?;
        Ok(Self { name: name.to_owned(), role })
    }
}

impl Certs {
    /// Makes them, and says what to do next.
    pub(crate) fn run(&self) -> Result<u8> {
        let dir = &self.dir;
        let policy = dir.join("policy.yaml");
        let leaves =
            || std::iter::once("agent").chain(self.clients.iter().map(|client| client.name.as_str()));
        if !self.force {
            let there =
                leaves().flat_map(|name| [certificate(dir, name), key(dir, name)]).find(|file| file.exists());
            if let Some(file) = there {
                let why = format!(
                    "{}: is there already; give --force to replace it, or another --dir",
                    file.display()
                );
                return Err(Wrong(why).into());
            }
        }
        let made = fs::DirBuilder::new().recursive(true).mode(0o700).create(dir);
        made.with_context(|| format!("make {}", dir.display()))?;
        let ca = ca(dir)?;

        let mut agent = params(AGENT, self.days);
        agent.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
        let names =
            [AGENT, "localhost", "127.0.0.1", "::1"].into_iter().chain(self.hosts.iter().map(String::as_str));
        let sans = names.map(san).collect::<Result<Vec<_>>>()?;
        agent.subject_alt_names = sans;
        issue(dir, "agent", &agent, &ca)?;
        for Client { name, role } in &self.clients {
            let mut client = params(name, self.days);
            client.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
            let id = format!("spiffe://squall/{}/{name}", role.name());
            client.subject_alt_names = vec![SanType::URI(id.try_into()?)];
            issue(dir, name, &client, &ca)?;
        }
        if !policy.exists() {
            write(&policy, 0o644, POLICY)?;
        }
        out(&self.next_steps(&policy));
        Ok(exit::OK)
    }

    fn next_steps(&self, policy: &Path) -> String {
        let shown = self.dir.display();
        let client = self.clients.first().map_or("NAME", |client| client.name.as_str());
        let host = self.hosts.first().map_or("HOST", String::as_str);
        let host = if host.contains(':') { format!("[{host}]") } else { host.to_owned() };
        let server_name =
            if self.hosts.is_empty() { format!(" --tls-server-name {AGENT}") } else { String::new() };
        format!(
            "{shown}: valid for {} days; run this again with --force before they end\n\
             \n\
             On each node, with agent.pem, agent-key.pem, ca.pem and {} (read it: it says who may do what):\n\
             \x20 squall-agent --listen 0.0.0.0:7400 --tls-cert agent.pem --tls-key agent-key.pem --tls-client-ca ca.pem \
             --policy policy.yaml\n\
             Here:\n\
             \x20 squall nodes --agents https://{host}:7400 --tls-cert {shown}/{client}.pem --tls-key {shown}/{client}-key.pem \
             --tls-ca {shown}/ca.pem{server_name}\n\
             Keep ca-key.pem where nobody finds it: whoever has it may do everything.\n",
            self.days,
            policy.file_name().unwrap_or_default().display(),
        )
    }
}

/// What an agent lets these clients do.
const POLICY: &str = "\
# Who may do what on this agent. The first rule that is about a caller counts; who is in none may do nothing.
# Roles: revert < observe < inject < admin. Read again when it changes.
apiVersion: squall.dev/v1
kind: AccessPolicy
rules:
  - { who: spiffe://squall/admin/*, role: admin }
  - who: spiffe://squall/inject/*
    role: inject
    longest: 10m
    mostInjections: 8
    # faults: [network, cpu]
    # targets: [{ exe: recommender }, { cgroup: /sys/fs/cgroup/kubepods.slice }, { netns: own, interface: eth1 }]
  - { who: spiffe://squall/observe/*, role: observe }
  - { who: spiffe://squall/revert/*, role: revert }
";

fn certificate(dir: &Path, name: &str) -> PathBuf {
    dir.join(format!("{name}.pem"))
}

fn key(dir: &Path, name: &str) -> PathBuf {
    dir.join(format!("{name}-key.pem"))
}

/// The CA in this directory, made where there is none.
fn ca(dir: &Path) -> Result<Issuer<'static, KeyPair>> {
    let (certificate, key) = (certificate(dir, "ca"), key(dir, "ca"));
    if certificate.exists() || key.exists() {
        let read = |path: &Path| {
            fs::read_to_string(path).with_context(|| format!("read the CA's {}", path.display()))
        };
        let pair = KeyPair::from_pem(&read(&key)?).with_context(|| key.display().to_string())?;
        return Issuer::from_ca_cert_pem(&read(&certificate)?, pair)
            .with_context(|| certificate.display().to_string());
    }
    let mut ca = params("squall CA", CA_DAYS);
    ca.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    ca.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    let pair = KeyPair::generate()?;
    write(&certificate, 0o644, &ca.self_signed(&pair)?.pem())?;
    write(&key, 0o600, &pair.serialize_pem())?;
    Ok(Issuer::new(ca, pair))
}

fn params(name: &str, days: u64) -> CertificateParams {
    let mut params = CertificateParams::default();
    params.distinguished_name.push(DnType::CommonName, name);
    let now = SystemTime::now();
    params.not_before = (now - EARLIER).into();
    params.not_after = (now + DAY * days as u32).into();
    params.use_authority_key_identifier_extension = true;
    params
}

fn san(name: &str) -> Result<SanType> {
    if let Ok(ip) = name.parse() {
        return Ok(SanType::IpAddress(ip));
    }
    let plain = |c: char| c.is_ascii_alphanumeric() || ".-*".contains(c);
    if name.is_empty() || !name.chars().all(plain) {
        return Err(Wrong(format!(
            "--agent: {name}: no host name and no address; write node-1.example or 10.0.0.7"
        ))
        .into());
    }
    Ok(SanType::DnsName(name.try_into()?))
}

fn issue(dir: &Path, name: &str, params: &CertificateParams, ca: &Issuer<'_, KeyPair>) -> Result<()> {
    let pair = KeyPair::generate()?;
    let made = params.signed_by(&pair, ca)?;
    write(&key(dir, name), 0o600, &pair.serialize_pem())?;
    write(&certificate(dir, name), 0o644, &made.pem())
}

/// Writes a file beside its place and moves it there, so that nobody reads half of it and its mode is right from the start.
fn write(path: &Path, mode: u32, content: &str) -> Result<()> {
    let temporary = path.with_extension("new");
    let attempt = || -> io::Result<()> {
        match fs::remove_file(&temporary) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
            _ => {}
        }
        let mut file = File::options().create_new(true).write(true).mode(mode).open(&temporary)?;
        file.write_all(content.as_bytes())?;
        file.sync_all()?;
        fs::rename(&temporary, path)
    };
    attempt().with_context(|| format!("write {}", path.display()))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    fn certs(dir: &Path, force: bool) -> Certs {
        Certs {
            dir: dir.to_owned(),
            hosts: vec!["node-1".into(), "10.0.0.7".into(), "fd00::7".into()],
            clients: vec!["ci:inject".parse().unwrap(), "eve:observe".parse().unwrap()],
            days: 30,
            force,
        }
    }

    #[test]
    fn keys_are_for_their_owner_and_nothing_is_written_over() {
        let dir = tempfile::tempdir().unwrap();
        let read = |name: &str| fs::read_to_string(dir.path().join(name)).unwrap();
        certs(dir.path(), false).run().unwrap();
        for name in ["ca-key.pem", "agent-key.pem", "ci-key.pem", "eve-key.pem"] {
            let mode = fs::metadata(dir.path().join(name)).unwrap().permissions().mode();
            assert_eq!(mode & 0o777, 0o600, "{name}");
        }
        let (ca, ci) = (read("ca.pem"), read("ci.pem"));
        let error = certs(dir.path(), false).run().unwrap_err().to_string();
        assert!(error.contains("agent.pem: is there already; give --force"), "{error}");
        assert_eq!(read("ci.pem"), ci);
        certs(dir.path(), true).run().unwrap();
        assert!(read("ca.pem") == ca && read("ci.pem") != ci);
        fs::write(dir.path().join("ca-key.pem"), "gone").unwrap();
        assert!(certs(dir.path(), true).run().is_err());
        assert_eq!(read("ca.pem"), ca);
    }

    #[test]
    fn what_to_do_next_names_what_was_made() {
        insta::assert_snapshot!(certs(Path::new("certs"), false).next_steps(Path::new("certs/policy.yaml")));
    }

    #[rstest::rstest]
    #[case("ci", "write NAME:ROLE")]
    #[case("ci:root", "revert, observe, inject or admin")]
    #[case("../ci:admin", "no name for a client")]
    #[case("ca:admin", "no name for a client")]
    fn wrong_clients(#[case] text: &str, #[case] why: &str) {
        let error = text.parse::<Client>().unwrap_err();
        assert!(error.contains(why), "{error}");
    }
}
