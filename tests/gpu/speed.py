"""mudit beside PyTorch on a GPU, in one run: tests/results/gpu-speed.md and .json. Started by tests/gpu/run.sh.

    python speed.py [ROW …] [--worker mudit-speed-worker] [--python PYTHON] [--providers cuda,tensorrt] [--rounds 7]

As tests/peers/speed.py: each contender of a row is a process that has set up and run once; a round lets each run in turn
while the others wait. PyTorch runs eagerly and compiled, in the same element type; its attention is its own fused one.
"""
import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(os.path.dirname(HERE))
sys.path.insert(0, os.path.join(os.path.dirname(HERE), "peers"))
from speed import Contender, deadline, note, replace  # noqa: E402

# name: kind, model, batch or steps, precision, runs a turn
ROWS = {
    "forward-XL2-b1": ("forward", "DiT-XL/2", 1, "bf16", 20),
    "forward-XL2-b32": ("forward", "DiT-XL/2", 32, "bf16", 5),
    "forward-XL2-b32-f16": ("forward", "DiT-XL/2", 32, "f16", 5),
    "forward-B2-b32": ("forward", "DiT-B/2", 32, "bf16", 20),
    "sample-XL2-25": ("sample", "DiT-XL/2", 25, "bf16", 2),
    "train-XL2-b32": ("train", "DiT-XL/2", 32, "bf16", 3),
    "train-B2-b64": ("train", "DiT-B/2", 64, "bf16", 5),
    "train-S2-b64": ("train", "DiT-S/2", 64, "bf16", 10),
    "train-S2-b64-f32": ("train", "DiT-S/2", 64, "f32", 5),
}
WORDS = {"train": "training step {}, batch {}, {}", "forward": "forward {}, batch {}, {}", "sample": "sampling {}, {} steps, guided, {}"}
DTYPES = {"f32": "float32", "bf16": "bfloat16", "f16": "float16"}


def contenders(args, kind, model, size, precision):
    work = [kind, model, str(size), str(args.threads)]
    for provider in args.providers.split(","):
        if kind != "train" or provider != "tensorrt":
            yield f"mudit {provider}", [args.worker, *work, provider, precision], {}
    torch = [args.python, os.path.join(ROOT, "tests/peers/speed_torch.py")]
    cache = {"TORCHINDUCTOR_CACHE_DIR": os.path.join(args.cache, "inductor"), "PYTHONDONTWRITEBYTECODE": "1"}
    for mode, name in (("eager", "PyTorch eager"), ("compile", "torch.compile")):
        yield name, [*torch, mode, *work, "--device", args.device, "--dtype", DTYPES[precision]], cache


def measure(args, name):
    kind, model, size, precision, count = ROWS[name]
    words = WORDS[kind].format(model, size, precision)
    note(words)
    ready, failed = [], {}
    for title, command, env in contenders(args, kind, model, size, precision):
        contender = Contender(title, command, env)
        try:
            with deadline(contender, args.setup_timeout):
                contender.ready()
                contender.run(2)
            ready.append(contender)
        except RuntimeError as error:
            failed[title] = str(error)
            contender.end()
        note(f"  {title}: {failed.get(title) or f'ready after {contender.start_s:.1f} s'}")
    for _ in range(args.rounds):
        for contender in ready:
            contender.samples += contender.run(count)[0]
    flops = next((c.flops for c in ready if c.flops), None)
    row = dict(row=name, work=words, when=time.strftime("%Y-%m-%d"), contenders={}, failed=failed)
    for c in ready:
        c.end()
        median = statistics.median(c.samples)
        row["contenders"][c.name] = dict(
            median_ms=round(median, 3), min_ms=round(min(c.samples), 3), max_ms=round(max(c.samples), 3), runs=len(c.samples),
            tflops_per_s=round(flops / median / 1e9, 1) if flops else None, setup_s=round(c.start_s, 1), version=c.version)
        note(f"    {c.name:16} {median:9.2f} ms median")
    return row


def gpu():
    ask = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    try:
        return subprocess.run(ask, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "no GPU that nvidia-smi knows"


def report(data):
    lines = ["# Speed on a GPU beside PyTorch", "",
             "Made by `tests/gpu/run.sh`. Contenders of a row ran in turn, round by round; medians in milliseconds. A ratio is the",
             "fastest PyTorch's median over mudit's: above 1 mudit is faster.", "",
             f"Machine: {data['gpu']}; {data['system']}.", "",
             "| work | mudit | TFLOP/s | fastest PyTorch | ratio |", "|---|---|---|---|---|"]
    rows = [data["rows"][name] for name in ROWS if name in data["rows"]]
    for row in rows:
        named = row["contenders"]
        peers = [n for n in named if "orch" in n]
        for own in (n for n in named if n.startswith("mudit")):
            best = min(peers, key=lambda n: named[n]["median_ms"], default=None)
            ms = named[own]["median_ms"]
            peer = f"{named[best]['median_ms']:.2f} ({best}) | **{named[best]['median_ms'] / ms:.2f}**" if best else "– | –"
            lines.append(f"| {row['work']}, {own} | {ms:.2f} | {named[own]['tflops_per_s'] or 0:.0f} | {peer} |")
    lines += ["", "| work | contender | median | min | max | runs | set up, s |", "|---|---|---|---|---|---|---|"]
    for row in rows:
        for name, c in row["contenders"].items():
            lines.append(f"| {row['work']} | {name} | {c['median_ms']:.2f} | {c['min_ms']:.2f} | {c['max_ms']:.2f} | {c['runs']} | {c['setup_s']} |")
        lines += [f"| {row['work']} | {name} | failed: {why} | | | | |" for name, why in row["failed"].items()]
    versions = sorted({c["version"] for row in rows for c in row["contenders"].values()})
    return "\n".join([*lines, "", "Versions: " + "; ".join(versions) + ".", ""])


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("rows", nargs="*", metavar="ROW", help=", ".join(ROWS))
    ap.add_argument("--worker", default=os.path.join(ROOT, "target/release/mudit-speed-worker"))
    ap.add_argument("--python", default=sys.executable)
    ap.add_argument("--providers", default="cuda", help="mudit's providers, separated by commas")
    ap.add_argument("--device", default="cuda", help="PyTorch's device")
    ap.add_argument("--out", default=os.path.join(ROOT, "tests/results/gpu-speed"))
    ap.add_argument("--cache", default=os.path.join(ROOT, "target/speed"))
    ap.add_argument("--threads", type=int, default=os.cpu_count())
    ap.add_argument("--rounds", type=int, default=7)
    ap.add_argument("--setup-timeout", type=float, default=600, help="seconds a contender may take to be ready")
    args = ap.parse_args()
    if unknown := [r for r in args.rows if r not in ROWS]:
        ap.error(f"no such row: {', '.join(unknown)}")
    data = dict(rows={})
    if os.path.exists(args.out + ".json"):
        data = json.load(open(args.out + ".json"))
    data |= dict(gpu=gpu(), system=platform.platform())
    for name in args.rows or ROWS:
        data["rows"][name] = measure(args, name)
        replace(args.out + ".json", json.dumps(data, indent=1) + "\n")
        replace(args.out + ".md", report(data))
    print(f"{args.out}.md")


if __name__ == "__main__":
    main()
