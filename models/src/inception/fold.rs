//! From the published parameters to those of the graph.

use graph_builder::{Graph, Shape};

use super::SPATIAL_CHANNELS;

/// Added to the variance in every batch normalisation.
const EPSILON: f64 = 1e-3;
/// Where the spatial features' filters are in the checkpoint.
const SPATIAL_SOURCE: &str = "Mixed_6d.branch1x1.conv.weight";
/// The parts of a batch normalisation.
const NORMALISATION: [&str; 4] = ["weight", "bias", "running_mean", "running_var"];

/// A tensor of the checkpoint that the network needs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CheckpointTensor {
    /// Name in the published file and in torch-fidelity.
    pub name: String,
    /// Axis sizes.
    pub shape: Shape,
}

/// The name of a parameter in pytorch-fid's own `InceptionV3`, which numbers the blocks; `None` for the classifier,
/// which it does not have.
pub fn pytorch_fid_name(published: &str) -> Option<String> {
    const BLOCKS: [(&str, &str); 16] = [
        ("Conv2d_1a_3x3", "blocks.0.0"),
        ("Conv2d_2a_3x3", "blocks.0.1"),
        ("Conv2d_2b_3x3", "blocks.0.2"),
        ("Conv2d_3b_1x1", "blocks.1.0"),
        ("Conv2d_4a_3x3", "blocks.1.1"),
        ("Mixed_5b", "blocks.2.0"),
        ("Mixed_5c", "blocks.2.1"),
        ("Mixed_5d", "blocks.2.2"),
        ("Mixed_6a", "blocks.2.3"),
        ("Mixed_6b", "blocks.2.4"),
        ("Mixed_6c", "blocks.2.5"),
        ("Mixed_6d", "blocks.2.6"),
        ("Mixed_6e", "blocks.2.7"),
        ("Mixed_7a", "blocks.3.0"),
        ("Mixed_7b", "blocks.3.1"),
        ("Mixed_7c", "blocks.3.2"),
    ];
    let (block, rest) = published.split_once('.')?;
    BLOCKS.iter().find(|(name, _)| *name == block).map(|(_, number)| format!("{number}.{rest}"))
}

/// The checkpoint's tensors that a graph of [`super::features`] is made from.
pub fn checkpoint_names(graph: &Graph) -> Vec<CheckpointTensor> {
    let mut found: Vec<CheckpointTensor> = Vec::new();
    let mut add = |name: String, shape: Shape| {
        if found.iter().all(|t| t.name != name) {
            found.push(CheckpointTensor { name, shape });
        }
    };
    for parameter in graph.parameters() {
        let shape = parameter.shape();
        match parameter.name.rsplit_once('.') {
            Some(("spatial", _)) => {
                // All filters of the branch, of which the first are used.
                add(SPATIAL_SOURCE.to_owned(), [192, shape.0[1], 1, 1].into());
            }
            Some(("fc", _)) => add(parameter.name.clone(), shape),
            Some((layer, "weight")) => {
                let filters = shape.0[0];
                add(format!("{layer}.conv.weight"), shape);
                for part in NORMALISATION {
                    add(format!("{layer}.bn.{part}"), [filters].into());
                }
            }
            _ => {} // a bias comes out of the normalisation
        }
    }
    found
}

