//! One column's bytes in a Native block, and the decoding of one value into them.
//!
//! Owns the byte layout of every type and the exact checks of ranges, nulls and fractions, because the server's
//! own casts are silent. Pure, any thread. Invariants: between rows all nodes of a column hold the same number
//! of rows; `rollback` returns to the last `commit`, whatever half of a row was written. It does not know field
//! names.
//!
//! Layout: a node writes its own data, then its children's. Numbers are little-endian; a string is a varint
//! length and bytes; a UUID is two u64, high half first; Nullable is one byte per row (1 = NULL), then values;
//! Array and Map are cumulative u64 ends, then elements (keys, then values).

use crate::column_type::ColumnType;
use crate::json::number::{Number, NumberError, parse_short_integer};
use crate::json::time::{parse_date, parse_timestamp};
use crate::json::{code, for_each_element, for_each_entry, string_text};

/// Elements of one array column in one row: guards against `FixedString(65536)` arrays of empty strings, where
/// a small record would become gigabytes.
const MAX_ROW_BYTES: usize = 64 << 20;

/// 1900-01-01 and 2299-12-31: the days that Date32 and DateTime64 hold.
const DATE32_DAYS: (i32, i32) = (-25_567, 120_529);
const DATETIME64_SECONDS: (i128, i128) = (-25_567 * 86_400, 120_530 * 86_400 - 1);

/// The parts of `MappingOptions` that decide how a value is read.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Rules {
    pub(crate) json_text_in_strings: bool,
    pub(crate) truncate_time_fraction: bool,
}

/// Why a value does not fit its column. Messages never carry the value.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct CellError {
    pub(crate) code: &'static str,
    pub(crate) message: String,
}

impl CellError {
    pub(crate) fn new(code: &'static str, message: impl Into<String>) -> CellError {
        CellError { code, message: message.into() }
    }
}

#[derive(Debug)]
enum Leaf {
    Int { width: usize, min: i128, max: i128 },
    Float32,
    Float64,
    Bool,
    Text,
    Fixed(usize),
    Uuid,
    Date,
    Date32,
    DateTime { utc: bool },
    DateTime64 { precision: u8, utc: bool },
    Decimal { width: usize, limit: i128, scale: u8 },
    Enum { width: usize, by_name: Vec<(String, i16)>, values: Vec<i16> },
}

#[derive(Debug)]
enum Kind {
    Leaf(Leaf),
    Nullable(Box<Node>),
    Array { total: u64, elements: Box<Node> },
    Map { total: u64, keys: Box<Node>, values: Box<Node> },
}

/// A column, or a part of one.
#[derive(Debug)]
pub(crate) struct Node {
    kind: Kind,
    /// Leaf: values. Nullable: the null map. Array and Map: the ends.
    data: Vec<u8>,
    /// Length of `data` after the last whole row.
    committed: usize,
    /// For messages only.
    ty: ColumnType,
}

