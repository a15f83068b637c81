//! Real clients, each in its own process, against a real broker.

use std::process::Command;

use flumen_tests::flumen::Flumen;
use flumen_tests::process::repository;
use serde_json::json;

fn run(name: &str, command: &mut Command) -> String {
    let output = command.output().unwrap_or_else(|e| panic!("{name} cannot be run ({e}); run `make setup`"));
    let text =
        format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{name} failed:\n{text}");
    text
}

fn python(script: &str, broker: &Flumen) -> String {
    let python = repository().join(".cache/venv/bin/python");
    run(script, Command::new(python).arg(repository().join("tests/clients").join(script)).arg(&broker.kafka))
}

fn broker() -> (tempfile::TempDir, Flumen) {
    let dir = tempfile::tempdir().unwrap();
    let flumen = Flumen::start(dir.path(), &["group.initial.rebalance.delay.ms=0"]).unwrap();
    (dir, flumen)
}

#[test]
fn kafka_python() {
    let (_dir, flumen) = broker();
    assert!(python("kafka_python.py", &flumen).contains("kafka-python ok"));
}

#[test]
fn confluent_kafka() {
    let (_dir, flumen) = broker();
    assert!(python("confluent.py", &flumen).contains("confluent-kafka ok"));
}

#[test]
fn confluent_kafka_administers() {
    let (_dir, flumen) = broker();
    assert!(python("confluent_admin.py", &flumen).contains("confluent admin ok"));
}

#[test]
fn confluent_kafka_codecs_sizes_and_rebalances() {
    let (_dir, flumen) = broker();
    assert!(python("confluent_data.py", &flumen).contains("confluent data ok"));
}

#[test]
fn kafka_python_administers() {
    let (_dir, flumen) = broker();
    assert!(python("kafka_python_admin.py", &flumen).contains("kafka-python admin ok"));
}

#[test]
fn java_tools() {
    java("java_tools.sh", "java tools ok");
}

#[test]
fn java_tools_administer_without_a_warning() {
    java("java_tools_admin.sh", "java admin tools ok");
}

#[test]
fn java_tools_for_operators() {
    java("java_tools_operate.sh", "java operator tools ok");
}

#[test]
fn kafka_python_operates() {
    let (_dir, flumen) = broker();
    assert!(python("kafka_python_operate.py", &flumen).contains("kafka-python operate ok"));
}

#[test]
fn confluent_kafka_operates() {
    let (_dir, flumen) = broker();
    assert!(python("confluent_operate.py", &flumen).contains("confluent operate ok"));
}

fn java(script: &str, end: &str) {
    if which("java").is_none() || which("mvn").is_none() {
        println!("no Java and Maven here: the Java tools were not run");
        return;
    }
    let (_dir, flumen) = broker();
    let path = repository().join("tests/clients").join(script);
    assert!(run(script, Command::new("bash").arg(path).arg(&flumen.kafka)).contains(end));
}

#[test]
fn kcat_round_trip() {
    let (dir, flumen) = broker();
    flumen.create_topic("kc", 1, &json!({})).unwrap();
    let file = dir.path().join("in.txt");
    let lines: String = (0..500).map(|i| format!("k{i}:v{i}\n")).collect();
    std::fs::write(&file, &lines).unwrap();
    run(
        "kcat -P",
        Command::new("kcat").args(["-b", &flumen.kafka, "-P", "-t", "kc", "-K:", "-l"]).arg(&file),
    );
    let out = run(
        "kcat -C",
        Command::new("kcat").args(["-b", &flumen.kafka, "-C", "-t", "kc", "-e", "-q", "-f", "%k:%s\\n"]),
    );
    assert_eq!(out, lines);
    let listed = run("kcat -L", Command::new("kcat").args(["-b", &flumen.kafka, "-L"]));
    for line in [
        " 1 brokers:",
        &format!("  broker 1 at {} (controller)", flumen.kafka),
        " 1 topics:",
        "  topic \"kc\" with 1 partitions:",
        "    partition 0, leader 1, replicas: 1, isrs: 1",
    ] {
        assert!(listed.lines().any(|found| found == line), "{line:?} is not in {listed}");
    }
    let at = run("kcat -Q", Command::new("kcat").args(["-b", &flumen.kafka, "-Q", "-t", "kc:0:-1"]));
    assert!(at.contains("kc [0] offset 500"), "{at}");
}

fn which(program: &str) -> Option<std::path::PathBuf> {
    std::env::split_paths(&std::env::var_os("PATH")?).map(|d| d.join(program)).find(|p| p.is_file())
}
