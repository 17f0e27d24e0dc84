//! Our eBPF programs and their maps.

#![expect(unsafe_code, reason = "the maps are shared memory")]

use std::{
    collections::BTreeSet,
    io,
    ops::Deref,
    os::fd::{AsFd, AsRawFd, BorrowedFd},
    ptr::{self, NonNull},
    sync::{
        Arc, Mutex, MutexGuard, OnceLock, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    thread,
    time::Duration,
};

use anyhow::{Context, Result, anyhow, ensure};
use aya::{
    Ebpf, EbpfLoader,
    maps::{
        Array, HashMap, Map, MapData, MapError,
        lpm_trie::{Key, LpmTrie},
    },
    programs::{
        LinkOrder, SchedClassifier, TcAttachType, TestRun as _, TestRunOptions,
        tc::{NlOptions, SchedClassifierLink, SchedClassifierLinkId, TcAttachOptions},
    },
    util::KernelVersion,
};
use aya_log::EbpfLogger;
use nix::{
    errno::Errno,
    net::if_::if_nametoindex,
    sys::resource::{RLIM_INFINITY, Resource, setrlimit},
};
use squall_common::{
    packet::Address,
    quantiles::{NORMAL, PARETO, PARETONORMAL, Quantiles},
    rules::Cidr,
    sieve::WORDS,
    table::{Bucket, Cell, Direction, HISTOGRAM, QUANTILES, RULES, SETS, TABLES, Table},
};

use tokio::{
    io::{Interest, unix::AsyncFd},
    runtime::Handle,
    task::AbortHandle,
};

use super::{netns::Netns, steer, tc::Netlink};

/// The object that build.rs compiled.
static OBJECT: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/squall-tc"));

/// One of our programs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Program {
    /// On an interface.
    Port(Direction),
    /// On both ends of a line, in front of `sch_fq`.
    LineOut,
    /// On both ends of a line, behind it.
    LineIn,
    /// On a TAP device, in front of the queue.
    TapOut,
    /// On a TAP device, behind the queue.
    TapIn,
    /// Nowhere: it does nothing, and others are measured against it.
    Empty,
}

impl Program {
    const ALL: [Self; 6] = [
        Self::Port(Direction::Egress),
        Self::Port(Direction::Ingress),
        Self::LineOut,
        Self::LineIn,
        Self::TapOut,
        Self::TapIn,
    ];

    /// The symbol in the object. It is also the name of the filter where there is no TCX.
    fn name(self) -> &'static str {
        // Atomics that return the value before are of 5.12 (kernel/bpf/verifier.c, BPF_FETCH).
        let fetch = KernelVersion::current().is_ok_and(|kernel| kernel >= KernelVersion::new(5, 12, 0));
        match self {
            Self::Port(Direction::Egress) if fetch => "squall_egress",
            Self::Port(Direction::Ingress) if fetch => "squall_ingress",
            Self::Port(Direction::Egress) => "squall_egress_510",
            Self::Port(Direction::Ingress) => "squall_ingress_510",
            Self::LineOut => "squall_line_out",
            Self::LineIn => "squall_line_in",
            Self::TapOut => "squall_tap_out",
            Self::TapIn => "squall_tap_in",
            Self::Empty => "squall_empty",
        }
    }

    fn hook(self) -> TcAttachType {
        match self {
            Self::Port(Direction::Egress) | Self::LineOut | Self::TapOut => TcAttachType::Egress,
            Self::Port(Direction::Ingress) | Self::LineIn | Self::TapIn | Self::Empty => {
                TcAttachType::Ingress
            }
        }
    }
}

/// How a program is attached.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Hook {
    /// By a link that ends with the agent (Linux 6.6).
    Tcx,
    /// As a filter of a clsact qdisc, which stays until it is removed.
    Clsact,
}

