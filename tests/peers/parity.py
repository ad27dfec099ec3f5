"""Compares emitted programs, run by other software without any custom operator, with a fixture.

    python parity.py ENGINE_DIR FIXTURE_DIR [--reader onnxruntime|onnxslim|openvino] [--guided-channels 3|4]
                     [--tolerance 1e-4] [--all]

ENGINE_DIR is what `mudit build-engine --weights FIXTURE_DIR/weights.safetensors` wrote; every `<program>-b<N>.onnx` in it
of the programs denoise, denoise-cfg, step-rows and train-step is compared. Batches that are not the fixture's are handled:
rows are repeated to fill one, losses and gradients of several are averaged. `step-rows` is not in the fixture: its answers
on drawn inputs are kept in ENGINE_DIR by the first run, and later runs (by another version, another reader) are compared
with them. Readers: the onnxruntime that is installed; the same after onnxslim has rewritten the file; OpenVINO (which wants
programs built with --inline). Prints the relative L2 error of each output (of gradients the worst five, or all with --all).
Exit 1 if one is above the tolerance, not finite or missing.
"""
import argparse
import json
import pathlib
import re
import sys
from importlib.metadata import PackageNotFoundError, version

import numpy as np
from safetensors.numpy import load_file

GUIDANCE = 4.0


def relative(got, expected):
    """Relative L2 error; infinite where the shapes differ or a value is not finite."""
    if got.shape != expected.shape or not np.isfinite(got).all():
        return float("inf")
    error = np.linalg.norm((got.astype(np.float64) - expected).ravel())
    return float(error / max(np.linalg.norm(expected.astype(np.float64).ravel()), 1e-300))


class OnnxRuntime:
    """A file or a model's bytes in the onnxruntime that is installed."""

    def __init__(self, model):
        import onnxruntime as ort
        options = ort.SessionOptions()
        options.log_severity_level = 3
        self.session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        self.outputs = [o.name for o in self.session.get_outputs()]
        self.inputs = {i.name: i.shape for i in self.session.get_inputs()}

    def run(self, feeds):
        return dict(zip(self.outputs, self.session.run(None, feeds)))


class OpenVino:
    def __init__(self, path):
        import openvino
        core = openvino.Core()
        # Its own choice on this CPU may be bf16.
        self.model = core.compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
        self.inputs = {i.any_name: list(i.shape) for i in self.model.inputs}

    def run(self, feeds):
        results = self.model(feeds)
        return {o.any_name: results[o] for o in self.model.outputs}


def slimmed(path):
    import onnxslim
    return OnnxRuntime(onnxslim.slim(path).SerializeToString())


READERS = {"onnxruntime": OnnxRuntime, "onnxslim": slimmed, "openvino": OpenVino}


class Program:
    def __init__(self, path, batch, reader):
        self.path, self.batch = path, batch
        self.loaded = READERS[reader](str(path))
        self.inputs = self.loaded.inputs

    def run(self, feeds):
        unknown = sorted(set(self.inputs) - set(feeds))
        if unknown:
            raise SystemExit(f"{self.path}: inputs that this check cannot feed: {', '.join(unknown)}")
        return self.loaded.run({k: v for k, v in feeds.items() if k in self.inputs})

    def scalars(self):
        return {k: np.ones(shape, np.float32) for k, shape in self.inputs.items() if k.startswith("hp.")}


def sampled(program, rows):
    """A sampling program's `out` for any number of rows."""
    n = len(next(iter(rows.values())))
    out = []
    for start in range(0, n, program.batch):
        take = [min(start + k, n - 1) for k in range(program.batch)]
        out.append(program.run({k: v[take] for k, v in rows.items()})["out"])
    return np.concatenate(out)[:n]


def check_denoise(program, fixture, a):
    i = fixture["inputs"]
    rows = dict(x=i["forward_x"], t=i["forward_t"].astype(np.float32), y=i["forward_y"])
    yield "out", sampled(program, rows), fixture["expected"]["forward_out"]


def check_denoise_cfg(program, fixture, a):
    i, n = fixture["inputs"], 2
    rows = dict(x=i["forward_x"][:n], t=i["forward_t"][:n].astype(np.float32), y=i["forward_y"][:n],
                guidance=np.full(n, GUIDANCE, np.float32))
    yield f"out (guided: {a.guided_channels} channels)", sampled(program, rows), \
        fixture["expected"][f"forward_cfg{a.guided_channels}_out"]


