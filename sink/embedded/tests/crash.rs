//! What the exporter's exactly-once rests on: deduplication tokens, also across SIGKILL, and one process per directory.

mod support;

use std::process::Command;

use support::{Server, library, native};

const TABLE: &str = "CREATE TABLE t (id UInt64, text String) ENGINE = MergeTree ORDER BY id \
                     SETTINGS non_replicated_deduplication_window = 1000";

fn insert(server: &Server, token: &str, ids: &[u64]) -> u16 {
    let params = format!("query=INSERT%20INTO%20t%20FORMAT%20Native&insert_deduplication_token={token}");
    server.post(&params, "", &native(ids, "x\n\ny")).status
}

#[test]
fn tokens_hold_through_kills() {
    let dir = tempfile::tempdir().expect("temporary directory");
    let mut server = Server::start(dir.path());
    server.sql(TABLE);
    for round in 0..4u64 {
        for n in 0..10u64 {
            let id = round * 10 + n;
            assert_eq!(insert(&server, &format!("token-{id}"), &[id]), 200);
            assert_eq!(insert(&server, &format!("token-{id}"), &[id]), 200);
        }
        let path = server.kill();
        server = Server::start(&path);
        for id in 0..(round + 1) * 10 {
            assert_eq!(insert(&server, &format!("token-{id}"), &[id]), 200);
        }
        let rows = (round + 1) * 10;
        assert_eq!(server.sql("SELECT count(), uniqExact(id) FROM t"), format!("{rows}\t{rows}"));
    }
    // Another token is another insert, even with the same rows.
    assert_eq!(insert(&server, "other", &[1]), 200);
    assert_eq!(server.sql("SELECT count() FROM t"), "41");
    assert_eq!(server.stop(), Some(0));
}

#[test]
fn a_kill_in_the_middle_of_an_insert_leaves_all_or_nothing_of_a_part() {
    let dir = tempfile::tempdir().expect("temporary directory");
    let mut server = Server::start(dir.path());
    server.sql(TABLE);
    let block = native(&(0..200_000).collect::<Vec<_>>(), "some text that takes time to write");
    for kill_after_ms in [0, 5, 20, 40, 80] {
        let address = server.address.clone();
        let body = block.clone();
        let sender = std::thread::spawn(move || {
            use std::io::Write;
            let head = format!(
                "POST /?query=INSERT%20INTO%20t%20FORMAT%20Native HTTP/1.1\r\nHost: x\r\nContent-Length: {}\r\n\r\n",
                body.len()
            );
            if let Ok(mut stream) = std::net::TcpStream::connect(address) {
                let _ = stream.write_all(head.as_bytes()).and_then(|()| stream.write_all(&body));
                let _ = support::Reply::read(stream);
            }
        });
        std::thread::sleep(std::time::Duration::from_millis(kill_after_ms));
        let path = server.kill();
        sender.join().expect("sender");
        server = Server::start(&path);
        let rows: u64 = server.sql("SELECT count() FROM t").parse().expect("a number");
        assert!(rows == 0 || rows == 200_000, "{rows} rows after a kill at {kill_after_ms} ms");
        server.sql("TRUNCATE TABLE t");
    }
}

#[test]
fn a_second_process_on_the_directory_is_refused_with_a_sentence() {
    let dir = tempfile::tempdir().expect("temporary directory");
    let server = Server::start(dir.path());
    let second = |data_dir: &std::path::Path, listen: &str, lib: &std::path::Path| {
        let test = std::env::current_exe().expect("own path");
        let example = test.parent().and_then(|p| p.parent()).expect("target").join("examples/engine");
        let mut command = Command::new(example);
        command.args(["--listen", listen, "--data-dir"]).arg(data_dir).arg("--lib").arg(lib);
        let output = command.output().expect("runs");
        assert!(!output.status.success());
        String::from_utf8_lossy(&output.stderr).into_owned()
    };
    let said = second(dir.path(), "127.0.0.1:0", &library());
    assert!(said.contains("another process uses it"), "{said}");
    let other = tempfile::tempdir().expect("temporary directory");
    let said = second(other.path(), &server.address, &library());
    assert!(said.contains("cannot listen on") && said.contains("--listen"), "{said}");
    let said = second(other.path(), "127.0.0.1:0", &other.path().join("libchdb.so"));
    assert!(said.contains("fetch-engine.sh"), "{said}");
    let wrong = other.path().join("wrong.so");
    std::fs::write(&wrong, b"not a library").expect("write");
    let said = second(other.path(), "127.0.0.1:0", &wrong);
    assert!(said.contains("cannot load the ClickHouse engine"), "{said}");
}
