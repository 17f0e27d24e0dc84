//! What the tc programs and the agent share: the layout of the maps, packet parsing, matching and decisions.
//!
//! Everything here is pure and `no_std`, so that the code that runs in the kernel is the code the unit tests run.
//!
//! Matching is by bit vectors (Lakshman and Stiliadis): each dimension of a packet is one lookup that gives the set of
//! clauses it satisfies as 64 bits; their AND is the set of clauses that match, and its lowest bit is the first match.

#![no_std]
#![expect(clippy::inline_always, reason = "a call in a program costs registers and the verifier's patience")]
#![cfg_attr(target_arch = "bpf", feature(asm_experimental_arch))]
#![cfg_attr(target_arch = "bpf", expect(unsafe_code, reason = "volatile and atomic access to shared cells"))]

#[cfg(any(test, feature = "user"))]
extern crate std;

pub mod decide;
pub mod histogram;
pub mod lateness;
pub mod line;
pub mod matching;
pub mod packet;
#[cfg(any(test, feature = "user"))]
pub mod quantiles;
#[cfg(any(test, feature = "user"))]
pub mod rules;
pub mod sieve;
pub mod table;
pub mod tap;
