//! So many at once, and of one caller fewer, so that nobody takes all.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, PoisonError},
};

/// Places that can be taken.
#[derive(Debug)]
pub struct Quota {
    most: usize,
    most_each: usize,
    taken: Mutex<HashMap<String, usize>>,
}

/// A place that was taken; free again when this is dropped.
#[derive(Debug)]
pub struct Slot {
    quota: Arc<Quota>,
    key: String,
}

impl Quota {
    /// `most` places, `most_each` for each key.
    #[must_use]
    pub fn new(most: usize, most_each: usize) -> Arc<Self> {
        Arc::new(Self { most, most_each, taken: Mutex::default() })
    }

    /// Takes a place, where one is left for this key.
    pub fn take(self: &Arc<Self>, key: &str) -> Option<Slot> {
        let mut taken = self.taken.lock().unwrap_or_else(PoisonError::into_inner);
        if taken.values().sum::<usize>() >= self.most
            || taken.get(key).copied().unwrap_or(0) >= self.most_each
        {
            return None;
        }
        *taken.entry(key.to_owned()).or_default() += 1;
        Some(Slot { quota: Arc::clone(self), key: key.to_owned() })
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        let mut taken = self.quota.taken.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(n) = taken.get_mut(&self.key) {
            *n -= 1;
            if *n == 0 {
                taken.remove(&self.key);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_takes_his_share_and_all_take_all() {
        let quota = Quota::new(3, 2);
        let first = quota.take("a").unwrap();
        let _second = quota.take("a").unwrap();
        assert!(quota.take("a").is_none());
        let _third = quota.take("b").unwrap();
        assert!(quota.take("c").is_none());
        drop(first);
        assert!(quota.take("c").is_some());
        assert!(quota.take("a").is_some());
    }
}
