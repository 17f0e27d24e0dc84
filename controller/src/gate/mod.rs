//! Gates: pure predicates over a run.