impl Node {
    /// `ty` as it is sent: without LowCardinality (`ColumnType::wire`).
    pub(crate) fn new(ty: &ColumnType) -> Node {
        let child = |ty: &ColumnType| Box::new(Node::new(ty));
        let kind = match ty {
            ColumnType::LowCardinality(inner) => return Node::new(inner),
            ColumnType::Nullable(inner) => Kind::Nullable(child(inner)),
            ColumnType::Array(inner) => Kind::Array { total: 0, elements: child(inner) },
            ColumnType::Map(key, value) => Kind::Map { total: 0, keys: child(key), values: child(value) },
            ColumnType::Float32 => Kind::Leaf(Leaf::Float32),
            ColumnType::Float64 => Kind::Leaf(Leaf::Float64),
            ColumnType::Bool => Kind::Leaf(Leaf::Bool),
            ColumnType::String => Kind::Leaf(Leaf::Text),
            ColumnType::FixedString(len) => Kind::Leaf(Leaf::Fixed(*len)),
            ColumnType::Uuid => Kind::Leaf(Leaf::Uuid),
            ColumnType::Date => Kind::Leaf(Leaf::Date),
            ColumnType::Date32 => Kind::Leaf(Leaf::Date32),
            ColumnType::DateTime { tz } => Kind::Leaf(Leaf::DateTime { utc: is_utc(tz.as_deref()) }),
            ColumnType::DateTime64 { precision, tz } => {
                Kind::Leaf(Leaf::DateTime64 { precision: *precision, utc: is_utc(tz.as_deref()) })
            }
            ColumnType::Decimal { precision, scale } => Kind::Leaf(Leaf::Decimal {
                width: match precision {
                    0..=9 => 4,
                    10..=18 => 8,
                    _ => 16,
                },
                limit: 10i128.pow(u32::from(*precision).min(38)),
                scale: *scale,
            }),
            ColumnType::Enum8(values) => {
                Kind::Leaf(enumeration(1, values.iter().map(|(n, v)| (n.clone(), i16::from(*v)))))
            }
            ColumnType::Enum16(values) => Kind::Leaf(enumeration(2, values.iter().cloned())),
            ColumnType::Int8
            | ColumnType::Int16
            | ColumnType::Int32
            | ColumnType::Int64
            | ColumnType::UInt8
            | ColumnType::UInt16
            | ColumnType::UInt32
            | ColumnType::UInt64 => {
                let (min, max) = ty.int_range().unwrap_or((0, 0));
                let width = match ty {
                    ColumnType::Int8 | ColumnType::UInt8 => 1,
                    ColumnType::Int16 | ColumnType::UInt16 => 2,
                    ColumnType::Int32 | ColumnType::UInt32 => 4,
                    _ => 8,
                };
                Kind::Leaf(Leaf::Int { width, min, max })
            }
        };
        Node { kind, data: Vec::new(), committed: 0, ty: ty.clone() }
    }

    /// Decodes one JSON value, given as its raw text.
    pub(crate) fn push_json(&mut self, raw: &str, rules: &Rules) -> Result<(), CellError> {
        let first = raw.as_bytes().first().copied().unwrap_or(0);
        match &mut self.kind {
            Kind::Leaf(leaf) => push_leaf(leaf, &mut self.data, &self.ty, first, raw, rules),
            Kind::Nullable(inner) => {
                self.data.push(u8::from(first == b'n'));
                if first == b'n' {
                    inner.push_placeholder();
                    Ok(())
                } else {
                    inner.push_json(raw, rules)
                }
            }
            Kind::Array { total, elements } => {
                match first {
                    // Go and others write an empty list as null.
                    b'n' => {}
                    b'[' => for_each_element(raw, &mut |raw| {
                        *total += 1;
                        elements.push_json(raw, rules)?;
                        elements.check_row_size()
                    })?,
                    other => return Err(wrong_type(&self.ty, other)),
                }
                self.data.extend_from_slice(&total.to_le_bytes());
                Ok(())
            }
            Kind::Map { total, keys, values } => {
                match first {
                    b'n' => {}
                    b'{' => for_each_entry(raw, &mut |key, raw| {
                        *total += 1;
                        keys.push_text(key, rules)?;
                        values.push_json(raw, rules)?;
                        keys.check_row_size()?;
                        values.check_row_size()
                    })?,
                    other => return Err(wrong_type(&self.ty, other)),
                }
                self.data.extend_from_slice(&total.to_le_bytes());
                Ok(())
            }
        }
    }

    /// Decodes text, as from a JSON string.
    fn push_text(&mut self, text: &str, rules: &Rules) -> Result<(), CellError> {
        match &mut self.kind {
            Kind::Leaf(leaf) => push_leaf_text(leaf, &mut self.data, &self.ty, text, rules),
            _ => Err(wrong_type(&self.ty, b'"')),
        }
    }

