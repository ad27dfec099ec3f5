//! What a class is called, and which class a text means.
//!
//! Names are compared composed (Unicode NFC), so that a folder from a Mac is the word that is typed elsewhere. A text means
//! the class of exactly that name; else the one of that name in other letters' cases; else the one of that number. `@3`
//! is always number 3. A text that means two classes is refused, with a spelling for each.

use caseless::Caseless as _;
use unicode_normalization::UnicodeNormalization as _;

use crate::error::ModelError;
use crate::model::Model;

/// Before a number that is one in any case; no shell wants it quoted.
const NUMBER_SIGN: char = '@';
/// Names in a message.
const SHOWN: usize = 20;

/// A name in its composed form.
pub fn composed(name: &str) -> String {
    name.nfc().collect()
}

/// A name without its cases: that of all alphabets, composed.
fn folded(name: &str) -> String {
    name.nfd().default_case_fold().nfc().collect()
}

/// A text of digits as a number.
fn number(text: &str) -> Option<usize> {
    text.bytes().all(|b| b.is_ascii_digit()).then(|| text.parse().ok())?
}

/// The first of `names` that is the number of another class, so that the number means two.
pub fn misleading_number<S: AsRef<str>>(names: &[S]) -> Option<usize> {
    names.iter().enumerate().position(|(index, name)| {
        number(name.as_ref()).is_some_and(|number| number != index && number < names.len())
    })
}

impl Model {
    /// The class that a name, a number or `@` and a number means.
    ///
    /// # Errors
    /// [`ModelError::UnknownClass`], [`ModelError::AmbiguousClass`].
    pub fn class(&self, text: &str) -> Result<usize, ModelError> {
        match self.meanings(text)[..] {
            [class] => Ok(class),
            [] => Err(ModelError::UnknownClass { text: text.to_owned(), known: self.known_classes() }),
            ref several => {
                let each: Vec<String> = several.iter().map(|class| self.spelled(*class)).collect();
                Err(ModelError::AmbiguousClass { text: text.to_owned(), meanings: each.join(" and ") })
            }
        }
    }

    /// The classes of lists that are separated by commas. A name may have commas itself.
    ///
    /// # Errors
    /// As [`Model::class`].
    pub fn classes<S: AsRef<str>>(&self, lists: &[S]) -> Result<Vec<usize>, ModelError> {
        let names = self.class_names.as_deref().unwrap_or_default();
        let most = names.iter().map(|name| name.matches(',').count() + 1).max().unwrap_or(1);
        let mut classes = Vec::new();
        for list in lists {
            let parts: Vec<&str> = list.as_ref().split(',').collect();
            let mut rest = &parts[..];
            while let [first, ..] = rest {
                let long =
                    (2..=most.min(rest.len())).rev().find(|n| !self.exact(&rest[..*n].join(",")).is_empty());
                let Some(n) = long else {
                    classes.push(self.class(first)?);
                    rest = &rest[1..];
                    continue;
                };
                let text = rest[..n].join(",");
                let class = self.class(&text)?;
                let apart: Result<Vec<usize>, _> = rest[..n].iter().map(|part| self.class(part)).collect();
                if let Ok(apart) = apart {
                    let apart: Vec<String> = apart.into_iter().map(|class| self.spelled(class)).collect();
                    let meanings = format!("{} and the list of {}", self.spelled(class), apart.join(", "));
                    return Err(ModelError::AmbiguousClass { text, meanings });
                }
                classes.push(class);
                rest = &rest[n..];
            }
        }
        Ok(classes)
    }

    /// What may stand for a class.
    pub fn known_classes(&self) -> String {
        let numbers = format!("0 to {}", self.conditioning().class_count().saturating_sub(1));
        match self.class_names.as_deref() {
            Some(names) => {
                let shown = names.iter().take(SHOWN).map(String::as_str).collect::<Vec<_>>().join(", ");
                format!("{numbers}, or {shown}{}", if names.len() > SHOWN { ", …" } else { "" })
            }
            None => numbers,
        }
    }

    /// Every class that a text may mean, each once.
    fn meanings(&self, text: &str) -> Vec<usize> {
        let wanted = composed(text.trim());
        let signed = wanted.strip_prefix(NUMBER_SIGN).and_then(number);
        let index =
            signed.or_else(|| number(&wanted)).filter(|index| *index < self.conditioning().class_count());
        // `02` is a name in full; `2` may be a number.
        let plain = signed.is_some() || !wanted.starts_with('0') || wanted == "0";
        let mut found = self.exact(&wanted);
        if !found.is_empty() {
            found.extend(index.filter(|_| plain));
        } else if signed.is_some() {
            found.extend(index);
        } else if let Some(wanted) = number(&wanted) {
            found = self.named(|name| number(name) == Some(wanted));
            found.extend(index);
        } else {
            let wanted = folded(&wanted);
            found = self.named(|name| folded(name) == wanted);
        }
        found.sort_unstable();
        found.dedup();
        found
    }

    fn exact(&self, composed_text: &str) -> Vec<usize> {
        self.named(|name| composed(name) == *composed_text)
    }

    fn named(&self, is_it: impl Fn(&str) -> bool) -> Vec<usize> {
        let names = self.class_names.as_deref().unwrap_or_default();
        names.iter().enumerate().filter(|(_, name)| is_it(name.trim())).map(|(class, _)| class).collect()
    }

