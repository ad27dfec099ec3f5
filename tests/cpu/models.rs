//! The published models: sizes, work, names and fixed tables, counted from the graphs.

use std::time::{Duration, Instant};

use graph_builder::{Graph, Init, Op, Weights as Parameters};
use models::{Guidance, Model, Network, ProgramKind, ProgramSpec};

use crate::tiny::{changed, dit};

/// Preset, all parameters, 10⁶ trainable ones, 10⁹ multiply-adds of a forward pass.
///
/// The first count is exact; the others are those of a PyTorch implementation that agrees with the published code, to
/// the digits shown.
const PUBLISHED: [(&str, usize, f64, f64); 12] = [
    ("DiT-S/2", 32_963_360, 32.87, 6.06),
    ("DiT-S/4", 32_945_024, 32.92, 1.41),
    ("DiT-S/8", 33_148_160, 33.14, 0.36),
    ("DiT-B/2", 130_512_416, 130.32, 23.01),
    ("DiT-B/4", 130_475_648, 130.43, 5.57),
    ("DiT-B/8", 130_881_536, 130.87, 1.42),
    ("DiT-L/2", 458_102_816, 457.84, 80.70),
    ("DiT-L/4", 458_053_760, 457.99, 19.70),
    ("DiT-L/8", 458_594_816, 458.58, 5.01),
    ("DiT-XL/2", 675_129_632, 674.83, 118.62),
    ("DiT-XL/4", 675_074_432, 675.00, 29.04),
    ("DiT-XL/8", 675_683_072, 675.66, 7.39),
];

fn build(preset: &str, kind: ProgramKind, batch: usize) -> Graph {
    let cfg = Model::resolve(preset).unwrap();
    cfg.program(&ProgramSpec::new(kind, batch).guided(Guidance::First(3)))
        .unwrap_or_else(|e| panic!("{preset} {kind}: {e}"))
}

/// Tokens of an image.
fn tokens(model: &Model) -> usize {
    (dit(model).input_size / dit(model).patch_size).pow(2)
}

/// Multiply-adds of a forward pass of one image, from the sizes.
fn macs(model: &Model) -> u64 {
    let cfg = dit(model);
    let (t, d, l) = (tokens(model), cfg.hidden_size, cfg.depth);
    let pixels = cfg.patch_size.pow(2);
    let (patch, answer) = (pixels * cfg.in_channels, pixels * model.network.out_channels());
    let block = 12 * t * d * d + 2 * t * t * d + 6 * d * d;
    (t * d * patch + 256 * d + d * d + l * block + 2 * d * d + t * d * answer) as u64
}

#[test]
fn presets_have_the_published_sizes_and_work() {
    let published = PUBLISHED.map(|(name, ..)| name);
    assert!(Network::presets().starts_with(&published));
    for (preset, parameters, trainable, gmacs) in PUBLISHED {
        let cfg = Model::preset(preset).unwrap();
        let graph = build(preset, ProgramKind::Denoise, 1);
        let (all, moved) = graph.parameter_counts();
        assert_eq!(all, parameters, "{preset}: parameters");
        assert_eq!(
            all - moved,
            tokens(&cfg) * cfg.network.width(),
            "{preset}: only the position table is frozen"
        );
        assert!((moved as f64 / 1e6 - trainable).abs() <= 0.01, "{preset}: {moved} trainable parameters");
        assert!(
            (graph.cost().macs as f64 / 1e9 - gmacs).abs() <= 0.02,
            "{preset}: {} macs",
            graph.cost().macs
        );
        assert_eq!(graph.cost().macs, macs(&cfg), "{preset}: macs");
        assert_eq!(graph.optimised().unwrap().cost().macs, macs(&cfg), "{preset}: macs after the passes");
    }
}

