//! Wrong usage and wrong configurations: exit code 2, one message that names what is wrong and what would be right,
//! and every file as it was.

use std::fs;

use runtime::HostTensor;

use crate::process::mudit;
use crate::scene::Scene;

#[test]
fn the_command_line_is_checked() {
    let scene = Scene::new();
    for (line, parts) in [
        ("trian", &["unrecognized subcommand 'trian'", "train"][..]),
        ("train --out r --confg run.toml", &["--confg", "--config"]),
        ("train --config run.toml", &["--out"]),
        ("train --out r", &["no configuration", "--config FILE.toml", "r/config.toml"]),
        ("inspect", &["MODEL"]),
        ("inspect DiT-S/2 --program denois", &["denois", "denoise"]),
        ("inspect DiT-S/2 --program step --cfg-channels few", &["few", "`all` or `off`"]),
        ("sample --checkpoint checkpoint --sampler ddin", &["ddin", "ddim"]),
        ("sample --checkpoint checkpoint --steps many", &["many"]),
        ("sample --checkpoint checkpoint --noise f --seed 1", &["--noise", "--seed"]),
        ("build-engine --model DiT-S/2 --program loss --out e --precision f8", &["f8", "f16"]),
        (
            "build-engine --model DiT-S/2 --program loss --out e --batch 1 --buckets 2",
            &["--batch", "--buckets"],
        ),
        ("build-engine --model DiT-S/2 --program denoise --out e", &["denoise carries", "--weights"]),
        ("data check --kind mnist", &["mnist", "fashion-mnist, idx, folder or latents"]),
        ("quickstart --minutes 0", &["--minutes must be above 0"]),
        ("quickstart --minutes NaN", &["--minutes must be above 0"]),
    ] {
        scene.refuses(line, 2, parts);
    }
    assert!(mudit(["--help"]).succeeds().contains("quickstart"));
    assert!(mudit(["train", "--help"]).succeeds().contains("--config"));
    assert!(mudit(["--version"]).succeeds().starts_with("mudit "));
}

#[test]
fn absurd_numbers_are_refused_at_once() {
    let scene = Scene::new();
    let sample = "sample --offline --checkpoint checkpoint --out x.npz";
    for huge in ["100000000000000", "18446744073709551615", "99999999999999999999999", "-1"] {
        for line in [
            format!("{sample} --threads={huge}"),
            format!("{sample} --count={huge}"),
            format!("{sample} --batch={huge}"),
            format!("{sample} --steps={huge}"),
            format!("build-engine --model DiT-S/2 --program loss --out e --batch={huge}"),
            format!("build-engine --model DiT-S/2 --program loss --out e --buckets=1,{huge}"),
            format!("inspect DiT-S/2 --program loss --batch={huge}"),
            format!("sweep plan --config s.toml --out s --workers={huge}"),
            format!("data check --kind idx --path data --rows={huge}"),
            format!("coord-check --steps={huge}"),
            format!("train --config run.toml --out r --set data.workers={huge}"),
            format!("train --config run.toml --out r --set train.threads={huge}"),
        ] {
            let done = scene.mudit(&line).run();
            assert!(done.code == Some(2) && done.seconds < 20.0 && !scene.path("r").exists(), "{done}");
            assert!(done.stderr.contains(huge), "{done}");
        }
        for threads in [huge, "100000", "4294967296"] {
            let done = scene.mudit(&format!("{sample} --count 1")).env("MUDIT_THREADS", threads).run();
            assert!(done.code == Some(2) && done.stderr.contains(threads), "{done}");
        }
    }
    // Allowed, and too much for any machine.
    scene.refuses(&format!("{sample} --count 999999999"), 1, &["no memory for 999999999 images", "--first"]);
    scene.refuses(&format!("{sample} --first 18446744073709551615"), 2, &["--first"]);
}

#[test]
fn an_empty_variable_is_none() {
    let scene = Scene::new();
    let done = scene
        .mudit("sample --offline --checkpoint checkpoint --steps 2 --count 1 --out x.npz")
        .env("MUDIT_THREADS", "")
        .env("MUDIT_PROVIDER", "")
        .run();
    assert_eq!(done.code, Some(0), "{done}");
    let done = scene.mudit("train --offline --config run.toml --out r").env("MUDIT_PROVIDER", "").run();
    assert_eq!(done.code, Some(0), "{done}");
    let done = scene.mudit("doctor").env("MUDIT_CACHE", "").env("ORT_DYLIB_PATH", "").run();
    assert!(done.stdout.contains("cache directory"), "{done}");
}

