//! Service account tokens of Kubernetes: who brings a good one has its name, and no token, good or bad, holds up a revert.

use std::{
    collections::BTreeMap,
    fs,
    net::SocketAddr,
    process::Output,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use rcgen::{CertificateParams, KeyPair, SanType};
use serde_json::{Value, json};
use squall_proto::v1::{
    ArmRequest, DescribeRequest, Fault, Loss, NetworkFault, Peer, RenewRequest, RevertRequest, State,
    agent_client::AgentClient, fault,
};
use squall_tests::{Agent, AgentOptions, Certs, Dial, Lab, SECOND, bin_dir, interface, wait_for};
use tempfile::TempDir;
use tokio::{
    io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader},
    net::{TcpListener, TcpStream},
    task::JoinHandle,
};
use tokio_rustls::{
    TlsAcceptor,
    rustls::{
        ServerConfig,
        crypto::ring,
        pki_types::{PrivateKeyDer, pem::PemObject},
    },
};
use tonic::{Code, Request, Status, transport::Channel};

const PORT: u16 = 7400;
const OWN: &str = "the-agents-own-token";
const GOOD: &str = "good-token-of-the-deployer";
/// What a revert may take at the most, on a machine that is busy with other things too. A review may take 5 s.
const PROMPT: Duration = Duration::from_secs(3);

/// An API server that knows some tokens and reviews others.
struct ApiServer {
    address: SocketAddr,
    shared: Arc<Mutex<Known>>,
    dir: TempDir,
    serving: JoinHandle<()>,
}

#[derive(Default)]
struct Known {
    /// Whose a token is, and for whom.
    tokens: BTreeMap<&'static str, (&'static str, &'static str)>,
    /// What was asked: the token that was shown, and the review.
    asked: Vec<(String, Value)>,
    /// It takes connections and says nothing.
    hangs: bool,
}

impl ApiServer {
    fn start(lab: &Lab) -> Result<Self> {
        let dir = tempfile::tempdir()?;
        let mut params = CertificateParams::default();
        params.subject_alt_names = vec![SanType::IpAddress([127, 0, 0, 1].into())];
        let key = KeyPair::generate()?;
        let made = params.self_signed(&key)?;
        fs::write(dir.path().join("ca.crt"), made.pem())?;
        fs::write(dir.path().join("token"), format!("{OWN}\n"))?;
        let config = ServerConfig::builder_with_provider(Arc::new(ring::default_provider()));
        let config = config.with_safe_default_protocol_versions()?.with_no_client_auth();
        let key = PrivateKeyDer::from_pem_slice(key.serialize_pem().as_bytes())?;
        let config = Arc::new(config.with_single_cert(vec![made.der().clone()], key)?);
        let listener = lab.near.inside(|| Ok(std::net::TcpListener::bind("127.0.0.1:0")?))?;
        listener.set_nonblocking(true)?;
        let listener = TcpListener::from_std(listener)?;
        let address = listener.local_addr()?;
        let shared = Arc::new(Mutex::new(Known {
            tokens: BTreeMap::from([
                (GOOD, ("system:serviceaccount:ci:deployer", "squall")),
                ("token-of-another", ("system:serviceaccount:ci:another", "squall")),
                ("token-for-others", ("system:serviceaccount:ci:deployer", "https://kubernetes.default.svc")),
                ("token-of-a-person", ("alice", "squall")),
            ]),
            ..Known::default()
        }));
        let known = Arc::clone(&shared);
        let serving = tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let (acceptor, known) = (TlsAcceptor::from(Arc::clone(&config)), Arc::clone(&known));
                tokio::spawn(async move {
                    if let Err(e) = answer(stream, acceptor, &known).await {
                        println!("the API server: {e:#}");
                    }
                });
            }
        });
        Ok(Self { address, shared, dir, serving })
    }

    fn known(&self) -> std::sync::MutexGuard<'_, Known> {
        self.shared.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn args(&self) -> Vec<String> {
        let file = |name| self.dir.path().join(name).display().to_string();
        let args = [
            ("--kubernetes-api", self.address.to_string()),
            ("--kubernetes-ca", file("ca.crt")),
            ("--kubernetes-token", file("token")),
        ];
        let args = args.into_iter().flat_map(|(option, value)| [option.to_owned(), value]);
        ["--kubernetes-tokens".to_owned()].into_iter().chain(args).collect()
    }
}

