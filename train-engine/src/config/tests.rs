use super::*;

const TEXT: &str = r#"
[model]
preset = "DiT-S/2"
input_size = 8

[objective]
kind = "flow"

[train]
steps = 100
batch_size = 32
learning_rate = 1e-3
"#;

fn parse(text: &str, overrides: &[&str]) -> Result<TrainConfig> {
    let overrides: Vec<String> = overrides.iter().map(ToString::to_string).collect();
    TrainConfig::parse(text, "`run.toml`", &overrides)
}

fn message(text: &str, overrides: &[&str]) -> String {
    parse(text, overrides).expect_err("should be refused").to_string()
}

#[test]
fn a_file_overrides_defaults_and_set_overrides_the_file() {
    let config = parse(
        TEXT,
        &["train.steps=7", "objective.time=uniform", "data.path=/some where/x", "log.tensorboard=false"],
    )
    .unwrap();
    assert_eq!((config.train.steps, config.train.batch_size), (7, 32));
    assert_eq!(config.sample.solver(config.objective.kind).kind, models::SolverKind::Euler);
    assert_eq!(config.train.beta2, 0.999);
    assert_eq!(config.objective.time, TimeSampling::Uniform);
    assert_eq!(config.data.path.as_deref(), Some(Path::new("/some where/x")));
    assert!(!config.log.tensorboard);
}

#[test]
fn the_resolved_configuration_reads_back_as_itself() {
    let config = parse(TEXT, &["sample.sampler=heun", "checkpoint.every_seconds=60"]).unwrap();
    let text = config.to_toml().unwrap();
    assert!(text.contains("ema_decay = 0.9999"), "{text}");
    assert_eq!(parse(&text, &[]).unwrap(), config);
}

#[test]
fn the_precision_is_a_key_with_three_names() {
    assert_eq!(parse(TEXT, &[]).unwrap().train.precision, graph_builder::Precision::F32);
    let config = parse(TEXT, &["train.precision=bf16"]).unwrap();
    assert_eq!(config.train.precision, graph_builder::Precision::Bf16);
    assert!(config.to_toml().unwrap().contains("precision = \"bf16\""));
    assert!(message(TEXT, &["train.precision=fp8"]).contains("f32"));
    assert_ne!(
        config.hash().unwrap(),
        parse(TEXT, &[]).unwrap().hash().unwrap(),
        "it decides what a step computes"
    );
}

#[test]
fn the_provider_is_a_key_with_the_command_line_names() {
    let config = parse(TEXT, &["train.provider=cuda:1"]).unwrap();
    assert_eq!(config.train.provider, "cuda:1".parse().unwrap());
    assert!(config.to_toml().unwrap().contains("provider = \"cuda:1\""));
    assert!(message(TEXT, &["train.provider=gpu"]).contains("expected cpu, cuda, tensorrt"));
}

#[test]
fn every_section_is_in_the_table_of_sections() {
    let names: Vec<&str> = keys::SECTIONS.iter().map(|(name, _)| *name).collect();
    assert_eq!(keys::fields_of::<TrainConfig>(), names);
    assert!(keys::SECTIONS.iter().all(|(_, fields)| !fields().is_empty()));
}

#[test]
fn free_keys_exist() {
    for key in FREE_ON_RESUME {
        let (section, field) = key.split_once('.').map_or((key, None), |(s, f)| (s, Some(f)));
        let (_, fields) = keys::SECTIONS.iter().find(|(name, _)| *name == section).unwrap();
        assert!(field.is_none_or(|field| fields().contains(&field)), "{key}");
    }
}

#[test]
fn unknown_keys_name_the_nearest() {
    let cases = [
        ("[train]\nstepss = 1", "unknown key `train.stepss` in `run.toml`: did you mean `train.steps`?"),
        ("[trian]\nsteps = 1", "unknown key `trian` in `run.toml`: did you mean `train`?"),
        (
            "[data]\nbatch_size = 1",
            "unknown key `data.batch_size` in `run.toml`: did you mean `train.batch_size`?",
        ),
        (
            "learning_rate = 1",
            "unknown key `learning_rate` in `run.toml`: did you mean `train.learning_rate`?",
        ),
        (
            "[log]\nzzzzzzzz = 1",
            "unknown key `log.zzzzzzzz` in `run.toml`: valid here: every_steps, tensorboard",
        ),
    ];
    for (text, expected) in cases {
        assert_eq!(message(text, &[]), expected);
    }
    assert_eq!(
        message(TEXT, &["train.stpes=5"]),
        "unknown key `train.stpes` in `--set train.stpes=5`: did you mean `train.steps`?"
    );
    assert_eq!(
        message(TEXT, &["trian.steps=5"]),
        "unknown key `trian.steps` in `--set trian.steps=5`: did you mean `train.steps`?"
    );
}

