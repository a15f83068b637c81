//! The regression gate: counts by valgrind, beside the counts that the repository keeps.

use std::collections::BTreeMap;
use std::path::Path;
use std::process::{Command, ExitCode};

use anyhow::{Context, Result, bail, ensure};
use serde::{Deserialize, Serialize};

use crate::operations::OPERATIONS;

/// By how much an operation may get dearer. Counts of one binary differ by far less; another compiler's may differ by
/// this much without anybody having changed anything.
const TOLERANCE: f64 = 0.03;

#[derive(Debug, Serialize, Deserialize)]
struct Counts {
    /// Where the counts are from: vector extensions choose other code in libraries.
    cpu: String,
    valgrind: String,
    instructions: BTreeMap<String, f64>,
}

pub fn run(file: &Path, update: bool) -> Result<ExitCode> {
    let version = Command::new("valgrind").arg("--version").output().context("valgrind is not there")?;
    let valgrind = String::from_utf8_lossy(&version.stdout).trim().to_string();
    let mut instructions = BTreeMap::new();
    for operation in OPERATIONS {
        let many = count(operation.name, operation.times)?;
        let none = count(operation.name, 0)?;
        ensure!(many > none, "{}: {many} instructions with and {none} without work", operation.name);
        let each = (many - none) as f64 / operation.times as f64;
        instructions.insert(operation.name.to_string(), (each * 10.0).round() / 10.0);
    }
    let counted = Counts { cpu: cpu(), valgrind, instructions };
    if update {
        let mut text = serde_json::to_string_pretty(&counted)?;
        text.push('\n');
        std::fs::write(file, text).with_context(|| format!("cannot write {}", file.display()))?;
    }
    let known: Counts = match std::fs::read_to_string(file) {
        Ok(text) => serde_json::from_str(&text).with_context(|| format!("{} is damaged", file.display()))?,
        Err(e) => bail!("{}: {e}; --update writes it", file.display()),
    };
    if known.cpu != counted.cpu || known.valgrind != counted.valgrind {
        println!(
            "note: the counts to compare with are from {} ({}), this is {} ({})",
            known.cpu, known.valgrind, counted.cpu, counted.valgrind
        );
    }
    let mut dearer = false;
    println!("{:18} {:>12} {:>12} {:>8}", "", "instructions", "before", "");
    for operation in OPERATIONS {
        let now = counted.instructions[operation.name];
        let before = known.instructions.get(operation.name).copied();
        let outcome = judge(now, before);
        dearer |= outcome != Outcome::Same && outcome != Outcome::Cheaper;
        println!(
            "{:18} {now:>12.1} {:>12} {:>8}  {}{}",
            operation.name,
            before.map_or_else(|| "-".into(), |b| format!("{b:.1}")),
            before.map_or_else(String::new, |b| format!("{:+.1} %", (now / b - 1.0) * 100.0)),
            operation.what,
            match outcome {
                Outcome::Same => "",
                Outcome::Cheaper => "  (cheaper: --update keeps it so)",
                Outcome::Dearer => "  DEARER",
                Outcome::Unknown => "  NOT IN THE FILE",
            }
        );
    }
    Ok(if dearer { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

#[derive(Debug, PartialEq)]
enum Outcome {
    Same,
    Cheaper,
    Dearer,
    Unknown,
}

fn judge(now: f64, before: Option<f64>) -> Outcome {
    match before {
        None => Outcome::Unknown,
        Some(b) if now > b * (1.0 + TOLERANCE) => Outcome::Dearer,
        Some(b) if now < b * (1.0 - TOLERANCE) => Outcome::Cheaper,
        Some(_) => Outcome::Same,
    }
}

/// Instructions of the whole process, as valgrind sums them up.
fn count(operation: &str, times: usize) -> Result<u64> {
    let output = Command::new("valgrind")
        .args(["--tool=callgrind", "--callgrind-out-file=/dev/null"])
        .arg(std::env::current_exe()?)
        .args(["run", operation, &times.to_string()])
        .output()
        .context("cannot run valgrind")?;
    let text = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{operation} failed under valgrind:\n{text}");
    collected(&text).with_context(|| format!("no count in valgrind's words:\n{text}"))
}

/// `==123== Collected : 456`
fn collected(text: &str) -> Option<u64> {
    text.lines().find_map(|l| l.split_once("Collected : "))?.1.trim().parse().ok()
}

fn cpu() -> String {
    let text = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let name = text.lines().find(|l| l.starts_with("model name")).and_then(|l| l.split(": ").nth(1));
    name.unwrap_or("an unknown CPU").to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn valgrinds_words() {
        let text =
            "==1== Callgrind, a call-graph generating cache profiler\n==1==\n==1== Collected : 1234567\n";
        assert_eq!(collected(text), Some(1_234_567));
        assert_eq!(collected("nothing"), None);
    }

    #[test]
    fn three_percent_is_the_limit() {
        assert_eq!(judge(102.9, Some(100.0)), Outcome::Same);
        assert_eq!(judge(103.1, Some(100.0)), Outcome::Dearer);
        assert_eq!(judge(96.9, Some(100.0)), Outcome::Cheaper);
        assert_eq!(judge(1.0, None), Outcome::Unknown);
    }
}
