"""The Fréchet distance of two statistics files at 2048 dimensions: mudit's command beside scipy's sqrtm, in turn.

    python tests/peers/fid_frechet.py MUDIT [ROUNDS]      # MUDIT: the binary; needs numpy and scipy

Covariances are of 10,000 vectors whose spectrum falls over six decades, as that of the Inception network's features does.
mudit's seconds are those of the whole command, its start and the reading of the files included; scipy's of `sqrtm` alone.
"""

import json
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

import numpy as np
from scipy import linalg

WIDTH, VECTORS = 2048, 10_000


def draw(rng, shift):
    spectrum = 10.0 ** (-3 * np.arange(WIDTH) / WIDTH)
    x = rng.standard_normal((VECTORS, WIDTH)) * spectrum
    return x @ linalg.qr(rng.standard_normal((WIDTH, WIDTH)))[0] + shift


def main():
    mudit, rounds = sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 3
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        folder, stats = pathlib.Path(folder), []
        for name, shift in (("a", 0.0), ("b", 0.01)):
            x = draw(rng, shift)
            stats.append((x.mean(axis=0), np.cov(x, rowvar=False)))
            np.savez(folder / f"{name}.npz", mu=stats[-1][0], sigma=stats[-1][1])
        seconds = {"scipy sqrtm": [], "mudit fid calc": []}
        for _ in range(rounds):
            start = time.perf_counter()
            root = linalg.sqrtm(stats[0][1] @ stats[1][1])
            seconds["scipy sqrtm"].append(time.perf_counter() - start)
            start = time.perf_counter()
            line = [mudit, "fid", "calc", folder / "a.npz", "--ref", folder / "b.npz", "--out", folder / "d.json", "--json"]
            found = json.loads(subprocess.run(line, check=True, capture_output=True, text=True).stdout)["metrics"]["fid"]
            seconds["mudit fid calc"].append(time.perf_counter() - start)
        d = stats[0][0] - stats[1][0]
        expected = float(d @ d + np.trace(stats[0][1]) + np.trace(stats[1][1]) - 2 * np.trace(np.real(root)))
        for name, values in seconds.items():
            print(f"{name:16} {statistics.median(values):6.2f} s  (median of {rounds})")
        ratio = statistics.median(seconds["scipy sqrtm"]) / statistics.median(seconds["mudit fid calc"])
        print(f"ratio {ratio:.1f}; {found!r} against {expected!r}, relative difference {abs(found / expected - 1):.1e}")


if __name__ == "__main__":
    main()
