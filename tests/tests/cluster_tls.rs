//! The port for brokers with certificates, on real processes: those that the commands of docs/OPERATE.md make, put into force
//! and replaced while records are taken; and every kind of peer that has none, or the wrong ones, refused in words on both sides.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use flumen_tests::cluster::Cluster;
use flumen_tests::flumen::Flumen;
use flumen_tests::load::Load;
use flumen_tests::process::{free_ports, repository};
use serde_json::json;

const TOPIC: &str = "orders";
const PARTITIONS: i32 = 3;

/// The commands below "Certificates" in docs/OPERATE.md: of the authority, and of node n1 at 10.0.0.1.
fn documented() -> [String; 2] {
    let text = std::fs::read_to_string(repository().join("docs/OPERATE.md")).unwrap();
    let section =
        text.split("\n## Certificates\n").nth(1).expect("the section").split("\n## ").next().unwrap();
    let blocks: Vec<String> = section.split("\n```\n").skip(1).step_by(2).map(str::to_string).collect();
    blocks.try_into().expect("two blocks of commands")
}

fn shell(dir: &Path, commands: &str) {
    let run = Command::new("bash").args(["-euc", commands]).current_dir(dir).output().unwrap();
    assert!(run.status.success(), "{commands}\n{}", String::from_utf8_lossy(&run.stderr));
}

/// An authority, and certificates of these nodes on loopback.
fn make_certificates(dir: &Path, nodes: &[&str]) {
    std::fs::create_dir_all(dir).unwrap();
    let [authority, node] = documented();
    shell(dir, &authority);
    for name in nodes {
        let commands = node.replace("NODE=n1", &format!("NODE={name}")).replace("10.0.0.1", "127.0.0.1");
        assert!(commands.contains(&format!("NODE={name} ADDRESS=IP:127.0.0.1")), "{commands}");
        shell(dir, &commands);
    }
}

fn settings(certificates: &Path, name: &str) -> [String; 3] {
    let file = |key: &str, file: &str| format!("flumen.rpc.tls.{key}={}/{file}", certificates.display());
    [file("cert", &format!("{name}.pem")), file("key", &format!("{name}.key")), file("ca", "ca.pem")]
}

fn count(log: &str, words: &str) -> usize {
    log.lines().filter(|line| line.contains(words)).count()
}

/// Waits until a log has these words.
fn await_log(cluster: &Cluster, node: &Flumen, words: &str) {
    cluster.until(&format!("the log to say '{words}'"), || node.log().contains(words).then_some(())).unwrap();
}

fn await_any_log(cluster: &Cluster, words: &str) {
    let said = || cluster.nodes.iter().any(|node| node.log().contains(words)).then_some(());
    cluster.until(&format!("a member to log '{words}'"), said).unwrap();
}

/// What `openssl s_client` says when it connects to a node with these arguments and waits for what it is told.
fn openssl(address: &str, dir: &Path, arguments: &[&str]) -> String {
    let mut client = Command::new("openssl")
        .args(["s_client", "-connect", address, "-CAfile", "ca.pem", "-quiet", "-no_ign_eof"])
        .args(arguments)
        .current_dir(dir)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    // Its input stays open until the node has said what it has to say.
    let input = client.stdin.take();
    let mut said = String::new();
    client.stderr.take().unwrap().read_to_string(&mut said).unwrap();
    drop(input);
    client.wait().unwrap();
    said
}

fn start(dir: &Path, certificates: &Path) -> (Cluster, Load) {
    make_certificates(certificates, &["n1", "n2", "n3", "n4", "old"]);
    let mut all = settings(certificates, "n{id}").to_vec();
    all.push("group.initial.rebalance.delay.ms=0".to_string());
    let all: Vec<&str> = all.iter().map(String::as_str).collect();
    let cluster = Cluster::start(dir, 3, &all).unwrap();
    cluster.create_topic(TOPIC, PARTITIONS, 3, &json!({})).unwrap();
    let load = Load::start_at(&cluster.kafka(), TOPIC, false, Duration::from_millis(1)).unwrap();
    cluster.progress(&load, "three nodes with certificates").unwrap();
    (cluster, load)
}

