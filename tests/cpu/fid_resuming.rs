//! Images that change under an unfinished run: never are features of old and new ones put together.

use std::fs::{self, File};
use std::path::Path;

use image::RgbImage;
use serde_json::Value;
use zip::CompressionMethod;

use crate::fid_inputs::{npy, zipped};
use crate::fid_scene::{NETWORK, SIDE, fid, json, pixels, scene};
use crate::scene::Scene;

/// Images of a set: two blocks and a rest.
const COUNT: usize = 560;
/// The one that cannot be read.
const BROKEN: usize = 520;

fn picture(name: &str, index: usize) -> RgbImage {
    let all = pixels(name, COUNT, 0.7);
    let len = SIDE * SIDE * 3;
    RgbImage::from_raw(SIDE as u32, SIDE as u32, all[index * len..][..len].to_vec()).unwrap()
}

fn file(folder: &Path, index: usize) -> std::path::PathBuf {
    folder.join(format!("{index:05}.png"))
}

fn fill(folder: &Path, name: &str) {
    fs::create_dir_all(folder).unwrap();
    let all = pixels(name, COUNT, 0.7);
    for (index, image) in all.chunks(SIDE * SIDE * 3).enumerate() {
        let image = RgbImage::from_raw(SIDE as u32, SIDE as u32, image.to_vec()).unwrap();
        image.save(file(folder, index)).unwrap();
    }
}

/// A scene with a reference and with a folder `set` that has a broken picture in its last block.
fn unfinished() -> Scene {
    let scene = scene(300, 10);
    fid(&scene, &format!("ref real.npz --out ref.npz {NETWORK}")).succeeds();
    fill(&scene.path("set"), "old");
    fs::write(file(&scene.path("set"), BROKEN), "spoiled").unwrap();
    scene
}

fn numbers(path: &Path) -> [Value; 2] {
    let result = json(path);
    [result["metrics"].clone(), result["pixels_sha256"].clone()]
}

#[test]
fn a_set_that_changes_under_an_unfinished_run_is_begun_anew() {
    let scene = unfinished();
    let calc = |set: &str, out: &str| fid(&scene, &format!("calc {set} --ref ref.npz --out {out} {NETWORK}"));
    let set = scene.path("set");
    let mended = || picture("old", BROKEN).save(file(&set, BROKEN)).unwrap();
    // What is done to the set between the two runs, what the second one is given, and what it says.
    let cases: [(&str, &dyn Fn(), &str, &str); 9] = [
        ("the broken one is mended", &mended, "set", "going on after 500"),
        (
            "the broken one is removed",
            &|| fs::remove_file(file(&set, BROKEN)).unwrap(),
            "set",
            "going on after 500",
        ),
        (
            "all are others",
            &|| fill(&set, "new"),
            "set",
            "the images have changed since `a.json.part` was begun (first in images 0..250): starting anew",
        ),
        (
            "one that is done is another",
            &|| {
                mended();
                picture("new", 300).save(file(&set, 300)).unwrap();
            },
            "set",
            "(first in images 250..500): starting anew",
        ),
        (
            "and as old as the one before",
            &|| {
                mended();
                let path = file(&set, 7);
                let time = fs::metadata(&path).unwrap().modified().unwrap();
                let length = fs::metadata(&path).unwrap().len();
                picture("new", 7).save(&path).unwrap();
                let touched = File::options().append(true).open(&path).unwrap();
                // Bytes behind the end of a picture are of no matter.
                touched.set_len(length.max(touched.metadata().unwrap().len())).unwrap();
                touched.set_modified(time).unwrap();
            },
            "set",
            "starting anew",
        ),
        (
            "one that is done is removed",
            &|| {
                mended();
                fs::remove_file(file(&set, 0)).unwrap();
            },
            "set",
            "starting anew",
        ),
        ("they are written again as they were", &|| fill(&set, "old"), "set", "comparing the images 0..500"),
        (
            "they are moved",
            &|| {
                mended();
                fs::rename(&set, scene.path("moved")).unwrap();
            },
            "moved",
            "going on after 500",
        ),
        (
            "some are left out",
            &|| {
                for index in 500..COUNT {
                    fs::remove_file(file(&set, index)).unwrap();
                }
            },
            "set",
            "going on after 500",
        ),
    ];
    for (what, change, given, said) in cases {
        let first = calc("set", "a.json").run();
        first.refuses(1, &["00520.png"]);
        assert!(
            first.stderr.contains("features of 500 of 560 images are kept in a.json.part"),
            "{what}: {first}"
        );
        change();
        let second = calc(given, "a.json").run();
        assert!(second.code == Some(0) && second.stderr.contains(said), "{what}: {second}");
        let again = second.stderr.contains("starting anew");
        assert_eq!(again, said.contains("anew"), "{what}: {second}");
        calc(given, "b.json").succeeds();
        assert_eq!(numbers(&scene.path("a.json")), numbers(&scene.path("b.json")), "{what}");
        let _ = fs::remove_dir_all(scene.path("moved"));
        let _ = fs::remove_dir_all(&set);
        fill(&set, "old");
        fs::write(file(&set, BROKEN), "spoiled").unwrap();
    }
    // Features of a set that is still there are not thrown away for another one.
    calc("set", "a.json").run().refuses(1, &["00520.png"]);
    fill(&scene.path("other"), "new");
    scene.refuses(
        &format!("fid calc other --ref ref.npz --out a.json {NETWORK}"),
        1,
        &["a.json.part", "something else", "other", "--work"],
    );
    // A reference, whose set is an array with a value that is none.
    let array = |name: &str, broken: bool| {
        let mut values: Vec<f32> = pixels(name, COUNT, 0.7).into_iter().map(f32::from).collect();
        if broken {
            values[BROKEN * SIDE * SIDE * 3] = f32::NAN;
        }
        let data: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
        let shape = format!("({COUNT}, {SIDE}, {SIDE}, 3)");
        scene
            .write("x.npz", zipped(&[("arr_0.npy", npy("<f4", &shape, &data))], CompressionMethod::Deflated));
    };
    let reference = |out: &str| fid(&scene, &format!("ref x.npz --out {out} {NETWORK}"));
    for (name, said) in [("old", "going on after 500"), ("new", "starting anew")] {
        array("old", true);
        reference("r.npz").run().refuses(1, &["image 520", "NaN"]);
        array(name, false);
        let second = reference("r.npz").run();
        assert!(second.code == Some(0) && second.stderr.contains(said), "{second}");
        reference("s.npz").succeeds();
        assert!(fs::read(scene.path("r.npz")).unwrap() == fs::read(scene.path("s.npz")).unwrap());
    }
}

