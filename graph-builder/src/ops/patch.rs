//! Images to rows of patches and back. Each op is the gradient of the other.

use crate::error::{Refusal, refuse};
use crate::eval::Array;
use crate::onnx::{Attribute, Emitter, FunctionBody};
use crate::op::{Cost, Grad, Policy, Rules, Storage};
use crate::shape::{Shape, Type};
use crate::value::Value;

/// Order of the features of a patch of side P, slowest first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PatchOrder {
    /// Channel, row, column: (C, P, P).
    ChannelsFirst,
    /// Row, column, channel: (P, P, C).
    ChannelsLast,
}

impl PatchOrder {
    /// Feature of a channel at a place in the patch, of `channels` and a side of `patch`.
    fn feature(self, (c, i, j): (usize, usize, usize), channels: usize, patch: usize) -> usize {
        match self {
            Self::ChannelsFirst => (c * patch + i) * patch + j,
            Self::ChannelsLast => (i * patch + j) * channels + c,
        }
    }

    /// What the name of the function body says of the order; bodies cannot branch on an attribute.
    fn variant(self) -> &'static str {
        match self {
            Self::ChannelsFirst => "",
            Self::ChannelsLast => "ChannelsLast",
        }
    }

    fn attributes(self, patch: usize) -> Vec<Attribute> {
        let last = i64::from(self == Self::ChannelsLast);
        vec![Attribute::int("patch", patch as i64), Attribute::int("channels_last", last)]
    }
}

/// Square patches of an image as rows, row by row.
///
/// # Shapes
/// - `x`: `(N, C, H, W)`; returns `(N, H/P·W/P, C·P·P)`
/// # Constraints
/// - C1: a float operand of rank 4 · C2: the patch's side divides height and width
#[derive(Clone, Debug, PartialEq)]
pub struct Patchify {
    /// Side of a patch, P.
    pub patch: usize,
    /// Order of a patch's features.
    pub order: PatchOrder,
}

/// Rows of patches put together to an image: the inverse of [`Patchify`].
///
/// # Shapes
/// - `x`: `(N, H/P·W/P, C·P·P)`; returns `(N, C, H, W)`
/// # Constraints
/// - C1: a float operand of rank 3 · C2: the patch's side divides height and width
/// - C3: one row a patch · C4: the last axis is a multiple of P·P
#[derive(Clone, Debug, PartialEq)]
pub struct Unpatchify {
    /// Side of a patch, P.
    pub patch: usize,
    /// Order of a patch's features.
    pub order: PatchOrder,
    /// Height of the image, H.
    pub height: usize,
    /// Width of the image, W.
    pub width: usize,
}

/// Number of rows and columns of patches.
fn grid(patch: usize, height: usize, width: usize) -> Result<(usize, usize), Refusal> {
    if patch == 0 || !height.is_multiple_of(patch) || !width.is_multiple_of(patch) {
        return refuse(format!(
            "C2: a height and a width of a multiple of {patch}, not {height} and {width}"
        ));
    }
    Ok((height / patch, width / patch))
}

/// Row and feature of a pixel of an image `image` (N, C, H, W).
fn place(
    patch: usize,
    order: PatchOrder,
    image: &[usize],
    (c, y, x): (usize, usize, usize),
) -> (usize, usize) {
    let row = (y / patch) * (image[3] / patch) + x / patch;
    (row, order.feature((c, y % patch, x % patch), image[1], patch))
}

