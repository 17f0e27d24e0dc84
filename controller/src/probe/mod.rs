//! Probes: sources of samples.
