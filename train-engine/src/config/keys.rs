//! Names of the keys, read off the sections' types, and what is said to a name that is none.

use serde::de::value::Error as DeError;
use serde::de::{Deserialize, Deserializer, Error as _, Visitor};

use super::sections::{
    CheckpointSection, DataSection, LogSection, ModelSection, MupSection, ObjectiveSection, SampleSection,
    TrainSection,
};
use crate::error::{Result, TrainError};

/// A section's name and its keys.
pub(super) type Section = (&'static str, fn() -> &'static [&'static str]);

/// All sections.
pub(super) const SECTIONS: [Section; 8] = [
    ("model", fields_of::<ModelSection>),
    ("objective", fields_of::<ObjectiveSection>),
    ("mup", fields_of::<MupSection>),
    ("data", fields_of::<DataSection>),
    ("train", fields_of::<TrainSection>),
    ("checkpoint", fields_of::<CheckpointSection>),
    ("log", fields_of::<LogSection>),
    ("sample", fields_of::<SampleSection>),
];

/// A deserialiser that only listens: it keeps the field names a struct asks for.
struct FieldNames<'a>(&'a mut &'static [&'static str]);

impl<'de> Deserializer<'de> for FieldNames<'_> {
    type Error = DeError;

    fn deserialize_any<V: Visitor<'de>>(self, _: V) -> Result<V::Value, DeError> {
        Err(DeError::custom("names only"))
    }

    fn deserialize_struct<V: Visitor<'de>>(
        self,
        _: &'static str,
        fields: &'static [&'static str],
        _: V,
    ) -> Result<V::Value, DeError> {
        *self.0 = fields;
        Err(DeError::custom("names only"))
    }

    serde::forward_to_deserialize_any! {
        bool i8 i16 i32 i64 i128 u8 u16 u32 u64 u128 f32 f64 char str string bytes byte_buf option unit unit_struct
        newtype_struct seq tuple tuple_struct map enum identifier ignored_any
    }
}

/// The keys of a section's type.
pub(super) fn fields_of<'de, T: Deserialize<'de>>() -> &'static [&'static str] {
    let mut fields: &'static [&'static str] = &[];
    // It always stops with the listener's own error; the names are the result.
    drop(T::deserialize(FieldNames(&mut fields)));
    fields
}

/// Refuses sections and keys that do not exist.
pub(super) fn refuse_unknown(table: &toml::Table, origin: &str) -> Result<()> {
    for (section, value) in table {
        let Some(fields) = fields(section) else { return Err(unknown(section, origin)) };
        let Some(keys) = value.as_table() else {
            return Err(TrainError::ConfigSyntax {
                origin: origin.to_owned(),
                reason: format!("`{section}` is a section: expected a table, got `{value}`"),
            });
        };
        for key in keys.keys() {
            if !fields.contains(&key.as_str()) {
                return Err(unknown(&format!("{section}.{key}"), origin));
            }
        }
    }
    Ok(())
}

/// Puts `section.key=value` into the table; the value is TOML, or a string where it is not.
pub(super) fn apply_override(table: &mut toml::Table, given: &str, origin: &str) -> Result<()> {
    let malformed = || TrainError::Override { given: given.to_owned() };
    let (key, value) = given.split_once('=').ok_or_else(malformed)?;
    let (key, value) = (key.trim(), value.trim());
    let (section, field) = key
        .split_once('.')
        .ok_or_else(|| if fields(key).is_some() { malformed() } else { unknown(key, origin) })?;
    if !fields(section).is_some_and(|fields| fields.contains(&field)) {
        return Err(unknown(key, origin));
    }
    let parsed = format!("value = {value}").parse::<toml::Table>().ok().filter(|table| table.len() == 1);
    let value = parsed.and_then(|mut table| table.remove("value")).unwrap_or_else(|| value.into());
    let section = table.entry(section).or_insert_with(|| toml::Table::new().into());
    section.as_table_mut().ok_or_else(malformed)?.insert(field.to_owned(), value);
    Ok(())
}

fn fields(section: &str) -> Option<&'static [&'static str]> {
    SECTIONS.iter().find(|(name, _)| *name == section).map(|(_, fields)| fields())
}

fn unknown(key: &str, origin: &str) -> TrainError {
    let (section, field) = key.split_once('.').unwrap_or(("", key));
    let siblings = fields(section);
    let valid = siblings.map_or_else(|| SECTIONS.iter().map(|(name, _)| *name).collect(), <[_]>::to_vec);
    TrainError::UnknownKey {
        key: key.to_owned(),
        origin: origin.to_owned(),
        nearest: nearest(section, field),
        valid,
    }
}

/// The closest dotted key: in the same section first, then the same name elsewhere, then anything close.
fn nearest(section: &str, field: &str) -> Option<String> {
    let all = || {
        let keys =
            |(name, fields): &Section| fields().iter().map(|field| (*name, *field)).collect::<Vec<_>>();
        SECTIONS.iter().flat_map(keys).collect::<Vec<_>>()
    };
    let close = |a: &str, b: &str| {
        let distance = strsim::damerau_levenshtein(a, b);
        (distance <= (a.len().max(b.len()) / 3).max(1)).then_some(distance)
    };
    let best = |candidates: Vec<(&'static str, &'static str)>| {
        let scored = candidates.into_iter().filter_map(|(s, f)| Some((close(f, field)?, s, f)));
        scored.min_by_key(|(distance, ..)| *distance).map(|(_, s, f)| format!("{s}.{f}"))
    };
    if section.is_empty() {
        let sections = SECTIONS.iter().filter_map(|(name, _)| Some((close(name, field)?, *name)));
        if let Some((_, name)) = sections.min_by_key(|(distance, _)| *distance) {
            return Some(name.to_owned());
        }
        return best(all());
    }
    best(all().into_iter().filter(|(name, _)| *name == section).collect())
        .or_else(|| {
            let section = SECTIONS
                .iter()
                .find(|(name, fields)| close(name, section).is_some() && fields().contains(&field))?;
            Some(format!("{}.{field}", section.0))
        })
        .or_else(|| best(all().into_iter().filter(|(_, name)| *name == field).collect()))
        .or_else(|| best(all()))
}
