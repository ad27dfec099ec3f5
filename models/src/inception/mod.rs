//! The Inception-v3 of the Fréchet Inception distance: the network of 2015-12-05, as TensorFlow published it.
//!
//! ADM's evaluator, pytorch-fid, torch-fidelity and clean-fid all run this network with these weights; what differs is
//! how they bring an image to 299 × 299 and to which scale. It is not torchvision's `inception_v3`: means leave the
//! padding out, the last block pools by maximum, there are 1008 classes and no auxiliary branch.
//!
//! Batch normalisation is folded into the convolutions ([`fold`]), so the graph's parameters are a `weight` and a `bias`
//! for each convolution, under the published names without `.conv` and `.bn`.
//!
//! # Source
//! Szegedy et al., *Rethinking the Inception Architecture for Computer Vision*, table 1 and figures 5–7.

mod fold;

use graph_builder::{Builder, Dim, Graph, Init, Scope, Type, Value, Window};

pub use self::fold::{CheckpointTensor, checkpoint_names, fold, pytorch_fid_name};
use crate::error::ModelError;

/// Rows and columns of the images that the network takes.
pub const SIDE: usize = 299;
/// Length of the feature vectors.
pub const POOL: usize = 2048;
/// Number of classes, 8 of them unused.
pub const CLASSES: usize = 1008;
/// Channels of the convolution `Mixed_6d.branch1x1` that are spatial features.
pub const SPATIAL_CHANNELS: usize = 7;
/// Length of the spatial features: 17 rows, 17 columns, 7 channels.
pub const SPATIAL: usize = 17 * 17 * SPATIAL_CHANNELS;
/// Smallest side that leaves the network something to pool.
pub const MIN_SIDE: usize = 75;

/// What the network is asked for beside the feature vectors.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Taps {
    /// The spatial features of sFID: the first seven channels of the raw 1×1 convolution of the block `Mixed_6d`, before
    /// normalisation and ReLU.
    pub spatial: bool,
    /// Class scores without their bias, as the Inception score takes them.
    pub logits: bool,
}

/// The network for `n` images of `side` × `side` pixels.
///
/// # Shapes
/// - `x`: `(N, 3, S, S)`, pixels scaled to about −1..1
/// - `pool`: `(N, 2048)`; `spatial`: `(N, 2023)` in the order (y, x, channel) at 299; `logits`: `(N, 1008)`
/// # Errors
/// [`ModelError::BadValue`] for no image or a side below [`MIN_SIDE`], [`ModelError::Graph`].
pub fn features(n: usize, side: usize, taps: Taps) -> Result<Graph, ModelError> {
    for (key, least, got) in [("batch", 1, n), ("side", MIN_SIDE, side)] {
        if got < least {
            return Err(ModelError::BadValue {
                key,
                expected: format!("{least} or more"),
                got: got.to_string(),
            });
        }
    }
    let b = Builder::new("features");
    let x = b.input("x", Type::f32([n, 3, side, side])); // (N, 3, 299, 299)
    let s = &b.root();
    let x = stem(s, x); // (N, 192, 35, 35)
    let x = s.within("Mixed_5b", |s| block_a(s, x, 32)); // (N, 256, 35, 35)
    let x = s.within("Mixed_5c", |s| block_a(s, x, 64)); // (N, 288, 35, 35)
    let x = s.within("Mixed_5d", |s| block_a(s, x, 64)); // (N, 288, 35, 35)
    let x = s.within("Mixed_6a", |s| block_b(s, x)); // (N, 768, 17, 17)
    let x = s.within("Mixed_6b", |s| block_c(s, x, 128)); // (N, 768, 17, 17)
    let x = s.within("Mixed_6c", |s| block_c(s, x, 160)); // (N, 768, 17, 17)
    let spatial = taps.spatial.then(|| s.within("spatial", |s| spatial(s, x))); // (N, 2023)
    let x = s.within("Mixed_6d", |s| block_c(s, x, 160)); // (N, 768, 17, 17)
    let x = s.within("Mixed_6e", |s| block_c(s, x, 192)); // (N, 768, 17, 17)
    let x = s.within("Mixed_7a", |s| block_d(s, x)); // (N, 1280, 8, 8)
    let x = s.within("Mixed_7b", |s| block_e(s, x, |s| mean_branch(s, x, 192))); // (N, 2048, 8, 8)
    let x = s.within("Mixed_7c", |s| block_e(s, x, |s| largest_branch(s, x))); // (N, 2048, 8, 8)
    let pool = x.mean(&[2, 3]).reshape([n, POOL]); // (N, 2048)
    b.output("pool", pool);
    if let Some(spatial) = spatial {
        b.output("spatial", spatial);
    }
    if taps.logits {
        let weight =
            s.at("fc").frozen("weight", &[Dim::Fixed(CLASSES), Dim::Fixed(POOL)], Init::KaimingNormal);
        b.output("logits", pool.matmul(weight.transpose(&[1, 0]))); // (N, 1008)
    }
    Ok(b.finish()?)
}

