//! Bytes by hand, row atomicity, and every check that the server would not make. The engine's own reading of
//! the blocks is in `sink/tests/golden_block.rs`.

use super::*;
use crate::column_type::ColumnType;
use crate::mapping::{MappingOptions, TimeUnit, UnknownFields};
use crate::table::{Column, TableSchema};
use proptest::prelude::*;

fn mapping_with(columns: &[(&str, &str)], options: MappingOptions) -> RowMapping {
    let columns = columns
        .iter()
        .map(|(name, ty)| Column::new(*name, ColumnType::parse(ty).unwrap_or_else(|e| panic!("{ty}: {e}"))))
        .collect();
    let table = TableSchema { database: "d".into(), table: "t".into(), engine: "MergeTree".into(), columns };
    RowMapping::new(&table, &options).unwrap()
}

fn mapping(columns: &[(&str, &str)]) -> RowMapping {
    mapping_with(columns, MappingOptions::default())
}

fn meta() -> RowMeta<'static> {
    RowMeta { topic: "inventory", partition: 3, offset: 42, timestamp_ms: 1_700_000_000_123, key: Some(b"k") }
}

/// The data of one value in a one-column block.
fn encode(ty: &str, value: &str) -> Result<Vec<u8>, RowError> {
    encode_with(ty, value, MappingOptions::default())
}

fn encode_with(ty: &str, value: &str, options: MappingOptions) -> Result<Vec<u8>, RowError> {
    let mapping = mapping_with(&[("c", ty)], options);
    let mut builder = BlockBuilder::new(&mapping);
    builder.push_json(&meta(), Some(format!("{{\"c\":{value}}}").as_bytes()))?;
    let wire = mapping.columns()[0].wire.to_string();
    let mut head = vec![1, 1, 1, b'c'];
    put_text(&mut head, wire.as_bytes());
    let block = builder.finish();
    Ok(block.strip_prefix(head.as_slice()).expect("header").to_vec())
}

fn refused(ty: &str, value: &str) -> &'static str {
    match encode(ty, value) {
        Err(e) => {
            assert_eq!(e.column.as_deref(), Some("c"), "{ty} {value}");
            e.code
        }
        Ok(bytes) => panic!("{value} was accepted into {ty} as {bytes:?}"),
    }
}

