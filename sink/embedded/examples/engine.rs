//! `flumen clickhouse` by itself: tests of other crates start it before, and without, the whole binary.
//!
//! `cargo run -p flumen-embedded --example engine -- --data-dir DIR [--listen ADDRESS] [--lib PATH]`
#![forbid(unsafe_code)]

use std::path::PathBuf;
use std::process::ExitCode;

fn main() -> ExitCode {
    let mut data_dir = None;
    let mut listen = "127.0.0.1:8123".to_owned();
    let mut lib = None;
    let mut args = std::env::args().skip(1);
    while let Some(name) = args.next() {
        let Some(value) = args.next() else {
            eprintln!("engine: {name} needs a value");
            return ExitCode::from(2);
        };
        match name.as_str() {
            "--data-dir" => data_dir = Some(PathBuf::from(value)),
            "--listen" => listen = value,
            "--lib" => lib = Some(PathBuf::from(value)),
            _ => {
                eprintln!("engine: unknown option {name}; known are --data-dir, --listen and --lib");
                return ExitCode::from(2);
            }
        }
    }
    let (Some(data_dir), Ok(listen)) = (data_dir, listen.parse()) else {
        eprintln!("engine: --data-dir DIR is needed, and --listen takes an address such as 127.0.0.1:8123");
        return ExitCode::from(2);
    };
    match flumen_embedded::serve(flumen_embedded::ServeOptions { data_dir, listen, lib }) {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("engine: {e}");
            ExitCode::FAILURE
        }
    }
}
