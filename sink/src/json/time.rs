//! Dates and timestamps from text, to days and ticks.
//!
//! Owns `YYYY-MM-DD` and `YYYY-MM-DD[ T]hh:mm[:ss[.fraction]][Z|±hh[[:]mm]]`, in the proleptic Gregorian
//! calendar. Pure, any thread; no clock and no time zone database: text is UTC unless it carries an offset, and
//! a column in another named zone refuses text without one (`block/`). No leap seconds (second 60 is refused),
//! no 24:00. It does not know columns or their ranges.

/// Nanoseconds are the finest tick of any column; further digits only matter for "was something cut".
const MAX_FRACTION_DIGITS: usize = 9;

const POWERS_OF_TEN: [u32; 10] =
    [1, 10, 100, 1000, 10_000, 100_000, 1_000_000, 10_000_000, 100_000_000, 1_000_000_000];

/// A point in time as it was written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Timestamp {
    /// Seconds since 1970-01-01 00:00:00 UTC, or of the local clock when `has_offset` is false.
    pub(crate) seconds: i64,
    pub(crate) nanos: u32,
    /// Fraction digits as written, at most 9.
    pub(crate) fraction_digits: u8,
    /// Digits other than zero followed the ninth.
    pub(crate) finer_than_nanos: bool,
    pub(crate) has_offset: bool,
}

/// Days from 1970-01-01 to a date that exists.
pub(crate) fn days_of(year: i32, month: u32, day: u32) -> Option<i32> {
    let leap = (year % 4 == 0 && year % 100 != 0) || year % 400 == 0;
    let month_days = match month {
        1 | 3 | 5 | 7 | 8 | 10 | 12 => 31,
        4 | 6 | 9 | 11 => 30,
        2 => 28 + u32::from(leap),
        _ => return None,
    };
    if !(0..=9999).contains(&year) || day < 1 || day > month_days {
        return None;
    }
    // Count years from March, so that the leap day is the last of its year.
    let (year, month) = if month > 2 { (year, month - 3) } else { (year - 1, month + 9) };
    let before_year = year * 365 + year.div_euclid(4) - year.div_euclid(100) + year.div_euclid(400);
    let before_month = (153 * month as i32 + 2) / 5;
    // 0000-03-01 lies 719468 days before 1970-01-01.
    Some(before_year + before_month + day as i32 - 1 - 719_468)
}

/// `YYYY-MM-DD`, to days.
pub(crate) fn parse_date(text: &str) -> Option<i32> {
    let mut cursor = Cursor { text: text.as_bytes(), at: 0 };
    let days = cursor.date()?;
    cursor.finished().then_some(days)
}

pub(crate) fn parse_timestamp(text: &str) -> Option<Timestamp> {
    let mut cursor = Cursor { text: text.as_bytes(), at: 0 };
    let days = cursor.date()?;
    if !(cursor.take(b' ') || cursor.take(b'T') || cursor.take(b't')) {
        return None;
    }
    let hour = cursor.digits(2)?;
    cursor.expect(b':')?;
    let minute = cursor.digits(2)?;
    let mut second = 0;
    let mut nanos = 0;
    let mut fraction_digits = 0u8;
    let mut finer_than_nanos = false;
    if cursor.take(b':') {
        second = cursor.digits(2)?;
        if cursor.take(b'.') || cursor.take(b',') {
            let mut digits = 0;
            while let Some(digit) = cursor.digit() {
                if digits < MAX_FRACTION_DIGITS {
                    nanos = nanos * 10 + digit;
                    fraction_digits += 1;
                } else {
                    finer_than_nanos |= digit != 0;
                }
                digits += 1;
            }
            if digits == 0 {
                return None;
            }
            for _ in usize::from(fraction_digits)..MAX_FRACTION_DIGITS {
                nanos *= 10;
            }
        }
    }
    if hour > 23 || minute > 59 || second > 59 {
        return None;
    }
    let (offset, has_offset) = cursor.offset()?;
    if !cursor.finished() {
        return None;
    }
    let clock = i64::from(hour) * 3600 + i64::from(minute) * 60 + i64::from(second);
    let seconds = i64::from(days) * 86_400 + clock - offset;
    Some(Timestamp { seconds, nanos, fraction_digits, finer_than_nanos, has_offset })
}

impl Timestamp {
    /// Ticks of `10^-precision` seconds, cut towards the past; the flag says whether anything was cut.
    pub(crate) fn ticks(&self, precision: u8) -> (i128, bool) {
        let precision = usize::from(precision.min(9));
        let (per_second, drop) = (POWERS_OF_TEN[precision], POWERS_OF_TEN[9 - precision]);
        let (whole, rest) = (self.nanos / drop, self.nanos % drop);
        let ticks = i128::from(self.seconds) * i128::from(per_second) + i128::from(whole);
        (ticks, self.finer_than_nanos || rest != 0)
    }
}

struct Cursor<'a> {
    text: &'a [u8],
    at: usize,
}

