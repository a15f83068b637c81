//! The engine inside the test's own process: used from many threads, closed and opened again.

mod support;

use flumen_embedded::{Engine, Statement};
use support::{library, native};

/// One test, since a process has one engine on one directory at a time.
#[test]
fn an_engine_is_shared_closed_and_opened_again() {
    let dirs = [tempfile::tempdir().expect("directory"), tempfile::tempdir().expect("directory")];
    for round in 0..4u64 {
        let path = dirs[(round % 2) as usize].path().to_owned();
        // Opened and closed on a thread that ends while the process goes on.
        let user = std::thread::spawn(move || {
            let engine = Engine::open(&library(), &path).expect("opens");
            let ddl = "CREATE TABLE IF NOT EXISTS t (id UInt64, text String) ENGINE = MergeTree ORDER BY id";
            engine.query(ddl, "TSV", None).expect("create");
            std::thread::scope(|scope| {
                for n in 0..8u64 {
                    let engine = &engine;
                    scope.spawn(move || {
                        let block = native(&[round * 8 + n], ";\n\n");
                        engine.query("INSERT INTO t FORMAT Native", "TSV", Some(&block)).expect("insert");
                        let error = engine.query("SELECT nope", "TSV", None).expect_err("unknown column");
                        assert_eq!(error.code, 47, "{error}");
                        let settings = vec![("max_block_size".to_owned(), "7".to_owned())];
                        let sql = b"SELECT getSetting('max_block_size'), {p:String}".to_vec();
                        let params = vec![("p".to_owned(), "a\\tb".to_owned())];
                        let statement = Statement {
                            sql,
                            settings,
                            params,
                            format: "TSVRaw".to_owned(),
                            ..Statement::default()
                        };
                        assert_eq!(engine.run(statement).expect("select").data, b"7\ta\tb\n");
                    });
                }
            });
            let count = engine.query("SELECT count(), uniqExact(id) FROM t", "TSV", None).expect("count");
            let rows = (round / 2 + 1) * 8;
            assert_eq!(String::from_utf8_lossy(&count), format!("{rows}\t{rows}\n"));
        });
        user.join().expect("no assertion failed");
    }
}