    /// The value of a field that the record lacks: NULL or empty, or false where there is none.
    pub(crate) fn push_missing(&mut self) -> bool {
        match &mut self.kind {
            Kind::Leaf(_) => return false,
            Kind::Nullable(inner) => {
                self.data.push(1);
                inner.push_placeholder();
            }
            Kind::Array { total, .. } | Kind::Map { total, .. } => {
                self.data.extend_from_slice(&total.to_le_bytes());
            }
        }
        true
    }

    /// The value that stands under a NULL; the server ignores it, but an enum's must be a declared one.
    fn push_placeholder(&mut self) {
        if let Kind::Leaf(leaf) = &self.kind {
            match leaf {
                Leaf::Enum { width, values, .. } => {
                    put_int(&mut self.data, *width, values.first().copied().unwrap_or(0).into());
                }
                Leaf::Fixed(len) => self.data.resize(self.data.len() + len, 0),
                other => self.data.resize(self.data.len() + other.min_width(), 0),
            }
        }
    }

    /// A metadata integer.
    pub(crate) fn push_int(&mut self, value: i64) -> Result<(), CellError> {
        match &mut self.kind {
            Kind::Nullable(inner) => {
                self.data.push(0);
                inner.push_int(value)
            }
            Kind::Leaf(Leaf::Int { width, min, max }) => {
                let value = i128::from(value);
                if value < *min || value > *max {
                    return Err(int_out_of_range(&self.ty, *min, *max));
                }
                put_int(&mut self.data, *width, value);
                Ok(())
            }
            _ => Err(CellError::new(code::WRONG_TYPE, format!("metadata does not fit {}", self.ty))),
        }
    }

    /// A record key or topic name; the bytes need not be UTF-8. No key is NULL where there is one, else empty.
    pub(crate) fn push_bytes(&mut self, bytes: Option<&[u8]>) -> Result<(), CellError> {
        match &mut self.kind {
            Kind::Nullable(inner) => {
                self.data.push(u8::from(bytes.is_none()));
                inner.push_bytes(bytes)
            }
            Kind::Leaf(Leaf::Text) => {
                put_text(&mut self.data, bytes.unwrap_or_default());
                Ok(())
            }
            _ => Err(CellError::new(code::WRONG_TYPE, format!("metadata does not fit {}", self.ty))),
        }
    }

    /// A record timestamp, cut to the column's precision. -1, Kafka's "no timestamp", is NULL where there is
    /// one, else 1970-01-01.
    pub(crate) fn push_timestamp_ms(&mut self, timestamp_ms: i64) -> Result<(), CellError> {
        match &mut self.kind {
            Kind::Nullable(inner) => {
                self.data.push(u8::from(timestamp_ms == -1));
                inner.push_timestamp_ms(timestamp_ms)
            }
            Kind::Leaf(leaf @ (Leaf::DateTime { .. } | Leaf::DateTime64 { .. })) => {
                let ms = i128::from(if timestamp_ms == -1 { 0 } else { timestamp_ms });
                let precision = match leaf {
                    Leaf::DateTime64 { precision, .. } => *precision,
                    _ => 0,
                };
                let ticks = if precision >= 3 {
                    ms * 10i128.pow(u32::from(precision) - 3)
                } else {
                    ms.div_euclid(10i128.pow(3 - u32::from(precision)))
                };
                put_ticks(leaf, &mut self.data, &self.ty, ticks)
            }
            _ => Err(CellError::new(code::WRONG_TYPE, format!("metadata does not fit {}", self.ty))),
        }
    }

    fn check_row_size(&self) -> Result<(), CellError> {
        if self.data.len() - self.committed > MAX_ROW_BYTES {
            return Err(CellError::new(code::ROW_TOO_LARGE, "the elements of one row exceed 64 MiB"));
        }
        Ok(())
    }

