//! How much later than they should packets leave what holds them, and how much earlier they are sent off because of that.
//!
//! A timer fires late, and behind it are devices and interrupts: that is the same for all packets of a machine but for some noise.
//! So packets are due earlier by what even the most punctual of those before them was late. netem does not, and adds it to what
//! was asked.

use crate::table::Cell;

/// Of so many packets the most punctual counts.
const WINDOW: u64 = 64;
/// And of so many where nothing is known yet.
const FIRST: u64 = 8;
/// More than this, in nanoseconds, is no overhead but a machine that has no time.
const MOST: u64 = 500_000;

/// What is known of a rule's packets. Nanoseconds; times are of `CLOCK_MONOTONIC`.
#[repr(C)]
#[derive(Debug, Default)]
pub struct Lateness {
    /// Packets of this window, so far.
    seen: Cell,
    /// The least of them were late by this.
    least: Cell,
    /// The least of the window before, or what has come since and is less. 0: nothing is known, or nobody is late.
    floor: Cell,
    /// The least of the last whole window. A packet with nobody behind it is late by less than those before it, and then it is the last.
    settled: Cell,
    /// By how much packets are sent off earlier.
    taken: Cell,
    /// Packets before were due at the latest at this time, by what was asked.
    last: Cell,
}

impl Lateness {
    /// Notes how late a packet left. Of two CPUs at the same moment one may not be heard.
    #[inline(always)]
    pub fn note(&self, late: u64) {
        let seen = self.seen.load();
        let least = self.least.load();
        let least = if seen == 0 || late < least { late } else { least };
        let floor = self.floor.load();
        if seen + 1 < if floor == 0 { FIRST } else { WINDOW } {
            self.least.store(least);
            self.seen.store(seen + 1);
            if late < floor {
                // The next one would be early.
                self.floor.store(late);
            }
        } else {
            let least = if least < MOST { least } else { MOST };
            self.floor.store(least);
            self.settled.store(least);
            self.seen.store(0);
        }
    }

    /// When a packet is to be sent off that is due at a time after now. Packets of the same delay are never sent off in another order
    /// than they come: there is more to be taken only from a packet that is due so much after those before.
    #[inline(always)]
    pub fn sooner(&self, due: u64, now: u64) -> u64 {
        let (floor, last) = (self.floor.load(), self.last.load());
        let mut taken = self.taken.load();
        if floor < taken || due > last.wrapping_add(floor - taken) {
            taken = floor;
            self.taken.store(taken);
        }
        if due > last {
            self.last.store(due);
        }
        let half = (due - now) / 2;
        due - if taken < half { taken } else { half }
    }

    /// Begins anew, with what is known of other rules; 0 where that is nothing.
    #[cfg(any(test, feature = "user"))]
    pub fn begin(&self, floor: u64) {
        for cell in [&self.seen, &self.least, &self.taken, &self.last] {
            cell.store(0);
        }
        self.floor.store(floor);
        self.settled.store(floor);
    }

    /// What even the most punctual of a whole window were late; 0 where nothing is known.
    #[cfg(any(test, feature = "user"))]
    pub fn settled(&self) -> u64 {
        self.settled.load()
    }
}

#[cfg(test)]
mod tests {
    use std::vec::Vec;

    use proptest::prelude::*;

    use super::*;

    const MS: u64 = 1_000_000;

    fn note_all(lateness: &Lateness, late: u64) {
        (0..WINDOW).for_each(|_| lateness.note(late));
    }

    #[test]
    fn what_the_most_punctual_is_late_is_taken_off() {
        let lateness = Lateness::default();
        assert_eq!(lateness.sooner(10 * MS, 0), 10 * MS);
        (0..WINDOW).for_each(|n| lateness.note(50_000 + n * 1_000));
        assert_eq!(lateness.sooner(20 * MS, 10 * MS), 20 * MS - 50_000);
        // Less at once, as soon as one packet says so; more when all of a window do.
        lateness.note(20_000);
        assert_eq!(lateness.sooner(30 * MS, 20 * MS), 30 * MS - 20_000);
        (0..FIRST + WINDOW - 2).for_each(|_| lateness.note(30_000));
        assert_eq!(lateness.sooner(40 * MS, 30 * MS), 40 * MS - 20_000);
        lateness.note(30_000);
        assert_eq!(lateness.sooner(50 * MS, 40 * MS), 50 * MS - 30_000);
        // One alone says nothing about those of another rule.
        lateness.note(25_000);
        assert_eq!(lateness.sooner(55 * MS, 50 * MS), 55 * MS - 25_000);
        assert_eq!(lateness.settled(), 30_000);
        lateness.begin(10_000);
        assert_eq!(lateness.sooner(60 * MS, 50 * MS), 60 * MS - 10_000);
        lateness.begin(0);
        assert_eq!(lateness.sooner(60 * MS, 50 * MS), 60 * MS);
        // The first few are enough to begin with.
        (0..FIRST).for_each(|_| lateness.note(40_000));
        assert_eq!(lateness.sooner(70 * MS, 60 * MS), 70 * MS - 40_000);
    }

    #[test]
    fn a_machine_without_time_and_a_short_delay_have_their_limits() {
        let lateness = Lateness::default();
        note_all(&lateness, 80 * MS);
        assert_eq!(lateness.sooner(10 * MS, 0), 10 * MS - MOST);
        assert_eq!(lateness.sooner(10 * MS + 100, 10 * MS), 10 * MS + 50);
    }

    proptest! {
        #[test]
        fn packets_of_one_delay_keep_their_order(
            delay in 1_u64..20 * MS,
            packets in prop::collection::vec((0_u64..400_000, 0_u64..600_000), 1..400),
        ) {
            let lateness = Lateness::default();
            let mut now = 5 * MS;
            let sent: Vec<u64> = packets
                .into_iter()
                .map(|(gap, late)| {
                    now += gap;
                    lateness.note(late);
                    let sent = lateness.sooner(now + delay, now);
                    assert!(sent >= now && sent <= now + delay);
                    sent
                })
                .collect();
            prop_assert!(sent.is_sorted(), "{sent:?}");
        }
    }
}
