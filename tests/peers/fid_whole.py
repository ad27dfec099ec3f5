"""Whole runs on real pictures with the same random weights: `mudit fid` beside torch-fidelity's and pytorch-fid's commands.

    python tests/peers/fid_whole.py MUDIT FASHION|jpeg [IMAGES]     # needs torch, torch-fidelity, pytorch-fid, safetensors

FASHION is the directory of Fashion-MNIST's idx files: test images are the reference, training images the samples, grey turned
to colour, as PNG files. `jpeg` draws coloured pictures instead and keeps them as JPEG files of sampling 4:2:0, every third one
progressive: what the decoder makes of colour is then part of every number. torch-fidelity: Inception score, precision, recall and KID from the same files with its own reader,
resizer, network and sums. pytorch-fid: its `--save-stats` files, which `mudit fid calc` then compares. The Fréchet distances of
so few images have no stable matrix square root; the value of record is the nuclear norm of the product of centred vectors, in
float64, from torch-fidelity's features (`fid_frechet.py` compares with `sqrtm` where that is defined). Exit 1 above 1e-4, of
features above 1e-6, of FID above 1e-5: the features, not the metrics, differ in f32; the metrics' own 1e-6 on equal features
is proven by `tests/cpu/fid_metrics.rs`.
"""
import json
import pathlib
import subprocess
import sys
import tempfile

import numpy as np
import torch
import torch_fidelity
from PIL import Image
from torch_fidelity.datasets import ImagesPathDataset

from fid_metrics import by_vectors
from fid_networks import Tools, weights
from make_jpeg_files import picture

LIMIT = 1e-4
OWN_LIMITS = {"features": 1e-6, "FID": 1e-5}


def pictures(source, name, count, folder):
    folder.mkdir()
    files = list(source.glob(f"{name}-images*"))
    data = files[0].read_bytes()
    if files[0].suffix == ".gz":
        import gzip
        data = gzip.decompress(data)
    pixels = np.frombuffer(data, np.uint8, offset=16).reshape(-1, 28, 28)[:count]
    for i, p in enumerate(pixels):
        Image.fromarray(p).convert("RGB").save(folder / f"{i:05}.png")


def jpegs(seed, count, folder):
    folder.mkdir()
    for i in range(count):
        drawn = Image.fromarray(picture(128, 96, seed * count + i))
        drawn.save(folder / f"{i:05}.jpg", quality=75 + i % 20, subsampling="4:2:0", progressive=i % 3 == 0)


def run(*command):
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout)


def torch_fidelity_features(tools, folder):
    images = ImagesPathDataset(sorted(folder.glob("*")))
    with torch.no_grad():
        return np.concatenate([tools.fidelity(torch.stack([images[i] for i in range(k, min(k + 10, len(images)))]))[0].numpy()
                               for k in range(0, len(images), 10)]).astype(np.float64)


def kernel_distance(x, y):
    """KID of whole sets by its definition, in f64; torch-fidelity's own sums are f32, which hides it under large features."""
    def kernel(a, b):
        return (a @ b.T / a.shape[1] + 1) ** 3
    def among(a):
        k = kernel(a, a)
        return (k.sum() - np.trace(k)) / (len(a) * (len(a) - 1))
    return among(x) + among(y) - 2 * kernel(x, y).mean()


def main():
    mudit, source = pathlib.Path(sys.argv[1]), sys.argv[2]
    count = int(sys.argv[3]) if len(sys.argv) > 3 else 150
    with tempfile.TemporaryDirectory() as scratch:
        scratch = pathlib.Path(scratch)
        tools = Tools(weights(), scratch)
        real, fake, net = scratch / "real", scratch / "fake", scratch / "published.pth"
        if source == "jpeg":
            jpegs(0, count, real)
            jpegs(1, count, fake)
        else:
            pictures(pathlib.Path(source), "t10k", count, real)
            pictures(pathlib.Path(source), "train", count, fake)
        options = ["--network", net, "--few", "--offline", "--json"]
        run(mudit, "fid", "ref", real, "--out", scratch / "ref.npz", *options)
        ours = run(mudit, "fid", "calc", fake, "--ref", scratch / "ref.npz", "--out", scratch / "a.json",
                   "--is-splits", "torch-fidelity", *options)["metrics"]
        theirs = torch_fidelity.calculate_metrics(
            input1=str(fake), input2=str(real), cuda=False, isc=True, kid=True, prc=True, batch_size=10, verbose=False,
            feature_extractor="inception-v3-compat", feature_layer_prc="2048",
            feature_extractor_weights_path=str(net), kid_subset_size=count, cache=False)
        x, y = (torch_fidelity_features(tools, f) for f in (fake, real))
        kept = np.load(scratch / "ref.npz")["features"]
        rows = [("features", float(np.linalg.norm(kept - y)) + np.linalg.norm(y), float(np.linalg.norm(y))),
                ("IS", ours["inception_score"]["mean"], theirs["inception_score_mean"]),
                ("IS deviation", ours["inception_score"]["std"], theirs["inception_score_std"]),
                ("KID", ours["kid"]["mean"], kernel_distance(x, y)),
                ("precision", ours["manifold"]["precision"], theirs["precision"]),
                ("recall", ours["manifold"]["recall"], theirs["recall"]),
                ("FID", ours["fid"], by_vectors(x, y))]
        # pytorch-fid's own statistics of the same files.
        run(mudit, "fid", "ref", real, "--out", scratch / "p.npz", "--preset", "pytorch-fid", *options)
        from pytorch_fid.fid_score import compute_statistics_of_path
        mu, sigma = compute_statistics_of_path(str(real), tools.pytorch_fid, 10, 2048, "cpu", 1)
        np.savez(scratch / "theirs.npz", mu=mu, sigma=sigma)
        stats = np.load(scratch / "p.npz")
        rows += [(f"pytorch-fid {k}", float(np.linalg.norm(stats[k] - v)) + np.linalg.norm(v), float(np.linalg.norm(v)))
                 for k, v in (("mu", mu), ("sigma", sigma))]
        own = run(mudit, "fid", "calc", scratch / "theirs.npz", "--ref", scratch / "p.npz", "--out", scratch / "b.json", "--json")
    worst, good = 0.0, True
    for name, got, want in rows:
        error = abs(got - want) / max(abs(want), 1e-12)
        worst, good = max(worst, error), good and error <= OWN_LIMITS.get(name, LIMIT)
        print(f"{name:18} {got:.9g} against {want:.9g}: relative difference {error:.1e}")
    print(f"KID by torch-fidelity's command, in f32: {theirs['kernel_inception_distance_mean']:.9g}")
    spread = float(np.trace(sigma))
    print(f"distance of pytorch-fid's statistics from mudit's of the same files: {own['metrics']['fid']:.2e} (trace {spread:.3g})")
    print(f"worst {worst:.1e}, at most {LIMIT:.0e}, {count} + {count} images")
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main()
