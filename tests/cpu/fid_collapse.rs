//! Sets that are not as sets should be: collapsed, sorted by class, absurdly many.

use std::fs;

use models::classifier::Classifier;
use mudit_tests::draws::Draws;

use crate::fid_scene::{NETWORK, SIDE, fid, json, pixels, scene};
use crate::scene::Scene;

fn archive(scene: &Scene, name: &str, size: [usize; 3], images: &[u8]) {
    let count = images.len() / size.iter().product::<usize>();
    let mut archive = mudit::render::arrays::SampleArchive::create(&scene.path(name), count, size).unwrap();
    archive.push(images).unwrap();
    archive.finish(&vec![0; count]).unwrap();
}

#[test]
fn sets_of_equal_images_have_all_metrics_and_a_warning() {
    let scene = scene(300, 10);
    let len = SIDE * SIDE * 3;
    let own = pixels("one", 1, 0.9);
    let equal = own.repeat(60);
    let mut off = equal.clone();
    off[7 * len + 5] ^= 1;
    let mut each_off = equal.clone();
    (0..60).for_each(|i| each_off[i * len + i] ^= 1);
    let sets = [
        ("equal", equal),
        ("off", off),
        ("each-off", each_off),
        ("black", vec![0; 60 * len]),
        ("white", vec![255; 60 * len]),
        ("nearly-black", [vec![0; 59 * len + 1], vec![1], vec![0; len - 2]].concat()),
    ];
    fid(&scene, &format!("ref real.npz --out ref.npz {NETWORK}")).succeeds();
    let reference = mudit::fid::statistics::Statistics::read(&scene.path("ref.npz")).unwrap().pool;
    for (name, images) in sets {
        archive(&scene, &format!("{name}.npz"), [SIDE, SIDE, 3], &images);
        let made = fid(&scene, &format!("ref {name}.npz --out own-{name}.npz {NETWORK}")).succeeds();
        let own =
            mudit::fid::statistics::Statistics::read(&scene.path(&format!("own-{name}.npz"))).unwrap().pool;
        if !name.contains("off") && name != "nearly-black" {
            assert!(own.covariance.norm_max() == 0.0, "{name}: {}", own.covariance.norm_max());
            assert!(made.contains("warning: all reference images are (nearly) equal"), "{name}: {made}");
        }
        let apart: f64 = own.mean.iter().zip(&reference.mean).map(|(a, b)| (a - b) * (a - b)).sum();
        let wanted = apart + reference.spread();
        for (samples, real, side) in
            [(name, "ref", "all samples"), ("real", &*format!("own-{name}"), "all reference images")]
        {
            let line = format!("calc {samples}.npz --ref {real}.npz --out a.json {NETWORK}");
            let table = fid(&scene, &line).succeeds();
            assert!(table.contains(&format!("warning: {side} are (nearly) equal")), "{name}: {table}");
            let metrics = &json(&scene.path("a.json"))["metrics"];
            let found = metrics["fid"].as_f64().unwrap();
            // What varies a little adds at most twice the root of the product of the spreads.
            let room = 1e-9 * wanted + 2.0 * (own.spread() * reference.spread()).sqrt();
            assert!((found - wanted).abs() <= room, "{name}: {found} for {wanted}");
            assert!(
                metrics["manifold"]["precision"].is_f64() && metrics["kid"]["mean"].is_f64(),
                "{metrics}"
            );
        }
        // Against itself.
        fid(&scene, &format!("calc {name}.npz --ref own-{name}.npz --out b.json {NETWORK}")).succeeds();
        let own = &json(&scene.path("b.json"))["metrics"];
        assert!(own["fid"].as_f64().unwrap() < 1e-9 * wanted, "{name}: {own}");
        assert_eq!(own["manifold"]["precision"], 1.0, "{name}: {own}");
    }
}

