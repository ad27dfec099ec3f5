//! Whether ONNX Runtime's CUDA provider has a kernel for every node of a program, before it sees the program: its own
//! refusal names neither the layer nor the remedy.
//!
//! The table holds what sessions of ONNX Runtime 1.31.1 with the CPU fall-back disabled accept, one model an op and type,
//! at opset 21; at 23 some more are accepted.

use std::collections::BTreeMap;

use onnx_protobuf::{AttributeProto, FunctionProto, ModelProto, NodeProto};
use protobuf::Message;

use super::DOMAIN;
use super::call::{NativeCall, NativeKernel, shapes};
use super::message::tensor_type;
use crate::error::{GraphError, Result};
use crate::onnx::OpenProgram;
use crate::program::OnnxProgram;
use crate::shape::{DType, Type};

/// What an op's answer is made of, as far as types go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Answer {
    /// The type of the operand at this position, which is also the one that the kernel is chosen by.
    Of(usize),
    /// A truth value; the kernel is chosen by the first operand.
    Truth,
    /// Axis sizes; the kernel is chosen by the first operand.
    Sizes,
    /// The type that an attribute says; any operand.
    Attribute,
}

/// One standard op: its answer, and the types that the CUDA provider has it in.
struct Row {
    op: &'static str,
    answer: Answer,
    cuda: &'static [DType],
}

const REALS: &[DType] = &[DType::F32, DType::F16, DType::Bf16];
const NUMBERS: &[DType] = &[DType::F32, DType::F16, DType::Bf16, DType::I64];
const ALL: &[DType] = &[DType::F32, DType::F16, DType::Bf16, DType::I64, DType::Bool];
const NO_BF16: &[DType] = &[DType::F32, DType::F16];

const fn same(op: &'static str, cuda: &'static [DType]) -> Row {
    Row { op, answer: Answer::Of(0), cuda }
}

/// Every standard op that programs and function bodies are made of.
const ROWS: &[Row] = &[
    Row { op: "Constant", answer: Answer::Attribute, cuda: ALL },
    Row { op: "Cast", answer: Answer::Attribute, cuda: ALL },
    Row { op: "Shape", answer: Answer::Sizes, cuda: ALL },
    same("Identity", ALL),
    same("Neg", NUMBERS),
    same("Exp", REALS),
    same("Log", NO_BF16),
    same("Sqrt", REALS),
    same("Sin", NO_BF16),
    same("Cos", NO_BF16),
    same("Tanh", REALS),
    same("Sigmoid", REALS),
    same("Gelu", REALS),
    same("Relu", REALS),
    same("Add", NUMBERS),
    same("Sub", NUMBERS),
    same("Mul", NUMBERS),
    same("Div", NUMBERS),
    same("Max", NUMBERS),
    Row { op: "Less", answer: Answer::Truth, cuda: &[DType::F32, DType::F16, DType::I64] },
    Row { op: "Equal", answer: Answer::Truth, cuda: &[DType::F32, DType::F16, DType::I64, DType::Bool] },
    Row { op: "Where", answer: Answer::Of(1), cuda: NUMBERS },
    same("ReduceSum", NUMBERS),
    same("ReduceMean", REALS),
    same("Reshape", ALL),
    same("Flatten", ALL),
    same("Unsqueeze", ALL),
    same("Transpose", ALL),
    same("Expand", ALL),
    same("Slice", ALL),
    same("Concat", ALL),
    same("Split", ALL),
    same("Gather", ALL),
    same("Pad", &[DType::F32, DType::F16, DType::Bool]),
    same("MatMul", REALS),
    same("Gemm", REALS),
    same("Softmax", REALS),
    same("Attention", REALS),
    same("LayerNormalization", REALS),
    same("Conv", NO_BF16),
    same("ConvTranspose", NO_BF16),
    same("MaxPool", NO_BF16),
    same("AveragePool", NO_BF16),
    same("SpaceToDepth", NO_BF16),
    same("DepthToSpace", NO_BF16),
];

/// Names of the standard ops that the table knows.
pub fn known_ops() -> impl Iterator<Item = &'static str> {
    ROWS.iter().map(|row| row.op)
}

