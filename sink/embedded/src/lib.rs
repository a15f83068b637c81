//! ClickHouse without an installation: `flumen clickhouse` serves ClickHouse's HTTP interface over libchdb, which is a
//! real ClickHouse engine in a library, loaded at run time.
//!
//! `engine` is the door to the library and has the only unsafe code, `pool` its threads, `run` how a statement is run;
//! `server` serves; `http`, `sql`, `encoding`, `blocks` and `cityhash` are pure. What is absent on purpose: users and roles, external tables, `input()`, streamed results.

pub mod blocks;
pub mod cityhash;
pub mod encoding;
pub mod engine;
pub mod http;
mod pool;
mod run;
pub mod server;
pub mod sql;
mod statement;

pub use engine::{About, Door, Engine};
pub use run::Session;
pub use server::{LibraryError, ServeError, ServeOptions, find_library, serve};
pub use statement::{Answer, EngineError, Statement, code};