impl Cursor<'_> {
    fn take(&mut self, byte: u8) -> bool {
        let found = self.text.get(self.at) == Some(&byte);
        self.at += usize::from(found);
        found
    }

    fn expect(&mut self, byte: u8) -> Option<()> {
        self.take(byte).then_some(())
    }

    fn finished(&self) -> bool {
        self.at == self.text.len()
    }

    fn digit(&mut self) -> Option<u32> {
        let digit = self.text.get(self.at)?.wrapping_sub(b'0');
        if digit > 9 {
            return None;
        }
        self.at += 1;
        Some(u32::from(digit))
    }

    fn digits(&mut self, count: usize) -> Option<u32> {
        let mut value = 0;
        for _ in 0..count {
            value = value * 10 + self.digit()?;
        }
        Some(value)
    }

    fn date(&mut self) -> Option<i32> {
        let year = self.digits(4)?;
        self.expect(b'-')?;
        let month = self.digits(2)?;
        self.expect(b'-')?;
        let day = self.digits(2)?;
        days_of(year as i32, month, day)
    }

    /// Seconds east of UTC, and whether an offset was written at all.
    fn offset(&mut self) -> Option<(i64, bool)> {
        if self.take(b'Z') || self.take(b'z') {
            return Some((0, true));
        }
        let west = self.take(b'-');
        if !west && !self.take(b'+') {
            return Some((0, false));
        }
        let hours = self.digits(2)?;
        let minutes = if self.take(b':') || !self.finished() { self.digits(2)? } else { 0 };
        if hours > 18 || minutes > 59 {
            return None;
        }
        let seconds = i64::from(hours) * 3600 + i64::from(minutes) * 60;
        Some((if west { -seconds } else { seconds }, true))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn days() {
        assert_eq!(parse_date("1970-01-01"), Some(0));
        assert_eq!(parse_date("1969-12-31"), Some(-1));
        assert_eq!(parse_date("2000-02-29"), Some(11_016));
        assert_eq!(parse_date("2149-06-06"), Some(65_535));
        assert_eq!(parse_date("1900-01-01"), Some(-25_567));
        assert_eq!(parse_date("2299-12-31"), Some(120_529));
        for text in
            ["1900-02-29", "2023-02-29", "2023-13-01", "2023-00-01", "2023-01-00", "2023-1-1", "", "x"]
        {
            assert_eq!(parse_date(text), None, "{text}");
        }
        // Every date follows the one before it.
        let mut expected = days_of(1, 1, 1).unwrap();
        for year in 1..=2400 {
            for month in 1..=12 {
                for day in 1..=31 {
                    if let Some(days) = days_of(year, month, day) {
                        assert_eq!(days, expected);
                        expected += 1;
                    }
                }
            }
        }
    }

    #[test]
    fn timestamps() {
        let ticks = |text: &str, precision| parse_timestamp(text).map(|t| t.ticks(precision));
        assert_eq!(ticks("1970-01-01 00:00:00", 0), Some((0, false)));
        assert_eq!(ticks("2023-11-14T22:13:20Z", 0), Some((1_700_000_000, false)));
        assert_eq!(ticks("2023-11-14T22:13:20.5+00:00", 3), Some((1_700_000_000_500, false)));
        assert_eq!(ticks("2023-11-15 00:13:20.123456+0200", 3), Some((1_700_000_000_123, true)));
        assert_eq!(ticks("2023-11-14 14:13:20-08", 0), Some((1_700_000_000, false)));
        assert_eq!(ticks("2023-11-14T22:13", 0), Some((1_699_999_980, false)));
        assert_eq!(ticks("1969-12-31T23:59:59.999Z", 0), Some((-1, true)));
        assert_eq!(ticks("1969-12-31T23:59:59.999Z", 3), Some((-1, false)));
        assert_eq!(ticks("1970-01-01 00:00:00.1234567890", 9), Some((123_456_789, false)));
        assert_eq!(ticks("1970-01-01 00:00:00.1234567891", 9), Some((123_456_789, true)));
        for text in [
            "2023-11-14",
            "2023-11-14T",
            "2023-11-14T22",
            "2023-11-14T24:00:00",
            "2023-11-14T23:60:00",
            "2023-11-14T23:59:60",
            "2023-11-14T23:59:59.",
            "2023-11-14T23:59:59 Z",
            "2023-11-14T23:59:59+25:00",
            "2023-11-14T23:59:59+1",
            "2023-11-14T23:59:59Zx",
            "2023-11-14X23:59:59",
            "1700000000",
        ] {
            assert_eq!(ticks(text, 3), None, "{text}");
        }
        assert!(!parse_timestamp("2023-11-14 22:13:20").unwrap().has_offset);
        assert!(parse_timestamp("2023-11-14 22:13:20+00").unwrap().has_offset);
    }

    proptest! {
        #[test]
        fn no_text_panics(text in "[-+:.TZ 0-9]{0,40}") {
            let _ = (parse_timestamp(&text), parse_date(&text));
        }
    }
}
