//! Gates: pure predicates over a run.

use crate::{
    event::{Finding, Verdict},
    fold::Run,
    plan::{OnFail, Plan},
};

/// Judges the gates of one round.
pub(crate) fn judge_round(_: &Run, _: &Plan, _: usize) -> Vec<Finding> {
    Vec::new()
}

/// Judges the plan's own gates.
pub(crate) fn judge_run(_: &Run, _: &Plan) -> Vec<Finding> {
    Vec::new()
}

/// What all findings say together.
pub(crate) fn verdict(_: &[Finding], _: OnFail, _: bool) -> (Verdict, String) {
    (Verdict::Inconclusive, "no gate was judged, so nothing is proven".into())
}

/// Whether a round has recovered.
pub(crate) fn recovered(_: &Run, _: &Plan, _: usize) -> bool {
    false
}
