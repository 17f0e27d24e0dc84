//! gRPC ⇄ the engine. Requests become domain types here, once; past this file nothing in them can be invalid.

use std::{
    pin::Pin,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use futures::{Stream, StreamExt, future::join_all, stream};
use squall_proto::v1::{self, agent_server::Agent};
use tokio::sync::broadcast::error::RecvError;
use tokio_stream::wrappers::IntervalStream;
use tonic::{Request, Response, Status};

use crate::{
    engine::{Engine, EngineError, Order},
    fault::{AnyFault, KINDS, Kind},
    host::cgroup,
    journal,
    limits::Invalid,
    sample::Sampler,
    target::{Scope, Selector, resolve},
};

/// Shortest interval of a stream, so that a client cannot keep the agent busy.
const SHORTEST_INTERVAL: Duration = Duration::from_millis(50);

/// The gRPC service.
pub struct Server {
    engine: Engine,
    faults: Vec<v1::FaultSupport>,
}

type Reply<T> = Result<Response<T>, Status>;
type Streamed<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

impl Server {
    /// A server over an engine. Finds out what works on this node.
    pub async fn new(engine: Engine) -> Self {
        let mut faults = join_all(KINDS.iter().map(Kind::describe)).await;
        for fault in &mut faults {
            fault.reason = fitting(std::mem::take(&mut fault.reason));
        }
        Self { engine, faults }
    }

    async fn arm(&self, request: v1::ArmRequest) -> Result<Vec<v1::Injection>, Status> {
        let selector = selector(request.target)?;
        let fault = request.fault.ok_or_else(|| missing("fault"))?;
        let parse = || AnyFault::parse(fault.clone()).map_err(|e| refused(e.into()));
        let first = parse()?;
        let kind = first.kind().name;
        if let Some(support) = self.faults.iter().find(|f| f.kind == kind && !f.available) {
            return Err(Status::failed_precondition(format!(
                "{kind} faults do not work on this node: {}",
                support.reason
            )));
        }
        let scope = first.scope();
        let targets = blocking(move || resolve(&selector, scope))
            .await?
            .map_err(|e| Status::not_found(e.to_string()))?;
        let faults = targets.iter().map(|_| parse()).collect::<Result<_, _>>()?;
        let order = Order {
            id: request.id,
            targets,
            faults,
            duration: Duration::from_nanos(request.duration_ns),
            lease: Duration::from_nanos(request.lease_ns),
            dry_run: request.dry_run,
        };
        self.engine.arm(order).await.map_err(refused)
    }
}

#[tonic::async_trait]
impl Agent for Server {
    async fn describe(&self, request: Request<v1::DescribeRequest>) -> Reply<v1::DescribeResponse> {
        let selectors: Vec<_> =
            request.into_inner().targets.into_iter().map(|t| selector(Some(t))).collect::<Result<_, _>>()?;
        let resolved = blocking(move || selectors.iter().map(resolved).collect()).await?;
        let uname = nix::sys::utsname::uname().map_err(|e| Status::internal(format!("uname: {e}")))?;
        let limits = self.engine.limits();
        Ok(Response::new(v1::DescribeResponse {
            node: uname.nodename().to_string_lossy().into_owned(),
            agent_version: env!("CARGO_PKG_VERSION").to_owned(),
            kernel: uname.release().to_string_lossy().into_owned(),
            boot_id: journal::boot_id().map_err(|e| Status::internal(format!("{e:#}")))?,
            cgroup: cgroup::Hierarchies::read()
                .map_err(|e| Status::internal(format!("read the cgroup mounts: {e}")))?
                .kind()
                .to_owned(),
            faults: self.faults.clone(),
            resolved,
            stopped: self.engine.stopped(),
            limits: Some(v1::Limits {
                longest_ns: limits.longest.as_nanos() as u64,
                longest_lease_ns: limits.longest_lease.as_nanos() as u64,
                most_injections: limits.most_injections as u32,
            }),
        }))
    }

    async fn arm(&self, request: Request<v1::ArmRequest>) -> Reply<v1::ArmResponse> {
        let injections = self.arm(request.into_inner()).await?;
        Ok(Response::new(v1::ArmResponse { injections }))
    }

    async fn fire(&self, request: Request<v1::FireRequest>) -> Reply<v1::FireResponse> {
        let injections = self.engine.fire(&request.into_inner().ids).await.map_err(refused)?;
        Ok(Response::new(v1::FireResponse { injections }))
    }

    async fn inject(&self, request: Request<v1::ArmRequest>) -> Reply<v1::ArmResponse> {
        let request = request.into_inner();
        let dry_run = request.dry_run;
        let mut injections = self.arm(request).await?;
        if !dry_run {
            let ids: Vec<_> = injections.into_iter().map(|i| i.id).collect();
            injections = self.engine.fire(&ids).await.map_err(refused)?;
        }
        Ok(Response::new(v1::ArmResponse { injections }))
    }

    async fn update(&self, request: Request<v1::UpdateRequest>) -> Reply<v1::UpdateResponse> {
        let v1::UpdateRequest { id, fault } = request.into_inner();
        let fault = AnyFault::parse(fault.ok_or_else(|| missing("fault"))?).map_err(|e| refused(e.into()))?;
        let injection = self.engine.update(&id, fault).await.map_err(refused)?;
        Ok(Response::new(v1::UpdateResponse { injection: Some(injection) }))
    }

    async fn renew(&self, request: Request<v1::RenewRequest>) -> Reply<v1::RenewResponse> {
        let gone = self.engine.renew(&request.into_inner().ids).await;
        Ok(Response::new(v1::RenewResponse { gone }))
    }

    async fn revert(&self, request: Request<v1::RevertRequest>) -> Reply<v1::RevertResponse> {
        let v1::RevertRequest { ids, all } = request.into_inner();
        let ids = match (ids.is_empty(), all) {
            (false, false) => ids,
            (true, true) => self.engine.list().into_iter().map(|i| i.id).collect(),
            _ => {
                return Err(refused(
                    Invalid::new("ids", ids.join(" "), "neither ids alone nor all alone", "give ids, or all")
                        .into(),
                ));
            }
        };
        let injections = self.engine.revert(&ids, "reverted on request").await.map_err(refused)?;
        Ok(Response::new(v1::RevertResponse { injections }))
    }

    async fn stop(&self, request: Request<v1::StopRequest>) -> Reply<v1::StopResponse> {
        let host = |e: anyhow::Error| refused(e.into());
        let injections = if request.into_inner().release {
            self.engine.release().map_err(host)?;
            Vec::new()
        } else {
            self.engine.stop().await.map_err(host)?
        };
        Ok(Response::new(v1::StopResponse { injections }))
    }

    async fn list(&self, _: Request<v1::ListRequest>) -> Reply<v1::ListResponse> {
        let injections = self.engine.observe(&[]).await.map_err(refused)?;
        Ok(Response::new(v1::ListResponse { injections }))
    }

    type WatchStream = Streamed<v1::Injection>;

    async fn watch(&self, request: Request<v1::WatchRequest>) -> Reply<Self::WatchStream> {
        let v1::WatchRequest { ids, interval_ns } = request.into_inner();
        let changes = self.engine.changes();
        let engine = self.engine.clone();
        let wanted = ids.clone();
        let changes = stream::unfold(changes, |mut changes| async move {
            loop {
                match changes.recv().await {
                    Ok(injection) => return Some((injection, changes)),
                    // What was missed comes with the next interval.
                    Err(RecvError::Lagged(_)) => {}
                    Err(RecvError::Closed) => return None,
                }
            }
        })
        .filter(move |i| std::future::ready(wanted.is_empty() || wanted.iter().any(|id| names(id, &i.id))));
        let regular = interval(interval_ns).then(move |()| {
            let (engine, ids) = (engine.clone(), ids.clone());
            async move { stream::iter(engine.observe(&ids).await.unwrap_or_default()) }
        });
        Ok(Response::new(Box::pin(stream::select(changes, regular.flatten()).map(Ok))))
    }

    type SampleStream = Streamed<v1::TargetSample>;

    async fn sample(&self, request: Request<v1::SampleRequest>) -> Reply<Self::SampleStream> {
        let v1::SampleRequest { target, interval_ns } = request.into_inner();
        let sampler = Arc::new(Mutex::new(Sampler::new(selector(target)?)));
        let samples = interval(interval_ns).then(move |()| {
            let sampler = Arc::clone(&sampler);
            blocking(move || sampler.lock().unwrap_or_else(PoisonError::into_inner).sample())
        });
        Ok(Response::new(Box::pin(samples)))
    }
}

/// Whether an id given by a client names this injection: itself, or the order it is a part of.
fn names(given: &str, id: &str) -> bool {
    given == id || id.strip_prefix(given).is_some_and(|rest| rest.starts_with('.'))
}

fn interval(ns: u64) -> impl Stream<Item = ()> {
    let every =
        if ns == 0 { Duration::from_secs(1) } else { Duration::from_nanos(ns).max(SHORTEST_INTERVAL) };
    let mut ticks = tokio::time::interval(every);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Skip);
    IntervalStream::new(ticks).map(|_| ())
}

