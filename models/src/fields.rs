//! Configurations key by key: every key read with its name in the message, every value judged before it is used.

use std::fmt;

use serde_json::{Map, Value};

use crate::{error::ModelError, nearest::hint};

/// One JSON object, read key by key; an absent key and `null` are the same.
pub(crate) struct Fields<'a> {
    place: &'static str,
    prefix: &'static str,
    map: &'a Map<String, Value>,
}

impl<'a> Fields<'a> {
    /// The keys of an object; `place` names it in messages, `prefix` stands before its keys there.
    pub(crate) fn new(place: &'static str, prefix: &'static str, map: &'a Map<String, Value>) -> Self {
        Self { place, prefix, map }
    }

    /// Refuses unknown keys, with the nearest known one, and the lack of required ones.
    pub(crate) fn check_keys(
        &self,
        required: &[&'static str],
        optional: &[&'static str],
    ) -> Result<(), ModelError> {
        let known: Vec<&str> = required.iter().chain(optional).copied().collect();
        if let Some(key) = self.map.keys().find(|key| !known.contains(&key.as_str())) {
            let hint = hint(key, &known);
            return Err(ModelError::UnknownKey { place: self.place, key: key.clone(), hint });
        }
        let keys: Vec<_> = required.iter().copied().filter(|key| self.get(key).is_none()).collect();
        if keys.is_empty() { Ok(()) } else { Err(ModelError::MissingKeys { place: self.place, keys }) }
    }

    /// An optional object.
    pub(crate) fn object(&self, key: &str) -> Result<Option<&'a Map<String, Value>>, ModelError> {
        self.read(key, "an object", Value::as_object)
    }

    fn get(&self, key: &str) -> Option<&'a Value> {
        self.map.get(key).filter(|value| !value.is_null())
    }

    fn read<T>(
        &self,
        key: &str,
        expected: &'static str,
        read: impl FnOnce(&'a Value) -> Option<T>,
    ) -> Result<Option<T>, ModelError> {
        let Some(value) = self.get(key) else { return Ok(None) };
        read(value).map(Some).ok_or_else(|| wrong_type(&format!("{}{key}", self.prefix), expected, value))
    }

    /// A required key, whose presence [`Fields::check_keys`] has seen.
    pub(crate) fn size(&self, key: &'static str) -> Result<usize, ModelError> {
        let size = self.read(key, "a whole number", |v| v.as_u64().and_then(|n| usize::try_from(n).ok()))?;
        size.ok_or(ModelError::MissingKeys { place: self.place, keys: vec![key] })
    }

    /// An optional number.
    pub(crate) fn number(&self, key: &str) -> Result<Option<f64>, ModelError> {
        self.read(key, "a number", Value::as_f64)
    }

    /// An optional truth value.
    pub(crate) fn truth(&self, key: &str) -> Result<Option<bool>, ModelError> {
        self.read(key, "true or false", Value::as_bool)
    }

    /// An optional text.
    pub(crate) fn text(&self, key: &str) -> Result<Option<&'a str>, ModelError> {
        self.read(key, "a text", Value::as_str)
    }

    /// An optional list of texts.
    pub(crate) fn texts(&self, key: &str) -> Result<Option<Vec<String>>, ModelError> {
        self.read(key, "an array of texts", |v| {
            v.as_array()?.iter().map(|name| name.as_str().map(str::to_owned)).collect()
        })
    }
}

/// The refusal of a value of another JSON type, shortened.
pub(crate) fn wrong_type(key: &str, expected: &'static str, got: &Value) -> ModelError {
    const SHOWN: usize = 60;
    let text = got.to_string();
    let mut got: String = text.chars().take(SHOWN).collect();
    if got.len() < text.len() {
        got.push('…');
    }
    ModelError::WrongType { key: key.to_owned(), expected, got }
}

/// The refusal of a value of the right type, unless it `holds`.
pub(crate) fn check(
    holds: bool,
    key: &'static str,
    got: impl fmt::Display,
    expected: impl FnOnce() -> String,
) -> Result<(), ModelError> {
    if holds { Ok(()) } else { Err(ModelError::BadValue { key, expected: expected(), got: got.to_string() }) }
}

/// The largest size accepted, so that no product of sizes overflows.
const LARGEST: usize = 1 << 20;
/// Most blocks: a graph has some hundred nodes for each.
const DEEPEST: usize = 1 << 12;
/// Most parameters, and most values of a position table or an input: what no machine of today holds.
const MOST_PARAMETERS: u128 = 1 << 40;
const MOST_VALUES: u128 = 1 << 32;

/// Refuses sizes of nothing, and such as no model has.
pub(crate) fn check_sizes(sizes: &[(&'static str, usize)]) -> Result<(), ModelError> {
    let fits = |(key, size): &(&'static str, usize)| {
        let most = if *key == "depth" { DEEPEST } else { LARGEST };
        check((1..=most).contains(size), key, size, || format!("within 1..={most}"))
    };
    sizes.iter().try_for_each(fits)
}

/// Amounts that follow from several sizes: each size may be allowed, and together they are too much. Whoever builds the
/// model asks for memory by them.
pub(crate) struct Amounts {
    /// Parameters, and the sizes that they follow from.
    pub(crate) parameters: (u128, String),
    /// Values of the position table.
    pub(crate) positions: (u128, String),
    /// Values of an input.
    pub(crate) input: (u128, String),
}

impl Amounts {
    /// Refuses what no machine holds.
    pub(crate) fn check(self) -> Result<(), ModelError> {
        for (what, most, (got, from)) in [
            ("the number of parameters", MOST_PARAMETERS, self.parameters),
            ("the size of the position table", MOST_VALUES, self.positions),
            ("the number of values of an input", MOST_VALUES, self.input),
        ] {
            check(got <= most, what, format!("{got}, from {from}"), || format!("at most {most}"))?;
        }
        Ok(())
    }
}

/// Hidden width of an MLP: a width times a ratio, rounded down.
pub(crate) fn mlp_hidden(width: usize, ratio: f64) -> usize {
    (width as f64 * ratio) as usize
}

/// Refuses a ratio that gives no hidden width.
pub(crate) fn check_mlp_ratio(width: usize, ratio: f64) -> Result<(), ModelError> {
    check((1.0..=LARGEST as f64).contains(&(width as f64 * ratio)), "mlp_ratio", ratio, || {
        format!("such that hidden_size {width} times it is within 1..={LARGEST}")
    })
}
