//! gRPC ⇄ the engine. Requests become domain types here, once; past this file nothing in them can be invalid.

use std::{
    panic::resume_unwind,
    pin::Pin,
    sync::{Arc, Mutex, PoisonError},
    thread,
    time::Duration,
};

use futures::{Stream, StreamExt, future::join_all, stream};
use squall_proto::v1::{self, agent_server::Agent};
use tokio::sync::{Mutex as AsyncMutex, Semaphore, broadcast::error::RecvError};
use tokio_stream::wrappers::IntervalStream;
use tonic::{Request, Response, Status};

use crate::{
    access::{
        audit::{Audit, Entry},
        listen::Caller,
        policy::{Grant, Role},
        quota::Slot,
    },
    engine::{self, Engine, EngineError, Order},
    fault::{AnyFault, KINDS, Kind},
    host::{cgroup, proc},
    journal,
    limits::Invalid,
    metrics::METRICS,
    sample::Sampler,
    target::{Scope, Selector, Target, resolve},
};

/// Shortest interval of a stream, so that a client cannot keep the agent busy.
const SHORTEST_INTERVAL: Duration = Duration::from_millis(50);

/// Most targets and ids in one request.
const MOST_TARGETS: usize = 64;
const MOST_IDS: usize = 1024;

/// Threads that read all of /proc at once, for those who inject and those who only ask. However many ask, a revert finds a CPU.
const MOST_READERS: usize = 2;
/// How nice (`nice(2)`) a thread is that reads for somebody who only asks: whoever acts has ten times its share of a CPU.
const LEISURE: i32 = 10;

/// The gRPC service.
pub struct Server {
    engine: Engine,
    faults: Vec<v1::FaultSupport>,
    zone: String,
    audit: Audit,
    /// Held by whoever has his injections counted.
    counting: AsyncMutex<()>,
    readers: Arc<Semaphore>,
    describers: Arc<Semaphore>,
}

type Reply<T> = Result<Response<T>, Status>;
type Streamed<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

impl Server {
    /// A server over an engine, in a zone or none (""). Finds out what works on this node.
    pub async fn new(engine: Engine, audit: Audit, zone: String) -> Self {
        let mut faults = join_all(KINDS.iter().map(Kind::describe)).await;
        for fault in &mut faults {
            fault.reason = fitting(std::mem::take(&mut fault.reason));
        }
        Self {
            engine,
            faults,
            zone,
            audit,
            counting: AsyncMutex::default(),
            readers: Arc::new(Semaphore::new(MOST_READERS)),
            describers: Arc::new(Semaphore::new(MOST_READERS)),
        }
    }

    /// Does a call that changes something, and writes down what came of it.
    async fn audited<T>(
        &self,
        mut entry: Entry,
        call: impl AsyncFnOnce(&mut Entry) -> Result<T, Status>,
    ) -> Result<T, Status> {
        let done = call(&mut entry).await;
        if let Err(status) = &done {
            status.message().clone_into(&mut entry.reason);
            "refused".clone_into(&mut entry.verdict);
            self.audit.note(entry);
        }
        done
    }

    /// Writes down what is about to be done. Where that is not possible it is not done.
    async fn allow(&self, entry: &Entry) -> Result<(), Status> {
        let entry = Entry { verdict: "allowed".to_owned(), ..entry.clone() };
        self.audit.record(entry).await.map_err(|e| {
            Status::failed_precondition(format!(
                "the audit log cannot be written, so nothing is injected (reverts work): {e:#}"
            ))
        })
    }