fn check_shown(cluster: &Cluster) {
    let brokers = cluster.nodes[0].get("/v1/brokers").unwrap();
    assert!(brokers.as_array().unwrap().iter().all(|broker| broker["rpc_tls"] == json!(true)), "{brokers}");
    let health = cluster.nodes[0].get("/v1/cluster/health").unwrap().to_string();
    assert!(!health.contains("RPC_"), "{health}");
    for node in &cluster.nodes {
        let log = node.log();
        assert!(!log.contains("PRIVATE KEY"), "{log}");
    }
}

#[test]
fn brokers_with_certificates_are_one_cluster_and_others_are_refused_in_words() {
    let dir = tempfile::tempdir().unwrap();
    let certificates = dir.path().join("certificates");
    let (mut cluster, mut load) = start(dir.path(), &certificates);
    check_shown(&cluster);
    cluster.nodes[1].kill_9();
    cluster.progress(&load, "node 2 is dead").unwrap();
    cluster.nodes[1].restart().unwrap();

    // Another authority, of the same name.
    let elsewhere = dir.path().join("elsewhere");
    make_certificates(&elsewhere, &["n4"]);
    let own = settings(&elsewhere, "n4");
    let mut foreign = cluster.stranger(4, &own.each_ref().map(String::as_str));
    foreign.begin().unwrap();
    await_log(&cluster, &foreign, "is not signed by the authority in");
    await_any_log(&cluster, "does not trust the certificate");
    // No certificate at all.
    let mut bare = cluster.stranger(5, &[]);
    assert!(bare.restart_or_end().unwrap().is_some_and(|status| !status.success()));
    let log = bare.log();
    assert!(
        log.contains("no seed will have this broker") && log.contains("start it with --rpc-tls-cert"),
        "{log}"
    );
    await_any_log(&cluster, "speaks without TLS to one that has certificates");
    // It asks ten times a second, and each member says so once.
    std::thread::sleep(Duration::from_secs(1));
    for (node, seed) in cluster.nodes.iter().zip(cluster.seeds.split(',')) {
        assert!(count(&node.log(), "does not trust the certificate") <= 1, "{}", node.log());
        assert_eq!(count(&foreign.log(), &format!("seed=\"{seed}\"")), 1, "{}", foreign.log());
    }
    foreign.kill_9();
    // One that has certificates of the cluster joins, and does not come back without them.
    let mut third = cluster.stranger(6, &settings(&certificates, "n4").each_ref().map(String::as_str));
    third.restart().unwrap();
    assert!(third.stop().unwrap().success());
    third.arguments.truncate(bare.arguments.len());
    third.arguments.extend(own.iter().flat_map(|setting| ["--set".to_string(), setting.clone()]));
    third.begin().unwrap();
    let failed = "cannot connect to a broker; trying again";
    cluster.until("node 6 to fail with all", || (count(&third.log(), failed) >= 3).then_some(())).unwrap();
    std::thread::sleep(Duration::from_secs(1));
    assert_eq!(count(&third.log(), failed), 3, "{}", third.log());
    assert_eq!(count(&third.log(), "is not signed by the authority in"), 3, "{}", third.log());
    third.kill_9();
    third.arguments.truncate(bare.arguments.len());
    assert!(third.restart_or_end().unwrap().is_some_and(|status| !status.success()));
    assert!(third.log().contains("start it with --rpc-tls-cert"), "{}", third.log());

    // What is no broker: without a certificate, with an expired one, with an old TLS, with none.
    let seed = cluster.seeds.split(',').next().unwrap().to_string();
    let said = openssl(&seed, &certificates, &[]);
    assert!(said.contains("certificate required"), "{said}");
    await_log(
        &cluster,
        &cluster.nodes[0],
        "has shown no certificate; if it is a broker, start it with --rpc-tls-cert",
    );
    shell(
        &certificates,
        "openssl x509 -req -in old.csr -extfile old.ext -days 0 -CA ca.pem -CAkey ca.key -out old.pem; sleep 2",
    );
    let said = openssl(&seed, &certificates, &["-cert", "old.pem", "-key", "old.key"]);
    assert!(said.contains("certificate expired"), "{said}");
    await_log(&cluster, &cluster.nodes[0], "has expired; replace it");
    let mut old = cluster.stranger(7, &settings(&certificates, "old").each_ref().map(String::as_str));
    assert!(old.restart_or_end().unwrap().is_some_and(|status| !status.success()));
    assert!(old.log().contains("old.pem has expired; replace it"), "{}", old.log());
    let said = openssl(&seed, &certificates, &["-tls1_2", "-cert", "n4.pem", "-key", "n4.key"]);
    assert!(said.contains("protocol version"), "{said}");
    for bytes in [
        &b"GET / HTTP/1.0\r\n\r\n"[..],
        // ApiVersions, version 0.
        &[0, 0, 0, 10, 0, 18, 0, 0, 0, 0, 0, 1, 255, 255],
        // Half of a handshake.
        &[0x16, 3, 1, 2, 0, 1, 0],
    ] {
        let mut stream = TcpStream::connect(&seed).unwrap();
        stream.write_all(bytes).unwrap();
        let mut answer = Vec::new();
        let _ = stream.read_to_end(&mut answer);
        assert!(answer.is_empty(), "{answer:?}");
    }

    cluster.progress(&load, "all that was refused").unwrap();
    cluster.check(TOPIC, PARTITIONS, 3, &mut load, &mut []).unwrap();
}

