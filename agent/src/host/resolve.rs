//! Host names, as the target resolves them: by the name servers and the hosts file that it sees, from its network
//! namespace.

use std::{
    fs::File,
    io::Read,
    net::IpAddr,
    os::fd::AsRawFd,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use anyhow::{Context, Result, anyhow, bail, ensure};
use hickory_resolver::{
    TokioResolver,
    config::{LookupIpStrategy, NameServerConfig, ResolveHosts, ResolverConfig},
    net::{DnsError, NetError, runtime::TokioRuntimeProvider},
    proto::{op::ResponseCode, rr::Name},
};
use nix::{
    errno::Errno,
    fcntl::{OFlag, OpenHow, ResolveFlag, openat2},
};
use resolv_conf::Config;
use tokio::{runtime, time::timeout};

use super::netns::Netns;
use crate::target::{Process, Target};

/// The longest a lookup takes. The servers share it evenly: one that is silent leaves time for the next.
const PATIENCE: Duration = Duration::from_secs(5);
/// The largest file that is read, bytes. Some hosts files block a hundred thousand names.
const LARGEST_FILE: u64 = 16 << 20;

/// Resolves host names as a target does. Keeps nothing between lookups.
#[derive(Debug, Clone)]
pub struct Resolver {
    netns: Arc<Netns>,
    files: Files,
}

/// Whose /etc/resolv.conf and /etc/hosts count.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Files {
    /// Those that a process sees.
    Process(Process),
    /// Those in /etc/netns/NAME; each that is not there, the agent's own, as `ip netns exec` does it.
    Named(String),
    /// The agent's own.
    Own,
}

impl Files {
    /// Those of a target: of its process, or of its network namespace where that has a name.
    #[must_use]
    pub fn of(target: &Target) -> Self {
        if let Some(process) = &target.process {
            return Self::Process(process.clone());
        }
        let path = target.netns.as_ref().map(|netns| netns.path.as_path());
        let name = path
            .and_then(|path| {
                path.strip_prefix("/run/netns").or_else(|_| path.strip_prefix("/var/run/netns")).ok()
            })
            .and_then(|name| name.to_str());
        name.map_or(Self::Own, |name| Self::Named(name.to_owned()))
    }

    /// What is in resolv.conf and hosts now. A file that is not there is empty.
    fn read(&self) -> Result<[String; 2]> {
        let root = match self {
            Self::Process(process) => PathBuf::from(format!("/proc/{}/root", process.pid)),
            Self::Named(_) | Self::Own => PathBuf::from("/"),
        };
        let read = |file| self.read_one(&root, file);
        let read = read("resolv.conf").and_then(|conf| Ok([conf, read("hosts")?]));
        if let Self::Process(process) = self
            && !process.alive()
        {
            bail!("process {} is gone", process.pid);
        }
        read
    }

    fn read_one(&self, root: &Path, file: &str) -> Result<String> {
        if let Self::Named(name) = self
            && let Some(text) = read_in(root, &Path::new("etc/netns").join(name).join(file))?
        {
            return Ok(text);
        }
        Ok(read_in(root, &Path::new("etc").join(file))?.unwrap_or_default())
    }
}

/// Reads a file as one sees it whose root directory is this: an absolute symlink starts there and nothing leads out.
/// None where there is none. A target may have put anything there: only a regular file is opened at all.
fn read_in(root: &Path, file: &Path) -> Result<Option<String>> {
    let what = || format!("reading {}", root.join(file).display());
    let dir = File::open(root).with_context(|| format!("opening {}", root.display()))?;
    let how = OpenHow::new().flags(OFlag::O_PATH | OFlag::O_CLOEXEC).resolve(ResolveFlag::RESOLVE_IN_ROOT);
    // EAGAIN: somewhere on the host something was renamed or mounted while ".." was followed [fs/namei.c, 6.1].
    let found = (0..100).map(|_| openat2(&dir, file, how)).find(|found| !matches!(found, Err(Errno::EAGAIN)));
    let found = match found.unwrap_or(Err(Errno::EAGAIN)) {
        Err(Errno::ENOENT | Errno::ENOTDIR) => return Ok(None),
        found => File::from(found.with_context(what)?),
    };
    ensure!(found.metadata().with_context(what)?.is_file(), "{}: not a regular file", what());
    let opened = File::open(format!("/proc/self/fd/{}", found.as_raw_fd())).with_context(what)?;
    let mut bytes = Vec::new();
    opened.take(LARGEST_FILE + 1).read_to_end(&mut bytes).with_context(what)?;
    ensure!(bytes.len() as u64 <= LARGEST_FILE, "{}: larger than {LARGEST_FILE} bytes", what());
    Ok(Some(String::from_utf8_lossy(&bytes).into_owned()))
}

