//! Real clients: the official `clickhouse` crate as it comes, and Python's `clickhouse-connect`.

mod support;

use std::process::Command;

use clickhouse::Row;
use serde::{Deserialize, Serialize};
use support::{Server, native, repository};

#[derive(Row, Serialize, Deserialize, Debug, PartialEq)]
struct Line {
    id: u64,
    text: String,
    price: Option<f64>,
}

fn block_on<T>(future: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread().enable_all().build().expect("runtime").block_on(future)
}

#[test]
fn the_official_crate_works_as_it_comes() {
    let dir = tempfile::tempdir().expect("temporary directory");
    let server = Server::start(dir.path());
    block_on(async {
        for compression in [clickhouse::Compression::Lz4, clickhouse::Compression::None] {
            let client = server.client().with_compression(compression);
            client.query("DROP TABLE IF EXISTS lines").execute().await.expect("drop");
            let ddl = "CREATE TABLE lines (id UInt64, text String, price Nullable(Float64)) ENGINE = MergeTree \
                       ORDER BY id SETTINGS non_replicated_deduplication_window = 100";
            client.query(ddl).execute().await.expect("create");

            let mut insert = client.insert::<Line>("lines").await.expect("describe");
            for id in 0..1000 {
                let line =
                    Line { id, text: format!("a\n\n'{id}"), price: (id % 2 == 0).then_some(id as f64) };
                insert.write(&line).await.expect("write");
            }
            insert.end().await.expect("end");
            let lines = client
                .query("SELECT ?fields FROM lines ORDER BY id")
                .fetch_all::<Line>()
                .await
                .expect("read");
            assert_eq!(lines.len(), 1000);
            assert_eq!(lines[7], Line { id: 7, text: "a\n\n'7".into(), price: None });

            // The exporter's way: a Native block and a token, twice.
            for _ in 0..2 {
                let mut insert = client
                    .insert_formatted_with("INSERT INTO lines (id, text) FORMAT Native")
                    .with_setting("insert_deduplication_token", "one")
                    .with_setting("query_id", "export-1");
                insert.send(native(&[5000, 5001], "\n\n").into()).await.expect("send");
                insert.end().await.expect("end");
            }
            let count = client.query("SELECT count() FROM lines").fetch_one::<u64>().await.expect("count");
            assert_eq!(count, 1002, "{compression:?}");

            let bound =
                client.query("SELECT text FROM lines WHERE id = ?").bind(7).fetch_one::<String>().await;
            assert_eq!(bound.expect("bind"), "a\n\n'7");
            let error = client.query("SELECT * FROM nope").execute().await.expect_err("no such table");
            assert!(error.to_string().contains("Code: 60."), "{error}");
            let mut insert = client.insert_formatted_with("INSERT INTO lines FORMAT Native");
            let sent = insert.send(b"\x01\x02garbage that is no block"[..].into()).await;
            let ended = insert.end().await;
            let error = sent.err().or(ended.err()).expect("garbage is refused");
            assert!(error.to_string().contains("Code: "), "{error}");
            let count = client.query("SELECT count() FROM lines").fetch_one::<u64>().await.expect("count");
            assert_eq!(count, 1002);
            let mut cursor =
                client.query("SELECT number FROM numbers(300000)").fetch::<u64>().expect("cursor");
            let mut sum = 0;
            while let Some(number) = cursor.next().await.expect("row") {
                sum += number;
            }
            assert_eq!(sum, 300_000 * 299_999 / 2);
        }
    });
}

/// The block that the crate itself packs has the checksum that we compute, for many lengths of payload.
#[test]
fn blocks_of_the_official_crate_are_read() {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("listen");
    let address = listener.local_addr().expect("address");
    let sizes = [1usize, 7, 20, 60, 100, 117, 150, 300, 5000, 300_000];
    let catcher = std::thread::spawn(move || {
        sizes.map(|_| {
            use std::io::{Read, Write};
            let (mut stream, _) = listener.accept().expect("accept");
            let mut all = Vec::new();
            let mut piece = [0; 65536];
            while !all.ends_with(b"\r\n0\r\n\r\n") {
                let n = stream.read(&mut piece).expect("read");
                assert_ne!(n, 0, "the client closed early");
                all.extend_from_slice(&piece[..n]);
            }
            let answer = b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\nConnection: close\r\n\r\n";
            stream.write_all(answer).expect("answer");
            let at = all.windows(4).position(|w| w == b"\r\n\r\n").expect("head") + 4;
            unchunk(&all[at..])
        })
    });
    block_on(async {
        let client = clickhouse::Client::default().with_url(format!("http://{address}"));
        let client = client.with_compression(clickhouse::Compression::Lz4);
        for size in sizes {
            let mut insert = client.insert_formatted_with("INSERT INTO t FORMAT RowBinary");
            let body: Vec<u8> = (0..size).map(|i| (i * 7 % 251) as u8).collect();
            insert.send(body.into()).await.expect("send");
            insert.end().await.expect("end");
        }
    });
    for (wire, size) in catcher.join().expect("catcher").iter().zip(sizes) {
        let plain = flumen_embedded::blocks::decode(wire, usize::MAX).expect("a block of the crate");
        assert_eq!(plain, (0..size).map(|i| (i * 7 % 251) as u8).collect::<Vec<u8>>());
    }
}

fn unchunk(mut wire: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    loop {
        let end = wire.windows(2).position(|w| w == b"\r\n").expect("size line");
        let size = usize::from_str_radix(std::str::from_utf8(&wire[..end]).expect("hex"), 16).expect("hex");
        if size == 0 {
            return out;
        }
        out.extend_from_slice(&wire[end + 2..end + 2 + size]);
        wire = &wire[end + 2 + size + 2..];
    }
}

#[test]
fn clickhouse_connect_works_as_it_comes() {
    let venv = repository().join(".cache/venv");
    let python = venv.join("bin/python");
    let has = |python: &std::path::Path| {
        Command::new(python)
            .args(["-c", "import clickhouse_connect"])
            .output()
            .is_ok_and(|o| o.status.success())
    };
    if !has(&python) {
        std::fs::create_dir_all(repository().join(".cache")).expect("cache directory");
        let made = Command::new("python3").args(["-m", "venv"]).arg(&venv).status();
        assert!(made.is_ok_and(|s| s.success()), "python3 -m venv failed; install python3 with venv");
        let pip = Command::new(&python).args(["-m", "pip", "install", "-q", "clickhouse-connect"]).status();
        assert!(pip.is_ok_and(|s| s.success()), "pip install clickhouse-connect failed");
    }
    let dir = tempfile::tempdir().expect("temporary directory");
    let server = Server::start(dir.path());
    let (host, port) = server.address.split_once(':').expect("address");
    let script = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/clickhouse_connect.py");
    let output = Command::new(&python).arg(script).args([host, port]).output().expect("python runs");
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{text}\n{}", String::from_utf8_lossy(&output.stderr));
    assert!(text.trim_end().ends_with("all passed"), "{text}");
}