    async fn arm(
        &self,
        grant: &Grant,
        request: v1::ArmRequest,
        entry: &mut Entry,
    ) -> Result<Vec<v1::Injection>, Status> {
        entry.ids = vec![request.id.clone()];
        if let Some((order, _)) = request.id.rsplit_once('.').filter(|(order, _)| names(order, &request.id)) {
            let problem = format!("it would be a part of the order {order}");
            let fix = "choose one that does not end in a dot and a number";
            return Err(refused(Invalid::new("id", &request.id, problem, fix).into()));
        }
        let selector = selector(request.target)?;
        entry.target = selector.to_string();
        let fault = request.fault.ok_or_else(|| missing("fault"))?;
        let parse = || AnyFault::parse(fault.clone()).map_err(|e| refused(e.into()));
        let first = parse()?;
        let kind = first.kind().name;
        let duration = Duration::from_nanos(request.duration_ns);
        kind.clone_into(&mut entry.kind);
        entry.summary = format!("{} for {duration:?}", first.summary());
        grant.check_fault(kind, duration).map_err(forbidden)?;
        if let Some(support) = self.faults.iter().find(|f| f.kind == kind && !f.available) {
            return Err(Status::failed_precondition(format!(
                "{kind} faults do not work on this node: {}",
                support.reason
            )));
        }
        let scope = first.scope();
        let targets = reading(&self.readers, move || resolve(&selector, scope))
            .await?
            .map_err(|e| Status::not_found(e.to_string()))?;
        let targets = only(targets, &request.only)?;
        let _counted = if grant.is_counted() { Some(self.counting.lock().await) } else { None };
        let live = self.live_of(grant, &ids_of(&request.id, targets.len()));
        grant.check_targets(scope, &targets, live).map_err(forbidden)?;
        if !request.dry_run {
            self.allow(entry).await?;
        }
        let faults = targets.iter().map(|_| parse()).collect::<Result<_, _>>()?;
        let order = Order {
            id: request.id,
            owner: grant.who.clone(),
            targets,
            faults,
            duration,
            lease: Duration::from_nanos(request.lease_ns),
            dry_run: request.dry_run,
        };
        self.engine.arm(order).await.map_err(refused)
    }

    /// How many live injections a caller has, besides those of these ids, which an order that is repeated has already.
    fn live_of(&self, grant: &Grant, repeated: &[String]) -> usize {
        let live = self.engine.list().into_iter().filter(|i| engine::is_live(i) && !repeated.contains(&i.id));
        live.filter(|i| self.engine.owner(&i.id).as_ref() == Some(&grant.who)).count()
    }

    /// Refuses injections of somebody else, except to an admin.
    fn check_owner(&self, grant: &Grant, ids: &[String]) -> Result<(), Status> {
        if grant.role == Role::Admin {
            return Ok(());
        }
        let known = self.engine.list();
        let named = known.iter().filter(|i| ids.iter().any(|id| names(id, &i.id)));
        let mut foreign = named.filter(|i| self.engine.owner(&i.id).as_ref() != Some(&grant.who));
        match foreign.next() {
            Some(i) => Err(Status::permission_denied(format!(
                "{} was injected by somebody else: {} may revert it, and change only his own",
                i.id, grant.who
            ))),
            None => Ok(()),
        }
    }
}

/// What the door found out about a caller. Without it nothing is done.
fn grant<T>(request: &Request<T>) -> Result<Grant, Status> {
    let grant = request.extensions().get::<Grant>().cloned();
    grant.ok_or_else(|| Status::internal("the call did not come through the door"))
}

/// A place for a stream.
fn stream_slot<T>(request: &Request<T>) -> Result<Slot, Status> {
    let who = grant(request)?.who;
    let caller = request.extensions().get::<Caller>();
    let slot = caller.and_then(|caller| caller.gate.streams.take(&who));
    slot.ok_or_else(|| {
        METRICS.refused("streams");
        Status::resource_exhausted(format!("{who} has too many streams open; end some of them"))
    })
}

fn entry(grant: &Grant, method: &str) -> Entry {
    Entry {
        who: grant.who.clone(),
        role: format!("{:?}", grant.role),
        method: method.to_owned(),
        ..Entry::default()
    }
}

fn at_most<T>(field: &str, given: &[T], most: usize) -> Result<(), Status> {
    if given.len() <= most {
        return Ok(());
    }
    let fix = format!("give at most {most} in one call");
    Err(refused(Invalid::new(field, given.len(), "too many", fix).into()))
}

