//! The smallest diffusion transformer that has every part, in the variants that the proofs use.

use graph_builder::{DType, Graph};
use models::dit::Dit;
use models::{Guidance, InitScheme, Model, MupConfig, Network, Objective, ProgramKind, ProgramSpec};
use mudit_tests::Feeds;
use mudit_tests::draws::Draws;

/// Batch size of the tiny programs.
pub(crate) const BATCH: usize = 3;

/// The variants by name.
pub(crate) const VARIANTS: [&str; 4] = ["ddpm", "flow", "ddpm-mup", "flow-mup"];

/// One block of width 8 on 4 × 4 × 1 latents in 4 tokens.
pub(crate) fn config(variant: &str) -> Model {
    let (objective, mup) = (variant.split('-').next().unwrap(), variant.ends_with("mup"));
    let objective: Objective = objective.parse().unwrap();
    let network = Network::Dit(Dit {
        input_size: 4,
        patch_size: 2,
        in_channels: 1,
        hidden_size: 8,
        depth: 1,
        num_heads: 2,
        mlp_ratio: 2.0,
        class_dropout_prob: 0.1,
        num_classes: 3,
        learn_sigma: objective == Objective::Ddpm,
    });
    Model {
        network,
        objective,
        init: if mup { InitScheme::Mup } else { InitScheme::Original },
        mup: mup.then_some(MupConfig { base_width: 4, output_multiplier: 1.5 }),
        class_names: None,
    }
}

/// The transformer of a model.
pub(crate) fn dit(model: &Model) -> &Dit {
    match &model.network {
        Network::Dit(dit) => dit,
    }
}

/// The model with its transformer changed.
pub(crate) fn changed(model: &Model, change: impl FnOnce(&mut Dit)) -> Model {
    let mut changed = dit(model).clone();
    change(&mut changed);
    Model { network: Network::Dit(changed), ..model.clone() }
}

/// A program as it is built, before any pass.
pub(crate) fn graph(variant: &str, kind: ProgramKind) -> Graph {
    config(variant)
        .program(&ProgramSpec::new(kind, BATCH).guided(Guidance::First(3)))
        .unwrap_or_else(|e| panic!("{variant} {kind}: {e}"))
}

/// A value for every input and every parameter: no parameter is zero, so that every path carries a gradient.
pub(crate) fn feeds(graph: &Graph, variant: &str) -> Feeds {
    let mut feeds = Feeds::new();
    for p in graph.parameters() {
        let fan_in: usize = p.shape().dims().iter().skip(1).product();
        let size = if fan_in == 1 { 0.3 } else { 1.7 / (fan_in as f64).sqrt() };
        let values = Draws::named(&p.name).uniform(p.shape().dims(), -size, size);
        feeds.insert(p.name.clone(), values);
    }
    let cfg = config(variant);
    for (name, ty) in graph.inputs() {
        let (mut draws, shape) = (Draws::named(name), ty.shape.dims());
        let values = match (name, ty.dtype) {
            // The first sample is at the chain's end, where the loss is the decoder's likelihood.
            ("t", _) => {
                let mut first = true;
                draws.array(shape, |d| if std::mem::take(&mut first) { 0.0 } else { d.below(1000) as f64 })
            }
            // Each row has another one's answer for its pair, and the last its own.
            ("pair", _) => ndarray::ArrayD::from_shape_fn(shape, |i| (i[0] + 1).min(BATCH - 1) as f64),
            (_, DType::I64) => draws.array(shape, |d| d.below(dit(&cfg).num_classes + 1) as f64),
            ("hp.output_multiplier", _) => {
                draws.array(shape, |_| cfg.mup.map_or(1.0, |m| m.output_multiplier))
            }
            ("hp.vb_weight", _) => draws.array(shape, |_| 0.75),
            // Some pixels are beyond the range of the data, where the likelihood's bins have no end.
            _ => draws.uniform(shape, -1.3, 1.3),
        };
        feeds.insert(name.to_owned(), values);
    }
    feeds
}
