//! ClickHouse column types as `system.columns` spells them: parsing, printing and what nests in what.
//!
//! Owns the type language and nothing else. Pure code, any thread. Invariants: every `ColumnType` that
//! `parse` returns is one the encoder can write (`block/`), nests at most `MAX_TYPE_DEPTH` deep, and
//! `parse(&t.to_string())` gives `t` back. It does not know columns, defaults or JSON.

mod parse;

use std::fmt;

/// Deepest nesting accepted. Decoding recurses once per level, so this bounds the stack.
pub const MAX_TYPE_DEPTH: usize = 32;
/// Widest decimal the encoder writes: 38 digits fit an i128.
pub const MAX_DECIMAL_PRECISION: u8 = 38;
/// ClickHouse's own limit for FixedString.
pub const MAX_FIXED_STRING: usize = 0xFF_FFFF;

#[derive(Clone, Debug, PartialEq)]
pub enum ColumnType {
    Int8,
    Int16,
    Int32,
    Int64,
    UInt8,
    UInt16,
    UInt32,
    UInt64,
    Float32,
    Float64,
    Bool,
    String,
    FixedString(usize),
    Uuid,
    Date,
    Date32,
    DateTime { tz: Option<String> },
    DateTime64 { precision: u8, tz: Option<String> },
    Decimal { precision: u8, scale: u8 },
    Enum8(Vec<(String, i8)>),
    Enum16(Vec<(String, i16)>),
    LowCardinality(Box<ColumnType>),
    Nullable(Box<ColumnType>),
    Array(Box<ColumnType>),
    Map(Box<ColumnType>, Box<ColumnType>),
}

/// Why a type's text was refused. The text comes from a server or an operator, so it may be shown.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TypeError {
    #[error("column type {name} is not supported by the export")]
    Unsupported { name: String },
    #[error("column type is malformed at byte {at}: expected {expected}")]
    Malformed { at: usize, expected: &'static str },
    #[error("column type {name}: {reason}")]
    Invalid { name: &'static str, reason: &'static str },
    #[error("column type nests deeper than {MAX_TYPE_DEPTH} levels")]
    TooDeep,
}

impl ColumnType {
    /// Parses one type, as in `system.columns.type`. Enum values come out in the server's order, by number.
    pub fn parse(text: &str) -> Result<ColumnType, TypeError> {
        parse::parse(text)
    }

    /// The type sent in a block: LowCardinality is sent plain, since the server's cast to it cannot lose
    /// anything; all else is sent as declared, so that no server cast happens at all.
    pub fn wire(&self) -> ColumnType {
        match self {
            ColumnType::LowCardinality(inner) => inner.wire(),
            ColumnType::Nullable(inner) => ColumnType::Nullable(Box::new(inner.wire())),
            ColumnType::Array(inner) => ColumnType::Array(Box::new(inner.wire())),
            ColumnType::Map(key, value) => ColumnType::Map(Box::new(key.wire()), Box::new(value.wire())),
            plain => plain.clone(),
        }
    }

    /// Whether NULL can be stored, also through `LowCardinality(Nullable(T))`.
    pub fn is_nullable(&self) -> bool {
        match self {
            ColumnType::Nullable(_) => true,
            ColumnType::LowCardinality(inner) => inner.is_nullable(),
            _ => false,
        }
    }

    /// The type inside LowCardinality and Nullable.
    pub fn scalar(&self) -> &ColumnType {
        match self {
            ColumnType::LowCardinality(inner) | ColumnType::Nullable(inner) => inner.scalar(),
            plain => plain,
        }
    }

    /// Lowest and highest value of an integer type.
    pub fn int_range(&self) -> Option<(i128, i128)> {
        Some(match self {
            ColumnType::Int8 => (i8::MIN.into(), i8::MAX.into()),
            ColumnType::Int16 => (i16::MIN.into(), i16::MAX.into()),
            ColumnType::Int32 => (i32::MIN.into(), i32::MAX.into()),
            ColumnType::Int64 => (i64::MIN.into(), i64::MAX.into()),
            ColumnType::UInt8 => (0, u8::MAX.into()),
            ColumnType::UInt16 => (0, u16::MAX.into()),
            ColumnType::UInt32 => (0, u32::MAX.into()),
            ColumnType::UInt64 => (0, u64::MAX.into()),
            _ => return None,
        })
    }

    fn can_be_nullable(&self) -> bool {
        !matches!(
            self,
            ColumnType::Nullable(_)
                | ColumnType::LowCardinality(_)
                | ColumnType::Array(_)
                | ColumnType::Map(_, _)
        )
    }

    fn can_be_low_cardinality(&self) -> bool {
        match self {
            ColumnType::Nullable(inner) => inner.can_be_low_cardinality(),
            ColumnType::LowCardinality(_)
            | ColumnType::Array(_)
            | ColumnType::Map(_, _)
            | ColumnType::Decimal { .. }
            | ColumnType::Enum8(_)
            | ColumnType::Enum16(_) => false,
            _ => true,
        }
    }

