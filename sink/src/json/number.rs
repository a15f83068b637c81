//! Number text, read exactly: no step goes through a float unless the column is one.
//!
//! Owns the grammar `-?digits(.digits)?([eE][+-]?digits)?` for JSON numbers and for numbers given as strings
//! (where leading zeros are allowed). Pure, any thread. It does not know columns.

/// `mantissa * 10^exponent`; the mantissa has no trailing zero, and zero is `0 * 10^0`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Number {
    negative: bool,
    mantissa: u128,
    exponent: i64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum NumberError {
    /// Not a number at all.
    Syntax,
    /// More significant digits than 128 bits hold: fits no column type exactly.
    TooLong,
    /// Digits below the wanted scale.
    Fraction,
    /// Too large for 128 bits at the wanted scale.
    Range,
}

/// Exponents beyond this say the same: nothing fits. Keeps the sums far from overflow.
const EXPONENT_LIMIT: i64 = 1 << 40;

fn power_of_ten(exponent: u64) -> Option<u128> {
    u32::try_from(exponent).ok().and_then(|e| 10u128.checked_pow(e))
}

/// The fast path: an integer of at most 18 digits and nothing else.
pub(crate) fn parse_short_integer(text: &str) -> Option<i64> {
    let (negative, digits) = match text.as_bytes() {
        [b'-', rest @ ..] => (true, rest),
        all => (false, all),
    };
    if digits.is_empty() || digits.len() > 18 {
        return None;
    }
    let mut value: i64 = 0;
    for c in digits {
        let digit = c.wrapping_sub(b'0');
        if digit > 9 {
            return None;
        }
        value = value * 10 + i64::from(digit);
    }
    Some(if negative { -value } else { value })
}

/// The fast path: digits with a point between them, at most 17 in all, times `10^scale`; none if that is not exact.
pub(crate) fn parse_short_decimal(text: &str, scale: u8) -> Option<i64> {
    let (negative, digits) = match text.as_bytes() {
        [b'-', rest @ ..] => (true, rest),
        all => (false, all),
    };
    if digits.len() > 18 {
        return None;
    }
    let point = digits.iter().position(|c| *c == b'.');
    let (whole, fraction) = match point {
        Some(at) => (digits.get(..at)?, digits.get(at + 1..)?),
        None => (digits, &[][..]),
    };
    // "5." and ".5" are not numbers.
    if whole.is_empty() || (point.is_some() && fraction.is_empty()) || fraction.len() > usize::from(scale) {
        return None;
    }
    let mut value: i64 = 0;
    for c in whole.iter().chain(fraction) {
        let digit = c.wrapping_sub(b'0');
        if digit > 9 {
            return None;
        }
        value = value * 10 + i64::from(digit);
    }
    let missing = u32::from(scale) - u32::try_from(fraction.len()).ok()?;
    let value = value.checked_mul(10i64.checked_pow(missing)?)?;
    Some(if negative { -value } else { value })
}