/// A loaded set of programs with maps of their own.
pub struct Programs {
    ebpf: Ebpf,
    table: Arc<Mapped<Table>>,
    sets: Mapped<[Cell; SETS]>,
    delays: Arc<Mapped<[Bucket; HISTOGRAM]>>,
    distributions: Array<MapData, [i16; QUANTILES]>,
    cgroups: HashMap<MapData, u64, u64>,
    endpoints: HashMap<MapData, u32, u64>,
    sieve: Mapped<[Cell; WORDS]>,
    v4: LpmTrie<MapData, [u8; 4], u64>,
    v6: LpmTrie<MapData, [u8; 16], u64>,
    logger: AbortHandle,
    links: Vec<(Program, SchedClassifierLinkId)>,
}

/// Sets that are loaded already: the verifier takes longer than a fault should take to begin.
static SPARE: Mutex<Vec<Programs>> = Mutex::new(Vec::new());
/// So many are kept: what one injection after another takes and gives back, and one more.
const MOST_SPARE: usize = 2;
/// What [`Programs::keep_warm`] keeps.
static WARM: OnceLock<(Netns, Vec<SchedClassifierLink>)> = OnceLock::new();
/// How often it was taken or given back.
static MOVES: AtomicU64 = AtomicU64::new(0);
/// How long after it was taken another is loaded, unless it came back.
const RESTOCK: Duration = Duration::from_secs(1);

impl Programs {
    /// A set of programs, ready to attach. Must be called within the runtime.
    pub fn get() -> Result<Self> {
        let spare = spare().pop();
        let programs = match spare {
            Some(programs) => programs,
            None => Self::load()?,
        };
        let taken = MOVES.fetch_add(1, Ordering::Relaxed) + 1;
        let runtime = Handle::current();
        thread::Builder::new().name("spare".to_owned()).spawn(move || {
            thread::sleep(RESTOCK);
            if MOVES.load(Ordering::Relaxed) == taken {
                let _inside = runtime.enter();
                only_when_idle();
                Self::keep_spare();
            }
        })?;
        Ok(programs)
    }

    /// Keeps the hooks of TCX switched on for as long as the agent lives: where no other program of the system is attached, the
    /// kernel has to patch its code after an attachment before the program runs (`tcx_skeys_inc` in include/net/tcx.h, Linux
    /// 6.6). One that does nothing, in a network namespace that nobody uses, has it done ahead of need.
    pub fn keep_warm(&mut self, netns: Netns) -> Result<()> {
        let program = classifier(&mut self.ebpf, Program::Empty)?;
        program.load().context("loading the program that does nothing")?;
        let links = netns.run(|| {
            // As are the kernel's switches for what lines need.
            if let Err(error) = steer::flows_to_cpus("lo") {
                tracing::debug!("lo: {error}");
            }
            let attach = |way| {
                let options = TcAttachOptions::TcxOrder(LinkOrder::default());
                let id = program.attach_with_options("lo", way, options)?;
                Ok(program.take_link(id)?)
            };
            [TcAttachType::Egress, TcAttachType::Ingress].into_iter().map(attach).collect::<Result<Vec<_>>>()
        })?;
        let _kept_already = WARM.set((netns, links));
        Ok(())
    }

    /// Takes every program off again. Must be called in the network namespace in which they were attached.
    pub fn detach(&mut self) {
        for (program, link) in std::mem::take(&mut self.links) {
            let detached = classifier(&mut self.ebpf, program).and_then(|p| Ok(p.detach(link)?));
            // A filter is gone with its TAP device.
            if let Err(error) = detached {
                tracing::debug!("detaching {}: {error:#}", program.name());
            }
        }
        self.forget_filters();
    }

    /// From now on filters of these programs are nobody's.
    fn forget_filters(&mut self) {
        for program in Program::ALL {
            if let Ok(info) = classifier(&mut self.ebpf, program).and_then(|p| Ok(p.info()?)) {
                attached().remove(&info.id());
            }
        }
    }

    /// Gives the set to the next port. It is on no interface and has no rule any more.
    pub fn give_back(self) {
        self.table.clear();
        MOVES.fetch_add(1, Ordering::Relaxed);
        keep(self);
    }

