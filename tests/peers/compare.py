"""Compares two safetensors files tensor by tensor, by relative L2 error.

    python compare.py A.safetensors B.safetensors [--tolerance 1e-4] [--skip-k-bias] [--pair NAME_A=NAME_B …] [--each-step]
                      [--change-from C.safetensors]

B is the reference: each of its tensors must be in A (further ones of A are named, not counted). With --pair only the
named tensors are compared, as for a trajectory:

    python compare.py trajectory.safetensors expected.safetensors --pair trajectory=ddpm10_cfg3 --each-step

--change-from C.safetensors subtracts C from both, to compare what training changed: small steps hide in large weights.
--each-step compares along the first axis and reports the worst step. --skip-k-bias leaves out the K third of every
`qkv.bias`: its true gradient is zero, so AdamW moves it by rounding noise. Exit 1 if an error is above the tolerance.
"""
import argparse
import sys

import numpy as np
from safetensors.numpy import load_file

from parity import relative


def without_k(name, tensor):
    if not name.endswith("qkv.bias") or tensor.ndim != 1 or tensor.shape[0] % 3:
        return tensor
    third = tensor.shape[0] // 3
    return np.concatenate([tensor[:third], tensor[2 * third:]])


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("a")
    ap.add_argument("b", help="the reference")
    ap.add_argument("--tolerance", type=float, default=1e-4)
    ap.add_argument("--skip-k-bias", action="store_true")
    ap.add_argument("--pair", action="append", default=[], metavar="NAME_A=NAME_B")
    ap.add_argument("--each-step", action="store_true")
    ap.add_argument("--change-from", metavar="C")
    ap.add_argument("--all", action="store_true", help="print every tensor, not the worst ten")
    args = ap.parse_args()
    a, b = load_file(args.a), load_file(args.b)
    base = load_file(args.change_from) if args.change_from else {}
    pairs = [p.split("=", 1) for p in args.pair] or [(k, k) for k in b]
    if not pairs or any(len(p) != 2 for p in pairs):
        ap.error("--pair wants NAME_A=NAME_B" if pairs else f"{args.b} is empty")
    rows = []
    for name_a, name_b in pairs:
        label = name_a if name_a == name_b else f"{name_a} = {name_b}"
        absent = [f"{name} is not in {path}" for name, f, path in ((name_a, a, args.a), (name_b, b, args.b)) if name not in f]
        if absent:
            rows.append((float("inf"), label, "; ".join(absent)))
            continue
        got, expected = a[name_a], b[name_b]
        if name_b in base:
            got, expected = got - base[name_b], expected - base[name_b]
        if args.skip_k_bias:
            got, expected = without_k(name_a, got), without_k(name_b, expected)
        if got.shape != expected.shape:
            rows.append((float("inf"), label, f"shape {got.shape}, expected {expected.shape}"))
        elif args.each_step:
            errors = [relative(g, e) for g, e in zip(got, expected)]
            worst = int(np.argmax(errors))
            rows.append((errors[worst], label, f"worst at step {worst} of {len(errors)}"))
        else:
            rows.append((relative(got, expected), label, ""))
    rows.sort(key=lambda r: -r[0])
    bad = [r for r in rows if not r[0] <= args.tolerance]
    for error, label, note in rows if args.all else rows[:max(10, len(bad))]:
        print(f"{label:<52}{error:>12.3e}  {'' if error <= args.tolerance else 'TOO FAR'} {note}".rstrip())
    extra = sorted(set(a) - {p[0] for p in pairs})
    if extra and not args.pair:
        print(f"only in {args.a}: {', '.join(extra)}")
    print(f"{len(rows)} tensors, {len(bad)} above {args.tolerance:g}")
    sys.exit(1 if bad else 0)


if __name__ == "__main__":
    main()
