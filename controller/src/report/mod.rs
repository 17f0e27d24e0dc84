//! Reports: folds over a run.