#[tonic::async_trait]
impl Agent for Server {
    async fn describe(&self, request: Request<v1::DescribeRequest>) -> Reply<v1::DescribeResponse> {
        let v1::DescribeRequest { targets, fault } = request.into_inner();
        at_most("targets", &targets, MOST_TARGETS)?;
        let fault = fault.map(AnyFault::parse).transpose().map_err(|e| refused(e.into()))?;
        let scope = fault.map(|fault| fault.scope());
        let selectors: Vec<_> = targets.into_iter().map(|t| selector(Some(t))).collect::<Result<_, _>>()?;
        let mut found = Vec::new();
        for selector in selectors {
            found.push(at_leisure(&self.describers, move || resolved(&selector, scope)).await?);
        }
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
            resolved: found,
            stopped: self.engine.stopped(),
            limits: Some(v1::Limits {
                longest_ns: limits.longest.as_nanos() as u64,
                longest_lease_ns: limits.longest_lease.as_nanos() as u64,
                most_injections: limits.most_injections as u32,
                most_pods: limits.most_pods,
            }),
            zone: self.zone.clone(),
        }))
    }

    async fn arm(&self, request: Request<v1::ArmRequest>) -> Reply<v1::ArmResponse> {
        let grant = grant(&request)?;
        let request = request.into_inner();
        let injections =
            self.audited(entry(&grant, "Arm"), async |entry| self.arm(&grant, request, entry).await).await?;
        Ok(Response::new(v1::ArmResponse { injections }))
    }

    async fn fire(&self, request: Request<v1::FireRequest>) -> Reply<v1::FireResponse> {
        let grant = grant(&request)?;
        let v1::FireRequest { ids } = request.into_inner();
        let fired = self.audited(entry(&grant, "Fire"), async |entry| {
            at_most("ids", &ids, MOST_IDS)?;
            entry.ids.clone_from(&ids);
            self.check_owner(&grant, &ids)?;
            self.allow(entry).await?;
            self.engine.fire(&ids).await.map_err(refused)
        });
        Ok(Response::new(v1::FireResponse { injections: fired.await? }))
    }

    async fn inject(&self, request: Request<v1::ArmRequest>) -> Reply<v1::ArmResponse> {
        let grant = grant(&request)?;
        let request = request.into_inner();
        let dry_run = request.dry_run;
        let injected = self.audited(entry(&grant, "Inject"), async |entry| {
            let injections = self.arm(&grant, request, entry).await?;
            if dry_run {
                return Ok(injections);
            }
            let ids: Vec<_> = injections.into_iter().map(|i| i.id).collect();
            self.check_owner(&grant, &ids)?;
            self.engine.fire(&ids).await.map_err(refused)
        });
        Ok(Response::new(v1::ArmResponse { injections: injected.await? }))
    }

    async fn update(&self, request: Request<v1::UpdateRequest>) -> Reply<v1::UpdateResponse> {
        let grant = grant(&request)?;
        let v1::UpdateRequest { id, fault } = request.into_inner();
        let updated = self.audited(entry(&grant, "Update"), async |entry| {
            entry.ids = vec![id.clone()];
            let fault = fault.ok_or_else(|| missing("fault"))?;
            let fault = AnyFault::parse(fault).map_err(|e| refused(e.into()))?;
            fault.kind().name.clone_into(&mut entry.kind);
            entry.summary = fault.summary();
            grant.check_fault(&entry.kind, Duration::ZERO).map_err(forbidden)?;
            self.check_owner(&grant, std::slice::from_ref(&id))?;
            self.allow(entry).await?;
            self.engine.update(&id, fault).await.map_err(refused)
        });
        Ok(Response::new(v1::UpdateResponse { injection: Some(updated.await?) }))
    }

    async fn renew(&self, request: Request<v1::RenewRequest>) -> Reply<v1::RenewResponse> {
        let grant = grant(&request)?;
        let v1::RenewRequest { ids } = request.into_inner();
        let renewed = self.audited(entry(&grant, "Renew"), async |entry| {
            at_most("ids", &ids, MOST_IDS)?;
            entry.ids.clone_from(&ids);
            self.check_owner(&grant, &ids)?;
            self.engine.renew(&ids).await.map_err(refused)
        });
        Ok(Response::new(v1::RenewResponse { gone: renewed.await? }))
    }

    async fn revert(&self, request: Request<v1::RevertRequest>) -> Reply<v1::RevertResponse> {
        let grant = grant(&request)?;
        let v1::RevertRequest { ids, all } = request.into_inner();
        let reverted = self.audited(entry(&grant, "Revert"), async |entry| {
            at_most("ids", &ids, MOST_IDS)?;
            let ids = match (ids.is_empty(), all) {
                (false, false) => ids,
                (true, true) => self.engine.list().into_iter().map(|i| i.id).collect(),
                _ => {
                    let problem = "neither ids alone nor all alone";
                    return Err(refused(
                        Invalid::new("ids", ids.join(" "), problem, "give ids, or all").into(),
                    ));
                }
            };
            entry.ids.clone_from(&ids);
            let reverted = self.engine.revert(&ids, "reverted on request").await.map_err(refused)?;
            self.audit.note(Entry { verdict: "allowed".to_owned(), ..entry.clone() });
            Ok(reverted)
        });
        Ok(Response::new(v1::RevertResponse { injections: reverted.await? }))
    }

    /// Everybody may stop; that it goes on is for admins to say.
    async fn stop(&self, request: Request<v1::StopRequest>) -> Reply<v1::StopResponse> {
        let grant = grant(&request)?;
        let release = request.into_inner().release;
        let method = if release { "Release" } else { "Stop" };
        let stopped = self.audited(entry(&grant, method), async |entry| {
            let host = |e: anyhow::Error| refused(e.into());
            if release {
                if grant.role < Role::Admin {
                    let why =
                        format!("{} has the role {:?}, and to release takes Admin", grant.who, grant.role);
                    return Err(Status::permission_denied(why));
                }
                self.allow(entry).await?;
                self.engine.release().map_err(host)?;
                return Ok(Vec::new());
            }
            let injections = self.engine.stop().await.map_err(host)?;
            entry.ids = injections.iter().map(|injection| injection.id.clone()).collect();
            self.audit.note(Entry { verdict: "allowed".to_owned(), ..entry.clone() });
            Ok(injections)
        });
        Ok(Response::new(v1::StopResponse { injections: stopped.await? }))
    }

    async fn list(&self, _: Request<v1::ListRequest>) -> Reply<v1::ListResponse> {
        let injections = self.engine.observe(&[]).await.map_err(refused)?;
        Ok(Response::new(v1::ListResponse { injections }))
    }

    type WatchStream = Streamed<v1::Injection>;

    async fn watch(&self, request: Request<v1::WatchRequest>) -> Reply<Self::WatchStream> {
        let slot = stream_slot(&request)?;
        let v1::WatchRequest { ids, interval_ns } = request.into_inner();
        at_most("ids", &ids, MOST_IDS)?;
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
        let all = stream::select(changes, regular.flatten()).map(move |injection| {
            let _as_long_as_it_lasts = &slot;
            Ok(injection)
        });
        Ok(Response::new(Box::pin(all)))
    }

    type SampleStream = Streamed<v1::TargetSample>;

    async fn sample(&self, request: Request<v1::SampleRequest>) -> Reply<Self::SampleStream> {
        let slot = stream_slot(&request)?;
        let v1::SampleRequest { target, interval_ns } = request.into_inner();
        let readers = Arc::clone(&self.readers);
        let sampler = Arc::new(Mutex::new(Sampler::new(selector(target)?)));
        let samples = interval(interval_ns).then(move |()| {
            let _as_long_as_it_lasts = &slot;
            let (sampler, readers) = (Arc::clone(&sampler), Arc::clone(&readers));
            async move {
                reading(&readers, move || sampler.lock().unwrap_or_else(PoisonError::into_inner).sample())
                    .await
            }
        });
        Ok(Response::new(Box::pin(samples)))
    }
}