fn selector(target: Option<v1::Target>) -> Result<Selector, Status> {
    Selector::parse(target.ok_or_else(|| missing("target"))?).map_err(|e| refused(e.into()))
}

fn resolved(selector: &Selector) -> v1::Resolved {
    // An interface is the one target that is no process.
    let scope = match selector {
        Selector::Interface { .. } => Scope::Network,
        Selector::Process { .. } | Selector::Cgroup(_) => Scope::Process,
    };
    match resolve(selector, scope) {
        Ok(targets) => {
            v1::Resolved { targets: targets.iter().map(Into::into).collect(), error: String::new() }
        }
        Err(e) => v1::Resolved { targets: Vec::new(), error: e.to_string() },
    }
}

fn missing(field: &str) -> Status {
    refused(Invalid::new(field, "", "missing", format!("give a {field}")).into())
}

/// Longest text of an error, characters. It travels in a header, and those have limits (16 KiB in hyper).
const LONGEST_TEXT: usize = 3000;

/// A text that fits: its beginning and its end, where the verifier says what it does not like. The whole goes to the log.
fn fitting(text: String) -> String {
    let length = text.chars().count();
    if length <= LONGEST_TEXT {
        return text;
    }
    tracing::warn!("a long error: {text}");
    let half = LONGEST_TEXT / 2;
    let (head, tail): (String, String) =
        (text.chars().take(half).collect(), text.chars().skip(length - half).collect());
    format!("{head} […] {tail}")
}

