//! A JSON body of which every field must be known and in range.

use std::fmt;
use std::ops::RangeInclusive;

use axum::http::StatusCode;
use serde::de::{Deserialize, Deserializer, Error as _, MapAccess, Visitor};
use serde_json::{Map, Value};

use super::error::{ApiError, ApiResult};

/// A body's fields; each is taken out as it is read, and what is left is refused.
#[derive(Debug)]
pub(crate) struct Fields(Map<String, Value>);

/// An object in which no name stands twice.
struct Unique(Map<String, Value>);

impl<'de> Deserialize<'de> for Unique {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Object;
        impl<'de> Visitor<'de> for Object {
            type Value = Unique;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a JSON object")
            }
            fn visit_map<A: MapAccess<'de>>(self, mut access: A) -> Result<Unique, A::Error> {
                let mut map = Map::new();
                while let Some((name, value)) = access.next_entry::<String, Value>()? {
                    if map.contains_key(&name) {
                        return Err(A::Error::custom(format!("the field `{name}` stands twice")));
                    }
                    map.insert(name, value);
                }
                Ok(Unique(map))
            }
        }
        deserializer.deserialize_map(Object)
    }
}

impl Fields {
    /// Reads a body.
    pub(crate) fn parse(bytes: &[u8]) -> ApiResult<Self> {
        let bad = |text: String| ApiError::new(StatusCode::BAD_REQUEST, "invalid_json", text);
        if bytes.is_empty() {
            return Err(bad("the body is empty; expected a JSON object".into()));
        }
        let Unique(map) =
            serde_json::from_slice(bytes).map_err(|e| bad(format!("the body is no valid request: {e}")))?;
        Ok(Self(map))
    }

    /// The fields of an object inside another body.
    pub(crate) fn of(map: Map<String, Value>) -> Self {
        Self(map)
    }

    /// The value of the one of `names` that is there, and that name. Null is a value only for [`Fields::take`]'s
    /// callers that say so; the typed readers take it for absent.
    pub(crate) fn take<'n>(&mut self, names: &[&'n str]) -> ApiResult<Option<(&'n str, Value)>> {
        let mut found = None;
        for name in names {
            if let Some(value) = self.0.shift_remove(*name) {
                if let Some((other, _)) = found {
                    return Err(ApiError::field(
                        name,
                        format!("it means the same as `{other}`: give one of them"),
                    ));
                }
                found = Some((*name, value));
            }
        }
        Ok(found)
    }

    fn present<'n>(&mut self, names: &[&'n str]) -> ApiResult<Option<(&'n str, Value)>> {
        Ok(self.take(names)?.filter(|(_, value)| !value.is_null()))
    }

    /// A whole number.
    pub(crate) fn whole(&mut self, names: &[&str], range: RangeInclusive<u64>) -> ApiResult<Option<u64>> {
        let Some((name, value)) = self.present(names)? else { return Ok(None) };
        let (least, most) = (range.start(), range.end());
        let expected = format!("expected a whole number from {least} to {most}, got {}", shown(&value));
        match whole(&value).and_then(|n| u64::try_from(n).ok()) {
            Some(n) if range.contains(&n) => Ok(Some(n)),
            _ => Err(ApiError::field(name, expected)),
        }
    }

    /// A number.
    pub(crate) fn number(&mut self, names: &[&str], range: RangeInclusive<f64>) -> ApiResult<Option<f64>> {
        let Some((name, value)) = self.present(names)? else { return Ok(None) };
        let (least, most) = (range.start(), range.end());
        let expected = format!("expected a number from {least} to {most}, got {}", shown(&value));
        match value.as_f64() {
            Some(n) if range.contains(&n) => Ok(Some(n)),
            _ => Err(ApiError::field(name, expected)),
        }
    }

    /// A text.
    pub(crate) fn text(&mut self, names: &[&str]) -> ApiResult<Option<String>> {
        match self.present(names)? {
            None => Ok(None),
            Some((_, Value::String(text))) => Ok(Some(text)),
            Some((name, value)) => {
                Err(ApiError::field(name, format!("expected a string, got {}", shown(&value))))
            }
        }
    }

    /// One of a few texts.
    pub(crate) fn choice(&mut self, name: &str, choices: &[&str]) -> ApiResult<Option<String>> {
        let Some(text) = self.text(&[name])? else { return Ok(None) };
        if choices.contains(&text.as_str()) {
            return Ok(Some(text));
        }
        let got = shown(&Value::String(text));
        Err(ApiError::field(name, format!("expected {}, got {got}", choices.join(" or "))))
    }

    /// True or false.
    pub(crate) fn flag(&mut self, name: &str) -> ApiResult<Option<bool>> {
        match self.present(&[name])? {
            None => Ok(None),
            Some((_, Value::Bool(flag))) => Ok(Some(flag)),
            Some((name, value)) => {
                Err(ApiError::field(name, format!("expected true or false, got {}", shown(&value))))
            }
        }
    }

    /// Refuses what was not taken.
    pub(crate) fn finish(self, known: &[&str]) -> ApiResult<()> {
        let Some(name) = self.0.keys().next() else { return Ok(()) };
        let similar = known.iter().map(|k| (strsim::jaro_winkler(k, name), *k));
        let similar = similar.filter(|(s, _)| *s > 0.8).max_by(|a, b| a.0.total_cmp(&b.0));
        let meant = similar.map_or(String::new(), |(_, k)| format!("; did you mean `{k}`?"));
        let mut error = ApiError::field(&cut(name), format!("there is no such field{meant}"));
        error.code = "unknown_field";
        Err(error)
    }
}

