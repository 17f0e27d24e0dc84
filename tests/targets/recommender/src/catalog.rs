//! What there is to recommend.

use std::hash::{DefaultHasher, Hash, Hasher};

/// Categories; each has a list of its own in Redis.
pub(crate) const CATEGORIES: [&str; 8] =
    ["books", "coffee", "garden", "kitchen", "music", "outdoor", "shoes", "toys"];

/// Items in each list.
pub(crate) const ITEMS: usize = 12;

/// The category a user likes best.
pub(crate) fn category(user: &str) -> &'static str {
    CATEGORIES[hash(user) as usize % CATEGORIES.len()]
}

/// The list of a category, best seller first.
pub(crate) fn items(category: &str) -> Vec<String> {
    (1..=ITEMS).map(|n| format!("{category}-{n:02}")).collect()
}

/// What a user gets without Redis: the best sellers of every category, so never empty and never all alike.
pub(crate) fn fallback(user: &str) -> Vec<String> {
    let start = hash(user) as usize;
    (0..ITEMS)
        .map(|n| {
            let category = CATEGORIES[(start + n) % CATEGORIES.len()];
            format!("{category}-{:02}", 1 + n / CATEGORIES.len())
        })
        .collect()
}

/// The same for the same user, in every process.
pub(crate) fn hash(user: &str) -> u32 {
    let mut hasher = DefaultHasher::new();
    user.hash(&mut hasher);
    hasher.finish() as u32
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn the_fallback_is_long_enough_diverse_and_without_repeats() {
        for user in ["U1", "U2", "U123", ""] {
            let items = fallback(user);
            assert_eq!(items.len(), ITEMS);
            assert_eq!(items.iter().collect::<BTreeSet<_>>().len(), ITEMS, "{items:?}");
            let categories: BTreeSet<_> = items.iter().filter_map(|item| item.split('-').next()).collect();
            assert_eq!(categories.len(), CATEGORIES.len(), "{items:?}");
        }
    }

    #[test]
    fn users_differ() {
        let liked: BTreeSet<_> = (0..100).map(|n| category(&format!("U{n}"))).collect();
        assert_eq!(liked.len(), CATEGORIES.len());
    }
}
