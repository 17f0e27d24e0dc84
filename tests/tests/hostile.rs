//! Nobody gets in who may not, nobody does more than he may, and whoever tries does not hold up a revert.

use std::{
    fs,
    io::{Read, Write},
    net::{IpAddr, SocketAddr, TcpStream},
    os::unix::fs::PermissionsExt,
    path::Path,
    process::Command,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant, SystemTime},
};

use anyhow::{Context, Result, bail, ensure};
use nix::{
    mount::{MntFlags, MsFlags, mount, umount2},
    sys::resource::{Resource, setrlimit},
};
use rcgen::{CertificateParams, ExtendedKeyUsagePurpose, Issuer, KeyPair, SanType};
use squall_proto::v1::{
    ArmRequest, CgroupSelector, CpuFault, DescribeRequest, Dns, DnsAnswer, Fault, Injection,
    InterfaceSelector, ListRequest, Loss, NetworkFault, Peer, ProcessSelector, RenewRequest, RevertRequest,
    SampleRequest, State, Target, UpdateRequest, WatchRequest, agent_client::AgentClient, fault, target,
};
use squall_tests::{
    Agent, AgentOptions, Certs, Dial, Lab, NetState, SECOND, Sockets, bin_dir, interface, unique,
    verify_audit, wait_for,
};
use tokio::io::AsyncReadExt;
use tokio_rustls::TlsConnector;
use tonic::{
    Code, Status,
    transport::{Certificate, Channel, ClientTlsConfig, Identity},
};
use tonic_health::pb::{HealthCheckRequest, health_client::HealthClient};

const PORT: u16 = 7400;
/// What a revert may take at the most while others make trouble, on a machine that is busy with other things too.
const PROMPT: Duration = Duration::from_secs(2);
const ROLES: [&str; 4] = ["root:admin", "ci:inject", "eve:observe", "ops:revert"];

/// An agent on the near side of a lab, and a network beside it that only it has an end of.
struct Node {
    certs: Certs,
    agent: Agent,
    lab: Lab,
    before: NetState,
}

impl Node {
    async fn start(tag: &str) -> Result<Self> {
        Self::with(tag, &[]).await
    }

    async fn with(tag: &str, args: &[&str]) -> Result<Self> {
        let lab = Lab::new(tag)?;
        let certs = Certs::new(&ROLES)?;
        let listen = certs.listen(Self::address());
        let args: Vec<&str> = listen.iter().map(String::as_str).chain(args.iter().copied()).collect();
        let before = lab.near.state()?;
        let options = AgentOptions { netns: Some(&lab.near), args: &args, ..AgentOptions::default() };
        let agent = Agent::start(options).await?;
        Ok(Self { certs, agent, lab, before })
    }

    fn address() -> SocketAddr {
        SocketAddr::new(Lab::NEAR, PORT)
    }

    fn dial_from(&self, from: IpAddr) -> Dial<'_> {
        Dial { netns: &self.lab.far, from, to: Self::address() }
    }

    async fn client(&self, name: &str) -> Result<AgentClient<Channel>> {
        self.dial_from(Lab::FAR_OTHER).client(self.certs.client(name)?).await
    }

    fn audit(&self) -> Result<Vec<serde_json::Value>> {
        let text = fs::read_to_string(self.agent.state_dir().join("audit.jsonl"))?;
        text.lines().map(|line| Ok(serde_json::from_str(line)?)).collect()
    }

    /// Fails unless the links, qdiscs and filters are as before.
    fn is_untouched(&self) -> Result<()> {
        let changes = self.before.changes(&self.lab.near.state()?);
        ensure!(changes.is_empty(), "{changes:?}\n{}", self.agent.log());
        Ok(())
    }
}

/// Loses what goes to one address that nobody has.
fn harmless() -> NetworkFault {
    NetworkFault {
        peers: vec![Peer { cidrs: vec!["10.99.0.77/32".to_owned()], ..Peer::default() }],
        loss: Some(Loss { ratio: 1.0, ..Loss::default() }),
        ..NetworkFault::default()
    }
}

fn network(id: &str, fault: NetworkFault) -> ArmRequest {
    ArmRequest {
        id: id.to_owned(),
        target: Some(interface("near0", "")),
        fault: Some(Fault { kind: Some(fault::Kind::Network(fault)) }),
        duration_ns: 120 * SECOND,
        lease_ns: 120 * SECOND,
        dry_run: false,
        only: Vec::new(),
    }
}

async fn inject(client: &mut AgentClient<Channel>, request: ArmRequest) -> Result<Injection, Status> {
    let made = client.inject(request).await?.into_inner().injections;
    let [injection] = <[Injection; 1]>::try_from(made).map_err(|all| Status::internal(format!("{all:?}")))?;
    if injection.state() != State::Active {
        return Err(Status::internal(format!("{injection:?}")));
    }
    Ok(injection)
}

/// Reverts an injection; how long that took.
async fn revert(client: &mut AgentClient<Channel>, id: &str) -> Result<Duration> {
    let started = Instant::now();
    let ended =
        client.revert(RevertRequest { ids: vec![id.to_owned()], all: false }).await?.into_inner().injections;
    ensure!(ended.len() == 1 && ended[0].state() == State::Reverted, "{ended:?}");
    Ok(started.elapsed())
}

/// Fails unless the call was refused with this status.
fn refused<T>(what: &str, done: Result<T, Status>, code: Code) -> Result<String> {
    let status = done.err().with_context(|| format!("{what} was let through"))?;
    ensure!(status.code() == code, "{what}: {status:?} instead of {code:?}");
    Ok(status.message().to_owned())
}