/// New certificates of a new authority, step by step as docs/OPERATE.md says, without a restart.
#[test]
fn certificates_are_replaced_while_brokers_run() {
    let dir = tempfile::tempdir().unwrap();
    let certificates = dir.path().join("certificates");
    let (mut cluster, mut load) = start(dir.path(), &certificates);
    let new = dir.path().join("new");
    make_certificates(&new, &["n1", "n2", "n3"]);
    let mut taken = 0;
    let mut await_taken = |cluster: &Cluster| {
        taken += 1;
        for node in &cluster.nodes {
            let said =
                || (count(&node.log(), "certificates for other brokers read again") == taken).then_some(());
            cluster.until("new certificates to be taken", said).unwrap();
        }
    };
    let put = |name: &str, to: &str| {
        // As a tool does that nobody sees half done.
        std::fs::copy(new.join(name), certificates.join("new")).unwrap();
        std::fs::rename(certificates.join("new"), certificates.join(to)).unwrap();
    };
    shell(dir.path(), "cat certificates/ca.pem new/ca.pem > both && mv both certificates/ca.pem");
    await_taken(&cluster);

    // A key without its certificate is no news; the old ones are in force.
    put("n3.key", "n3.key");
    await_log(&cluster, &cluster.nodes[2], "cannot be used; the old ones stay in force");
    let health = cluster.nodes[0].get("/v1/cluster/health").unwrap();
    assert!(
        health.to_string().contains("RPC_CERTIFICATE_UNUSABLE") && health["is_healthy"] == json!(true),
        "{health}"
    );
    cluster.nodes[1].kill_9();
    cluster.nodes[1].restart().unwrap();
    cluster.progress(&load, "node 3 with what it had").unwrap();
    assert_eq!(count(&cluster.nodes[2].log(), "the old ones stay in force"), 1, "{}", cluster.nodes[2].log());

    for name in ["n1", "n2"] {
        put(&format!("{name}.key"), &format!("{name}.key"));
        put(&format!("{name}.pem"), &format!("{name}.pem"));
    }
    put("n3.pem", "n3.pem");
    await_taken(&cluster);
    check_shown(&cluster);
    put("ca.pem", "ca.pem");
    await_taken(&cluster);
    for at in 0..3 {
        cluster.nodes[at].kill_9();
        cluster.nodes[at].restart().unwrap();
        cluster.progress(&load, "a node started with the new authority").unwrap();
    }
    cluster.check(TOPIC, PARTITIONS, 3, &mut load, &mut []).unwrap();
}

