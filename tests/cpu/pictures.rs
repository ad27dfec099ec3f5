//! Folders of pictures as users have them: the same files and the same pixels for `train`, `data check` and `fid`.

use std::fs;

use mudit::fid::source::{self, OpenOptions};
use serde_json::Value;

use crate::scene::{Scene, fixture};

const CHECK: &str = "data check --offline --kind folder --image-size 8 --path";

/// A scene with a folder `set` of two classes of 4 JPEG files each.
fn scene() -> Scene {
    let scene = Scene::new();
    for class in ["cat", "dog"] {
        for number in 0..4 {
            scene.write(&format!("set/{class}/{number}.jpg"), jpeg("420.jpg"));
        }
    }
    scene
}

fn jpeg(name: &str) -> Vec<u8> {
    fs::read(fixture("jpeg-files", name)).unwrap()
}

/// What `fid` makes of a folder: its number of pictures and what it tells, or its error.
fn fid(scene: &Scene, folder: &str) -> Result<(u64, String), String> {
    let told = std::cell::RefCell::new(String::new());
    let folder = scene.path(folder).display().to_string();
    let mut source = source::open(&[folder], &OpenOptions::default(), &|line| {
        told.borrow_mut().push_str(line);
    })
    .map_err(|error| format!("{error:#}"))?;
    let all = 0..source.count();
    let read = source.pictures(all).try_for_each(|picture| picture.map(drop));
    read.map_err(|error| format!("{error:#}"))?;
    Ok((source.count(), told.into_inner()))
}

#[test]
fn damaged_pictures_are_refused_by_all_in_the_same_words() {
    let scene = scene();
    let (whole, progressive) = (jpeg("420.jpg"), jpeg("420-progressive.jpg"));
    let mut noisy = jpeg("444-restarts.jpg");
    let middle = noisy.len() / 2;
    noisy[middle..middle + 64].fill(0x55);
    let mut renamed = jpeg("grey.png");
    renamed.truncate(60);
    for (content, part) in [
        (&whole[..whole.len() / 2], "the JPEG file is cut short"),
        (&progressive[..progressive.len() - 2], "the JPEG file is cut short"),
        (&[&whole[..whole.len() / 2], b"\xff\xd9"].concat(), "premature end of data segment"),
        (&noisy, "Corrupt JPEG data"),
        (&renamed, "end"),
        (b"<!DOCTYPE html>", "neither a PNG nor a JPEG"),
        (b"RIFF\x10\0\0\0WEBPVP8 ", "of the format WEBP"),
        (b"", "the file is empty"),
    ] {
        scene.write("set/dog/2.jpg", content);
        let parts = ["cannot decode the image", "set/dog/2.jpg", part];
        scene.refuses(&format!("{CHECK} set"), 1, &parts);
        let error = fid(&scene, "set").unwrap_err();
        assert!(parts.iter().all(|part| error.contains(part)), "{error}");
        let train = "train --offline --config run.toml --set data.kind=folder --set data.path=set \
                     --set data.image_size=8 --set train.batch_size=8 --out";
        scene.mudit(&format!("{train} r")).run().refuses(1, &parts);
        fs::remove_dir_all(scene.path("r")).unwrap();
    }
}

#[test]
fn all_damaged_pictures_are_named_at_once() {
    let scene = scene();
    let half = jpeg("444.jpg");
    for name in ["cat/1", "dog/0", "dog/3"] {
        scene.write(&format!("set/{name}.jpg"), &half[..half.len() / 2]);
    }
    let parts = ["3 of 8 images cannot be used", "cat/1.jpg", "dog/0.jpg", "dog/3.jpg", "replace or remove"];
    scene.refuses(&format!("{CHECK} set"), 1, &parts);
    scene.refuses(&format!("{CHECK} set --json"), 1, &parts);
    for number in 0..150 {
        scene.write(&format!("set/dog/{number:03}.jpg"), &half[..half.len() / 2]);
    }
    scene.refuses(&format!("{CHECK} set"), 1, &["153 of 158 images", "and 53 more"]);
}

