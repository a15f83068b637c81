//! The error codes of every probe in every version, as Apache Kafka 4.3.1 gave them when
//! `conformance/differential.sh --record-codes` asked it. No Kafka is needed here; whole answers are compared by
//! `make differential`.

use flumen_tests::flumen::Flumen;
use flumen_tests::probe::{self, Bed};
use flumen_tests::process::repository;

/// Probe, first and last version, codes.
fn recorded() -> Vec<(String, i16, i16, String)> {
    lines("versions.kafka.tsv")
        .iter()
        .map(|row| {
            let (first, last) = row[1].split_once('-').expect("a range of versions");
            (row[0].clone(), first.parse().unwrap(), last.parse().unwrap(), row[2].clone())
        })
        .collect()
}

fn lines(file: &str) -> Vec<Vec<String>> {
    let path = repository().join("tests/conformance").join(file);
    let text = std::fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    text.lines()
        .filter(|line| !line.is_empty() && !line.starts_with('#'))
        .map(|line| line.split('\t').map(str::to_string).collect())
        .collect()
}

/// Whether `pattern`, in which `*` stands for anything, is all of `name`.
fn matches(pattern: &str, name: &str) -> bool {
    match pattern.split_once('*') {
        None => pattern == name,
        Some((start, rest)) => name
            .strip_prefix(start)
            .is_some_and(|tail| (0..=tail.len()).any(|at| tail.get(at..).is_some_and(|t| matches(rest, t)))),
    }
}

#[test]
fn every_version_of_every_request_answers_with_kafkas_codes() {
    let recorded = recorded();
    let expected: Vec<String> =
        lines("differential.expected.tsv").into_iter().map(|mut row| row.remove(0)).collect();
    let dir = tempfile::tempdir().unwrap();
    // The settings of `differential.sh`.
    let settings = [
        "group.initial.rebalance.delay.ms=0",
        "auto.create.topics.enable=true",
        "num.partitions=1",
        "compression.type=producer",
    ];
    let flumen = Flumen::start(dir.path(), &settings).unwrap();
    // Nothing stays unanswered here, so nothing has to be given up.
    let mut bed = Bed::lay(&flumen.kafka, None).unwrap();
    let mut wrong = Vec::new();
    let mut compared = 0;
    for probe in probe::all() {
        for version in probe.versions.0..=probe.versions.1 {
            let name = format!("{} v{version}", probe.name);
            // Asked even where a difference is expected: probes build on each other.
            let got = probe.run(&mut bed, version).map(|answer| probe::codes(&answer));
            if expected.iter().any(|pattern| matches(pattern, &name)) {
                continue;
            }
            let kafka = recorded
                .iter()
                .find(|(known, first, last, _)| *known == probe.name && (*first..=*last).contains(&version))
                .unwrap_or_else(|| panic!("{name} was never asked of Kafka: differential.sh --record-codes"));
            compared += 1;
            match got {
                Ok(codes) if codes == kafka.3 => {}
                got => wrong.push(format!("{name}: {got:?}, Kafka gives {}", kafka.3)),
            }
        }
    }
    assert!(wrong.is_empty(), "{} of {compared} differ:\n{}", wrong.len(), wrong.join("\n"));
}
