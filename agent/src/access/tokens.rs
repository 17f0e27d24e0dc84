//! Tokens of Kubernetes' service accounts: who brings one is asked for at the API server, by a TokenReview.
//!
//! **Invariant:** a token is in no log, no error and no cache; what is remembered is its hash.

use std::{
    collections::HashMap,
    env, fmt, fs,
    path::PathBuf,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use anyhow::{Context, Result, anyhow, bail, ensure};
use http_body_util::{BodyExt, Full, Limited};
use hyper::{
    Request, StatusCode,
    body::Bytes,
    client::conn::http1,
    header::{AUTHORIZATION, CONTENT_TYPE, HOST},
};
use hyper_util::rt::TokioIo;
use rustls::{ClientConfig, RootCertStore, crypto::ring, pki_types::ServerName};
use serde::Deserialize;
use serde_json::json;
use sha2::{Digest, Sha256};
use tokio::{
    net::TcpStream,
    time::{Instant, timeout},
};
use tokio_rustls::TlsConnector;
use tonic::{Status, codegen::http::HeaderMap};

use super::{live::Live, quota::Quota, tls};

/// Whom a token has to be for.
const AUDIENCE: &str = "squall";
/// Longest review, from the connection to the answer.
const LONGEST: Duration = Duration::from_secs(5);
/// So long a token is known to be somebody's, though it may have been revoked meanwhile.
const KNOWN: Duration = Duration::from_secs(30);
/// So long it is known to be nobody's.
const REFUSED: Duration = Duration::from_secs(5);
/// Tokens that are remembered.
const MOST: usize = 1024;
/// Longest answer of the API server, bytes.
const LARGEST: usize = 64 << 10;

/// How the API server is reached, from the command line. The files are where a pod has them.
#[derive(Debug, clap::Args)]
#[group(id = "tokens")]
pub struct Options {
    /// Take service account tokens (audience squall) too: who brings one is serviceaccount:NAMESPACE:NAME in the policy
    #[arg(long, requires = "policy")]
    kubernetes_tokens: bool,
    /// API server of Kubernetes, which reviews them [default: that of the pod this agent is in]
    #[arg(long, value_name = "HOST:PORT", requires = "kubernetes_tokens")]
    kubernetes_api: Option<String>,
    /// CA of its certificate, PEM
    #[arg(
        long,
        value_name = "FILE",
        requires = "kubernetes_tokens",
        default_value = "/var/run/secrets/kubernetes.io/serviceaccount/ca.crt"
    )]
    kubernetes_ca: PathBuf,
    /// The agent's own token there, read anew for each review; it takes the cluster role system:auth-delegator
    #[arg(
        long,
        value_name = "FILE",
        requires = "kubernetes_tokens",
        default_value = "/var/run/secrets/kubernetes.io/serviceaccount/token"
    )]
    kubernetes_token: PathBuf,
}

/// A token, which nobody sees.
#[derive(Clone, PartialEq, Eq)]
pub struct Token(String);

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Token(…)")
    }
}

impl Token {
    /// Takes the token out of the headers of a call, so that it goes no further.
    pub fn take(headers: &mut HeaderMap) -> Option<Result<Self, Status>> {
        let value = headers.remove(AUTHORIZATION)?;
        let token = value.to_str().ok().and_then(|text| {
            let (scheme, token) = text.split_once(' ')?;
            let plain = !token.is_empty() && token.bytes().all(|byte| byte.is_ascii_graphic());
            (scheme.eq_ignore_ascii_case("bearer") && plain).then(|| Self(token.to_owned()))
        });
        Some(token.ok_or_else(|| {
            Status::unauthenticated(
                "authorization: no token of a service account; write Bearer and the token",
            )
        }))
    }

    fn hash(&self) -> Hash {
        Sha256::digest(&self.0).into()
    }
}

type Hash = [u8; 32];

/// Reviews tokens, and remembers for a short time what came of it.
#[derive(Debug)]
pub struct Tokens {
    host: String,
    port: u16,
    tls: Arc<Live<Arc<ClientConfig>>>,
    own: PathBuf,
    cache: Mutex<Cache>,
    /// Reviews under way, in all and of one caller.
    reviews: Arc<Quota>,
}

