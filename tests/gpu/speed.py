"""mudit beside PyTorch on a GPU, in one run: tests/results/gpu-speed.md and .json. Started by tests/gpu/run.sh.

    python speed.py [ROW …] [--worker mudit-speed-worker] [--python PYTHON] [--providers cuda,tensorrt] [--rounds 7] [--tuned]

As tests/peers/speed.py: each contender of a row is a process that has set up and run once; a round lets each run in turn
while the others wait. Contenders of a row that fills the memory are there one after the other. PyTorch runs eagerly and
compiled, in the same element type; its attention is its own fused one. What does not fit is told and stops nothing.
`--try` takes small shapes in f32: for a look at this script on a machine without a GPU.
"""
import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from typing import NamedTuple

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(os.path.dirname(HERE))
sys.path.insert(0, os.path.join(os.path.dirname(HERE), "peers"))
from speed import Contender, deadline, note, replace  # noqa: E402


class Row(NamedTuple):
    kind: str
    model: str
    size: int  # batch; steps of `sample`
    precision: str
    count: int  # runs a turn
    alone: bool = False  # one contender at a time has its memory
    may_not_fit: bool = False
    graph: bool = False  # small kernels: recorded as CUDA graphs, too, on both sides
    aims: tuple = ()  # of AIMS


ROWS = {
    "guided-XL2-b64": Row("guided", "DiT-XL/2", 64, "bf16", 2, alone=True, aims=("ratio", "ratio-1.2", "rate-3.3")),
    "unguided-XL2-b1": Row("unguided", "DiT-XL/2", 1, "bf16", 5, graph=True, aims=("step-0.6",)),
    "train-XL2-b128": Row("train", "DiT-XL/2", 128, "bf16", 3, alone=True, aims=("ratio", "train-400", "train-695")),
    "train-XL2-b256": Row("train", "DiT-XL/2", 256, "bf16", 3, alone=True, may_not_fit=True,
                          aims=("ratio", "train-400", "train-695")),
    "copy-XL2": Row("copy", "DiT-XL/2", 1, "f32", 20),
    "update-XL2": Row("update", "DiT-XL/2", 1, "bf16", 10, aims=("copy-80",)),
    "update-XL2-f32": Row("update", "DiT-XL/2", 1, "f32", 10, aims=("copy-80",)),
    "forward-XL2-b1": Row("forward", "DiT-XL/2", 1, "bf16", 20, graph=True),
    "forward-XL2-b32": Row("forward", "DiT-XL/2", 32, "bf16", 5),
    "forward-XL2-b32-f16": Row("forward", "DiT-XL/2", 32, "f16", 5),
    "forward-B2-b32": Row("forward", "DiT-B/2", 32, "bf16", 20),
    "sample-XL2-25": Row("sample", "DiT-XL/2", 25, "bf16", 2),
    "train-XL2-b32": Row("train", "DiT-XL/2", 32, "bf16", 3),
    "train-B2-b64": Row("train", "DiT-B/2", 64, "bf16", 5),
    "train-S2-b64": Row("train", "DiT-S/2", 64, "bf16", 10),
    "train-S2-b64-f32": Row("train", "DiT-S/2", 64, "f32", 5),
}
WORDS = {
    "train": "training step {}, batch {}, {}", "forward": "forward {}, batch {}, {}",
    "sample": "sampling {}, {} steps, guided, {}", "guided": "guided DDPM step {}, batch {}, {}",
    "unguided": "DDPM step {}, batch {}, {}", "update": "clip, AdamW and average of {1}{0}, {2}", "copy": "copy of {1}{0}, {2}",
}
DTYPES = {"f32": "float32", "bf16": "bfloat16", "f16": "float16"}
STEPS = 10  # of one run of `guided` and `unguided`: times are of one step
COPY = "copy-XL2"
SMALL = ("DiT-S/2@8x8x4:10", 2)  # with --try


def words(row):
    moves = row.kind in ("update", "copy")
    return WORDS[row.kind].format(row.model, "" if moves else row.size, row.precision)


def contenders(args, row):
    work = [row.kind, row.model, str(row.size), str(args.threads)]
    providers = args.providers.split(",")
    if row.graph and "cuda" in providers:
        providers.append("cuda+graph")
    for provider in providers:
        if row.kind not in ("train", "update", "copy") or not provider.startswith("tensorrt"):
            yield f"mudit {provider}", [args.worker, *work, provider, row.precision], {}
    if not args.python:
        return
    torch = [args.python, "-B", os.path.join(ROOT, "tests/peers/speed_torch.py")]
    cache = {"TORCHINDUCTOR_CACHE_DIR": os.path.join(args.cache, "inductor")}
    modes = {"eager": "PyTorch eager"}
    if row.kind not in ("update", "copy"):
        modes["compile"] = "torch.compile"
        if row.graph:
            modes["graphs"] = "torch.compile graphs"
        if args.tuned:
            modes["tuned"] = "torch.compile tuned"
    for mode, name in modes.items():
        yield name, [*torch, mode, *work, "--device", args.device, "--dtype", DTYPES[row.precision]], cache


