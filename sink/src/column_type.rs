//! ClickHouse column types as `system.columns` spells them: parsing, printing and what nests in what.
//!
//! Owns the type language and nothing else. Pure code, any thread. Invariants: every `ColumnType` that
//! `parse` returns is one the encoder can write (`block/`), nests at most `MAX_TYPE_DEPTH` deep, and
//! `parse(&t.to_string())` gives `t` back. It does not know columns, defaults or JSON.

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
    /// Parses one type, as in `system.columns.type`.
    pub fn parse(text: &str) -> Result<ColumnType, TypeError> {
        let mut parser = Parser { text: text.as_bytes(), at: 0 };
        let ty = parser.ty(0)?;
        parser.skip_space();
        if parser.at != parser.text.len() {
            return Err(parser.malformed("the end of the type"));
        }
        Ok(ty)
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

struct Parser<'a> {
    text: &'a [u8],
    at: usize,
}

impl Parser<'_> {
    fn malformed(&self, expected: &'static str) -> TypeError {
        TypeError::Malformed { at: self.at, expected }
    }

    fn peek(&self) -> Option<u8> {
        self.text.get(self.at).copied()
    }

    fn skip_space(&mut self) {
        while matches!(self.peek(), Some(b' ' | b'\t' | b'\n' | b'\r')) {
            self.at += 1;
        }
    }

    /// Takes `byte` if it comes next, spaces aside.
    fn take(&mut self, byte: u8) -> bool {
        self.skip_space();
        let found = self.peek() == Some(byte);
        if found {
            self.at += 1;
        }
        found
    }

    fn expect(&mut self, byte: u8, expected: &'static str) -> Result<(), TypeError> {
        if self.take(byte) { Ok(()) } else { Err(self.malformed(expected)) }
    }

    fn name(&mut self) -> Result<String, TypeError> {
        self.skip_space();
        let start = self.at;
        while matches!(self.peek(), Some(c) if c.is_ascii_alphanumeric() || c == b'_') {
            self.at += 1;
        }
        if start == self.at {
            return Err(self.malformed("a type name"));
        }
        // ASCII alone was taken, so every byte is a char.
        Ok(self.text.get(start..self.at).unwrap_or_default().iter().map(|b| char::from(*b)).collect())
    }

    fn integer(&mut self) -> Result<i64, TypeError> {
        self.skip_space();
        let start = self.at;
        let negative = self.take(b'-');
        let mut value: i64 = 0;
        let mut digits = 0;
        while let Some(c @ b'0'..=b'9') = self.peek() {
            value = value
                .checked_mul(10)
                .and_then(|v| v.checked_add(i64::from(c - b'0')))
                .ok_or(TypeError::Malformed { at: start, expected: "a smaller number" })?;
            digits += 1;
            self.at += 1;
        }
        if digits == 0 {
            return Err(self.malformed("a number"));
        }
        Ok(if negative { -value } else { value })
    }

    fn quoted(&mut self) -> Result<String, TypeError> {
        self.expect(b'\'', "a quoted string")?;
        let start = self.at;
        let mut bytes = Vec::new();
        loop {
            let c = self.peek().ok_or_else(|| self.malformed("a closing quote"))?;
            self.at += 1;
            match c {
                b'\'' if self.peek() == Some(b'\'') => {
                    self.at += 1;
                    bytes.push(b'\'');
                }
                b'\'' => break,
                b'\\' => {
                    let escaped = self.peek().ok_or_else(|| self.malformed("an escaped character"))?;
                    self.at += 1;
                    bytes.push(match escaped {
                        b'n' => b'\n',
                        b'r' => b'\r',
                        b't' => b'\t',
                        b'0' => 0,
                        b'a' => 7,
                        b'b' => 8,
                        b'v' => 11,
                        b'f' => 12,
                        b'e' => 27,
                        b'x' => {
                            let digit = |b: Option<&u8>| b.and_then(|b| char::from(*b).to_digit(16));
                            match (digit(self.text.get(self.at)), digit(self.text.get(self.at + 1))) {
                                (Some(high), Some(low)) => {
                                    self.at += 2;
                                    (high * 16 + low) as u8
                                }
                                _ => return Err(self.malformed("two hexadecimal digits")),
                            }
                        }
                        other => other,
                    });
                }
                other => bytes.push(other),
            }
        }
        String::from_utf8(bytes).map_err(|_| TypeError::Malformed { at: start, expected: "UTF-8 text" })
    }

    fn ty(&mut self, depth: usize) -> Result<ColumnType, TypeError> {
        if depth >= MAX_TYPE_DEPTH {
            return Err(TypeError::TooDeep);
        }
        let name = self.name()?;
        let ty = match name.as_str() {
            "Int8" => ColumnType::Int8,
            "Int16" => ColumnType::Int16,
            "Int32" => ColumnType::Int32,
            "Int64" => ColumnType::Int64,
            "UInt8" => ColumnType::UInt8,
            "UInt16" => ColumnType::UInt16,
            "UInt32" => ColumnType::UInt32,
            "UInt64" => ColumnType::UInt64,
            "Float32" => ColumnType::Float32,
            "Float64" => ColumnType::Float64,
            "Bool" | "Boolean" => ColumnType::Bool,
            "String" => ColumnType::String,
            "UUID" => ColumnType::Uuid,
            "Date" => ColumnType::Date,
            "Date32" => ColumnType::Date32,
            "FixedString" => {
                self.open()?;
                let len = self.integer()?;
                self.close()?;
                match usize::try_from(len) {
                    Ok(len) if (1..=MAX_FIXED_STRING).contains(&len) => ColumnType::FixedString(len),
                    _ => return Err(invalid("FixedString", "its length must be 1 to 16777215")),
                }
            }
            "DateTime" => {
                let tz = if self.take(b'(') {
                    let tz = self.quoted()?;
                    self.close()?;
                    Some(tz)
                } else {
                    None
                };
                ColumnType::DateTime { tz }
            }
            "DateTime64" => {
                self.open()?;
                let precision = match self.integer()? {
                    p @ 0..=9 => p as u8,
                    _ => return Err(invalid("DateTime64", "its precision must be 0 to 9")),
                };
                let tz = if self.take(b',') { Some(self.quoted()?) } else { None };
                self.close()?;
                ColumnType::DateTime64 { precision, tz }
            }
            "Decimal" => {
                if self.take(b'(') {
                    let precision = self.integer()?;
                    let scale = if self.take(b',') { self.integer()? } else { 0 };
                    self.close()?;
                    decimal(precision, scale)?
                } else {
                    decimal(10, 0)?
                }
            }
            "Decimal32" => self.sized_decimal(9)?,
            "Decimal64" => self.sized_decimal(18)?,
            "Decimal128" => self.sized_decimal(38)?,
            "Enum8" | "Enum16" | "Enum" => self.enumeration(&name)?,
            "LowCardinality" => {
                let inner = self.inner(depth)?;
                if !inner.can_be_low_cardinality() {
                    return Err(invalid("LowCardinality", "this type cannot be inside it"));
                }
                ColumnType::LowCardinality(Box::new(inner))
            }
            "Nullable" => {
                let inner = self.inner(depth)?;
                if !inner.can_be_nullable() {
                    return Err(invalid("Nullable", "this type cannot be inside it"));
                }
                ColumnType::Nullable(Box::new(inner))
            }
            "Array" => ColumnType::Array(Box::new(self.inner(depth)?)),
            "Map" => {
                self.open()?;
                let key = self.ty(depth + 1)?;
                self.expect(b',', "a comma")?;
                let value = self.ty(depth + 1)?;
                self.close()?;
                if !key.can_be_map_key() {
                    return Err(invalid("Map", "this type cannot be a key"));
                }
                ColumnType::Map(Box::new(key), Box::new(value))
            }
            _ => return Err(TypeError::Unsupported { name }),
        };
        Ok(ty)
    }

    fn open(&mut self) -> Result<(), TypeError> {
        self.expect(b'(', "an opening parenthesis")
    }

    fn close(&mut self) -> Result<(), TypeError> {
        self.expect(b')', "a closing parenthesis")
    }

    fn inner(&mut self, depth: usize) -> Result<ColumnType, TypeError> {
        self.open()?;
        let inner = self.ty(depth + 1)?;
        self.close()?;
        Ok(inner)
    }

    fn sized_decimal(&mut self, precision: i64) -> Result<ColumnType, TypeError> {
        self.open()?;
        let scale = self.integer()?;
        self.close()?;
        decimal(precision, scale)
    }

    fn enumeration(&mut self, name: &str) -> Result<ColumnType, TypeError> {
        self.open()?;
        let mut values: Vec<(String, i16)> = Vec::new();
        loop {
            let text = self.quoted()?;
            let value = if self.take(b'=') {
                self.integer()?
            } else {
                // ClickHouse counts on from the value before, starting at 1.
                values.last().map_or(1, |(_, last)| i64::from(*last) + 1)
            };
            let value = i16::try_from(value).map_err(|_| invalid("Enum", "a value exceeds 16 bits"))?;
            values.push((text, value));
            if !self.take(b',') {
                break;
            }
        }
        self.close()?;
        let distinct_names: std::collections::BTreeSet<&str> =
            values.iter().map(|(text, _)| text.as_str()).collect();
        let distinct_values: std::collections::BTreeSet<i16> = values.iter().map(|(_, v)| *v).collect();
        if distinct_names.len() != values.len() || distinct_values.len() != values.len() {
            return Err(invalid("Enum", "a name or a value occurs twice"));
        }
        if name == "Enum16" {
            return Ok(ColumnType::Enum16(values));
        }
        let narrow: Option<Vec<(String, i8)>> =
            values.iter().map(|(text, v)| i8::try_from(*v).ok().map(|v| (text.clone(), v))).collect();
        match narrow {
            Some(narrow) => Ok(ColumnType::Enum8(narrow)),
            None if name == "Enum" => Ok(ColumnType::Enum16(values)),
            None => Err(invalid("Enum8", "a value exceeds 8 bits")),
        }
    }
}

fn invalid(name: &'static str, reason: &'static str) -> TypeError {
    TypeError::Invalid { name, reason }
}

fn decimal(precision: i64, scale: i64) -> Result<ColumnType, TypeError> {
    if !(1..=i64::from(MAX_DECIMAL_PRECISION)).contains(&precision) {
        return Err(invalid("Decimal", "its precision must be 1 to 38"));
    }
    if !(0..=precision).contains(&scale) {
        return Err(invalid("Decimal", "its scale must be 0 to its precision"));
    }
    Ok(ColumnType::Decimal { precision: precision as u8, scale: scale as u8 })
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
            "Enum8('a' = 1, 'it\\'s' = -128)",
            "Enum16('x\\\\y' = 32767, '' = 0)",
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