    /// Loads a spare set, unless there is one. Must be called within the runtime.
    fn keep_spare() {
        if !spare().is_empty() {
            return;
        }
        match Self::load() {
            Ok(programs) => keep(programs),
            Err(error) => tracing::warn!("loading the eBPF programs ahead of need: {error:#}"),
        }
    }

    fn load() -> Result<Self> {
        // Maps count as locked memory before 5.11. Where raising the limit is refused, loading says what it lacks.
        if let Err(error) = setrlimit(Resource::RLIMIT_MEMLOCK, RLIM_INFINITY, RLIM_INFINITY) {
            tracing::debug!("raising the limit of locked memory: {error}");
        }
        if let Some(known) = SOCKET_CGROUPS.get() {
            return Self::load_with(*known);
        }
        let (programs, known) = match Self::load_with(true) {
            Ok(programs) => (programs, true),
            Err(error) => {
                // With less they may load; if not, that error is the one to be told.
                let programs = Self::load_with(false)?;
                tracing::debug!("no cgroups of sockets on this kernel: {error:#}");
                (programs, false)
            }
        };
        SOCKET_CGROUPS.get_or_init(|| known);
        Ok(programs)
    }

    fn load_with(cgroups: bool) -> Result<Self> {
        let known = u8::from(cgroups);
        let mut loader = EbpfLoader::new();
        let mut ebpf = loader
            .override_global("SOCKET_CGROUPS", &known, true)
            .load(OBJECT)
            .context("creating the eBPF maps")?;
        verify(&mut ebpf)?;
        let mut map =
            |name: &str| ebpf.take_map(name).ok_or_else(|| anyhow!("the eBPF object has no map {name}"));
        let table = Arc::new(Mapped::new(map("TABLE")?)?);
        let sets = Mapped::new(map("VALUE_SETS")?)?;
        let delays = Arc::new(Mapped::new(map("DELAYS")?)?);
        let distributions = Array::try_from(map("DISTRIBUTIONS")?)?;
        let cgroups = HashMap::try_from(map("CGROUP_SETS")?)?;
        let endpoints = HashMap::try_from(map("PORT_OWNERS")?)?;
        let sieve = Mapped::new(map("PEER_SIEVE")?)?;
        let v4 = LpmTrie::try_from(map("PEERS_V4")?)?;
        let v6 = LpmTrie::try_from(map("PEERS_V6")?)?;
        let logger = forward_log(&mut ebpf)?;
        let mut programs = Self {
            ebpf,
            table,
            sets,
            delays,
            distributions,
            cgroups,
            endpoints,
            sieve,
            v4,
            v6,
            logger,
            links: Vec::new(),
        };
        for (index, quantiles) in [&*NORMAL, &*PARETO, &*PARETONORMAL].into_iter().enumerate() {
            programs.write_quantiles(index, quantiles)?;
        }
        Ok(programs)
    }

    /// Writes the table of a rule's own, and gives its index.
    pub fn set_quantiles(&mut self, rule: usize, quantiles: &Quantiles) -> Result<usize> {
        let index = TABLES - RULES + rule;
        self.write_quantiles(index, quantiles)?;
        Ok(index)
    }

    fn write_quantiles(&mut self, index: usize, quantiles: &Quantiles) -> Result<()> {
        let entries: [i16; QUANTILES] = quantiles.entries().try_into().context("a table of another size")?;
        self.distributions.set(index as u32, entries, 0).context("writing a table of delays")
    }

    /// Says which clauses the sockets of a cgroup satisfy.
    pub fn set_cgroup(&mut self, id: u64, clauses: u64) -> Result<()> {
        self.cgroups.insert(id, clauses, 0).with_context(|| format!("writing cgroup {id} into the map"))
    }

    /// Forgets a cgroup.
    pub fn remove_cgroup(&mut self, id: u64) -> Result<()> {
        match self.cgroups.remove(&id) {
            Err(MapError::KeyNotFound) | Ok(()) => Ok(()),
            Err(error) => Err(error).with_context(|| format!("removing cgroup {id} from the map")),
        }
    }