impl Number {
    pub(crate) fn parse(text: &str) -> Result<Number, NumberError> {
        let bytes = text.as_bytes();
        let mut at = 0;
        let negative = bytes.first() == Some(&b'-');
        if negative {
            at += 1;
        }
        let mut mantissa: u128 = 0;
        // Zeros seen since the last other digit: written into the mantissa only if another digit follows.
        let mut zeros: u64 = 0;
        let mut fraction_digits: i64 = 0;
        let mut digits_in_part = 0usize;
        let mut in_fraction = false;
        while let Some(c) = bytes.get(at) {
            match c {
                b'0'..=b'9' => {
                    digits_in_part += 1;
                    if in_fraction {
                        fraction_digits += 1;
                    }
                    if *c == b'0' {
                        zeros += u64::from(mantissa != 0);
                    } else {
                        mantissa = if mantissa == 0 {
                            0
                        } else {
                            power_of_ten(zeros + 1)
                                .and_then(|p| mantissa.checked_mul(p))
                                .ok_or(NumberError::TooLong)?
                        };
                        mantissa = mantissa.checked_add(u128::from(c - b'0')).ok_or(NumberError::TooLong)?;
                        zeros = 0;
                    }
                }
                b'.' if !in_fraction && digits_in_part > 0 => {
                    in_fraction = true;
                    digits_in_part = 0;
                }
                _ => break,
            }
            at += 1;
        }
        if digits_in_part == 0 {
            return Err(NumberError::Syntax);
        }
        let mut exponent: i64 = 0;
        if matches!(bytes.get(at), Some(b'e' | b'E')) {
            at += 1;
            let down = bytes.get(at) == Some(&b'-');
            if matches!(bytes.get(at), Some(b'-' | b'+')) {
                at += 1;
            }
            let start = at;
            while let Some(c @ b'0'..=b'9') = bytes.get(at) {
                exponent = (exponent * 10 + i64::from(c - b'0')).min(EXPONENT_LIMIT);
                at += 1;
            }
            if at == start {
                return Err(NumberError::Syntax);
            }
            if down {
                exponent = -exponent;
            }
        }
        if at != bytes.len() {
            return Err(NumberError::Syntax);
        }
        if mantissa == 0 {
            return Ok(Number { negative: false, mantissa: 0, exponent: 0 });
        }
        let exponent = exponent - fraction_digits + i64::try_from(zeros).unwrap_or(EXPONENT_LIMIT);
        Ok(Number { negative, mantissa, exponent })
    }

    /// The value times `10^by`.
    pub(crate) fn shifted(&self, by: i64) -> Number {
        match self.mantissa {
            0 => *self,
            _ => Number { exponent: self.exponent + by, ..*self },
        }
    }

    /// The value times `10^scale`, exactly.
    pub(crate) fn scaled(&self, scale: u8) -> Result<i128, NumberError> {
        if self.mantissa == 0 {
            return Ok(0);
        }
        let shift = u64::try_from(self.exponent + i64::from(scale)).map_err(|_| NumberError::Fraction)?;
        let magnitude =
            power_of_ten(shift).and_then(|p| self.mantissa.checked_mul(p)).ok_or(NumberError::Range)?;
        self.signed(magnitude)
    }

    /// The value times `10^scale`, cut towards minus infinity; the flag says whether anything was cut.
    pub(crate) fn scaled_floor(&self, scale: u8) -> Result<(i128, bool), NumberError> {
        match self.scaled(scale) {
            Ok(value) => Ok((value, false)),
            Err(NumberError::Fraction) => {
                let down = u64::try_from(-(self.exponent + i64::from(scale))).unwrap_or(u64::MAX);
                let whole = power_of_ten(down).map_or(0, |p| self.mantissa / p);
                // Something is always cut here: the mantissa has no trailing zero.
                let whole = self.signed(whole)?;
                Ok((if self.negative { whole - 1 } else { whole }, true))
            }
            Err(other) => Err(other),
        }
    }