fn refused(error: EngineError) -> Status {
    let message = fitting(error.to_string());
    match error {
        EngineError::Invalid(_) => Status::invalid_argument(message),
        EngineError::Conflict(_) => Status::already_exists(message),
        EngineError::Unknown(_) => Status::not_found(message),
        EngineError::Full(_) => Status::resource_exhausted(message),
        EngineError::Stopped | EngineError::Host(_) => Status::failed_precondition(message),
    }
}

async fn blocking<T: Send + 'static>(f: impl FnOnce() -> T + Send + 'static) -> Result<T, Status> {
    tokio::task::spawn_blocking(f)
        .await
        .map_err(|e| Status::internal(format!("a task of the agent failed: {e}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_kind_of_target_resolves() {
        let interface =
            Selector::Interface { name: "lo".to_owned(), netns: crate::target::NetnsSelector::Own };
        let found = resolved(&interface);
        assert_eq!((found.error.as_str(), found.targets.len()), ("", 1));
        let none = Selector::Process { pid: None, exe: Some("squall-none".to_owned()), cmdline: None };
        assert!(resolved(&none).error.contains("squall-none"));
    }

    #[test]
    fn a_text_too_long_for_a_header_keeps_its_ends() {
        assert_eq!(fitting("short".to_owned()), "short");
        let long = fitting(format!("begin{}end", "x".repeat(30_000)));
        assert!(long.starts_with("begin") && long.ends_with("end") && long.len() < 4000, "{}", long.len());
    }
}
