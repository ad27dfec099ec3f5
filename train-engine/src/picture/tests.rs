//! Pixels beside Pillow's, damaged files, and which files count.

use std::fs;
use std::path::{Path, PathBuf};

use image::metadata::Orientation;

use super::*;

/// Files by `tests/peers/make_jpeg_files.py`: each JPEG beside the pixels that Pillow makes of it.
fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures/jpeg-files")
}

fn bytes(name: &str) -> Vec<u8> {
    fs::read(fixtures().join(name)).unwrap()
}

fn refusal(bytes: &[u8]) -> String {
    decode(Path::new("x"), bytes).unwrap_err().to_string()
}

#[test]
fn jpeg_pixels_are_those_of_pillow() {
    let mut files = 0;
    for entry in fs::read_dir(fixtures()).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_some_and(|ending| ending == "jpg") {
            let found = read(&path).unwrap().image.into_rgb8();
            let expected = read(&path.with_extension("png")).unwrap().image.into_rgb8();
            assert_eq!(found.dimensions(), expected.dimensions(), "{}", path.display());
            let apart = found.iter().zip(expected.iter()).filter(|(a, b)| a != b).count();
            assert_eq!(apart, 0, "{}: of {} values", path.display(), found.len());
            files += 1;
        }
    }
    assert!(files > 30, "{files}");
}

#[test]
fn grey_stays_grey_and_the_orientation_is_told() {
    let grey = decode(Path::new("x"), &bytes("grey.jpg")).unwrap();
    assert!(grey.image.as_luma8().is_some() && grey.orientation == Orientation::NoTransforms);
    let turned = decode(Path::new("x"), &bytes("turned.jpg")).unwrap();
    assert_eq!((turned.orientation, turned.image.width()), (Orientation::Rotate90, 37));
}

#[test]
fn jpegs_that_are_cut_anywhere_are_refused() {
    for name in ["420.jpg", "420-progressive.jpg", "444-restarts.jpg", "grey-progressive.jpg", "ycck.jpg"] {
        let whole = bytes(name);
        for len in (1..whole.len() - 1).step_by(whole.len() / 40) {
            assert!(decode(Path::new("x"), &whole[..len]).is_err(), "{name}: {len} of {} bytes", whole.len());
        }
        let half = &whole[..whole.len() / 2];
        assert!(refusal(half).contains("cut short"), "{name}: {}", refusal(half));
        // As repairing tools leave them: the end marker is there, the data are not.
        let mended = [half, b"\xff\xd9"].concat();
        assert!(decode(Path::new("x"), &mended).is_err(), "{name}");
    }
}

#[test]
fn spoiled_pictures_are_told_by_what_they_are() {
    let whole = bytes("444.jpg");
    let mut lossless = whole.clone();
    let frame = whole.windows(2).position(|pair| pair == [0xFF, 0xC0]).unwrap();
    lossless[frame + 1] = 0xC3;
    let mut huge = whole.clone();
    huge[frame + 5..frame + 9].fill(0x7F);
    let mut flipped = whole.clone();
    let middle = whole.len() * 2 / 3;
    flipped[middle..middle + 40].fill(0xFF);
    for (bytes, part) in [
        (&b""[..], "the file is empty"),
        (b"<html></html>", "neither a PNG nor a JPEG"),
        (b"GIF89a\x01\0\x01\0", "GIF"),
        (b"RIFF\x10\0\0\0WEBPVP8 ", "WEBP"),
        (b"\xff\xd8\xff\xd9", "JPEG"),
        (&lossless, "SOF type 0xc3"),
        (&huge, "32639 by 32639"),
        (&flipped, "Corrupt JPEG data"),
    ] {
        let error = refusal(bytes);
        assert!(error.starts_with("cannot decode the image `x`: ") && error.contains(part), "{error}");
    }
}

#[test]
fn files_are_known_by_their_names() {
    for (path, expected) in [
        ("a/b.PNG", Kind::Picture),
        ("x.jpeg", Kind::Picture),
        ("./a/../x.jpeg", Kind::Picture),
        ("a/.b.png", Kind::Hidden),
        ("__MACOSX/a.png", Kind::Hidden),
        ("set/__MACOSX/a/._a.jpg", Kind::Hidden),
        ("a/.ipynb_checkpoints/a-checkpoint.png", Kind::Hidden),
        ("a/.cache/a.webp", Kind::Other),
        ("set\\@eaDir\\a.jpg", Kind::Hidden),
        ("$RECYCLE.BIN/a.jpg", Kind::Hidden),
        ("a.webp", Kind::Foreign),
        ("labels.txt", Kind::Other),
        ("png", Kind::Other),
    ] {
        assert_eq!(kind(path), expected, "{path}");
    }
}

#[test]
fn listings_are_sorted_and_tell_what_they_leave_out() {
    let dir = tempfile::tempdir().unwrap();
    for name in [
        "b/2.png",
        "a.png",
        "b/10.png",
        "c.JPG",
        "b/.ipynb_checkpoints/2-checkpoint.png",
        "lost+found/#77.jpg",
        "@eaDir/a.png/SYNOPHOTO_THUMB.jpg",
        "b/._2.png",
        ".git/config",
        "d.heic",
        "notes.txt",
    ] {
        let path = dir.path().join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, "").unwrap();
    }
    let listing = list(dir.path()).unwrap();
    let names: Vec<_> = listing.files.iter().map(|file| file.strip_prefix(dir.path()).unwrap()).collect();
    assert_eq!(names, ["a.png", "b/10.png", "b/2.png", "c.JPG"].map(Path::new));
    let LeftOut { hidden, foreign, other } = &listing.left_out;
    assert_eq!((hidden.count, foreign.count, other.count), (4, 1, 1));
    let line = listing.left_out.line(dir.path()).unwrap();
    assert!(line.contains("4 pictures that are hidden") && line.contains("d.heic`)"), "{line}");
    assert_eq!(LeftOut::default().line(dir.path()), None);
    // What is given by name is searched, whatever it is called.
    assert_eq!(list(&dir.path().join("lost+found")).unwrap().files.len(), 1);
    std::os::unix::fs::symlink(dir.path(), dir.path().join("b/loop")).unwrap();
    assert!(list(dir.path()).unwrap_err().to_string().contains("a link leads back"));
}
