"""Compares mudit's FID feature extractor with pytorch-fid, torch-fidelity and clean-fid: same random weights, same images.

    cargo build --release -p mudit-tests --example fid_features
    python fid_networks.py [--tool PATH] [--time] [--fixture DIR]

Needs torch, torchvision, pytorch-fid, torch-fidelity, clean-fid, pillow, safetensors. Weights and images are drawn with
Philox4x32-10 (`draw`), so that a test can draw the same ones. Each preset is run by the tool that it is named after:
`adm` by torch-fidelity's extractor (an exact port of ADM's graph), `pytorch-fid` by its InceptionV3, `clean` by clean-fid's
resizer before the same network. Compared are the features, spatial features (a hook on the raw convolution) and logits
without bias, and every format and naming that weights come in. Exit 1 above 1e-4 relative (L2).

--time measures images per second at 299 x 299 in batches of 8, interleaved: pytorch-fid against mudit.
--fixture writes what the tests compare with.
"""
import argparse
import json
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

import numpy as np
import torch
from safetensors.numpy import load_file, save_file

SEED = 20151205
SIZES = [(64, 48), (331, 300), (299, 299)]
PRESETS = ["adm", "pytorch-fid", "clean"]
ROWS = [0, 149, 298]  # of the resized images, kept in the fixture