    pub(crate) fn commit(&mut self) {
        self.committed = self.data.len();
        match &mut self.kind {
            Kind::Leaf(_) => {}
            Kind::Nullable(inner) | Kind::Array { elements: inner, .. } => inner.commit(),
            Kind::Map { keys, values, .. } => {
                keys.commit();
                values.commit();
            }
        }
    }

    pub(crate) fn rollback(&mut self) {
        self.data.truncate(self.committed);
        let end = self.data.last_chunk::<8>().map_or(0, |end| u64::from_le_bytes(*end));
        match &mut self.kind {
            Kind::Leaf(_) => {}
            Kind::Nullable(inner) => inner.rollback(),
            Kind::Array { total, elements } => {
                *total = end;
                elements.rollback();
            }
            Kind::Map { total, keys, values } => {
                *total = end;
                keys.rollback();
                values.rollback();
            }
        }
    }

    pub(crate) fn clear(&mut self) {
        self.data.clear();
        self.committed = 0;
        match &mut self.kind {
            Kind::Leaf(_) => {}
            Kind::Nullable(inner) => inner.clear(),
            Kind::Array { total, elements } => {
                *total = 0;
                elements.clear();
            }
            Kind::Map { total, keys, values } => {
                *total = 0;
                keys.clear();
                values.clear();
            }
        }
    }

    pub(crate) fn bytes(&self) -> usize {
        self.data.len()
            + match &self.kind {
                Kind::Leaf(_) => 0,
                Kind::Nullable(inner) | Kind::Array { elements: inner, .. } => inner.bytes(),
                Kind::Map { keys, values, .. } => keys.bytes() + values.bytes(),
            }
    }

    pub(crate) fn write_to(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(&self.data);
        match &self.kind {
            Kind::Leaf(_) => {}
            Kind::Nullable(inner) | Kind::Array { elements: inner, .. } => inner.write_to(out),
            Kind::Map { keys, values, .. } => {
                keys.write_to(out);
                values.write_to(out);
            }
        }
    }
}

impl Leaf {
    fn min_width(&self) -> usize {
        match self {
            Leaf::Int { width, .. } | Leaf::Decimal { width, .. } | Leaf::Enum { width, .. } => *width,
            Leaf::Bool | Leaf::Text => 1,
            Leaf::Date => 2,
            Leaf::Float32 | Leaf::Date32 | Leaf::DateTime { .. } => 4,
            Leaf::Float64 | Leaf::DateTime64 { .. } => 8,
            Leaf::Uuid => 16,
            Leaf::Fixed(len) => *len,
        }
    }
}

fn enumeration(width: usize, values: impl Iterator<Item = (String, i16)>) -> Leaf {
    let mut by_name: Vec<(String, i16)> = values.collect();
    by_name.sort_unstable();
    let mut values: Vec<i16> = by_name.iter().map(|(_, value)| *value).collect();
    values.sort_unstable();
    Leaf::Enum { width, by_name, values }
}

fn is_utc(tz: Option<&str>) -> bool {
    matches!(
        tz,
        None | Some("UTC" | "Etc/UTC" | "UCT" | "Etc/UCT" | "GMT" | "Etc/GMT" | "Zulu" | "Etc/Zulu")
            | Some("Universal" | "Etc/Universal" | "Greenwich" | "Etc/Greenwich")
    )
}

fn push_leaf(
    leaf: &Leaf,
    data: &mut Vec<u8>,
    ty: &ColumnType,
    first: u8,
    raw: &str,
    rules: &Rules,
) -> Result<(), CellError> {
    match first {
        b'"' => {
            let text = string_text(raw)?;
            push_leaf_text(leaf, data, ty, &text, rules)
        }
        b'n' => Err(CellError::new(code::NULL_NOT_ALLOWED, format!("{} cannot be null", short_name(ty)))),
        _ if matches!(leaf, Leaf::Text) && rules.json_text_in_strings => {
            put_text(data, raw.as_bytes());
            Ok(())
        }
        b't' | b'f' if matches!(leaf, Leaf::Bool) => {
            data.push(u8::from(first == b't'));
            Ok(())
        }
        b'-' | b'0'..=b'9' => push_leaf_number(leaf, data, ty, raw, first, rules),
        other => Err(wrong_type(ty, other)),
    }
}

