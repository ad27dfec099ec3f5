//! Configurations read, written, refused and resolved.

use std::fs;

use super::{InitScheme, Model, MupConfig};
use crate::dit::Dit;
use crate::network::{Latent, Network};
use crate::objective::Objective;

const SMALL: &str = r#"{"model":"dit","input_size":8,"patch_size":2,"in_channels":4,"hidden_size":96,"depth":2,
    "num_heads":4,"mlp_ratio":4.0,"num_classes":10,"learn_sigma":true}"#;

fn small() -> Model {
    Model::from_json(SMALL).unwrap()
}

fn dit(model: &Model) -> &Dit {
    match &model.network {
        Network::Dit(dit) => dit,
    }
}

fn edited(from: &str, to: &str) -> String {
    assert!(SMALL.contains(from));
    SMALL.replace(from, to)
}

fn refusal(json: &str) -> String {
    Model::from_json(json).unwrap_err().to_string()
}

#[test]
fn the_official_keys_make_a_config() {
    let c = small();
    let d = dit(&c);
    assert_eq!((d.input_size, d.patch_size, d.in_channels, d.hidden_size), (8, 2, 4, 96));
    assert_eq!((d.depth, d.num_heads, d.num_classes, d.learn_sigma), (2, 4, 10, true));
    assert_eq!((d.mlp_ratio, d.class_dropout_prob), (4.0, 0.1));
    assert_eq!((c.objective, c.init, c.mup), (Objective::Ddpm, InitScheme::Original, None));
    assert_eq!(c.latent(), Latent { channels: 4, height: 8, width: 8 });
    let n = &c.network;
    assert_eq!((n.out_channels(), n.width(), n.head_size(), n.depth(), n.dropout()), (8, 96, 24, 2, 0.1));
    let classes = c.conditioning().classes().unwrap();
    assert_eq!((classes.null_class(), classes.rows(), c.width_multiplier()), (Some(10), 11, 1.0));
    assert!(c.learns_variance());
    let wide = n.resized(192, 48);
    assert_eq!((wide.width(), wide.head_size(), wide.latent()), (192, 48, n.latent()));
}

#[test]
fn own_keys_are_read() {
    let c = Model::from_json(&edited(
        "\"learn_sigma\":true",
        r#""objective":"flow","init":"mup","mup":{"base_width":48,"output_multiplier":0.25},"class_dropout_prob":0,
        "class_names":["a","b","c","d","e","f","g","h","i","j"]"#,
    ))
    .unwrap();
    assert_eq!((c.objective, c.init), (Objective::Flow, InitScheme::Mup));
    assert_eq!(c.mup, Some(MupConfig { base_width: 48, output_multiplier: 0.25 }));
    assert_eq!((c.width_multiplier(), c.network.out_channels(), c.learns_variance()), (2.0, 4, false));
    let classes = c.conditioning().classes().unwrap();
    assert_eq!((classes.null_class(), classes.rows(), c.conditioning().has_null()), (None, 10, false));
    assert_eq!(c.class_names.as_ref().unwrap()[9], "j");
    assert_eq!(Model::from_json(&c.to_json()).unwrap(), c);
}

#[test]
fn json_round_trips_in_the_same_bytes() {
    for config in Network::presets().iter().map(|name| Model::preset(name).unwrap()).chain([small()]) {
        let json = config.to_json();
        let back = Model::from_json(&json).unwrap();
        assert_eq!(back, config);
        assert_eq!(back.to_json(), json);
        assert_eq!(serde_json::from_str::<Model>(&json).unwrap(), config, "by way of serde");
        let value = serde_json::to_value(&config).unwrap();
        assert_eq!(format!("{value:#}\n"), json);
    }
    assert!(small().to_json().starts_with("{\n  \"model\": \"dit\",\n  \"input_size\": 8,\n"));
}