/// A client certificate of this CA, for this long.
fn short_lived(
    certs: &Certs,
    name: &str,
    from: SystemTime,
    to: SystemTime,
    usage: ExtendedKeyUsagePurpose,
) -> Result<ClientTlsConfig> {
    let ca = KeyPair::from_pem(&certs.read("ca-key.pem")?)?;
    let ca = Issuer::from_ca_cert_pem(&certs.read("ca.pem")?, ca)?;
    let mut params = CertificateParams::default();
    params.subject_alt_names = vec![SanType::URI(name.try_into()?)];
    params.extended_key_usages = vec![usage];
    (params.not_before, params.not_after) = (from.into(), to.into());
    let key = KeyPair::generate()?;
    let made = params.signed_by(&key, &ca)?;
    Ok(certs.nobody()?.identity(Identity::from_pem(made.pem(), key.serialize_pem())))
}

#[tokio::test(flavor = "multi_thread")]
async fn only_a_valid_certificate_of_the_ca_gets_in() -> Result<()> {
    const HOUR: Duration = Duration::from_secs(3600);
    let node = Node::start("ca").await?;
    let (now, admin) = (SystemTime::now(), "spiffe://squall/admin/root");
    let others = Certs::new(&ROLES)?;
    let others = others.client("root")?;
    let client = ExtendedKeyUsagePurpose::ClientAuth;
    let short = |from, to, usage| short_lived(&node.certs, admin, from, to, usage);
    let strangers = [
        ("no certificate", node.certs.nobody()?),
        ("another CA", others.ca_certificate(Certificate::from_pem(node.certs.read("ca.pem")?))),
        ("an expired one", short(now - 2 * HOUR, now - HOUR, client.clone())?),
        ("one of tomorrow", short(now + HOUR, now + 2 * HOUR, client.clone())?),
        ("one of a server", short(now - HOUR, now + HOUR, ExtendedKeyUsagePurpose::ServerAuth)?),
        ("the agent's own", node.certs.client("agent")?),
    ];
    for (what, tls) in strangers {
        // In TLS 1.3 a client learns of it with the first answer.
        let done = match node.dial_from(Lab::FAR_OTHER).client(tls).await {
            Ok(mut client) => {
                inject(&mut client, network("stranger", harmless())).await.map_err(|e| format!("{e:?}"))
            }
            Err(e) => Err(format!("{e:#}")),
        };
        println!("{what}: {}", done.err().with_context(|| format!("{what} was let in"))?);
    }
    // Without TLS.
    let mut plain = node.dial_from(Lab::FAR_OTHER).tcp()?;
    plain.set_read_timeout(Some(Duration::from_secs(20)))?;
    plain.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0")?;
    let mut answer = Vec::new();
    let _reset_or_closed = plain.read_to_end(&mut answer);
    ensure!(!answer.windows(5).any(|bytes| bytes == [0, 0, 0, 4, 1]), "HTTP/2 without TLS: {answer:?}");

    // The same with everything right.
    let mut valid =
        node.dial_from(Lab::FAR_OTHER).client(short(now - HOUR, now + HOUR, client.clone())?).await?;
    let none = valid.list(ListRequest {}).await?.into_inner().injections;
    ensure!(none.is_empty(), "{none:?}");
    inject(&mut valid, network("mine", harmless())).await?;
    revert(&mut valid, "mine").await?;

    // A connection ends with its certificate, and so do its streams.
    let brief = short(now - HOUR, SystemTime::now() + Duration::from_secs(4), client)?;
    let mut brief = node.dial_from(Lab::FAR_OTHER).client(brief).await?;
    let mut stream = brief.watch(WatchRequest::default()).await?.into_inner();
    let ended = tokio::time::timeout(Duration::from_secs(60), async {
        while let Ok(Some(_)) = stream.message().await {}
    });
    ended.await.context("the stream outlives the certificate")?;
    ensure!(brief.list(ListRequest {}).await.is_err());
    node.is_untouched()
}