/// Tells how a use of a `mudit` op is run.
type Native<'a> = &'a dyn Fn(&NativeCall<'_>) -> NativeKernel;

impl OnnxProgram {
    /// Checks that the CUDA provider has a kernel for every node, function bodies included, in the types that are used,
    /// and that kernels of our own can take what they are given.
    ///
    /// `native` tells whether a `mudit` op runs by a kernel of our own: its body is then not run.
    ///
    /// # Errors
    /// [`GraphError::IllegalType`] naming op, layer, type and remedy; [`GraphError::UnfitKernel`];
    /// [`GraphError::Emit`] for bytes that are no model or an op that the table does not know.
    pub fn check_cuda(&self, native: &dyn Fn(&NativeCall<'_>) -> NativeKernel) -> Result<()> {
        let inputs: Vec<_> = self.inputs.iter().map(|input| (input.name.as_str(), input.dtype)).collect();
        check(&Program { name: &self.name, operands: &self.native_operands }, &self.bytes, &inputs, native)
    }
}

impl OpenProgram {
    /// As [`OnnxProgram::check_cuda`].
    ///
    /// # Errors
    /// As [`OnnxProgram::check_cuda`].
    pub fn check_cuda(&self, native: &dyn Fn(&NativeCall<'_>) -> NativeKernel) -> Result<()> {
        let inputs: Vec<_> = self.inputs.iter().map(|input| (input.name.as_str(), input.dtype)).collect();
        check(&Program { name: &self.name, operands: &self.native_operands }, &self.bytes, &inputs, native)
    }
}

fn check(program: &Program<'_>, bytes: &[u8], inputs: &[(&str, DType)], native: Native<'_>) -> Result<()> {
    let model = ModelProto::parse_from_bytes(bytes).map_err(|e| program.broken(e.to_string()))?;
    let mut types: Types<'_> = BTreeMap::new();
    for tensor in &model.graph.initializer {
        types.insert(&tensor.name, program.dtype(i64::from(tensor.data_type))?);
    }
    types.extend(inputs.iter().copied());
    let functions = model.functions.iter().map(|f| (f.name.as_str(), f)).collect();
    let check = Check { program, functions, native };
    // Nodes stand in an order for execution; every operand is made by an earlier node but for that.
    for node in &model.graph.node {
        check.node(node, &mut types, &Layer { node: &node.name, within: None })?;
    }
    Ok(())
}

/// A program's name, and what its model does not hold.
struct Program<'a> {
    name: &'a str,
    operands: &'a BTreeMap<String, Type>,
}

impl Program<'_> {
    fn dtype(&self, number: i64) -> Result<DType> {
        let known = [DType::F32, DType::F16, DType::Bf16, DType::I64, DType::Bool];
        let found = known.into_iter().find(|dtype| tensor_type(*dtype) == number);
        found.ok_or_else(|| self.broken(format!("element type {number} is none of ours")))
    }

    fn broken(&self, reason: String) -> GraphError {
        GraphError::Emit { graph: self.name.to_owned(), reason }
    }
}

type Types<'a> = BTreeMap<&'a str, DType>;

/// Where a node stands.
struct Layer<'a> {
    /// Name of the node of the graph.
    node: &'a str,
    /// The fused op in whose body it is.
    within: Option<&'a str>,
}

struct Check<'a> {
    program: &'a Program<'a>,
    functions: BTreeMap<&'a str, &'a FunctionProto>,
    native: Native<'a>,
}

impl<'a> Check<'a> {
    fn node(&self, node: &'a NodeProto, types: &mut Types<'a>, layer: &Layer<'_>) -> Result<()> {
        let operands = node.input.iter().map(|name| {
            let found = types.get(name.as_str()).copied();
            found.ok_or_else(|| {
                self.program.broken(format!("`{}` reads `{name}`, which nothing makes", layer.node))
            })
        });
        let operands = operands.collect::<Result<Vec<_>>>()?;
        let answers = if node.domain == DOMAIN {
            self.call(node, &operands, layer)?
        } else {
            vec![self.standard(node, &operands, layer)?; node.output.len()]
        };
        types.extend(node.output.iter().map(String::as_str).zip(answers));
        Ok(())
    }