    fn signed(&self, magnitude: u128) -> Result<i128, NumberError> {
        let value = i128::try_from(magnitude).map_err(|_| NumberError::Range)?;
        Ok(if self.negative { -value } else { value })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn scaled(text: &str, scale: u8) -> Result<i128, NumberError> {
        Number::parse(text).and_then(|n| n.scaled(scale))
    }

    #[test]
    fn exact_where_floats_are_not() {
        assert_eq!(scaled("12.10", 2), Ok(1210));
        assert_eq!(scaled("0.1", 1), Ok(1));
        assert_eq!(scaled("9007199254740993.0", 0), Ok(9_007_199_254_740_993));
        assert_eq!(scaled("18446744073709551616", 0), Ok(18_446_744_073_709_551_616));
        assert_eq!(scaled("1e3", 0), Ok(1000));
        assert_eq!(scaled("1.5E+1", 0), Ok(15));
        assert_eq!(scaled("1500e-3", 1), Ok(15));
        assert_eq!(scaled("-0", 0), Ok(0));
        assert_eq!(scaled("-0.0e99999999999999999999", 0), Ok(0));
        assert_eq!(scaled("99999999999999999999999999999999999999", 0), Ok(10i128.pow(38) - 1));
        assert_eq!(scaled(&format!("1.{}", "0".repeat(500)), 0), Ok(1));
        assert_eq!(scaled(&format!("{}7", "0".repeat(500)), 0), Ok(7));
    }

    #[test]
    fn refuses_what_does_not_fit() {
        assert_eq!(scaled("12.101", 2), Err(NumberError::Fraction));
        assert_eq!(scaled("1e-1", 0), Err(NumberError::Fraction));
        assert_eq!(scaled("1e39", 0), Err(NumberError::Range));
        assert_eq!(scaled("1e999999999999999999999", 0), Err(NumberError::Range));
        assert_eq!(scaled("1e-999999999999999999999", 38), Err(NumberError::Fraction));
        assert_eq!(scaled(&"9".repeat(40), 0), Err(NumberError::TooLong));
        assert_eq!(scaled(&format!("1{}1", "0".repeat(500)), 0), Err(NumberError::TooLong));
        for text in ["", "-", "+1", ".5", "5.", "1e", "1e+", "1.2.3", " 1", "1 ", "0x1", "--1", "1_0", "NaN"]
        {
            assert_eq!(scaled(text, 0), Err(NumberError::Syntax), "{text}");
        }
    }

    #[test]
    fn floors_towards_the_past() {
        let floor = |text: &str, scale| Number::parse(text).unwrap().scaled_floor(scale).unwrap();
        assert_eq!(floor("1.9999", 3), (1999, true));
        assert_eq!(floor("-1.9999", 3), (-2000, true));
        assert_eq!(floor("-1e-300", 3), (-1, true));
        assert_eq!(floor("1e-300", 3), (0, true));
        assert_eq!(floor("1.5", 3), (1500, false));
    }

    proptest! {
        #[test]
        fn short_integers_agree(value in any::<i64>()) {
            let text = value.to_string();
            if let Some(short) = parse_short_integer(&text) {
                prop_assert_eq!(short, value);
            }
            prop_assert_eq!(scaled(&text, 0), Ok(i128::from(value)));
        }

        #[test]
        fn decimals_agree(value in any::<i64>(), scale in 0u8..=18) {
            let digits = format!("{:0>20}", value.unsigned_abs());
            let (whole, fraction) = digits.split_at(20 - usize::from(scale));
            let sign = if value < 0 { "-" } else { "" };
            let text = if scale == 0 { format!("{sign}{whole}") } else { format!("{sign}{whole}.{fraction}") };
            prop_assert_eq!(scaled(&text, scale), Ok(i128::from(value)));
        }

        #[test]
        fn short_decimals_agree(text in "-?[0-9]{0,9}\\.?[0-9]{0,9}(e1)?", scale in 0u8..=38) {
            if let Some(short) = parse_short_decimal(&text, scale) {
                prop_assert_eq!(scaled(&text, scale), Ok(i128::from(short)));
            } else if text.len() < 12 && scale < 6 && !text.contains('e') {
                // What it leaves to the slow path is no number, or not exact at this scale, or has too fine zeros.
                let fraction = text.split_once('.').map_or("", |(_, f)| f);
                prop_assert!(scaled(&text, scale).is_err() || fraction.len() > usize::from(scale), "{}", text);
            }
        }

        #[test]
        fn no_text_panics(text in "[-+0-9.eE]{0,50}") {
            if let Ok(n) = Number::parse(&text) {
                let _ = (n.scaled(38), n.scaled_floor(9));
            }
        }
    }
}
