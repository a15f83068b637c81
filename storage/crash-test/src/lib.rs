//! Crash tests of the store on a simulated disk: a seed is a whole life of a data directory, with a workload, crashes in
//! the middle of anything, recoveries that crash themselves, and a check of every promise after each of them.
//!
//! `model` is what the store must have and is pure; `workload` drives the store and tells the model; `check` compares;
//! `life` is one seed from first start to last check. One thread, no clock, no randomness but the seed's: two runs of a
//! seed are the same run, and a failure is repeated by its number.

pub mod check;
pub mod life;
pub mod model;
pub mod settings;
pub mod workload;

pub use life::{Failure, Life, Report, paused, take_panic, watch_panics};
pub use settings::{RECEIVES_FROM, REPLICATED_FROM};