#[test]
fn faults_are_named() {
    for (json, want) in [
        (
            edited("hidden_size", "hiden_size"),
            "unknown key \"hiden_size\" in model config; did you mean \"hidden_size\"?",
        ),
        (
            edited("\"depth\":2,", "").replace("\"num_heads\":4,", ""),
            "model config lacks depth, num_heads; add them",
        ),
        (edited("\"depth\":2,", "\"depth\":null,"), "model config lacks depth; add it"),
        (edited("\"depth\":2", "\"depth\":\"2\""), "depth must be a whole number, got \"2\""),
        (edited("\"depth\":2", "\"depth\":2.5"), "depth must be a whole number, got 2.5"),
        (edited("\"depth\":2", "\"depth\":-2"), "depth must be a whole number, got -2"),
        (edited("\"depth\":2", "\"depth\":0"), "depth must be within 1..=4096, got 0"),
        (edited("\"depth\":2", "\"depth\":99999999999"), "depth must be within 1..=4096"),
        (edited("\"depth\":2", "\"depth\":1000000"), "depth must be within 1..=4096, got 1000000"),
        (
            edited("96", "1048576").replace("4.0", "1.0").replace("\"depth\":2", "\"depth\":4096"),
            "the number of parameters must be at most 1099511627776",
        ),
        (
            edited("\"input_size\":8", "\"input_size\":1048576")
                .replace("\"patch_size\":2", "\"patch_size\":1"),
            "the number of parameters must be",
        ),
        (
            edited("\"input_size\":8", "\"input_size\":65536"),
            "the size of the position table must be at most 4294967296",
        ),
        (
            edited("\"input_size\":8", "\"input_size\":65536")
                .replace("\"patch_size\":2", "\"patch_size\":4096"),
            "the number of values of an input must be at most 4294967296",
        ),
        (
            edited("\"patch_size\":2", "\"patch_size\":3"),
            "input_size must be a multiple of patch_size 3, got 8",
        ),
        (
            edited("\"num_heads\":4", "\"num_heads\":5"),
            "hidden_size must be a multiple of num_heads 5, got 96",
        ),
        (
            edited("96", "98").replace("\"num_heads\":4", "\"num_heads\":2"),
            "hidden_size must be a multiple of 4",
        ),
        (edited("\"learn_sigma\":true", "\"learn_sigma\":1"), "learn_sigma must be true or false, got 1"),
        (
            edited("4.0", "0.001"),
            "mlp_ratio must be such that hidden_size 96 times it is within 1..=1048576, got 0.001",
        ),
        (edited("4.0", "-4"), "mlp_ratio must be"),
        (edited("\"dit\"", "\"unet\""), "model must be \"dit\", got \"unet\""),
        (
            edited("\"model\"", "\"objective\":\"flw\",\"model\""),
            "objective must be ddpm or flow, got \"flw\" (did you mean \"flow\"?)",
        ),
        (edited("\"model\"", "\"init\":\"xavier\",\"model\""), "init must be dit or mup, got \"xavier\""),
        (edited("\"model\"", "\"mup\":{},\"model\""), "mup of the model config lacks base_width"),
        (
            edited("\"model\"", "\"mup\":{\"base\":1},\"model\""),
            "unknown key \"base\" in mup of the model config",
        ),
        (
            edited("\"model\"", "\"mup\":{\"base_width\":\"x\"},\"model\""),
            "mup.base_width must be a whole number",
        ),
        (edited("\"model\"", "\"mup\":{\"base_width\":0},\"model\""), "mup.base_width must be within"),
        (
            edited("\"model\"", "\"mup\":{\"base_width\":8,\"output_multiplier\":0},\"model\""),
            "mup.output_multiplier must be positive",
        ),
        (
            edited("\"model\"", "\"class_names\":[\"one\"],\"model\""),
            "class_names must be one name for each of num_classes 10, got 1 names",
        ),
        (
            edited("\"model\"", "\"class_names\":[1],\"model\""),
            "class_names must be an array of texts, got [1]",
        ),
        (
            edited("\"model\"", "\"class_dropout_prob\":1.5,\"model\""),
            "class_dropout_prob must be within 0..=1, got 1.5",
        ),
        ("[1]".into(), "model config must be an object, got [1]"),
        ("{".into(), "the model config is not valid JSON: EOF"),
    ] {
        let message = refusal(&json);
        assert!(message.contains(want), "\"{message}\" lacks \"{want}\"");
    }
    let long = refusal(&format!("[{}]", "\"ä\",".repeat(100).trim_end_matches(',')));
    assert!(long.ends_with('…') && long.chars().count() < 120, "{long}");
}

#[test]
fn presets_are_the_published_ones() {
    for (name, depth, width, heads, tokens) in [
        ("DiT-S/2", 12, 384, 6, 256),
        ("DiT-B/4", 12, 768, 12, 64),
        ("DiT-L/8", 24, 1024, 16, 16),
        ("DiT-XL/2", 28, 1152, 16, 256),
    ] {
        let c = Model::preset(name).unwrap();
        let c = dit(&c);
        let side = c.input_size / c.patch_size;
        assert_eq!(
            (c.depth, c.hidden_size, c.num_heads, side * side),
            (depth, width, heads, tokens),
            "{name}"
        );
        assert_eq!(
            (c.input_size, c.in_channels, c.num_classes, c.learn_sigma),
            (32, 4, 1000, true),
            "{name}"
        );
    }
    for name in Network::presets() {
        assert!(Model::resolve(name).unwrap().validate().is_ok(), "{name}");
    }
}

#[test]
fn overrides_follow_a_preset() {
    for (text, latent, classes) in [
        ("DiT-S/2@8x8x3:10", [3, 8, 8], 10),
        ("DiT-XL/2@64x64", [4, 64, 64], 1000),
        ("DiT-S/2:10", [4, 32, 32], 10),
    ] {
        let c = Model::resolve(text).unwrap();
        assert_eq!(
            (c.latent().shape(), c.conditioning().classes().unwrap().count),
            (latent, classes),
            "{text}"
        );
    }
    for (text, want) in [
        (
            "DiT-S/2@8x16x4",
            "input_size must be one side: the latents of `dit` are square, got height 8 and width 16",
        ),
        ("DiT-S/2@8", "\"8\" is no latent size"),
        ("DiT-S/2@8x8x4x2", "is no latent size"),
        ("DiT-S/2@8x8x", "\"\" is no whole number"),
        ("DiT-S/2@8x8:ten", "\"ten\" is no whole number"),
        ("DiT-S/2@", "\"\" is no latent size"),
        ("DiT-S/2@9x9", "input_size must be a multiple of patch_size 2, got 9"),
        ("DiT-S/2@8x8:0", "num_classes must be within"),
        ("DiT-M/2", "did you mean \"DiT-"),
        ("dit-xl/2", "did you mean \"DiT-XL/2\"?"),
        ("/no/such/model", "valid are DiT-S/2, DiT-S/4"),
        ("/no/such/model.json", "cannot read the model config /no/such/model.json"),
    ] {
        let message = Model::resolve(text).unwrap_err().to_string();
        assert!(message.contains(want), "{text}: \"{message}\" lacks \"{want}\"");
    }
}

#[test]
fn files_and_directories_resolve() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("config.json");
    fs::write(&file, SMALL).unwrap();
    for path in [folder.path(), &file] {
        assert_eq!(Model::resolve(path.to_str().unwrap()).unwrap(), small());
    }
    fs::write(&file, edited("depth", "dept")).unwrap();
    let message = Model::resolve(file.to_str().unwrap()).unwrap_err().to_string();
    assert!(message.contains("config.json: unknown key \"dept\""), "{message}");
}
