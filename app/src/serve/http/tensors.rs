//! Tensors of the Open Inference Protocol: in JSON or as little-endian bytes behind it.

use serde_json::{Value, json};

use super::error::{ApiError, ApiResult};
use super::fields::{Fields, shown, whole};

/// An input.
#[derive(Debug)]
pub(super) struct Tensor {
    pub(super) name: String,
    shape: Vec<usize>,
    data: Data,
}

/// Values of a tensor.
#[derive(Debug, PartialEq)]
pub(super) enum Data {
    Labels(Vec<i64>),
    Seeds(Vec<u64>),
    Floats(Vec<f32>),
    Bytes(Vec<u8>),
}

impl Data {
    pub(super) fn datatype(&self) -> &'static str {
        match self {
            Self::Labels(_) => "INT64",
            Self::Seeds(_) => "UINT64",
            Self::Floats(_) => "FP32",
            Self::Bytes(_) => "UINT8",
        }
    }

    pub(super) fn json(&self) -> Value {
        match self {
            Self::Labels(v) => json!(v),
            Self::Seeds(v) => json!(v),
            Self::Floats(v) => json!(v),
            Self::Bytes(v) => json!(v),
        }
    }

    pub(super) fn bytes(self) -> Vec<u8> {
        match self {
            Self::Labels(v) => v.iter().flat_map(|x| x.to_le_bytes()).collect(),
            Self::Seeds(v) => v.iter().flat_map(|x| x.to_le_bytes()).collect(),
            Self::Floats(v) => v.iter().flat_map(|x| x.to_le_bytes()).collect(),
            Self::Bytes(v) => v,
        }
    }
}

impl Tensor {
    /// Reads an input; its values stand in it, or are the next bytes of `rest`.
    pub(super) fn read(input: Value, rest: &mut &[u8]) -> ApiResult<Self> {
        let Value::Object(map) = input else {
            return Err(ApiError::field("inputs", format!("expected objects, got {}", shown(&input))));
        };
        let mut fields = Fields::of(map);
        let missing = |what: &str| ApiError::field("inputs", format!("a tensor has no {what}"));
        let name = fields.text(&["name"])?.ok_or_else(|| missing("name"))?;
        let datatype = fields.text(&["datatype"])?.ok_or_else(|| missing("datatype"))?;
        let wrong = |text: String| ApiError::field(&super::fields::cut(&name), text);
        let shape = match fields.take(&["shape"])? {
            Some((_, Value::Array(dims))) => dims.iter().map(|d| usize::try_from(whole(d)?).ok()).collect(),
            _ => None,
        };
        let shape: Vec<usize> = shape.ok_or_else(|| wrong("expected a shape of whole numbers".into()))?;
        let count = shape.iter().try_fold(1_usize, |n, d| n.checked_mul(*d));
        let count = count.ok_or_else(|| wrong("its shape is too large".into()))?;
        let size = match fields.take(&["parameters"])? {
            None => None,
            Some((_, Value::Object(map))) => {
                let mut fields = Fields::of(map);
                let size = fields.whole(&["binary_data_size"], 0..=u64::MAX)?;
                fields.finish(&["binary_data_size"])?;
                size.map(|s| s as usize)
            }
            Some(_) => return Err(wrong("its parameters must be an object".into())),
        };
        let values = fields.take(&["data"])?.map(|(_, v)| v);
        fields.finish(&["name", "datatype", "shape", "data", "parameters"])?;
        let data = match (values, size) {
            (Some(values), None) => from_json(&datatype, &values),
            (None, Some(size)) if size <= rest.len() => {
                let (bytes, after) = rest.split_at(size);
                *rest = after;
                from_bytes(&datatype, bytes)
            }
            (None, Some(size)) => {
                return Err(wrong(format!("binary_data_size is {size}, and {} bytes are left", rest.len())));
            }
            _ => return Err(wrong("give either data or binary_data_size".into())),
        };
        let data =
            data.ok_or_else(|| wrong(format!("its values are no {}", super::fields::cut(&datatype))))?;
        let held = match &data {
            Data::Labels(v) => v.len(),
            Data::Seeds(v) => v.len(),
            Data::Floats(v) => v.len(),
            Data::Bytes(v) => v.len(),
        };
        if held != count {
            return Err(wrong(format!("it has {held} values, its shape {shape:?} needs {count}")));
        }
        Ok(Self { name, shape, data })
    }

    fn wrong(&self, expected: &str) -> ApiError {
        let got = format!("{} {:?}", self.data.datatype(), self.shape);
        ApiError::field(&self.name, format!("expected {expected}, got {got}"))
    }

    /// Whole numbers (N).
    pub(super) fn whole(self) -> ApiResult<Vec<i64>> {
        match (&self.data, &self.shape[..]) {
            (Data::Labels(v), [n]) if *n > 0 => Ok(v.clone()),
            _ => Err(self.wrong("INT64 of shape [N], one or more")),
        }
    }

    /// One seed an image.
    pub(super) fn seeds(self, n: usize) -> ApiResult<Vec<u64>> {
        match (&self.data, &self.shape[..]) {
            (Data::Seeds(v), [count]) if *count == n => Ok(v.clone()),
            _ => Err(self.wrong(&format!("UINT64 of shape [{n}]"))),
        }
    }