#[test]
fn a_broker_with_certificates_and_one_without_say_what_is_wrong() {
    let dir = tempfile::tempdir().unwrap();
    let certificates = dir.path().join("certificates");
    make_certificates(&certificates, &["n4"]);
    shell(&certificates, "chmod 644 n4.key");
    let cluster = Cluster::start(dir.path(), 1, &[]).unwrap();
    let mut with = cluster.stranger(4, &settings(&certificates, "n4").each_ref().map(String::as_str));
    with.begin().unwrap();
    await_log(
        &cluster,
        &with,
        "closed the connection when TLS began; if it runs without certificates, start it with",
    );
    await_log(&cluster, &cluster.nodes[0], "speaks TLS, and this broker has no certificates");
    std::thread::sleep(Duration::from_secs(1));
    assert_eq!(count(&with.log(), "closed the connection when TLS began"), 1, "{}", with.log());
    assert_eq!(count(&cluster.nodes[0].log(), "speaks TLS"), 1, "{}", cluster.nodes[0].log());
    assert_eq!(count(&with.log(), "chmod 600"), 1, "{}", with.log());
    let brokers = cluster.nodes[0].get("/v1/brokers").unwrap();
    assert_eq!(brokers[0]["rpc_tls"], json!(false));
}

#[test]
fn a_port_that_others_reach_needs_certificates_or_a_word() {
    let dir = tempfile::tempdir().unwrap();
    let [kafka, admin, rpc] = free_ports();
    let all = format!("0.0.0.0:{rpc}");
    let seeds = format!("127.0.0.1:{rpc}");
    let server = |more: &[&str]| {
        let (kafka, admin) = (format!("127.0.0.1:{kafka}"), format!("127.0.0.1:{admin}"));
        let data = dir.path().join("data");
        let fixed = ["server", "--data-dir", data.to_str().unwrap(), "--kafka", &kafka, "--admin", &admin];
        let ended = flumen_tests::flumen::cli(&[&fixed[..], &["--seeds", &seeds], more].concat()).unwrap();
        assert!(!ended.success && !data.exists(), "{}", ended.stderr);
        ended.stderr
    };
    let said = server(&["--rpc", &all]);
    assert!(
        said.contains(&format!("--rpc {all} is not on loopback")) && said.contains("--rpc-plaintext"),
        "{said}"
    );
    let said = server(&["--rpc", &seeds, "--advertise-rpc", "db1.example:33145"]);
    assert!(said.contains("--advertise-rpc db1.example:33145 is not on loopback"), "{said}");
    let said = server(&["--rpc", &all, "--rpc-tls-cert", "n1.pem", "--rpc-tls-key", "n1.key"]);
    assert!(said.contains("give all three or none"), "{said}");
    let said = server(&["--rpc", &all, "--rpc-plaintext", "--set", "flumen.rpc.tls.cert=c"]);
    assert!(said.contains("give all three or none"), "{said}");
    let files =
        ["--rpc-tls-cert", "/nowhere.pem", "--rpc-tls-key", "/nowhere.key", "--rpc-tls-ca", "/nowhere.ca"];
    let said = server(&[&["--rpc", &all], &files[..]].concat());
    assert!(said.contains("cannot read /nowhere.pem"), "{said}");
    let said = server(&["--rpc", &all, "--set", "flumen.rpc.plaintext=perhaps"]);
    assert!(said.contains("true or false"), "{said}");

    let more = ["--node-id", "1", "--shards", "1", "--rpc", &all, "--seeds", &seeds, "--rpc-plaintext"];
    let node = Flumen::start_at(dir.path(), kafka, admin, &[], &more).unwrap();
    let health = node.get("/v1/cluster/health").unwrap();
    assert_eq!(health["is_healthy"], json!(true), "{health}");
    assert_eq!(health["problems"][0]["code"], json!("RPC_NOT_ENCRYPTED"), "{health}");
    let shown = node.cli(&["cluster", "health"]).unwrap();
    assert!(shown.success && shown.stdout.contains("RPC_NOT_ENCRYPTED"), "{}", shown.stdout);
}