def prepared(args, title, command, env, failed):
    """A contender that has run, or nothing, and why."""
    contender = Contender(title, command, env)
    try:
        with deadline(contender, args.setup_timeout * (6 if "tensorrt" in title else 1)):
            contender.ready()
            contender.run(2)
    except RuntimeError as error:
        failed[title] = str(error)
        contender.end()
        contender = None
    note(f"  {title}: {failed.get(title) or f'ready after {contender.start_s:.1f} s'}")
    return contender


def turn(args, row, contender, failed):
    """Runs of one round; a contender that fails has had its last."""
    if contender.name in failed:
        return
    try:
        with deadline(contender, args.setup_timeout):
            contender.samples += contender.run(row.count)[0]
    except (RuntimeError, OSError) as error:
        failed[contender.name] = str(error)


def measure(args, name):
    row = ROWS[name]
    if args.tried:
        row = row._replace(model=SMALL[0], size=min(row.size, SMALL[1]), precision="f32", count=1)
    note(words(row))
    ready, failed = [], {}
    for title, command, env in contenders(args, row):
        contender = prepared(args, title, command, env, failed)
        if contender is None:
            continue
        ready.append(contender)
        if row.alone:
            for _ in range(args.rounds):
                turn(args, row, contender, failed)
            contender.end()
    if not row.alone:
        for _ in range(args.rounds):
            for contender in ready:
                turn(args, row, contender, failed)
        for contender in ready:
            contender.end()
    steps = STEPS if row.kind in ("guided", "unguided") else 1
    flops, moved = (next((v for c in ready if (v := getattr(c, what))), None) for what in ("flops", "bytes"))
    data = dict(row=name, work=words(row), kind=row.kind, size=row.size, when=time.strftime("%Y-%m-%d"), contenders={},
                failed=failed)
    for c in ready:
        if not c.samples:
            continue
        times = [ms / steps for ms in c.samples]
        median = statistics.median(times)
        data["contenders"][c.name] = dict(
            median_ms=round(median, 4), min_ms=round(min(times), 4), max_ms=round(max(times), 4), runs=len(times),
            tflops_per_s=round(flops / steps / median / 1e9, 1) if flops else None,
            gb_per_s=round(moved / median / 1e6, 1) if moved else None, setup_s=round(c.start_s, 1), version=c.version)
        note(f"    {c.name:16} {median:9.3f} ms median")
    return data


def of_torch(name):
    return "orch" in name


def ratio(row, own, _):
    peers = [c["median_ms"] for n, c in row["contenders"].items() if of_torch(n)]
    return min(peers) / own["median_ms"] if peers else None


def per_second(row, own, _):
    return row["size"] / own["median_ms"] * 1e3


def of_copy(_, own, rows):
    """Of the fastest copy that was measured, whoever made it."""
    copies = [c["gb_per_s"] for c in rows.get(COPY, {}).get("contenders", {}).values()]
    return 100 * own["gb_per_s"] / max(copies) if copies else None


# name: what is aimed at, the figure, the sign of better, the aim
AIMS = {
    "ratio": ("fastest PyTorch's time over mudit's ≥ 1", ratio, 1, 1.0),
    "ratio-1.2": ("fastest PyTorch's time over mudit's ≥ 1.2", ratio, 1, 1.2),
    "rate-3.3": ("images/s at 250 steps ≥ 3.3", lambda *a: per_second(*a) / 250, 1, 3.3),
    "step-0.6": ("ms a step ≤ 0.6", lambda _, own, __: own["median_ms"], -1, 0.6),
    "train-400": ("images/s ≥ 400", per_second, 1, 400.0),
    "train-695": ("images/s ≥ 695 (stretch)", per_second, 1, 695.0),
    "copy-80": ("% of the copy's bandwidth ≥ 80", of_copy, 1, 80.0),
}


def aims(rows):
    lines = ["| aim | work | measured | |", "|---|---|---|---|"]
    for name, row in rows.items():
        for aim in ROWS[name].aims:
            text, figure, sign, wanted = AIMS[aim]
            found = {n: figure(row, c, rows) for n, c in row["contenders"].items() if not of_torch(n)}
            found = {n: f for n, f in found.items() if f is not None}
            if not found:
                lines.append(f"| {text} | {row['work']} | – | not measured |")
                continue
            best = max(found, key=lambda n: sign * found[n])
            met = sign * found[best] >= sign * wanted
            lines.append(f"| {text} | {row['work']} | {found[best]:.3g} ({best}) | {'met' if met else '**not met**'} |")
    return lines