/// A convolution with its folded normalisation.
fn linear<'g>(
    s: &Scope<'g>,
    name: &str,
    x: Value<'g>,
    filters: usize,
    kernel: [usize; 2],
    window: Window,
) -> Value<'g> {
    s.within(name, |s| {
        let dims = [filters, x.dim(1), kernel[0], kernel[1]].map(Dim::Fixed);
        let weight = s.frozen("weight", &dims, Init::KaimingNormal);
        let bias = s.frozen("bias", &[Dim::Fixed(filters)], Init::Zeros);
        x.conv(weight, Some(bias), window)
    })
}

/// A convolution with its folded normalisation, then ReLU.
fn conv<'g>(
    s: &Scope<'g>,
    name: &str,
    x: Value<'g>,
    filters: usize,
    kernel: [usize; 2],
    window: Window,
) -> Value<'g> {
    linear(s, name, x, filters, kernel, window).relu()
}

/// The branch that takes the mean of the 3 × 3 pixels around each, without the padding's zeros, then a 1 × 1 convolution.
///
/// Both are linear and such a mean leaves the bias as it is, so the mean is taken last, of fewer channels.
fn mean_branch<'g>(s: &Scope<'g>, x: Value<'g>, filters: usize) -> Value<'g> {
    let y = linear(s, "branch_pool", x, filters, [1, 1], Window::default());
    y.average_pool([3, 3], Window::padded(1, 1), false).relu()
}

/// A convolution that keeps the image's size.
fn same<'g>(s: &Scope<'g>, name: &str, x: Value<'g>, filters: usize, kernel: [usize; 2]) -> Value<'g> {
    conv(s, name, x, filters, kernel, Window::padded(kernel[0] / 2, kernel[1] / 2))
}

/// A 3 × 3 convolution that halves the image.
fn halving<'g>(s: &Scope<'g>, name: &str, x: Value<'g>, filters: usize) -> Value<'g> {
    conv(s, name, x, filters, [3, 3], Window::strided(2))
}

fn halved(x: Value<'_>) -> Value<'_> {
    x.max_pool([3, 3], Window::strided(2))
}

fn stem<'g>(s: &Scope<'g>, x: Value<'g>) -> Value<'g> {
    let x = halving(s, "Conv2d_1a_3x3", x, 32); // (N, 32, 149, 149)
    let x = conv(s, "Conv2d_2a_3x3", x, 32, [3, 3], Window::default()); // (N, 32, 147, 147)
    let x = halved(same(s, "Conv2d_2b_3x3", x, 64, [3, 3])); // (N, 64, 73, 73)
    let x = same(s, "Conv2d_3b_1x1", x, 80, [1, 1]); // (N, 80, 73, 73)
    let x = conv(s, "Conv2d_4a_3x3", x, 192, [3, 3], Window::default()); // (N, 192, 71, 71)
    halved(x) // (N, 192, 35, 35)
}

fn block_a<'g>(s: &Scope<'g>, x: Value<'g>, pool_filters: usize) -> Value<'g> {
    let one = same(s, "branch1x1", x, 64, [1, 1]);
    let five = same(s, "branch5x5_1", x, 48, [1, 1]);
    let five = same(s, "branch5x5_2", five, 64, [5, 5]);
    let three = same(s, "branch3x3dbl_1", x, 64, [1, 1]);
    let three = same(s, "branch3x3dbl_2", three, 96, [3, 3]);
    let three = same(s, "branch3x3dbl_3", three, 96, [3, 3]);
    let pool = mean_branch(s, x, pool_filters);
    one.concat(&[five, three, pool], 1) // (N, 224 + pool, H, W)
}

fn block_b<'g>(s: &Scope<'g>, x: Value<'g>) -> Value<'g> {
    let three = halving(s, "branch3x3", x, 384);
    let double = same(s, "branch3x3dbl_1", x, 64, [1, 1]);
    let double = same(s, "branch3x3dbl_2", double, 96, [3, 3]);
    let double = halving(s, "branch3x3dbl_3", double, 96);
    three.concat(&[double, halved(x)], 1) // (N, 480 + C, H/2, W/2)
}

fn block_c<'g>(s: &Scope<'g>, x: Value<'g>, inner: usize) -> Value<'g> {
    let one = same(s, "branch1x1", x, 192, [1, 1]);
    let seven = same(s, "branch7x7_1", x, inner, [1, 1]);
    let seven = same(s, "branch7x7_2", seven, inner, [1, 7]);
    let seven = same(s, "branch7x7_3", seven, 192, [7, 1]);
    let double = same(s, "branch7x7dbl_1", x, inner, [1, 1]);
    let double = same(s, "branch7x7dbl_2", double, inner, [7, 1]);
    let double = same(s, "branch7x7dbl_3", double, inner, [1, 7]);
    let double = same(s, "branch7x7dbl_4", double, inner, [7, 1]);
    let double = same(s, "branch7x7dbl_5", double, 192, [1, 7]);
    let pool = mean_branch(s, x, 192);
    one.concat(&[seven, double, pool], 1) // (N, 768, H, W)
}

fn block_d<'g>(s: &Scope<'g>, x: Value<'g>) -> Value<'g> {
    let three = same(s, "branch3x3_1", x, 192, [1, 1]);
    let three = halving(s, "branch3x3_2", three, 320);
    let seven = same(s, "branch7x7x3_1", x, 192, [1, 1]);
    let seven = same(s, "branch7x7x3_2", seven, 192, [1, 7]);
    let seven = same(s, "branch7x7x3_3", seven, 192, [7, 1]);
    let seven = halving(s, "branch7x7x3_4", seven, 192);
    three.concat(&[seven, halved(x)], 1) // (N, 512 + C, H/2, W/2)
}

/// The largest of the 3 × 3 pixels around each, then a 1 × 1 convolution.
fn largest_branch<'g>(s: &Scope<'g>, x: Value<'g>) -> Value<'g> {
    same(s, "branch_pool", x.max_pool([3, 3], Window::padded(1, 1)), 192, [1, 1])
}

/// The last blocks differ in how they pool.
fn block_e<'g>(s: &Scope<'g>, x: Value<'g>, pooled: impl Fn(&Scope<'g>) -> Value<'g>) -> Value<'g> {
    let one = same(s, "branch1x1", x, 320, [1, 1]);
    let three = same(s, "branch3x3_1", x, 384, [1, 1]);
    let three_a = same(s, "branch3x3_2a", three, 384, [1, 3]);
    let three_b = same(s, "branch3x3_2b", three, 384, [3, 1]);
    let double = same(s, "branch3x3dbl_1", x, 448, [1, 1]);
    let double = same(s, "branch3x3dbl_2", double, 384, [3, 3]);
    let double_a = same(s, "branch3x3dbl_3a", double, 384, [1, 3]);
    let double_b = same(s, "branch3x3dbl_3b", double, 384, [3, 1]);
    one.concat(&[three_a, three_b, double_a, double_b, pooled(s)], 1) // (N, 2048, H, W)
}

