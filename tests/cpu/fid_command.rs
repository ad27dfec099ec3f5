//! `mudit fid` as a user runs it, with a small network of the user's own.

use std::fs;
use std::time::Duration;

use graph_builder::{Builder, Type, Weights};

use crate::fid_scene::{BATCH, NETWORK, SIDE, fid, images, json, pixels, scene};

#[test]
fn shards_in_any_form_give_the_numbers_of_one_pass() {
    let scene = scene(600, 1130);
    fid(&scene, &format!("ref real.npz --out ref.npz {NETWORK}")).succeeds();
    let table = fid(&scene, &format!("calc fake.npz --ref ref.npz --out one.json {NETWORK}")).succeeds();
    for word in ["FID", "precision", "recall", "KID", "1130 of fake.npz", "600 of ref.npz", "warning: 1130"] {
        assert!(table.contains(word), "{word}: {table}");
    }
    let shards: Vec<String> = (1..=4)
        .map(|k| {
            // Another batch and another number of threads must not show.
            let more = if k % 2 == 0 { "--batch 3 --threads 2" } else { "" };
            fid(&scene, &format!("calc fake.npz --shard {k}/4 --out s.json {NETWORK} {more}")).succeeds();
            format!("s.json.part-{k}-of-4")
        })
        .rev()
        .collect();
    let merge = format!("merge {} --ref ref.npz --few --network net.onnx --out many.json", shards.join(" "));
    fid(&scene, &merge).succeeds();
    let (one, many) = (json(&scene.path("one.json")), json(&scene.path("many.json")));
    assert_eq!(one["metrics"], many["metrics"]);
    assert_eq!(one["pixels_sha256"], many["pixels_sha256"]);
    assert!(one["metrics"]["fid"].as_f64().unwrap() > 0.01);
    // A reference in shards is the same file.
    for k in 1..=3 {
        fid(&scene, &format!("ref real.npz --shard {k}/3 --out sr.npz {NETWORK}")).succeeds();
    }
    let parts = "sr.npz.part-1-of-3 sr.npz.part-3-of-3 sr.npz.part-2-of-3";
    fid(&scene, &format!("merge {parts} --few --out sr.npz --remove-parts")).succeeds();
    assert!(fs::read(scene.path("sr.npz")).unwrap() == fs::read(scene.path("ref.npz")).unwrap());
    assert!(!scene.path("sr.npz.part-1-of-3").exists());
    // What one command cleans up, and what is left to the user.
    assert!(!scene.path("one.json.part").exists() && scene.path(&shards[0]).exists());

    scene.refuses(&format!("fid {}", merge.replace(&shards[2], "")), 1, &["250..500 are missing"]);
    scene.refuses(&format!("fid merge {} --few", shards.join(" ")), 2, &["--ref"]);
}

#[test]
fn the_same_images_in_any_container_are_the_same_set() {
    let scene = scene(40, 40);
    let picture = |i: usize| {
        let all = pixels("real.npz", 40, 1.0);
        let own = all[i * SIDE * SIDE * 3..][..SIDE * SIDE * 3].to_vec();
        let mut bytes = std::io::Cursor::new(Vec::new());
        let image = image::RgbImage::from_raw(SIDE as u32, SIDE as u32, own).unwrap();
        image.write_to(&mut bytes, image::ImageFormat::Png).unwrap();
        bytes.into_inner()
    };
    let mut zip = zip::ZipWriter::new(fs::File::create(scene.path("real.zip")).unwrap());
    let mut tar = tar::Builder::new(fs::File::create(scene.path("real.tar")).unwrap());
    for i in 0..40 {
        let (name, bytes) = (format!("{i:03}.png"), picture(i));
        scene.write(&format!("real/{name}"), &bytes);
        zip.start_file(&name, zip::write::SimpleFileOptions::default()).unwrap();
        std::io::Write::write_all(&mut zip, &bytes).unwrap();
        let mut header = tar::Header::new_gnu();
        header.set_size(bytes.len() as u64);
        tar.append_data(&mut header, &name, &bytes[..]).unwrap();
    }
    zip.finish().unwrap();
    tar.into_inner().unwrap();
    let hash = |input: &str| {
        let report = fid(&scene, &format!("ref {input} --out r.npz {NETWORK}")).json();
        (report["pixels_sha256"].clone(), report["sha256"].as_str().unwrap().len())
    };
    let first = hash("real.npz");
    for input in ["real", "real.zip", "real.tar", "-n 40 real.tar real.zip"] {
        assert_eq!(hash(input), first, "{input}");
    }
}