/// Whether an id given by a client names this injection: itself, or the order it is a part of. No order has the id of a part.
fn names(given: &str, id: &str) -> bool {
    let part = id.strip_prefix(given).and_then(|rest| rest.strip_prefix('.'));
    given == id || part.is_some_and(|n| n.parse::<u32>().is_ok())
}

/// The ids that the injections of an order have, which is about so many targets.
fn ids_of(order: &str, targets: usize) -> Vec<String> {
    if targets == 1 { vec![order.to_owned()] } else { (0..targets).map(|n| format!("{order}.{n}")).collect() }
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

/// Those of the targets that a caller chose by their identities; all, where he chose none.
fn only(targets: Vec<Target>, chosen: &[String]) -> Result<Vec<Target>, Status> {
    at_most("only", chosen, MOST_IDS)?;
    if chosen.is_empty() {
        return Ok(targets);
    }
    let known: Vec<_> = targets.into_iter().map(|target| (target.identity(), target)).collect();
    if let Some(gone) = chosen.iter().find(|id| known.iter().all(|(known, _)| known != *id)) {
        return Err(Status::not_found(format!("no target: {gone} was chosen and is not there any more")));
    }
    Ok(known.into_iter().filter(|(id, _)| chosen.contains(id)).map(|(_, target)| target).collect())
}

/// What a selector means now, as a fault of this scope takes hold of it, or thing by thing.
fn resolved(selector: &Selector, scope: Option<Scope>) -> v1::Resolved {
    // An interface is the one target that is no process.
    let scope = scope.unwrap_or(match selector {
        Selector::Interface { .. } => Scope::Network,
        Selector::Process { .. } | Selector::Cgroup(_) => Scope::Process,
    });
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

fn forbidden(error: Invalid) -> Status {
    Status::permission_denied(fitting(error.to_string()))
}

fn refused(error: EngineError) -> Status {
    let message = fitting(error.to_string());
    match error {
        EngineError::Invalid(_) => Status::invalid_argument(message),
        EngineError::Conflict(_) => Status::already_exists(message),
        EngineError::Unknown(_) => Status::not_found(message),
        EngineError::Full(_) => Status::resource_exhausted(message),
        EngineError::Leaving => Status::unavailable(message),
        EngineError::Stopped | EngineError::Host(_) => Status::failed_precondition(message),
    }
}

/// Does something that blocks, once one of the readers is free; first come, first served. A caller who goes away meanwhile
/// does not make room for another.
async fn reading<T: Send + 'static>(
    readers: &Arc<Semaphore>,
    f: impl FnOnce() -> T + Send + 'static,
) -> Result<T, Status> {
    let failed = |e: &dyn std::fmt::Display| Status::internal(format!("a task of the agent failed: {e}"));
    let reader = Arc::clone(readers).acquire_owned().await.map_err(|e| failed(&e))?;
    let read = move || {
        let _until_it_is_done = reader;
        f()
    };
    tokio::task::spawn_blocking(read).await.map_err(|e| failed(&e))
}

/// As [`reading`], on a thread that has to stand back.
async fn at_leisure<T: Send + 'static>(
    readers: &Arc<Semaphore>,
    f: impl FnOnce() -> T + Send + 'static,
) -> Result<T, Status> {
    let leisurely = || {
        proc::be_nice(LEISURE);
        f()
    };
    // A thread of its own: without CAP_SYS_NICE none becomes less nice again.
    let read = || thread::spawn(leisurely).join().unwrap_or_else(|panic| resume_unwind(panic));
    reading(readers, read).await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_kind_of_target_resolves() {
        let interface =
            Selector::Interface { name: "lo".to_owned(), netns: crate::target::NetnsSelector::Own };
        let found = resolved(&interface, None);
        assert_eq!((found.error.as_str(), found.targets.len()), ("", 1));
        let none = Selector::Process { pid: None, exe: Some("squall-none".to_owned()), cmdline: None };
        assert!(resolved(&none, None).error.contains("squall-none"));
    }

    #[test]
    fn an_order_has_its_parts_and_no_others() {
        assert_eq!(
            (ids_of("x", 1), ids_of("x", 2)),
            (vec!["x".to_owned()], vec!["x.0".to_owned(), "x.1".to_owned()])
        );
        for id in ["x", "x.0", "x.12"] {
            assert!(names("x", id), "{id}");
        }
        for id in ["x.zzz", "x.x", "x.0.1", "x0", "x.", "xx.0", "y"] {
            assert!(!names("x", id), "{id}");
        }
    }

    #[test]
    fn a_text_too_long_for_a_header_keeps_its_ends() {
        assert_eq!(fitting("short".to_owned()), "short");
        let long = fitting(format!("begin{}end", "x".repeat(30_000)));
        assert!(long.starts_with("begin") && long.ends_with("end") && long.len() < 4000, "{}", long.len());
    }
}
