//! The HTTP interface, spoken raw to a real engine process.

mod support;

use std::io::Write;
use std::net::TcpStream;

use flumen_embedded::blocks;
use support::{Reply, Server, native};

const TABLE: &str = "CREATE TABLE t (id UInt64, text String) ENGINE = MergeTree ORDER BY id \
                     SETTINGS non_replicated_deduplication_window = 1000";

#[test]
fn health_and_identity() {
    let dir = tempfile::tempdir().expect("temporary directory");
    let server = Server::start(dir.path());
    let get = |path: &str| {
        server.http(format!("GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").as_bytes())
    };
    assert_eq!((get("/ping").status, get("/ping").body.as_str()), (200, "Ok.\n"));
    assert_eq!(get("/replicas_status").status, 200);
    assert_eq!(get("/").body, "Ok.\n");
    assert_eq!(get("/nope").status, 404);
    let head = server.http(b"HEAD /ping HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n");
    assert_eq!((head.status, head.body.as_str()), (200, ""));

    let reply = server.post("query_id=mine&default_format=JSONEachRow", "", b"SELECT 1 AS x");
    assert_eq!((reply.status, reply.body.as_str()), (200, "{\"x\":1}\n"));
    assert_eq!(reply.header("x-clickhouse-query-id"), Some("mine"));
    assert_eq!(reply.header("x-clickhouse-format"), Some("jsoneachrow"));
    for name in ["x-clickhouse-timezone", "x-clickhouse-server-display-name", "x-clickhouse-summary"] {
        assert!(reply.header(name).is_some_and(|v| !v.is_empty()), "{name}: {}", reply.head);
    }
    let reply = server.post("", "X-ClickHouse-Format: CSV\r\n", b"SELECT 'a', 1");
    assert_eq!(reply.body, "\"a\",1\n");
    // GET must not write.
    assert!(get("/?query=CREATE%20DATABASE%20d").body.contains("Code: 164."));
    assert_eq!(get("/?query=SELECT%201").body, "1\n");
    assert_eq!(server.stop(), Some(0));
}

#[test]
fn every_way_to_send_an_insert() {
    let dir = tempfile::tempdir().expect("temporary directory");
    let server = Server::start(dir.path());
    server.sql(TABLE);
    let check = |what: &str, reply: Reply, rows: &str| {
        assert_eq!(reply.status, 200, "{what}: {}", reply.body);
        assert_eq!(server.sql("SELECT count(), sum(id) FROM t"), rows, "{what}");
        server.sql("TRUNCATE TABLE t");
    };
    // Text that ends a statement for a parser that does not know where data starts: blank lines, semicolons, quotes.
    let evil = "\n\n;\nDROP TABLE t;\n'`--/*";
    let block = native(&[1, 2, 3], evil);
    check("native in the body", server.post("query=INSERT%20INTO%20t%20FORMAT%20Native", "", &block), "3\t6");
    let mut joined = b"INSERT INTO t (id, text) FORMAT Native\n".to_vec();
    joined.extend_from_slice(&native(&[4, 5], evil));
    check("sql and native in one body", server.post("", "", &joined), "2\t9");
    check(
        "values",
        server.post("", "", b"INSERT INTO t VALUES (6, 'a;\n\nb'), (7, concat('x', 'y'));"),
        "2\t13",
    );
    check("values in two places", server.post("query=INSERT%20INTO%20t%20VALUES", "", b"(8, 'a')"), "1\t8");
    check(
        "head in two places",
        server.post("query=INSERT%20INTO%20t", "", b"(id) FORMAT JSONEachRow\n{\"id\":9}\n\n{\"id\":10}\n"),
        "2\t19",
    );
    check("parameters", server.post("param_p=11", "", b"INSERT INTO t VALUES ({p:UInt64}, 'a')"), "1\t11");
    check("select", server.post("", "", b"INSERT INTO t SELECT number, '' FROM numbers(5)"), "5\t10");
    let chunked =
        b"POST /?query=INSERT%20INTO%20t%20FORMAT%20TSV HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\
                    Transfer-Encoding: chunked\r\n\r\n5\r\n12\tx\n\r\n5\r\n13\ty\n\r\n0\r\n\r\n";
    check("chunked", server.http(chunked), "2\t25");
    let reply = server.post("query=INSERT%20INTO%20t%20FORMAT%20Native", "", &native(&[20, 21], "s"));
    assert!(
        reply.header("x-clickhouse-summary").is_some_and(|s| s.contains("\"written_rows\":\"2\"")),
        "{}",
        reply.head
    );
    assert_eq!(server.sql("SELECT groupUniqArray(text) FROM t"), "['s']");
}

