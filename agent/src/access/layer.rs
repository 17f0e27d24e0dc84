//! The one door: every call of every service on every socket comes through here, and nothing is done that no rule allows.

use std::{
    mem,
    task::{self, Poll},
};

use futures::future::BoxFuture;
use tonic::{Status, body::Body, codegen::http};
use tower::{Layer, Service};

use super::{
    Access,
    audit::Entry,
    listen::Caller,
    policy::{DESCRIBE, Grant, Role, needed},
    tokens::Token,
};
use crate::metrics::METRICS;

impl Access {
    /// What this caller may do, with the token he shows, where he may call this at all.
    async fn admit(
        &self,
        caller: Option<&Caller>,
        path: &str,
        token: Option<Result<Token, Status>>,
    ) -> Result<Grant, Status> {
        let Some(caller) = caller else { return Err(Status::unauthenticated("who is calling is not known")) };
        let needed = needed(path);
        let mut names = caller.names.clone();
        let mut grant = self.policy.get().grant(&names);
        let mut hint = "";
        // Who may take back by his connection alone waits for no review, and fails by none.
        let enough = needed == Role::Revert && grant.is_some();
        match (token.filter(|_| !enough), &self.tokens) {
            (None, _) => {}
            (Some(_), None) => {
                hint = "; its token was not looked at: the agent was started without --kubernetes-tokens";
            }
            (Some(token), Some(tokens)) => {
                let named = match token {
                    Ok(token) => tokens.name(&token, &names.join(" ")).await,
                    Err(status) => Err(status),
                };
                let name = named.inspect_err(|status| {
                    METRICS.refused("token");
                    self.refused(&names, String::new(), path, status.message());
                })?;
                names.push(name);
                grant = self.policy.get().grant(&names);
            }
        }
        match grant {
            Some(grant) if grant.role >= needed => Ok(grant),
            grant => {
                let (role, has) = match &grant {
                    Some(grant) => (format!("{:?}", grant.role), format!("has the role {:?}", grant.role)),
                    None => (String::new(), "is in no rule of this agent's policy".to_owned()),
                };
                let token =
                    names.get(caller.names.len()).map(|name| format!(" with {name}")).unwrap_or_default();
                let why = format!("{caller}{token} {has}, and this takes {needed:?}{hint}");
                METRICS.refused("role");
                self.refused(&names, role, path, &why);
                Err(Status::permission_denied(why))
            }
        }
    }

    /// Writes down that a call was not let in.
    fn refused(&self, names: &[String], role: String, path: &str, why: &str) {
        let method = path.rsplit('/').next().unwrap_or(path).to_owned();
        self.audit.note(Entry {
            who: names.join(" "),
            role,
            method,
            verdict: "refused".to_owned(),
            reason: why.to_owned(),
            ..Entry::default()
        });
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
    S: Service<http::Request<Body>, Response = http::Response<Body>> + Clone + Send + 'static,
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
        let token = Token::take(request.headers_mut());
        let path = request.uri().path().to_owned();
        let access = self.access.clone();
        // What is ready goes with the call; the copy is for the next one.
        let next = self.inner.clone();
        let mut inner = mem::replace(&mut self.inner, next);
        Box::pin(async move {
            let grant = match access.admit(caller.as_ref(), &path, token).await {
                Ok(grant) => grant,
                Err(status) => return Ok(status.into_http()),
            };
            // Who only takes back, or asks what there is to take back, waits behind nobody. To describe targets takes reading, and
            // has places of its own: whoever may do no more takes none from those who renew.
            let quota = caller.as_ref().and_then(|caller| match needed(&path) {
                Role::Revert => (path == DESCRIBE).then_some(&caller.gate.describes),
                _ => Some(&caller.gate.calls),
            });
            let mut slot = None;
            if let Some(quota) = quota {
                slot = quota.take(&grant.who);
                if slot.is_none() {
                    METRICS.refused("calls");
                    let why = format!("{} has too many calls under way; wait for some of them", grant.who);
                    return Ok(Status::resource_exhausted(why).into_http());
                }
            }
            request.extensions_mut().insert(grant);
            let _slot = slot;
            inner.call(request).await
        })
    }
}