def check_train_step(program, fixture, a):
    """The first batch: those after it were computed with parameters that AdamW had moved (see `mudit replay`)."""
    given = {k: fixture["inputs"][f"train0_{k}"] for k in ("x0", "noise", "t", "y", "drop")}
    null = fixture["config"]["num_classes"]
    rows = dict(x0=given["x0"], noise=given["noise"], t=given["t"].astype(np.float32),
                y=np.where(given["drop"] != 0, null, given["y"]))
    n = len(given["t"])
    if n % program.batch:
        raise SystemExit(f"train-step of batch {program.batch}: the fixture's batch is {n}; build it with one that divides it")
    parts = []
    for start in range(0, n, program.batch):
        chunk = {k: v[start:start + program.batch] for k, v in rows.items()}
        parts.append(program.run({**fixture["weights"], **program.scalars(), **chunk}))
    mean = lambda name: np.mean([p[name].astype(np.float64) for p in parts], 0) if name in parts[0] else None
    expected = fixture["expected"]
    yield "loss", mean("loss"), expected["train0_loss"].reshape(())
    for name in ("mse", "vb"):
        got = np.concatenate([p[f"loss.{name}"] for p in parts]) if f"loss.{name}" in parts[0] else None
        yield f"loss.{name}", got, expected[f"train0_{name}"]
    for name, value in fixture["grads"].items():
        yield f"grad.{name}", mean(f"grad.{name}"), value
    for extra in sorted(set(parts[0]) - {f"grad.{k}" for k in fixture["grads"]} - {"loss", "loss.mse", "loss.vb"}):
        yield f"{extra} (not a parameter of the fixture)", np.full(1, np.nan), np.zeros(1)


def check_step_rows(program, fixture, a):
    """Two guided images and one that is not (a row of which another is the unguided one has that row as its pair)."""
    shapes, n, draw = program.inputs, program.batch, np.random.default_rng(0)
    normal = lambda name: draw.normal(size=shapes[name]).astype(np.float32)
    classes = fixture["config"]["num_classes"]
    pair = np.arange(n)
    pair[:n // 2] += n // 2
    feeds = dict(x=normal("x"), t=np.linspace(3, 990, n, dtype=np.float32), coef=0.3 * normal("coef"),
                 noise=normal("noise"), history=normal("history"), pair=pair,
                 y=np.where(pair == np.arange(n), classes, np.arange(n) % classes),
                 guidance=np.full(n, GUIDANCE, np.float32))
    got = program.run(feeds)
    kept = program.path.with_suffix(".answers.npz")
    if not kept.is_file():
        np.savez(kept, **got)
    for name, value in np.load(kept).items():
        yield name, got.get(name), value


CHECKS = {"denoise": check_denoise, "denoise-cfg": check_denoise_cfg, "step-rows": check_step_rows,
          "train-step": check_train_step}


def installed(package):
    try:
        return bool(version(package))
    except PackageNotFoundError:
        return False


def load_fixture(folder):
    fixture = {n: load_file(folder / f"{n}.safetensors") for n in ("weights", "inputs", "expected", "grads")}
    fixture["config"] = json.loads((folder / "config.json").read_text())
    return fixture


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("engine", type=pathlib.Path)
    ap.add_argument("fixture", type=pathlib.Path)
    ap.add_argument("--reader", choices=READERS, default="onnxruntime")
    ap.add_argument("--guided-channels", type=int, choices=(3, 4), default=3, help="as denoise-cfg was built")
    ap.add_argument("--tolerance", type=float, default=1e-4)
    ap.add_argument("--all", action="store_true", help="print every gradient")
    a = ap.parse_args()
    fixture = load_fixture(a.fixture)
    if not (a.engine / "engine.json").is_file():
        raise SystemExit(f"{a.engine}: no engine.json; this is not what build-engine writes")
    programs = []
    for path in sorted(a.engine.glob("*.onnx")):
        name = re.fullmatch(r"(.+)-b(\d+)", path.stem)
        if name and name[1] in CHECKS:
            programs.append((name[1], int(name[2]), path))
    if not programs:
        raise SystemExit(f"{a.engine}: none of {', '.join(f'{n}-b<N>.onnx' for n in CHECKS)} is there")
    bad = 0
    versions = [f"{name} {version(name)}" for name in dict.fromkeys(["onnxruntime", a.reader]) if installed(name)]
    print(f"{', '.join(versions)}, tolerance {a.tolerance:g}")
    for name, batch, path in programs:
        program = Program(path, batch, a.reader)
        rows = []
        for output, got, expected in CHECKS[name](program, fixture, a):
            rows.append((output, float("inf") if got is None else relative(got, expected), got is None))
        wrong = [r for r in rows if not r[1] <= a.tolerance]
        bad += len(wrong)
        grads = sorted((r for r in rows if r[0].startswith("grad.")), key=lambda r: -r[1])
        shown = [r for r in rows if not r[0].startswith("grad.")] + (grads if a.all else grads[:max(5, len(wrong))])
        print(f"\n{path.name}")
        for output, error, missing in shown:
            mark = "MISSING" if missing else "" if error <= a.tolerance else "TOO FAR"
            print(f"  {output:<52}{error:>12.3e}  {mark}".rstrip())
        if grads and not a.all:
            print(f"  ({len(grads)} gradients in all, the worst first)")
    print(f"\n{'all within the tolerance' if not bad else f'{bad} outside the tolerance'}")
    sys.exit(1 if bad else 0)


if __name__ == "__main__":
    main()
