//! The errors gate: the share of failed requests while faults are held.

use super::{
    Scope,
    share::{self, Block, Counted},
};
use crate::{
    event::{Finding, LoadBin},
    stats::Share,
};

/// Judges the share of failed requests. A dropped request failed, but does not fail the gate by itself; that the
/// generator was late excuses a timeout, and nothing else.
pub(super) fn judge(scope: &Scope<'_>, probe: &str, limit: f64) -> Finding {
    let mut finding = scope.finding("errors", probe, limit, "ratio");
    let counted = Counted::of_load(scope, probe, block);
    share::decide(scope, &mut finding, &counted, limit, "failed");
    let estimate = |blocks: &[Block]| Share::of(blocks.iter().map(|b| b.seen)).map(|s| s.estimate());
    finding.value = estimate(&counted.fault);
    finding.baseline = estimate(&counted.baseline);
    finding.interval = counted.interval().map(|(lower, upper)| (Some(lower), Some(upper)));
    finding
}

fn block(bin: &LoadBin) -> Block {
    let failed: u64 = bin.failed.values().sum();
    let timeouts = bin.failed.get("timeout").copied().unwrap_or(0);
    let excused = failed.saturating_sub(bin.dropped).saturating_sub(bin.late.min(timeouts));
    let seen = (failed as f64, bin.due as f64);
    Block { start: bin.start, seen, best: (excused as f64, (bin.due - bin.dropped) as f64), worst: seen }
}