#[test]
fn keys_and_values_of_a_run_are_checked() {
    let scene = Scene::new();
    scene.write("unknown.toml", "[train]\nlerning_rate = 1e-3\n");
    scene.write("section.toml", "[trian]\nsteps = 3\n");
    scene.write("type.toml", "[train]\nsteps = \"ten\"\n");
    scene.write("syntax.toml", "[train]\nsteps = \n");
    scene.write("preset.toml", "[model]\npreset = \"DiT-SX/2\"\n[data]\nkind = \"idx\"\npath = \"data\"\n");
    for (line, parts) in [
        (
            "--config unknown.toml",
            &["unknown key `train.lerning_rate` in `unknown.toml`", "`train.learning_rate`?"][..],
        ),
        ("--config section.toml", &["unknown key `trian` in `section.toml`", "did you mean `train`?"]),
        ("--config type.toml", &["`type.toml`", "ten"]),
        ("--config syntax.toml", &["`syntax.toml`", "line 2"]),
        ("--config preset.toml", &["DiT-SX/2", "DiT-S/2"]),
        (
            "--config run.toml --set train.stpes=3",
            &["unknown key `train.stpes`", "`--set train.stpes=3`", "`train.steps`?"],
        ),
        ("--config run.toml --set steps=3", &["unknown key `steps`", "`train.steps`?"]),
        ("--config run.toml --set train.steps", &["`train.steps`", "expected `section.key=value`"]),
        ("--config run.toml --set train.steps=ten", &["`--set train.steps=ten`", "ten"]),
        ("--config run.toml --set train.steps=0", &["`train.steps = 0`", "from 1"]),
        ("--config run.toml --set train.batch_size=0", &["`train.batch_size = 0`", "at least 1"]),
        (
            "--config run.toml --set train.accumulate=3",
            &["`train.accumulate = 3`", "a divisor of `train.batch_size` (4)"],
        ),
        ("--config run.toml --set train.learning_rate=-1", &["`train.learning_rate = -1`", "above 0"]),
        ("--config run.toml --set train.learning_rate=nan", &["`train.learning_rate = NaN`", "above 0"]),
        ("--config run.toml --set train.beta1=1.0", &["`train.beta1 = 1`", "below 1"]),
        ("--config run.toml --set objective.kind=flw", &["`--set objective.kind=flw`", "flow"]),
        ("--config run.toml --set sample.sampler=euler", &["`sample.sampler = euler`", "`ddim`"]),
        ("--config run.toml --set data.kind=folder", &["`data.image_size = unset`"]),
        ("--config run.toml --set data.path=data/train-images-idx3-ubyte", &["`data.labels = unset`"]),
        (
            "--config run.toml --set model.num_heads=3",
            &["hidden_size must be a multiple of num_heads 3", "16"],
        ),
        ("--config run.toml --set model.config=run.toml", &["run.toml"]),
    ] {
        scene.refuses(&format!("train --offline --out r {line}"), 2, parts);
        if !parts[0].contains("DiT-SX") && !line.contains("model.") && !line.contains("data.path") {
            scene.refuses(&format!("train --offline --dry-run --out r {line}"), 2, parts);
        }
    }
    scene.refuses("quickstart --offline --out q --set train.sede=1", 2, &["`train.sede`", "`train.seed`?"]);
}