    /// Says which cgroup listens on a port; `None`: nobody of interest.
    pub fn set_endpoint(&mut self, endpoint: u32, cgroup: Option<u64>) -> Result<()> {
        let done = match cgroup {
            Some(cgroup) => self.endpoints.insert(endpoint, cgroup, 0),
            None => self.endpoints.remove(&endpoint),
        };
        match done {
            Err(MapError::KeyNotFound) | Ok(()) => Ok(()),
            Err(error) => Err(error).context("writing the map of who listens"),
        }
    }

    /// Attaches a program to an interface of the calling thread's network namespace, before all others.
    pub fn attach(&mut self, program: Program, interface: &str, hook: Hook) -> Result<()> {
        let loaded = classifier(&mut self.ebpf, program)?;
        let options = match hook {
            Hook::Tcx => TcAttachOptions::TcxOrder(LinkOrder::first()),
            Hook::Clsact => {
                let index = if_nametoindex(interface).with_context(|| format!("looking for {interface}"))?;
                let way = match program.hook() {
                    TcAttachType::Egress => Direction::Egress,
                    _ => Direction::Ingress,
                };
                let priority = Netlink::open()?.foremost(index, way)?;
                // Before it is there, so that nobody takes it for a dead agent's.
                attached().insert(loaded.info()?.id());
                TcAttachOptions::Netlink(NlOptions { priority, ..NlOptions::default() })
            }
        };
        let link = loaded
            .attach_with_options(interface, program.hook(), options)
            .with_context(|| format!("attaching {} to {interface}", program.name()))?;
        self.links.push((program, link));
        Ok(())
    }

    /// Runs a program on a frame as if it came through the loopback interface of the calling thread's network namespace
    /// (`BPF_PROG_TEST_RUN`), so many times: its verdict, and how long one run took on the average.
    pub fn run(&mut self, program: Program, frame: &[u8], repeat: u32) -> Result<(i32, Duration)> {
        let loaded = classifier(&mut self.ebpf, program)?;
        if loaded.fd().is_err() {
            loaded.load()?;
        }
        let options = TestRunOptions { data_in: Some(frame), repeat, ..TestRunOptions::new() };
        let done = loaded.test_run(options).with_context(|| format!("running {}", program.name()))?;
        Ok((done.return_value as i32, done.duration))
    }

    /// The rules.
    pub fn table(&self) -> &Arc<Mapped<Table>> {
        &self.table
    }

    /// The histograms of delays.
    pub fn delays(&self) -> &Arc<Mapped<[Bucket; HISTOGRAM]>> {
        &self.delays
    }

    /// The clauses by [`squall_common::table::Dimension`].
    pub fn sets(&self) -> &[Cell; SETS] {
        &self.sets
    }

    /// The sieve in front of the prefixes.
    pub fn sieve(&self) -> &[Cell; WORDS] {
        &self.sieve
    }

    /// Says which clauses an address prefix satisfies.
    pub fn set_peers(&mut self, cidr: &Cidr, clauses: u64) -> Result<()> {
        let len = u32::from(cidr.prefix_len());
        match cidr.address() {
            Address::V4(a) => self.v4.insert(&Key::new(len, a), clauses, 0),
            Address::V6(a) => self.v6.insert(&Key::new(len, a), clauses, 0),
        }
        .with_context(|| format!("writing {cidr} into the map of peers"))
    }

    /// Forgets an address prefix.
    pub fn remove_peers(&mut self, cidr: &Cidr) -> Result<()> {
        let len = u32::from(cidr.prefix_len());
        match cidr.address() {
            Address::V4(a) => self.v4.remove(&Key::new(len, a)),
            Address::V6(a) => self.v6.remove(&Key::new(len, a)),
        }
        .with_context(|| format!("removing {cidr} from the map of peers"))
    }
}

impl Drop for Programs {
    fn drop(&mut self) {
        self.logger.abort();
        self.forget_filters();
    }
}