#[test]
fn malformed_overrides_show_the_form() {
    for given in ["train.steps", "train=5", ""] {
        assert!(message(TEXT, &[given]).contains("expected `section.key=value`"), "{given}");
    }
}

#[test]
fn wrong_types_name_the_key_and_the_origin() {
    let text = message("[train]\nsteps = \"many\"", &[]);
    assert!(text.starts_with("`run.toml` is no valid configuration") && text.contains("steps"), "{text}");
    let text = message(TEXT, &["train.steps=many"]);
    assert!(text.starts_with("`--set train.steps=many` is no valid") && text.contains("steps"), "{text}");
    let text = message(TEXT, &["objective.kind=dpm"]);
    assert!(text.contains("ddpm"), "{text}");
    assert!(message("train = 5", &[]).contains("`train` is a section"));
    assert!(message("[train\n", &[]).contains("line 1"));
}

#[test]
fn values_out_of_range_name_key_value_and_range() {
    assert_eq!(
        message(TEXT, &["train.accumulate=5"]),
        "`train.accumulate = 5` is not allowed: it must be a divisor of `train.batch_size` (32)"
    );
    let refused = [
        "train.steps=0",
        "train.batch_size=0",
        "train.seed=-1",
        "train.learning_rate=nan",
        "train.learning_rate=0",
        "train.final_fraction=1.5",
        "train.warmup_steps=101",
        "train.weight_decay=-0.1",
        "train.beta1=1.0",
        "train.beta2=-1.0",
        "train.eps=0.0",
        "train.clip=inf",
        "train.ema_decay=1.0",
        "train.label_drop=1.1",
        "mup.base_width=0",
        "mup.output_multiplier=0.0",
        "objective.time_std=0.0",
        "objective.vb_weight=-1.0",
        "data.kind=idx",
        "data.labels=x",
        "data.prefetch=0",
        "data.workers=0",
        "data.image_size=0",
        "checkpoint.keep=0",
        "checkpoint.every_seconds=0",
        "log.every_steps=0",
        "sample.per_class=0",
        "sample.per_class=100000000000000",
        "train.threads=4294967296",
        "train.threads=100000",
        "train.decay_steps=10",
        "data.workers=100000000000000",
        "data.prefetch=100000000000000",
        "sample.steps=0",
        "sample.guidance=inf",
        "sample.sampler=ddim",
        "model.depth=0",
        "model.mlp_ratio=0.0",
        "model.class_dropout_prob=2.0",
        "model.config=a.json",
    ];
    for given in refused {
        let key = given.split_once('=').unwrap().0;
        let text = message(TEXT, &[given]);
        let field = key.split_once('.').unwrap().1;
        assert!(
            text.contains(field) || text.contains("data.path") || text.contains("model.preset"),
            "{text}"
        );
    }
}

#[test]
fn constructor_keys_carry_the_official_names() {
    let config = parse(TEXT, &["model.learn_sigma=true"]).unwrap();
    let keys = serde_json::Value::Object(config.model.constructor_keys());
    assert_eq!(keys, serde_json::json!({"input_size": 8, "learn_sigma": true}));
}

#[test]
fn the_hash_covers_what_a_step_computes_and_nothing_else() {
    let base = parse(TEXT, &[]).unwrap();
    let hash = base.hash().unwrap();
    assert_eq!(hash.len(), 64);
    for free in [
        "train.steps=200",
        "train.from=elsewhere",
        "train.recompute=blocks",
        "train.threads=3",
        "train.provider=cuda",
        "log.every_steps=1",
        "checkpoint.keep=9",
        "data.prefetch=9",
    ] {
        let other = parse(TEXT, &[free]).unwrap();
        assert_eq!(other.hash().unwrap(), hash, "{free}");
        assert_eq!(other.conflicts_with(&base).unwrap(), Vec::<String>::new());
    }
    let other = parse(TEXT, &["train.learning_rate=0.002", "train.label_drop=0.2"]).unwrap();
    assert_ne!(other.hash().unwrap(), hash);
    assert_eq!(
        other.conflicts_with(&base).unwrap(),
        ["train.learning_rate: 0.001 before, 0.002 now", "train.label_drop: unset before, 0.2 now"]
    );
}