impl Tokens {
    /// As asked for on the command line, where it was.
    pub fn new(options: &Options) -> Result<Option<Arc<Self>>> {
        if !options.kubernetes_tokens {
            return Ok(None);
        }
        let api = match &options.kubernetes_api {
            Some(api) => api.clone(),
            None => {
                in_pod().context("--kubernetes-tokens: this agent is in no pod; give --kubernetes-api")?
            }
        };
        let (host, port) = host_and_port(&api).with_context(|| format!("--kubernetes-api: {api}"))?;
        let ca = vec![options.kubernetes_ca.clone()];
        let tls = Live::follow(ca, |files| client(&files[0])).context("--kubernetes-ca")?;
        let (cache, reviews) = (Mutex::default(), Quota::new(16, 4));
        Ok(Some(Arc::new(Self { host, port, tls, own: options.kubernetes_token.clone(), cache, reviews })))
    }

    /// The name of whom a token is of, in the words of the policy. `caller` is who brings it, for the limits.
    pub async fn name(&self, token: &Token, caller: &str) -> Result<String, Status> {
        let hash = token.hash();
        let known = self.cache().get(&hash, Instant::now());
        let named = if let Some(known) = known { known } else { self.ask(token, hash, caller).await? };
        named.ok_or_else(|| {
            let why = "the token is no valid one of a service account for the audience squall; mount one with that audience";
            Status::unauthenticated(why)
        })
    }

    /// Has it reviewed, and remembers what came of it.
    async fn ask(&self, token: &Token, hash: Hash, caller: &str) -> Result<Option<String>, Status> {
        let slot = self.reviews.take(caller);
        let _slot = slot.ok_or_else(|| {
            Status::resource_exhausted("too many tokens are under review; wait for some of them")
        })?;
        let reviewed = timeout(LONGEST, self.review(token)).await;
        let reviewed = reviewed.unwrap_or_else(|_| Err(anyhow!("no answer within {LONGEST:?}")));
        let named = reviewed.map_err(|e| {
            tracing::warn!(error = format!("{e:#}"), "a service account's token cannot be reviewed");
            let (host, port) = (&self.host, self.port);
            Status::unavailable(format!("the token cannot be reviewed at {host}:{port}: {e:#}"))
        })?;
        self.cache().put(hash, named.clone(), Instant::now());
        Ok(named)
    }

    fn cache(&self) -> std::sync::MutexGuard<'_, Cache> {
        self.cache.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Asks the API server. None where it says that the token is nobody's, or not for us.
    async fn review(&self, token: &Token) -> Result<Option<String>> {
        let own = fs::read_to_string(&self.own).with_context(|| self.own.display().to_string())?;
        let stream = TcpStream::connect((self.host.as_str(), self.port)).await.context("connect")?;
        let name = ServerName::try_from(self.host.clone())?;
        let config = Arc::clone(&*self.tls.get());
        let stream = TlsConnector::from(config).connect(name, stream).await.context("TLS")?;
        let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await?;
        let connection = Ended(tokio::spawn(connection));
        let review = json!({
            "apiVersion": "authentication.k8s.io/v1",
            "kind": "TokenReview",
            "spec": { "token": token.0, "audiences": [AUDIENCE] },
        });
        let request = Request::post("/apis/authentication.k8s.io/v1/tokenreviews")
            .header(HOST, format!("{}:{}", self.host, self.port))
            .header(CONTENT_TYPE, "application/json")
            .header(AUTHORIZATION, format!("Bearer {}", own.trim()))
            .body(Full::new(Bytes::from(review.to_string())))
            .map_err(|_| anyhow!("{}: no token", self.own.display()))?;
        let answer = sender.send_request(request).await?;
        let status = answer.status();
        match status {
            StatusCode::CREATED | StatusCode::OK => {}
            StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => bail!(
                "it answers {status}: the agent's own token may not review others; bind its service account to the cluster role \
                 system:auth-delegator"
            ),
            _ => bail!("it answers {status}"),
        }
        let body = Limited::new(answer.into_body(), LARGEST).collect().await;
        let body = body.map_err(|_| anyhow!("its answer broke off, or is longer than {LARGEST} bytes"))?;
        drop(connection);
        named(&body.to_bytes())
    }
}

/// A task that is ended with this.
struct Ended<T>(tokio::task::JoinHandle<T>);

