"""Writes small ONNX files as users bring them to `mudit fid --onnx`: python make_onnx_files.py OUT_DIR"""
import pathlib
import sys

import onnx
from onnx import TensorProto, helper


def model(path, image, outputs, channels_axes):
    """The mean of each channel over the image, under one or two names."""
    images = helper.make_tensor_value_info("image", TensorProto.FLOAT, image)
    axes = helper.make_tensor("axes", TensorProto.INT64, [2], channels_axes)
    nodes, values = [], []
    for name, shape, keep in outputs:
        nodes.append(helper.make_node("ReduceMean", ["image", "axes"], [name], keepdims=keep))
        values.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, shape))
    graph = helper.make_graph(nodes, "means", [images], values, [axes])
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    onnx.checker.check_model(made)
    path.write_bytes(made.SerializeToString(deterministic=True))


def main():
    out = pathlib.Path(sys.argv[1])
    out.mkdir(parents=True, exist_ok=True)
    model(out / "open.onnx", ["N", 3, "H", "W"], [("features", ["N", 3], 0)], [2, 3])
    model(out / "last.onnx", [2, 8, 8, 3], [("features", [2, 1, 1, 3], 1)], [1, 2])
    model(out / "two.onnx", ["N", 1, 4, 4], [("mean", ["N", 1], 0), ("kept", ["N", 1, 1, 1], 1)], [2, 3])
    model(out / "five.onnx", ["N", 5, 4, 4], [("features", ["N", 5], 0)], [2, 3])


if __name__ == "__main__":
    main()