#[test]
fn shards_of_different_states_of_a_set_are_not_merged() {
    let scene = unfinished();
    let set = scene.path("set");
    fill(&set, "old");
    let shard = |set: &str, k: usize| {
        fid(&scene, &format!("calc {set} --shard {k}/2 --work part-{k} {NETWORK}")).succeeds();
    };
    let merge = "fid merge part-1 part-2 --ref ref.npz --few --network net.onnx --out m.json";
    shard("set", 1);
    fill(&set, "new");
    shard("set", 2);
    scene.refuses(merge, 1, &["part-2", "images were others", "run the commands of both again"]);
    shard("set", 1);
    scene.mudit(merge).succeeds();
    fid(&scene, &format!("calc set --ref ref.npz --out one.json {NETWORK}")).succeeds();
    assert_eq!(numbers(&scene.path("m.json")), numbers(&scene.path("one.json")));
    // One picture of a shard that is still to be done: the other shard is kept, once its command has looked.
    fs::remove_dir_all(scene.path("part-2")).unwrap();
    picture("old", 520).save(file(&set, 520)).unwrap();
    shard("set", 2);
    scene.refuses(merge, 1, &["images were others"]);
    let again = fid(&scene, &format!("calc set --shard 1/2 --work part-1 {NETWORK}")).run();
    assert!(again.code == Some(0) && !again.stderr.contains("anew"), "{again}");
    scene.mudit(merge).succeeds();
    // The same images in another place, as on another machine.
    fs::create_dir(scene.path("copy")).unwrap();
    for entry in fs::read_dir(&set).unwrap() {
        let path = entry.unwrap().path();
        fs::copy(&path, scene.path("copy").join(path.file_name().unwrap())).unwrap();
    }
    fs::remove_dir_all(scene.path("part-2")).unwrap();
    shard("copy", 2);
    scene.mudit(merge).succeeds();
    fid(&scene, &format!("calc copy --ref ref.npz --out two.json {NETWORK}")).succeeds();
    assert_eq!(numbers(&scene.path("m.json")), numbers(&scene.path("two.json")));
}

#[test]
fn what_never_began_leaves_nothing() {
    let scene = unfinished();
    let set = scene.path("set");
    fs::write(file(&set, 3), "spoiled").unwrap();
    scene.refuses(&format!("fid ref set --out r.npz {NETWORK}"), 1, &["00003.png"]);
    // More features than can be summed are seen before a part is begun.
    for features in [8193, 3 * 72 * 72] {
        let b = graph_builder::Builder::new("wide");
        let x = b.input("images", graph_builder::Type::f32([1, 1, 72, features / 72 + 1]));
        let flat = x.reshape([1, 72 * (features / 72 + 1)]);
        b.output("features", flat * b.scalar(1.0));
        let program = b.finish().unwrap().optimised().unwrap().emit(graph_builder::Weights::Inputs).unwrap();
        scene.write("wide.onnx", program.bytes);
        scene.refuses(
            "fid ref real.npz --out r.npz --few --offline --network wide.onnx",
            1,
            &["`features` of wide.onnx", "8192"],
        );
    }
    // A part without features is anybody's.
    fs::create_dir(scene.path("r.npz.part")).unwrap();
    scene.write("r.npz.part/plan.json", "{}");
    fid(&scene, &format!("ref real.npz --out r.npz {NETWORK}")).succeeds();
}
