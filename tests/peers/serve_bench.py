"""The server's figures: throughput against one request at a time and against a PyTorch loop behind FastAPI, behaviour at
80 % load and at three times overload, the time until a client that goes away is noticed, and the bytes of images in 30 mixes.

    python serve_bench.py throughput|load|overload|cancel|same MUDIT CHECKPOINT OUT.jsonl [PEER_PYTHON]
    python serve_bench.py report OUT.jsonl

Each part takes 30 to 90 s, starts its own servers and appends its figures to OUT.jsonl. `throughput` and the measurement of
what saturation is lift the limit of the queue, all else runs with the defaults. PEER_PYTHON runs serve_torch.py (see there for what it needs).
"""
import json
import os
import random
import socket
import statistics
import subprocess
import sys
import threading
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).parent
ROUNDS, MIX = 5, ["--steps", "10,20,30,50", "--cfg", "1,3"]
UNLIMITED = ["--max-queue", "1000000"]


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


class Server:
    def __init__(self, command, port):
        self.url, self.port = f"http://127.0.0.1:{port}", port
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        while True:
            try:
                if self.get("/metrics")[0] == 200 and (self.get("/info")[0] == 404 or self.info()["ready"]):
                    return
            except OSError:
                pass
            assert self.process.poll() is None, command
            time.sleep(0.1)

    def get(self, path):
        try:
            with urllib.request.urlopen(self.url + path, timeout=30) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, ""

    def info(self):
        return json.loads(self.get("/info")[1])

    def counter(self, name):
        lines = [l for l in self.get("/metrics")[1].splitlines() if l.split("{")[0].split(" ")[0] == name]
        return sum(float(l.rsplit(" ", 1)[1]) for l in lines)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.terminate()
        assert self.process.wait(60) in (0, -15), self.process.returncode


def mudit(binary, checkpoint, *more):
    port = free_port()
    return Server([binary, "serve", "--offline", "--checkpoint", checkpoint, "--port", str(port), *more], port)


def bench(binary, server, *args):
    line = [binary, "bench-serve", "--url", server.url, "--json", *MIX, *map(str, args)]
    return json.loads(subprocess.run(line, check=True, capture_output=True, text=True).stdout)["runs"]


def note(out, part, figures):
    figures = {"part": part, "when": time.strftime("%Y-%m-%d %H:%M", time.gmtime()), **figures}
    with open(out, "a") as f:
        f.write(json.dumps(figures) + "\n")
    print(json.dumps(figures, indent=1))


def read(out):
    return {f["part"]: f for f in map(json.loads, open(out))}


def throughput(binary, checkpoint, out, python):
    port = free_port()
    peer_line = [python, str(HERE / "serve_torch.py"), checkpoint, str(port)]
    with mudit(binary, checkpoint, *UNLIMITED) as ours, Server(peer_line, port) as peer:
        for server in (ours, peer):
            bench(binary, server, "--requests", 8, "--concurrency", 8)
        rounds = []
        for i in range(ROUNDS):
            alone, full = (bench(binary, ours, "--requests", 64, "--concurrency", n, "--seed", i)[0] for n in (1, 64))
            theirs = bench(binary, peer, "--requests", 64, "--concurrency", 64, "--seed", i)[0]
            rounds.append([alone, full, theirs])
            assert all(r["done"] == 64 for r in rounds[-1]), rounds[-1]
        info = ours.info()
    middle = [statistics.median(r[k]["image_steps_per_s"] for r in rounds) for k in range(3)]
    note(out, "throughput", {
        "rounds": ROUNDS, "alone_steps_per_s": middle[0], "full_steps_per_s": middle[1], "peer_steps_per_s": middle[2],
        "over_alone": statistics.median(r[1]["image_steps_per_s"] / r[0]["image_steps_per_s"] for r in rounds),
        "over_peer": statistics.median(r[1]["image_steps_per_s"] / r[2]["image_steps_per_s"] for r in rounds),
        "requests_per_s": statistics.median(r[1]["requests_per_s"] for r in rounds),
        "slot_use": statistics.median(r[1]["slot_use"] for r in rounds),
        "mean_rows": statistics.median(r[1]["mean_rows"] for r in rounds),
        "alone_p50_ms": statistics.median(r[0]["p50_ms"] for r in rounds),
        "threads": info["threads"], "curve": info["models"][0]["engine"]["measured"]["points"],
        "in_use": [p["rows"] for p in info["models"][0]["engine"]["in_use"]["points"]],
        "exact": info["models"][0]["engine"]["determinism"]["exact"],
    })


def saturation(binary, checkpoint):
    """What the engine can do, just before it is put under another load."""
    with mudit(binary, checkpoint, *UNLIMITED) as server:
        return bench(binary, server, "--requests", 512, "--concurrency", 64)[0]


def arrivals(part, share):
    def run(binary, checkpoint, out, python):
        full = saturation(binary, checkpoint)
        rate = share * full["requests_per_s"]
        with mudit(binary, checkpoint) as server:
            memory, ended = [], threading.Event()

            def watch():
                while not ended.wait(5):
                    memory.append(server.counter("mudit_resident_memory_bytes") / 1e6)
            watcher = threading.Thread(target=watch)
            watcher.start()
            run = bench(binary, server, "--rate", rate, "--duration", 60)[0]
            ended.set()
            watcher.join()
        note(out, part, {"rate": rate, "memory_each_5_s": memory, "saturated_steps_per_s": full["image_steps_per_s"], **run})
    return run


load, overload = arrivals("load", 0.8), arrivals("overload", 3)


