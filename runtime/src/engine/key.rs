//! What an engine was built from, so that a build can tell whether it has anything to do, and why.

use std::collections::BTreeMap;
use std::fmt;

use serde::{Deserialize, Serialize};

/// The parts that decide what an engine is, by name: options, versions, hashes of programs and weights, the device.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct EngineKey(BTreeMap<String, String>);

/// A part in which two keys differ.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct KeyDifference {
    /// Its name.
    pub part: String,
    /// What the engine was built from.
    pub built: Option<String>,
    /// What is asked for now.
    pub asked: Option<String>,
}

impl EngineKey {
    /// Sets a part.
    pub fn set(&mut self, part: impl Into<String>, value: impl fmt::Display) {
        self.0.insert(part.into(), value.to_string());
    }

    /// A part.
    pub fn get(&self, part: &str) -> Option<&str> {
        self.0.get(part).map(String::as_str)
    }

    /// The parts in which `self`, that an engine was built from, differs from what is asked for now.
    pub fn differences(&self, asked: &Self) -> Vec<KeyDifference> {
        let mut parts: Vec<&String> = self.0.keys().chain(asked.0.keys()).collect();
        parts.sort_unstable();
        parts.dedup();
        let of = |key: &Self, part: &str| key.0.get(part).cloned();
        parts
            .into_iter()
            .map(|part| KeyDifference { part: part.clone(), built: of(self, part), asked: of(asked, part) })
            .filter(|d| d.built != d.asked)
            .collect()
    }
}

impl fmt::Display for KeyDifference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let word = |v: &Option<String>| v.clone().unwrap_or_else(|| "nothing".to_owned());
        write!(f, "{}: built from {}, asked for {}", self.part, word(&self.built), word(&self.asked))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn differences_name_the_part_and_both_sides() {
        let (mut built, mut asked) = (EngineKey::default(), EngineKey::default());
        for key in [&mut built, &mut asked] {
            key.set("mudit", "0.1.0");
        }
        assert!(built.differences(&asked).is_empty());
        built.set("precision", "f32");
        asked.set("precision", "bf16");
        asked.set("program step b4", "abc");
        let words: Vec<String> = built.differences(&asked).iter().map(ToString::to_string).collect();
        assert_eq!(
            words,
            [
                "precision: built from f32, asked for bf16",
                "program step b4: built from nothing, asked for abc"
            ]
        );
        assert_eq!(
            serde_json::from_value::<EngineKey>(serde_json::to_value(&asked).unwrap()).unwrap(),
            asked
        );
    }
}
