//! Arrays as other tools write them: read right, or refused with what to do.

use std::fs;

use zip::CompressionMethod;

use crate::fid_inputs::{npy, zipped};
use crate::fid_scene::{NETWORK, SIDE, fid, json, pixels, scene};
use crate::scene::Scene;

/// Images of each array.
const COUNT: usize = 60;

fn bytes_of(values: impl IntoIterator<Item = f32>) -> Vec<u8> {
    values.into_iter().flat_map(f32::to_le_bytes).collect()
}

/// The same array with the other order of its axes in its header.
fn by_columns(npy: &[u8]) -> Vec<u8> {
    let place = npy.windows(5).position(|w| w == b"False").unwrap();
    [&npy[..place], b"True ", &npy[place + 5..]].concat()
}

fn write(scene: &Scene, name: &str, arrays: &[(&str, Vec<u8>)]) {
    scene.write(name, zipped(arrays, CompressionMethod::Deflated));
}

#[test]
fn pixels_of_another_scale_are_refused_and_taken_when_it_is_said() {
    let scene = scene(300, 10);
    fid(&scene, &format!("ref real.npz --out ref.npz {NETWORK}")).succeeds();
    let plain = pixels("scaled", COUNT, 0.8);
    let shape = format!("({COUNT}, {SIDE}, {SIDE}, 3)");
    let unit = || plain.iter().map(|b| f32::from(*b) / 255.0);
    let doubles: Vec<u8> = unit().flat_map(|v| f64::from(v).to_le_bytes()).collect();
    let dark_first = || unit().enumerate().map(|(i, v)| if i < 20 * SIDE * SIDE * 3 { 0.0 } else { v });
    scene.write("bytes.npy", npy("|u1", &shape, &plain));
    scene.write("unit.npy", npy("<f4", &shape, &bytes_of(unit())));
    write(&scene, "unit.npz", &[("arr_0.npy", npy("<f4", &shape, &bytes_of(unit())))]);
    write(&scene, "double.npz", &[("arr_0.npy", npy("<f8", &shape, &doubles))]);
    write(&scene, "dark.npz", &[("arr_0.npy", npy("<f4", &shape, &bytes_of(dark_first())))]);
    let signed = bytes_of(unit().map(|v| 2.0 * v - 1.0));
    write(&scene, "signed.npz", &[("arr_0.npy", npy("<f4", &shape, &signed))]);
    let ones: Vec<u8> = plain.iter().map(|b| b / 128).collect();
    write(&scene, "ones.npz", &[("arr_0.npy", npy("|u1", &shape, &ones))]);
    let calc = |input: &str| format!("fid calc {input} --ref ref.npz --out a.json {NETWORK}");
    let metric = |input: &str| {
        scene.mudit(&calc(input)).succeeds();
        json(&scene.path("a.json"))["metrics"]["fid"].as_f64().unwrap()
    };
    let wanted = metric("bytes.npy");
    for (file, scale) in [
        ("unit.npz", "unit"),
        ("unit.npy", "unit"),
        ("double.npz", "unit"),
        ("dark.npz", "unit"),
        ("signed.npz", "signed"),
        ("ones.npz", "unit"),
    ] {
        let said = format!("`--scale {scale}`");
        scene.refuses(&calc(file), 2, &[file, &said, "`--scale bytes`"]);
        scene.refuses(&format!("fid ref {file} --out r.npz {NETWORK}"), 2, &[file, &said]);
        // Behind an array that is right.
        scene.refuses(&calc(&format!("bytes.npy {file}")), 2, &[file, &said]);
        let found = metric(&format!("{file} --scale {scale}"));
        let same = !["ones.npz", "dark.npz"].contains(&file);
        assert!(!same || (found - wanted).abs() < 1e-5 * wanted, "{file}: {found} for {wanted}");
    }
    assert_eq!(json(&scene.path("a.json"))["samples"]["images"]["scale"], "unit");
    fid(&scene, "verify a.json --offline").succeeds();
    assert!(metric("unit.npz --scale bytes") > 2.0 * wanted, "nearly black, as it was said");
    scene.refuses(&calc("signed.npz --scale unit"), 2, &["signed.npz: image 0", "from 0 to 1"]);
    scene.refuses(&calc("bytes.npy --scale signed"), 2, &["bytes.npy: image 0", "from -1 to 1"]);
    scene.refuses(&calc("fashion-mnist:test --scale unit"), 2, &["--scale", ".npz"]);
}

