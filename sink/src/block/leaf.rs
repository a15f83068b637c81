//! Scalars: the decoding of one JSON value into a column's bytes.
//!
//! Owns the byte layout of every scalar type and the exact checks of ranges, nulls and fractions, because the
//! server's own casts are silent. Pure, any thread. Invariant: what a call pushed before it failed, the node
//! rolls back. It does not know nesting (`node`).
//!
//! Layout: numbers are little-endian; a string is a varint length and bytes; a UUID is two u64, high half first.

use crate::column_type::ColumnType;
use crate::json::number::{Number, NumberError, parse_short_decimal, parse_short_integer};
use crate::json::scan::Value;
use crate::json::time::{parse_date, parse_timestamp};
use crate::json::{code, string_text};
use crate::mapping::TimeUnit;

const NUMBERS: &str = "what whole numbers count is flumen.clickhouse.time.unit";
/// 1900-01-01 and 2299-12-31: the days that Date32 and DateTime64 hold.
const DATE32_DAYS: (i32, i32) = (-25_567, 120_529);
const DATETIME64_SECONDS: (i128, i128) = (-25_567 * 86_400, 120_530 * 86_400 - 1);

/// The parts of `MappingOptions` that decide how a value is read.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Rules {
    pub(crate) json_text_in_strings: bool,
    pub(crate) truncate_time_fraction: bool,
    pub(crate) time_unit: TimeUnit,
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
pub(super) enum Leaf {
    Int {
        width: usize,
        min: i128,
        max: i128,
        /// The same limits, for values of 64 bits.
        short: (i64, i64),
    },
    Float32,
    Float64,
    Bool,
    Text,
    Fixed(usize),
    Uuid,
    Date,
    Date32,
    DateTime {
        utc: bool,
    },
    DateTime64 {
        precision: u8,
        utc: bool,
        /// Ticks that the type holds.
        range: (i64, i64),
    },
    Decimal {
        width: usize,
        limit: i128,
        scale: u8,
    },
    Enum {
        width: usize,
        by_name: Vec<(String, i16)>,
        values: Vec<i16>,
    },
}

impl Leaf {
    /// `ty` is a scalar: the parser lets nothing else stand inside Nullable, and `Node` takes the rest.
    pub(super) fn new(ty: &ColumnType) -> Leaf {
        match ty {
            ColumnType::Float32 => Leaf::Float32,
            ColumnType::Float64 => Leaf::Float64,
            ColumnType::Bool => Leaf::Bool,
            ColumnType::FixedString(len) => Leaf::Fixed(*len),
            ColumnType::Uuid => Leaf::Uuid,
            ColumnType::Date => Leaf::Date,
            ColumnType::Date32 => Leaf::Date32,
            ColumnType::DateTime { tz } => Leaf::DateTime { utc: is_utc(tz.as_deref()) },
            ColumnType::DateTime64 { precision, tz } => Leaf::DateTime64 {
                precision: *precision,
                utc: is_utc(tz.as_deref()),
                range: datetime64_range(*precision),
            },
            ColumnType::Decimal { precision, scale } => Leaf::Decimal {
                width: match precision {
                    0..=9 => 4,
                    10..=18 => 8,
                    _ => 16,
                },
                limit: 10i128.pow(u32::from(*precision).min(38)),
                scale: *scale,
            },
            ColumnType::Enum8(values) => {
                enumeration(1, values.iter().map(|(n, v)| (n.clone(), i16::from(*v))))
            }
            ColumnType::Enum16(values) => enumeration(2, values.iter().cloned()),
            ColumnType::Int8 | ColumnType::UInt8 => integer(ty, 1),
            ColumnType::Int16 | ColumnType::UInt16 => integer(ty, 2),
            ColumnType::Int32 | ColumnType::UInt32 => integer(ty, 4),
            ColumnType::Int64 | ColumnType::UInt64 => integer(ty, 8),
            ColumnType::String
            | ColumnType::LowCardinality(_)
            | ColumnType::Nullable(_)
            | ColumnType::Array(_)
            | ColumnType::Map(_, _) => Leaf::Text,
        }
    }

