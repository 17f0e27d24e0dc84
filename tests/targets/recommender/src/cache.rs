//! Redis, with a timeout and a breaker in front of it.
//!
//! All requests share one pipelined connection. Where Redis stops answering in time the breaker opens: requests get
//! their miss at once, and only the keeper goes on trying, each time over a new connection. (An old one would stay
//! silent for long after a partition has healed: TCP doubles its retransmission timeout up to two minutes.)

use std::{
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
    time::Duration,
};

use anyhow::{Context, Result};
use redis::{
    AsyncCommands, AsyncConnectionConfig, Client, RedisResult,
    aio::{ConnectionLike, MultiplexedConnection},
};
use tokio::{
    sync::{Notify, watch},
    time::{sleep, timeout},
};

use crate::catalog;

/// Longest wait for an answer.
const ANSWER: Duration = Duration::from_millis(150);
/// Longest wait for a new connection.
const CONNECT: Duration = Duration::from_millis(500);
/// Time between two attempts to close the breaker.
const RETRY: Duration = Duration::from_millis(250);
/// Misses in a row that open the breaker.
const TRIP: u32 = 5;

/// Why there was nothing from Redis.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Miss {
    /// It did not answer in time.
    Timeout,
    /// The connection failed, or the answer was an error.
    Error,
    /// It has failed too often to be asked.
    Open,
    /// It has no such list.
    Empty,
}

impl Miss {
    pub(crate) const ALL: [Self; 4] = [Self::Timeout, Self::Error, Self::Open, Self::Empty];

    /// As in the log and in the metrics.
    pub(crate) const fn reason(self) -> &'static str {
        match self {
            Self::Timeout => "cache_timeout",
            Self::Error => "cache_error",
            Self::Open => "cache_breaker_open",
            Self::Empty => "cache_empty",
        }
    }
}

/// Counts misses in a row.
#[derive(Debug, Default)]
struct Breaker(AtomicU32);

impl Breaker {
    fn succeeded(&self) {
        self.0.store(0, Ordering::Relaxed);
    }

    /// Whether this failure is the one that opens the breaker. Failures that come later, from requests that were
    /// already waiting, do not open it again.
    fn failed(&self) -> bool {
        self.0.fetch_add(1, Ordering::Relaxed) + 1 == TRIP
    }
}

struct Shared {
    breaker: Breaker,
    tripped: Notify,
    /// None while the breaker is open.
    connection: watch::Sender<Option<MultiplexedConnection>>,
}

/// A client of Redis that never keeps a request waiting for long.
pub(crate) struct Cache {
    shared: Arc<Shared>,
    wait: Option<Duration>,
}

impl Cache {
    /// Starts to connect, and to fill an empty Redis with the catalog. Without `timeouts` an answer is waited for as
    /// long as it takes.
    pub(crate) fn start(address: SocketAddr, timeouts: bool) -> Result<Self> {
        let client =
            Client::open(format!("redis://{address}/")).context("not an address of a Redis server")?;
        let shared = Arc::new(Shared {
            breaker: Breaker::default(),
            tripped: Notify::new(),
            connection: watch::Sender::new(None),
        });
        tokio::spawn(keep_connected(client, Arc::clone(&shared)));
        Ok(Self { shared, wait: timeouts.then_some(ANSWER) })
    }

    /// The items of a category; never an empty list.
    pub(crate) async fn items(&self, category: &str) -> Result<Vec<String>, Miss> {
        let Some(mut connection) = self.shared.connection.borrow().clone() else { return Err(Miss::Open) };
        let asked = connection.lrange(key(category), 0, -1);
        let answer: RedisResult<Vec<String>> = match self.wait {
            None => asked.await,
            Some(wait) => match timeout(wait, asked).await {
                Ok(answer) => answer,
                Err(_elapsed) => return Err(self.missed(Miss::Timeout)),
            },
        };
        match answer {
            Ok(items) => {
                self.shared.breaker.succeeded();
                if items.is_empty() { Err(Miss::Empty) } else { Ok(items) }
            }
            Err(_) => Err(self.missed(Miss::Error)),
        }
    }

    fn missed(&self, miss: Miss) -> Miss {
        if self.shared.breaker.failed() {
            self.shared.tripped.notify_one();
        }
        miss
    }
}

/// Holds one connection open; replaces it whenever the breaker trips.
async fn keep_connected(client: Client, shared: Arc<Shared>) {
    loop {
        match connect(&client).await {
            Ok(connection) => {
                shared.breaker.succeeded();
                shared.connection.send_replace(Some(connection));
                shared.tripped.notified().await;
                shared.connection.send_replace(None);
            }
            Err(e) => crate::log(&serde_json::json!({
                "level": "warn",
                "message": "no connection to Redis",
                "error": format!("{e:#}"),
            })),
        }
        sleep(RETRY).await;
    }
}

/// A new connection that has proven itself, to a Redis that has the catalog.
async fn connect(client: &Client) -> Result<MultiplexedConnection> {
    // Requests bring their own timeout, or, with a defect, none.
    let config = AsyncConnectionConfig::new().set_connection_timeout(None).set_response_timeout(None);
    let connecting = client.get_multiplexed_async_connection_with_config(&config);
    let mut connection = timeout(CONNECT, connecting).await.context("connecting took too long")??;
    timeout(ANSWER, seed(&mut connection)).await.context("the first answer took too long")??;
    Ok(connection)
}

/// Fills in the lists that are missing.
async fn seed(connection: &mut (impl ConnectionLike + Send + Sync)) -> RedisResult<()> {
    let mut ask = redis::pipe();
    for category in catalog::CATEGORIES {
        ask.exists(key(category));
    }
    let present: Vec<bool> = ask.query_async(connection).await?;
    let missing: Vec<_> = catalog::CATEGORIES.into_iter().zip(present).filter(|(_, there)| !there).collect();
    if missing.is_empty() {
        return Ok(());
    }
    let mut fill = redis::pipe();
    for (category, _) in missing {
        fill.del(key(category)).ignore().rpush(key(category), catalog::items(category)).ignore();
    }
    fill.atomic().query_async(connection).await
}

fn key(category: &str) -> String {
    format!("items:{category}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_breaker_trips_once_and_only_on_failures_in_a_row() {
        let breaker = Breaker::default();
        let trips = |n: u32| (0..n).filter(|_| breaker.failed()).count();
        assert_eq!(trips(TRIP - 1), 0);
        breaker.succeeded();
        assert_eq!(trips(TRIP - 1), 0);
        assert_eq!(trips(10), 1);
        breaker.succeeded();
        assert_eq!(trips(TRIP), 1);
    }
}
