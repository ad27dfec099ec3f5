//! What a file is that something else was expected in: known by its first bytes, with what to do.

use std::fs::File;
use std::io::Read as _;
use std::path::Path;

/// Bytes that are looked at.
const START: u64 = 512;

/// The kinds that people have in place of tensors, images or labels: how they begin, what they are, what to do.
const KINDS: [(&[u8], &str); 15] = [
    (
        b"version https://git-lfs",
        "it is a Git LFS pointer, not the file itself: fetch it with `git lfs pull`",
    ),
    (b"PK\x03\x04", "it is a zip archive, as PyTorch (`torch.save`) and NumPy (`.npz`) write them"),
    (b"\x80\x02", "it is a Python pickle, as old PyTorch (`torch.save`) writes them"),
    (b"\x80\x03", "it is a Python pickle"),
    (b"\x80\x04", "it is a Python pickle"),
    (b"\x80\x05", "it is a Python pickle"),
    (b"\x93NUMPY", "it is a NumPy array (`.npy`)"),
    (b"\x89HDF", "it is an HDF5 file, as Keras writes them: save the tensors as safetensors"),
    (b"GGUF", "it is a GGUF file, whose tensors are quantised: take the model's safetensors"),
    (b"\x1f\x8b", "it is compressed by gzip: unpack it"),
    (b"\x28\xb5\x2f\xfd", "it is compressed by zstd: unpack it"),
    (b"<!DOCTYPE", "it is a web page, as a failed download leaves it: fetch the file again"),
    (b"<!doctype", "it is a web page, as a failed download leaves it: fetch the file again"),
    (b"<html", "it is a web page, as a failed download leaves it: fetch the file again"),
    (b"{", "it is JSON"),
];

/// What a file is, in words that an error can end with; none where its beginning says nothing.
pub fn told(path: &Path) -> Option<&'static str> {
    let mut start = Vec::new();
    File::open(path).ok()?.take(START).read_to_end(&mut start).ok()?;
    if start.is_empty() {
        return Some("it is empty: copy or fetch it again");
    }
    if start.iter().all(|byte| *byte == 0) && start.len() as u64 == START {
        return Some("it begins with zeros, as an interrupted copy leaves it: copy or fetch it again");
    }
    KINDS.iter().find(|(begins, _)| start.starts_with(begins)).map(|(_, words)| *words)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_people_have_in_place_of_a_file_is_told() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x");
        let zeros = [0; 600];
        for (content, part) in [
            (&b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n"[..], Some("git lfs pull")),
            (b"PK\x03\x04...", Some("PyTorch")),
            (b"\x80\x02\x8a\x0a", Some("PyTorch")),
            (b"<!DOCTYPE html>", Some("web page")),
            (b"", Some("empty")),
            (&zeros, Some("zeros")),
            (b"hello", None),
        ] {
            std::fs::write(&path, content).unwrap();
            let words = told(&path);
            assert_eq!(words.is_some(), part.is_some(), "{words:?}");
            assert!(part.is_none_or(|part| words.unwrap().contains(part)), "{words:?}");
        }
        assert_eq!(told(&dir.path().join("none")), None);
    }
}