#[test]
fn a_killed_run_goes_on_and_ends_with_the_same_number() {
    let scene = scene(300, 3000);
    fid(&scene, &format!("ref real.npz --out ref.npz {NETWORK}")).succeeds();
    let calc = |out: &str| fid(&scene, &format!("calc fake.npz --ref ref.npz --out {out}.json {NETWORK}"));
    calc("straight").succeeds();
    for signal in [libc::SIGKILL, libc::SIGTERM] {
        let out = format!("killed-{signal}");
        let running = calc(&out).start();
        let begun = scene.path(&format!("{out}.json.part/logits.f32"));
        running.until(Duration::from_millis(1), || begun.exists());
        running.signal(signal);
        let done = running.wait();
        // A signal may come when all is done; then there is nothing to prove.
        if done.code != Some(0) {
            assert!(!scene.path(&format!("{out}.json")).exists(), "{done}");
            calc(&out).succeeds();
        }
        let (a, b) = (json(&scene.path("straight.json")), json(&scene.path(&format!("{out}.json"))));
        assert_eq!(a["metrics"], b["metrics"]);
    }
}

#[test]
fn results_are_verified_and_compared_only_when_alike() {
    let scene = scene(300, 400);
    images(&scene, "other.npz", 400, 0.5);
    images(&scene, "more.npz", 401, 0.5);
    fid(&scene, &format!("ref real.npz --out ref.npz {NETWORK}")).succeeds();
    for (input, out) in [("fake", "a"), ("other", "b"), ("more", "c")] {
        fid(&scene, &format!("calc {input}.npz --ref ref.npz --out {out}.json {NETWORK}")).succeeds();
    }
    let table = fid(&scene, "compare a.json b.json").succeeds();
    assert!(table.contains("fake.npz") && table.contains("other.npz") && table.contains("FID"), "{table}");
    scene.refuses(
        "fid compare a.json b.json c.json",
        1,
        &["must not be compared", "a.json and c.json", "400 against 401"],
    );
    scene.refuses("fid compare a.json", 2, &["two results"]);
    scene.refuses("fid compare a.json run.toml", 1, &["run.toml", "no result"]);

    let said = fid(&scene, "verify a.json --offline").succeeds();
    assert!(said.contains("the same") && !said.contains("DIFFERS"), "{said}");
    // A number that somebody improved.
    let text = fs::read_to_string(scene.path("a.json")).unwrap();
    let fid_value = json(&scene.path("a.json"))["metrics"]["fid"].to_string();
    scene.write("better.json", text.replace(&fid_value, "0.001"));
    let done = fid(&scene, "verify better.json --offline").run();
    done.refuses(1, &["better.json is not confirmed", "the images are the same"]);
    assert!(done.stdout.contains("DIFFERS"), "{done}");
    // Images that somebody changed.
    images(&scene, "fake.npz", 400, 0.81);
    fid(&scene, "verify a.json --offline").run().refuses(1, &["the images are not the same"]);
    images(&scene, "fake.npz", 399, 0.8);
    fid(&scene, "verify a.json --offline").run().refuses(1, &["399 images now"]);
}

#[test]
fn a_checkpoint_is_sampled_the_same_in_shards() {
    let scene = scene(300, 10);
    // A model of grey images, 8 by 8, of the scene's own data.
    scene.mudit("train --offline --config run.toml --set objective.kind=flow --out run").succeeds();
    let b = Builder::new("features");
    let x = b.input("images", Type::f32([BATCH, 1, SIDE, SIDE]));
    b.output("features", (x.reshape([BATCH, 16, 4]).mean(&[2]) * b.scalar(2.0)).tanh().reshape([BATCH, 16]));
    let program = b.finish().unwrap().optimised().unwrap().emit(Weights::Inputs).unwrap();
    scene.write("net.onnx", program.bytes);
    fid(&scene, &format!("ref noise:300,8,8,1 --out ref.npz {NETWORK}")).succeeds();
    let sampled = format!("calc --checkpoint run -n 510 --steps 2 --cfg 2 --sample-batch 40 {NETWORK}");
    fid(&scene, &format!("{sampled} --ref ref.npz --out one.json")).succeeds();
    for k in 1..=2 {
        fid(&scene, &format!("{sampled} --shard {k}/2 --work part-{k}")).succeeds();
    }
    fid(&scene, "merge part-1 part-2 --ref ref.npz --few --out two.json --network net.onnx").succeeds();
    let (one, two) = (json(&scene.path("one.json")), json(&scene.path("two.json")));
    assert_eq!((&one["metrics"], &one["pixels_sha256"]), (&two["metrics"], &two["pixels_sha256"]));
    let recipe = &one["samples"]["images"];
    assert_eq!((recipe["sampler"].as_str(), recipe["steps"].as_str()), (Some("euler"), Some("2")));
    assert_eq!(recipe["weights_sha256"].as_str().unwrap().len(), 64);
    fid(&scene, "verify two.json --offline").succeeds();
    scene.refuses(&format!("fid calc --checkpoint run --ref ref.npz {NETWORK}"), 2, &["-n"]);
    scene.refuses(
        &format!("fid calc --checkpoint checkpoint -n 10 --steps 2 --ref ref.npz {NETWORK}"),
        1,
        &["4 channels", "latents"],
    );
}