def philox(counter, key):
    """Philox4x32-10 of arrays of counters; Salmon et al. 2011."""
    counter = [c.astype(np.uint64) for c in counter]
    low = np.uint64(0xFFFFFFFF)
    for _ in range(10):
        a, b = np.uint64(0xD2511F53) * counter[0], np.uint64(0xCD9E8D57) * counter[2]
        counter = [(b >> np.uint64(32)) ^ counter[1] ^ np.uint64(key[0]), b & low,
                   (a >> np.uint64(32)) ^ counter[3] ^ np.uint64(key[1]), a & low]
        key = [(key[0] + 0x9E3779B9) & 0xFFFFFFFF, (key[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return np.stack(counter, 1)


def draw(stream, n):
    """`n` words of 24 bits: block k of stream s is philox((k, s, 0, 0), (SEED, 0)) >> 8."""
    blocks = np.arange(-(-n // 4), dtype=np.uint64)
    zero = np.zeros_like(blocks)
    return (philox([blocks, zero + np.uint64(stream), zero, zero], (SEED, 0)).ravel()[:n] >> np.uint64(8)).astype(np.int64)


def uniform(stream, shape, low, high):
    unit = draw(stream, int(np.prod(shape))).astype(np.float64) / 2**24
    return (low + (high - low) * unit).astype(np.float32).reshape(shape)


def image(stream, height, width):
    return (draw(stream, height * width * 3) & 0xFF).astype(np.uint8).reshape(1, height, width, 3)


def weights():
    """The published file's tensors: stream i for the i-th name in order of the alphabet."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3 as Net
    real = Net.load_state_dict
    Net.load_state_dict = lambda self, state, **_: None
    try:
        with tempfile.NamedTemporaryFile(suffix=".pth") as empty:
            torch.save({}, empty.name)
            shapes = {k: tuple(v.shape) for k, v in Net("x", ["2048"], empty.name).state_dict().items()
                      if not k.endswith("num_batches_tracked")}
    finally:
        Net.load_state_dict = real
    state = {}
    for i, name in enumerate(sorted(shapes)):
        shape = shapes[name]
        if name.endswith("conv.weight"):
            bound = (6 / np.prod(shape[1:])) ** 0.5
            low, high = -bound, bound
        elif name.endswith((".running_var", "bn.weight")):
            low, high = 0.5, 1.5
        else:
            low, high = -0.1, 0.1
        state[name] = torch.from_numpy(uniform(i, shape, low, high))
    return state


class Tools:
    """The networks as their own projects run them."""

    def __init__(self, state, folder):
        import pytorch_fid.inception as ported
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
        counted = {k.replace("running_var", "num_batches_tracked"): torch.tensor(1) for k in state if "running_var" in k}
        self.state, full = state, {**state, **counted}
        # As the published file: the format before PyTorch 1.6.
        torch.save(full, folder / "published.pth", _use_new_zipfile_serialization=False)
        torch.save(full, folder / "zip.pt")
        save_file({k: v.numpy() for k, v in state.items()}, folder / "published.safetensors")
        self.fidelity = FeatureExtractorInceptionV3("x", ["2048", "logits_unbiased"], str(folder / "published.pth"))
        ported.load_state_dict_from_url = lambda *_, **__: full
        self.pytorch_fid = ported.InceptionV3([3]).eval()
        torch.save(self.pytorch_fid.state_dict(), folder / "pytorch-fid.pth")
        self.bare = ported.InceptionV3([3], resize_input=False, normalize_input=False).eval()
        self.input = self.spatial = None
        for first, hooked in [(self.fidelity.Conv2d_1a_3x3, self.fidelity.Mixed_6d),
                              (self.pytorch_fid.blocks[0][0], self.pytorch_fid.blocks[2][6]),
                              (self.bare.blocks[0][0], self.bare.blocks[2][6])]:
            first.register_forward_pre_hook(lambda _, x: setattr(self, "input", x[0]))
            hooked.branch1x1.conv.register_forward_hook(lambda _, __, y: setattr(self, "spatial", y))

    @torch.no_grad()
    def features(self, preset, images):
        """`images` (N, H, W, 3) u8 -> the network's input, pool, spatial, logits."""
        x = torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()
        if preset == "adm":
            pool, logits = self.fidelity(x)
        elif preset == "pytorch-fid":
            pool = self.pytorch_fid(x.float().div(255))[0].flatten(1)
        else:
            from cleanfid.resize import build_resizer
            resize = build_resizer("clean")
            x = torch.stack([torch.from_numpy(resize(i).transpose(2, 0, 1)) for i in images])
            pool = self.bare((x - 128) / 128)[0].flatten(1)
        if preset != "adm":
            logits = pool @ self.state["fc.weight"].T
        spatial = self.spatial[:, :7].permute(0, 2, 3, 1).flatten(1)
        return {"input": self.input.numpy(), "pool": pool.numpy(), "spatial": spatial.numpy(), "logits": logits.numpy()}


def relative(got, want):
    if got.shape != want.shape or not np.isfinite(got).all():
        return float("inf")
    return float(np.linalg.norm(got.astype(np.float64) - want) / np.linalg.norm(want.astype(np.float64)))


def mudit(tool, folder, preset, weight_file, images, *more):
    save_file({"images": images}, folder / "images.safetensors")
    out = folder / "features.safetensors"
    command = [tool, "--preset", preset, "--weights", folder / weight_file, "--images", folder / "images.safetensors",
               "--out", out, *more]
    run = subprocess.run([str(c) for c in command], capture_output=True, text=True)
    if run.returncode:
        raise SystemExit(run.stderr)
    return load_file(out), run.stdout


def compare(tool, tools, folder):
    worst = 0.0
    for preset in PRESETS:
        for i, size in enumerate(SIZES):
            images = np.concatenate([image(1000 + 10 * i + k, *size) for k in range(3)])
            want = tools.features(preset, images)
            got, _ = mudit(tool, folder, preset, "published.pth", images)
            errors = {k: relative(got[k], want[k]) for k in ("pool", "spatial", "logits")}
            pixels = np.abs(got["input"].astype(np.float64) - want["input"]).max()
            worst = max(worst, *errors.values())
            print(f"{preset:12} {size[0]:3} x {size[1]:3}: resized input max error {pixels:.1e}, relative L2 error "
                  + ", ".join(f"{k} {v:.1e}" for k, v in errors.items()))
    images = image(7, 100, 100)
    want, _ = mudit(tool, folder, "adm", "published.pth", images)
    for name in ("zip.pt", "published.safetensors", "pytorch-fid.pth"):
        more = ["--no-logits"] if name == "pytorch-fid.pth" else []
        got, _ = mudit(tool, folder, "adm", name, images, *more)
        same = all(np.array_equal(got[k], want[k]) for k in got)
        print(f"weights from {name}: {'the same bits' if same else 'DIFFERENT'}")
        worst = worst if same else float("inf")
    return worst


def clock(tool, tools, folder, batch=8, rounds=7):
    """Images per second, one after the other in turns: bytes of 299 x 299 pixels as a decoder leaves them in, 2048 numbers out.

    pytorch-fid's reader hands its network planes; the same network on memory with channels last, which PyTorch computes
    faster and pytorch-fid does not ask for, is a contender of its own.
    """
    images = np.concatenate([image(2000 + k, 299, 299) for k in range(batch)])
    rates = {"pytorch-fid": [], "pytorch-fid, channels last": [], "mudit": []}

    def theirs(name, contiguous):
        start = time.perf_counter()
        x = contiguous(torch.from_numpy(images).permute(0, 3, 1, 2)).float().div(255)
        tools.pytorch_fid(x)
        rates[name].append(batch / (time.perf_counter() - start))

    with torch.no_grad():
        for _ in range(rounds):
            theirs("pytorch-fid", lambda x: x.contiguous())
            theirs("pytorch-fid, channels last", lambda x: x)
            _, text = mudit(tool, folder, "pytorch-fid", "published.pth", images, "--no-logits", "--no-spatial", "--repeat", "4")
            rates["mudit"].append(json.loads(text)["images_per_second"])
    medians = {name: statistics.median(values[1:]) for name, values in rates.items()}
    print(f"images/s at 299 x 299, batch {batch}, {torch.get_num_threads()} threads, medians of {rounds - 1} in turn")
    for name, rate in medians.items():
        print(f"{name:28} {rate:6.2f}  mudit is {medians['mudit'] / rate:.2f} times as fast")


def fixture(tools, folder):
    folder.mkdir(parents=True, exist_ok=True)
    held = {}
    for i, size in enumerate(SIZES[:2]):
        images = image(1000 + 10 * i, *size)
        for preset in PRESETS:
            f = tools.features(preset, images)
            held.update({f"{preset}.{i}.{k}": np.ascontiguousarray(f[k]) for k in ("pool", "spatial", "logits")})
            held[f"{preset}.{i}.rows"] = np.ascontiguousarray(f["input"][:, :, ROWS])
    save_file(held, folder / "features.safetensors")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tool", type=pathlib.Path, default=pathlib.Path("target/release/examples/fid_features"))
    parser.add_argument("--time", action="store_true")
    parser.add_argument("--fixture", type=pathlib.Path)
    a = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        tools = Tools(weights(), folder)
        if a.fixture:
            fixture(tools, a.fixture)
            return
        if a.time:
            clock(a.tool, tools, folder)
            return
        worst = compare(a.tool, tools, folder)
        print(f"worst {worst:.1e}, at most 1e-4")
        sys.exit(0 if worst <= 1e-4 else 1)


if __name__ == "__main__":
    main()