/// A number, from a JSON number or from a string; `first` tells which, for messages.
fn push_leaf_number(
    leaf: &Leaf,
    data: &mut Vec<u8>,
    ty: &ColumnType,
    text: &str,
    first: u8,
    rules: &Rules,
) -> Result<(), CellError> {
    match leaf {
        Leaf::Int { width, min, max } => {
            let value = match parse_short_integer(text) {
                Some(short) => i128::from(short),
                None => exact(text, 0, ty, first)?,
            };
            if value < *min || value > *max {
                return Err(int_out_of_range(ty, *min, *max));
            }
            put_int(data, *width, value);
        }
        Leaf::Float32 => {
            let value: f32 = text.parse().map_err(|_| wrong_type(ty, first))?;
            check_finite(value.is_infinite(), text, ty)?;
            let bits = if value.is_nan() { 0x7FC0_0000 } else { value.to_bits() };
            data.extend_from_slice(&bits.to_le_bytes());
        }
        Leaf::Float64 => {
            let value: f64 = text.parse().map_err(|_| wrong_type(ty, first))?;
            check_finite(value.is_infinite(), text, ty)?;
            // One NaN only, so that equal input gives equal bytes on every machine.
            let bits = if value.is_nan() { 0x7FF8_0000_0000_0000 } else { value.to_bits() };
            data.extend_from_slice(&bits.to_le_bytes());
        }
        Leaf::Decimal { width, limit, scale } => {
            let value = exact(text, *scale, ty, first)?;
            if value <= -limit || value >= *limit {
                return Err(CellError::new(code::OUT_OF_RANGE, format!("the number exceeds {ty}")));
            }
            put_int(data, *width, value);
        }
        Leaf::DateTime { .. } | Leaf::DateTime64 { .. } if first != b'"' => {
            let precision = match leaf {
                Leaf::DateTime64 { precision, .. } => *precision,
                _ => 0,
            };
            let (ticks, cut) = Number::parse(text)
                .and_then(|n| n.scaled_floor(precision))
                .map_err(|e| number_error(e, ty, first))?;
            check_cut(cut, ty, rules)?;
            put_ticks(leaf, data, ty, ticks)?;
        }
        Leaf::Enum { width, values, .. } if first != b'"' => {
            let value = exact(text, 0, ty, first)?;
            let declared = i16::try_from(value).is_ok_and(|v| values.binary_search(&v).is_ok());
            if !declared {
                return Err(CellError::new(
                    code::OUT_OF_RANGE,
                    format!("the number is not a value of {}", short_name(ty)),
                ));
            }
            put_int(data, *width, value);
        }
        _ => return Err(wrong_type(ty, first)),
    }
    Ok(())
}