#[test]
fn work_grows_with_the_batch_and_a_training_step_is_three_forward_passes() {
    let cfg = Model::preset("DiT-S/4").unwrap();
    let work = |kind, batch| build("DiT-S/4", kind, batch).optimised().unwrap().cost().macs;
    assert_eq!(work(ProgramKind::Denoise, 5), 5 * macs(&cfg));
    assert_eq!(work(ProgramKind::DenoiseCfg, 2), 4 * macs(&cfg), "two rows an image");
    assert_eq!(work(ProgramKind::Loss, 3), 3 * macs(&cfg));
    let step = work(ProgramKind::TrainStep, 4) as f64 / (4 * macs(&cfg)) as f64;
    assert!((2.98..3.0).contains(&step), "{step}: no gradient of the input is needed, all others are");
}

#[test]
fn parameters_have_the_published_names_and_shapes() {
    let graph = build("DiT-S/2", ProgramKind::TrainStep, 1);
    let mut want: Vec<(String, Vec<usize>)> = vec![("pos_embed".into(), vec![1, 256, 384])];
    let mut add = |name: &str, shape: &[usize]| want.push((name.to_owned(), shape.to_vec()));
    add("x_embedder.proj.weight", &[384, 4, 2, 2]);
    add("x_embedder.proj.bias", &[384]);
    add("t_embedder.mlp.0.weight", &[384, 256]);
    add("t_embedder.mlp.0.bias", &[384]);
    add("t_embedder.mlp.2.weight", &[384, 384]);
    add("t_embedder.mlp.2.bias", &[384]);
    add("y_embedder.embedding_table.weight", &[1001, 384]);
    for i in 0..12 {
        add(&format!("blocks.{i}.adaLN_modulation.1.weight"), &[2304, 384]);
        add(&format!("blocks.{i}.adaLN_modulation.1.bias"), &[2304]);
        add(&format!("blocks.{i}.attn.qkv.weight"), &[1152, 384]);
        add(&format!("blocks.{i}.attn.qkv.bias"), &[1152]);
        add(&format!("blocks.{i}.attn.proj.weight"), &[384, 384]);
        add(&format!("blocks.{i}.attn.proj.bias"), &[384]);
        add(&format!("blocks.{i}.mlp.fc1.weight"), &[1536, 384]);
        add(&format!("blocks.{i}.mlp.fc1.bias"), &[1536]);
        add(&format!("blocks.{i}.mlp.fc2.weight"), &[384, 1536]);
        add(&format!("blocks.{i}.mlp.fc2.bias"), &[384]);
    }
    add("final_layer.adaLN_modulation.1.weight", &[768, 384]);
    add("final_layer.adaLN_modulation.1.bias", &[768]);
    add("final_layer.linear.weight", &[32, 384]);
    add("final_layer.linear.bias", &[32]);

    let declared = graph.parameters().iter().map(|p| (p.name.clone(), p.shape().0));
    assert_eq!(declared.collect::<Vec<_>>(), want);
    let gradients = graph.outputs().iter().filter_map(|(n, _)| n.strip_prefix("grad."));
    assert!(gradients.eq(want[1..].iter().map(|(n, _)| n.as_str())), "every parameter but the frozen one");
    assert_eq!(build("DiT-XL/2", ProgramKind::Denoise, 1).parameters().len(), 292);
}

#[test]
fn positions_are_sines_and_cosines_of_column_and_row() {
    let graph = build("DiT-XL/2", ProgramKind::Denoise, 1);
    let table = graph.parameters().iter().find(|p| p.name == "pos_embed").unwrap();
    let Init::Values(values) = &table.init else { panic!("the position table is not given by values") };
    let token = &values[(16 + 3) * 1152..][..1152]; // row 1, column 3
    let want = [
        (0, 0.141_120),
        (1, 0.233_830_8),
        (288, -0.989_992_5),
        (576, 0.841_471),
        (577, 0.824_051_3),
        (864, 0.540_302_3),
    ];
    for (i, want) in want {
        assert!((token[i] - want).abs() < 1e-6, "feature {i}: {} instead of {want}", token[i]);
    }
}

