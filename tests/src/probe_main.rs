//! `flumen-probe HOST:PORT [--codes] [NAME]`: sends every probe to a broker, prints what came back.
//!
//! Without `--codes` whole answers, each under a line `## probe vN`; with it one line per probe and run of versions that
//! have the same error codes. NAME picks the probes whose name contains it.
#![forbid(unsafe_code)]

use std::time::Duration;

use flumen_tests::probe::{self, Bed};

/// Longer than anything that a probe makes a broker wait for.
const PATIENCE: Duration = Duration::from_secs(8);

fn main() -> anyhow::Result<()> {
    let mut arguments: Vec<String> = std::env::args().skip(1).collect();
    let only_codes = arguments.iter().any(|a| a == "--codes");
    arguments.retain(|a| a != "--codes");
    let Some(address) = arguments.first() else {
        anyhow::bail!("usage: flumen-probe HOST:PORT [--codes] [NAME]")
    };
    let filter = arguments.get(1).map_or("", String::as_str);
    let mut bed = Bed::lay(address, Some(PATIENCE))?;
    for probe in probe::all().iter().filter(|p| p.name.contains(filter)) {
        let mut runs: Vec<(i16, i16, String)> = Vec::new();
        for version in probe.versions.0..=probe.versions.1 {
            let answer = probe.run(&mut bed, version).unwrap_or_else(|e| format!("impossible: {e:#}"));
            if !only_codes {
                println!("## {} v{version}\n{answer}", probe.name);
                continue;
            }
            let codes = if answer.starts_with("impossible") { answer } else { probe::codes(&answer) };
            match runs.last_mut() {
                Some((_, last, same)) if *same == codes => *last = version,
                _ => runs.push((version, version, codes)),
            }
        }
        for (first, last, codes) in runs {
            println!("{}\t{first}-{last}\t{codes}", probe.name);
        }
    }
    Ok(())
}