#[test]
fn compressed_inserts_are_read_or_refused() {
    let dir = tempfile::tempdir().expect("temporary directory");
    let server = Server::start(dir.path());
    server.sql(TABLE);
    let insert = "query=INSERT%20INTO%20t%20FORMAT%20Native";
    let count = || server.sql("SELECT count() FROM t");
    let plain = native(&(0..2000).collect::<Vec<_>>(), "abc");
    let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    gzip.write_all(&plain).expect("in memory");
    let gzip = gzip.finish().expect("in memory");
    let mut lz4 = lz4_flex::frame::FrameEncoder::new(Vec::new());
    lz4.write_all(&plain).expect("in memory");
    let lz4 = lz4.finish().expect("in memory");
    let zstd = zstd::stream::encode_all(plain.as_slice(), 1).expect("in memory");
    for (name, body) in [("gzip", &gzip), ("lz4", &lz4), ("zstd", &zstd)] {
        let header = format!("Content-Encoding: {name}\r\n");
        let cut = server.post(insert, &header, &body[..body.len() - 3]);
        assert_ne!(cut.status, 200, "{name}");
        assert_eq!(count(), "0", "{name}: a damaged body inserted rows");
        assert_eq!(server.post(insert, &header, body).status, 200, "{name}");
        assert_eq!(count(), "2000", "{name}");
        server.sql("TRUNCATE TABLE t");
    }
    let framed = blocks::encode(&plain);
    assert_eq!(server.post(&format!("{insert}&decompress=1"), "", &framed).status, 200);
    assert_eq!(count(), "2000");
    let mut damaged = framed.clone();
    damaged[40] ^= 1;
    assert_eq!(server.post(&format!("{insert}&decompress=1"), "", &damaged).code(), 271);
    assert_eq!(server.post(&format!("{insert}&decompress=1"), "", &framed[..framed.len() - 1]).code(), 271);
    for name in ["br", "snappy", "made-up"] {
        let reply = server.post(insert, &format!("Content-Encoding: {name}\r\n"), &plain);
        assert_eq!((reply.status, reply.code()), (400, 89), "{name}");
        assert!(reply.body.contains("Nothing was inserted"), "{}", reply.body);
    }
    let form = "Content-Type: multipart/form-data; boundary=x\r\n";
    assert_eq!(server.post(insert, form, b"--x--").code(), 48);
    assert_eq!(count(), "2000");
    let reply = server.post("compress=1", "", b"SELECT number FROM numbers(100000)");
    let read = blocks::decode(&reply.bytes, usize::MAX).expect("framed answer");
    assert_eq!(String::from_utf8(read).expect("text").lines().count(), 100_000);
}

#[test]
fn a_cut_body_inserts_nothing() {
    let dir = tempfile::tempdir().expect("temporary directory");
    let server = Server::start(dir.path());
    server.sql(TABLE);
    let insert = "POST /?query=INSERT%20INTO%20t%20FORMAT%20CSV HTTP/1.1\r\nHost: x\r\n";
    for request in [
        format!("{insert}Content-Length: 100\r\n\r\n1,a\n2,b\n"),
        format!("{insert}Transfer-Encoding: chunked\r\n\r\n8\r\n1,a\n2,b\n\r\n"),
        format!("{insert}Transfer-Encoding: chunked\r\n\r\n8\r\n1,a\n2,b\n\r\n20\r\n3,c\n"),
        format!("{insert}Transfer-Encoding: chunked\r\n\r\nnonsense\r\n"),
    ] {
        let mut stream = TcpStream::connect(&server.address).expect("connect");
        stream.write_all(request.as_bytes()).expect("send");
        stream.shutdown(std::net::Shutdown::Write).expect("half close");
        let reply = Reply::read(stream);
        assert_ne!(reply.status, 200, "{request}: {}", reply.body);
        assert_eq!(server.sql("SELECT count() FROM t"), "0", "{request}");
    }
}