def cancel(binary, checkpoint, out, python):
    body = json.dumps({"class_label": 0, "steps": 1000, "n": 10, "guidance_scale": 3, "stream": True}).encode()
    head = f"POST /v1/images/generations HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
    times, rows = [], []
    with mudit(binary, checkpoint) as server:
        for _ in range(20):
            client = socket.create_connection(("127.0.0.1", server.port))
            client.sendall(head.encode() + body)
            client.recv(4096)
            time.sleep(0.1)
            start = time.perf_counter()
            client.close()
            while server.counter("mudit_orders"):
                pass
            times.append(time.perf_counter() - start)
            after = server.counter("mudit_rows_run_total")
            time.sleep(0.1)
            rows.append(server.counter("mudit_rows_run_total") - after)
        info = server.info()["models"][0]["engine"]["in_use"]["points"][-1]
    note(out, "cancel", {"clients": len(times), "median_ms": 1e3 * statistics.median(times), "worst_ms": 1e3 * max(times),
                         "step_ms": 1e3 * info["seconds"], "rows_after_that": max(rows), "largest_batch": info["rows"]})


def image(server, **body):
    sent = urllib.request.Request(f"{server.url}/v1/images/generations", json.dumps(body).encode(), {"content-type": "application/json"})
    with urllib.request.urlopen(sent, timeout=120) as answer:
        return [d["b64_json"] for d in json.load(answer)["data"]]


def same(binary, checkpoint, out, python):
    subjects = [dict(class_label=c, seed=7, steps=n, guidance_scale=g, sampler=s)
                for c, n, g, s in ((8, 25, 3, "euler"), (8, 25, 1, "euler"), (7, 10, 4.5, "heun"), (2, 50, 1.5, "sde"))]
    draw, compared = random.Random(0), 0
    with mudit(binary, checkpoint, *UNLIMITED) as server, ThreadPoolExecutor(32) as pool:
        alone = [image(server, **s) for s in subjects]
        assert len({a[0] for a in alone}) == len(alone)
        for mix in range(30):
            others = [dict(class_label=draw.randrange(10), seed=draw.randrange(10**6), steps=draw.randint(2, 60), n=draw.randint(1, 4),
                           guidance_scale=draw.choice([1, 2, 7.5])) for _ in range(draw.randint(1, 24))]
            asked = others + subjects
            draw.shuffle(asked)
            answers = list(pool.map(lambda body: image(server, **body), asked))
            for subject, want in zip(subjects, alone):
                assert answers[asked.index(subject)] == want, (mix, subject)
                compared += 1
    # Another process, with other batch sizes and threads.
    with mudit(binary, checkpoint, "--max-rows", "3", "--threads", "1") as server:
        for subject, want in zip(subjects, alone):
            assert image(server, **subject) == want, subject
            compared += 1
    note(out, "same", {"compared": compared, "mixes": 30, "equal": True})


def report(out):
    r = read(out)
    t, l, o, c, s = (r[k] for k in ("throughput", "load", "overload", "cancel", "same"))
    memory = lambda f: ", ".join(f"{f['memory_each_5_s'][i]:.0f}" for i in (0, 5, -1))
    print(f"""| | image-steps/s | |
|---|---:|---|
| 64 mixed requests at once | {t['full_steps_per_s']:.0f} | slot use {t['slot_use']:.1%}, {t['mean_rows']:.1f} rows a batch |
| the same one at a time | {t['alone_steps_per_s']:.0f} | the server makes {t['over_alone']:.2f} × of it |
| PyTorch behind FastAPI, 64 at once | {t['peer_steps_per_s']:.0f} | the server makes {t['over_peer']:.2f} × of it |

| | 80 % load | 3 × overload |
|---|---:|---:|
| requests a second, sent | {l['rate']:.1f} | {o['rate']:.1f} |
| sent, done, 429, 503, failed, lost | {l['requests']}, {l['done']}, {l['refused']}, {l['unavailable']}, {l['failed']}, {l['lost']} | {o['requests']}, {o['done']}, {o['refused']}, {o['unavailable']}, {o['failed']}, {o['lost']} |
| p50, p90, p99 of done, ms | {l['p50_ms']:.0f}, {l['p90_ms']:.0f}, {l['p99_ms']:.0f} | {o['p50_ms']:.0f}, {o['p90_ms']:.0f}, {o['p99_ms']:.0f} |
| goodput, image-steps/s | {l['image_steps_per_s']:.0f} | {o['image_steps_per_s']:.0f}, {o['image_steps_per_s'] / o['saturated_steps_per_s']:.0%} of saturation |
| slot use | {l['slot_use']:.1%} | {o['slot_use']:.1%} |
| memory after 5, 30, 60 s, MB | {memory(l)} | {memory(o)} |

p99 at overload / at 80 % load: {o['p99_ms'] / l['p99_ms']:.2f}. A client that goes away: noticed after {c['median_ms']:.1f} ms
(worst of {c['clients']}: {c['worst_ms']:.1f} ms), a step of the largest batch takes {c['step_ms']:.1f} ms; {c['rows_after_that']:.0f} rows were computed after that.

{s['compared']} images compared in {s['mixes']} mixes and after a restart with other batch sizes and threads: the same bytes as alone.""")


if __name__ == "__main__":
    os.environ.setdefault("PYTHONDONTWRITEBYTECODE", "1")
    if sys.argv[1] == "report":
        report(sys.argv[2])
    else:
        part = {"throughput": throughput, "load": load, "overload": overload, "cancel": cancel, "same": same}[sys.argv[1]]
        part(sys.argv[2], sys.argv[3], sys.argv[4], sys.argv[5] if len(sys.argv) > 5 else sys.executable)
