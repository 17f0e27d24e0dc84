//! A tiny DNS server, and questions to one.

use std::{
    collections::BTreeMap,
    io,
    net::{IpAddr, SocketAddr, UdpSocket},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use hickory_proto::{
    op::{Message, OpCode, Query, ResponseCode},
    rr::{Name, RData, Record, RecordType},
};

use crate::{Netns, Sockets};

type Zone = BTreeMap<String, Vec<IpAddr>>;

/// A DNS server on UDP port 53 of every address of one family in a namespace. Ends when dropped.
#[derive(Debug)]
pub struct NameServer {
    zone: Arc<Mutex<Zone>>,
    asked: Arc<Mutex<Vec<String>>>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

/// What a client makes of an answer.
#[derive(Debug, PartialEq, Eq)]
pub struct Answer {
    /// `NXDomain`, `ServFail`, …
    pub code: ResponseCode,
    /// The addresses, ascending.
    pub addresses: Vec<IpAddr>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl NameServer {
    /// Starts one that knows no names.
    pub fn start(netns: &Netns, like: IpAddr) -> Result<Self> {
        let socket = netns.udp(like, 53)?;
        socket.set_read_timeout(Some(Duration::from_millis(50)))?;
        let zone = Arc::<Mutex<Zone>>::default();
        let asked = Arc::<Mutex<Vec<String>>>::default();
        let stop = Arc::<AtomicBool>::default();
        let shared = (Arc::clone(&zone), Arc::clone(&asked), Arc::clone(&stop));
        let thread = thread::spawn(move || {
            let (zone, asked, stop) = shared;
            let mut buffer = [0; 1500];
            while !stop.load(Ordering::Relaxed) {
                let Ok((length, from)) = socket.recv_from(&mut buffer) else { continue };
                if let Some((name, answer)) = answer(&buffer[..length], &lock(&zone)) {
                    lock(&asked).push(name);
                    // A client that is gone is nothing to us.
                    let _ = socket.send_to(&answer, from);
                }
            }
        });
        Ok(Self { zone, asked, stop, thread: Some(thread) })
    }

    /// Gives a name these addresses from now on; with none, it does not exist.
    pub fn set(&self, name: &str, addresses: &[IpAddr]) {
        lock(&self.zone).insert(name.to_owned(), addresses.to_vec());
    }

    /// The names it was asked for since the last call.
    #[must_use]
    pub fn asked(&self) -> Vec<String> {
        std::mem::take(&mut lock(&self.asked))
    }
}

impl Drop for NameServer {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _panicked = thread.join();
        }
    }
}

fn answer(bytes: &[u8], zone: &Zone) -> Option<(String, Vec<u8>)> {
    let query = Message::from_vec(bytes).ok()?;
    let question = query.queries.first()?;
    let name = question.name().to_ascii().trim_end_matches('.').to_lowercase();
    let mut answer = Message::response(query.metadata.id, OpCode::Query);
    answer.add_query(question.clone());
    match zone.get(&name).filter(|addresses| !addresses.is_empty()) {
        None => answer.metadata.response_code = ResponseCode::NXDomain,
        Some(addresses) => {
            for address in addresses {
                let data = match (address, question.query_type()) {
                    (IpAddr::V4(a), RecordType::A) => RData::A((*a).into()),
                    (IpAddr::V6(a), RecordType::AAAA) => RData::AAAA((*a).into()),
                    _ => continue,
                };
                answer.add_answer(Record::from_rdata(question.name().clone(), 1, data));
            }
        }
    }
    Some((name, answer.to_vec().ok()?))
}

/// Asks a server from a namespace for a name's addresses of a type. None where nothing comes within the time; and how long
/// it took.
pub fn ask(
    from: &Netns,
    server: IpAddr,
    name: &str,
    kind: RecordType,
    most: Duration,
) -> Result<(Option<Answer>, Duration)> {
    static NEXT: std::sync::atomic::AtomicU16 = std::sync::atomic::AtomicU16::new(1);
    let id = NEXT.fetch_add(1, Ordering::Relaxed);
    let mut query = Message::query();
    query.metadata.id = id;
    query.metadata.recursion_desired = true;
    query.add_query(Query::query(Name::from_ascii(name)?, kind));
    let socket: UdpSocket = from.udp(server, 0)?;
    socket.set_read_timeout(Some(most))?;
    let started = Instant::now();
    socket.connect(SocketAddr::new(server, 53))?;
    socket.send(&query.to_vec()?)?;
    let mut buffer = [0; 1500];
    let length = match socket.recv(&mut buffer) {
        Ok(length) => length,
        Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut) => {
            return Ok((None, started.elapsed()));
        }
        Err(error) => return Err(error).context("waiting for a DNS answer"),
    };
    let took = started.elapsed();
    let answer = Message::from_vec(&buffer[..length])?;
    ensure!(answer.metadata.id == id, "an answer to another question");
    let addresses = answer.answers.iter().filter_map(|record| match &record.data {
        RData::A(a) => Some(IpAddr::V4(a.0)),
        RData::AAAA(a) => Some(IpAddr::V6(a.0)),
        _ => None,
    });
    let mut addresses: Vec<IpAddr> = addresses.collect();
    addresses.sort_unstable();
    Ok((Some(Answer { code: answer.metadata.response_code, addresses }), took))
}
