"""Writes tests/fixtures/fid-metrics: features with the numbers that scipy, torch-fidelity and the definitions give for them.

    python tests/peers/fid_metrics.py            # needs numpy, scipy, torch, torch-fidelity, safetensors

Features are small and drawn with a fixed seed. `precision`, `recall`: counts by torch-fidelity's function, checked here to be
those of the definition in float64. `kid`: torch-fidelity's function on float64 features. `is_adm`: the definition of ADM's
evaluator with splits of 150. Fréchet distances: scipy's matrix square root, and for covariances of fewer vectors than
dimensions, where that is not well defined, the nuclear norm of the product of the centred vectors.
"""

import json
import pathlib

import numpy as np
import torch
from safetensors.numpy import save_file
from scipy import linalg
from torch_fidelity import metric_fid, metric_isc, metric_kid, metric_prc

OUT = pathlib.Path(__file__).parent.parent / "fixtures" / "fid-metrics"


def features(rng, n, width, shift):
    """Skewed, correlated, not negative: as pooled features are."""
    mix = rng.standard_normal((width, width)) / np.sqrt(width)
    return np.maximum(rng.standard_normal((n, width)) @ mix + shift, 0).astype(np.float32)


def inception_score(logits, size):
    p = torch.from_numpy(logits).double().softmax(dim=1).numpy()
    scores = []
    for start in range(0, len(p), size):
        part = p[start : start + size]
        kl = part * (np.log(part) - np.log(part.mean(axis=0, keepdims=True)))
        scores.append(np.exp(kl.sum(axis=1).mean()))
    return float(np.mean(scores)), float(np.std(scores))


def inside(points, others, k):
    """How many points lie in a ball of the others, in float64."""
    square = lambda a, b: ((a[:, None, :].astype(np.float64) - b[None].astype(np.float64)) ** 2).sum(axis=2)
    radii = np.sort(square(others, others), axis=1)[:, k]
    return int((square(points, others) <= radii).any(axis=1).sum())


def by_sqrtm(a, b):
    root = linalg.sqrtm(a[1] @ b[1])
    assert np.abs(np.imag(root)).max() < 1e-6, "not well defined"
    d = a[0] - b[0]
    return float(d @ d + np.trace(a[1]) + np.trace(b[1]) - 2 * np.trace(np.real(root)))


def by_vectors(x, y):
    a, b = (v - v.mean(axis=0) for v in (x, y))
    cross = linalg.svdvals(a @ b.T).sum() / np.sqrt((len(x) - 1.0) * (len(y) - 1.0))
    d = x.mean(axis=0) - y.mean(axis=0)
    spread = (a**2).sum() / (len(x) - 1) + (b**2).sum() / (len(y) - 1)
    return float(d @ d + spread - 2 * cross)


def main():
    rng = np.random.default_rng(20)
    OUT.mkdir(parents=True, exist_ok=True)
    samples, reference = features(rng, 420, 24, 0.25), features(rng, 350, 24, 0.3)
    samples[:40] = reference[100:140] + rng.standard_normal((40, 24)).astype(np.float32) * 0.01
    samples[7] = samples[3]  # a repeated vector, a neighbour at distance 0
    logits = (rng.standard_normal((420, 30)) * 2).astype(np.float32)
    tensors = {"samples": samples, "reference": reference, "logits": logits}
    a, b = (torch.from_numpy(v) for v in (samples, reference))

    score = metric_isc.isc_features_to_metric(torch.from_numpy(logits), splits=10, shuffle=True, rng_seed=2020)
    kid_options = dict(kid_subsets=30, kid_subset_size=200, kid_kernel="poly", kid_kernel_poly_degree=3,
                       kid_kernel_poly_gamma=None, kid_kernel_poly_coef0=1, rng_seed=2020, verbose=False)
    kid = metric_kid.kid_features_to_metric(a.double(), b.double(), **kid_options)
    kid32 = metric_kid.kid_features_to_metric(a, b, **kid_options)
    precision, recall = metric_prc.calculate_precision_recall_full(a, b, 3)
    counts = [inside(samples, reference, 3), inside(reference, samples, 3)]
    assert [round(precision * 420), round(recall * 350)] == counts, "torch-fidelity counts otherwise"
    stats = [metric_fid.fid_features_to_statistics(v.double()) for v in (a, b)]
    pair = [(s["mu"], s["sigma"]) for s in stats]
    expected = {
        "is_torch_fidelity": [score["inception_score_mean"], score["inception_score_std"]],
        "is_adm_150": inception_score(logits, 150),
        "kid": [kid["kernel_inception_distance_mean"], kid["kernel_inception_distance_std"]],
        "kid_float32": [kid32["kernel_inception_distance_mean"], kid32["kernel_inception_distance_std"]],
        "samples_inside": counts[0],
        "reference_inside": counts[1],
        "fid_sqrtm": by_sqrtm(*pair),
        "fid_torch_fidelity": metric_fid.fid_statistics_to_metric(*stats, verbose=False)["frechet_inception_distance"],
    }

    frechet = {}
    for name, n, m, width, decay in [
        ("well", 900, 800, 48, 0.0),
        ("graded", 900, 800, 48, 0.25),  # eigenvalues over 10 decades
        ("few", 20, 30, 48, 0.0),  # fewer vectors than dimensions, both
        ("one-few", 20, 900, 48, 0.1),
        ("same", 900, 900, 48, 0.1),
    ]:
        turn = linalg.qr(rng.standard_normal((width, width)))[0] * np.exp(-decay * np.arange(width))[:, None]
        x, y = (rng.standard_normal((k, width)) @ turn + rng.standard_normal(width) * 0.1 for k in (n, m))
        if name == "same":
            y = x
        for key, v in (("x", x), ("y", y)):
            tensors[f"frechet.{name}.{key}.mu"] = v.mean(axis=0)
            tensors[f"frechet.{name}.{key}.sigma"] = np.cov(v, rowvar=False)
        pair = [(v.mean(axis=0), np.cov(v, rowvar=False)) for v in (x, y)]
        frechet[name] = {"vectors": by_vectors(x, y)}
        if name in ("well", "graded"):
            frechet[name]["sqrtm"] = by_sqrtm(*pair)
    expected["frechet"] = frechet

    save_file({k: np.ascontiguousarray(v) for k, v in tensors.items()}, OUT / "features.safetensors")
    (OUT / "expected.json").write_text(json.dumps(expected, indent=1) + "\n")
    print(json.dumps(expected, indent=1))


if __name__ == "__main__":
    main()
