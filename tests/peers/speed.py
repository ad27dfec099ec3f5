"""mudit beside PyTorch and ONNX Runtime on the same work, in one run: tests/results/speed.md and speed.json.

    python speed.py [ROW …] [--worker mudit-speed-worker] [--python PYTHON] [--out tests/results/speed] [--rounds 7]

Each contender of a row is a process of its own that has set up and run once, and then waits on its standard input. A
round lets each of them run in turn (A B C, A B C, …) while the others are blocked; it begins when other processes use
less than a tenth of a core, and what was disturbed is run again, within bounds. Medians are over all rounds. Rows that
are named are measured again, the others stay as the JSON file has them. `--prepare` only fills the caches of compiled and
exported models. tests/peers/speed.sh does everything, the Python environment included.
"""
import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(os.path.dirname(HERE))

# name: kind, model, batch or steps, runs a turn, floor of the ratio
ROWS = {
    "train-S2-b8": ("train", "DiT-S/2", 8, 1),
    "train-B2-b4": ("train", "DiT-B/2", 4, 1),
    "train-quickstart": ("train", "quickstart", 64, 4),
    "forward-S2-b1": ("forward", "DiT-S/2", 1, 4),
    "forward-S2-b8": ("forward", "DiT-S/2", 8, 1),
    "forward-B2-b1": ("forward", "DiT-B/2", 1, 2),
    "forward-B2-b4": ("forward", "DiT-B/2", 4, 1),
    "sample-S2-25": ("sample", "DiT-S/2", 25, 1),
    # Products of the layers: rows x inputs x outputs.
    "product-S2-fc1": ("product", "forward:2048x384x1536", "", 20),
    "product-S2-fc1-grad-input": ("product", "grad-input:2048x384x1536", "", 20),
    "product-S2-fc1-grad-weight": ("product", "grad-weight:2048x384x1536", "", 20),
    "product-S2-b1-fc2": ("product", "forward:256x1536x384", "", 100),
    "product-B2-qkv": ("product", "forward:1024x768x2304", "", 20),
}
WORDS = {
    "train": "training step {model}, batch {size}",
    "forward": "forward {model}, batch {size}",
    "sample": "sampling {model}, {size} steps, guided, 1 image",
    "product": "product {model}",
}
# The fresh processes: from the start of the process to the end of its first step, and the peak of its memory after three.
FRESH = ("train", "DiT-S/2", 8)
OTHERS = 0.1  # cores that other processes may use
TICK = os.sysconf("SC_CLK_TCK")
# MKL as PyTorch ships it takes its AVX2 path on processors of other makers. A process may answer its question otherwise.
MKL_SHIM = "int mkl_serv_intel_cpu_true(void) { return 1; }\n"


def busy():
    values = [int(v) for v in open("/proc/stat").readline().split()[1:]]
    return (sum(values[:3]) + sum(values[5:8])) / TICK


def cpu_seconds(pid):
    try:
        fields = open(f"/proc/{pid}/stat").read().rsplit(")", 1)[1].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / TICK


def status(pid, key):
    for line in open(f"/proc/{pid}/status"):
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    raise KeyError(key)