/// Removes our filters from an interface of the calling thread's network namespace, whichever agent put them there, except those that
/// another port of this one needs. An interface that is gone has none.
pub fn remove_filters(interface: &str) -> Result<()> {
    let index = match if_nametoindex(interface) {
        Ok(index) => index,
        Err(Errno::ENODEV) => return Ok(()),
        Err(error) => return Err(error).with_context(|| format!("looking for {interface}")),
    };
    let mut netlink = Netlink::open()?;
    let ours = netlink.filters(index)?.into_iter().filter(|filter| filter.name.starts_with("squall_"));
    let needed = attached().clone();
    ours.filter(|filter| !needed.contains(&filter.program)).try_for_each(|f| netlink.remove_filter(&f))
}

/// Ids of the programs that are filters because of this agent.
static ATTACHED: Mutex<BTreeSet<u32>> = Mutex::new(BTreeSet::new());

fn attached() -> MutexGuard<'static, BTreeSet<u32>> {
    ATTACHED.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Whether the kernel can say to which cgroup (v2) a packet's socket belongs: `bpf_skb_cgroup_id` is there only with
/// CONFIG_SOCK_CGROUP_DATA (net/core/filter.c, 4.18). Known once the programs were loaded.
static SOCKET_CGROUPS: OnceLock<bool> = OnceLock::new();

/// Whether rules may choose packets by the cgroup of their socket. `false` before [`Programs::get`] succeeded once.
#[must_use]
pub fn socket_cgroups() -> bool {
    SOCKET_CGROUPS.get().copied().unwrap_or(false)
}

fn spare() -> MutexGuard<'static, Vec<Programs>> {
    SPARE.lock().unwrap_or_else(PoisonError::into_inner)
}

fn keep(programs: Programs) {
    let mut spare = spare();
    if spare.len() < MOST_SPARE {
        spare.push(programs);
    }
}

/// Lets the calling thread run only where nobody else wants the CPU: the verifier must not be felt by those whom a fault is
/// about.
fn only_when_idle() {
    let no_priority = libc::sched_param { sched_priority: 0 };
    // SAFETY: the structure is valid, and 0 is the calling thread.
    if unsafe { libc::sched_setscheduler(0, libc::SCHED_IDLE, &raw const no_priority) } != 0 {
        tracing::debug!("lowering the priority of a thread: {}", io::Error::last_os_error());
    }
}

/// Has the kernel verify and take every program, all at once: each takes a while, and the verifier minds only its own.
fn verify(ebpf: &mut Ebpf) -> Result<()> {
    let names = Program::ALL.map(Program::name);
    thread::scope(|scope| {
        let of_ours = ebpf.programs_mut().filter(|(name, _)| names.contains(name));
        let loading: Vec<_> = of_ours
            .map(|(name, program)| {
                let load = move || -> Result<()> {
                    let program: &mut SchedClassifier =
                        program.try_into().with_context(|| format!("{name} is no classifier"))?;
                    program.load().with_context(|| format!("the kernel refuses the eBPF program {name}"))
                };
                thread::Builder::new().name("verify".to_owned()).spawn_scoped(scope, load)
            })
            .collect();
        ensure!(loading.len() == names.len(), "the eBPF object lacks one of {names:?}");
        for thread in loading {
            thread?.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
        }
        Ok(())
    })
}

fn classifier(ebpf: &mut Ebpf, program: Program) -> Result<&mut SchedClassifier> {
    let name = program.name();
    let program = ebpf.program_mut(name).ok_or_else(|| anyhow!("the eBPF object has no program {name}"))?;
    program.try_into().with_context(|| format!("{name} is no classifier"))
}

/// Passes on what the programs log, through the `log` crate, whose lines the agent's subscriber takes.
fn forward_log(ebpf: &mut Ebpf) -> Result<AbortHandle> {
    let logger = EbpfLogger::init(ebpf).context("opening the log of the eBPF programs")?;
    let runtime = Handle::current();
    let _inside = runtime.enter();
    // SAFETY: the logger owns its descriptor, gives the same one at any time, and lives in the AsyncFd.
    let logger = unsafe { AsyncFd::register_with_interest(logger, Interest::READABLE) };
    let mut logger = logger.context("watching the log")?;
    let task = runtime.spawn(async move {
        while let Ok(mut ready) = logger.readable_mut().await {
            ready.get_inner_mut().flush();
            ready.clear_ready();
        }
    });
    Ok(task.abort_handle())
}

