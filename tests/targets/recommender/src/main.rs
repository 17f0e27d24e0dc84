//! `recommender`: the service under test. `GET /recommend?user_id=U123` answers with at least eight items: from Redis,
//! or, where Redis is slow or gone, from a list made beforehand.
//!
//! It is built to survive every fault of the demo plan. `--defect` takes one of its defences away, so that a gate of
//! the plan has something to catch.

mod cache;
mod catalog;
mod metrics;

use std::{
    io::Write,
    net::SocketAddr,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::Instant,
};

use anyhow::{Context, Result};
use axum::{
    Json, Router,
    extract::{Query, State},
    http::{StatusCode, header},
    response::{IntoResponse, Response},
    routing::get,
};
use clap::{Parser, ValueEnum};
use serde::{Deserialize, Serialize};
use serde_json::json;
use tokio::{
    net::TcpListener,
    runtime::Handle,
    signal::unix::{SignalKind, signal},
};

use crate::{
    cache::{Cache, Miss},
    metrics::Metrics,
};

/// One in so many requests leaks a task.
const LEAK_EVERY: u64 = 10;
/// What the balloon keeps of each request.
const BALLOON_BYTES: usize = 16 * 1024;
/// Requests after which the balloon stops growing, so that it never takes a host's memory: 256 MiB.
const BALLOON_MOST: usize = 16 * 1024;

/// An HTTP recommender in front of Redis.
#[derive(Debug, Parser)]
struct Args {
    /// Address to serve on.
    #[arg(long, default_value = "127.0.0.1:8080")]
    listen: SocketAddr,
    /// Address of the Redis server.
    #[arg(long, default_value = "127.0.0.1:6379")]
    redis: SocketAddr,
    /// Does nothing but stand in the command line, so that a selector can tell instances apart.
    #[arg(long, default_value = "recommender")]
    name: String,
    /// Take a defence away.
    #[arg(long)]
    defect: Option<Defect>,
}

/// A defence that is missing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Defect {
    /// Every tenth request starts a task that never ends.
    Leak,
    /// Redis is waited for as long as it takes.
    NoTimeout,
    /// An error from Redis becomes a status 500.
    NoFallback,
    /// Every request leaves 16 KiB behind, up to 256 MiB.
    Balloon,
}

struct Service {
    cache: Cache,
    metrics: Metrics,
    defect: Option<Defect>,
    served: AtomicU64,
    balloon: Mutex<Vec<Vec<u8>>>,
}

#[derive(Deserialize)]
struct Asked {
    user_id: String,
}

#[derive(Serialize)]
struct Answer {
    user_id: String,
    category: &'static str,
    items: Vec<String>,
    fallback_used: bool,
    degraded: Option<&'static str>,
}

#[tokio::main(flavor = "multi_thread", worker_threads = 2)]
async fn main() -> Result<()> {
    let args = Args::parse();
    let service = Arc::new(Service {
        cache: Cache::start(args.redis, args.defect != Some(Defect::NoTimeout))?,
        metrics: Metrics::new()?,
        defect: args.defect,
        served: AtomicU64::new(0),
        balloon: Mutex::default(),
    });
    let listener =
        TcpListener::bind(args.listen).await.with_context(|| format!("cannot listen on {}", args.listen))?;
    log(&json!({ "level": "info", "message": "serving", "name": args.name, "listen": args.listen }));
    let mut terminate = signal(SignalKind::terminate())?;
    axum::serve(listener, router(service))
        .with_graceful_shutdown(async move {
            tokio::select! {
                _ = terminate.recv() => {}
                _ = tokio::signal::ctrl_c() => {}
            }
        })
        .await
        .context("the HTTP server failed")
}

fn router(service: Arc<Service>) -> Router {
    Router::new()
        .route("/recommend", get(recommend))
        .route("/metrics", get(scrape))
        .route("/healthz", get(|| async { "ok\n" }))
        .with_state(service)
}

async fn recommend(State(service): State<Arc<Service>>, Query(asked): Query<Asked>) -> Response {
    let started = Instant::now();
    let _in_flight = service.metrics.in_flight();
    service.go_wrong();
    let category = catalog::category(&asked.user_id);
    let (status, body) = match service.cache.items(category).await {
        Ok(mut items) => {
            let start = catalog::hash(&asked.user_id) as usize % items.len();
            items.rotate_left(start);
            (StatusCode::OK, Some((items, None)))
        }
        Err(miss) if service.defect == Some(Defect::NoFallback) => {
            log(&json!({ "level": "error", "message": "no recommendations", "reason": miss.reason() }));
            (StatusCode::INTERNAL_SERVER_ERROR, None)
        }
        Err(miss) => {
            service.metrics.fell_back(miss);
            log(&json!({
                "level": "warn",
                "message": "served the fallback list",
                "fallback_reason": miss.reason(),
                "user_id": asked.user_id,
            }));
            (StatusCode::OK, Some((catalog::fallback(&asked.user_id), Some(miss))))
        }
    };
    service.metrics.answered(status, started.elapsed());
    match body {
        None => (status, Json(json!({ "error": "no recommendations" }))).into_response(),
        Some((items, miss)) => Json(Answer {
            user_id: asked.user_id,
            category,
            items,
            fallback_used: miss.is_some(),
            degraded: miss.map(Miss::reason),
        })
        .into_response(),
    }
}

async fn scrape(State(service): State<Arc<Service>>) -> Response {
    match service.metrics.render(Handle::current().metrics().num_alive_tasks()) {
        Ok(text) => ([(header::CONTENT_TYPE, "text/plain; version=0.0.4")], text).into_response(),
        Err(e) => (StatusCode::INTERNAL_SERVER_ERROR, format!("{e:#}\n")).into_response(),
    }
}

impl Service {
    /// The defects that do not wait for a fault.
    fn go_wrong(&self) {
        let n = self.served.fetch_add(1, Ordering::Relaxed);
        match self.defect {
            Some(Defect::Leak) if n.is_multiple_of(LEAK_EVERY) => {
                tokio::spawn(std::future::pending::<()>());
            }
            Some(Defect::Balloon) => {
                let mut balloon = self.balloon.lock().unwrap_or_else(PoisonError::into_inner);
                if balloon.len() < BALLOON_MOST {
                    // Not zeros: those would stay one shared page.
                    balloon.push(vec![n as u8 | 1; BALLOON_BYTES]);
                }
            }
            _ => {}
        }
    }
}

/// One line of JSON on standard error. A log that cannot be written is no reason to fail a request.
fn log(line: &serde_json::Value) {
    let _ = writeln!(std::io::stderr().lock(), "{line}");
}