#[test]
fn settings_hold_for_one_statement_only() {
    let dir = tempfile::tempdir().expect("temporary directory");
    let server = Server::start(dir.path());
    let read =
        "SELECT getSetting('max_block_size'), getSetting('insert_deduplication_token'), currentDatabase()";
    let usual = server.sql(read);
    server.sql("CREATE DATABASE other");
    let params = "max_block_size=77&insert_deduplication_token=a%27b&database=other";
    assert_eq!(server.post(params, "", read.as_bytes()).body, "77\ta\\'b\tother\n");
    server.sql("SET max_block_size = 99");
    server.sql("USE other");
    server.sql("CREATE TEMPORARY TABLE mine (a Int8)");
    for _ in 0..80 {
        assert_eq!(server.sql(read), usual);
    }
    assert_eq!(server.post("", "", b"SELECT * FROM mine").code(), 60);
    let unknown = server.post("max_block_sice=1", "", b"SELECT 1");
    assert_eq!((unknown.status, unknown.code()), (404, 115));
    assert_eq!(server.post("a%3D1%2Cmax_threads=1", "", b"SELECT 1").code(), 115);
    assert_eq!(server.post("max_block_size=x", "", b"SELECT 1").status / 100, 4);

    // A session keeps what its statements change, and only that.
    let in_session =
        |params: &str, sql: &str| server.post(&format!("session_id=s{params}"), "", sql.as_bytes()).body;
    in_session("", "SET max_block_size = 88");
    in_session("", "CREATE TEMPORARY TABLE mine AS SELECT 5 AS a");
    assert_eq!(in_session("&max_block_size=3&database=other", read), "3\t\tother\n");
    assert_eq!(in_session("", read), "88\t\tdefault\n");
    assert_eq!(in_session("", "SELECT a FROM mine"), "5\n");
    assert_eq!(in_session("&close_session=1", "SELECT a FROM mine"), "5\n");
    assert_eq!(in_session("", read), format!("{usual}\n"));
    assert_eq!(server.post("session_id=new&session_check=1", "", b"SELECT 1").code(), 372);
}

#[test]
fn errors_carry_code_status_and_text() {
    let dir = tempfile::tempdir().expect("temporary directory");
    let server = Server::start(dir.path());
    server.sql(TABLE);
    for (params, headers, body, code, status) in [
        ("", "", "SELECT * FROM nope", 60, 404),
        ("database=nope", "", "SELECT 1", 81, 404),
        ("", "", "SELEC 1", 62, 400),
        ("", "", "foo", 62, 400),
        ("", "", "", 62, 400),
        ("", "", "SELECT 1; SELECT 2", 62, 400),
        ("", "", "INSERT INTO t", 62, 400),
        ("", "", "INSERT INTO t FORMAT Nope\n1", 73, 404),
        ("", "", "INSERT INTO t FORMAT CSV\nx,y", 27, 400),
        ("", "", "INSERT INTO t SELECT id, '' FROM input('id UInt64') FORMAT CSV\n1", 48, 501),
        ("", "", "SELECT throwIf(1)", 395, 500),
        ("", "", "SELECT {x:UInt8}", 456, 500),
        ("param_x=boo", "", "SELECT {x:UInt8}", 457, 400),
        ("user=alice", "", "SELECT 1", 516, 403),
        ("password=x", "", "SELECT 1", 516, 403),
        ("", "X-ClickHouse-User: bob\r\n", "SELECT 1", 516, 403),
        ("", "Authorization: Bearer t\r\n", "SELECT 1", 516, 403),
        ("role=r", "", "SELECT 1", 511, 404),
    ] {
        let reply = server.post(params, headers, body.as_bytes());
        assert_eq!((reply.code(), reply.status), (code, status), "{params} {body}: {}", reply.body);
    }
    assert_eq!(server.sql("SELECT count() FROM t"), "0");
    assert_eq!(server.post("", "Authorization: Basic ZGVmYXVsdDo=\r\n", b"SELECT 1").status, 200);
    let put = server.http(b"PUT / HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: 0\r\n\r\n");
    assert_eq!(put.status, 405);
}