#[test]
fn timesteps_are_cosines_then_sines() {
    let graph = build("DiT-S/8", ProgramKind::Denoise, 1);
    let waves = graph.nodes().iter().find(|n| matches!(n.op, Op::Concat(_))).unwrap();
    let parts: Vec<&str> = waves.args.iter().map(|a| graph.node(*a).op.name()).collect();
    assert_eq!((parts.as_slice(), waves.ty.shape.dims()), (["Cos", "Sin"].as_slice(), [1, 256].as_slice()));
    let frequencies = graph.nodes().iter().find_map(|n| match &n.op {
        Op::Constant(c) if c.data.len() == 128 => Some(&c.data),
        _ => None,
    });
    let angle = |i: usize| 500.0 * frequencies.unwrap()[i];
    for (i, cosine) in [(0, -0.883_849_3), (1, 0.945_942_6), (127, 0.998_557_0)] {
        assert!((angle(i).cos() - cosine).abs() < 1e-6, "cosine {i}");
    }
    for (i, sine) in [(0, -0.467_771_8), (1, 0.324_334_1), (127, 0.053_704_5)] {
        assert!((angle(i).sin() - sine).abs() < 1e-6, "sine {i}");
    }
}

#[test]
fn the_largest_training_step_is_emitted_quickly_and_without_weights() {
    let start = Instant::now();
    let graph = build("DiT-XL/2", ProgramKind::TrainStep, 2).optimised().unwrap();
    let program = graph.emit(Parameters::Inputs).unwrap();
    let elapsed = start.elapsed();
    let megabytes = program.bytes.len() as f64 / 1e6;
    println!("DiT-XL/2 train-step: {} nodes, {megabytes:.1} MB in {elapsed:?}", graph.nodes().len());
    assert!(elapsed < Duration::from_secs(5), "{elapsed:?}");
    assert!(megabytes < 20.0, "{megabytes} MB");
    assert_eq!(program.inputs.len(), 292 + 6);
    assert!(program.weights_file.is_none());
}

#[test]
fn every_program_can_be_recorded_as_a_cuda_graph() {
    let tiny = crate::tiny::config("ddpm");
    // Guidance on three of four and eight channels, on all of them, and on none.
    let wide = |learn_sigma| changed(&tiny, |dit| (dit.in_channels, dit.learn_sigma) = (4, learn_sigma));
    let models = [("wide", wide(false)), ("learned", wide(true))];
    for (name, model) in models {
        for kind in ProgramKind::ALL {
            for guidance in [Guidance::First(3), Guidance::All, Guidance::Off] {
                for batch in [1, 3] {
                    let graph = model.compiled(&ProgramSpec::new(kind, batch).guided(guidance)).unwrap();
                    let program = graph.emit(Parameters::Inputs).unwrap();
                    let found = &program.unrepeatable;
                    assert!(found.is_empty(), "{name} {kind}, {guidance:?}, batch {batch}: {found:?}");
                }
            }
        }
    }
}

#[test]
fn channels_that_are_not_guided_are_the_conditional_answer() {
    let model = changed(&crate::tiny::config("ddpm"), |dit| dit.in_channels = 4);
    let graph =
        |kind| model.program(&ProgramSpec::new(kind, crate::tiny::BATCH).guided(Guidance::First(3))).unwrap();
    let (plain, guided) = (graph(ProgramKind::Denoise), graph(ProgramKind::DenoiseCfg));
    let feeds = crate::tiny::feeds(&guided, "ddpm");
    let [plain, guided] = [plain, guided].map(|graph| graph.eval(&feeds).unwrap().remove(0));
    let differ = |(i, want): (ndarray::IxDyn, &f64)| (guided[&i] != *want).then(|| i[1]);
    let differing: std::collections::BTreeSet<usize> = plain.indexed_iter().filter_map(differ).collect();
    assert_eq!(differing, [0, 1, 2].into());
}