/// Reads one review and answers it.
async fn answer(stream: TcpStream, acceptor: TlsAcceptor, known: &Mutex<Known>) -> Result<()> {
    let mut stream = BufReader::new(acceptor.accept(stream).await?);
    let (mut first, mut length, mut shown) = (String::new(), 0, String::new());
    stream.read_line(&mut first).await?;
    loop {
        let mut line = String::new();
        stream.read_line(&mut line).await?;
        let Some((name, value)) = line.trim().split_once(": ") else { break };
        match name.to_lowercase().as_str() {
            "content-length" => length = value.parse()?,
            "authorization" => value.clone_into(&mut shown),
            _ => {}
        }
    }
    ensure!(first.starts_with("POST /apis/authentication.k8s.io/v1/tokenreviews HTTP/1.1"), "{first}");
    let mut body = vec![0; length];
    stream.read_exact(&mut body).await?;
    let mut review: Value = serde_json::from_slice(&body)?;
    let (status, hangs) = {
        let mut known = known.lock().unwrap_or_else(PoisonError::into_inner);
        known.asked.push((shown.clone(), review.clone()));
        let of = review["spec"]["token"].as_str().and_then(|token| known.tokens.get(token));
        let status = match of {
            // A server that knows nothing of audiences answers so too.
            Some((who, audience)) => {
                json!({ "authenticated": true, "user": { "username": who }, "audiences": [audience] })
            }
            None => json!({ "error": "invalid bearer token" }),
        };
        (status, known.hangs)
    };
    if hangs {
        std::future::pending::<()>().await;
    }
    review["status"] = status;
    let code = if shown == format!("Bearer {OWN}") { "201 Created" } else { "403 Forbidden" };
    let text = review.to_string();
    let answer = format!(
        "HTTP/1.1 {code}\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n{text}",
        text.len()
    );
    stream.write_all(answer.as_bytes()).await?;
    Ok(stream.shutdown().await?)
}

/// An agent that takes tokens, and the API server it asks.
struct Node {
    api: ApiServer,
    certs: Certs,
    agent: Agent,
    lab: Lab,
}

impl Node {
    async fn start(tag: &str) -> Result<Self> {
        let lab = Lab::new(tag)?;
        let certs = Certs::new(&["ops:revert", "eve:observe", "none:revert"])?;
        certs.rules(
            "  - { who: 'serviceaccount:ci:deployer', role: inject, faults: [network], longest: 5m }\n  \
               - { who: spiffe://squall/revert/ops, role: revert }\n  \
               - { who: spiffe://squall/observe/eve, role: observe }\n",
        )?;
        let api = ApiServer::start(&lab)?;
        let args = [certs.listen(SocketAddr::new(Lab::NEAR, PORT)), api.args()].concat();
        let args: Vec<&str> = args.iter().map(String::as_str).collect();
        let options = AgentOptions { netns: Some(&lab.near), args: &args, ..AgentOptions::default() };
        let agent = Agent::start(options).await?;
        Ok(Self { api, certs, agent, lab })
    }

    async fn client(&self, name: &str) -> Result<AgentClient<Channel>> {
        let to = SocketAddr::new(Lab::NEAR, PORT);
        let dial = Dial { netns: &self.lab.far, from: Lab::FAR_OTHER, to };
        dial.client(self.certs.client(name)?).await
    }

    fn reviews(&self) -> usize {
        self.api.known().asked.len()
    }

    /// `squall` on the far side, with this certificate and token.
    fn squall(&self, name: &str, token: &str, args: &[&str]) -> Result<(Option<i32>, String)> {
        let mut command = self.lab.far.command(bin_dir().join("squall"));
        command.args(args).args([
            "--agents",
            &format!("https://{}:{PORT}", Lab::NEAR),
            "--token-file",
            token,
        ]);
        for (variable, file) in
            [("CERT", format!("{name}.pem")), ("KEY", format!("{name}-key.pem")), ("CA", "ca.pem".to_owned())]
        {
            command.env(format!("SQUALL_TLS_{variable}"), self.certs.path(&file));
        }
        let Output { status, stdout, stderr } = command.output()?;
        Ok((status.code(), String::from_utf8_lossy(&[stdout, stderr].concat()).into_owned()))
    }
}

