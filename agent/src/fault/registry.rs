//! The list of faults, and the one place where their types are erased.