    /// The types of the results of a fused op; its body is checked unless our own kernel runs.
    fn call(&self, node: &NodeProto, operands: &[DType], layer: &Layer<'_>) -> Result<Vec<DType>> {
        let Some(body) = self.functions.get(node.op_type.as_str()) else {
            return Err(self.program.broken(format!("`{}` has no function body", layer.node)));
        };
        let shapes = shapes(node, self.program.operands);
        let kernel = operands
            .first()
            .map_or(NativeKernel::Body, |&dtype| (self.native)(&NativeCall { node, dtype, shapes }));
        if let NativeKernel::Unfit(reason) = kernel {
            let (program, layer) = (self.program.name.to_owned(), layer.node.to_owned());
            return Err(GraphError::UnfitKernel { program, op: node.op_type.clone(), layer, reason });
        }
        let ours = kernel == NativeKernel::Own;
        let mut types: Types<'_> =
            body.input.iter().map(String::as_str).zip(operands.iter().copied()).collect();
        let layer = Layer { node: layer.node, within: (!ours).then_some(node.op_type.as_str()) };
        for step in &body.node {
            if ours {
                let row = self.row(step)?;
                let operand = |k: usize| step.input.get(k).and_then(|name| types.get(name.as_str())).copied();
                let answer = self.answer(step, row, &operand)?;
                types.extend(step.output.iter().map(|name| (name.as_str(), answer)));
            } else {
                self.node(step, &mut types, &layer)?;
            }
        }
        let results = body.output.iter().map(|name| types.get(name.as_str()).copied());
        results
            .collect::<Option<Vec<_>>>()
            .ok_or_else(|| self.program.broken(format!("the body of `{}` lacks a result", layer.node)))
    }

    fn row(&self, node: &NodeProto) -> Result<&'static Row> {
        let row = ROWS.iter().find(|row| row.op == node.op_type);
        row.ok_or_else(|| {
            self.program.broken(format!("the table of CUDA's types has no row for {}", node.op_type))
        })
    }

    fn answer(&self, node: &NodeProto, row: &Row, operand: &dyn Fn(usize) -> Option<DType>) -> Result<DType> {
        let missing = || self.program.broken(format!("{} has too few operands", node.op_type));
        match row.answer {
            Answer::Of(k) => operand(k).ok_or_else(missing),
            Answer::Truth => Ok(DType::Bool),
            Answer::Sizes => Ok(DType::I64),
            Answer::Attribute => node
                .attribute
                .iter()
                .find_map(typed)
                .ok_or_else(|| self.program.broken(format!("a {} without a type", node.op_type)))
                .and_then(|number| self.program.dtype(number)),
        }
    }

    fn standard(&self, node: &NodeProto, operands: &[DType], layer: &Layer<'_>) -> Result<DType> {
        let row = self.row(node)?;
        let answer = self.answer(node, row, &|k| operands.get(k).copied())?;
        let chosen_by = match row.answer {
            Answer::Of(_) => answer,
            Answer::Truth | Answer::Sizes | Answer::Attribute => operands.first().copied().unwrap_or(answer),
        };
        if row.cuda.contains(&chosen_by) {
            return Ok(answer);
        }
        Err(GraphError::IllegalType {
            program: self.program.name.to_owned(),
            op: node.op_type.clone(),
            layer: layer.node.to_owned(),
            within: layer.within.map(|op| format!(" (in the body of {op})")).unwrap_or_default(),
            got: chosen_by,
            legal: row.cuda.iter().map(ToString::to_string).collect::<Vec<_>>().join(", "),
        })
    }
}