/// What may be shared with a program as memory.
///
/// # Safety
///
/// The type consists of [`Cell`]s only, so that any bytes are valid and both sides may write at any time.
pub unsafe trait Shared {}

// SAFETY: cells only.
unsafe impl Shared for Table {}
// SAFETY: cells only.
unsafe impl Shared for [Cell; SETS] {}
// SAFETY: cells only.
unsafe impl Shared for [Cell; WORDS] {}
// SAFETY: a bucket is two cells.
unsafe impl Shared for [Bucket; HISTOGRAM] {}

/// The memory of an array map.
#[derive(Debug)]
pub struct Mapped<T: Shared> {
    memory: NonNull<T>,
}

// SAFETY: all access is through cells, which are atomic in the agent.
unsafe impl<T: Shared> Send for Mapped<T> {}
// SAFETY: as above.
unsafe impl<T: Shared> Sync for Mapped<T> {}

impl<T: Shared> Mapped<T> {
    fn new(map: Map) -> Result<Self> {
        let Map::Array(map) = map else { return Err(anyhow!("the map is no array")) };
        let needed = size_of::<T>() as u64;
        let info = map.info().context("asking for the size of a map")?;
        let has = u64::from(info.max_entries()) * u64::from(info.value_size().next_multiple_of(8));
        if has < needed {
            return Err(anyhow!("a map has {has} bytes instead of {needed}"));
        }
        Self::map(map.fd().as_fd()).context("mapping an eBPF map into memory")
    }

    fn map(fd: BorrowedFd<'_>) -> io::Result<Self> {
        let access = libc::PROT_READ | libc::PROT_WRITE;
        let fd = fd.as_raw_fd();
        // SAFETY: a new mapping at an address that the kernel chooses.
        let memory = unsafe { libc::mmap(ptr::null_mut(), size_of::<T>(), access, libc::MAP_SHARED, fd, 0) };
        if memory == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let memory = NonNull::new(memory.cast()).ok_or_else(|| io::Error::other("mapped at address 0"))?;
        Ok(Self { memory })
    }

    /// Sets every cell to 0.
    fn clear(&self) {
        let cells = ptr::slice_from_raw_parts(
            self.memory.as_ptr().cast::<Cell>(),
            size_of::<T>() / size_of::<Cell>(),
        );
        // SAFETY: the mapping lives as long as self, and all of it is cells.
        unsafe { &*cells }.iter().for_each(|cell| cell.store(0));
    }
}

impl<T: Shared> Deref for Mapped<T> {
    type Target = T;

    fn deref(&self) -> &T {
        // SAFETY: the mapping lives as long as self, is page aligned, was checked to be large enough, and any bytes are
        // a valid T.
        unsafe { self.memory.as_ref() }
    }
}

impl<T: Shared> Drop for Mapped<T> {
    fn drop(&mut self) {
        // SAFETY: our own mapping, with its own length; no reference outlives self.
        if unsafe { libc::munmap(self.memory.as_ptr().cast(), size_of::<T>()) } != 0 {
            tracing::error!("unmapping an eBPF map: {}", io::Error::last_os_error());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Needs root.
    #[tokio::test(flavor = "multi_thread")]
    async fn privileged_the_verifier_accepts_every_program() {
        let start = std::time::Instant::now();
        let mut programs = match Programs::get() {
            Ok(programs) => programs,
            Err(error) => panic!("{error:#}"),
        };
        println!("loaded in {:?}", start.elapsed());
        for program in Program::ALL {
            let info =
                classifier(&mut programs.ebpf, program).and_then(|p| Ok(p.info()?)).expect("it is loaded");
            // Of one million. Each costs time when an agent starts.
            let verified = info.verified_instruction_count();
            println!("{}: {verified:?} instructions verified", program.name());
            assert!(verified.is_none_or(|n| n < 400_000), "{} takes the verifier too long", program.name());
        }
    }
}