impl Resolver {
    /// The namespace in which it asks.
    #[must_use]
    pub fn netns(&self) -> &Netns {
        &self.netns
    }

    /// Asks from this namespace the servers that these files name.
    #[must_use]
    pub fn new(netns: Arc<Netns>, files: Files) -> Self {
        Self { netns, files }
    }

    /// The name servers that the target asks.
    pub fn servers(&self) -> Result<Vec<IpAddr>> {
        let [conf, _] = self.files.read()?;
        Ok(parse_conf(&conf).get_nameservers_or_local().iter().map(IpAddr::from).collect())
    }

    /// All addresses of a name, ascending, each once; never none. The files are read each time. A name that the hosts
    /// file has is not asked for; else the servers are asked one after the other until one knows, with the search
    /// domains and `ndots` that resolv.conf gives. nsswitch.conf and the domain of the target's own host name do not
    /// count.
    ///
    /// Blocks, at most about five seconds. The error names the name, each server that was asked, and what it said.
    pub fn resolve(&self, name: &str) -> Result<Vec<IpAddr>> {
        self.look_up(name).with_context(|| format!("resolving {name}"))
    }

    fn look_up(&self, name: &str) -> Result<Vec<IpAddr>> {
        ensure!(is_name(name), "it is not a host name");
        let [conf, hosts] = self.files.read()?;
        let found = in_hosts(&hosts, name);
        if !found.is_empty() {
            return Ok(found);
        }
        let conf = parse_conf(&conf);
        let name = Name::from_ascii(name)?;
        // The sockets are made on the thread that entered the namespace.
        self.netns.run(|| {
            let runtime = runtime::Builder::new_current_thread().enable_all().build()?;
            runtime.block_on(ask(&conf, &name))
        })
    }
}

/// What a resolv.conf says; what is wrong in it counts as absent, as glibc has it.
pub fn parse_conf(text: &str) -> Config {
    let (mut conf, _) = Config::parse_with_errors(text.as_bytes());
    conf.glibc_normalize();
    conf
}

/// Asks one server after the other until one knows, or says that there is nothing to know.
async fn ask(conf: &Config, name: &Name) -> Result<Vec<IpAddr>> {
    let servers: Vec<IpAddr> = conf.get_nameservers_or_local().iter().map(IpAddr::from).collect();
    let share = PATIENCE / servers.len() as u32;
    let mut answers = Vec::new();
    for server in servers {
        let (answer, is_final) = match timeout(share, ask_one(conf, server, share / 2, name)).await {
            Ok(Ok(found)) if !found.is_empty() => return Ok(found),
            Ok(Ok(_)) => ("says: no addresses".to_owned(), true),
            Ok(Err(NetError::Dns(DnsError::NoRecordsFound(none)))) => {
                let missing = none.response_code == ResponseCode::NXDomain;
                (format!("says: {}", if missing { "no such name" } else { "no addresses" }), true)
            }
            Ok(Err(NetError::Dns(DnsError::ResponseCode(code)))) => (format!("says: {code}"), false),
            Ok(Err(NetError::Timeout)) | Err(_) => ("did not answer".to_owned(), false),
            Ok(Err(error)) => (format!("cannot be asked: {error}"), false),
        };
        answers.push(format!("{server} {answer}"));
        if is_final {
            break;
        }
    }
    Err(anyhow!(answers.join("; ")))
}