fn push_leaf_text(
    leaf: &Leaf,
    data: &mut Vec<u8>,
    ty: &ColumnType,
    text: &str,
    rules: &Rules,
) -> Result<(), CellError> {
    match leaf {
        Leaf::Text => put_text(data, text.as_bytes()),
        Leaf::Fixed(len) => {
            let end = data.len() + len;
            if text.len() > *len {
                return Err(CellError::new(
                    code::OUT_OF_RANGE,
                    format!("the text is longer than the {len} bytes of {ty}"),
                ));
            }
            data.extend_from_slice(text.as_bytes());
            data.resize(end, 0);
        }
        Leaf::Uuid => {
            let value =
                parse_uuid(text).ok_or_else(|| CellError::new(code::WRONG_TYPE, "the text is not a UUID"))?;
            let (high, low) = ((value >> 64) as u64, value as u64);
            data.extend_from_slice(&high.to_le_bytes());
            data.extend_from_slice(&low.to_le_bytes());
        }
        Leaf::Date => {
            let days = u16::try_from(date(text)?).map_err(|_| {
                CellError::new(code::OUT_OF_RANGE, "the date is outside Date (1970-01-01 to 2149-06-06)")
            })?;
            data.extend_from_slice(&days.to_le_bytes());
        }
        Leaf::Date32 => {
            let days = date(text)?;
            if days < DATE32_DAYS.0 || days > DATE32_DAYS.1 {
                return Err(CellError::new(
                    code::OUT_OF_RANGE,
                    "the date is outside Date32 (1900-01-01 to 2299-12-31)",
                ));
            }
            data.extend_from_slice(&days.to_le_bytes());
        }
        Leaf::DateTime { utc } | Leaf::DateTime64 { utc, .. } => {
            let precision = match leaf {
                Leaf::DateTime64 { precision, .. } => *precision,
                _ => 0,
            };
            let time = parse_timestamp(text).ok_or_else(|| {
                CellError::new(
                    code::WRONG_TYPE,
                    "the text is not a timestamp (YYYY-MM-DD hh:mm:ss[.f][Z|+hh:mm])",
                )
            })?;
            if !time.has_offset && !utc {
                return Err(CellError::new(
                    code::NO_TIME_ZONE,
                    format!("timestamp text for {ty} must carry Z or an offset such as +01:00"),
                ));
            }
            let (ticks, cut) = time.ticks(precision);
            check_cut(cut, ty, rules)?;
            put_ticks(leaf, data, ty, ticks)?;
        }
        Leaf::Enum { width, by_name, .. } => {
            let value = by_name
                .binary_search_by(|(name, _)| name.as_str().cmp(text))
                .ok()
                .and_then(|at| by_name.get(at))
                .ok_or_else(|| {
                    let message = format!("the text is not a name of {}", short_name(ty));
                    CellError::new(code::OUT_OF_RANGE, message)
                })?;
            put_int(data, *width, value.1.into());
        }
        Leaf::Bool => return Err(wrong_type(ty, b'"')),
        Leaf::Int { .. } | Leaf::Float32 | Leaf::Float64 | Leaf::Decimal { .. } => {
            return push_leaf_number(leaf, data, ty, text, b'"', rules);
        }
    }
    Ok(())
}

fn exact(text: &str, scale: u8, ty: &ColumnType, first: u8) -> Result<i128, CellError> {
    Number::parse(text).and_then(|n| n.scaled(scale)).map_err(|e| number_error(e, ty, first))
}

fn number_error(error: NumberError, ty: &ColumnType, first: u8) -> CellError {
    match error {
        NumberError::Syntax => wrong_type(ty, first),
        NumberError::Fraction => CellError::new(
            code::EXCESS_FRACTION,
            format!("the number has more fraction digits than {ty} keeps"),
        ),
        NumberError::TooLong | NumberError::Range => {
            CellError::new(code::OUT_OF_RANGE, format!("the number exceeds {}", short_name(ty)))
        }
    }
}

fn check_finite(infinite: bool, text: &str, ty: &ColumnType) -> Result<(), CellError> {
    // "inf" as a string is meant; digits that overflow are not.
    if infinite && text.bytes().any(|c| c.is_ascii_digit()) {
        return Err(CellError::new(code::OUT_OF_RANGE, format!("the number exceeds {ty}")));
    }
    Ok(())
}

fn check_cut(cut: bool, ty: &ColumnType, rules: &Rules) -> Result<(), CellError> {
    if cut && !rules.truncate_time_fraction {
        return Err(CellError::new(
            code::EXCESS_FRACTION,
            format!("the timestamp has more fraction digits than {ty} keeps"),
        ));
    }
    Ok(())
}

