//! Blocks of the encoder, read by the real engine: every type with its edge values, random rows against the
//! engine's own JSON reader, the created tables, and that no column is ever cast on arrival.

use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use flumen_embedded::Engine;
use flumen_sink::block::{BlockBuilder, RowMeta};
use flumen_sink::column_type::ColumnType;
use flumen_sink::ddl::{DdlOptions, create_table_sql, quote_ident, quote_string};
use flumen_sink::infer::infer_columns;
use flumen_sink::mapping::{MappingOptions, RowMapping};
use flumen_sink::table::{Column, DefaultKind, TableSchema};

/// The engine on a directory of its own. A process can have one data directory open at a time, so tests take
/// turns; each closes its engine, because a process that exits with an open one may crash in the library.
struct Opened {
    // Dropped in this order.
    engine: Engine,
    _directory: tempfile::TempDir,
    _turn: MutexGuard<'static, ()>,
}

impl std::ops::Deref for Opened {
    type Target = Engine;
    fn deref(&self) -> &Engine {
        &self.engine
    }
}

fn engine() -> Opened {
    static TURN: Mutex<()> = Mutex::new(());
    // Another test's failed assertion leaves the turn usable.
    let turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    let directory = tempfile::tempdir().expect("a temporary directory");
    let engine = Engine::open(&library(), &directory.path().join("data"))
        .unwrap_or_else(|e| panic!("the engine does not open: {e}"));
    Opened { engine, _directory: directory, _turn: turn }
}

fn library() -> PathBuf {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../.cache/chdb/libchdb.so");
    assert!(
        path.exists(),
        "{} is not there. This test needs the real ClickHouse engine: run sink/embedded/fetch-engine.sh once, then again.",
        path.display()
    );
    path
}

fn run(engine: &Engine, sql: &str) -> String {
    let answer = engine.query(sql, "TabSeparated", None).unwrap_or_else(|e| panic!("{sql}\n{e}"));
    String::from_utf8(answer).expect("UTF-8")
}

fn schema(table: &str, columns: &[(String, String)]) -> TableSchema {
    TableSchema {
        database: "default".into(),
        table: table.into(),
        engine: "MergeTree".into(),
        columns: columns
            .iter()
            .map(|(name, ty)| {
                Column::new(name, ColumnType::parse(ty).unwrap_or_else(|e| panic!("{ty}: {e}")))
            })
            .collect(),
    }
}

/// The columns as the server has them, default kinds included.
fn described(engine: &Engine, table: &str) -> TableSchema {
    let rows = run(
        engine,
        &format!(
            "SELECT name, type, default_kind FROM system.columns \
             WHERE database = 'default' AND table = {} ORDER BY position FORMAT JSONCompactEachRow",
            quote_string(table)
        ),
    );
    let columns = rows
        .lines()
        .map(|line| {
            let (name, ty, kind): (String, String, String) =
                serde_json::from_str(line).expect("three strings");
            Column {
                name,
                ty: ColumnType::parse(&ty).unwrap_or_else(|e| panic!("{ty}: {e}")),
                default_kind: DefaultKind::parse(&kind).expect("a known kind"),
            }
        })
        .collect();
    TableSchema { database: "default".into(), table: table.into(), engine: "MergeTree".into(), columns }
}

fn create(engine: &Engine, table: &TableSchema) {
    let columns: Vec<String> =
        table.columns.iter().map(|c| format!("{} {}", quote_ident(&c.name), c.ty)).collect();
    run(engine, &format!("DROP TABLE IF EXISTS {}", quote_ident(&table.table)));
    run(
        engine,
        &format!(
            "CREATE TABLE {} ({}) ENGINE = MergeTree ORDER BY tuple()",
            quote_ident(&table.table),
            columns.join(", ")
        ),
    );
}

fn insert(engine: &Engine, mapping: &RowMapping, table: &str, block: &[u8]) {
    let sql = format!("INSERT INTO {} ({}) FORMAT Native", quote_ident(table), mapping.insert_columns());
    engine.query(&sql, "TabSeparated", Some(block)).unwrap_or_else(|e| panic!("{sql}\n{e}"));
}

fn meta(offset: i64) -> RowMeta<'static> {
    RowMeta { topic: "topic", partition: 7, offset, timestamp_ms: 1_700_000_000_123, key: None }
}