impl<T> Drop for Ended<T> {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// The API server of the pod that this is in.
fn in_pod() -> Option<String> {
    let of = |name| env::var(name).ok().filter(|value| !value.is_empty());
    let (host, port) = (of("KUBERNETES_SERVICE_HOST")?, of("KUBERNETES_SERVICE_PORT")?);
    Some(if host.contains(':') { format!("[{host}]:{port}") } else { format!("{host}:{port}") })
}

fn host_and_port(text: &str) -> Result<(String, u16)> {
    let (host, port) = text.rsplit_once(':').context("no port; write HOST:PORT")?;
    let host = host.strip_prefix('[').and_then(|host| host.strip_suffix(']')).unwrap_or(host);
    let port = port.parse().ok().with_context(|| format!("{port} is no port; write HOST:PORT"))?;
    ensure!(ServerName::try_from(host).is_ok(), "{host} is neither a name nor an address; write HOST:PORT");
    Ok((host.to_owned(), port))
}

/// A client that trusts this CA, PEM.
fn client(ca: &[u8]) -> Result<Arc<ClientConfig>> {
    let mut roots = RootCertStore::empty();
    for root in tls::certificates(ca)? {
        roots.add(root)?;
    }
    let config = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()));
    let config = config.with_safe_default_protocol_versions()?.with_root_certificates(roots);
    Ok(Arc::new(config.with_no_client_auth()))
}

#[derive(Deserialize)]
struct Review {
    status: ReviewStatus,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct ReviewStatus {
    authenticated: bool,
    user: User,
    audiences: Vec<String>,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct User {
    username: String,
}

/// Whom a TokenReview names, in the words of the policy; none where it says no, is not about our audience, or names no service
/// account. A server that knows nothing of audiences names none [TokenReviewStatus, authentication.k8s.io/v1].
pub fn named(answer: &[u8]) -> Result<Option<String>> {
    // What serde says of an answer may quote it, and the token is in there.
    let Ok(Review { status }) = serde_json::from_slice(answer) else { bail!("its answer is no TokenReview") };
    if !status.authenticated || !status.audiences.iter().any(|audience| audience == AUDIENCE) {
        return Ok(None);
    }
    let account = status.user.username.strip_prefix("system:serviceaccount:").filter(|name| is_account(name));
    Ok(account.map(|account| format!("serviceaccount:{account}")))
}

/// `NAMESPACE:NAME`, as Kubernetes allows them.
pub fn is_account(text: &str) -> bool {
    let is_name = |name: &str| {
        !name.is_empty()
            && name.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-' || b == b'.')
    };
    text.split_once(':').is_some_and(|(namespace, name)| is_name(namespace) && is_name(name))
}

/// What is known of tokens, by their hashes, and until when.
#[derive(Debug, Default)]
struct Cache(HashMap<Hash, (Instant, Option<String>)>);

impl Cache {
    #[expect(
        clippy::option_option,
        reason = "the outer one is whether it is known, the inner one whom it is of"
    )]
    fn get(&self, hash: &Hash, now: Instant) -> Option<Option<String>> {
        self.0.get(hash).filter(|(until, _)| now < *until).map(|(_, name)| name.clone())
    }

    fn put(&mut self, hash: Hash, name: Option<String>, now: Instant) {
        if self.0.len() >= MOST {
            self.0.retain(|_, (until, _)| now < *until);
        }
        // Nobody's go first: whoever makes up tokens drives out none that are good.
        if self.0.len() >= MOST
            && let Some(first) =
                self.0.iter().min_by_key(|(_, (until, name))| (name.is_some(), *until)).map(|(h, _)| *h)
        {
            self.0.remove(&first);
        }
        let until = now + if name.is_some() { KNOWN } else { REFUSED };
        self.0.insert(hash, (until, name));
    }
}

#[cfg(test)]
mod tests {
    use rstest::rstest;

    use super::*;

    fn review(authenticated: bool, audiences: &[&str], username: &str) -> String {
        json!({
            "kind": "TokenReview",
            "spec": { "token": "secret" },
            "status": { "authenticated": authenticated, "audiences": audiences, "user": { "username": username } },
        })
        .to_string()
    }