/// A whole number, also where it is written as 2.0 or 2e0: JSON has one kind of number, and some clients one type for it.
/// From 2⁵³ on such a writing may stand for a neighbour, too.
pub(crate) fn whole(value: &Value) -> Option<i128> {
    const EXACT: f64 = 9_007_199_254_740_992.0;
    let digits = value.as_u64().map(i128::from).or_else(|| value.as_i64().map(i128::from));
    let point = || value.as_f64().filter(|x| x.fract() == 0.0 && x.abs() < EXACT).map(|x| x as i128);
    digits.or_else(point)
}

/// A value in a message.
pub(crate) fn shown(value: &Value) -> String {
    cut(&value.to_string())
}

/// A text of a client, not longer than a line.
pub(crate) fn cut(text: &str) -> String {
    const LONGEST: usize = 80;
    if text.chars().count() <= LONGEST {
        return text.to_owned();
    }
    text.chars().take(LONGEST).chain(['…']).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(result: ApiResult<impl fmt::Debug>) -> String {
        result.unwrap_err().message
    }

    #[test]
    fn whole_numbers_are_whole_however_they_are_written() {
        let of = |text: &str| whole(&serde_json::from_str(text).unwrap());
        for (text, n) in [
            ("0", Some(0)),
            ("-0.0", Some(0)),
            ("-7.0", Some(-7)),
            ("42.0", Some(42)),
            ("1e3", Some(1000)),
            ("18446744073709551615", Some(i128::from(u64::MAX))),
            ("9007199254740991.0", Some((1 << 53) - 1)),
            ("9007199254740993.0", None),
            ("18446744073709551616", None),
            ("1.5", None),
            ("1e-3", None),
            ("1e300", None),
            ("\"2\"", None),
            ("true", None),
            ("null", None),
            ("[2]", None),
        ] {
            assert_eq!(of(text), n, "{text}");
        }
    }

    #[test]
    fn fields_are_named_when_they_are_wrong() {
        let parse = |text: &str| Fields::parse(text.as_bytes());
        assert!(message(parse("")).contains("empty"));
        assert!(message(parse("[1]")).contains("a JSON object"));
        assert!(message(parse(r#"{"n": 1, "n": 2}"#)).contains("`n` stands twice"));
        assert!(parse(&"[".repeat(100_000)).is_err());
        let whole = |text: &str| parse(text).unwrap().whole(&["n", "count"], 1..=10);
        assert_eq!(whole(r#"{"n": 10}"#).unwrap(), Some(10));
        assert_eq!(
            whole(r#"{"count": 3, "n": null}"#).map_err(|e| e.message),
            Err("`count`: it means the same as `n`: give one of them".into())
        );
        for bad in ["0", "11", "1.5", "-1", "\"1\"", "true", "[1]", "1e99"] {
            let text = message(whole(&format!("{{\"n\": {bad}}}")));
            assert!(text.starts_with("`n`: expected a whole number from 1 to 10, got"), "{text}");
        }
        for (good, n) in [("2.0", 2), ("1e1", 10), ("100e-2", 1), ("3.000", 3)] {
            assert_eq!(whole(&format!("{{\"n\": {good}}}")).unwrap(), Some(n), "{good}");
        }
        let unknown = parse(r#"{"step": 3}"#).unwrap().finish(&["steps", "seed"]).unwrap_err();
        assert_eq!((unknown.param.as_deref(), unknown.code), (Some("step"), "unknown_field"));
        assert!(unknown.message.contains("did you mean `steps`?"));
        let long = parse(&format!("{{\"{}\": 1}}", "x".repeat(10_000))).unwrap().finish(&[]);
        assert!(message(long).len() < 200);
    }
}
