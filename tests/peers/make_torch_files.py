"""Writes the small PyTorch files that the reader of `.pth` is tested with: python make_torch_files.py OUT_DIR"""
import os
import pathlib
import sys

import torch


class Calls:
    """Something whose loading would run a command."""

    def __reduce__(self):
        return os.system, ("true",)


def main():
    out = pathlib.Path(sys.argv[1])
    out.mkdir(parents=True, exist_ok=True)
    matrix = torch.arange(6, dtype=torch.float32).reshape(2, 3)
    state = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2)).state_dict()
    for i, value in enumerate(state.values()):
        if value.is_floating_point():
            value.copy_(torch.arange(value.numel(), dtype=torch.float32).reshape(value.shape) + 10 * i)
    state["half"] = torch.tensor([0.5, -2.0], dtype=torch.float16)
    state["brain"] = torch.tensor([1.5], dtype=torch.bfloat16)
    state["double"] = torch.tensor([0.1], dtype=torch.float64)
    state["turned"] = matrix.T            # a view that is not contiguous
    state["row"] = matrix[1]              # a view into the middle of the same storage
    state["parameter"] = torch.nn.Parameter(torch.ones(2))
    state["empty"] = torch.zeros(0, 4)
    state["scalar"] = torch.tensor(7.0)
    for name, zipped in (("zip.pth", True), ("legacy.pth", False)):
        torch.save(state, out / name, _use_new_zipfile_serialization=zipped)
    torch.save({"epoch": 3, "model": {"w": matrix}, "note": "x"}, out / "nested.pt")
    torch.save({"w": Calls()}, out / "calls.pth")
    torch.save({"w": Calls()}, out / "calls-legacy.pth", _use_new_zipfile_serialization=False)
    torch.save(torch.nn.Linear(1, 1), out / "module.pth")
    torch.jit.script(torch.nn.Linear(1, 1)).save(out / "script.pt")
    torch.save([1, 2], out / "list.pth")


if __name__ == "__main__":
    main()