class Contender:
    def __init__(self, name, command, env):
        self.name, self.samples, self.noisy = name, [], 0
        self.errors = tempfile.TemporaryFile("w+")
        self.began = time.perf_counter()
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors, text=True,
                                        env=os.environ | env, cwd=HERE)

    def answer(self):
        while True:
            line = self.process.stdout.readline()
            if not line:
                self.errors.seek(0)
                said = [l.strip() for l in self.errors.read().splitlines() if l.strip()]
                raise RuntimeError(said[-1][:300] if said else f"it ended with {self.process.wait()}")
            if line.startswith("{"):
                return json.loads(line)

    def ready(self):
        said = self.answer()
        self.start_s = time.perf_counter() - self.began
        self.version, self.flops, self.bytes = said["version"], said.get("flops"), said.get("bytes")
        self.first_run_s = said.get("first_run_s")

    def run(self, count):
        """Milliseconds of `count` runs, and the cores that others used meanwhile."""
        before, own, start = busy(), cpu_seconds(self.process.pid) + time.process_time(), time.perf_counter()
        self.process.stdin.write(f"{count}\n")
        self.process.stdin.flush()
        times = self.answer()["ms"]
        wall = time.perf_counter() - start
        others = busy() - before - (cpu_seconds(self.process.pid) + time.process_time() - own)
        # The kernel counts in ticks: one more or less on each side is no disturbance.
        return times, max(0.0, others - 2 / TICK) / wall

    def end(self):
        try:
            self.process.stdin.close()
            self.process.wait(timeout=20)
        except (OSError, subprocess.TimeoutExpired):
            self.process.kill()
            self.process.wait()


def wait_quiet(patience):
    """Waits until others leave the cores alone; gives what is left of the patience in seconds."""
    while patience > 0:
        before, own, start = busy(), time.process_time(), time.perf_counter()
        time.sleep(0.2)
        wall = time.perf_counter() - start
        if (busy() - before - (time.process_time() - own) - 1 / TICK) / wall < OTHERS:
            break
        patience -= wall
    return patience


def contenders(args, kind, model, size):
    torch = [args.python, os.path.join(HERE, "speed_torch.py")]
    if kind == "product":
        return products(args, torch, model)
    work = [kind, model, str(size), str(args.threads)]
    # Threads pinned one to a core, and short spins: what makes PyTorch fastest with two threads.
    env = {"GOMP_SPINCOUNT": "30000", "OMP_PROC_BIND": "true", "OMP_PLACES": "cores", "OMP_NUM_THREADS": str(args.threads),
           "TORCHINDUCTOR_CACHE_DIR": os.path.join(args.cache, "inductor"), "PYTHONDONTWRITEBYTECODE": "1"}
    shim = mkl_shim(args)
    unlocked = env | {"LD_PRELOAD": shim} if shim else None
    export = ["--export", os.path.join(args.cache, "export")]
    found = [("mudit", [args.worker] + work, {})]
    for mode, name in (("eager", "PyTorch eager"), ("compile", "torch.compile")):
        found.append((name, torch + [mode] + work, env))
        if unlocked:
            found.append((f"{name}, MKL AVX-512", torch + [mode] + work, unlocked))
    if kind == "forward":
        found.append(("ONNX Runtime of torch's export", torch + ["onnxruntime"] + work + export, env | {"OMP_PROC_BIND": "false"}))
    if args.only:
        found = [c for c in found if any(o in c[0] for o in args.only)]
    return found


def products(args, torch, what):
    """The means that a product could be made by; beside the whole steps these are the reason for kernels of our own."""
    env = {"OMP_NUM_THREADS": str(args.threads), "OPENBLAS_NUM_THREADS": str(args.threads), "OMP_PROC_BIND": "true",
           "OMP_PLACES": "cores", "GOMP_SPINCOUNT": "30000", "PYTHONDONTWRITEBYTECODE": "1"}
    shim = mkl_shim(args)
    found = [("mudit", [args.worker, "product", what, "mudit", str(args.threads)], {}),
             ("ONNX Runtime (MLAS)", [args.worker, "product", what, "onnxruntime", str(args.threads)], {}),
             ("gemm crate", [args.worker, "product", what, "gemm", str(args.threads)], {"RAYON_NUM_THREADS": str(args.threads)})]
    for mode, name in (("numpy", "OpenBLAS (NumPy)"), ("mkl", "MKL (PyTorch)"), ("onednn", "oneDNN, weight packed before (PyTorch)")):
        if mode == "onednn" and not what.startswith("forward"):
            continue
        command = torch + [mode, "product", what, "", str(args.threads)]
        found.append((name, command, env))
        if mode == "mkl" and shim:
            found.append((f"{name}, AVX-512", command, env | {"LD_PRELOAD": shim}))
    return [c for c in found if not args.only or any(o in c[0] for o in args.only)]


