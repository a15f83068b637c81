//! `flumen-check [--isolated-writes] FILE...`: reads kept histories and says what is wrong with them. Ends with 1 when
//! anything is, with 2 when a file is no history.

use std::process::ExitCode;

use flumen_checker::{History, Options, check};

fn main() -> ExitCode {
    let mut options = Options::default();
    let mut files = Vec::new();
    for argument in std::env::args().skip(1) {
        match argument.as_str() {
            "--isolated-writes" => options.isolated_writes = true,
            _ => files.push(argument),
        }
    }
    if files.is_empty() {
        eprintln!("usage: flumen-check [--isolated-writes] FILE...");
        return ExitCode::from(2);
    }
    let mut outcome = ExitCode::SUCCESS;
    for file in files {
        let history = std::fs::read_to_string(&file)
            .map_err(|error| error.to_string())
            .and_then(|text| History::parse(&text).map_err(|error| error.to_string()));
        match history {
            Ok(history) => {
                let anomalies = check(&history, options);
                for anomaly in &anomalies {
                    println!("{file}: {}: {}", anomaly.check, anomaly.what);
                    outcome = ExitCode::from(1);
                }
                println!("{file}: {} events, {} anomalies", history.records.len(), anomalies.len());
            }
            Err(error) => {
                eprintln!("{file}: {error}");
                return ExitCode::from(2);
            }
        }
    }
    outcome
}
