//! A small classifier of small images, whose last hidden layer gives features for a Fréchet distance.
//!
//! Two strided convolutions and two linear layers: seconds to train, and its features mean something on images for which
//! the Inception network was never made.

use graph_builder::{Builder, DType, Dim, Graph, Init, Scope, Type, Value, Window};

use crate::error::ModelError;
use crate::layers::linear;

/// Length of the feature vectors.
pub const FEATURES: usize = 128;
/// Filters of the two convolutions.
const FILTERS: [usize; 2] = [32, 64];
/// Added to the probability of the right class before its logarithm.
const FLOOR: f64 = 1e-12;

/// What the classifier is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Classifier {
    /// Channels of an image.
    pub channels: usize,
    /// Rows of an image, at least 4.
    pub height: usize,
    /// Columns of an image, at least 4.
    pub width: usize,
    /// Number of classes.
    pub classes: usize,
}

impl Classifier {
    /// Features and class scores of `n` images.
    ///
    /// # Shapes
    /// - `x`: `(N, C, H, W)`, pixels on −1..1; `features`: `(N, 128)`; `logits`: `(N, classes)`
    /// # Errors
    /// [`ModelError::BadValue`] for a size that is too small, [`ModelError::Graph`].
    pub fn features(&self, n: usize) -> Result<Graph, ModelError> {
        self.check(n)?;
        let b = Builder::new("features");
        let x = self.images(&b, n);
        let (features, logits) = self.layers(&b.root(), x);
        b.output("features", features);
        b.output("logits", logits);
        Ok(b.finish()?)
    }

    /// Mean cross-entropy of `n` images and its gradients.
    ///
    /// # Shapes
    /// - `x`: `(N, C, H, W)`, pixels on −1..1; `y`: `(N)` i64; `loss`: a scalar; `grad.<parameter>`
    /// # Errors
    /// As [`Classifier::features`].
    pub fn train_step(&self, n: usize) -> Result<Graph, ModelError> {
        self.check(n)?;
        let b = Builder::new("train-step");
        let x = self.images(&b, n);
        let y = b.input("y", Type::new(DType::I64, [n]));
        let (_, logits) = self.layers(&b.root(), x);
        let numbers: Vec<f64> = (0..self.classes).map(|i| i as f64).collect();
        let numbers = b.constant(DType::I64, [1, self.classes], numbers);
        let right = y.reshape([n, 1]).equal(numbers).cast(DType::F32); // (N, K)
        let probability = (logits.softmax() * right).sum(&[1]); // (N, 1)
        let loss = -((probability + FLOOR).log().mean(&[0, 1]).reshape([]));
        b.output("loss", loss);
        let (names, values): (Vec<_>, Vec<_>) = b.trainable().into_iter().unzip();
        for (name, gradient) in names.iter().zip(b.gradients(loss, &values)?) {
            b.output(&format!("grad.{name}"), gradient);
        }
        Ok(b.finish()?)
    }

    fn check(&self, n: usize) -> Result<(), ModelError> {
        for (key, least, got) in [
            ("batch", 1, n),
            ("channels", 1, self.channels),
            ("height", 4, self.height),
            ("width", 4, self.width),
            ("classes", 2, self.classes),
        ] {
            if got < least {
                let (expected, got) = (format!("{least} or more"), got.to_string());
                return Err(ModelError::BadValue { key, expected, got });
            }
        }
        Ok(())
    }

    fn images<'g>(&self, b: &'g Builder, n: usize) -> Value<'g> {
        b.input("x", Type::f32([n, self.channels, self.height, self.width])) // (N, C, H, W)
    }

    fn layers<'g>(&self, s: &Scope<'g>, x: Value<'g>) -> (Value<'g>, Value<'g>) {
        let x = s.within("conv1", |s| halving(s, x, FILTERS[0])); // (N, 32, H/2, W/2)
        let x = s.within("conv2", |s| halving(s, x, FILTERS[1])); // (N, 64, H/4, W/4)
        let flat = x.dim(1) * x.dim(2) * x.dim(3);
        let x = x.reshape([x.dim(0), flat]);
        let (features, classes) = (Dim::Fixed(FEATURES), Dim::Fixed(self.classes));
        let hidden =
            s.within("fc1", |s| linear(s, x, Dim::Fixed(flat), features, Init::KaimingNormal)).relu(); // (N, 128)
        (hidden, s.within("fc2", |s| linear(s, hidden, features, classes, Init::KaimingNormal)))
    }
}

/// A 5 × 5 convolution that halves the image, then ReLU.
fn halving<'g>(s: &Scope<'g>, x: Value<'g>, filters: usize) -> Value<'g> {
    let weight = s.param("weight", &[filters, x.dim(1), 5, 5].map(Dim::Fixed), Init::KaimingNormal);
    let bias = s.param("bias", &[Dim::Fixed(filters)], Init::Zeros);
    x.conv(weight, Some(bias), Window { strides: [2, 2], ..Window::padded(2, 2) }).relu()
}

#[cfg(test)]
mod tests {
    use super::*;

    const FASHION: Classifier = Classifier { channels: 1, height: 28, width: 28, classes: 10 };

    #[test]
    fn every_parameter_gets_a_gradient() {
        let graph = FASHION.train_step(3).unwrap();
        let parameters: Vec<String> = graph.parameters().iter().map(|p| format!("grad.{}", p.name)).collect();
        let gradients: Vec<&String> = graph.outputs().iter().map(|(name, _)| name).skip(1).collect();
        assert!(gradients.into_iter().eq(&parameters));
        let trained: Vec<_> = FASHION.features(3).unwrap().parameters().to_vec();
        assert_eq!(trained, graph.parameters());
    }

    #[test]
    fn images_without_room_are_refused() {
        let error = Classifier { height: 3, ..FASHION }.features(1).unwrap_err();
        assert!(matches!(error, ModelError::BadValue { key: "height", .. }), "{error}");
    }
}