def mkl_shim(args):
    """The library that makes MKL take its AVX-512 path, or None where that changes nothing."""
    flags = cpu_info("flags")
    if cpu_info("vendor_id") == "GenuineIntel" or "avx512f" not in flags or not shutil.which("cc"):
        return None
    path = os.path.join(args.cache, "mkl-avx512.so")
    if not os.path.exists(path):
        os.makedirs(args.cache, exist_ok=True)
        subprocess.run(["cc", "-shared", "-fPIC", "-x", "c", "-", "-o", path], input=MKL_SHIM, text=True, check=True)
    return path


def start_all(args, kind, model, size):
    """Contenders that are ready; of the others why not. One starts after another, so that they do not slow each other."""
    ready, failed = [], {}
    for name, command, env in contenders(args, kind, model, size):
        c = Contender(name, command, env)
        try:
            with deadline(c, args.setup_timeout):
                c.ready()
            ready.append(c)
        except RuntimeError as error:
            failed[name] = str(error)
            c.end()
        note(f"  {name}: {failed.get(name) or f'ready after {c.start_s:.1f} s'}")
    return ready, failed


class deadline:
    """Ends a contender that is not ready in time; its answer is then an error."""

    def __init__(self, contender, seconds):
        import threading
        self.timer = threading.Timer(seconds, contender.process.kill)

    def __enter__(self):
        self.timer.start()

    def __exit__(self, *_):
        self.timer.cancel()


def measure(args, name):
    kind, model, size, count = ROWS[name]
    words = WORDS[kind].format(model=model, size=size)
    note(words)
    ready, failed = start_all(args, kind, model, size)
    patience, again = args.patience, args.rounds
    try:
        for c in ready:
            c.run(1)
        rounds = 0
        while rounds < args.rounds:
            for c in ready:
                while True:
                    patience = wait_quiet(patience)
                    times, others = c.run(count)
                    if others < OTHERS or again == 0:
                        break
                    again -= 1
                c.noisy += others >= OTHERS
                c.samples += times
            rounds += 1
    finally:
        for c in ready:
            c.end()
    flops = next((c.flops for c in ready if c.flops), None)
    row = dict(row=name, work=words, kind=kind, when=time.strftime("%Y-%m-%d"), contenders={}, failed=failed)
    for c in ready:
        median = statistics.median(c.samples)
        row["contenders"][c.name] = dict(
            median_ms=round(median, 2), min_ms=round(min(c.samples), 2), max_ms=round(max(c.samples), 2), runs=len(c.samples),
            disturbed_rounds=c.noisy, gflops_per_s=round(flops / median / 1e6, 1) if flops else None, version=c.version,
            setup_s=round(c.start_s, 2), samples_ms=[round(v, 2) for v in c.samples])
        note(f"    {c.name:32} {median:9.1f} ms median, {min(c.samples):9.1f} min, {c.noisy} disturbed")
    return row


def fresh(args):
    """Cold start and peak memory of the training step, each contender in a new process, torch.compile with a new cache."""
    kind, model, size = FRESH
    row = dict(row="fresh", work=f"a new process, training step {model}, batch {size}", when=time.strftime("%Y-%m-%d"),
               contenders={}, failed={})
    note(row["work"])
    for name, command, env in contenders(args, kind, model, size):
        starts, peaks = [], []
        slow = "compile" in name
        for _ in range(1 if slow else 3):
            with tempfile.TemporaryDirectory() as empty:
                wait_quiet(args.patience)
                c = Contender(name, command, env | {"TORCHINDUCTOR_CACHE_DIR": empty})
                try:
                    with deadline(c, args.setup_timeout):
                        c.ready()
                    c.run(3)
                    starts.append(c.start_s)
                    peaks.append(status(c.process.pid, "VmHWM"))
                except RuntimeError as error:
                    row["failed"][name] = str(error)
                c.end()
        if starts:
            row["contenders"][name] = dict(first_step_s=round(min(starts), 2), first_step_median_s=round(statistics.median(starts), 2),
                                           starts=len(starts), peak_rss_mb=round(max(peaks) / 1e6, 1), version=c.version)
            note(f"    {name:32} {min(starts):6.2f} s to the first step, {max(peaks) / 1e6:7.0f} MB")
    return row