#[test]
fn one_block_byte_by_byte() {
    let mapping = mapping(&[("id", "UInt16"), ("s", "LowCardinality(String)"), ("_offset", "Int64")]);
    let mut builder = BlockBuilder::new(&mapping);
    builder.push_json(&meta(), Some(br#"{"id":258,"s":"ab"}"#)).unwrap();
    builder.push_json(&RowMeta { offset: 43, ..meta() }, Some(br#" {"s":"","id":1} "#)).unwrap();
    assert_eq!(builder.rows(), 2);
    assert_eq!(builder.bytes(), 4 + 4 + 16);
    let mut expected = vec![3, 2];
    expected.extend_from_slice(b"\x02id\x06UInt16\x02\x01\x01\x00");
    expected.extend_from_slice(b"\x01s\x06String\x02ab\x00");
    expected.extend_from_slice(b"\x07_offset\x05Int64\x2a\0\0\0\0\0\0\0\x2b\0\0\0\0\0\0\0");
    assert_eq!(builder.finish(), expected);
    assert_eq!((builder.rows(), builder.bytes()), (0, 0));
    assert_eq!(builder.finish(), b"\x03\x00\x02id\x06UInt16\x01s\x06String\x07_offset\x05Int64".as_slice());
}

#[test]
fn layouts() {
    assert_eq!(encode("Bool", "true").unwrap(), [1]);
    assert_eq!(encode("Nullable(Int8)", "null").unwrap(), [1, 0]);
    assert_eq!(encode("Nullable(Int8)", "-1").unwrap(), [0, 255]);
    assert_eq!(encode("LowCardinality(Nullable(String))", "null").unwrap(), [1, 0]);
    assert_eq!(encode("Nullable(Enum8('a' = 5, 'b' = -5))", "null").unwrap(), [1, 251]);
    assert_eq!(encode("FixedString(4)", "\"ab\"").unwrap(), b"ab\0\0");
    assert_eq!(encode("Nullable(FixedString(4))", "null").unwrap(), [1, 0, 0, 0, 0]);
    assert_eq!(encode("Array(UInt8)", "[1,2]").unwrap(), [2, 0, 0, 0, 0, 0, 0, 0, 1, 2]);
    assert_eq!(
        encode("Array(Nullable(UInt8))", "[1,null]").unwrap(),
        [2, 0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 0],
        "ends, null map, values"
    );
    assert_eq!(
        encode("Map(String, UInt8)", r#"{"a":1,"b":2}"#).unwrap(),
        [2, 0, 0, 0, 0, 0, 0, 0, 1, b'a', 1, b'b', 1, 2]
    );
    assert_eq!(
        encode("UUID", "\"00112233-4455-6677-8899-aabbccddeeff\"").unwrap(),
        [0x77, 0x66, 0x55, 0x44, 0x33, 0x22, 0x11, 0, 0xff, 0xee, 0xdd, 0xcc, 0xbb, 0xaa, 0x99, 0x88]
    );
    assert_eq!(encode("Decimal(10, 2)", "12.10").unwrap(), 1210i64.to_le_bytes());
    assert_eq!(encode("Decimal(9, 2)", "\"-0.01\"").unwrap(), (-1i32).to_le_bytes());
    assert_eq!(encode("Decimal(38, 0)", &"9".repeat(38)).unwrap(), (10i128.pow(38) - 1).to_le_bytes());
    assert_eq!(encode("Enum16('a' = -300)", "\"a\"").unwrap(), (-300i16).to_le_bytes());
    assert_eq!(encode("Enum8('1' = 7)", "\"1\"").unwrap(), [7], "a string is a name, not a value");
    assert_eq!(encode("Enum8('1' = 7)", "7").unwrap(), [7]);
    assert_eq!(encode("Date", "\"1970-01-02\"").unwrap(), [1, 0]);
    assert_eq!(encode("Date32", "\"1900-01-01\"").unwrap(), (-25_567i32).to_le_bytes());
    assert_eq!(encode("Float64", "\"NaN\"").unwrap(), 0x7FF8_0000_0000_0000u64.to_le_bytes());
    assert_eq!(encode("Float32", "\"-inf\"").unwrap(), f32::NEG_INFINITY.to_le_bytes());
}

#[test]
fn times() {
    let seconds = 1_700_000_000u32.to_le_bytes();
    for text in [
        "1700000000",
        "1700000000.9",
        "\"2023-11-14 22:13:20\"",
        "\"2023-11-14T22:13:20Z\"",
        "\"2023-11-15T00:13:20+02:00\"",
    ] {
        assert_eq!(encode("DateTime", text).unwrap(), seconds, "{text}");
        assert_eq!(encode("DateTime('Etc/UTC')", text).unwrap(), seconds, "{text}");
    }
    assert_eq!(encode("DateTime64(3)", "1700000000.1239").unwrap(), 1_700_000_000_123i64.to_le_bytes());
    assert_eq!(encode("DateTime64(0)", "-0.5").unwrap(), (-1i64).to_le_bytes());
    assert_eq!(
        encode("DateTime64(9, 'UTC')", "\"2023-11-14 22:13:20.000000001\"").unwrap(),
        1_700_000_000_000_000_001i64.to_le_bytes()
    );
    let exact = MappingOptions { truncate_time_fraction: false, ..Default::default() };
    let cut = encode_with("DateTime64(3)", "\"2023-11-14 22:13:20.1234\"", exact.clone());
    assert_eq!(cut.unwrap_err().code, code::EXCESS_FRACTION);
    assert!(encode_with("DateTime64(3)", "\"2023-11-14 22:13:20.1230\"", exact).is_ok());

    assert!(encode("DateTime('Europe/Berlin')", "\"2023-11-14 22:13:20+01:00\"").is_ok());
    assert!(encode("DateTime('Europe/Berlin')", "1700000000").is_ok());
    assert_eq!(refused("DateTime('Europe/Berlin')", "\"2023-11-14 22:13:20\""), code::NO_TIME_ZONE);
    // Whole numbers count what their size says, or what the options say.
    for text in ["1700000000", "1700000000000", "1700000000000000", "1700000000000000000"] {
        assert_eq!(encode("DateTime64(3)", text).unwrap(), 1_700_000_000_000i64.to_le_bytes(), "{text}");
        assert_eq!(encode("DateTime", text).unwrap(), 1_700_000_000u32.to_le_bytes(), "{text}");
    }
    assert_eq!(encode("DateTime64(3)", "-1700000000001").unwrap(), (-1_700_000_000_001i64).to_le_bytes());
    assert_eq!(encode("DateTime64(0)", "-1700000000001").unwrap(), (-1_700_000_001i64).to_le_bytes());
    assert_eq!(encode("DateTime64(6)", "1700000000123").unwrap(), 1_700_000_000_123_000i64.to_le_bytes());
    for (time_unit, text, ticks) in [
        (TimeUnit::Milliseconds, "5", 5i64),
        (TimeUnit::Microseconds, "5000", 5),
        (TimeUnit::Nanoseconds, "5000000", 5),
        (TimeUnit::Nanoseconds, "5000000000000000000", 5_000_000_000_000),
    ] {
        let options = MappingOptions { time_unit, ..Default::default() };
        assert_eq!(encode_with("DateTime64(3)", text, options).unwrap(), ticks.to_le_bytes());
    }
    let seconds = MappingOptions { time_unit: TimeUnit::Seconds, ..Default::default() };
    let refusal = encode_with("DateTime64(3)", "1700000000000", seconds).unwrap_err();
    assert_eq!(refusal.code, code::OUT_OF_RANGE);
    assert!(refusal.message.contains("flumen.clickhouse.time.unit"), "{}", refusal.message);
    assert_eq!(refused("DateTime64(3)", "1e300"), code::OUT_OF_RANGE);
    assert_eq!(refused("DateTime64(3)", "99999999999999999999999999999"), code::OUT_OF_RANGE);
    assert_eq!(refused("DateTime", "-1"), code::OUT_OF_RANGE);
    assert_eq!(refused("DateTime", "4294967296"), code::OUT_OF_RANGE);
    assert_eq!(refused("DateTime64(9)", "\"2263-01-01 00:00:00\""), code::OUT_OF_RANGE);
    assert_eq!(refused("DateTime64(3)", "\"1899-12-31 23:59:59\""), code::OUT_OF_RANGE);
    assert_eq!(refused("DateTime64(3)", "\"2299-12-31 23:59:59-01:00\""), code::OUT_OF_RANGE);
    assert_eq!(refused("DateTime", "\"2023-11-14\""), code::WRONG_TYPE);
    assert_eq!(refused("Date", "19675"), code::WRONG_TYPE);
    assert_eq!(refused("Date", "\"1969-12-31\""), code::OUT_OF_RANGE);
    assert_eq!(refused("Date", "\"2149-06-07\""), code::OUT_OF_RANGE);
    assert_eq!(refused("Date32", "\"2300-01-01\""), code::OUT_OF_RANGE);
}

#[test]
fn what_the_server_would_cast_silently() {
    assert_eq!(refused("Int16", "70000"), code::OUT_OF_RANGE);
    assert_eq!(refused("Int16", "null"), code::NULL_NOT_ALLOWED);
    assert_eq!(refused("UInt64", "-1"), code::OUT_OF_RANGE);
    assert_eq!(refused("UInt64", "18446744073709551616"), code::OUT_OF_RANGE);
    assert_eq!(refused("UInt64", "18446744073709551615.5"), code::EXCESS_FRACTION);
    assert_eq!(refused("Int64", "1e40"), code::OUT_OF_RANGE);
    assert_eq!(refused("Int64", "\"\""), code::WRONG_TYPE);
    assert_eq!(refused("Int64", "\" 1\""), code::WRONG_TYPE);
    assert_eq!(refused("Int64", "true"), code::WRONG_TYPE);
    assert_eq!(refused("Int64", "[1]"), code::WRONG_TYPE);
    assert_eq!(refused("Float32", "1e39"), code::OUT_OF_RANGE);
    assert_eq!(refused("Float64", "1e309"), code::OUT_OF_RANGE);
    assert_eq!(refused("Float64", "\"x\""), code::WRONG_TYPE);
    assert_eq!(refused("Bool", "1"), code::WRONG_TYPE);
    assert_eq!(refused("Bool", "\"true\""), code::WRONG_TYPE);
    assert_eq!(refused("Decimal(4, 2)", "100"), code::OUT_OF_RANGE);
    assert_eq!(refused("Decimal(4, 2)", "1.234"), code::EXCESS_FRACTION);
    assert_eq!(refused("FixedString(2)", "\"abc\""), code::OUT_OF_RANGE);
    assert_eq!(refused("UUID", "\"00112233-4455-6677-8899-aabbccddeef\""), code::WRONG_TYPE);
    assert_eq!(refused("UUID", "\"00112233+4455-6677-8899-aabbccddeeff\""), code::WRONG_TYPE);
    assert_eq!(refused("Enum8('a' = 1)", "\"b\""), code::OUT_OF_RANGE);
    assert_eq!(refused("Enum8('a' = 1)", "2"), code::OUT_OF_RANGE);
    assert_eq!(refused("Enum8('a' = 1)", "1e30"), code::OUT_OF_RANGE);
    assert_eq!(refused("Array(UInt8)", "[1,256]"), code::OUT_OF_RANGE);
    assert_eq!(refused("Array(UInt8)", "[null]"), code::NULL_NOT_ALLOWED);
    assert_eq!(refused("Array(UInt8)", "1"), code::WRONG_TYPE);
    assert_eq!(refused("Map(String, UInt8)", "[]"), code::WRONG_TYPE);
    assert_eq!(refused("Map(String, UInt8)", r#"{"a":1,"\u0061":2}"#), code::DUPLICATE_FIELD);
    assert_eq!(refused("Map(UInt8, UInt8)", r#"{"300":1}"#), code::OUT_OF_RANGE);
    assert_eq!(refused("String", "null"), code::NULL_NOT_ALLOWED);
    assert_eq!(refused("String", r#""\ud800""#), code::BAD_UTF8);
    assert_eq!(refused("Map(String, UInt8)", r#"{"\ud800":1}"#), code::BAD_UTF8);
    let big = format!("[{}]", vec!["\"\""; 2000].join(","));
    assert_eq!(refused("Array(FixedString(65536))", &big), code::ROW_TOO_LARGE);
}

#[test]
fn numbers_are_exact_from_numbers_and_strings() {
    for text in ["9007199254740993", "\"9007199254740993\"", "9007199254740993.0", "9007199254740993e0"] {
        assert_eq!(encode("Int64", text).unwrap(), 9_007_199_254_740_993i64.to_le_bytes());
    }
    assert_eq!(encode("Int64", "-9223372036854775808").unwrap(), i64::MIN.to_le_bytes());
    assert_eq!(encode("UInt64", "18446744073709551615").unwrap(), u64::MAX.to_le_bytes());
    assert_eq!(encode("Int8", "5.0").unwrap(), [5]);
    assert_eq!(encode("Int8", "-0").unwrap(), [0]);
}

#[test]
fn strings_take_json_text_unless_told_not_to() {
    assert_eq!(encode("String", r#""a\"\n\u00e9""#).unwrap(), "\x05a\"\n\u{e9}".as_bytes());
    assert_eq!(encode("String", "12.10").unwrap(), b"\x0512.10");
    assert_eq!(encode("String", r#"{"a": [1]}"#).unwrap(), b"\x0a{\"a\": [1]}");
    assert_eq!(encode("LowCardinality(String)", "true").unwrap(), b"\x04true");
    let strict = MappingOptions { json_text_in_strings: false, ..Default::default() };
    assert_eq!(encode_with("String", "12", strict).unwrap_err().code, code::WRONG_TYPE);
}

#[test]
fn whole_record_errors() {
    let mapping = mapping(&[("a", "Int64"), ("b", "Nullable(String)")]);
    let mut builder = BlockBuilder::new(&mapping);
    let mut code_of = |value: Option<&[u8]>| builder.push_json(&meta(), value).map_err(|e| e.code);
    assert_eq!(code_of(None), Err(code::TOMBSTONE));
    for bad in [
        "",
        " ",
        "{",
        "{}x",
        "[]",
        "1",
        "null",
        "\"a\"",
        "{\"a\":1,}",
        "{\"a\":01}",
        "{\"a\":1 \"b\":2}",
        "{a:1}",
        "{\"a\":\"\n\"}",
        "{\"a\":1}{\"a\":2}",
        "{\"\\ud800\":1}",
        "\u{feff}{\"a\":1}",
    ] {
        assert_eq!(code_of(Some(bad.as_bytes())), Err(code::NOT_JSON), "{bad}");
    }
    assert_eq!(code_of(Some(b"{\"a\":1,\"b\":\"\xff\"}")), Err(code::BAD_UTF8));
    assert_eq!(code_of(Some(b"{}")), Err(code::MISSING_FIELD));
    assert_eq!(code_of(Some(br#"{"a":1,"a":1}"#)), Err(code::DUPLICATE_FIELD));
    assert_eq!(code_of(Some(br#"{"a":1}"#)), Ok(()));
    assert_eq!(code_of(Some(br#"{"a":1,"other":{"deep":[1,2]},"b":null}"#)), Ok(()));
    let deep = format!("{{\"a\":1,\"x\":{}{}}}", "[".repeat(100_000), "]".repeat(100_000));
    assert_eq!(code_of(Some(deep.as_bytes())), Ok(()), "skipped fields do not use the stack");
    assert_eq!(builder.rows(), 3);
}

#[test]
fn unknown_fields_can_be_refused_and_metadata_cannot_be_forged() {
    let options = MappingOptions { unknown_fields: UnknownFields::DeadLetter, ..Default::default() };
    let mapping = mapping_with(&[("a", "Int8"), ("_offset", "Int64")], options);
    let mut builder = BlockBuilder::new(&mapping);
    for field in ["b", "A", "_offset"] {
        let value = format!("{{\"a\":1,\"{field}\":2}}");
        let error = builder.push_json(&meta(), Some(value.as_bytes())).unwrap_err();
        assert_eq!((error.code, error.column.as_deref()), (code::UNKNOWN_FIELD, Some(field)));
    }
    assert_eq!(builder.bytes(), 0);
}

#[test]
fn metadata_columns() {
    let mapping = mapping(&[
        ("_partition", "Int8"),
        ("_offset", "UInt64"),
        ("_timestamp", "DateTime64(1)"),
        ("_key", "Nullable(String)"),
        ("_topic", "LowCardinality(String)"),
    ]);
    let mut builder = BlockBuilder::new(&mapping);
    builder.push_json(&meta(), Some(b"{}")).unwrap();
    builder
        .push_json(&RowMeta { key: None, timestamp_ms: -1, ..meta() }, Some(br#"{"_key":"forged"}"#))
        .unwrap();
    let block = builder.finish();
    let contains = |part: &[u8]| block.windows(part.len()).any(|w| w == part);
    assert!(contains(b"\x04Int8\x03\x03"));
    let ticks = [17_000_000_001i64.to_le_bytes(), 0i64.to_le_bytes()].concat();
    assert!(contains(&[b"DateTime64(1)".as_slice(), &ticks].concat()));
    assert!(contains(b"Nullable(String)\x00\x01\x01k\x00"));
    assert!(contains(b"\x06String\x09inventory\x09inventory"));
    let error = builder.push_json(&RowMeta { partition: 128, ..meta() }, Some(b"{}")).unwrap_err();
    assert_eq!((error.code, error.column.as_deref()), (code::OUT_OF_RANGE, Some("_partition")));
}

const WIDE: [(&str, &str); 8] = [
    ("s", "String"),
    ("n", "Nullable(Int64)"),
    ("arr", "Array(Array(String))"),
    ("m", "Map(String, Array(Nullable(Int16)))"),
    ("d", "Decimal(20, 3)"),
    ("u", "Nullable(UUID)"),
    ("fs", "FixedString(3)"),
    ("last", "UInt8"),
];

#[test]
fn a_refused_row_leaves_no_trace_wherever_it_breaks() {
    let good = r#"{"s":"x","n":1,"arr":[["a"],[]],"m":{"k":[1,null]},"d":1.5,"u":null,"fs":"ab","last":1}"#;
    let mapping = mapping(&WIDE);
    let mut clean = BlockBuilder::new(&mapping);
    let mut dirty = BlockBuilder::new(&mapping);
    let mut bad = Vec::new();
    for at in 0..good.len() {
        bad.push(good[..at].to_owned());
    }
    for (from, to) in [
        ("\"last\":1", "\"last\":256"),
        ("\"last\":1", "\"last\":1,\"s\":\"y\""),
        (",\"last\":1", ""),
        ("[1,null]", "[1,99999]"),
        ("[\"a\"],[]", "[\"a\"],[null]"),
        ("\"k\":[1,null]", "\"k\":[1],\"k\":[2]"),
        ("\"ab\"", "\"abcd\""),
    ] {
        bad.push(good.replace(from, to));
    }
    for bad in &bad {
        dirty.push_json(&meta(), Some(bad.as_bytes())).unwrap_err();
        clean.push_json(&meta(), Some(good.as_bytes())).unwrap();
        dirty.push_json(&meta(), Some(good.as_bytes())).unwrap();
        assert_eq!(clean.bytes(), dirty.bytes(), "{bad}");
    }
    assert_eq!(clean.finish(), dirty.finish());
}

#[test]
fn field_order_does_not_change_the_bytes() {
    let mapping = mapping(&[("a", "Int8"), ("b", "Int8"), ("c", "Nullable(Int8)")]);
    let rows = [
        r#"{"a":1,"b":2,"c":3}"#,
        r#"{"c":3,"x":0,"b":2,"a":1}"#,
        r#"{"x":0,"y":0,"b":2,"a":1,"c":3}"#,
        r#"{"\u0061":1,"b":2,"c":3}"#,
    ];
    let mut blocks = Vec::new();
    for row in rows {
        let mut warm = BlockBuilder::new(&mapping);
        for other in rows {
            warm.push_json(&meta(), Some(other.as_bytes())).unwrap();
        }
        warm.clear();
        warm.push_json(&meta(), Some(row.as_bytes())).unwrap();
        blocks.push(warm.finish());
    }
    assert!(blocks.iter().all(|block| *block == blocks[0]));
}

proptest! {
    #[test]
    fn integers_fit_or_are_refused(value in any::<i128>(), shift in 0u32..128) {
        let value = value >> shift;
        for (ty, min, max, width) in [
            ("Int8", i8::MIN as i128, i8::MAX as i128, 1),
            ("UInt16", 0, u16::MAX as i128, 2),
            ("Int32", i32::MIN as i128, i32::MAX as i128, 4),
            ("Int64", i64::MIN as i128, i64::MAX as i128, 8),
            ("UInt64", 0, u64::MAX as i128, 8),
        ] {
            for text in [value.to_string(), format!("\"{value}\"")] {
                match encode(ty, &text) {
                    Ok(bytes) => {
                        prop_assert!((min..=max).contains(&value));
                        prop_assert_eq!(&bytes[..], &value.to_le_bytes()[..width]);
                    }
                    Err(e) => {
                        prop_assert!(!(min..=max).contains(&value));
                        prop_assert_eq!(e.code, code::OUT_OF_RANGE);
                    }
                }
            }
        }
    }

    #[test]
    fn floats_round_as_rust_does(value in any::<f64>()) {
        prop_assume!(value.is_finite());
        prop_assert_eq!(encode("Float64", &format!("{value:e}")).unwrap(), value.to_le_bytes());
    }

    #[test]
    fn strings_survive(text in any::<String>()) {
        let json = serde_json::to_string(&text).unwrap();
        let mut expected = Vec::new();
        put_text(&mut expected, text.as_bytes());
        prop_assert_eq!(encode("String", &json).unwrap(), expected);
    }

    /// Whatever comes in, rows before and after it are untouched.
    #[test]
    fn no_record_breaks_the_builder(
        records in proptest::collection::vec(
            prop_oneof![
                proptest::collection::vec(any::<u8>(), 0..60),
                "[\\[\\]{}\":,a-z0-9.\\\\nul]{0,60}".prop_map(String::into_bytes),
                r#"\{"s":("x"|1|null),"arr":\[\["a"\],(\[\]|1)\],"m":\{"k":\[1,(null|70000)\]\},"d":[0-9]{1,2}\.[0-9]{1,4},"fs":"[a-d]{1,4}","last":[0-9]{1,3}\}"#
                    .prop_map(String::into_bytes),
            ],
            0..20,
        )
    ) {
        let mapping = mapping(&WIDE);
        let (mut all, mut good) = (BlockBuilder::new(&mapping), BlockBuilder::new(&mapping));
        for record in &records {
            if all.push_json(&meta(), Some(record)).is_ok() {
                good.push_json(&meta(), Some(record)).unwrap();
            }
            // What JSON parser and builder call JSON is the same.
            let code = good_or_code(&mapping, record);
            let is_json = serde_json::from_slice::<std::collections::BTreeMap<String, serde_json::Value>>(record);
            if code == Some(code::NOT_JSON) {
                prop_assert!(is_json.is_err());
            }
            if code.is_none() {
                prop_assert!(is_json.is_ok());
            }
        }
        prop_assert_eq!(all.finish(), good.finish());
    }
}

fn good_or_code(mapping: &RowMapping, record: &[u8]) -> Option<&'static str> {
    BlockBuilder::new(mapping).push_json(&meta(), Some(record)).err().map(|e| e.code)
}