/// Seven channels of a raw 1×1 convolution, flattened as (y, x, channel).
fn spatial<'g>(s: &Scope<'g>, x: Value<'g>) -> Value<'g> {
    let dims = [SPATIAL_CHANNELS, x.dim(1), 1, 1].map(Dim::Fixed);
    let y = x.conv(s.frozen("weight", &dims, Init::KaimingNormal), None, Window::default()); // (N, 7, 17, 17)
    y.transpose(&[0, 2, 3, 1]).reshape([y.dim(0), SPATIAL_CHANNELS * y.dim(2) * y.dim(3)]) // (N, 2023)
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALL: Taps = Taps { spatial: true, logits: true };

    #[test]
    fn the_network_has_the_published_sizes() {
        let graph = features(2, SIDE, ALL).unwrap();
        let outputs: Vec<(&str, &[usize])> = graph
            .outputs()
            .iter()
            .map(|(name, id)| (name.as_str(), graph.node(*id).ty.shape.dims()))
            .collect();
        let expected: [(&str, &[usize]); 3] =
            [("pool", &[2, POOL]), ("spatial", &[2, SPATIAL]), ("logits", &[2, CLASSES])];
        assert_eq!(outputs, expected);
        let convolutions = graph
            .parameters()
            .iter()
            .filter(|p| p.name.rsplit_once('.').is_some_and(|(_, part)| part == "bias"))
            .count();
        assert_eq!(convolutions, 94);
        // torchvision counts 5.71 billion multiply-adds for the same convolutions; the seven spatial channels come on top.
        let macs = features(1, SIDE, Taps { spatial: false, logits: false }).unwrap().cost().macs;
        assert!((5.70e9..5.73e9).contains(&(macs as f64)), "{macs}");
    }

    #[test]
    fn only_what_is_asked_for_is_there() {
        let graph = features(1, MIN_SIDE, Taps { spatial: false, logits: false }).unwrap();
        assert_eq!(graph.outputs().len(), 1);
        assert!(
            graph.parameters().iter().all(|p| !p.name.starts_with("fc") && !p.name.starts_with("spatial"))
        );
        for (n, side, key) in [(0, SIDE, "batch"), (1, MIN_SIDE - 1, "side")] {
            let error = features(n, side, ALL).unwrap_err();
            assert!(matches!(error, ModelError::BadValue { key: k, .. } if k == key), "{error}");
        }
    }
}
