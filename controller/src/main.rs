//! `squall`: runs plans of faults against agents and gives a verdict.

mod event;
mod fold;
mod gate;
mod outline;
mod plan;
mod probe;
mod report;

fn main() {}