#[tokio::test(flavor = "multi_thread")]
async fn nobody_does_more_than_his_role_allows() -> Result<()> {
    let node = Node::start("roles").await?;
    node.certs.rules(
        "  - { who: spiffe://squall/admin/root, role: admin }\n  \
           - who: spiffe://squall/inject/*\n    role: inject\n    faults: [network]\n    longest: 5m\n    mostInjections: 2\n    \
             targets: [{ netns: own, interface: near0 }]\n  \
           - { who: spiffe://squall/observe/eve, role: observe }\n",
    )?;
    // The policy of the start had a rule for ops; this one has not.
    let mut ops = node.client("ops").await?;
    let mut tries = 0;
    while ops.list(ListRequest {}).await.is_ok() {
        tries += 1;
        ensure!(tries < 200, "the policy was not read again: {}", node.agent.log());
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    let denied = Code::PermissionDenied;
    let said = refused("list", ops.list(ListRequest {}).await, denied)?;
    ensure!(said.contains("spiffe://squall/revert/ops") && said.contains("in no rule"), "{said}");
    refused("revert", ops.revert(RevertRequest { ids: vec![], all: true }).await, denied)?;
    refused("describe", ops.describe(DescribeRequest::default()).await, denied)?;
    let channel = node.dial_from(Lab::FAR_OTHER).channel(node.certs.client("ops")?).await?;
    let mut health = HealthClient::new(channel);
    refused("health", health.check(HealthCheckRequest::default()).await, denied)?;

    let mut eve = node.client("eve").await?;
    refused("inject", inject(&mut eve, network("x", harmless())).await, denied)?;
    refused("arm", eve.arm(network("x", harmless())).await, denied)?;
    refused("dry run", eve.inject(ArmRequest { dry_run: true, ..network("x", harmless()) }).await, denied)?;
    refused("renew", eve.renew(RenewRequest::default()).await, denied)?;
    let target = Some(interface("near0", ""));
    eve.sample(SampleRequest { target, interval_ns: 0 }).await.context("sample")?;

    let mut ci = node.client("ci").await?;
    let cpu = Some(Fault { kind: Some(fault::Kind::Cpu(CpuFault { load: 0.1, workers: 1 })) });
    let me = ProcessSelector { pid: node.agent.pid(), ..ProcessSelector::default() };
    let me = Some(Target { kind: Some(target::Kind::Process(me)) });
    let wrong = [
        ("another kind", ArmRequest { fault: cpu, target: me, ..network("x", harmless()) }),
        ("another target", ArmRequest { target: Some(interface("lo", "")), ..network("x", harmless()) }),
        ("too long", ArmRequest { duration_ns: 301 * SECOND, ..network("x", harmless()) }),
    ];
    for (what, request) in wrong {
        println!("{what}: {}", refused(what, inject(&mut ci, request).await, denied)?);
    }
    let elsewhere = NetworkFault { interface: "lo".to_owned(), ..harmless() };
    refused("another interface", inject(&mut ci, network("x", elsewhere)).await, Code::InvalidArgument)?;
    node.is_untouched()?;
    inject(&mut ci, network("one", harmless())).await?;
    inject(&mut ci, network("two", harmless())).await?;
    let said = refused("a third", inject(&mut ci, network("three", harmless())).await, denied)?;
    ensure!(said.contains("has 2 injections and may have 2"), "{said}");

    // What others injected is not his to change, and his to revert.
    let mut root = node.client("root").await?;
    inject(&mut root, network("of-root", harmless())).await?;
    refused("renew", ci.renew(RenewRequest { ids: vec!["of-root".into()] }).await, denied)?;
    let fault = network("", harmless()).fault;
    refused("update", ci.update(UpdateRequest { id: "of-root".into(), fault: fault.clone() }).await, denied)?;
    ci.update(UpdateRequest { id: "one".into(), fault }).await.context("update one's own")?;
    revert(&mut ci, "of-root").await?;
    revert(&mut eve, "one").await?;
    inject(&mut ci, network("three", harmless())).await.context("there is room again")?;
    eve.revert(RevertRequest { ids: vec![], all: true }).await?;
    node.is_untouched()?;

    // All of it is written down, and nobody changes that unseen.
    let lines = node.audit()?;
    let find = |method: &str, who: &str, verdict: &str| {
        let is = |line: &&serde_json::Value, key: &str, value: &str| {
            line[key].as_str().is_some_and(|v| v.contains(value))
        };
        lines.iter().find(|l| is(l, "method", method) && is(l, "who", who) && is(l, "verdict", verdict))
    };
    for (method, who, verdict) in [
        ("Check", "revert/ops", "refused"),
        ("Revert", "revert/ops", "refused"),
        ("Inject", "observe/eve", "refused"),
        ("Inject", "inject/ci", "refused"),
        ("Update", "inject/ci", "refused"),
        ("Update", "inject/ci", "allowed"),
        ("Inject", "admin/root", "allowed"),
        ("Revert", "observe/eve", "allowed"),
    ] {
        ensure!(find(method, who, verdict).is_some(), "no {method} of {who} {verdict} in {lines:#?}");
    }
    let injected =
        lines.iter().find(|l| l["ids"][0] == "one" && l["method"] == "Inject").context("no injection")?;
    ensure!(injected["verdict"] == "allowed" && injected["kind"] == "network", "{injected}");
    ensure!(injected["target"] == "interface near0" && injected["role"] == "Inject", "{injected}");
    ensure!(injected["summary"].as_str().is_some_and(|s| s.contains("10.99.0.77")), "{injected}");
    let log = node.agent.state_dir().join("audit.jsonl");
    let (whole, said) = verify_audit(&log)?;
    ensure!(whole, "{said}");
    let copy = node.certs.path("copy.jsonl");
    fs::write(&copy, fs::read_to_string(&log)?.replacen("observe/eve", "observe/bob", 1))?;
    let (whole, said) = verify_audit(&copy)?;
    ensure!(!whole && said.contains("copy.jsonl line "), "{said}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn no_id_makes_room_or_gets_into_an_order_of_somebody_else() -> Result<()> {
    let node = Node::start("ids").await?;
    let targets = "[{ netns: own, interface: near0 }]";
    node.certs.rules(&format!(
        "  - {{ who: spiffe://squall/admin/root, role: admin }}\n  \
           - {{ who: spiffe://squall/inject/*, role: inject, mostInjections: 2, targets: {targets} }}\n",
    ))?;
    let mut eve = node.client("eve").await?;
    let mut tries = 0;
    while eve.list(ListRequest {}).await.is_ok() {
        tries += 1;
        ensure!(tries < 200, "the policy was not read again: {}", node.agent.log());
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    let mut ci = node.client("ci").await?;
    for id in ["one", "x.x.x.x"] {
        inject(&mut ci, network(id, harmless())).await?;
    }
    for id in ["x.x.x", "x.x", "x"] {
        let said = refused(id, inject(&mut ci, network(id, harmless())).await, Code::PermissionDenied)?;
        ensure!(said.contains("has 2 injections and may have 2"), "{said}");
    }
    // The same again is no other.
    inject(&mut ci, network("one", harmless())).await?;
    let mut root = node.client("root").await?;
    let said =
        refused("a part", inject(&mut root, network("one.7", harmless())).await, Code::InvalidArgument)?;
    ensure!(said.contains("id: one.7: it would be a part of the order one; choose"), "{said}");
    inject(&mut root, network("one.of-root", harmless())).await?;
    let renewed = ci.renew(RenewRequest { ids: vec!["one".into()] }).await?.into_inner();
    ensure!(renewed.gone.is_empty(), "{renewed:?}");
    root.revert(RevertRequest { ids: vec![], all: true }).await?;
    node.is_untouched()
}

/// Texts that somebody's shell, path, log or format would stumble over.
const TEXTS: [&str; 12] = [
    "../../../../etc/cron.d/x",
    "/etc/passwd",
    "..",
    "$(touch /tmp/squall-hostile)",
    "`touch /tmp/squall-hostile`",
    "; touch /tmp/squall-hostile ;",
    "x\n2026-01-01T00:00:00Z  INFO forged",
    "x\r\n\u{1b}[2J",
    "\"},{\"verdict\":\"allowed\"",
    "%s%n%x",
    "-rf",
    "ü\u{202e}\u{0}",
];

#[tokio::test(flavor = "multi_thread")]
async fn no_text_does_more_than_it_says() -> Result<()> {
    let node = Node::start("texts").await?;
    let mut client = node.client("root").await?;
    let files = || -> Result<Vec<String>> {
        let list = |dir: &Path| -> Result<Vec<String>> {
            fs::read_dir(dir)?.map(|entry| Ok(entry?.path().display().to_string())).collect()
        };
        let state = node.agent.state_dir();
        Ok([list(&state)?, list(&state.join("journal"))?, list(Path::new("/etc/cron.d")).unwrap_or_default()]
            .concat())
    };
    let mut before = files()?;
    let mut tried = 0;
    for text in TEXTS {
        let hosts = Peer { hosts: vec![text.to_owned()], ..Peer::default() };
        let cidrs = Peer { cidrs: vec![text.to_owned()], ..Peer::default() };
        let process = |selector| Some(Target { kind: Some(target::Kind::Process(selector)) });
        let with = |change: &dyn Fn(&mut ArmRequest)| {
            let mut request = network("texts", harmless());
            change(&mut request);
            request
        };
        let fault = |fault: NetworkFault| network("texts", fault);
        let dns = |names: &str, address: &str| {
            let (names, addresses) = (vec![names.to_owned()], vec![address.to_owned()]);
            let dns = Dns { names, addresses, answer: DnsAnswer::Addresses.into(), ..Dns::default() };
            fault(NetworkFault { dns: Some(dns), ..NetworkFault::default() })
        };
        let selector =
            |exe: &str, cmdline: &str| ProcessSelector { pid: 0, exe: exe.into(), cmdline: cmdline.into() };
        let requests = [
            with(&|r| r.id = text.to_owned()),
            with(&|r| r.target = process(selector(text, ""))),
            with(&|r| r.target = process(selector("", &format!("squall-none{text}")))),
            with(&|r| {
                r.target =
                    Some(Target { kind: Some(target::Kind::Cgroup(CgroupSelector { path: text.into() })) });
            }),
            with(&|r| {
                let selector = InterfaceSelector { name: text.into(), netns: String::new() };
                r.target = Some(Target { kind: Some(target::Kind::Interface(selector)) });
            }),
            with(&|r| {
                let selector = InterfaceSelector { name: "near0".into(), netns: text.into() };
                r.target = Some(Target { kind: Some(target::Kind::Interface(selector)) });
            }),
            fault(NetworkFault { interface: text.to_owned(), ..harmless() }),
            fault(NetworkFault { peers: vec![hosts.clone()], ..harmless() }),
            fault(NetworkFault { peers: vec![cidrs.clone()], ..harmless() }),
            fault(NetworkFault { except: vec![hosts], ..harmless() }),
            fault(NetworkFault { except: vec![cidrs], ..harmless() }),
            dns(text, "10.99.0.9"),
            dns("shop.test", text),
        ];
        for request in requests {
            // `-rf` is a good id, and does no harm.
            if request.id == "-rf" {
                inject(&mut client, request).await?;
                revert(&mut client, "-rf").await?;
                continue;
            }
            tried += 1;
            let shown = format!("{request:?}");
            let status =
                inject(&mut client, request).await.err().with_context(|| format!("let through: {shown}"))?;
            let known =
                [Code::InvalidArgument, Code::NotFound, Code::FailedPrecondition, Code::PermissionDenied];
            ensure!(known.contains(&status.code()), "{shown}: {status:?}");
        }
        if text == "-rf" {
            continue;
        }
        refused(
            "fire",
            client.fire(squall_proto::v1::FireRequest { ids: vec![text.into()] }).await,
            Code::NotFound,
        )?;
        refused(
            "revert",
            client.revert(RevertRequest { ids: vec![text.into()], all: false }).await,
            Code::NotFound,
        )?;
        let update = UpdateRequest { id: text.into(), fault: network("", harmless()).fault };
        let done = client.update(update).await.err().context("update was let through")?;
        ensure!([Code::NotFound, Code::AlreadyExists].contains(&done.code()), "{done:?}");
    }
    println!("{tried} requests with texts of {} kinds were refused", TEXTS.len());
    let mut after = files()?;
    before.sort();
    after.sort();
    ensure!(before == after, "{before:?} became {after:?}");
    ensure!(!Path::new("/tmp/squall-hostile").exists(), "a shell ran it");
    let forged = node.agent.log().lines().any(|line| line.starts_with("2026-01-01"));
    ensure!(!forged, "{}", node.agent.log());
    let (whole, said) = verify_audit(&node.agent.state_dir().join("audit.jsonl"))?;
    ensure!(whole, "{said}");
    node.is_untouched()
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_too_much_or_said_twice_changes_nothing() -> Result<()> {
    let node = Node::start("twice").await?;
    let mut client = node.client("root").await?;
    let long = "x".repeat(2 << 20);
    let status =
        inject(&mut client, network(&long, harmless())).await.err().context("2 MiB were let through")?;
    ensure!([Code::OutOfRange, Code::ResourceExhausted].contains(&status.code()), "{status:?}");
    let ids = vec!["x".to_owned(); 2000];
    refused("2000 ids", client.revert(RevertRequest { ids, all: false }).await, Code::InvalidArgument)?;
    let targets = vec![interface("near0", ""); 65];
    refused(
        "65 targets",
        client.describe(DescribeRequest { targets, fault: None }).await,
        Code::InvalidArgument,
    )?;
    node.is_untouched()?;

    let first = inject(&mut client, network("once", harmless())).await?;
    let replayed = inject(&mut client, network("once", harmless())).await?;
    ensure!(
        (first.seed, first.fired_boot_ns) == (replayed.seed, replayed.fired_boot_ns),
        "{first:?} {replayed:?}"
    );
    let other = ArmRequest { duration_ns: 60 * SECOND, ..network("once", harmless()) };
    refused("another with its id", inject(&mut client, other).await, Code::AlreadyExists)?;
    ensure!(client.list(ListRequest {}).await?.into_inner().injections.len() == 1);
    // A replay by somebody else does not make it his.
    let mut ci = node.client("ci").await?;
    let _same = ci.inject(network("once", harmless())).await;
    refused("renew", ci.renew(RenewRequest { ids: vec!["once".into()] }).await, Code::PermissionDenied)?;
    revert(&mut client, "once").await?;
    let again = client.inject(network("once", harmless())).await?.into_inner().injections;
    ensure!(again.len() == 1 && again[0].state() == State::Reverted, "a replay after its end: {again:?}");
    node.is_untouched()
}

/// What an agent has open.
fn files(agent: &Agent) -> Result<usize> {
    Ok(fs::read_dir(format!("/proc/{}/fd", agent.pid()))?.count())
}

#[tokio::test(flavor = "multi_thread")]
async fn ten_thousand_connections_do_not_hold_up_a_revert() -> Result<()> {
    const CONNECTIONS: usize = 10_000;
    setrlimit(Resource::RLIMIT_NOFILE, 15_000, 15_000).context("raise the limit of open files")?;
    let node = Node::start("flood").await?;
    let mut local = node.agent.client().await?;
    let mut remote = node.client("root").await?;
    remote.list(ListRequest {}).await?;
    let before = files(&node.agent)?;
    let flooder = node.dial_from(Lab::FAR);

    // Half-open: some say nothing, some begin a handshake and stop. None of them is closed before the end.
    let mut open = Vec::new();
    let (mut slowest, mut made) = ([Duration::ZERO; 2], 0);
    while made < CONNECTIONS {
        let batch: Vec<TcpStream> = node.lab.far.inside(|| {
            let connect = |n: usize| -> Result<TcpStream> {
                let mut stream = TcpStream::connect_timeout(&flooder.to, Duration::from_secs(60))?;
                if n.is_multiple_of(2) {
                    // The first bytes of a ClientHello of 512 bytes. It may be closed already.
                    let _full = stream.write_all(&[0x16, 3, 1, 2, 0, 1, 0, 1, 0xfc, 3, 3]);
                }
                Ok(stream)
            };
            (0..500).map(connect).collect()
        })?;
        made += batch.len();
        open.extend(batch);
        for (client, slowest) in [&mut local, &mut remote].into_iter().zip(&mut slowest) {
            let id = unique("flood");
            inject(client, network(&id, harmless())).await?;
            *slowest = revert(client, &id).await?.max(*slowest);
        }
    }
    println!(
        "{made} connections, meanwhile the slowest revert: {:?} by the socket, {:?} by TLS",
        slowest[0], slowest[1]
    );
    ensure!(slowest.iter().all(|time| *time < PROMPT), "{slowest:?}");
    let during = files(&node.agent)?;
    ensure!(during < before + 200, "{during} open files, {before} before");
    // From elsewhere one still gets in.
    let mut late = node.client("eve").await?;
    late.list(ListRequest {}).await.context("a client at another address")?;
    // What is half open is closed by the agent.
    wait_for("the half-open ones to be gone", Duration::from_secs(60), || {
        Ok((files(&node.agent)? <= before + 8).then_some(()))
    })?;
    drop(open);
    node.is_untouched()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_takes_all_he_gets_leaves_the_rest_to_others() -> Result<()> {
    let node = Node::start("greedy").await?;
    let mut root = node.client("root").await?;
    inject(&mut root, network("greedy", harmless())).await?;
    // Connections of one name, each asked something, so that it is surely made.
    let mut mine = Vec::new();
    let dial = node.dial_from(Lab::FAR);
    for _ in 0..200 {
        let Ok(mut client) = dial.client(node.certs.client("eve")?).await else { continue };
        if client.list(ListRequest {}).await.is_ok() {
            mine.push(client);
        }
    }
    ensure!(mine.len() == 64, "{} connections of one name", mine.len());
    // Streams on them that nobody reads.
    let mut streams = Vec::new();
    let mut full = None;
    'all: for client in &mut mine {
        for _ in 0..4 {
            match client.watch(WatchRequest { ids: vec![], interval_ns: 1 }).await {
                Ok(stream) => streams.push(stream),
                Err(status) => {
                    full = Some(status);
                    break 'all;
                }
            }
        }
    }
    let full = full.context("there is no end of streams")?;
    ensure!(full.code() == Code::ResourceExhausted && full.message().contains("streams"), "{full:?}");
    println!("{} connections and {} streams of one client", mine.len(), streams.len());
    // And questions that take long to answer, all the time.
    let refused = Arc::new(AtomicUsize::new(0));
    let ask = |mut client: AgentClient<Channel>, refused: Arc<AtomicUsize>| async move {
        let exe = ProcessSelector { exe: "squall-none".to_owned(), ..ProcessSelector::default() };
        let targets = vec![Target { kind: Some(target::Kind::Process(exe)) }; 64];
        loop {
            match client.describe(DescribeRequest { targets: targets.clone(), fault: None }).await {
                Ok(_) => {}
                // All of them run on the machine that they are about.
                Err(status) if status.code() == Code::ResourceExhausted => {
                    refused.fetch_add(1, Ordering::Relaxed);
                    tokio::time::sleep(Duration::from_millis(50)).await;
                }
                Err(_) => return,
            }
        }
    };
    let mut asking = tokio::task::JoinSet::new();
    // More than the places for calls of one name.
    for client in &mine[..40] {
        asking.spawn(ask(client.clone(), Arc::clone(&refused)));
    }
    // He may still revert, and others may do everything.
    let mut slowest = revert(&mut mine[0], "greedy").await?;
    let mut ci = node.client("ci").await?;
    let mut local = node.agent.client().await?;
    for _ in 0..5 {
        let id = unique("other");
        inject(&mut ci, network(&id, harmless())).await?;
        slowest = slowest.max(revert(&mut local, &id).await?);
        let id = unique("local");
        inject(&mut local, network(&id, harmless())).await?;
        slowest = slowest.max(revert(&mut ci, &id).await?);
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    ci.watch(WatchRequest::default()).await.context("a stream of somebody else")?;
    ensure!(asking.try_join_next().is_none(), "they do not ask any more");
    ensure!(refused.load(Ordering::Relaxed) > 0, "as many questions of one client as he likes");
    println!("meanwhile the slowest revert: {slowest:?}");
    ensure!(slowest < PROMPT, "{slowest:?}");
    asking.shutdown().await;
    node.is_untouched()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_falls_silent_is_sent_away() -> Result<()> {
    let node = Node::start("silent").await?;
    let dial = node.dial_from(Lab::FAR_OTHER);
    // One that is there and has nothing to say, by its answers to pings.
    let mut idle = node.client("eve").await?;
    idle.list(ListRequest {}).await?;
    // Others shake hands, and then nothing comes from them any more.
    let connector = TlsConnector::from(node.certs.rustls("ci")?);
    let mut silent = Vec::new();
    for _ in 0..10 {
        let stream = dial.tcp()?;
        stream.set_nonblocking(true)?;
        let stream = tokio::net::TcpStream::from_std(stream)?;
        silent.push(connector.connect(Lab::NEAR.into(), stream).await?);
    }
    let started = Instant::now();
    for stream in &mut silent {
        let mut said = Vec::new();
        // It hears settings and pings, and answers nothing.
        let end = tokio::time::timeout(Duration::from_secs(120), stream.read_to_end(&mut said)).await;
        end.context("a silent client is kept")?.err().context("a silent client is told to go")?;
        ensure!(!said.is_empty(), "it was never let in");
    }
    println!("silent clients were sent away after {:?}", started.elapsed());
    idle.list(ListRequest {}).await.context("the idle one is gone too")?;
    node.is_untouched()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_that_is_cut_off_can_be_reverted_from_afar() -> Result<()> {
    let node = Node::with("lockout", &["--allow-whole-node-network"]).await?;
    let other = node.lab.near.listen(7000)?;
    let reach = |port: u16| -> Result<bool> {
        let to = SocketAddr::new(Lab::NEAR, port);
        Ok(node.lab.far.connect(to, Duration::from_secs(2))?.is_ok())
    };
    ensure!(reach(other.local_addr()?.port())?);
    let loss = Some(Loss { ratio: 1.0, ..Loss::default() });
    let everything = [
        NetworkFault { loss, ..NetworkFault::default() },
        NetworkFault { loss, unprotected: true, ..NetworkFault::default() },
        NetworkFault { partition: true, unprotected: true, ..NetworkFault::default() },
        NetworkFault { reset: true, unprotected: true, ..NetworkFault::default() },
    ];
    for fault in everything {
        // The connection by which it is injected, and no other, must last.
        let mut client = node.client("root").await?;
        let kind = format!(
            "loss {} partition {} reset {} unprotected {}",
            fault.loss.is_some(),
            fault.partition,
            fault.reset,
            fault.unprotected
        );
        let cut = !fault.reset;
        let id = unique("lockout");
        inject(&mut client, network(&id, fault)).await?;
        if cut {
            let ping = node.lab.far.ping(Lab::NEAR, 5, Duration::from_millis(20))?;
            ensure!(ping.loss() == 1.0, "{kind}: {ping:?}");
        }
        ensure!(!reach(7000)?, "{kind}: others get through");
        for _ in 0..5 {
            let list = client
                .list(ListRequest {})
                .await
                .with_context(|| format!("{kind}: the connection is lost"))?;
            ensure!(list.into_inner().injections.iter().any(|i| i.id == id && i.state() == State::Active));
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
        client.renew(RenewRequest { ids: vec![id.clone()] }).await?;
        // A new one works too, also where the neighbours have to be found anew.
        node.lab.far.ip("neigh flush dev far0")?;
        node.lab.near.ip("neigh flush dev near0")?;
        let mut fresh = node.client("eve").await.with_context(|| format!("{kind}: no new connection"))?;
        fresh.list(ListRequest {}).await?;
        let took = revert(&mut client, &id).await?;
        println!("{kind}: reverted from afar in {took:?}");
        ensure!(reach(7000)?, "{kind}: still cut off");
        node.is_untouched()?;
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn without_an_audit_log_nothing_is_injected_and_reverts_work() -> Result<()> {
    let disk = Disk::new("1m")?;
    let lab = Lab::new("audit")?;
    let options =
        AgentOptions { netns: Some(&lab.near), state_dir: Some(disk.0.path()), ..AgentOptions::default() };
    let agent = Agent::start(options).await?;
    let before = lab.near.state()?;
    let mut client = agent.client().await?;
    inject(&mut client, network("before", harmless())).await?;
    let mut filler = fs::File::create(disk.0.path().join("filler"))?;
    while filler.write_all(&[0; 1]).is_ok() {}
    // Until its last page is full the log has some room; what comes after it, the journal, has none.
    let mut said = String::new();
    for n in 0..20 {
        let status = inject(&mut client, network(&format!("full-{n}"), harmless())).await.err();
        said = status.context("it injects with a full disk")?.to_string();
    }
    ensure!(said.contains("audit log cannot be written"), "{said}");
    revert(&mut client, "before").await?;
    let changes = before.changes(&lab.near.state()?);
    ensure!(changes.is_empty(), "{changes:?}");
    drop(filler);
    fs::remove_file(disk.0.path().join("filler"))?;
    inject(&mut client, network("after", harmless())).await?;
    revert(&mut client, "after").await?;
    let log = disk.0.path().join("audit.jsonl");
    wait_for("the last line", Duration::from_secs(10), || {
        Ok(fs::read_to_string(&log)?.lines().last().is_some_and(|line| line.contains("Revert")).then_some(()))
    })?;
    let (whole, said) = verify_audit(&log)?;
    ensure!(whole, "{said}");
    drop((agent, lab));
    Ok(())
}

/// A small disk in memory.
struct Disk(tempfile::TempDir);

impl Disk {
    fn new(size: &str) -> Result<Self> {
        let dir = tempfile::tempdir()?;
        let (tmpfs, options) = (Some("tmpfs"), format!("size={size}"));
        mount(tmpfs, dir.path(), tmpfs, MsFlags::empty(), Some(options.as_str()))?;
        Ok(Self(dir))
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        if let Err(e) = umount2(self.0.path(), MntFlags::MNT_DETACH) {
            eprintln!("cannot unmount {}: {e}", self.0.path().display());
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn certificates_and_policy_are_read_again() -> Result<()> {
    let node = Node::start("again").await?;
    let mut old = node.client("ci").await?;
    let others = Certs::new(&ROLES)?;
    let log = |what: &str| {
        wait_for(what, Duration::from_secs(30), || Ok(node.agent.log().contains(what).then_some(())))
    };
    // What is no good changes nothing.
    fs::write(node.certs.path("agent.pem"), "nonsense")?;
    node.certs.rules("  - { who: spiffe://squall/inject/ci, role: god }\n")?;
    log("no certificate in PEM")?;
    log("unknown variant `god`")?;
    node.client("ci").await?.list(ListRequest {}).await?;
    old.list(ListRequest {}).await?;
    // Another CA for both sides, key before certificate.
    for file in ["agent-key.pem", "agent.pem", "ca.pem"] {
        fs::copy(others.path(file), node.certs.path(file))?;
    }
    node.certs.rules("  - { who: spiffe://squall/inject/ci, role: observe }\n")?;
    let dial = node.dial_from(Lab::FAR_OTHER);
    let started = Instant::now();
    let mut new = loop {
        if let Ok(mut client) = dial.client(others.client("ci")?).await
            && client.list(ListRequest {}).await.is_ok()
        {
            break client;
        }
        ensure!(started.elapsed() < Duration::from_secs(30), "{}", node.agent.log());
        tokio::time::sleep(Duration::from_millis(200)).await;
    };
    let stale = match node.client("ci").await {
        Ok(mut client) => client.list(ListRequest {}).await.is_ok(),
        Err(_) => false,
    };
    ensure!(!stale, "a client of the old CA is let in");
    let started = Instant::now();
    while inject(&mut new, network("x", harmless())).await.err().map(|e| e.code())
        != Some(Code::PermissionDenied)
    {
        ensure!(started.elapsed() < Duration::from_secs(30), "{}", node.agent.log());
        new.revert(RevertRequest { ids: vec![], all: true }).await?;
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
    node.is_untouched()
}

#[tokio::test(flavor = "multi_thread")]
async fn an_agent_does_not_start_open() -> Result<()> {
    let certs = Certs::new(&ROLES)?;
    let start = async |args: &[&str]| {
        let options = AgentOptions { args, ..AgentOptions::default() };
        match Agent::start(options).await {
            Ok(_) => bail!("it starts with {args:?}"),
            Err(e) => Ok(format!("{e:#}")),
        }
    };
    let policy = certs.path("policy.yaml").display().to_string();
    let said = start(&["--listen-insecure", "0.0.0.0:0", "--policy", &policy]).await?;
    ensure!(said.contains("--listen-insecure: 0.0.0.0:0") && said.contains("loopback"), "{said}");
    let said = start(&["--listen", "127.0.0.1:0"]).await?;
    ensure!(said.contains("--tls-cert") && said.contains("--policy"), "{said}");
    let listen = certs.listen("127.0.0.1:0".parse()?);
    let listen: Vec<&str> = listen.iter().map(String::as_str).collect();
    fs::set_permissions(certs.path("agent-key.pem"), fs::Permissions::from_mode(0o640))?;
    let said = start(&listen).await?;
    ensure!(said.contains("agent-key.pem") && said.contains("chmod 600"), "{said}");
    fs::set_permissions(certs.path("agent-key.pem"), fs::Permissions::from_mode(0o600))?;
    fs::copy(certs.path("ci-key.pem"), certs.path("agent-key.pem"))?;
    let said = start(&listen).await?;
    ensure!(said.contains("--tls-cert and --tls-key do not go together"), "{said}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn the_controller_speaks_tls() -> Result<()> {
    let node = Node::start("controller").await?;
    let others = Certs::new(&ROLES)?;
    let squall = |certs: &Certs, name: &str, words: &str| -> Result<(Option<i32>, String)> {
        let mut command: Command = node.lab.far.command(bin_dir().join("squall"));
        command.args(words.split(' ')).args(["--agents", "https://10.99.0.1:7400"]);
        command.env("SQUALL_TLS_CERT", certs.path(&format!("{name}.pem")));
        command.env("SQUALL_TLS_KEY", certs.path(&format!("{name}-key.pem")));
        command.env("SQUALL_TLS_CA", certs.path("ca.pem"));
        let done = command.output()?;
        Ok((done.status.code(), String::from_utf8_lossy(&[done.stdout, done.stderr].concat()).into_owned()))
    };
    let lose = "inject network --interface near0 --to 10.99.0.77/32 --loss 100% --for 60s --detach";
    let (code, said) = squall(&node.certs, "ci", lose)?;
    ensure!(code == Some(0), "{code:?}: {said}");
    let (code, said) = squall(&node.certs, "eve", "status")?;
    ensure!(code == Some(0) && said.contains("10.99.0.77"), "{code:?}: {said}");
    let (code, said) = squall(&node.certs, "eve", lose)?;
    ensure!(code == Some(2) && said.contains("has the role Observe"), "{code:?}: {said}");
    let (code, said) = squall(&node.certs, "eve", "revert --all")?;
    ensure!(code == Some(0), "{code:?}: {said}");
    let (code, said) = squall(&node.certs, "nobody", "status")?;
    ensure!(code == Some(2) && said.contains("--tls-cert"), "{code:?}: {said}");
    let (code, said) = squall(&others, "ci", "status")?;
    ensure!(code == Some(4) && said.contains("https://10.99.0.1:7400"), "{code:?}: {said}");
    println!("{said}");
    let (code, said) = squall(&node.certs, "eve", "nodes --tls-server-name squall-agent")?;
    ensure!(code == Some(0), "{code:?}: {said}");
    node.is_untouched()
}

#[tokio::test(flavor = "multi_thread")]
async fn other_users_of_the_host_may_what_the_policy_says() -> Result<()> {
    const UID: u32 = 64_123;
    let certs = Certs::new(&ROLES)?;
    certs.rules(&format!("  - {{ who: 'uid:{UID}', role: revert }}\n"))?;
    let policy = certs.path("policy.yaml").display().to_string();
    let args = ["--policy", &policy, "--socket-group", &UID.to_string()];
    let agent = Agent::start(AgentOptions { args: &args, ..AgentOptions::default() }).await?;
    let socket = agent.socket();
    let above = socket.parent().context("a directory")?;
    fs::set_permissions(above, fs::Permissions::from_mode(0o755))?;
    let squall = |uid: u32, words: &str| -> Result<(Option<i32>, String)> {
        let mut command = Command::new("setpriv");
        let id = uid.to_string();
        command
            .args(["--reuid", &id, "--regid", &UID.to_string(), "--clear-groups"])
            .arg(bin_dir().join("squall"));
        command.args(words.split(' ')).env("SQUALL_SOCKET", &socket);
        let done = command.output()?;
        Ok((done.status.code(), String::from_utf8_lossy(&[done.stdout, done.stderr].concat()).into_owned()))
    };
    let (code, said) = squall(UID, "status")?;
    ensure!(code == Some(0) && said.contains("no injections"), "{code:?}: {said}");
    let (code, said) = squall(UID, "inject cpu --exe squall-none --load 10% --for 5s --detach")?;
    ensure!(code == Some(2) && said.contains("has the role Revert"), "{code:?}: {said}");
    let (code, said) = squall(UID + 1, &format!("status --agents unix://{}", socket.display()))?;
    ensure!(code != Some(0) && said.contains("in no rule"), "{code:?}: {said}");
    Ok(())
}
