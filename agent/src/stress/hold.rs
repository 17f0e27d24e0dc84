//! Holding a given amount of memory.

use std::{
    io,
    sync::{
        Arc, Condvar, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use super::Size;
use crate::host::{cgroup::node_memory, memory::Region};

/// Largest step: what a ramp may be off by, and what can be overshot when others allocate at the same moment.
const LARGEST_STEP: u64 = 8 << 20;
/// A gap to the wanted usage that is not worth a step: the kernel charges memory in batches of 64 pages a CPU
/// [`include/linux/memcontrol.h`, `MEMCG_CHARGE_BATCH`, 6.1].
const CLOSE: u64 = 512 << 10;
/// How often a ramp goes on.
const TICK: Duration = Duration::from_millis(10);
/// How often memory that could not be locked is touched again.
const TOUCH: Duration = Duration::from_secs(1);

/// A thread that holds memory.
#[derive(Debug)]
pub(super) struct Holder(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    wanted: Mutex<Wanted>,
    changed: Condvar,
    held: AtomicU64,
    error: Mutex<Option<String>>,
}

#[derive(Debug, Clone)]
struct Wanted {
    /// Goes up with each change.
    version: u64,
    size: Size,
    ramp: Duration,
    spare: u64,
}

impl Holder {
    /// Starts to hold memory.
    pub(super) fn start(size: Size, ramp: Duration, spare: u64) -> io::Result<Self> {
        let shared = Arc::new(Shared {
            wanted: Mutex::new(Wanted { version: 1, size, ramp, spare }),
            changed: Condvar::new(),
            held: AtomicU64::new(0),
            error: Mutex::new(None),
        });
        let (total, _) = node_memory()?;
        let holder = Arc::clone(&shared);
        thread::Builder::new().name("squall-hold".into()).spawn(move || {
            let held = Region::reserve(total).map(|region| holder.hold(region));
            if let Err(error) = held {
                holder.fail(Some(&error));
            }
        })?;
        Ok(Self(shared))
    }

    /// Goes on to another size, from where it is now.
    pub(super) fn change(&self, size: Size, ramp: Duration, spare: u64) {
        let mut wanted = self.0.wanted.lock().unwrap_or_else(PoisonError::into_inner);
        *wanted = Wanted { version: wanted.version + 1, size, ramp, spare };
        self.0.changed.notify_one();
    }

    /// Bytes held now.
    pub(super) fn held(&self) -> u64 {
        self.0.held.load(Ordering::Relaxed)
    }

    /// Why it stopped growing.
    pub(super) fn error(&self) -> Option<String> {
        self.0.error.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

impl Shared {
    fn fail(&self, error: Option<&io::Error>) {
        *self.error.lock().unwrap_or_else(PoisonError::into_inner) = error.map(ToString::to_string);
    }

    /// Holds memory until the process ends. What cannot be had is tried again; what is held stays held.
    fn hold(&self, mut region: Region) {
        let mut wanted = self.wanted.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let mut ramp = Ramp::start(&wanted, region.held());
        let mut touched = Instant::now();
        loop {
            let step = match ramp.step(region.held()) {
                // Also the node's memory is looked at before each step: what runs short there is everybody's.
                Step::Grow(bytes) if !leaves(wanted.spare, bytes) => Step::Wait,
                step => step,
            };
            let taken = match step {
                Step::Grow(bytes) => region.grow(bytes),
                Step::Shrink(bytes) => region.shrink(bytes),
                Step::Wait | Step::Done => Ok(()),
            };
            if !matches!(step, Step::Wait) {
                self.fail(taken.as_ref().err());
            }
            let step = if taken.is_ok() { step } else { Step::Wait };
            self.held.store(region.held(), Ordering::Relaxed);
            if !region.locked() && touched.elapsed() > TOUCH {
                region.touch();
                touched = Instant::now();
            }
            let pause = match step {
                Step::Grow(_) | Step::Shrink(_) => Duration::ZERO,
                Step::Wait => TICK,
                Step::Done => TOUCH,
            };
            let mut latest = self.wanted.lock().unwrap_or_else(PoisonError::into_inner);
            let version = wanted.version;
            if !pause.is_zero() {
                let same = |latest: &mut Wanted| latest.version == version;
                let rested = self.changed.wait_timeout_while(latest, pause, same);
                latest = rested.unwrap_or_else(PoisonError::into_inner).0;
            }
            if latest.version != version {
                wanted = latest.clone();
                drop(latest);
                ramp = Ramp::start(&wanted, region.held());
            }
        }
    }
}

/// Whether the node still has its spare memory after a step.
fn leaves(spare: u64, bytes: u64) -> bool {
    node_memory().is_ok_and(|(_, available)| available >= spare.saturating_add(bytes))
}

/// The way from one amount to another.
///
/// Once the wanted usage is reached, what that took is held: it neither shrinks when the service grows, or a service
/// that balloons would never feel the limit, nor grows when the service shrinks, or each breath of the service would
/// be ratcheted up until it is out of memory.
#[derive(Debug)]
struct Ramp {
    size: Size,
    length: Duration,
    started: Instant,
    from: u64,
    done: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Step {
    Grow(u64),
    Shrink(u64),
    Wait,
    Done,
}

impl Ramp {
    fn start(wanted: &Wanted, held: u64) -> Self {
        let from = match &wanted.size {
            Size::Held(_) => held,
            Size::Usage(gauge, _) => gauge.read().unwrap_or(0),
        };
        let (size, length) = (wanted.size.clone(), wanted.ramp);
        Self { size, length, started: Instant::now(), from, done: false }
    }

    fn step(&mut self, held: u64) -> Step {
        if self.done {
            return Step::Done;
        }
        let along = if self.length.is_zero() {
            1.0
        } else {
            self.started.elapsed().div_duration_f64(self.length).min(1.0)
        };
        let step = match &self.size {
            Size::Held(bytes) => to_size(between(self.from, *bytes, along), held),
            Size::Usage(gauge, bytes) => match gauge.read() {
                Some(usage) => to_usage(between(self.from, *bytes, along), usage, held),
                None => Step::Wait,
            },
        };
        if step == Step::Done && along < 1.0 {
            return Step::Wait;
        }
        self.done = step == Step::Done;
        step
    }
}

fn between(from: u64, to: u64, along: f64) -> u64 {
    if along >= 1.0 {
        return to;
    }
    (to as f64 - from as f64).mul_add(along, from as f64) as u64
}

fn to_size(wanted: u64, held: u64) -> Step {
    // Held is in whole pages.
    let page = procfs::page_size();
    match wanted.next_multiple_of(page) {
        wanted if wanted > held => Step::Grow((wanted - held).min(LARGEST_STEP)),
        wanted if wanted < held => Step::Shrink(held - wanted),
        _ => Step::Done,
    }
}

/// Halves the gap with each step, so that it never goes past.
fn to_usage(wanted: u64, usage: u64, held: u64) -> Step {
    if usage + CLOSE < wanted {
        return Step::Grow(((wanted - usage) / 2).min(LARGEST_STEP));
    }
    if usage > wanted + CLOSE && held > 0 {
        return Step::Shrink((usage - wanted).min(held));
    }
    Step::Done
}

#[cfg(test)]
mod tests {
    use rstest::rstest;

    use super::{super::Gauge, *};

    const MIB: u64 = 1 << 20;

    #[rstest]
    #[case(100 * MIB, 0, Step::Grow(LARGEST_STEP))]
    #[case(3 * MIB, 2 * MIB, Step::Grow(MIB))]
    #[case(2 * MIB, 3 * MIB, Step::Shrink(MIB))]
    #[case(2 * MIB - 1, 2 * MIB, Step::Done)]
    fn steps_to_a_size(#[case] wanted: u64, #[case] held: u64, #[case] step: Step) {
        assert_eq!(to_size(wanted, held), step);
    }

    #[rstest]
    #[case(100 * MIB, 10 * MIB, 0, Step::Grow(LARGEST_STEP))]
    #[case(100 * MIB, 96 * MIB, 0, Step::Grow(2 * MIB))]
    #[case(100 * MIB, 100 * MIB - CLOSE, 7, Step::Done)]
    #[case(100 * MIB, 120 * MIB, 5 * MIB, Step::Shrink(5 * MIB))]
    #[case(100 * MIB, 120 * MIB, 0, Step::Done)]
    fn steps_to_a_usage(#[case] wanted: u64, #[case] usage: u64, #[case] held: u64, #[case] step: Step) {
        assert_eq!(to_usage(wanted, usage, held), step);
    }

    #[test]
    fn ramp_is_straight_in_both_directions() {
        assert_eq!(between(0, 100, 0.25), 25);
        assert_eq!(between(100, 0, 0.25), 75);
        assert_eq!(between(3, u64::MAX, 1.0), u64::MAX);
    }

    #[test]
    fn usage_is_followed_up_to_the_goal_and_never_again() {
        let gauge = Gauge::Node;
        let now = gauge.read().expect("the node's memory");
        let wanted = Wanted { version: 1, size: Size::Usage(gauge, now / 2), ramp: Duration::ZERO, spare: 0 };
        let mut ramp = Ramp::start(&wanted, 0);
        assert_eq!(ramp.step(0), Step::Done, "the node uses more than that already");
        ramp.size = Size::Held(5 * MIB);
        assert_eq!(ramp.step(0), Step::Done);
    }

    #[test]
    fn spare_memory_of_the_node_is_not_taken() {
        assert!(!leaves(u64::MAX, 1));
        assert!(leaves(0, 1));
    }

    #[test]
    fn holder_goes_up_and_down_as_told() {
        let holder = Holder::start(Size::Held(20 * MIB), Duration::from_millis(50), 0).expect("started");
        let until = |bytes| {
            while holder.held() != bytes {
                assert_eq!(holder.error(), None);
                thread::sleep(Duration::from_millis(1));
            }
        };
        until(20 * MIB);
        holder.change(Size::Held(4 * MIB), Duration::ZERO, 0);
        until(4 * MIB);
        holder.change(Size::Held(9 * MIB), Duration::ZERO, 0);
        until(9 * MIB);
    }
}