    fn can_be_map_key(&self) -> bool {
        match self {
            ColumnType::LowCardinality(inner) => inner.can_be_map_key(),
            ColumnType::Nullable(_)
            | ColumnType::Array(_)
            | ColumnType::Map(_, _)
            | ColumnType::Float32
            | ColumnType::Float64
            | ColumnType::Decimal { .. }
            | ColumnType::Bool => false,
            _ => true,
        }
    }
}

impl fmt::Display for ColumnType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            ColumnType::Int8 => f.write_str("Int8"),
            ColumnType::Int16 => f.write_str("Int16"),
            ColumnType::Int32 => f.write_str("Int32"),
            ColumnType::Int64 => f.write_str("Int64"),
            ColumnType::UInt8 => f.write_str("UInt8"),
            ColumnType::UInt16 => f.write_str("UInt16"),
            ColumnType::UInt32 => f.write_str("UInt32"),
            ColumnType::UInt64 => f.write_str("UInt64"),
            ColumnType::Float32 => f.write_str("Float32"),
            ColumnType::Float64 => f.write_str("Float64"),
            ColumnType::Bool => f.write_str("Bool"),
            ColumnType::String => f.write_str("String"),
            ColumnType::FixedString(len) => write!(f, "FixedString({len})"),
            ColumnType::Uuid => f.write_str("UUID"),
            ColumnType::Date => f.write_str("Date"),
            ColumnType::Date32 => f.write_str("Date32"),
            ColumnType::DateTime { tz: None } => f.write_str("DateTime"),
            ColumnType::DateTime { tz: Some(tz) } => {
                f.write_str("DateTime(")?;
                write_quoted(f, tz)?;
                f.write_str(")")
            }
            ColumnType::DateTime64 { precision, tz: None } => write!(f, "DateTime64({precision})"),
            ColumnType::DateTime64 { precision, tz: Some(tz) } => {
                write!(f, "DateTime64({precision}, ")?;
                write_quoted(f, tz)?;
                f.write_str(")")
            }
            ColumnType::Decimal { precision, scale } => write!(f, "Decimal({precision}, {scale})"),
            ColumnType::Enum8(values) => {
                write_enum(f, "Enum8", values.iter().map(|(name, value)| (name.as_str(), i16::from(*value))))
            }
            ColumnType::Enum16(values) => {
                write_enum(f, "Enum16", values.iter().map(|(name, value)| (name.as_str(), *value)))
            }
            ColumnType::LowCardinality(inner) => write!(f, "LowCardinality({inner})"),
            ColumnType::Nullable(inner) => write!(f, "Nullable({inner})"),
            ColumnType::Array(inner) => write!(f, "Array({inner})"),
            ColumnType::Map(key, value) => write!(f, "Map({key}, {value})"),
        }
    }
}

impl std::str::FromStr for ColumnType {
    type Err = TypeError;
    fn from_str(text: &str) -> Result<ColumnType, TypeError> {
        ColumnType::parse(text)
    }
}

fn write_enum<'a>(
    f: &mut fmt::Formatter<'_>,
    name: &str,
    values: impl Iterator<Item = (&'a str, i16)>,
) -> fmt::Result {
    write!(f, "{name}(")?;
    for (at, (text, value)) in values.enumerate() {
        if at > 0 {
            f.write_str(", ")?;
        }
        write_quoted(f, text)?;
        write!(f, " = {value}")?;
    }
    f.write_str(")")
}

