//! One product of a linear layer by several means, for the rows `product-…` of the speed comparison.

use std::sync::Arc;

use graph_builder::{Activation, Builder, Type, Value, Weights};
use runtime::{Binding, Runtime, Session, SessionOptions};
use train_engine::random::{Purpose, Stream};

use crate::{Result, Work};

/// What is computed of a layer of `rows` samples.
pub(crate) struct Product {
    form: Form,
    rows: usize,
    inputs: usize,
    outputs: usize,
}

#[derive(Clone, Copy)]
enum Form {
    /// `x Wᵀ`.
    Forward,
    /// `ct W`.
    GradInput,
    /// `ctᵀ x`.
    GradWeight,
}

impl Product {
    /// Reads `forward|grad-input|grad-weight:ROWSxINPUTSxOUTPUTS`.
    pub(crate) fn parse(text: &str) -> Result<Self> {
        let (form, sizes) = text.split_once(':').ok_or("a product is FORM:ROWSxINPUTSxOUTPUTS")?;
        let form = match form {
            "forward" => Form::Forward,
            "grad-input" => Form::GradInput,
            "grad-weight" => Form::GradWeight,
            other => return Err(format!("`{other}` is none of forward, grad-input, grad-weight").into()),
        };
        let sizes = sizes.split('x').map(str::parse).collect::<std::result::Result<Vec<usize>, _>>()?;
        let [rows, inputs, outputs] = sizes[..] else { return Err("three sizes are needed".into()) };
        Ok(Self { form, rows, inputs, outputs })
    }

    pub(crate) fn flops(&self) -> f64 {
        2.0 * (self.rows * self.inputs * self.outputs) as f64
    }

    /// Shapes of the two operands, the answer's and the names that the layer has for them.
    fn shapes(&self) -> [[usize; 2]; 3] {
        let (x, weight, y) =
            ([self.rows, self.inputs], [self.outputs, self.inputs], [self.rows, self.outputs]);
        match self.form {
            Form::Forward => [x, weight, y],
            Form::GradInput => [y, weight, x],
            Form::GradWeight => [y, x, weight],
        }
    }

    /// The op of our graphs, by the native kernel or by ONNX Runtime's nodes (`native` false).
    pub(crate) fn in_graph(&self, runtime: &Arc<Runtime>, native: bool, threads: usize) -> Result<Work> {
        let b = Builder::new("product");
        let [first, second, _] = self.shapes();
        let (left, right) = (b.input("left", Type::f32(first)), b.input("right", Type::f32(second)));
        let answers: Vec<Value<'_>> = match self.form {
            Form::Forward => vec![left.linear(right, b.input("bias", Type::f32([self.outputs])))],
            Form::GradInput => vec![left.linear_grad_input(right, None)],
            Form::GradWeight => left.linear_grad_weight(Activation::None, right).results(),
        };
        for (i, answer) in answers.into_iter().enumerate() {
            b.output(&format!("out{i}"), answer);
        }
        let program = b.finish()?.emit(Weights::Inputs)?;
        let options = SessionOptions { threads, native_kernels: native, ..SessionOptions::default() };
        let session = Session::load(runtime, &program, &runtime::Weights::Inside, &options)?;
        let mut binding = Binding::owned(&session)?;
        for name in ["left", "right"] {
            Stream::new(0, Purpose::SampleInit, 0, 0).fill_normal(binding.input_f32(name)?);
        }
        Ok(Box::new(move || Ok(binding.run()?)))
    }

    /// The `gemm` crate, without bias or its gradient.
    #[allow(unsafe_code, reason = "the crate takes addresses")]
    pub(crate) fn by_gemm(&self, threads: usize) -> Work {
        let [first, second, answer] = self.shapes();
        let noise = |shape: [usize; 2]| {
            let mut data = vec![0.0_f32; shape[0] * shape[1]];
            Stream::new(0, Purpose::SampleInit, 0, 0).fill_normal(&mut data);
            data
        };
        let (left, right, mut out) = (noise(first), noise(second), vec![0.0_f32; answer[0] * answer[1]]);
        // Strides of (row, term) on the left and (term, column) on the right.
        let (terms, left_strides, right_strides) = match self.form {
            Form::Forward => (first[1], (first[1], 1), (1, second[1])),
            Form::GradInput => (first[1], (first[1], 1), (second[1], 1)),
            Form::GradWeight => (first[0], (1, first[1]), (second[1], 1)),
        };
        let parallel = gemm::Parallelism::Rayon(threads);
        Box::new(move || {
            // SAFETY: the strides are those of the shapes, and all three buffers have their whole size.
            unsafe {
                gemm::gemm(
                    answer[0],
                    answer[1],
                    terms,
                    out.as_mut_ptr(),
                    1,
                    answer[1] as isize,
                    false,
                    left.as_ptr(),
                    left_strides.1 as isize,
                    left_strides.0 as isize,
                    right.as_ptr(),
                    right_strides.1 as isize,
                    right_strides.0 as isize,
                    0.0,
                    1.0,
                    false,
                    false,
                    false,
                    parallel,
                );
            }
            if out[0].is_finite() { Ok(()) } else { Err("the product is not finite".into()) }
        })
    }
}