fn date(text: &str) -> Result<i32, CellError> {
    parse_date(text).ok_or_else(|| CellError::new(code::WRONG_TYPE, "the text is not a date (YYYY-MM-DD)"))
}

fn put_ticks(leaf: &Leaf, data: &mut Vec<u8>, ty: &ColumnType, ticks: i128) -> Result<(), CellError> {
    match leaf {
        Leaf::DateTime64 { precision, .. } => {
            let seconds = ticks.div_euclid(10i128.pow(u32::from(*precision)));
            let in_range = (DATETIME64_SECONDS.0..=DATETIME64_SECONDS.1).contains(&seconds);
            match i64::try_from(ticks) {
                Ok(ticks) if in_range => {
                    data.extend_from_slice(&ticks.to_le_bytes());
                    Ok(())
                }
                _ => Err(CellError::new(
                    code::OUT_OF_RANGE,
                    format!(
                        "the time is outside {ty} (1900 to {}; numbers are seconds since 1970)",
                        if *precision == 9 { 2262 } else { 2299 }
                    ),
                )),
            }
        }
        _ => {
            let seconds = u32::try_from(ticks).map_err(|_| {
                CellError::new(
                    code::OUT_OF_RANGE,
                    format!(
                        "the time is outside {ty} (1970-01-01 to 2106-02-07; numbers are seconds since 1970)"
                    ),
                )
            })?;
            data.extend_from_slice(&seconds.to_le_bytes());
            Ok(())
        }
    }
}

fn int_out_of_range(ty: &ColumnType, min: i128, max: i128) -> CellError {
    CellError::new(code::OUT_OF_RANGE, format!("the number is outside {ty} ({min} to {max})"))
}

fn wrong_type(ty: &ColumnType, first: u8) -> CellError {
    let found = match first {
        b'"' => "a string",
        b't' | b'f' => "a bool",
        b'[' => "an array",
        b'{' => "an object",
        b'n' => "null",
        _ => "a number",
    };
    let hint = if first == b'"' { " that does not read as one" } else { "" };
    CellError::new(code::WRONG_TYPE, format!("{} expected, found {found}{hint}", short_name(ty)))
}

/// The type without an enum's values, which may fill pages.
fn short_name(ty: &ColumnType) -> String {
    match ty {
        ColumnType::Enum8(_) => "Enum8".to_owned(),
        ColumnType::Enum16(_) => "Enum16".to_owned(),
        other => other.to_string(),
    }
}

fn put_int(data: &mut Vec<u8>, width: usize, value: i128) {
    // The range was checked, so the cut bytes only repeat the sign.
    match width {
        1 => data.push(value as u8),
        2 => data.extend_from_slice(&(value as u16).to_le_bytes()),
        4 => data.extend_from_slice(&(value as u32).to_le_bytes()),
        8 => data.extend_from_slice(&(value as u64).to_le_bytes()),
        _ => data.extend_from_slice(&value.to_le_bytes()),
    }
}

pub(crate) fn put_varint(data: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        data.push(value as u8 | 0x80);
        value >>= 7;
    }
    data.push(value as u8);
}

pub(crate) fn put_text(data: &mut Vec<u8>, bytes: &[u8]) {
    put_varint(data, bytes.len() as u64);
    data.extend_from_slice(bytes);
}

/// 32 hexadecimal digits, with the four hyphens at their places or without any.
fn parse_uuid(text: &str) -> Option<u128> {
    let bytes = text.as_bytes();
    if bytes.len() != 36 && bytes.len() != 32 {
        return None;
    }
    let mut value: u128 = 0;
    for (at, c) in bytes.iter().enumerate() {
        if bytes.len() == 36 && matches!(at, 8 | 13 | 18 | 23) {
            if *c != b'-' {
                return None;
            }
            continue;
        }
        value = value << 4 | u128::from(char::from(*c).to_digit(16)?);
    }
    Some(value)
}