#[test]
fn statements_run_beside_each_other() {
    let dir = tempfile::tempdir().expect("temporary directory");
    let server = Server::start(dir.path());
    server.sql(TABLE);
    // A statement that outlasts the test; the server is killed under it at the end.
    let slow = "SELECT max(sleepEachRow(1)) FROM numbers(1000000) SETTINGS max_block_size = 1";
    let mut stream = TcpStream::connect(&server.address).expect("connect");
    let head = format!("POST /?query_id=slow HTTP/1.1\r\nHost: x\r\nContent-Length: {}\r\n\r\n", slow.len());
    stream.write_all(format!("{head}{slow}").as_bytes()).expect("send");
    let running = "SELECT count() FROM system.processes WHERE query_id = 'slow'";
    while server.sql(running) != "1" {}
    let ping = server.http(b"GET /ping HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n");
    assert_eq!(ping.body, "Ok.\n");
    assert_eq!(server.post("query_id=slow", "", b"SELECT 1").code(), 216);
    std::thread::scope(|scope| {
        for writer in 0..16u64 {
            let server = &server;
            scope.spawn(move || {
                for i in 0..20u64 {
                    let block = native(&[writer * 100 + i], "x");
                    let reply = server.post("query=INSERT%20INTO%20t%20FORMAT%20Native", "", &block);
                    assert_eq!(reply.status, 200, "{}", reply.body);
                }
            });
        }
    });
    assert_eq!(server.sql("SELECT count(), uniqExact(id) FROM t"), "320\t320");
    assert_eq!(server.sql(running), "1");
    let path = server.kill();
    assert_eq!(Server::start(&path).sql("SELECT count() FROM t"), "320");
}

#[test]
fn a_started_statement_ends_though_its_client_left() {
    let dir = tempfile::tempdir().expect("temporary directory");
    let server = Server::start(dir.path());
    server.sql(TABLE);
    let sql = "INSERT INTO t SELECT number, toString(sleepEachRow(0.2)) FROM numbers(5)";
    let request =
        format!("POST /?query_id=gone HTTP/1.1\r\nHost: x\r\nContent-Length: {}\r\n\r\n{sql}", sql.len());
    let mut stream = TcpStream::connect(&server.address).expect("connect");
    stream.write_all(request.as_bytes()).expect("send");
    let running = "SELECT count() FROM system.processes WHERE query_id = 'gone'";
    while server.sql(running) == "0" && server.sql("SELECT count() FROM t") == "0" {}
    drop(stream);
    // What an exporter does after a time-out: wait until the id is gone, then read back.
    while server.sql(running) != "0" {}
    assert_eq!(server.sql("SELECT count() FROM t"), "5");
}

#[test]
fn a_stop_is_clean_whatever_runs() {
    // Nothing runs, one client keeps its connection: at once. An INSERT without end: after the time for stopping.
    for sql in [
        "SELECT 1",
        "INSERT INTO t (id) SELECT number + sleepEachRow(0.0001) FROM numbers(1000000000) SETTINGS max_block_size = 1000",
    ] {
        let dir = tempfile::tempdir().expect("temporary directory");
        let server = Server::start(dir.path());
        server.sql(TABLE);
        let request = format!("POST / HTTP/1.1\r\nHost: x\r\nContent-Length: {}\r\n\r\n{sql}", sql.len());
        let mut stream = TcpStream::connect(&server.address).expect("connect");
        stream.write_all(request.as_bytes()).expect("send");
        if sql.starts_with("INSERT") {
            while server.sql("SELECT count() FROM system.processes WHERE query LIKE 'INSERT%'") != "1" {}
        }
        assert_eq!(server.stop(), Some(0), "{sql}");
        let server = Server::start(dir.path());
        assert_eq!(server.sql("SELECT count() - uniqExact(id) FROM t"), "0");
    }
}