    #[rstest]
    #[case::good(true, &["squall"], "system:serviceaccount:ci:deployer", Some("serviceaccount:ci:deployer"))]
    #[case::of_several(true, &["x", "squall"], "system:serviceaccount:a:b", Some("serviceaccount:a:b"))]
    #[case::no(false, &["squall"], "system:serviceaccount:ci:deployer", None)]
    #[case::for_others(true, &["https://kubernetes.default.svc"], "system:serviceaccount:ci:deployer", None)]
    #[case::for_nobody(true, &[], "system:serviceaccount:ci:deployer", None)]
    #[case::a_person(true, &["squall"], "alice", None)]
    #[case::a_node(true, &["squall"], "system:node:n", None)]
    #[case::no_name(true, &["squall"], "system:serviceaccount:ci:", None)]
    #[case::too_many(true, &["squall"], "system:serviceaccount:ci:a:b", None)]
    fn a_review_names_a_service_account(
        #[case] authenticated: bool,
        #[case] audiences: &[&str],
        #[case] username: &str,
        #[case] name: Option<&str>,
    ) {
        assert_eq!(named(review(authenticated, audiences, username).as_bytes()).unwrap().as_deref(), name);
    }

    #[test]
    fn what_is_no_review_is_an_error_without_the_token() {
        for text in ["", "{}", r#"{"spec":{"token":"secret"},"status":{"authenticated":"secret"}}"#] {
            let said = format!("{:#}", named(text.as_bytes()).unwrap_err());
            assert_eq!(said, "its answer is no TokenReview");
        }
        assert_eq!(named(br#"{"status":{}}"#).unwrap(), None);
    }

    fn taken(value: &str) -> Option<Result<Token, Status>> {
        let mut headers = HeaderMap::new();
        headers.insert(AUTHORIZATION, value.parse().unwrap());
        let token = Token::take(&mut headers);
        assert!(headers.is_empty(), "it goes no further");
        token
    }

    #[test]
    fn a_token_is_taken_out_of_the_headers_and_never_shown() {
        let token = taken("bearer a.b-c").unwrap().unwrap();
        assert_eq!((token.0.as_str(), format!("{token:?}").contains("a.b")), ("a.b-c", false));
        for wrong in ["Bearer", "Bearer ", "Basic YTpi", "Bearer a b", "a"] {
            let status = taken(wrong).unwrap().unwrap_err();
            assert_eq!(status.code(), tonic::Code::Unauthenticated, "{wrong}");
        }
        assert!(Token::take(&mut HeaderMap::new()).is_none());
    }

    #[rstest]
    #[case("10.0.0.1:443", Some(("10.0.0.1", 443)))]
    #[case("[fd00::1]:6443", Some(("fd00::1", 6443)))]
    #[case("kubernetes.default.svc:443", Some(("kubernetes.default.svc", 443)))]
    #[case("https://10.0.0.1", None)]
    #[case("10.0.0.1", None)]
    #[case("a b:443", None)]
    fn addresses(#[case] text: &str, #[case] expected: Option<(&str, u16)>) {
        let found = host_and_port(text).ok();
        assert_eq!(found.as_ref().map(|(host, port)| (host.as_str(), *port)), expected);
    }

    #[tokio::test]
    async fn what_is_known_is_forgotten_soon_and_never_grows_too_large() {
        let now = Instant::now();
        let hash = |n: usize| Token(n.to_string()).hash();
        let mut cache = Cache::default();
        cache.put(hash(0), Some("serviceaccount:a:b".to_owned()), now);
        cache.put(hash(1), None, now);
        assert_eq!(
            cache.get(&hash(0), now + Duration::from_secs(29)),
            Some(Some("serviceaccount:a:b".to_owned()))
        );
        assert_eq!(cache.get(&hash(0), now + KNOWN), None);
        assert_eq!(cache.get(&hash(1), now + Duration::from_secs(4)), Some(None));
        assert_eq!(cache.get(&hash(1), now + REFUSED), None);
        for n in 2..3 * MOST {
            cache.put(hash(n), None, now);
        }
        assert_eq!(cache.0.len(), MOST);
        assert!(cache.get(&hash(0), now).flatten().is_some(), "made up ones drive out no good one");
        cache.put(hash(1), None, now + KNOWN);
        assert_eq!(cache.0.len(), 1, "what is over goes");
    }
}
