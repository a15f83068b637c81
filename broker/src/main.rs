//! `flumen`: parse, configure, run.
#![forbid(unsafe_code)]

use std::process::ExitCode;

fn main() -> ExitCode {
    flumen_broker::cli::main()
}
