"""The Fréchet distance of two statistics files at 2048 dimensions: mudit's command beside scipy's sqrtm, in turn.

    python tests/peers/fid_frechet.py MUDIT [ROUNDS [CASE…]]      # MUDIT: the binary; needs numpy and scipy

Cases: `photographs`, 10,000 vectors each whose spectrum falls over six decades, as that of the Inception network's features
does (timed; by default alone); `round`, 10,000 vectors each with equal eigenvalues; `few`, 1,000 against 1,200 vectors;
`one-few`, 1,000 against 10,000. For the last two no matrix square root is well defined; compared is the nuclear norm of the
product of the centred vectors, in float64.
mudit's seconds are those of the whole command, its start and the reading of the files included; scipy's of `sqrtm` alone.
Exit 1 above 1e-6 relative.
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

WIDTH, LIMIT = 2048, 1e-6
CASES = {"photographs": (10_000, 10_000, 6), "round": (10_000, 10_000, 0), "few": (1_000, 1_200, 6), "one-few": (1_000, 10_000, 6)}


def draw(rng, vectors, decades, shift):
    spectrum = 10.0 ** (-decades / 2 * np.arange(WIDTH) / WIDTH)
    x = rng.standard_normal((vectors, WIDTH)) * spectrum
    return x @ linalg.qr(rng.standard_normal((WIDTH, WIDTH)))[0] + shift


def from_vectors(x, y):
    """Without a covariance: the singular values of the product of the centred vectors."""
    a, b = (v - v.mean(axis=0) for v in (x, y))
    cross = linalg.svdvals(a @ b.T).sum() / np.sqrt((len(x) - 1.0) * (len(y) - 1.0))
    d = x.mean(axis=0) - y.mean(axis=0)
    return float(d @ d + (a**2).sum() / (len(x) - 1) + (b**2).sum() / (len(y) - 1) - 2 * cross)


def by_command(mudit, folder):
    line = [mudit, "fid", "calc", folder / "a.npz", "--ref", folder / "b.npz", "--out", folder / "d.json", "--json"]
    start = time.perf_counter()
    done = subprocess.run(line, check=True, capture_output=True, text=True)
    return time.perf_counter() - start, json.loads(done.stdout)["metrics"]["fid"]


def case(name, mudit, rounds, folder):
    n, m, decades = CASES[name]
    rng = np.random.default_rng(0)
    x, y = draw(rng, n, decades, 0.0), draw(rng, m, decades, 0.01)
    stats = [(v.mean(axis=0), np.cov(v, rowvar=False)) for v in (x, y)]
    for file, (mu, sigma) in zip("ab", stats):
        np.savez(folder / f"{file}.npz", mu=mu, sigma=sigma)
    if min(n, m) <= WIDTH:
        seconds, found = by_command(mudit, folder)
        expected, against = from_vectors(x, y), "vectors"
        text = f"{seconds:.2f} s"
    else:
        theirs, ours = [], []
        for _ in range(rounds):
            start = time.perf_counter()
            root = linalg.sqrtm(stats[0][1] @ stats[1][1])
            theirs.append(time.perf_counter() - start)
            seconds, found = by_command(mudit, folder)
            ours.append(seconds)
        d = stats[0][0] - stats[1][0]
        expected = float(d @ d + np.trace(stats[0][1]) + np.trace(stats[1][1]) - 2 * np.trace(np.real(root)))
        theirs, ours, against = statistics.median(theirs), statistics.median(ours), "sqrtm"
        text = f"sqrtm {theirs:.2f} s, mudit's command {ours:.2f} s, ratio {theirs / ours:.1f} (medians of {rounds} in turn)"
    error = abs(found / expected - 1)
    print(f"{name:12} {found!r} against {against} {expected!r}: relative difference {error:.1e}; {text}", flush=True)
    return error


def main():
    mudit, rounds = sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 3
    with tempfile.TemporaryDirectory() as folder:
        worst = max(case(name, mudit, rounds, pathlib.Path(folder)) for name in sys.argv[3:] or ["photographs"])
    sys.exit(0 if worst <= LIMIT else 1)


if __name__ == "__main__":
    main()
