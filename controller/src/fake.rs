//! An agent that hurts nobody: the protocol over a real unix socket, and a record of what it was asked.

use std::{
    collections::BTreeMap,
    pin::Pin,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use futures::{Stream, StreamExt, stream};
use squall_proto::v1::{self, State, agent_server::AgentServer};
use tokio::{net::UnixListener, time::sleep};
use tokio_stream::wrappers::UnixListenerStream;
use tonic::{Request, Response, Status};

use crate::agents::{Address, Agent};

/// How it behaves, and what it was asked.
#[derive(Debug, Default)]
#[expect(clippy::struct_excessive_bools, reason = "switches that tests turn on one by one")]
pub(crate) struct Behaviour {
    /// Nothing matches any selector.
    pub(crate) nothing_matches: bool,
    /// Faults do not work here.
    pub(crate) refuses: bool,
    /// What is fired fails.
    pub(crate) fire_fails: bool,
    /// What is fired is in force so much later.
    pub(crate) fire_takes: Duration,
    /// Faults never touch anything.
    pub(crate) idle: bool,
    /// So many reverts fail.
    pub(crate) stuck: usize,
    /// Reverts never end.
    pub(crate) hangs: bool,
    /// It does not answer any more.
    pub(crate) lost: bool,
    /// Calls in order: `arm`, `dry`, `fire`, `renew`, `revert`.
    pub(crate) calls: Vec<&'static str>,
    injections: BTreeMap<String, v1::Injection>,
}

/// A fake agent that serves until its handle is dropped.
pub(crate) struct Fake {
    shared: Arc<Mutex<Behaviour>>,
    pub(crate) agent: Agent,
    _dir: tempfile::TempDir,
    server: tokio::task::JoinHandle<()>,
}

impl Drop for Fake {
    fn drop(&mut self) {
        self.server.abort();
    }
}

impl Fake {
    pub(crate) async fn start(node: &str) -> Self {
        let dir = tempfile::tempdir().expect("a directory");
        let socket = dir.path().join("agent.sock");
        let listener = UnixListener::bind(&socket).expect("a socket");
        let shared = Arc::new(Mutex::new(Behaviour::default()));
        let service = AgentServer::new(Service { node: node.into(), shared: Arc::clone(&shared) });
        let server = tonic::transport::Server::builder().add_service(service);
        let server = tokio::spawn(async move {
            server.serve_with_incoming(UnixListenerStream::new(listener)).await.expect("serves");
        });
        let agent = Agent::connect(&Address::Unix(socket)).await.expect("answers");
        Self { shared, agent, _dir: dir, server }
    }

    pub(crate) fn is(&self) -> MutexGuard<'_, Behaviour> {
        self.shared.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Ends everything that is live, as a target that dies would.
    pub(crate) fn end_all(&self, reason: &str) {
        for injection in self.is().injections.values_mut() {
            injection.state = State::Reverted.into();
            injection.reason = reason.into();
        }
    }

    /// It is replaced by an agent that resumes everything.
    pub(crate) fn resume_all(&self) {
        let mut is = self.is();
        is.lost = false;
        for injection in is.injections.values_mut() {
            let agent_version = "9.9.9".to_owned();
            injection.resumed = Some(v1::Resumption { agent_version, at_boot_ns: 1, gap_ns: 1_500_000_000 });
            injection.effect = Some(v1::Effect::default());
        }
    }

    /// It is replaced by an agent that knows nothing.
    pub(crate) fn forget_all(&self) {
        let mut is = self.is();
        is.lost = false;
        is.injections.clear();
    }

    pub(crate) fn live(&self) -> usize {
        self.is().injections.values().filter(|i| i.state() != State::Reverted).count()
    }
}

struct Service {
    node: String,
    shared: Arc<Mutex<Behaviour>>,
}

type Reply<T> = Result<Response<T>, Status>;
type Streamed<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

fn gone() -> Status {
    Status::unavailable("connection reset")
}

impl Service {
    fn called(&self, call: &'static str) -> Result<MutexGuard<'_, Behaviour>, Status> {
        let mut behaviour = self.shared.lock().unwrap_or_else(PoisonError::into_inner);
        behaviour.calls.push(call);
        if behaviour.lost { Err(gone()) } else { Ok(behaviour) }
    }

    fn resolved() -> v1::ResolvedTarget {
        v1::ResolvedTarget { name: "web pid 7".into(), identity: "7@1".into(), pid: 7, ..Default::default() }
    }
}

#[tonic::async_trait]
impl v1::agent_server::Agent for Service {
    async fn describe(&self, request: Request<v1::DescribeRequest>) -> Reply<v1::DescribeResponse> {
        let nothing = self.called("describe")?.nothing_matches;
        let resolved = |_| {
            if nothing {
                v1::Resolved { targets: vec![], error: "no process has exe web: 0 of 12".into() }
            } else {
                v1::Resolved { targets: vec![Self::resolved()], error: String::new() }
            }
        };
        Ok(Response::new(v1::DescribeResponse {
            node: self.node.clone(),
            resolved: request.into_inner().targets.iter().map(resolved).collect(),
            ..Default::default()
        }))
    }

    async fn arm(&self, request: Request<v1::ArmRequest>) -> Reply<v1::ArmResponse> {
        let request = request.into_inner();
        let mut behaviour = self.called(if request.dry_run { "dry" } else { "arm" })?;
        if behaviour.nothing_matches {
            return Err(Status::not_found("no process has exe web: 0 of 12"));
        }
        if behaviour.refuses {
            return Err(Status::failed_precondition("cpu faults do not work on this node: no cgroup"));
        }
        let injection = v1::Injection {
            id: request.id.clone(),
            kind: "cpu".into(),
            target: Some(Self::resolved()),
            state: State::Armed.into(),
            ends_boot_ns: request.duration_ns,
            lease_ends_boot_ns: request.lease_ns,
            ..Default::default()
        };
        if !request.dry_run {
            behaviour.injections.insert(request.id, injection.clone());
        }
        Ok(Response::new(v1::ArmResponse { injections: vec![injection] }))
    }

    async fn fire(&self, request: Request<v1::FireRequest>) -> Reply<v1::FireResponse> {
        let takes = self.called("fire")?.fire_takes;
        sleep(takes).await;
        let mut behaviour = self.shared.lock().unwrap_or_else(PoisonError::into_inner);
        let (fails, idle) = (behaviour.fire_fails, behaviour.idle);
        let mut injections = Vec::new();
        for id in request.into_inner().ids {
            let injection = behaviour.injections.get_mut(&id).ok_or_else(|| Status::not_found(&id))?;
            injection.state = if fails { State::Failed } else { State::Active }.into();
            injection.reason = if fails { "no such device".into() } else { String::new() };
            injection.effect = Some(v1::Effect { bit: !idle, ..v1::Effect::default() });
            injections.push(injection.clone());
        }
        Ok(Response::new(v1::FireResponse { injections }))
    }

    async fn inject(&self, _: Request<v1::ArmRequest>) -> Reply<v1::ArmResponse> {
        Err(Status::unimplemented("inject"))
    }

    async fn update(&self, _: Request<v1::UpdateRequest>) -> Reply<v1::UpdateResponse> {
        Err(Status::unimplemented("update"))
    }

    async fn renew(&self, request: Request<v1::RenewRequest>) -> Reply<v1::RenewResponse> {
        let behaviour = self.called("renew")?;
        let live = |id: &String| behaviour.injections.get(id).is_some_and(|i| i.state() == State::Active);
        let gone = request.into_inner().ids.into_iter().filter(|id| !live(id)).collect();
        Ok(Response::new(v1::RenewResponse { gone }))
    }

    async fn revert(&self, request: Request<v1::RevertRequest>) -> Reply<v1::RevertResponse> {
        if self.called("revert")?.hangs {
            std::future::pending::<()>().await;
        }
        let mut behaviour = self.shared.lock().unwrap_or_else(PoisonError::into_inner);
        let mut injections = Vec::new();
        for id in request.into_inner().ids {
            let stuck = behaviour.stuck > 0;
            behaviour.stuck = behaviour.stuck.saturating_sub(1);
            let injection = behaviour.injections.get_mut(&id).ok_or_else(|| Status::not_found(&id))?;
            if injection.state() == State::Active || injection.state() == State::Stuck {
                injection.state = if stuck { State::Stuck } else { State::Reverted }.into();
                injection.reason = if stuck { "device is busy" } else { "reverted on request" }.into();
            }
            injections.push(injection.clone());
        }
        Ok(Response::new(v1::RevertResponse { injections }))
    }

    async fn stop(&self, _: Request<v1::StopRequest>) -> Reply<v1::StopResponse> {
        Err(Status::unimplemented("stop"))
    }

    async fn list(&self, _: Request<v1::ListRequest>) -> Reply<v1::ListResponse> {
        let injections = self.called("list")?.injections.values().cloned().collect();
        Ok(Response::new(v1::ListResponse { injections }))
    }

    type WatchStream = Streamed<v1::Injection>;

    async fn watch(&self, request: Request<v1::WatchRequest>) -> Reply<Self::WatchStream> {
        let ids = request.into_inner().ids;
        let shared = Arc::clone(&self.shared);
        let looks = stream::unfold((), move |()| {
            let (shared, ids) = (Arc::clone(&shared), ids.clone());
            async move {
                sleep(Duration::from_millis(100)).await;
                let behaviour = shared.lock().unwrap_or_else(PoisonError::into_inner);
                let look: Vec<Result<v1::Injection, Status>> = if behaviour.lost {
                    vec![Err(gone())]
                } else {
                    ids.iter().filter_map(|id| behaviour.injections.get(id)).cloned().map(Ok).collect()
                };
                Some((stream::iter(look), ()))
            }
        });
        Ok(Response::new(Box::pin(looks.flatten())))
    }

    type SampleStream = Streamed<v1::TargetSample>;

    async fn sample(&self, _: Request<v1::SampleRequest>) -> Reply<Self::SampleStream> {
        let samples = stream::unfold(0_u64, |n| async move {
            sleep(Duration::from_millis(100)).await;
            let sample = v1::TargetSample {
                boot_ns: n * 100_000_000,
                processes: 1,
                threads: 10 + n,
                generation: "a".into(),
                ..Default::default()
            };
            Some((Ok(sample), n + 1))
        });
        Ok(Response::new(Box::pin(samples)))
    }
}