/// Asks one server for the IPv4 and the IPv6 addresses, with so much patience for each question. Where it answers only
/// one of the two, that is the answer.
async fn ask_one(
    conf: &Config,
    server: IpAddr,
    patience: Duration,
    name: &Name,
) -> Result<Vec<IpAddr>, NetError> {
    let search =
        conf.get_last_search_or_domain().filter_map(|domain| Name::from_ascii(domain).ok()).collect();
    let config = ResolverConfig::from_parts(None, search, vec![NameServerConfig::udp_and_tcp(server)]);
    let mut builder = TokioResolver::builder_with_config(config, TokioRuntimeProvider::default());
    let options = builder.options_mut();
    options.ndots = conf.ndots as usize;
    options.edns0 = conf.edns0;
    options.timeout = patience;
    // A lost packet is sent again all the same.
    options.attempts = 0;
    options.ip_strategy = LookupIpStrategy::Ipv4AndIpv6;
    options.use_hosts_file = ResolveHosts::Never;
    options.os_port_selection = true;
    let mut found: Vec<IpAddr> = builder.build()?.lookup_ip(name.clone()).await?.iter().collect();
    found.sort_unstable();
    found.dedup();
    Ok(found)
}

/// The addresses that a hosts file gives a name, ascending, each once.
pub fn in_hosts(hosts: &str, name: &str) -> Vec<IpAddr> {
    let mut found = Vec::new();
    for line in hosts.lines() {
        let mut words = line.split('#').next().unwrap_or_default().split_whitespace();
        if let Some(address) = words.next().and_then(|word| word.parse().ok())
            && words.any(|word| word.eq_ignore_ascii_case(name))
        {
            found.push(address);
        }
    }
    found.sort_unstable();
    found.dedup();
    found
}

/// Whether a text can be a host name: labels of 1 to 63 letters, digits, hyphens and underscores, none of which begins
/// or ends with a hyphen, 253 characters in all, and a dot at the end if one likes. An IP address is none, nor is
/// what a resolver takes for one: a last label of digits.
#[must_use]
pub fn is_name(text: &str) -> bool {
    let name = text.strip_suffix('.').unwrap_or(text);
    let is_label = |label: &str| {
        (1..=63).contains(&label.len())
            && label.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-' || byte == b'_')
            && !label.starts_with('-')
            && !label.ends_with('-')
    };
    let is_number = |label: &str| label.bytes().all(|byte| byte.is_ascii_digit());
    name.len() <= 253 && name.split('.').all(is_label) && !name.rsplit('.').next().is_some_and(is_number)
}

#[cfg(test)]
mod tests {
    use std::{fs, os::unix::fs::symlink};

    use rstest::rstest;

    use super::*;

    #[rstest]
    #[case("redis", true)]
    #[case("Redis-0.redis.shop.svc.cluster.local.", true)]
    #[case("_sip._tcp.example.com", true)]
    #[case("shop_redis_1", true)]
    #[case("3com.com", true)]
    #[case("xn--bcher-kva.example", true)]
    #[case("", false)]
    #[case(".", false)]
    #[case("a..b", false)]
    #[case(".a", false)]
    #[case("-a.b", false)]
    #[case("a-.b", false)]
    #[case("a b", false)]
    #[case("b\u{fc}cher.example", false)]
    #[case("10.0.0.1", false)]
    #[case("10.0.0.300", false)]
    #[case("10.0.0.0/8", false)]
    #[case("10.1", false)]
    #[case("1", false)]
    #[case("::1", false)]
    #[case("redis:6379", false)]
    fn names(#[case] text: &str, #[case] expected: bool) {
        assert_eq!(is_name(text), expected);
    }

    #[test]
    fn names_have_their_lengths() {
        let label = "a".repeat(63);
        assert!(is_name(&label) && !is_name(&format!("{label}a")));
        let name = format!("{label}.{label}.{label}.{}", "a".repeat(61));
        assert!(name.len() == 253 && is_name(&name) && is_name(&format!("{name}.")));
        assert!(!is_name(&format!("{name}a")));
    }

