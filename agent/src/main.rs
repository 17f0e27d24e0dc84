//! `squall-agent`: build, run, drain. No logic.

mod fault;
mod host;
mod limits;
mod target;
mod time;

fn main() {}