/// The element type that an attribute of `Cast` or `Constant` says.
fn typed(attribute: &AttributeProto) -> Option<i64> {
    match attribute.name.as_str() {
        "to" => Some(attribute.i),
        "value" => attribute.t.as_ref().map(|tensor| i64::from(tensor.data_type)),
        "value_float" => Some(tensor_type(DType::F32)),
        "value_int" => Some(tensor_type(DType::I64)),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Activation, Builder, Precision, Shape, Value, Weights};

    fn checked(build: impl for<'g> FnOnce(&'g Builder, Value<'g>) -> Value<'g>) -> Result<()> {
        let b = Builder::new("checked");
        let x = b.input("x", Type::f32([1, 2, 4, 4]));
        b.output("y", b.root().within("blocks.3.mlp", |_| build(&b, x)).cast(DType::F32));
        let program = b.finish().unwrap().emit(Weights::Inputs).unwrap();
        program.check_cuda(&|_| NativeKernel::Body)
    }

    #[test]
    fn a_missing_type_is_told_with_op_layer_and_remedy() {
        checked(|_, x| x.log()).unwrap();
        checked(|_, x| x.cast(DType::F16).log()).unwrap();
        let refusal = checked(|_, x| x.cast(DType::Bf16).log()).unwrap_err().to_string();
        assert!(refusal.starts_with("program `checked`: Log of `blocks.3.mlp/Log."), "{refusal}");
        assert!(refusal.contains("has no CUDA kernel for bf16, only for f32, f16"), "{refusal}");
        let inside = checked(|_, x| x.cast(DType::Bf16).patchify(2, crate::PatchOrder::ChannelsFirst));
        assert!(inside.unwrap_err().to_string().contains("(in the body of PatchifyBf16)"));
    }

    #[test]
    fn a_kernel_of_our_own_stands_for_the_body() {
        let b = Builder::new("native");
        let x = b.input("x", Type::f32([1, 2, 4, 4])).cast(DType::Bf16);
        b.output("y", x.patchify(2, crate::PatchOrder::ChannelsFirst).cast(DType::F32));
        let program = b.finish().unwrap().emit(Weights::Inputs).unwrap();
        let native = |kernel: NativeKernel| {
            let kernel = move |call: &NativeCall<'_>| match (call.op(), call.dtype()) {
                ("Patchify", DType::Bf16) => kernel.clone(),
                _ => panic!("{call:?}"),
            };
            program.check_cuda(&kernel).map_err(|e| e.to_string())
        };
        native(NativeKernel::Own).unwrap();
        assert!(native(NativeKernel::Body).unwrap_err().contains("in the body of PatchifyBf16"));
        let refusal = native(NativeKernel::Unfit("it is too small".to_owned())).unwrap_err();
        assert!(refusal.starts_with("program `native`: PatchifyBf16 of `"), "{refusal}");
        assert!(refusal.contains("CUDA kernel: it is too small; use provider `cpu`"), "{refusal}");
    }

    #[test]
    fn a_kernel_sees_shapes_and_attributes_of_its_call() {
        let b = Builder::new("native");
        let x = b.input("x", Type::f32([1, 2, 4, 4]));
        b.output("y", x.patchify(2, crate::PatchOrder::ChannelsFirst));
        let program = b.finish().unwrap().emit(Weights::Inputs).unwrap();
        let kernel = |call: &NativeCall<'_>| {
            assert_eq!(call.shapes(), [&Shape::from([1, 2, 4, 4])]);
            assert_eq!((call.int("patch"), call.int("channels_last")), (Some(2), Some(0)));
            assert_eq!((call.float("scale"), call.text("activation")), (None, None));
            NativeKernel::Own
        };
        program.check_cuda(&kernel).unwrap();
    }

    #[test]
    fn comparisons_and_constants_have_the_types_that_they_say() {
        let refusal = checked(|b, x| b.scalar(0.5).cast(DType::Bf16).less(x.cast(DType::Bf16)));
        assert!(refusal.unwrap_err().to_string().contains("Less of "));
        checked(|b, x| x.equal(b.scalar(0.0)).cast(DType::F16)).unwrap();
    }

    #[test]
    fn a_mixed_precision_layer_is_legal() {
        let b = Builder::new("layer");
        let x = b.input("x", Type::f32([3, 4]));
        let [w, bias] = [("w", vec![2, 4]), ("b", vec![2])].map(|(n, shape)| b.input(n, Type::f32(shape)));
        let loss = x.activated_linear(Activation::Gelu, w, bias).exp().mean(&[0, 1]).reshape([]);
        let grads = b.gradients(loss, &[w, bias]).unwrap();
        b.output("dw", grads[0]);
        b.output("db", grads[1]);
        let graph = b.finish().unwrap().optimised().unwrap();
        for precision in Precision::ALL {
            let program = graph.in_precision(precision).unwrap().emit(Weights::Inputs).unwrap();
            program.check_cuda(&|_| NativeKernel::Body).unwrap();
        }
    }
}