#[test]
fn descriptions_of_models_are_checked() {
    let scene = Scene::new();
    let good = fs::read_to_string(scene.path("checkpoint/config.json")).unwrap();
    let with = |from: &str, to: &str| {
        assert!(good.contains(from));
        good.replace(from, to)
    };
    for (name, text, parts) in [
        ("unknown", with("\"depth\"", "\"dpeth\""), &["unknown key \"dpeth\"", "depth"][..]),
        ("missing", with(" \"depth\": 2,\n", ""), &["lacks depth"]),
        ("type", with("\"depth\": 2", "\"depth\": \"two\""), &["depth must be", "two"]),
        (
            "heads",
            with("\"num_heads\": 4", "\"num_heads\": 5"),
            &["hidden_size must be a multiple of num_heads 5", "48"],
        ),
        (
            "patch",
            with("\"patch_size\": 2", "\"patch_size\": 3"),
            &["input_size must be a multiple of patch_size 3", "8"],
        ),
        ("zero", with("\"depth\": 2", "\"depth\": 0"), &["depth must be within 1..=", "got 0"]),
        ("family", with("\"dit\"", "\"vit\""), &["model", "dit", "vit"]),
        ("json", with("\"depth\": 2,", "\"depth\": 2"), &["not valid JSON", "line "]),
    ] {
        let file = format!("{name}.json");
        scene.write(&file, text);
        scene.refuses(&format!("inspect {file}"), 2, &[parts, &[&file]].concat());
    }
    for (model, parts) in [
        ("DiT-XXL/2", &["\"DiT-XXL/2\" is neither a preset", "DiT-XL/2"][..]),
        ("absent.json", &["absent.json", "No such file"]),
        ("data", &["data/config.json", "No such file"]),
        ("DiT-S/2@8x9x4", &["height 8 and width 9"]),
        ("DiT-S/2@8by8", &["8by8", "PRESET[@HEIGHTxWIDTHxCHANNELS][:CLASSES]"]),
        ("DiT-S/2:ten", &["ten", "no whole number"]),
        ("DiT-S/8@12x12x4", &["input_size must be a multiple of patch_size 8", "12"]),
    ] {
        scene.refuses(&format!("inspect {model}"), 2, parts);
    }
}

#[test]
fn what_a_program_cannot_be_built_for_is_refused() {
    let scene = Scene::new();
    let engine = "build-engine --provider none --out e --model checkpoint";
    let weights = "--weights checkpoint/model.safetensors";
    for (line, parts) in [
        ("--program loss --batch 0".into(), &["batch must be 1 or more"][..]),
        ("--program loss --buckets 1,0".into(), &["batch must be 1 or more"]),
        (format!("--program denoise,los {weights}"), &["los", "loss"]),
    ] {
        scene.refuses(&format!("{engine} {line}"), 2, parts);
    }
    // A model without a null class cannot be guided.
    scene.spoiled("plain", |tensors| {
        let table = tensors.get_mut("y_embedder.embedding_table.weight").unwrap();
        *table = HostTensor::f32([10, 48], table.to_f32()[..480].to_vec()).unwrap();
    });
    let config = fs::read_to_string(scene.path("plain/config.json")).unwrap();
    scene.write("plain/config.json", config.replace('{', "{\"class_dropout_prob\": 0.0,"));
    let line =
        "build-engine --provider none --out e --model plain --weights plain/model.safetensors --program";
    scene.refuses(&format!("{line} denoise-cfg"), 2, &["class_dropout_prob must be above 0", "null class"]);
    scene.refuses("sample --offline --checkpoint plain", 2, &["no null class", "--cfg 1"]);
    scene.mudit("sample --offline --checkpoint plain --cfg 1 --steps 2 --count 1 --out x.png").succeeds();
}

#[test]
fn what_cannot_be_sampled_is_refused() {
    let scene = Scene::new();
    for (line, parts) in [
        ("--classes 10", &["class 10 is not in 0 to 9"][..]),
        ("--classes 3,dog", &["no class is called `dog`"]),
        ("--count 0", &["--count must be 1 or more"]),
        ("--batch 0", &["--batch must be 1 or more"]),
        ("--out x.jpg", &["`x.jpg` must end in .png, .npz or .safetensors"]),
        ("--sampler euler", &["solver euler cannot sample a model trained with the ddpm objective", "ddim"]),
        ("--sampler ddpm --eta 0.5", &["solver ddpm", "eta"]),
        ("--sampler ddim --eta 2", &["solver ddim", "eta", "2"]),
        ("--sampler ddim --shift 3", &["solver ddim", "shift"]),
        ("--steps 1", &["steps \"1\"", "at least 2"]),
        ("--steps 2000", &["steps \"2000\"", "1000"]),
        ("--steps ddim999", &["ddim999", "no integer stride"]),
    ] {
        scene.refuses(&format!("sample --offline --checkpoint checkpoint {line}"), 2, parts);
    }
    scene.refuses("sample --offline --checkpoint absent", 2, &["`absent` is no directory"]);
}