    #[test]
    fn hosts_give_all_addresses_of_a_name() {
        let hosts =
            "127.0.0.1\tlocalhost\n# 10.0.0.8 db\n10.0.0.9 other DB # db2\nfd00::1 db\n10.0.0.9 db\nx db\n";
        let addresses = |list: &[&str]| list.iter().map(|a| a.parse().unwrap()).collect::<Vec<IpAddr>>();
        assert_eq!(in_hosts(hosts, "Db"), addresses(&["10.0.0.9", "fd00::1"]));
        assert_eq!(in_hosts(hosts, "db2"), addresses(&[]));
        assert_eq!(in_hosts(hosts, "d"), addresses(&[]));
    }

    #[test]
    fn symlinks_start_at_the_root_and_never_leave_it() -> Result<()> {
        let dir = tempfile::tempdir()?;
        let root = dir.path().join("root");
        fs::create_dir_all(root.join("etc"))?;
        fs::create_dir_all(root.join("run"))?;
        fs::write(dir.path().join("secret"), "not theirs")?;
        fs::write(root.join("run/conf"), "theirs")?;
        let read = |link: &str| {
            let _ = fs::remove_file(root.join("etc/conf"));
            symlink(link, root.join("etc/conf"))?;
            read_in(&root, Path::new("etc/conf"))
        };
        for theirs in ["/run/conf", "../run/conf", "../../../run/conf"] {
            assert_eq!(read(theirs)?.as_deref(), Some("theirs"), "{theirs}");
        }
        for nowhere in [dir.path().join("secret").to_str().unwrap(), "../../secret"] {
            assert_eq!(read(nowhere)?, None, "{nowhere}");
        }
        Ok(())
    }

    #[test]
    fn what_is_no_file_or_too_large_is_refused() -> Result<()> {
        let root = tempfile::tempdir()?;
        let read = |file: &str| read_in(root.path(), Path::new(file)).map_err(|error| error.to_string());
        nix::unistd::mkfifo(&root.path().join("pipe"), nix::sys::stat::Mode::S_IRWXU)?;
        assert!(read("pipe").is_err_and(|error| error.ends_with("/pipe: not a regular file")));
        File::create(root.path().join("large"))?.set_len(LARGEST_FILE + 1)?;
        assert!(read("large").is_err_and(|error| error.ends_with("/large: larger than 16777216 bytes")));
        assert_eq!(read("none"), Ok(None));
        Ok(())
    }

    #[test]
    fn named_namespace_has_its_own_files_one_by_one() -> Result<()> {
        let root = tempfile::tempdir()?;
        fs::create_dir_all(root.path().join("etc/netns/web"))?;
        fs::write(root.path().join("etc/hosts"), "agent hosts")?;
        fs::write(root.path().join("etc/resolv.conf"), "agent conf")?;
        fs::write(root.path().join("etc/netns/web/hosts"), "web hosts")?;
        let web = Files::Named("web".into());
        assert_eq!(web.read_one(root.path(), "hosts")?, "web hosts");
        assert_eq!(web.read_one(root.path(), "resolv.conf")?, "agent conf");
        assert_eq!(Files::Named("db".into()).read_one(root.path(), "hosts")?, "agent hosts");
        assert_eq!(Files::Own.read_one(root.path(), "nsswitch.conf")?, "");
        Ok(())
    }

    #[test]
    fn files_are_those_of_the_process_or_of_the_name() {
        let process = Process { pid: 7, start_time: 9 };
        let netns = |path: &str| crate::target::Netns { path: path.into(), inode: 1, own: false };
        let target = |process, netns| Target {
            name: String::new(),
            process,
            cgroup: None,
            netns: Some(netns),
            interface: None,
        };
        let of = |process, path| Files::of(&target(process, netns(path)));
        assert_eq!(of(Some(process.clone()), "/proc/7/ns/net"), Files::Process(process));
        assert_eq!(of(None, "/run/netns/web"), Files::Named("web".into()));
        assert_eq!(of(None, "/var/run/netns/web"), Files::Named("web".into()));
        assert_eq!(of(None, "/proc/self/ns/net"), Files::Own);
    }