    /// The value that stands under a NULL; the server ignores it, but an enum's must be a declared one.
    pub(super) fn push_placeholder(&self, data: &mut Vec<u8>) {
        match self {
            Leaf::Enum { width, values, .. } => {
                put_int(data, *width, values.first().copied().unwrap_or(0).into());
            }
            other => data.resize(data.len() + other.width(), 0),
        }
    }

    /// Bytes per value; of an empty one for text.
    fn width(&self) -> usize {
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

    pub(super) fn push_value(
        &self,
        data: &mut Vec<u8>,
        ty: &ColumnType,
        value: Value<'_>,
        rules: &Rules,
    ) -> Result<(), CellError> {
        let raw = match value {
            Value::Str { quoted, escaped } => {
                let text = string_text(quoted, escaped)?;
                return self.push_text(data, ty, &text, rules);
            }
            Value::Raw(raw) => raw,
        };
        let first = value.first_byte();
        match first {
            b'n' => Err(CellError::new(code::NULL_NOT_ALLOWED, format!("{} cannot be null", short_name(ty)))),
            _ if matches!(self, Leaf::Text) && rules.json_text_in_strings => {
                put_text(data, raw.as_bytes());
                Ok(())
            }
            b't' | b'f' if matches!(self, Leaf::Bool) => {
                data.push(u8::from(first == b't'));
                Ok(())
            }
            b'-' | b'0'..=b'9' => self.push_number(data, ty, raw, first, rules),
            other => Err(wrong_type(ty, other)),
        }
    }

    /// A number, from a JSON number or from a string; `first` tells which, for messages.
    fn push_number(
        &self,
        data: &mut Vec<u8>,
        ty: &ColumnType,
        text: &str,
        first: u8,
        rules: &Rules,
    ) -> Result<(), CellError> {
        match self {
            Leaf::Int { width, min, max, short } => match parse_short_integer(text) {
                Some(value) if (short.0..=short.1).contains(&value) => put_short(data, *width, value),
                Some(_) => return Err(int_out_of_range(ty, *min, *max)),
                None => {
                    let value = exact(text, 0, ty, first)?;
                    if value < *min || value > *max {
                        return Err(int_out_of_range(ty, *min, *max));
                    }
                    put_int(data, *width, value);
                }
            },
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
                let value = match parse_short_decimal(text, *scale) {
                    Some(short) => i128::from(short),
                    None => exact(text, *scale, ty, first)?,
                };
                if value <= -limit || value >= *limit {
                    return Err(CellError::new(code::OUT_OF_RANGE, format!("the number exceeds {ty}")));
                }
                put_int(data, *width, value);
            }
            Leaf::DateTime { .. } | Leaf::DateTime64 { .. } if first != b'"' => {
                let precision = match self {
                    Leaf::DateTime64 { precision, .. } => *precision,
                    _ => 0,
                };
                let (ticks, cut) = match parse_short_integer(text) {
                    Some(value) => to_ticks(value, rules.time_unit.digits(value), precision),
                    None => {
                        let number = Number::parse(text).map_err(|e| number_error(e, ty, first))?;
                        // A whole number of nineteen digits or more; "1.5e3" is not one, whatever its value.
                        let whole = text.bytes().all(|c| c == b'-' || c.is_ascii_digit());
                        let digits = if whole { rules.time_unit.digits(i64::MAX) } else { 0 };
                        let shifted = number.shifted(-i64::from(digits));
                        shifted.scaled_floor(precision).map_err(|e| number_error(e, ty, first))?
                    }
                };
                check_cut(cut, ty, rules)?;
                put_ticks(self, data, ty, ticks)?;
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

    pub(super) fn push_text(
        &self,
        data: &mut Vec<u8>,
        ty: &ColumnType,
        text: &str,
        rules: &Rules,
    ) -> Result<(), CellError> {
        match self {
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
                let value = parse_uuid(text)
                    .ok_or_else(|| CellError::new(code::WRONG_TYPE, "the text is not a UUID"))?;
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
                let precision = match self {
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
                put_ticks(self, data, ty, ticks)?;
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
                return self.push_number(data, ty, text, b'"', rules);
            }
        }
        Ok(())
    }
}

fn integer(ty: &ColumnType, width: usize) -> Leaf {
    let (min, max) = ty.int_range().unwrap_or((0, 0));
    Leaf::Int { width, min, max, short: (clamped(min), clamped(max)) }
}

fn clamped(value: i128) -> i64 {
    value.clamp(i64::MIN.into(), i64::MAX.into()) as i64
}

fn datetime64_range(precision: u8) -> (i64, i64) {
    let second = 10i128.pow(u32::from(precision));
    let (first, last) = DATETIME64_SECONDS;
    (clamped(first * second), clamped((last + 1) * second - 1))
}

fn enumeration(width: usize, values: impl Iterator<Item = (String, i16)>) -> Leaf {
    let mut by_name: Vec<(String, i16)> = values.collect();
    by_name.sort_unstable();
    let mut values: Vec<i16> = by_name.iter().map(|(_, value)| *value).collect();
    values.sort_unstable();
    Leaf::Enum { width, by_name, values }
}

/// `value` counts `10^-digits` seconds; the ticks of `10^-precision` seconds, cut towards the past.
fn to_ticks(value: i64, digits: u8, precision: u8) -> (i128, bool) {
    let value = i128::from(value);
    match precision.checked_sub(digits) {
        Some(finer) => (value * 10i128.pow(u32::from(finer)), false),
        None => {
            let coarser = 10i128.pow(u32::from(digits - precision));
            (value.div_euclid(coarser), value.rem_euclid(coarser) != 0)
        }
    }
}

fn is_utc(tz: Option<&str>) -> bool {
    matches!(
        tz,
        None | Some("UTC" | "Etc/UTC" | "UCT" | "Etc/UCT" | "GMT" | "Etc/GMT" | "Zulu" | "Etc/Zulu")
            | Some("Universal" | "Etc/Universal" | "Greenwich" | "Etc/Greenwich")
    )
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

pub(super) fn put_ticks(
    leaf: &Leaf,
    data: &mut Vec<u8>,
    ty: &ColumnType,
    ticks: i128,
) -> Result<(), CellError> {
    match leaf {
        Leaf::DateTime64 { precision, range, .. } => match i64::try_from(ticks) {
            Ok(ticks) if (range.0..=range.1).contains(&ticks) => {
                data.extend_from_slice(&ticks.to_le_bytes());
                Ok(())
            }
            _ => Err(CellError::new(
                code::OUT_OF_RANGE,
                format!(
                    "the time is outside {ty} (1900 to {}; {NUMBERS})",
                    if *precision == 9 { 2262 } else { 2299 }
                ),
            )),
        },
        _ => {
            let seconds = u32::try_from(ticks).map_err(|_| {
                CellError::new(
                    code::OUT_OF_RANGE,
                    format!("the time is outside {ty} (1970-01-01 to 2106-02-07; {NUMBERS})"),
                )
            })?;
            data.extend_from_slice(&seconds.to_le_bytes());
            Ok(())
        }
    }
}

pub(super) fn int_out_of_range(ty: &ColumnType, min: i128, max: i128) -> CellError {
    CellError::new(code::OUT_OF_RANGE, format!("the number is outside {ty} ({min} to {max})"))
}

pub(super) fn wrong_type(ty: &ColumnType, first: u8) -> CellError {
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

pub(super) fn put_int(data: &mut Vec<u8>, width: usize, value: i128) {
    // The range was checked, so the cut bytes only repeat the sign.
    match width {
        1 => data.push(value as u8),
        2 => data.extend_from_slice(&(value as u16).to_le_bytes()),
        4 => data.extend_from_slice(&(value as u32).to_le_bytes()),
        8 => data.extend_from_slice(&(value as u64).to_le_bytes()),
        _ => data.extend_from_slice(&value.to_le_bytes()),
    }
}

fn put_short(data: &mut Vec<u8>, width: usize, value: i64) {
    // As above.
    match width {
        1 => data.push(value as u8),
        2 => data.extend_from_slice(&(value as u16).to_le_bytes()),
        4 => data.extend_from_slice(&(value as u32).to_le_bytes()),
        _ => data.extend_from_slice(&value.to_le_bytes()),
    }
}

pub(super) fn put_varint(data: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        data.push(value as u8 | 0x80);
        value >>= 7;
    }
    data.push(value as u8);
}

pub(super) fn put_text(data: &mut Vec<u8>, bytes: &[u8]) {
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
