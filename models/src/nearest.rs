//! The closest valid name to a mistyped one.

use crate::error::ModelError;

/// The candidate with the fewest edits from `given`, if that is close enough to be what was meant.
pub(crate) fn nearest<'a>(given: &str, candidates: &[&'a str]) -> Option<&'a str> {
    let given = given.to_lowercase();
    let (edits, name) = candidates
        .iter()
        .map(|name| (strsim::damerau_levenshtein(&given, &name.to_lowercase()), *name))
        .min_by_key(|(edits, _)| *edits)?;
    (edits <= 1 + name.len() / 3).then_some(name)
}

/// The remedy that ends a message: the nearest valid name, or all of them when none is near.
pub(crate) fn hint(given: &str, candidates: &[&str]) -> String {
    match nearest(given, candidates) {
        Some(name) => format!("did you mean \"{name}\"?"),
        None => format!("valid are {}", candidates.join(", ")),
    }
}

/// The value of that name in a closed list.
pub(crate) fn by_name<T: Copy>(
    key: &'static str,
    name: &str,
    all: &[(&'static str, T)],
) -> Result<T, ModelError> {
    let names: Vec<&str> = all.iter().map(|(name, _)| *name).collect();
    all.iter().find(|(n, _)| *n == name).map(|(_, value)| *value).ok_or_else(|| ModelError::BadValue {
        key,
        expected: names.join(" or "),
        got: format!("\"{name}\" ({})", hint(name, &names)),
    })
}

#[cfg(test)]
mod tests {
    use super::{hint, nearest};

    #[test]
    fn near_names_are_found_and_far_ones_are_not() {
        let names = ["hidden_size", "depth", "num_heads"];
        assert_eq!(nearest("hiden_size", &names), Some("hidden_size"));
        assert_eq!(nearest("HIDDEN_SIZE", &names), Some("hidden_size"));
        assert_eq!(nearest("dropout", &names), None);
        assert_eq!(hint("detph", &names), "did you mean \"depth\"?");
        assert_eq!(hint("dropout", &names), "valid are hidden_size, depth, num_heads");
        assert_eq!(nearest("x", &[]), None);
    }
}
