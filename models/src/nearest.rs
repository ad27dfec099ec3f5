//! The closest valid name to a mistyped one.

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