    /// Needs root: these make network namespaces.
    mod privileged {
        use std::{
            collections::BTreeMap,
            io::BufRead,
            io::BufReader,
            net::UdpSocket,
            os::unix::fs::MetadataExt,
            process::{Child, Command, Stdio},
            sync::Mutex,
            thread,
            time::Instant,
        };

        use hickory_resolver::proto::{
            op::Message,
            rr::{RData, Record, RecordType},
        };

        use super::*;
        use crate::host::{netns::run_in_new, proc};

        /// A network namespace in which name servers answer at addresses of 127.0.0.0/8.
        struct Place {
            netns: Arc<Netns>,
            asked: Arc<Mutex<Vec<String>>>,
        }

        /// The addresses of each name; a name that is not there does not exist.
        type Zone = BTreeMap<&'static str, Vec<IpAddr>>;

        /// What a name server does.
        #[derive(Clone)]
        enum Server {
            Knows(Zone),
            Fails,
            IsSilent,
            /// Drops the questions for IPv6 addresses, as some load balancers do.
            IsSilentOnV6(Zone),
        }

        impl Place {
            fn new(servers: &[(&'static str, Server)]) -> Result<Self> {
                let asked = Arc::new(Mutex::new(Vec::new()));
                let (netns, sockets) = run_in_new(|| {
                    assert!(Command::new("ip").args(["link", "set", "lo", "up"]).status()?.success());
                    let path = Path::new("/proc/thread-self/ns/net");
                    let netns = Netns::find(path, fs::metadata(path)?.ino())?.context("just made")?;
                    let sockets = servers.iter().map(|(address, _)| UdpSocket::bind((*address, 53)));
                    Ok((netns, sockets.collect::<std::io::Result<Vec<_>>>()?))
                })?;
                for (socket, (_, server)) in sockets.into_iter().zip(servers.iter().cloned()) {
                    let asked = Arc::clone(&asked);
                    thread::spawn(move || server.serve(&socket, &asked));
                }
                Ok(Self { netns: Arc::new(netns), asked })
            }

            fn resolver(&self, target: &Sandbox) -> Resolver {
                Resolver::new(Arc::clone(&self.netns), Files::Process(target.process()))
            }

            /// The questions since the last call, each once, in order of the alphabet.
            fn asked(&self) -> Vec<String> {
                let mut asked = std::mem::take(&mut *self.asked.lock().expect("no panic"));
                asked.sort();
                asked.dedup();
                asked
            }
        }

        impl Server {
            fn serve(&self, socket: &UdpSocket, asked: &Mutex<Vec<String>>) {
                let mut bytes = [0; 1500];
                while let Ok((length, client)) = socket.recv_from(&mut bytes) {
                    let query = Message::from_vec(&bytes[..length]).expect("a query");
                    let question = query.queries[0].clone();
                    let (name, kind) = (question.name().to_lowercase().to_string(), question.query_type());
                    asked.lock().expect("no panic").push(format!("{name} {kind}"));
                    let mut reply = Message::response(query.id, query.op_code);
                    reply.add_query(question.clone());
                    match self {
                        Self::IsSilent => continue,
                        Self::IsSilentOnV6(_) if kind == RecordType::AAAA => continue,
                        Self::Fails => reply.metadata.response_code = ResponseCode::ServFail,
                        Self::Knows(zone) | Self::IsSilentOnV6(zone) => match zone.get(name.as_str()) {
                            None => reply.metadata.response_code = ResponseCode::NXDomain,
                            Some(addresses) => {
                                let of_kind =
                                    addresses.iter().filter(|a| a.is_ipv4() == (kind == RecordType::A));
                                for address in of_kind {
                                    let data = RData::from(*address);
                                    reply.add_answer(Record::from_rdata(question.name().clone(), 60, data));
                                }
                            }
                        },
                    }
                    socket.send_to(&reply.to_vec().expect("a reply"), client).expect("sent");
                }
            }
        }

        /// A process that sees an /etc/resolv.conf and an /etc/hosts of its own, as one in a container does.
        struct Sandbox {
            child: Child,
            dir: tempfile::TempDir,
        }

        impl Sandbox {
            fn new(conf: &str, hosts: &str) -> Result<Self> {
                let dir = tempfile::tempdir()?;
                fs::write(dir.path().join("resolv.conf"), conf)?;
                fs::write(dir.path().join("hosts"), hosts)?;
                let script = "mount --bind $0/resolv.conf /etc/resolv.conf && mount --bind $0/hosts /etc/hosts \
                              && echo ready && exec cat";
                let mut child = Command::new("unshare")
                    .args(["--mount", "sh", "-c", script])
                    .arg(dir.path())
                    .stdin(Stdio::piped())
                    .stdout(Stdio::piped())
                    .spawn()?;
                let mut line = String::new();
                BufReader::new(child.stdout.take().context("piped")?).read_line(&mut line)?;
                assert_eq!(line, "ready\n");
                Ok(Self { child, dir })
            }

            fn process(&self) -> Process {
                let pid = self.child.id().cast_signed();
                Process { pid, start_time: proc::stat(pid).expect("it runs").starttime }
            }

            /// Writes into the file, which stays the same one, as Docker does.
            fn write(&self, file: &str, text: &str) -> Result<()> {
                Ok(fs::write(self.dir.path().join(file), text)?)
            }
        }

        impl Drop for Sandbox {
            fn drop(&mut self) {
                // One that has ended is as good.
                let _ = self.child.kill();
                let _ = self.child.wait();
            }
        }

        fn addresses(list: &[&str]) -> Vec<IpAddr> {
            list.iter().map(|address| address.parse().expect("an address")).collect()
        }

        fn knows(zone: &[(&'static str, &[&str])]) -> Server {
            Server::Knows(zone.iter().map(|(name, list)| (*name, addresses(list))).collect())
        }

        #[test]
        fn the_server_of_that_namespace_answers() -> Result<()> {
            let near: &[&str] = &["fd00::2", "10.0.0.9", "10.0.0.1", "fd00::1", "10.0.0.9"];
            let near = Place::new(&[("127.0.0.1", knows(&[("db.test.", near)]))])?;
            let far = Place::new(&[("127.0.0.1", knows(&[("db.test.", &["10.9.9.9"])]))])?;
            let target = Sandbox::new("nameserver 127.0.0.1\n", "")?;
            let expected = addresses(&["10.0.0.1", "10.0.0.9", "fd00::1", "fd00::2"]);
            assert_eq!(near.resolver(&target).resolve("db.test")?, expected);
            assert_eq!(near.asked(), ["db.test. A", "db.test. AAAA"]);
            assert!(far.asked().is_empty());
            assert_eq!(far.resolver(&target).resolve("DB.test.")?, addresses(&["10.9.9.9"]));
            // Without a server the one on the host itself counts.
            target.write("resolv.conf", "")?;
            assert_eq!(far.resolver(&target).resolve("db.test")?, addresses(&["10.9.9.9"]));
            assert!(near.asked().is_empty());
            Ok(())
        }

        #[test]
        fn files_count_as_they_are_at_each_lookup() -> Result<()> {
            let first = knows(&[("db.b.test.", &["10.0.0.1"]), ("x.y.", &["10.0.0.4"])]);
            let second = knows(&[("db.b.test.", &["10.0.0.2"])]);
            let place = Place::new(&[("127.0.0.1", first), ("127.0.0.2", second)])?;
            let target = Sandbox::new("search a.test b.test\nnameserver 127.0.0.1\n", "")?;
            let resolver = place.resolver(&target);
            assert_eq!(resolver.resolve("db")?, addresses(&["10.0.0.1"]));
            assert_eq!(place.asked(), ["db.a.test. A", "db.a.test. AAAA", "db.b.test. A", "db.b.test. AAAA"]);

            assert_eq!(resolver.resolve("x.y")?, addresses(&["10.0.0.4"]));
            assert_eq!(place.asked(), ["x.y. A", "x.y. AAAA"]);
            target.write("resolv.conf", "search a.test b.test\noptions ndots:2\nnameserver 127.0.0.1\n")?;
            assert_eq!(resolver.resolve("x.y")?, addresses(&["10.0.0.4"]));
            assert_eq!(place.asked().len(), 6);

            target.write("hosts", "fd00::7 db\n10.0.0.7 db\n")?;
            assert_eq!(resolver.resolve("db")?, addresses(&["10.0.0.7", "fd00::7"]));
            assert!(place.asked().is_empty());

            target.write("hosts", "")?;
            target.write("resolv.conf", "search b.test\nnameserver 127.0.0.2\n")?;
            assert_eq!(resolver.resolve("db")?, addresses(&["10.0.0.2"]));
            Ok(())
        }

        #[test]
        fn the_next_server_is_asked_where_one_fails_or_is_silent_but_not_where_it_knows_of_none() -> Result<()>
        {
            let place = Place::new(&[
                ("127.0.0.1", Server::IsSilent),
                ("127.0.0.2", Server::Fails),
                ("127.0.0.3", knows(&[("db.", &["10.0.0.3"]), ("none.", &[])])),
            ])?;
            let target = Sandbox::new("nameserver 127.0.0.1\nnameserver 127.0.0.3\n", "")?;
            let resolver = place.resolver(&target);
            assert_eq!(resolver.resolve("db")?, addresses(&["10.0.0.3"]));
            target.write("resolv.conf", "nameserver 127.0.0.2\nnameserver 127.0.0.3\n")?;
            assert_eq!(resolver.resolve("db")?, addresses(&["10.0.0.3"]));

            let error = |name, servers: &[&str]| {
                target.write("resolv.conf", &format!("nameserver {}\n", servers.join("\nnameserver ")))?;
                let started = Instant::now();
                let error = resolver.resolve(name).expect_err("none");
                assert!(started.elapsed() < PATIENCE + Duration::from_secs(1), "{:?}", started.elapsed());
                anyhow::Ok(format!("{error:#}"))
            };
            assert_eq!(
                error("gone", &["127.0.0.3", "127.0.0.1"])?,
                "resolving gone: 127.0.0.3 says: no such name"
            );
            assert_eq!(error("none", &["127.0.0.3"])?, "resolving none: 127.0.0.3 says: no addresses");
            assert_eq!(
                error("db", &["127.0.0.2", "127.0.0.1"])?,
                "resolving db: 127.0.0.2 says: Server Failure; 127.0.0.1 did not answer"
            );
            let unreachable = error("db", &["192.0.2.1"])?;
            assert!(unreachable.starts_with("resolving db: 192.0.2.1 cannot be asked: "), "{unreachable}");
            assert_eq!(error("10.0.0.1", &["127.0.0.3"])?, "resolving 10.0.0.1: it is not a host name");
            Ok(())
        }

        #[test]
        fn one_kind_of_address_is_enough() -> Result<()> {
            let zone = Zone::from([("db.", addresses(&["10.0.0.1"]))]);
            let place = Place::new(&[("127.0.0.1", Server::IsSilentOnV6(zone))])?;
            let target = Sandbox::new("nameserver 127.0.0.1\n", "")?;
            assert_eq!(place.resolver(&target).resolve("db")?, addresses(&["10.0.0.1"]));
            Ok(())
        }

        #[test]
        fn files_of_a_process_that_ended_count_no_more() -> Result<()> {
            let place = Place::new(&[("127.0.0.1", knows(&[("db.", &["10.0.0.1"])]))])?;
            let target = Sandbox::new("", "")?;
            let resolver = place.resolver(&target);
            assert_eq!(resolver.resolve("db")?, addresses(&["10.0.0.1"]));
            let pid = target.process().pid;
            let another = Process { start_time: 1, ..target.process() };
            let stale = Resolver::new(Arc::clone(&place.netns), Files::Process(another));
            drop(target);
            for resolver in [resolver, stale] {
                let error = format!("{:#}", resolver.resolve("db").expect_err("gone"));
                assert_eq!(error, format!("resolving db: process {pid} is gone"));
            }
            Ok(())
        }
    }
}