/// Type, then pairs of a JSON value and how the engine prints what it stored.
type Case = (&'static str, &'static [(&'static str, &'static str)]);

const CASES: &[Case] = &[
    ("Int8", &[("-128", "-128"), ("127", "127"), ("\"5\"", "5"), ("5.0", "5"), ("-0", "0")]),
    ("Int16", &[("-32768", "-32768"), ("32767", "32767")]),
    ("Int32", &[("-2147483648", "-2147483648"), ("2147483647", "2147483647"), ("1e3", "1000")]),
    (
        "Int64",
        &[
            ("-9223372036854775808", "-9223372036854775808"),
            ("9223372036854775807", "9223372036854775807"),
            ("9007199254740993", "9007199254740993"),
            ("\"9007199254740993\"", "9007199254740993"),
        ],
    ),
    ("UInt8", &[("0", "0"), ("255", "255")]),
    ("UInt16", &[("0", "0"), ("65535", "65535")]),
    ("UInt32", &[("0", "0"), ("4294967295", "4294967295")]),
    ("UInt64", &[("0", "0"), ("18446744073709551615", "18446744073709551615")]),
    (
        "Float32",
        &[
            ("0", "0"),
            ("1.5", "1.5"),
            ("-3.4028235e38", "-3.4028235e38"),
            ("\"inf\"", "inf"),
            ("1e-45", "1e-45"),
        ],
    ),
    (
        "Float64",
        &[
            ("0.1", "0.1"),
            ("1.7976931348623157e308", "1.7976931348623157e308"),
            ("-5e-324", "-5e-324"),
            ("\"NaN\"", "nan"),
            ("\"-Infinity\"", "-inf"),
            ("12345678901234567890", "12345678901234567000"),
            ("0.30000000000000004", "0.30000000000000004"),
        ],
    ),
    ("Bool", &[("true", "true"), ("false", "false")]),
    (
        "String",
        &[
            ("\"\"", ""),
            ("\"plain\"", "plain"),
            (r#""q\"uo\\te""#, r#"q"uo\\te"#),
            (r#""tab\tnl\n""#, r"tab\tnl\n"),
            (r#""\u00e9\ud83d\ude00""#, "\u{e9}\u{1f600}"),
            ("12.10", "12.10"),
            ("{\"a\":[1,null]}", "{\"a\":[1,null]}"),
        ],
    ),
    ("FixedString(4)", &[("\"abcd\"", "abcd"), ("\"ab\"", r"ab\0\0"), ("\"\"", r"\0\0\0\0")]),
    (
        "UUID",
        &[
            ("\"00112233-4455-6677-8899-aabbccddeeff\"", "00112233-4455-6677-8899-aabbccddeeff"),
            ("\"FFFFFFFF-FFFF-FFFF-FFFF-FFFFFFFFFFFF\"", "ffffffff-ffff-ffff-ffff-ffffffffffff"),
            ("\"0123456789abcdef0123456789abcdef\"", "01234567-89ab-cdef-0123-456789abcdef"),
        ],
    ),
    (
        "Date",
        &[
            ("\"1970-01-01\"", "1970-01-01"),
            ("\"2149-06-06\"", "2149-06-06"),
            ("\"2000-02-29\"", "2000-02-29"),
        ],
    ),
    (
        "Date32",
        &[
            ("\"1900-01-01\"", "1900-01-01"),
            ("\"2299-12-31\"", "2299-12-31"),
            ("\"1969-12-31\"", "1969-12-31"),
        ],
    ),
    (
        "DateTime",
        &[
            ("0", "1970-01-01 00:00:00"),
            ("4294967295", "2106-02-07 06:28:15"),
            ("\"2023-11-14 22:13:20\"", "2023-11-14 22:13:20"),
            ("\"2023-11-14T23:13:20+01:00\"", "2023-11-14 22:13:20"),
        ],
    ),
    (
        "DateTime('Europe/Berlin')",
        &[("1700000000", "2023-11-14 23:13:20"), ("\"2023-11-14T22:13:20Z\"", "2023-11-14 23:13:20")],
    ),
    ("DateTime('UTC')", &[("\"2023-11-14 22:13:20\"", "2023-11-14 22:13:20")]),
    ("DateTime64(0)", &[("1700000000", "2023-11-14 22:13:20"), ("-0.5", "1969-12-31 23:59:59")]),
    (
        "DateTime64(3)",
        &[
            ("1700000000.123", "2023-11-14 22:13:20.123"),
            ("\"2023-11-14 22:13:20.5\"", "2023-11-14 22:13:20.500"),
            ("\"1900-01-01 00:00:00\"", "1900-01-01 00:00:00.000"),
            ("\"2299-12-31 23:59:59.999\"", "2299-12-31 23:59:59.999"),
            ("\"1969-12-31T23:59:59.999Z\"", "1969-12-31 23:59:59.999"),
            ("\"2023-11-14T22:13:20.123999Z\"", "2023-11-14 22:13:20.123"),
        ],
    ),
    (
        "DateTime64(9, 'UTC')",
        &[
            ("1700000000.000000001", "2023-11-14 22:13:20.000000001"),
            ("\"2262-04-11 23:47:16.854775807\"", "2262-04-11 23:47:16.854775807"),
        ],
    ),
    ("DateTime64(6, 'Asia/Tokyo')", &[("\"2023-11-14T22:13:20.000001Z\"", "2023-11-15 07:13:20.000001")]),
    (
        "Decimal(9, 2)",
        &[("12.10", "12.1"), ("-9999999.99", "-9999999.99"), ("\"0.01\"", "0.01"), ("1e2", "100")],
    ),
    ("Decimal(18, 18)", &[("0.123456789012345678", "0.123456789012345678"), ("0", "0")]),
    ("Decimal(10, 2)", &[("99999999.99", "99999999.99"), ("-12.10", "-12.1")]),
    (
        "Decimal(38, 0)",
        &[
            ("99999999999999999999999999999999999999", "99999999999999999999999999999999999999"),
            ("-99999999999999999999999999999999999999", "-99999999999999999999999999999999999999"),
        ],
    ),
    (
        "Decimal(38, 19)",
        &[("1234567890123456789.1234567890123456789", "1234567890123456789.1234567890123456789")],
    ),
    (
        r"Enum8('low' = -128, 'it\'s' = 0, 'high' = 127)",
        &[("\"low\"", "low"), ("\"it's\"", r"it\'s"), ("127", "high"), ("-128", "low")],
    ),
    ("Enum16('a' = -32768, 'ä' = 32767)", &[("\"a\"", "a"), ("\"ä\"", "ä"), ("32767", "ä")]),
    ("LowCardinality(String)", &[("\"x\"", "x"), ("\"\"", ""), ("\"x\"", "x")]),
    ("LowCardinality(FixedString(2))", &[("\"x\"", r"x\0")]),
    ("LowCardinality(Nullable(String))", &[("\"x\"", "x"), ("null", r"\N"), ("\"\"", "")]),
    ("Nullable(Int64)", &[("null", r"\N"), ("-1", "-1"), ("null", r"\N")]),
    ("Nullable(String)", &[("null", r"\N"), ("\"\"", ""), ("\"null\"", "null")]),
    ("Nullable(Bool)", &[("null", r"\N"), ("true", "true")]),
    ("Nullable(UUID)", &[("null", r"\N")]),
    ("Nullable(FixedString(3))", &[("null", r"\N"), ("\"abc\"", "abc")]),
    ("Nullable(Decimal(38, 5))", &[("null", r"\N"), ("-0.00001", "-0.00001")]),
    ("Nullable(DateTime64(3))", &[("null", r"\N"), ("0.001", "1970-01-01 00:00:00.001")]),
    ("Nullable(Enum8('a' = 5, 'b' = -5))", &[("null", r"\N"), ("\"a\"", "a")]),
    ("Nullable(Date32)", &[("null", r"\N"), ("\"1900-01-01\"", "1900-01-01")]),
    ("Array(UInt8)", &[("[]", "[]"), ("[1,2,3]", "[1,2,3]"), ("null", "[]"), ("[\"255\"]", "[255]")]),
    ("Array(Nullable(Int32))", &[("[null,1]", "[NULL,1]"), ("[]", "[]")]),
    ("Array(LowCardinality(String))", &[("[\"a\",\"b\",\"a\"]", "['a','b','a']")]),
    ("Array(LowCardinality(Nullable(String)))", &[("[\"a\",null]", "['a',NULL]")]),
    (
        "Array(Array(String))",
        &[("[[\"a\"],[],[\"b\",\"c\"]]", "[['a'],[],['b','c']]"), ("[]", "[]"), ("[[]]", "[[]]")],
    ),
    ("Array(Decimal(10, 2))", &[("[1.1,\"2.25\"]", "[1.1,2.25]")]),
    ("Array(Bool)", &[("[true,false]", "[true,false]")]),
    ("Array(Map(String, UInt8))", &[("[{\"a\":1},{}]", "[{'a':1},{}]")]),
    ("Map(String, Int64)", &[("{}", "{}"), ("{\"a\":1,\"b\":-2}", "{'a':1,'b':-2}"), ("null", "{}")]),
    ("Map(LowCardinality(String), LowCardinality(String))", &[("{\"k\":\"v\"}", "{'k':'v'}")]),
    ("Map(UInt16, Nullable(String))", &[("{\"1\":null,\"65535\":\"x\"}", "{1:NULL,65535:'x'}")]),
    (
        "Map(String, Array(Map(String, Float64)))",
        &[("{\"a\":[{\"b\":0.5}],\"c\":[]}", "{'a':[{'b':0.5}],'c':[]}")],
    ),
    (
        "Map(UUID, Date)",
        &[(
            "{\"00112233-4455-6677-8899-aabbccddeeff\":\"2020-01-01\"}",
            "{'00112233-4455-6677-8899-aabbccddeeff':'2020-01-01'}",
        )],
    ),
    ("Map(Enum8('a' = 1), DateTime)", &[("{\"a\":0}", "{'a':'1970-01-01 00:00:00'}")]),
];

#[test]
fn every_type_and_edge_value_reads_back() {
    let engine = engine();
    for (at, (ty, values)) in CASES.iter().enumerate() {
        let table = schema(
            &format!("golden_{at}"),
            &[("c".into(), (*ty).into()), ("_offset".into(), "Int64".into())],
        );
        create(&engine, &table);
        let mapping = RowMapping::new(&table, &MappingOptions::default()).expect("mapping");
        let mut builder = BlockBuilder::new(&mapping);
        for (offset, (json, _)) in (0i64..).zip(*values) {
            builder
                .push_json(&meta(offset), Some(format!("{{\"c\":{json}}}").as_bytes()))
                .unwrap_or_else(|e| panic!("{json} into {ty}: {e}"));
        }
        insert(&engine, &mapping, &table.table, &builder.finish());
        let stored = run(
            &engine,
            &format!(
                "SELECT c FROM {} ORDER BY _offset SETTINGS session_timezone = 'UTC'",
                quote_ident(&table.table)
            ),
        );
        let expected: Vec<&str> = values.iter().map(|(_, text)| *text).collect();
        assert_eq!(stored.split_terminator('\n').collect::<Vec<_>>(), expected, "{ty}");
        // The types sent are the table's own, so nothing was cast, silently or otherwise. LowCardinality is the
        // one exception: the server dictionary-encodes the same values.
        let declared = described(&engine, &table.table);
        assert_eq!(declared.columns, table.columns, "{ty}: the server's spelling parses to the same type");
        let sent = &mapping.columns()[0];
        assert!(sent.wire == declared.columns[0].ty || ty.contains("LowCardinality"), "{ty}");
    }
}

/// All cases of one type side by side in one wide block: columns do not run into each other.
#[test]
fn all_types_in_one_block() {
    let engine = engine();
    let mut columns: Vec<(String, String)> =
        CASES.iter().enumerate().map(|(at, (ty, _))| (format!("c {at}`\\"), (*ty).to_owned())).collect();
    columns.push(("_offset".into(), "Int64".into()));
    let table = schema("golden `wide\\", &columns);
    create(&engine, &table);
    let mapping = RowMapping::new(&table, &MappingOptions::default()).expect("mapping");
    let mut builder = BlockBuilder::new(&mapping);
    let rows = 10;
    let value = |at: usize, row: usize| CASES[at].1[row % CASES[at].1.len()];
    for row in 0..rows {
        let fields: Vec<String> = (0..CASES.len())
            .map(|at| {
                format!("{}:{}", serde_json::to_string(&columns[at].0).expect("JSON"), value(at, row).0)
            })
            .collect();
        builder
            .push_json(&meta(row as i64), Some(format!("{{{}}}", fields.join(",")).as_bytes()))
            .unwrap_or_else(|e| panic!("{e}"));
    }
    insert(&engine, &mapping, &table.table, &builder.finish());
    let stored = run(
        &engine,
        &format!(
            "SELECT * EXCEPT _offset FROM {} ORDER BY _offset SETTINGS session_timezone = 'UTC'",
            quote_ident(&table.table)
        ),
    );
    let expected: String = (0..rows)
        .map(|row| {
            let cells: Vec<&str> = (0..CASES.len()).map(|at| value(at, row).1).collect();
            cells.join("\t") + "\n"
        })
        .collect();
    assert_eq!(stored, expected);
}

/// Values the engine would have taken with a silent change never reach it.
#[test]
fn what_the_engine_casts_silently_is_refused_here() {
    let engine = engine();
    run(&engine, "DROP TABLE IF EXISTS silent");
    run(&engine, "CREATE TABLE silent (c Int16) ENGINE = MergeTree ORDER BY tuple()");
    // The engine's own behaviour, which is why the checks are made before a block is built.
    let wide = schema("silent", &[("c".into(), "Int64".into())]);
    let mut careless =
        BlockBuilder::new(&RowMapping::new(&wide, &MappingOptions::default()).expect("mapping"));
    careless.push_json(&meta(0), Some(b"{\"c\":70000}")).expect("fits Int64");
    let mapping = careless.mapping().clone();
    insert(&engine, &mapping, "silent", &careless.finish());
    assert_eq!(run(&engine, "SELECT c FROM silent"), "4464\n");

    let mut builder = BlockBuilder::new(
        &RowMapping::new(&described(&engine, "silent"), &MappingOptions::default()).expect("mapping"),
    );
    for (value, code) in [("70000", "OUT_OF_RANGE"), ("null", "NULL_NOT_ALLOWED"), ("1.5", "EXCESS_FRACTION")]
    {
        let error = builder.push_json(&meta(0), Some(format!("{{\"c\":{value}}}").as_bytes())).unwrap_err();
        assert_eq!(error.code, code);
    }
    assert_eq!(builder.rows(), 0);

    // A column dropped after the mapping was made is an error of the statement, not a column silently ignored.
    let stale = schema("silent", &[("c".into(), "Int16".into()), ("gone".into(), "Int16".into())]);
    let mapping = RowMapping::new(&stale, &MappingOptions::default()).expect("mapping");
    let mut builder = BlockBuilder::new(&mapping);
    builder.push_json(&meta(0), Some(b"{\"c\":1,\"gone\":1}")).expect("row");
    let sql = format!("INSERT INTO silent ({}) FORMAT Native", mapping.insert_columns());
    let error = engine.query(&sql, "TabSeparated", Some(&builder.finish())).expect_err("no such column");
    assert!(error.to_string().contains("gone"), "{error}");
    assert_eq!(run(&engine, "SELECT count() FROM silent"), "1\n");
}

#[test]
fn metadata_columns_hold_what_the_record_brought() {
    let engine = engine();
    run(&engine, "DROP TABLE IF EXISTS metadata");
    let sql = create_table_sql("default", "metadata", &[], &DdlOptions::default());
    run(&engine, &sql);
    run(&engine, &sql);
    run(
        &engine,
        "ALTER TABLE metadata ADD COLUMN _topic LowCardinality(String), ADD COLUMN seen DateTime DEFAULT now(), ADD COLUMN day Date MATERIALIZED toDate(_timestamp)",
    );
    let table = described(&engine, "metadata");
    assert_eq!(table.columns.last().map(|c| c.default_kind), Some(DefaultKind::Materialized));
    let options = MappingOptions { server_default_columns: vec!["seen".into()], ..Default::default() };
    let mapping = RowMapping::new(&table, &options).expect("mapping");
    assert!(mapping.has_offset_columns());
    let mut builder = BlockBuilder::new(&mapping);
    let key = [0xff, 0, b'\n'];
    builder.push_json(&RowMeta { key: Some(&key), ..meta(i64::MAX) }, Some(b"{}")).expect("row");
    builder.push_json(&RowMeta { timestamp_ms: -1, ..meta(0) }, Some(b"{}")).expect("row");
    insert(&engine, &mapping, "metadata", &builder.finish());
    assert_eq!(
        run(
            &engine,
            "SELECT _partition, _offset, _timestamp, hex(_key), _topic, day, seen > '2020-01-01' \
             FROM metadata ORDER BY _offset SETTINGS session_timezone = 'UTC'"
        ),
        "7\t0\t1970-01-01 00:00:00.000\t\ttopic\t1970-01-01\t1\n\
         7\t9223372036854775807\t2023-11-14 22:13:20.123\tFF000A\ttopic\t2023-11-14\t1\n"
    );
}

#[test]
fn created_tables_are_what_was_asked_for() {
    let engine = engine();
    let samples: [&[u8]; 2] = [
        br#"{"id":1,"price":1.5,"at":"2024-05-01T10:00:00Z","tags":["a"],"attrs":{"k":"v"},"ok":true,"who":null}"#,
        br#"{"id":2,"price":2,"at":"2024-05-01T10:00:01.5Z","tags":[],"attrs":{},"ok":false}"#,
    ];
    let columns = infer_columns(samples.into_iter()).expect("columns");
    let options = DdlOptions {
        order_by: Some("(id, at)".into()),
        partition_by: Some("toYYYYMM(at)".into()),
        ttl: Some("toDateTime(at) + INTERVAL 50 YEAR".into()),
        engine: None,
    };
    run(&engine, "DROP TABLE IF EXISTS `od``d`");
    run(&engine, &create_table_sql("default", "od`d", &columns, &options));
    let full =
        run(&engine, "SELECT engine_full FROM system.tables WHERE database = 'default' AND name = 'od`d'");
    for part in [
        "PARTITION BY toYYYYMM(at)",
        "ORDER BY (id, at)",
        "TTL",
        "non_replicated_deduplication_window = 10000",
    ] {
        assert!(full.contains(part), "{part} is not in {full}");
    }
    let index = run(&engine, "SELECT name, type FROM system.data_skipping_indices WHERE table = 'od`d'");
    assert_eq!(index, "_offset_minmax\tminmax\n");

    let mapping = RowMapping::new(&described(&engine, "od`d"), &MappingOptions::default()).expect("mapping");
    let mut builder = BlockBuilder::new(&mapping);
    for (offset, sample) in (0i64..).zip(samples) {
        builder.push_json(&meta(offset), Some(sample)).unwrap_or_else(|e| panic!("{e}"));
    }
    insert(&engine, &mapping, "od`d", &builder.finish());
    assert_eq!(
        run(&engine, "SELECT id, price, tags, attrs, ok, who, _offset FROM `od``d` ORDER BY id"),
        "1\t1.5\t['a']\t{'k':'v'}\ttrue\t\\N\t0\n2\t2\t[]\t{}\tfalse\t\\N\t1\n"
    );
}

/// A small generator of its own: the same rows on every run and every machine.
struct Rng(u64);

impl Rng {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }
    fn below(&mut self, n: u64) -> u64 {
        self.next() % n
    }
}

/// The same random records through our decoder and through the engine's own JSON reader: equal tables.
#[test]
fn random_rows_agree_with_the_engines_own_json_reader() {
    let engine = engine();
    let columns: Vec<(String, String)> = [
        ("i8", "Int8"),
        ("i64", "Int64"),
        ("u64", "UInt64"),
        ("f64", "Float64"),
        ("f32", "Float32"),
        ("b", "Bool"),
        ("s", "String"),
        ("lc", "LowCardinality(String)"),
        ("ns", "Nullable(String)"),
        ("d", "Date"),
        ("dt", "DateTime('UTC')"),
        ("dt64", "DateTime64(6, 'UTC')"),
        ("dec", "Decimal(18, 4)"),
        ("big", "Decimal(38, 10)"),
        ("e", "Enum8('red' = 1, 'green' = 2, 'blue' = -3)"),
        ("arr", "Array(Nullable(Int32))"),
        ("m", "Map(String, Int64)"),
        ("aas", "Array(Array(String))"),
        ("id", "UUID"),
    ]
    .iter()
    .map(|(name, ty)| ((*name).to_owned(), (*ty).to_owned()))
    .collect();
    let ours = schema("random_ours", &columns);
    let theirs = schema("random_theirs", &columns);
    create(&engine, &ours);
    create(&engine, &theirs);
    let mapping = RowMapping::new(&ours, &MappingOptions::default()).expect("mapping");
    let mut rng = Rng(0x9E37_79B9_7F4A_7C15);
    let text = |rng: &mut Rng| {
        let alphabet =
            ["a", "Z", " ", "\\n", "\\\"", "\\\\", "é", "\\u00e9", "\\ud83d\\ude00", "/", "'", "\\t"];
        (0..rng.below(12)).map(|_| alphabet[rng.below(12) as usize]).collect::<String>()
    };
    let mut lines = String::new();
    let mut builder = BlockBuilder::new(&mapping);
    let rows = 5000;
    for row in 0..rows {
        let list: Vec<String> = (0..rng.below(5))
            .map(|_| if rng.below(4) == 0 { "null".into() } else { (rng.next() as i32).to_string() })
            .collect();
        let map: Vec<String> = (0..rng.below(4)).map(|n| format!("\"k{n}\":{}", rng.next() as i64)).collect();
        let nested: Vec<String> = (0..rng.below(3))
            .map(|_| {
                let inner: Vec<String> =
                    (0..rng.below(3)).map(|_| format!("\"{}\"", text(&mut rng))).collect();
                format!("[{}]", inner.join(","))
            })
            .collect();
        let (day, second) = (rng.below(28) + 1, rng.below(60));
        let id = rng.next();
        let mut fields = vec![
            format!("\"i8\":{}", rng.next() as i8),
            format!("\"i64\":{}", rng.next() as i64),
            format!("\"u64\":{}", rng.next()),
            format!("\"f64\":{:e}", (rng.next() as i64) as f64 / 1e9),
            format!("\"f32\":{}", (rng.next() as i32) as f32 / 256.0),
            format!("\"b\":{}", rng.below(2) == 0),
            format!("\"s\":\"{}\"", text(&mut rng)),
            format!("\"lc\":\"{}\"", rng.below(20)),
            if rng.below(3) == 0 { "\"ns\":null".into() } else { format!("\"ns\":\"{}\"", text(&mut rng)) },
            format!("\"d\":\"2024-02-{day:02}\""),
            format!("\"dt\":\"2024-02-{day:02} 03:04:{second:02}\""),
            format!("\"dt64\":\"2024-02-{day:02} 03:04:{second:02}.{:06}\"", rng.below(1_000_000)),
            format!("\"dec\":{}.{:04}", rng.next() as i32, rng.below(10_000)),
            format!("\"big\":\"{}.{:010}\"", rng.next() as i64, rng.below(10_000_000_000)),
            format!("\"e\":\"{}\"", ["red", "green", "blue"][rng.below(3) as usize]),
            format!("\"arr\":[{}]", list.join(",")),
            format!("\"m\":{{{}}}", map.join(",")),
            format!("\"aas\":[{}]", nested.join(",")),
            format!("\"id\":\"{:08x}-1234-4abc-8def-{:012x}\"", id as u32, id >> 16),
        ];
        let turn = rng.below(fields.len() as u64) as usize;
        fields.rotate_left(turn);
        let record = format!("{{{}}}", fields.join(" , "));
        builder.push_json(&meta(row), Some(record.as_bytes())).unwrap_or_else(|e| panic!("{e}: {record}"));
        lines.push_str(&record);
        lines.push('\n');
    }
    insert(&engine, &mapping, "random_ours", &builder.finish());
    engine
        .query("INSERT INTO random_theirs FORMAT JSONEachRow", "TabSeparated", Some(lines.as_bytes()))
        .unwrap_or_else(|e| panic!("{e}"));
    let count = |sql: &str| run(&engine, sql);
    assert_eq!(count("SELECT count() FROM random_ours"), format!("{rows}\n"));
    assert_eq!(count("SELECT count() FROM random_theirs"), format!("{rows}\n"));
    for column in &ours.columns {
        let name = &column.name;
        let differing = count(&format!(
            "SELECT count() FROM (SELECT id, toString({name}) AS v FROM random_ours) AS a \
             INNER JOIN (SELECT id, toString({name}) AS v FROM random_theirs) AS b ON a.id = b.id \
             WHERE a.v != b.v OR isNull(a.v) != isNull(b.v)"
        ));
        assert_eq!(differing, "0\n", "column {name} ({})", column.ty);
    }
    assert_eq!(
        count("SELECT count() FROM random_ours AS a INNER JOIN random_theirs AS b ON a.id = b.id"),
        format!("{rows}\n")
    );
}