#[test]
fn sets_that_cannot_be_judged_are_refused_in_words() {
    let scene = scene(30, 30);
    let plain = "--offline --network net.onnx";
    fid(&scene, &format!("ref real.npz --out ref.npz {NETWORK}")).succeeds();
    scene.refuses(
        &format!("fid ref real.npz --out x.npz {plain}"),
        2,
        &["30 reference images", "2048", "--few"],
    );
    scene.refuses(&format!("fid calc fake.npz --ref ref.npz {plain}"), 2, &["30 samples", "--few"]);
    scene.refuses(&format!("fid calc --ref ref.npz {NETWORK}"), 2, &["no images"]);
    scene.refuses(&format!("fid calc absent.npz --ref ref.npz {NETWORK}"), 2, &["`absent.npz` is no file"]);
    scene.refuses(
        &format!("fid calc fake.npz --ref real.npz {NETWORK}"),
        1,
        &["real.npz", "`mudit fid ref`"],
    );
    scene.refuses(&format!("fid calc -n 31 fake.npz --ref ref.npz {NETWORK}"), 2, &["31", "30"]);
    scene.refuses(&format!("fid calc fake.npz --ref ref.npz --shard 5/4 {NETWORK}"), 2, &["--shard"]);
    scene.refuses(&format!("fid calc fake.npz --shard 1/4 {NETWORK}"), 2, &["too few for 4 shards"]);
    // Images of two sizes: named, unless they are allowed.
    for (i, side) in [8, 8, 9, 8].into_iter().enumerate() {
        fs::create_dir_all(scene.path("mixed")).unwrap();
        image::RgbImage::new(side, 8).save(scene.path(&format!("mixed/{i}.png"))).unwrap();
    }
    let done = fid(&scene, &format!("ref mixed --out m.npz {NETWORK}")).run();
    done.refuses(1, &["mixed/2.png", "8 by 9", "--mixed-sizes"]);
    // Statistics of another network.
    let other = scene.path("ref.npz");
    let mut statistics = mudit::fid::statistics::Statistics::read(&other).unwrap();
    statistics.about.as_mut().unwrap().plan.network.weights_sha256 = "0".into();
    statistics.write(&scene.path("foreign.npz")).unwrap();
    scene.refuses(
        &format!("fid calc fake.npz --ref foreign.npz {NETWORK}"),
        1,
        &["another network", "weights"],
    );
}

#[test]
fn statistics_files_of_other_tools_are_compared_and_used() {
    let scene = scene(40, 50);
    fid(&scene, &format!("ref real.npz --out ref.npz {NETWORK}")).succeeds();
    let mut statistics = mudit::fid::statistics::Statistics::read(&scene.path("ref.npz")).unwrap();
    // pytorch-fid's files have mu and sigma only.
    (statistics.about, statistics.features) = (None, Vec::new());
    statistics.write(&scene.path("plain.npz")).unwrap();
    statistics.pool.mean[0] += 0.5;
    statistics.write(&scene.path("moved.npz")).unwrap();
    let found = fid(&scene, "calc moved.npz --ref plain.npz --out d.json").json();
    assert!((found["metrics"]["fid"].as_f64().unwrap() - 0.25).abs() < 1e-9, "{found}");
    let table = fid(&scene, &format!("calc fake.npz --ref plain.npz --out p.json {NETWORK}")).succeeds();
    assert!(table.contains("no precision") && !table.contains("\nKID"), "{table}");
    let whole = fid(&scene, &format!("calc fake.npz --ref ref.npz --out w.json {NETWORK}")).json();
    assert_eq!(json(&scene.path("p.json"))["metrics"]["fid"], whole["metrics"]["fid"]);
}