    /// Finite numbers of a shape.
    pub(super) fn floats(self, shape: &[usize]) -> ApiResult<Vec<f32>> {
        match &self.data {
            Data::Floats(v) if self.shape == shape && v.iter().all(|x| x.is_finite()) => Ok(v.clone()),
            Data::Floats(_) if self.shape == shape => {
                Err(ApiError::field(&self.name, "its values must be finite"))
            }
            _ => Err(self.wrong(&format!("FP32 of shape {shape:?}"))),
        }
    }
}

/// Values of a JSON array, nested or flat.
fn from_json(datatype: &str, values: &Value) -> Option<Data> {
    fn flat<T>(value: &Value, read: &impl Fn(&Value) -> Option<T>, out: &mut Vec<T>) -> Option<()> {
        match value {
            Value::Array(all) => all.iter().try_for_each(|v| flat(v, read, out)),
            other => {
                out.push(read(other)?);
                Some(())
            }
        }
    }
    fn all<T>(values: &Value, read: impl Fn(&Value) -> Option<T>) -> Option<Vec<T>> {
        let mut out = Vec::new();
        values.is_array().then(|| flat(values, &read, &mut out))??;
        Some(out)
    }
    match datatype {
        "INT64" | "INT32" => all(values, |v| i64::try_from(whole(v)?).ok()).map(Data::Labels),
        "UINT64" => all(values, |v| u64::try_from(whole(v)?).ok()).map(Data::Seeds),
        "FP32" => all(values, |v| v.as_f64().map(|x| x as f32)).map(Data::Floats),
        _ => None,
    }
}

fn from_bytes(datatype: &str, bytes: &[u8]) -> Option<Data> {
    fn words<const N: usize, T>(bytes: &[u8], read: impl Fn([u8; N]) -> T) -> Option<Vec<T>> {
        let (words, rest) = bytes.as_chunks::<N>();
        rest.is_empty().then(|| words.iter().map(|w| read(*w)).collect())
    }
    match datatype {
        "INT64" => words(bytes, i64::from_le_bytes).map(Data::Labels),
        "INT32" => words(bytes, |w| i64::from(i32::from_le_bytes(w))).map(Data::Labels),
        "UINT64" => words(bytes, u64::from_le_bytes).map(Data::Seeds),
        "FP32" => words(bytes, f32::from_le_bytes).map(Data::Floats),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn json_and_bytes_give_the_same_tensor() {
        let mut none: &[u8] = &[];
        let nested =
            json!({"name": "noise", "datatype": "FP32", "shape": [2, 2], "data": [[1, 2.5], [3, -4]]});
        let tensor = Tensor::read(nested, &mut none).unwrap();
        assert_eq!(tensor.floats(&[2, 2]).unwrap(), [1.0, 2.5, 3.0, -4.0]);
        let bytes = [7_i64, -2].iter().flat_map(|x| x.to_le_bytes()).chain([9]).collect::<Vec<u8>>();
        let mut rest = &bytes[..];
        let parameters = json!({"binary_data_size": 16});
        let head =
            json!({"name": "class_label", "datatype": "INT64", "shape": [2], "parameters": parameters});
        assert_eq!(Tensor::read(head, &mut rest).unwrap().whole().unwrap(), [7, -2]);
        assert_eq!(rest, [9]);
        let doubles =
            json!({"name": "class_label", "datatype": "INT64", "shape": [2.0], "data": [7.0, -2.0]});
        assert_eq!(Tensor::read(doubles, &mut none).unwrap().whole().unwrap(), [7, -2]);
    }

    #[test]
    fn wrong_tensors_are_refused_by_name() {
        for (wrong, words) in [
            (json!({"datatype": "INT64", "shape": [1], "data": [1]}), "no name"),
            (
                json!({"name": "a", "datatype": "INT64", "shape": [2], "data": [1]}),
                "1 values, its shape [2] needs 2",
            ),
            (json!({"name": "a", "datatype": "INT64", "shape": [1], "data": ["x"]}), "no INT64"),
            (json!({"name": "a", "datatype": "STRING", "shape": [1], "data": ["x"]}), "no STRING"),
            (json!({"name": "a", "datatype": "FP32", "shape": [-1], "data": [1]}), "shape of whole numbers"),
            (json!({"name": "a", "datatype": "FP32", "shape": [u64::MAX, 9], "data": [1]}), "too large"),
            (json!({"name": "a", "datatype": "FP32", "shape": [1]}), "either data or"),
            (
                json!({"name": "a", "datatype": "FP32", "shape": [1], "parameters": {"binary_data_size": 4}}),
                "0 bytes are left",
            ),
            (json!({"name": "a", "datatype": "FP32", "shape": [1], "data": [1], "more": 1}), "no such field"),
            (json!(3), "expected objects"),
        ] {
            let error = Tensor::read(wrong.clone(), &mut &[][..]).unwrap_err();
            assert!(error.message.contains(words), "{wrong}: {}", error.message);
        }
    }
}