def gpu():
    ask = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    try:
        return subprocess.run(ask, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "no GPU that nvidia-smi knows"


def report(data):
    lines = ["# Speed on a GPU beside PyTorch", "",
             "Made by `tests/gpu/run.sh`. Contenders of a row ran in turn, round by round, or one after the other where they fill the",
             "memory; medians in milliseconds, of one step for DDPM. A ratio is the fastest PyTorch's median over mudit's: above 1",
             "mudit is faster. GB/s count bytes read and written.", "", f"Machine: {data['gpu']}; {data['system']}.", ""]
    if data["tried"]:
        lines += ["**Tried with small shapes, in f32: no figure here says anything.**", ""]
    rows = {name: data["rows"][name] for name in ROWS if name in data["rows"]}
    lines += [*aims(rows), "", "| work | mudit | TFLOP/s or GB/s | fastest PyTorch | ratio |", "|---|---|---|---|---|"]
    for row in rows.values():
        named = row["contenders"]
        peers = [n for n in named if of_torch(n)]
        for own in (n for n in named if not of_torch(n)):
            best = min(peers, key=lambda n: named[n]["median_ms"], default=None)
            ms, rate = named[own]["median_ms"], named[own]["gb_per_s"] or named[own]["tflops_per_s"] or 0
            peer = f"{named[best]['median_ms']:.2f} ({best}) | **{named[best]['median_ms'] / ms:.2f}**" if best else "– | –"
            lines.append(f"| {row['work']}, {own} | {ms:.2f} | {rate:.0f} | {peer} |")
    lines += ["", "| work | contender | median | min | max | runs | set up, s |", "|---|---|---|---|---|---|---|"]
    for row in rows.values():
        for name, c in row["contenders"].items():
            lines.append(f"| {row['work']} | {name} | {c['median_ms']:.3f} | {c['min_ms']:.3f} | {c['max_ms']:.3f} | {c['runs']} | {c['setup_s']} |")
        lines += [f"| {row['work']} | {name} | failed: {why.replace('|', '/')} | | | | |" for name, why in row["failed"].items()]
    versions = sorted({c["version"] for row in rows.values() for c in row["contenders"].values()})
    return "\n".join([*lines, "", "Versions: " + "; ".join(versions) + ".", ""])


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("rows", nargs="*", metavar="ROW", help=", ".join(ROWS))
    ap.add_argument("--worker", default=os.path.join(ROOT, "target/release/mudit-speed-worker"))
    ap.add_argument("--python", help="one that has torch; without it PyTorch is left out")
    ap.add_argument("--providers", default="cuda", help="mudit's providers, separated by commas")
    ap.add_argument("--device", default="cuda", help="PyTorch's device")
    ap.add_argument("--out", default=os.path.join(ROOT, "tests/results/gpu-speed"))
    ap.add_argument("--cache", default=os.path.join(ROOT, "target/speed"))
    ap.add_argument("--threads", type=int, default=os.cpu_count())
    ap.add_argument("--rounds", type=int, default=7)
    ap.add_argument("--tuned", action="store_true", help="also torch.compile's max-autotune: many minutes a row")
    ap.add_argument("--try", action="store_true", dest="tried", help="small shapes in f32")
    ap.add_argument("--setup-timeout", type=float, default=600, help="seconds a contender may take to be ready")
    args = ap.parse_args()
    if unknown := [r for r in args.rows if r not in ROWS]:
        ap.error(f"no such row: {', '.join(unknown)}")
    data = dict(rows={}, tried=args.tried)
    if os.path.exists(args.out + ".json"):
        data = json.load(open(args.out + ".json"))
        if data.get("tried") != args.tried:
            data["rows"] = {}
    data |= dict(tried=args.tried, gpu=gpu(), system=platform.platform())
    for name in args.rows or ROWS:
        data["rows"][name] = measure(args, name)
        replace(args.out + ".json", json.dumps(data, indent=1) + "\n")
        replace(args.out + ".md", report(data))
    print(f"{args.out}.md")
    failed = [f"{name}: {who}: {why}" for name in args.rows or ROWS for who, why in data["rows"][name]["failed"].items()
              if not of_torch(who) and not (ROWS[name].may_not_fit and "memory" in why)]
    if failed:
        sys.exit("failed: " + "; ".join(failed))


if __name__ == "__main__":
    main()
