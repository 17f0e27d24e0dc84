//! The one door: every call of every service on every socket comes through here, and nothing is done that no rule allows.

use std::task::{self, Poll};

use futures::future::BoxFuture;
use tonic::{Status, body::Body, codegen::http};
use tower::{Layer, Service};

use super::{
    Access,
    audit::Entry,
    listen::Caller,
    policy::{Grant, Role, needed},
};
use crate::metrics::METRICS;

impl Access {
    /// What this caller may do, where he may call this at all.
    fn admit(&self, caller: Option<&Caller>, path: &str) -> Result<Grant, Status> {
        let Some(caller) = caller else { return Err(Status::unauthenticated("who is calling is not known")) };
        let grant = self.policy.get().grant(&caller.names);
        let needed = needed(path);
        match grant {
            Some(grant) if grant.role >= needed => Ok(grant),
            grant => {
                let who = caller.names.join(" ");
                let (role, has) = match &grant {
                    Some(grant) => (format!("{:?}", grant.role), format!("has the role {:?}", grant.role)),
                    None => (String::new(), "is in no rule of this agent's policy".to_owned()),
                };
                let why = format!("{caller} {has}, and this takes {needed:?}");
                let method = path.rsplit('/').next().unwrap_or(path).to_owned();
                self.audit.note(Entry {
                    who,
                    role,
                    method,
                    verdict: "refused".to_owned(),
                    reason: why.clone(),
                    ..Entry::default()
                });
                METRICS.refused("role");
                Err(Status::permission_denied(why))
            }
        }
    }
}

impl<S> Layer<S> for Access {
    type Service = Guarded<S>;

    fn layer(&self, inner: S) -> Guarded<S> {
        Guarded { inner, access: self.clone() }
    }
}

/// A service behind the door.
#[derive(Clone)]
pub struct Guarded<S> {
    inner: S,
    access: Access,
}

impl<S> Service<http::Request<Body>> for Guarded<S>
where
    S: Service<http::Request<Body>, Response = http::Response<Body>>,
    S::Future: Send + 'static,
    S::Error: Send + 'static,
{
    type Response = S::Response;
    type Error = S::Error;
    type Future = BoxFuture<'static, Result<S::Response, S::Error>>;

    fn poll_ready(&mut self, cx: &mut task::Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, mut request: http::Request<Body>) -> Self::Future {
        let caller = request.extensions().get::<Caller>().cloned();
        let grant = match self.access.admit(caller.as_ref(), request.uri().path()) {
            Ok(grant) => grant,
            Err(status) => return Box::pin(async move { Ok(status.into_http()) }),
        };
        // Who only takes back, or asks what there is to take back, waits behind nobody.
        let mut slot = None;
        if needed(request.uri().path()) > Role::Revert {
            slot = caller.and_then(|caller| caller.gate.calls.take(&grant.who));
            if slot.is_none() {
                METRICS.refused("calls");
                let why = format!("{} has too many calls under way; wait for some of them", grant.who);
                return Box::pin(async move { Ok(Status::resource_exhausted(why).into_http()) });
            }
        }
        request.extensions_mut().insert(grant);
        let done = self.inner.call(request);
        Box::pin(async move {
            let _slot = slot;
            done.await
        })
    }
}