/// A string literal in single quotes with ClickHouse's escapes.
pub(crate) fn write_quoted(f: &mut dyn fmt::Write, text: &str) -> fmt::Result {
    f.write_char('\'')?;
    for c in text.chars() {
        match c {
            '\'' => f.write_str("\\'")?,
            '\\' => f.write_str("\\\\")?,
            '\n' => f.write_str("\\n")?,
            '\r' => f.write_str("\\r")?,
            '\t' => f.write_str("\\t")?,
            '\0' => f.write_str("\\0")?,
            '\u{8}' => f.write_str("\\b")?,
            '\u{c}' => f.write_str("\\f")?,
            other => f.write_char(other)?,
        }
    }
    f.write_char('\'')
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn parse(text: &str) -> ColumnType {
        ColumnType::parse(text).unwrap_or_else(|e| panic!("{text}: {e}"))
    }

    #[test]
    fn prints_what_system_columns_prints() {
        for text in [
            "Int8",
            "UInt64",
            "Float32",
            "Bool",
            "String",
            "FixedString(16)",
            "UUID",
            "Date",
            "Date32",
            "DateTime",
            "DateTime('Europe/Berlin')",
            "DateTime64(3)",
            "DateTime64(9, 'UTC')",
            "Decimal(10, 2)",
            "Decimal(38, 38)",
            "Enum8('it\\'s' = -128, 'a' = 1)",
            "Enum16('' = 0, 'x\\\\y' = 32767)",
            "LowCardinality(String)",
            "LowCardinality(Nullable(String))",
            "Nullable(Decimal(9, 0))",
            "Array(Array(Nullable(Int32)))",
            "Map(LowCardinality(String), Array(UInt8))",
        ] {
            assert_eq!(parse(text).to_string(), text);
        }
    }

    #[test]
    fn reads_other_spellings() {
        assert_eq!(parse("Decimal32(2)"), ColumnType::Decimal { precision: 9, scale: 2 });
        assert_eq!(parse("Decimal64( 18 )"), ColumnType::Decimal { precision: 18, scale: 18 });
        assert_eq!(parse("Decimal128(3)"), ColumnType::Decimal { precision: 38, scale: 3 });
        assert_eq!(parse("Decimal(5)"), ColumnType::Decimal { precision: 5, scale: 0 });
        assert_eq!(parse(" Map ( String ,Int8 ) ").to_string(), "Map(String, Int8)");
        assert_eq!(parse("Enum('a', 'b')"), ColumnType::Enum8(vec![("a".into(), 1), ("b".into(), 2)]));
        assert_eq!(parse("Enum('a'=300)"), ColumnType::Enum16(vec![("a".into(), 300)]));
        assert_eq!(parse("Enum8('a''b\\x41'=1)"), ColumnType::Enum8(vec![("a'bA".into(), 1)]));
    }

    #[test]
    fn refuses_what_the_encoder_cannot_write() {
        for text in [
            "",
            "Int",
            "Int128",
            "JSON",
            "Tuple(a Int8)",
            "Nullable(Array(Int8))",
            "Nullable(Nullable(Int8))",
            "LowCardinality(Array(String))",
            "Map(Nullable(String), Int8)",
            "FixedString(0)",
            "FixedString(99999999999999999999)",
            "DateTime64(10)",
            "DateTime64",
            "Decimal(39, 1)",
            "Decimal(5, 6)",
            "Decimal(5, -1)",
            "Enum8('a' = 128)",
            "Enum8('a' = 1, 'a' = 2)",
            "Enum8('a' = 1, 'b' = 1)",
            "Enum8()",
            "Enum8('a",
            "Array(Int8",
            "Array(Int8))",
            "Int8 x",
            "DateTime(UTC)",
        ] {
            assert!(ColumnType::parse(text).is_err(), "{text} was accepted");
        }
    }

    #[test]
    fn nesting_is_bounded() {
        let deep = |n: usize| format!("{}Int8{}", "Array(".repeat(n), ")".repeat(n));
        assert!(ColumnType::parse(&deep(MAX_TYPE_DEPTH - 1)).is_ok());
        assert_eq!(ColumnType::parse(&deep(MAX_TYPE_DEPTH)), Err(TypeError::TooDeep));
        assert_eq!(ColumnType::parse(&deep(100_000)), Err(TypeError::TooDeep));
    }

    #[test]
    fn wire_drops_low_cardinality_at_any_depth() {
        assert_eq!(
            parse("Map(LowCardinality(String), Array(LowCardinality(Nullable(String))))").wire().to_string(),
            "Map(String, Array(Nullable(String)))"
        );
    }

    fn scalar() -> impl Strategy<Value = ColumnType> {
        prop_oneof![
            Just(ColumnType::Int64),
            Just(ColumnType::String),
            Just(ColumnType::Uuid),
            (1usize..100).prop_map(ColumnType::FixedString),
            (0u8..=9, proptest::option::of(".{0,6}"))
                .prop_map(|(precision, tz)| ColumnType::DateTime64 { precision, tz }),
            (1u8..=38, 0u8..=38).prop_map(|(p, s)| ColumnType::Decimal { precision: p, scale: s.min(p) }),
            proptest::collection::btree_map(".{0,5}", any::<i16>(), 1..4).prop_map(|names| {
                let values: std::collections::BTreeMap<i16, String> =
                    names.into_iter().map(|(name, value)| (value, name)).collect();
                ColumnType::Enum16(values.into_iter().map(|(v, n)| (n, v)).collect())
            }),
        ]
    }

    proptest! {
        #[test]
        fn display_parses_back(ty in scalar().prop_recursive(4, 16, 2, |inner| prop_oneof![
            inner.clone().prop_map(|t| ColumnType::Array(Box::new(t))),
            inner.prop_map(|t| ColumnType::Map(Box::new(ColumnType::String), Box::new(t))),
        ])) {
            prop_assert_eq!(ColumnType::parse(&ty.to_string()), Ok(ty));
        }

        #[test]
        fn no_text_panics(text in "[A-Za-z0-9(),' =\\\\-]{0,60}") {
            let _ = ColumnType::parse(&text);
        }
    }
}