#[test]
fn samples_sorted_by_class_are_warned_of() {
    let scene = scene(10, 10);
    let shape = Classifier { channels: 1, height: 28, width: 28, classes: 10 };
    let graph = shape.features(1).unwrap();
    let layout = train_engine::step::parameter_layout(graph.parameters()).unwrap();
    let mut arena = runtime::Arena::zeros(layout).unwrap();
    train_engine::mup::draw_parameters(&graph, 1, 3.0, &mut arena).unwrap();
    arena.write_safetensors(scene.path("net.safetensors"), &std::collections::BTreeMap::new()).unwrap();
    // Classes are patterns; the network has an answer of its own to each.
    let mut draws = Draws::named("patterns");
    let patterns: Vec<Vec<u8>> =
        (0..12).map(|_| (0..784).map(|_| draws.below(256) as u8).collect()).collect();
    let set = |name: &str, count: usize, class: &dyn Fn(usize) -> usize| {
        let images: Vec<u8> = (0..count).flat_map(|i| patterns[class(i)].iter().copied()).collect();
        archive(&scene, name, [28, 28, 1], &images);
    };
    set("real.npz", 60, &|i| i % 12);
    set("sorted.npz", 5400, &|i| i / 450);
    let network = "--preset fashion --network net.safetensors --offline --few";
    fid(&scene, &format!("ref real.npz --out ref.npz {network}")).succeeds();
    let table =
        |line: &str| fid(&scene, &format!("calc {line} --ref ref.npz --out a.json {network}")).succeeds();
    let sorted = table("sorted.npz");
    assert!(sorted.contains("sorted by class") && sorted.contains("IS unsplit"), "{sorted}");
    let metrics = json(&scene.path("a.json"));
    assert!(metrics["warnings"].to_string().contains("sorted by class"), "{metrics}");
    let shuffled = table("sorted.npz --is-splits torch-fidelity");
    assert!(!shuffled.contains("sorted by class") && shuffled.contains("IS unsplit"), "{shuffled}");
}

#[test]
fn the_first_images_of_sorted_folders_are_warned_of() {
    let scene = scene(30, 10);
    let all = pixels("classes", 60, 0.9);
    for (i, image) in all.chunks(SIDE * SIDE * 3).enumerate() {
        let path = scene.path(&format!("set/{}/{i:03}.png", ["a", "b", "c"][i / 20]));
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        image::RgbImage::from_raw(SIDE as u32, SIDE as u32, image.to_vec()).unwrap().save(path).unwrap();
    }
    fid(&scene, &format!("ref real.npz --out ref.npz {NETWORK}")).succeeds();
    let calc =
        |what: &str| fid(&scene, &format!("calc {what} --ref ref.npz --out a.json {NETWORK}")).succeeds();
    for (what, said) in [
        ("set -n 20", Some("1 of 3 folders")),
        ("set/a set/c real.npz -n 25", Some("2 of 3 folders")),
        ("set -n 41", None),
        ("set -n 20 --spread", None),
        ("set", None),
    ] {
        let table = calc(what);
        assert_eq!(table.contains("folders or files only"), said.is_some(), "{what}: {table}");
        assert!(said.is_none_or(|s| table.contains(s) && table.contains("--spread")), "{what}: {table}");
    }
    // Every third image, whatever they lie in.
    let hash = |what: &str| {
        calc(what);
        json(&scene.path("a.json"))["pixels_sha256"].clone()
    };
    archive(&scene, "set.npz", [SIDE, SIDE, 3], &all);
    assert_eq!(hash("set -n 20 --spread"), hash("set.npz -n 20 --spread"));
    assert_ne!(hash("set -n 20 --spread"), hash("set -n 20"));
    let kept = fid(&scene, &format!("ref set --keep 30 --out k.npz {NETWORK}")).succeeds();
    assert!(kept.contains("features of 30 images are kept, from 2 of 3 folders"), "{kept}");
}

#[test]
fn absurd_counts_are_refused_at_once() {
    let scene = scene(300, 300);
    fid(&scene, &format!("ref real.npz --out ref.npz {NETWORK}")).succeeds();
    for (line, parts) in [
        ("calc fake.npz --ref ref.npz -n 100000000000000", &["100000000000000", "100000000"][..]),
        ("calc fake.npz --ref ref.npz -n 0", &["--count", "1..=100000000"]),
        ("calc --checkpoint checkpoint --ref ref.npz -n 18446744073709551615", &["1..=100000000"]),
        ("calc fake.npz --ref ref.npz --batch 10000000000", &["--batch", "from 1 to 4096"]),
        ("calc fake.npz --ref ref.npz --batch 0", &["--batch", "from 1 to 4096"]),
        (
            "calc --checkpoint checkpoint -n 9 --ref ref.npz --sample-batch 99999999",
            &["--sample-batch", "4096"],
        ),
        ("calc fake.npz --shard 1/18446744073709551615", &["too few for 18446744073709551615 shards"]),
        ("calc noise:99999999999999,8,8,3 --ref ref.npz", &["99999999999999 samples", "100000000 at most"]),
        ("ref noise:90000000,8,8,3 --keep 90000000", &["--keep 90000000"]),
    ] {
        let done = fid(&scene, &format!("{line} {NETWORK}")).run();
        done.refuses(2, parts);
        assert!(done.seconds < 20.0, "{done}");
    }
}