    /// A class with a spelling that means no other.
    fn spelled(&self, class: usize) -> String {
        let name = self.class_names.as_deref().and_then(|names| names.get(class));
        let what =
            name.map_or_else(|| format!("class {class}"), |name| format!("class {class}, named `{name}`"));
        let spellings = [format!("{NUMBER_SIGN}{class}"), class.to_string()].into_iter().chain(name.cloned());
        let mut clear = spellings.filter(|text| self.meanings(text)[..] == [class]);
        clear.next().map_or(what.clone(), |text| format!("{what} (write `{text}`)"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn model(names: &[&str]) -> Model {
        let mut model = Model::resolve(&format!("DiT-S/2:{}", names.len())).unwrap();
        model.class_names = Some(names.iter().map(|name| (*name).to_owned()).collect());
        model
    }

    #[test]
    fn a_name_is_found_in_any_form_and_case() {
        let names = [
            "cafe\u{301}",
            "\u{c9}clair",
            "Вой",
            "ΟΔΟΣ",
            "Straße",
            "日本",
            "a,b",
            "\u{1112}\u{1161}\u{11ab}",
            " x ",
        ];
        let model = model(&names);
        for (text, class) in [
            ("café", 0),
            ("CAFÉ", 0),
            ("e\u{301}clair", 1),
            ("вой", 2),
            ("ВОЙ", 2),
            ("Вои\u{306}", 2),
            ("οδος", 3),
            ("οδοσ", 3),
            ("STRASSE", 4),
            ("strasse", 4),
            (" 日本 ", 5),
            ("A,B", 6),
            ("\u{d55c}", 7),
            ("x", 8),
            ("3", 3),
            ("@3", 3),
            ("03", 3),
        ] {
            assert_eq!(model.class(text).unwrap(), class, "{text}");
        }
        for text in ["", "cafe", "9", "@9", "-1", "+1", "1.0", "#", "@#1", "99999999999999999999999"] {
            let error = model.class(text).unwrap_err();
            assert!(matches!(error, ModelError::UnknownClass { .. }), "{text}: {error}");
        }
        // Dotted and dotless i are two letters.
        let turkish = super::tests::model(&["ı", "i"]);
        assert_eq!((turkish.class("ı").unwrap(), turkish.class("I").unwrap()), (0, 1));
    }

    #[test]
    fn a_name_goes_before_a_number_and_what_means_two_is_refused() {
        let sorted = ["0", "1", "10", "11", "2", "3", "4", "5", "6", "7", "8", "9"];
        let from_one = ["1", "2", "3"];
        let padded = ["01", "02", "03"];
        let cases = ["Cat", "cat", "dog"];
        let years = ["1990", "1991"];
        let signs = ["x", "@0", "y"];
        for (names, text, class) in [
            (&sorted[..], "0", Some(0)),
            (&sorted, "@2", Some(2)),
            (&sorted, "2", None),
            (&sorted, "10", None),
            (&sorted, "@10", Some(10)),
            (&from_one, "3", Some(2)),
            (&from_one, "1", None),
            (&from_one, "0", Some(0)),
            (&padded, "01", Some(0)),
            (&padded, "1", None),
            (&padded, "3", Some(2)),
            (&cases, "cat", Some(1)),
            (&cases, "Cat", Some(0)),
            (&cases, "CAT", None),
            (&cases, "DOG", Some(2)),
            (&years, "1991", Some(1)),
            (&years, "1", Some(1)),
            (&signs, "@0", None),
            (&signs, "0", Some(0)),
        ] {
            let model = model(names);
            let got = model.class(text);
            if let Some(class) = class {
                assert_eq!(got.unwrap(), class, "{text} of {names:?}");
                continue;
            }
            // Each meaning comes with a spelling that has no other.
            let message = got.unwrap_err().to_string();
            let parts = message.split("(write `").skip(1);
            let parts: Vec<&str> = parts.map(|part| part.split('`').next().unwrap()).collect();
            assert_eq!(parts.len(), 2, "{message}");
            let classes: Vec<usize> = parts.iter().map(|part| model.class(part).unwrap()).collect();
            assert_ne!(classes[0], classes[1], "{message}");
        }
        assert_eq!(misleading_number(&sorted), Some(2));
        assert_eq!(misleading_number(&from_one), Some(0));
        for fine in [&["0", "1", "2"][..], &years, &cases] {
            assert_eq!(misleading_number(fine), None, "{fine:?}");
        }
    }

    #[test]
    fn lists_know_names_with_commas() {
        let model = model(&["a,b", "c", "tench, Tinca", "a", "x,y,z", "b"]);
        let of = |list: &str| model.classes(&[list]);
        assert_eq!(of("c,tench, Tinca,@0").unwrap(), [1, 2, 0]);
        assert_eq!(of("x,y,z,c").unwrap(), [4, 1]);
        assert_eq!(model.classes(&["c,a", "b"]).unwrap(), [1, 3, 5]);
        let error = of("c,a,b").unwrap_err().to_string();
        assert!(
            error.contains("`a,b`") && error.contains("write `@0`") && error.contains("the list of"),
            "{error}"
        );
        assert!(of("c,,a").is_err() && of("").is_err());
    }
}