/// Values of the graph's parameters, in order of declaration, from the checkpoint's tensors.
///
/// `weight' = weight · γ/√(σ² + ε)` and `bias' = β − μ · γ/√(σ² + ε)`, in f64 and rounded once. `tensor` is asked for
/// names of [`checkpoint_names`] only.
///
/// # Errors
/// Those of `tensor`.
pub fn fold<E>(
    graph: &Graph,
    mut tensor: impl FnMut(&str) -> Result<Vec<f32>, E>,
) -> Result<Vec<Vec<f32>>, E> {
    let mut answer = Vec::with_capacity(graph.parameters().len());
    for parameter in graph.parameters() {
        let numel = parameter.numel();
        let values = match parameter.name.rsplit_once('.') {
            Some(("spatial", _)) => {
                let all = tensor(SPATIAL_SOURCE)?;
                all.into_iter().take(SPATIAL_CHANNELS * parameter.shape().0[1]).collect()
            }
            Some(("fc", _)) | None => tensor(&parameter.name)?,
            Some((layer, part)) => {
                let [gamma, beta, mean, variance] =
                    NORMALISATION.map(|part| tensor(&format!("{layer}.bn.{part}")));
                let (gamma, beta, mean, variance) = (gamma?, beta?, mean?, variance?);
                let scale: Vec<f64> = gamma
                    .iter()
                    .zip(&variance)
                    .map(|(g, v)| f64::from(*g) / (f64::from(*v) + EPSILON).sqrt())
                    .collect();
                if part == "weight" {
                    let weight = tensor(&format!("{layer}.conv.weight"))?;
                    let filter = numel / scale.len().max(1);
                    let scaled = weight.iter().enumerate();
                    scaled.map(|(i, w)| (f64::from(*w) * scale[i / filter]) as f32).collect()
                } else {
                    let terms = beta.iter().zip(&mean).zip(&scale);
                    terms.map(|((b, m), s)| (f64::from(*b) - f64::from(*m) * s) as f32).collect()
                }
            }
        };
        answer.push(values);
    }
    Ok(answer)
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;

    use super::*;
    use crate::inception::{MIN_SIDE, Taps, features};

    #[test]
    fn the_published_file_has_these_names() {
        let graph = features(1, MIN_SIDE, Taps { spatial: true, logits: true }).unwrap();
        let names = checkpoint_names(&graph);
        // 94 convolutions of five tensors each, and the classifier's weight.
        assert_eq!(names.len(), 94 * 5 + 1);
        let shape = |name: &str| names.iter().find(|t| t.name == name).map(|t| t.shape.dims().to_vec());
        assert_eq!(shape("Conv2d_1a_3x3.conv.weight"), Some(vec![32, 3, 3, 3]));
        assert_eq!(shape("Mixed_6d.branch1x1.conv.weight"), Some(vec![192, 768, 1, 1]));
        assert_eq!(shape("Mixed_7c.branch3x3dbl_3b.bn.running_var"), Some(vec![384]));
        assert_eq!(shape("fc.weight"), Some(vec![1008, 2048]));
        assert_eq!(
            pytorch_fid_name("Mixed_6d.branch1x1.conv.weight").as_deref(),
            Some("blocks.2.6.branch1x1.conv.weight")
        );
        assert_eq!(pytorch_fid_name("fc.weight"), None);
        assert!(names.iter().filter(|t| t.name != "fc.weight").all(|t| pytorch_fid_name(&t.name).is_some()));
    }

    #[test]
    fn a_folded_layer_is_the_convolution_and_its_normalisation() {
        let graph = features(1, MIN_SIDE, Taps { spatial: true, logits: false }).unwrap();
        let sizes = checkpoint_names(&graph);
        let folded = fold(&graph, |name| {
            let numel = sizes.iter().find(|t| t.name == name).unwrap().shape.numel();
            let value = match name.rsplit('.').next().unwrap() {
                "running_var" => 0.249, // σ² + ε = ¼
                "running_mean" => 3.0,
                "bias" => 1.0,
                _ if name.contains(".bn.") => 5.0,
                _ => 2.0,
            };
            Ok::<_, Infallible>(vec![value; numel])
        })
        .unwrap();
        for (parameter, values) in graph.parameters().iter().zip(&folded) {
            assert_eq!(values.len(), parameter.numel(), "{}", parameter.name);
            let expected = match parameter.name.rsplit_once('.').unwrap() {
                ("spatial", _) => 2.0,       // as it is
                (_, "weight") => 2.0 * 10.0, // γ/√¼ = 10
                (_, _) => 1.0 - 3.0 * 10.0,
            };
            assert!(values.iter().all(|v| (v - expected).abs() < 1e-5), "{}", parameter.name);
        }
    }
}
