//! What to do about a file operation that the system refused: one table, by what was tried.

use std::io;
use std::path::Path;

use crate::library::cache_directory;

/// Whether something was taken from a file or put into one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Tried {
    Reading,
    Writing,
    /// The verb does not tell.
    Either,
}

/// The verbs of errors and what they try.
const VERBS: [(&str, Tried); 14] = [
    ("read", Tried::Reading),
    ("list", Tried::Reading),
    ("find", Tried::Reading),
    ("unzip", Tried::Reading),
    ("open", Tried::Either),
    ("lock", Tried::Either),
    ("write", Tried::Writing),
    ("write to", Tried::Writing),
    ("create", Tried::Writing),
    ("remove", Tried::Writing),
    ("rename", Tried::Writing),
    ("sync", Tried::Writing),
    ("copy", Tried::Writing),
    ("link", Tried::Writing),
];

/// The remedy for a refused operation, to be put behind the system's words; empty where none is known.
pub fn hint(action: &str, path: &Path, source: &io::Error) -> String {
    let tried = VERBS.iter().find(|(verb, _)| *verb == action).map_or(Tried::Either, |(_, tried)| *tried);
    remedy(tried, path, source.kind(), cache_directory().as_deref())
}

fn remedy(tried: Tried, path: &Path, kind: io::ErrorKind, cache: Option<&Path>) -> String {
    use Tried::{Either, Reading, Writing};
    use io::ErrorKind as Kind;
    let in_cache = cache.is_some_and(|cache| path.starts_with(cache));
    match (kind, tried) {
        (Kind::StorageFull | Kind::QuotaExceeded, _) if in_cache => {
            "; free some space, or set MUDIT_CACHE to a directory that has more".to_owned()
        }
        (Kind::StorageFull | Kind::QuotaExceeded, _) => {
            "; free some space and run the same command again".to_owned()
        }
        (Kind::FileTooLarge, _) => {
            "; raise the limit of this process's files (`ulimit -f`) and run the same command again"
                .to_owned()
        }
        (_, Writing) if in_cache => {
            "; it is in mudit's cache: set MUDIT_CACHE to a directory you may write to".to_owned()
        }
        (Kind::PermissionDenied | Kind::ReadOnlyFilesystem, Writing) => {
            "; choose a directory you may write to, or change its permissions".to_owned()
        }
        (Kind::PermissionDenied, Reading) => {
            "; give this user the right to read it, and to enter the directories above it".to_owned()
        }
        (Kind::PermissionDenied | Kind::ReadOnlyFilesystem, Either) => {
            "; give this user the right to it, or choose another place".to_owned()
        }
        (Kind::IsADirectory, Reading | Either) => "; name a file in it".to_owned(),
        (Kind::IsADirectory, Writing) => "; choose another name".to_owned(),
        (Kind::NotADirectory, _) => "; a part of the path is a file: check the path".to_owned(),
        (Kind::NotFound, _) if path.is_relative() => match std::env::current_dir() {
            Ok(here) => {
                format!("; check the path, which begins in the working directory `{}`", here.display())
            }
            Err(_) => "; check the path: the working directory is gone".to_owned(),
        },
        (Kind::NotFound, _) => "; check the path".to_owned(),
        _ => String::new(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_hint_is_by_what_was_tried() {
        let cache = Path::new("/c");
        for (action, path, kind, part) in [
            ("read", "/d/x", io::ErrorKind::PermissionDenied, "right to read"),
            ("list", "/d", io::ErrorKind::PermissionDenied, "right to read"),
            ("write", "/d/x", io::ErrorKind::PermissionDenied, "you may write to"),
            ("create", "/d/x", io::ErrorKind::ReadOnlyFilesystem, "you may write to"),
            ("open", "/d/x", io::ErrorKind::PermissionDenied, "the right to it"),
            ("write", "/c/x", io::ErrorKind::PermissionDenied, "MUDIT_CACHE"),
            ("create", "/c", io::ErrorKind::NotADirectory, "MUDIT_CACHE"),
            ("write", "/c/x", io::ErrorKind::StorageFull, "MUDIT_CACHE"),
            ("read", "/c/x", io::ErrorKind::PermissionDenied, "right to read"),
            ("write", "/d/x", io::ErrorKind::StorageFull, "free some space"),
            ("read", "d/x", io::ErrorKind::NotFound, "the working directory `/"),
            ("read", "/d/x", io::ErrorKind::NotFound, "; check the path"),
            ("read", "/d", io::ErrorKind::IsADirectory, "name a file in it"),
            ("read", "/d/x", io::ErrorKind::NotADirectory, "is a file"),
            ("read", "/d/x", io::ErrorKind::Other, ""),
        ] {
            let tried = VERBS.iter().find(|(verb, _)| *verb == action).unwrap().1;
            let text = remedy(tried, Path::new(path), kind, Some(cache));
            assert!(text.contains(part) && (text.is_empty() == part.is_empty()), "{action} {path}: {text}");
            assert!(tried != Tried::Reading || !text.contains("write"), "{text}");
        }
    }
}