#[test]
fn hidden_and_system_directories_are_left_out_by_all_and_told() {
    for strange in [
        "cat/.ipynb_checkpoints/0-checkpoint.jpg",
        "cat/.thumbnails/large/0.jpg",
        ".Trash-1000/files/0.jpg",
        "lost+found/#12.jpg",
        "dog/@eaDir/0.jpg/SYNOPHOTO_THUMB_M.jpg",
        "__MACOSX/cat/0.jpg",
        "$RECYCLE.BIN/S-1/0.jpg",
        "System Volume Information/0.jpg",
        "dog/._0.jpg",
    ] {
        let scene = scene();
        scene.write(&format!("set/{strange}"), jpeg("rough.jpg"));
        let done = scene.mudit(&format!("{CHECK} set --json")).run();
        let found: Value = serde_json::from_str(&done.stdout).unwrap_or_else(|e| panic!("{e}: {done}"));
        assert_eq!((&found["images"], &found["classes"]), (&8.into(), &serde_json::json!(["cat", "dog"])));
        let line = "1 hidden picture (`";
        assert!(done.stderr.contains(line) && done.stderr.contains(strange), "{done}");
        let (count, told) = fid(&scene, "set").unwrap();
        assert!(count == 8 && told.contains(line) && told.contains(strange), "{count} {told}");
    }
}

#[test]
fn directories_within_classes_are_searched_and_parts_are_no_classes() {
    let scene = scene();
    scene.write("set/cat/more/a.jpg", jpeg("444.jpg"));
    scene.write("set/cat/more/b/a.jpg", jpeg("444.jpg"));
    scene.write("set/stray.jpg", jpeg("444.jpg"));
    scene.write("set/notes.txt", "x");
    let done = scene.mudit(&format!("{CHECK} set --json")).run();
    let found: Value = serde_json::from_str(&done.stdout).unwrap_or_else(|e| panic!("{e}: {done}"));
    assert_eq!(found["per_class"], serde_json::json!([6, 4]), "{done}");
    for part in
        ["2 images lie in sub-directories", "`set/cat`", "stray.jpg", "beside the classes", "notes.txt"]
    {
        assert!(done.stderr.contains(part), "{part}: {done}");
    }
    assert!(!done.stderr.contains("did you mean"), "{done}");

    for (parts, meant) in [
        (&["train"][..], "train"),
        (&["train", "val"], "train"),
        (&["Training", "Test"], "Training"),
        (&["val2017", "train2017"], "train2017"),
        (&["test", "valid", "photos"], "test"),
        (&["dev", "empty"], "dev"),
    ] {
        for part in parts {
            for class in ["cat", "dog"].into_iter().filter(|_| *part != "empty") {
                scene.write(&format!("above/{part}/{class}/1.jpg"), jpeg("444.jpg"));
            }
            fs::create_dir_all(scene.path(&format!("above/{part}"))).unwrap();
        }
        scene.refuses(&format!("{CHECK} above"), 1, &[&format!("did you mean `above/{meant}`?")]);
        scene.mudit(&format!("{CHECK} above/{meant}")).succeeds();
        fs::remove_dir_all(scene.path("above")).unwrap();
    }
    // A class may be called so, and classes may keep their images one level below.
    for (files, hint) in [
        (["train/1.jpg", "trains/1.jpg"], false),
        (["train/images/1.jpg", "plane/images/1.jpg"], false),
        (["night/cat/1.jpg", "day/dog/1.jpg"], true),
    ] {
        for file in files {
            scene.write(&format!("above/{file}"), jpeg("444.jpg"));
        }
        let done = scene.mudit(&format!("{CHECK} above")).run();
        assert_eq!((done.code, done.stderr.contains("did you mean")), (Some(0), hint), "{done}");
        fs::remove_dir_all(scene.path("above")).unwrap();
    }
}

#[test]
fn images_that_exif_turns_are_told_and_turned_on_demand() {
    let scene = scene();
    let check = |more: &str| scene.mudit(&format!("{CHECK} set --grid g{}.png {more}", more.len())).run();
    let plain = check("");
    assert!(plain.code == Some(0) && !plain.stderr.contains("EXIF"), "{plain}");
    for name in ["cat/1", "dog/2"] {
        scene.write(&format!("set/{name}.jpg"), jpeg("turned.jpg"));
    }
    let told = check("");
    assert!(told.stderr.contains("2 of the images have an orientation in their EXIF data"), "{told}");
    let turned = check("--orient apply");
    assert!(turned.code == Some(0) && turned.stderr.contains("are turned by it"), "{turned}");
    assert_ne!(fs::read(scene.path("g0.png")).unwrap(), fs::read(scene.path("g14.png")).unwrap());
    scene.refuses(&format!("{CHECK} set --orient on"), 2, &["expected off or apply"]);
}