#[test]
fn statistics_in_any_order_and_with_axes_of_one_are_read() {
    let scene = scene(40, 50);
    fid(&scene, &format!("ref real.npz --out ref.npz {NETWORK}")).succeeds();
    let statistics = mudit::fid::statistics::Statistics::read(&scene.path("ref.npz")).unwrap();
    let n = statistics.pool.mean.len();
    let doubles = |v: &[f64]| -> Vec<u8> { v.iter().flat_map(|x| x.to_le_bytes()).collect() };
    let mean = doubles(&statistics.pool.mean);
    let rows: Vec<f64> = (0..n * n).map(|i| statistics.pool.covariance[(i / n, i % n)]).collect();
    let covariance = |shape: &str| npy("<f8", shape, &doubles(&rows));
    let (flat, square) = (format!("({n},)"), format!("({n}, {n})"));
    for (name, mu, sigma) in [
        ("columns", npy("<f8", &flat, &mean), by_columns(&covariance(&square))),
        ("row", npy("<f8", &format!("(1, {n})"), &mean), covariance(&square)),
        (
            "column",
            by_columns(&npy("<f8", &format!("({n}, 1)"), &mean)),
            covariance(&format!("(1, {n}, {n})")),
        ),
    ] {
        let file = format!("{name}.npz");
        write(&scene, &file, &[("mu.npy", mu), ("sigma.npy", sigma)]);
        let found = fid(&scene, &format!("calc {file} --ref ref.npz --out d.json")).json();
        assert!(found["metrics"]["fid"].as_f64().unwrap().abs() < 1e-12, "{name}: {found}");
    }
}

#[test]
fn what_is_stored_otherwise_is_refused_with_what_to_do() {
    let scene = scene(30, 30);
    fid(&scene, &format!("ref real.npz --out ref.npz {NETWORK}")).succeeds();
    let zeros = |shape: &str, count: usize| npy("|u1", shape, &vec![9; count]);
    let floats = |shape: &str, count: usize| npy("<f8", shape, &vec![0; 8 * count]);
    write(&scene, "first.npz", &[("arr_0.npy", zeros("(4, 3, 8, 8)", 768))]);
    write(&scene, "grey.npz", &[("arr_0.npy", zeros("(4, 8, 8)", 256))]);
    write(&scene, "alpha.npz", &[("arr_0.npy", zeros("(4, 8, 8, 4)", 1024))]);
    write(&scene, "columns.npz", &[("arr_0.npy", by_columns(&zeros("(4, 8, 8, 3)", 768)))]);
    write(&scene, "long.npz", &[("arr_0.npy", npy("<i8", "(1, 8, 8, 3)", &[0; 1536]))]);
    write(&scene, "other.npz", &[("m.npy", floats("(12,)", 12)), ("s.npy", floats("(12, 12)", 144))]);
    write(&scene, "named.npz", &[("images.npy", zeros("(4, 8, 8, 3)", 768))]);
    scene.write("columns.npy", by_columns(&zeros("(4, 8, 8, 3)", 768)));
    scene.write("list.pkl", b"\x80\x04\x95");
    scene.write("pickle.npz", b"\x80\x04\x95\x01\x00\x00\x00");
    fs::create_dir(scene.path("folder")).unwrap();
    for (input, code, parts) in [
        ("first.npz", 1, &["first.npz", "(N, C, H, W)", "transpose(0, 2, 3, 1)"][..]),
        ("grey.npz", 1, &["expected (N, H, W, C)", "x[..., None]"]),
        ("alpha.npz", 1, &["4 channels", "x[..., :3]"]),
        ("columns.npz", 1, &["Fortran order", "numpy.ascontiguousarray"]),
        ("columns.npy", 1, &["columns.npy", "numpy.ascontiguousarray"]),
        ("long.npz", 1, &["`<i8`", "x.astype(numpy.uint8)"]),
        ("other.npz", 1, &["m.npy, s.npy", "`arr_0` (N, H, W, C)", "`mu` (D) and `sigma` (D, D)"]),
        ("named.npz", 1, &["images.npy", "`arr_0`", "`mu`"]),
        ("pickle.npz", 1, &["it is a pickle", "numpy.savez"]),
        ("list.pkl", 2, &["a pickle", "numpy.savez"]),
    ] {
        scene.refuses(&format!("fid calc {input} --ref ref.npz {NETWORK}"), code, parts);
    }
    for (reference, code, parts) in [
        ("folder", 2, &["folder is a folder", "mudit fid ref folder"][..]),
        ("list.pkl", 2, &["pickle", "mu=mu, sigma=sigma"]),
        ("columns.npy", 2, &["a file of images", "mudit fid ref"]),
        ("other.npz", 1, &["m.npy, s.npy", "`arr_0`", "`mu` (D) and `sigma` (D, D)"]),
        ("real.npz", 1, &["images only", "`mudit fid ref`"]),
    ] {
        scene.refuses(&format!("fid calc fake.npz --ref {reference} {NETWORK}"), code, parts);
    }
    // Two arrays of images: one is read, and the other one is spoken of.
    let (one, two) = (zeros("(4, 8, 8, 3)", 768), zeros("(5, 8, 8, 3)", 960));
    write(&scene, "two.npz", &[("arr_0.npy", one), ("arr_1.npy", two), ("labels.npy", zeros("(4,)", 4))]);
    let table = fid(&scene, &format!("calc two.npz --ref ref.npz --out t.json {NETWORK}")).succeeds();
    assert!(table.contains("warning: two.npz: only `arr_0` is read; `arr_1` [5, 8, 8, 3]"), "{table}");
    assert!(!table.contains("labels"), "{table}");
}