impl Rules for Patchify {
    fn name(&self) -> &'static str {
        "Patchify"
    }
    fn policy(&self) -> Policy {
        Policy::F32
    }
    fn storage(&self) -> Storage {
        Storage::Own
    }
    fn infer(&self, args: &[&Type]) -> Result<Type, Refusal> {
        let x = args[0];
        let &[n, c, height, width] = x.shape.dims() else {
            return refuse("C1: a float operand of rank 4");
        };
        if !x.dtype.is_float() {
            return refuse("C1: a float operand of rank 4");
        }
        let (rows, columns) = grid(self.patch, height, width)?;
        Ok(Type { dtype: x.dtype, shape: Shape::from([n, rows * columns, c * self.patch * self.patch]) })
    }
    fn vjp<'g>(&self, args: &[Value<'g>], _: Value<'g>, ct: Value<'g>) -> Vec<Grad<'g>> {
        vec![Grad::Value(ct.unpatchify(self.patch, self.order, args[0].dim(2), args[0].dim(3)))]
    }
    fn emit(&self, emitter: &mut Emitter<'_>) {
        let f = FunctionBody::new("Patchify", &["x"], &["patch", "channels_last"]);
        let mut f = f.of(emitter.dtype());
        let swap = |perm: &[i64]| vec![Attribute::ints("perm", perm.to_vec())];
        let deep = f.node_with("SpaceToDepth", &["x"], vec![Attribute::int_of("blocksize", "patch")]);
        let flat = f.int_list(&[0, 0, -1]);
        let deep = f.node("Reshape", &[&deep, &flat]); // (N, P·P·C, T)
        match self.order {
            PatchOrder::ChannelsLast => f.result_with("Transpose", &[&deep], swap(&[0, 2, 1])),
            PatchOrder::ChannelsFirst => {
                let rows = f.node_with("Transpose", &[&deep], swap(&[0, 2, 1]));
                let side = f.int_attribute("patch");
                let area = f.node("Mul", &[&side, &side]);
                let (same, rest) = (f.int_list(&[0, 0]), f.int_list(&[-1]));
                let shape = f.node_with("Concat", &[&same, &area, &rest], vec![Attribute::int("axis", 0)]);
                let rows = f.node("Reshape", &[&rows, &shape]); // (N, T, P·P, C)
                let rows = f.node_with("Transpose", &[&rows], swap(&[0, 1, 3, 2]));
                f.result("Reshape", &[&rows, &flat]);
            }
        }
        emitter.native(f.variant(self.order.variant()), self.order.attributes(self.patch));
    }
    fn eval(&self, args: &[&Array], out: &Type) -> Array {
        let mut answer = Array::zeros(out.shape.dims());
        for (at, value) in args[0].indexed_iter() {
            let (row, feature) = place(self.patch, self.order, args[0].shape(), (at[1], at[2], at[3]));
            answer[[at[0], row, feature]] = *value;
        }
        answer
    }
    fn cost(&self, args: &[&Type], out: &Type) -> Cost {
        Cost::elementwise(0, args, out)
    }
}

impl Rules for Unpatchify {
    fn name(&self) -> &'static str {
        "Unpatchify"
    }
    fn policy(&self) -> Policy {
        Policy::F32
    }
    fn storage(&self) -> Storage {
        Storage::Own
    }
    fn infer(&self, args: &[&Type]) -> Result<Type, Refusal> {
        let x = args[0];
        if !x.dtype.is_float() || x.shape.rank() != 3 {
            return refuse("C1: a float operand of rank 3");
        }
        let (rows, columns) = grid(self.patch, self.height, self.width)?;
        if x.shape.0[1] != rows * columns {
            return refuse(format!("C3: {} rows", rows * columns));
        }
        let area = self.patch * self.patch;
        if !x.shape.0[2].is_multiple_of(area) {
            return refuse(format!("C4: a last axis of a multiple of {area}"));
        }
        let shape = Shape::from([x.shape.0[0], x.shape.0[2] / area, self.height, self.width]);
        Ok(Type { dtype: x.dtype, shape })
    }
    fn vjp<'g>(&self, _: &[Value<'g>], _: Value<'g>, ct: Value<'g>) -> Vec<Grad<'g>> {
        vec![Grad::Value(ct.patchify(self.patch, self.order))]
    }
    fn emit(&self, emitter: &mut Emitter<'_>) {
        let attributes = ["patch", "channels_last", "height", "width"];
        let mut f = FunctionBody::new("Unpatchify", &["x"], &attributes).of(emitter.dtype());
        let columns = f.node_with("Transpose", &["x"], vec![Attribute::ints("perm", vec![0, 2, 1])]);
        let [height, width, side] = ["height", "width", "patch"].map(|name| f.int_attribute(name));
        let (same, rows) = (f.int_list(&[0, 0]), f.node("Div", &[&height, &side]));
        let across = f.node("Div", &[&width, &side]);
        let shape = f.node_with("Concat", &[&same, &rows, &across], vec![Attribute::int("axis", 0)]);
        let deep = f.node("Reshape", &[&columns, &shape]); // (N, C·P·P, rows, columns)
        let mode = match self.order {
            PatchOrder::ChannelsFirst => "CRD",
            PatchOrder::ChannelsLast => "DCR",
        };
        let sides = vec![Attribute::int_of("blocksize", "patch"), Attribute::text("mode", mode)];
        f.result_with("DepthToSpace", &[&deep], sides);
        let mut attributes = self.order.attributes(self.patch);
        attributes.extend([
            Attribute::int("height", self.height as i64),
            Attribute::int("width", self.width as i64),
        ]);
        emitter.native(f.variant(self.order.variant()), attributes);
    }
    fn eval(&self, args: &[&Array], out: &Type) -> Array {
        Array::from_shape_fn(out.shape.dims(), |at| {
            let (row, feature) = place(self.patch, self.order, out.shape.dims(), (at[1], at[2], at[3]));
            args[0][[at[0], row, feature]]
        })
    }
    fn cost(&self, args: &[&Type], out: &Type) -> Cost {
        Cost::elementwise(0, args, out)
    }
}
