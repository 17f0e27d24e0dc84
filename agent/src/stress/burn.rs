//! Burning a given share of CPU time.

use std::{
    io,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    thread,
    time::Duration,
};

use nix::{
    sched::{CpuSet, sched_setaffinity},
    sys::time::TimeSpec,
    time::{ClockId, ClockNanosleepFlags, clock_gettime, clock_nanosleep},
    unistd::Pid,
};

/// Length of one turn of burning and sleeping.
const PERIOD: Duration = Duration::from_millis(10);
/// CPU time that a worker may be owed, of turns in which others held its CPU too. More is written off: a load of 30 %
/// must not become one of 100 % because it had to wait before.
const MOST_OWED: i64 = 2 * PERIOD.as_nanos() as i64;
/// A share that no worker has: it ends.
const STOP: u64 = u64::MAX;

/// Worker threads, each with its share of a CPU.
#[derive(Debug, Default)]
pub(super) struct Burner {
    /// Shares in parts per million; read by the workers at the start of each turn.
    shares: Vec<Arc<AtomicU64>>,
}

impl Burner {
    /// Makes all workers together use so many CPUs, from the next turn on. Never more than one CPU each.
    pub(super) fn set(&mut self, usage: f64, workers: usize, cpus: &[usize]) -> io::Result<()> {
        if !cpus.is_empty() {
            // Workers inherit it from this thread.
            pin(cpus)?;
        }
        for gone in self.shares.drain(workers.min(self.shares.len())..) {
            gone.store(STOP, Ordering::Relaxed);
        }
        let share = (usage / workers as f64).clamp(0.0, 1.0) * 1e6;
        for worker in &self.shares {
            worker.store(share as u64, Ordering::Relaxed);
        }
        while self.shares.len() < workers {
            let worker = Arc::new(AtomicU64::new(share as u64));
            self.shares.push(Arc::clone(&worker));
            thread::Builder::new()
                .name("squall-burn".into())
                .stack_size(64 << 10)
                .spawn(move || burn(&worker))?;
        }
        Ok(())
    }
}

fn pin(cpus: &[usize]) -> io::Result<()> {
    let mut set = CpuSet::new();
    for cpu in cpus {
        set.set(*cpu)?;
    }
    Ok(sched_setaffinity(Pid::from_raw(0), &set)?)
}

/// Burns until its share of each turn is used on the thread's own CPU clock, and sleeps to an absolute time, so that
/// no error adds up.
fn burn(share: &AtomicU64) {
    let mut turn_ends = now(ClockId::CLOCK_MONOTONIC);
    // Nanoseconds. Below zero after a turn that went past its share, which the next one pays back.
    let mut owed: i64 = 0;
    loop {
        let share = share.load(Ordering::Relaxed);
        if share == STOP {
            return;
        }
        turn_ends += PERIOD;
        owed = (owed + PERIOD.as_micros() as i64 * share as i64 / 1_000).min(MOST_OWED);
        let started = now(ClockId::CLOCK_THREAD_CPUTIME_ID);
        let mut used = 0;
        while used < owed && now(ClockId::CLOCK_MONOTONIC) < turn_ends {
            for _ in 0..200 {
                std::hint::spin_loop();
            }
            used = now(ClockId::CLOCK_THREAD_CPUTIME_ID).saturating_sub(started).as_nanos() as i64;
        }
        owed -= used;
        let late = now(ClockId::CLOCK_MONOTONIC).saturating_sub(turn_ends);
        if late > PERIOD {
            // Others held the CPU for whole turns: they are written off, not caught up.
            turn_ends += late;
        }
        let until = TimeSpec::from_duration(turn_ends);
        // Woken early by a signal, it only burns a little early.
        let _woken = clock_nanosleep(ClockId::CLOCK_MONOTONIC, ClockNanosleepFlags::TIMER_ABSTIME, &until);
    }
}

fn now(clock: ClockId) -> Duration {
    clock_gettime(clock).map_or(Duration::ZERO, Duration::from)
}

/// CPU time of all threads of this process.
pub(super) fn cpu_time() -> Duration {
    now(ClockId::CLOCK_PROCESS_CPUTIME_ID)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// CPU time that this very thread used for a worker's turns, over wall time.
    fn usage_of(share: u64) -> f64 {
        let shared = Arc::new(AtomicU64::new(share));
        let worker = Arc::clone(&shared);
        let burning = thread::spawn(move || {
            let started = now(ClockId::CLOCK_MONOTONIC);
            burn(&worker);
            let elapsed = now(ClockId::CLOCK_MONOTONIC).saturating_sub(started);
            now(ClockId::CLOCK_THREAD_CPUTIME_ID).as_secs_f64() / elapsed.as_secs_f64()
        });
        thread::sleep(Duration::from_secs(1));
        shared.store(STOP, Ordering::Relaxed);
        burning.join().expect("the worker ends")
    }

    #[test]
    fn worker_never_uses_more_than_its_share() {
        // Less is the machine's business: it may be busy.
        for share in [100_000, 500_000] {
            let usage = usage_of(share);
            assert!(usage > 0.01 && usage < share as f64 / 1e6 + 0.05, "{share} ppm gave {usage}");
        }
    }
}