/// A call that carries a token.
fn with<T>(token: &str, message: T) -> Result<Request<T>> {
    let mut request = Request::new(message);
    request.metadata_mut().insert("authorization", format!("Bearer {token}").parse()?);
    Ok(request)
}

/// Loses what goes to one address that nobody has.
fn order(id: &str) -> ArmRequest {
    let peers = vec![Peer { cidrs: vec!["10.99.0.77/32".to_owned()], ..Peer::default() }];
    let loss = Some(Loss { ratio: 1.0, ..Loss::default() });
    let network = NetworkFault { peers, loss, ..NetworkFault::default() };
    ArmRequest {
        id: id.to_owned(),
        target: Some(interface("near0", "")),
        fault: Some(Fault { kind: Some(fault::Kind::Network(network)) }),
        duration_ns: 120 * SECOND,
        lease_ns: 120 * SECOND,
        ..ArmRequest::default()
    }
}

fn refused<T>(what: &str, done: Result<T, Status>, code: Code) -> Result<String> {
    let status = done.err().with_context(|| format!("{what} was let through"))?;
    ensure!(status.code() == code, "{what}: {status:?} instead of {code:?}");
    Ok(status.message().to_owned())
}

/// Reverts with a token that is not known, and fails where that takes long, or is asked for.
async fn revert_promptly(
    node: &Node,
    client: &mut AgentClient<Channel>,
    id: &str,
    token: &str,
) -> Result<()> {
    let (asked, started) = (node.reviews(), Instant::now());
    let request = RevertRequest { ids: vec![id.to_owned()], all: false };
    let ended = client.revert(with(token, request)?).await?.into_inner().injections;
    ensure!(ended.len() == 1 && ended[0].state() == State::Reverted, "{ended:?}");
    ensure!(started.elapsed() < PROMPT, "it took {:?}", started.elapsed());
    ensure!(node.reviews() == asked, "a revert waited for a review");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn who_brings_a_good_token_may_what_its_account_may() -> Result<()> {
    let node = Node::start("tokens").await?;
    let mut ops = node.client("ops").await?;
    let said = refused("without a token", ops.inject(order("a")).await, Code::PermissionDenied)?;
    ensure!(said.contains("has the role Revert") && node.reviews() == 0, "{said}");

    let done = ops.inject(with(GOOD, order("a"))?).await?.into_inner().injections;
    ensure!(done.len() == 1 && done[0].state() == State::Active, "{done:?}");
    {
        let known = node.api.known();
        let [(shown, review)] = known.asked.as_slice() else { anyhow::bail!("{:?}", known.asked) };
        ensure!(
            shown == &format!("Bearer {OWN}") && review["spec"]["audiences"] == json!(["squall"]),
            "{review}"
        );
    }
    let renewed = ops.renew(with(GOOD, RenewRequest { ids: vec!["a".to_owned()] })?).await?.into_inner();
    ensure!(renewed.gone.is_empty() && node.reviews() == 1, "asked again: {}", node.reviews());
    let longer = ArmRequest { duration_ns: 301 * SECOND, ..order("b") };
    let said = refused("beyond his rule", ops.inject(with(GOOD, longer)?).await, Code::PermissionDenied)?;
    ensure!(said.contains("serviceaccount:ci:deployer may inject for 300s"), "{said}");
    // The token is that call's, not the connection's.
    refused("the next call", ops.inject(order("b")).await, Code::PermissionDenied)?;

    let nobody = "made-up-token";
    for (what, token) in
        [("nobody's", nobody), ("for others", "token-for-others"), ("a person's", "token-of-a-person")]
    {
        let asked = node.reviews();
        for _ in 0..2 {
            let said = refused(what, ops.inject(with(token, order("b"))?).await, Code::Unauthenticated)?;
            ensure!(said.contains("audience squall"), "{said}");
        }
        ensure!(node.reviews() == asked + 1, "{what}: {} reviews", node.reviews() - asked);
    }
    let said = refused(
        "in no rule",
        ops.inject(with("token-of-another", order("b"))?).await,
        Code::PermissionDenied,
    )?;
    ensure!(said.contains("serviceaccount:ci:another"), "{said}");
    let mut odd = Request::new(order("b"));
    odd.metadata_mut().insert("authorization", "Basic YTpi".parse()?);
    refused("no token", ops.inject(odd).await, Code::Unauthenticated)?;

    // A certificate in no rule has what the token has, and nothing with a bad one.
    let mut none = node.client("none").await?;
    refused("in no rule", none.describe(DescribeRequest::default()).await, Code::PermissionDenied)?;
    none.describe(with(GOOD, DescribeRequest::default())?).await?;
    refused(
        "a bad one",
        none.describe(with(nobody, DescribeRequest::default())?).await,
        Code::Unauthenticated,
    )?;
    revert_promptly(&node, &mut ops, "a", "yet-another-token").await?;

    let audit = fs::read_to_string(node.agent.state_dir().join("audit.jsonl"))?;
    ensure!(audit.contains("\"serviceaccount:ci:deployer\""), "{audit}");
    for text in [audit, node.agent.log()] {
        for token in [OWN, GOOD, nobody, "token-for-others", "token-of-a-person", "yet-another-token"] {
            ensure!(!text.contains(token), "{token} is in a log:\n{text}");
        }
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn no_token_makes_it_harder_to_revert() -> Result<()> {
    let node = Node::start("untold").await?;
    let (mut ops, mut eve) = (node.client("ops").await?, node.client("eve").await?);
    for id in ["a", "b", "c"] {
        let done = ops.inject(with(GOOD, order(id))?).await?.into_inner().injections;
        ensure!(done.len() == 1 && done[0].state() == State::Active, "{done:?}");
    }
    // An API server that does not answer.
    node.api.known().hangs = true;
    let said = refused("a hanging review", ops.inject(with("x", order("d"))?).await, Code::Unavailable)?;
    ensure!(said.contains("no answer within"), "{said}");
    revert_promptly(&node, &mut ops, "a", "never-seen").await?;
    revert_promptly(&node, &mut eve, "b", "never-seen").await?;
    // One that is away. What is known stays known for a while.
    node.api.serving.abort();
    wait_for("the end of the API server", Duration::from_secs(10), || {
        Ok(node.api.serving.is_finished().then_some(()))
    })?;
    let said = refused("no API server", ops.inject(with("y", order("d"))?).await, Code::Unavailable)?;
    ensure!(said.contains("cannot be reviewed"), "{said}");
    revert_promptly(&node, &mut ops, "c", "never-seen").await?;
    // Without a rule of its own a certificate may not even revert, so its token is asked for.
    let mut none = node.client("none").await?;
    let all = RevertRequest { ids: vec![], all: true };
    refused("in no rule", none.revert(with("z", all)?).await, Code::Unavailable)?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn squall_shows_the_token_of_a_file_and_reads_it_again() -> Result<()> {
    let node = Node::start("file").await?;
    let file = node.api.dir.path().join("mine");
    let path = file.display().to_string();
    let inject = [
        "inject",
        "network",
        "--interface",
        "near0",
        "--to",
        "10.99.0.77/32",
        "--loss",
        "100%",
        "--for",
        "60s",
    ];
    let inject = [&inject[..], &["--detach"]].concat();
    fs::write(&file, format!("{GOOD}\n"))?;
    let (code, text) = node.squall("none", &path, &inject)?;
    ensure!(code == Some(0), "{text}");
    fs::write(&file, "token-of-another")?;
    let (code, text) = node.squall("none", &path, &inject)?;
    ensure!(code != Some(0) && text.contains("serviceaccount:ci:another"), "{text}");
    // Where there is none, that is said, and what the certificate may is done.
    let (code, text) = node.squall("ops", "/nowhere/token", &["revert", "--all"])?;
    ensure!(code == Some(0) && text.contains("! --token-file: /nowhere/token: "), "{text}");
    Ok(())
}