def cpu_info(key):
    for line in open("/proc/cpuinfo"):
        if line.split(":")[0].strip() == key:
            return line.split(":", 1)[1].strip()
    return "unknown"


def machine(args):
    flags = cpu_info("flags").split()
    known = [f for f in ("avx2", "fma", "avx512f", "avx512_vnni", "avx512_bf16", "amx_tile", "asimd") if f in flags]
    memory = int(open("/proc/meminfo").readline().split()[1]) / 2**20
    return dict(cpu=f"{cpu_info('model name')}, family {cpu_info('cpu family')} model {cpu_info('model')}", cores=os.cpu_count(),
                threads=args.threads, features=known, memory_gib=round(memory, 1), system=platform.platform(),
                rustc=text(["rustc", "--version"]), python=platform.python_version())


def text(command):
    try:
        return subprocess.run(command, capture_output=True, text=True).stdout.strip()
    except OSError:
        return None


def peers(row, installed_only=False):
    """The fastest PyTorch of a row."""
    names = [n for n in row["contenders"] if n != "mudit" and "ONNX" not in n and not (installed_only and "MKL" in n)]
    return min(names, key=lambda n: row["contenders"][n]["median_ms"], default=None)


def products_table(rows):
    """GFLOP/s of the products by each means."""
    if not rows:
        return []
    names = sorted({n for row in rows for n in row["contenders"]}, key=lambda n: (n != "mudit", n))
    lines = ["", "## Products of the layers alone", "",
             "Median GFLOP/s; rows × inputs × outputs of a linear layer. Weights are inputs (packed anew in each run, as in training), but "
             "for oneDNN's. mudit's and ONNX Runtime's add the bias, or sum its gradient; the others do not.", "",
             "| product | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    for row in rows:
        rates = [row["contenders"].get(n, {}).get("gflops_per_s") for n in names]
        lines.append(f"| {row['work'].removeprefix('product ').replace(':', ' ').replace('x', '×')} | "
                     + " | ".join(f"{r:.0f}" if r else "–" for r in rates) + " |")
    return lines


def report(data):
    m = data["machine"]
    lines = [
        "# Speed beside PyTorch", "",
        "Made by `tests/peers/speed.sh`. Contenders of a row ran in one session, in turn, round by round; medians and minima in",
        f"milliseconds, {m['threads']} threads, float32. A ratio is the PyTorch median over mudit's median: above 1 mudit is faster.",
        "*MKL AVX-512*: PyTorch's MKL takes its AVX2 path on processors not made by Intel; a preloaded one-line library",
        "(`mkl_serv_intel_cpu_true` answers 1) makes it take the AVX-512 path. *Fastest* is over all PyTorch columns, that one included;",
        "*as installed* is over those without it.", "",
        f"Machine: {m['cpu']}, {m['cores']} cores, {' '.join(m['features'])}, {m['memory_gib']} GiB, {m['system']}, {m['rustc']}.", "",
    ]
    measured = [data["rows"][name] for name in ROWS if name in data["rows"]]
    rows = [row for row in measured if row["kind"] != "product"]
    lines += ["| work | mudit | GFLOP/s | fastest PyTorch | ratio | as installed | ratio |", "|---|---|---|---|---|---|---|"]
    for row in rows:
        own, best, plain = row["contenders"].get("mudit"), peers(row), peers(row, True)
        if not own or not best:
            continue
        cell = lambda n: f"{row['contenders'][n]['median_ms']:.1f} ({n.replace('PyTorch ', '')})" if n else "–"
        ratio = lambda n: f"**{row['contenders'][n]['median_ms'] / own['median_ms']:.2f}**" if n else "–"
        lines.append(f"| {row['work']} | {own['median_ms']:.1f} | {own['gflops_per_s']:.0f} | {cell(best)} | {ratio(best)} "
                     f"| {cell(plain)} | {ratio(plain)} |")
    lines += ["", "## Every contender", "", "| work | contender | median | min | max | runs | disturbed rounds |", "|---|---|---|---|---|---|---|"]
    for row in rows:
        for name, c in row["contenders"].items():
            lines.append(f"| {row['work']} | {name} | {c['median_ms']:.1f} | {c['min_ms']:.1f} | {c['max_ms']:.1f} | {c['runs']} "
                         f"| {c['disturbed_rounds']} |")
        for name, why in row["failed"].items():
            lines.append(f"| {row['work']} | {name} | failed: {why} | | | | |")
    lines += products_table([row for row in measured if row["kind"] == "product"])
    new = data["rows"].get("fresh")
    if new:
        lines += ["", "## A new process", "", f"{new['work'].split(', ', 1)[1].capitalize()}: from the start of the process to the end of its "
                  "first step (best of the starts; torch.compile with an empty cache), and the largest resident memory after four steps.", "",
                  "| contender | s | starts | peak MB |", "|---|---|---|---|"]
        for name, c in new["contenders"].items():
            lines.append(f"| {name} | {c['first_step_s']:.2f} | {c['starts']} | {c['peak_rss_mb']:.0f} |")
        for name, why in new["failed"].items():
            lines.append(f"| {name} | failed: {why} | | |")
    versions = sorted({c["version"] for row in data["rows"].values() for c in row["contenders"].values()})
    return "\n".join(lines + ["", "Versions: " + "; ".join(versions) + f"; Python {m['python']}.", ""])


def note(line):
    print(line, file=sys.stderr, flush=True)


def replace(path, words):
    with open(path + ".new", "w") as f:
        f.write(words)
    os.replace(path + ".new", path)


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("rows", nargs="*", metavar="ROW", help=", ".join([*ROWS, "fresh"]))
    ap.add_argument("--worker", default=os.path.join(ROOT, "target/release/mudit-speed-worker"))
    ap.add_argument("--python", default=sys.executable)
    ap.add_argument("--out", default=os.path.join(ROOT, "tests/results/speed"))
    ap.add_argument("--cache", default=os.path.join(ROOT, "target/speed"))
    ap.add_argument("--threads", type=int, default=os.cpu_count())
    ap.add_argument("--rounds", type=int, default=7)
    ap.add_argument("--patience", type=float, default=60, help="seconds a row may wait for quiet")
    ap.add_argument("--setup-timeout", type=float, default=600, help="seconds a contender may take to be ready")
    ap.add_argument("--only", action="append", help="only contenders whose name has this in it")
    ap.add_argument("--prepare", action="store_true")
    args = ap.parse_args()
    wanted = args.rows or [*ROWS, "fresh"]
    if unknown := [r for r in wanted if r not in ROWS and r != "fresh"]:
        ap.error(f"no such row: {', '.join(unknown)}")
    if args.prepare:
        for name in (r for r in wanted if r in ROWS):
            note(f"preparing {name}")
            for c in start_all(args, *ROWS[name][:3])[0]:
                c.end()
        return
    data = dict(rows={})
    if os.path.exists(args.out + ".json"):
        data = json.load(open(args.out + ".json"))
    data["machine"] = machine(args)
    for name in wanted:
        data["rows"][name] = fresh(args) if name == "fresh" else measure(args, name)
        replace(args.out + ".json", json.dumps(data, indent=1) + "\n")
        replace(args.out + ".md", report(data))
    print(f"{args.out}.md")


if __name__ == "__main__":
    main()
