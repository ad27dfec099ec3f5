"""mudit beside PyTorch on the same device, weights and inputs: the forward pass, losses and every gradient of a DiT.

    python answers.py --model DiT-XL/2 [--precisions f32,bf16,f16] [--provider cuda --device cuda] [--batch 8] [--out FILE.md]

In f32 mudit must be within 1e-4 of PyTorch (relative, L2, each tensor; TF32 off). In bf16 and f16 both sides round, PyTorch
by its autocast: mudit's distance from PyTorch's f32 may be 1.5 times that of PyTorch's autocast (3 times for a single
gradient), or one rounding of the type where that is more. PyTorch's own distance from f64 is told beside. On the CPU,
where mudit has f32 alone, its bf16 and f16 are emulated: for small models. Exit code 1 when a limit is passed.
"""
import argparse
import gc
import os
import subprocess
import sys
import tempfile
from types import SimpleNamespace

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from dit_torch import Diffusion, preset
from make_fixture import random_model

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16, "f64": torch.float64}
F32_LIMIT = 1e-4
WHOLE, SINGLE = 1.5, 3.0  # times PyTorch's autocast
ROUNDING = {"bf16": 2.0**-8, "f16": 2.0**-11}
LOSS_SCALE = 2.0**16


def exact():
    """Products of f32 in f32: PyTorch would use TF32 in convolutions, and several of it in an attention kernel."""
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cuda.enable_mem_efficient_sdp(False)  # narrow types have the flash kernel


def make(model, batch, seed):
    """A DiT whose every parameter matters, and a batch, on the CPU. No time is 0: there the loss is a likelihood of bins that
    f32 computes with one digit, PyTorch's as mudit's."""
    shape = preset(model)
    g = torch.Generator().manual_seed(seed)
    rn = lambda *s: torch.randn(*s, generator=g)
    dit = random_model(SimpleNamespace(side=shape["input_size"], patch=shape["patch"], dim=shape["dim"], depth=shape["depth"],
                                       heads=shape["heads"], classes=shape["num_classes"]), rn)
    image = (batch, shape["channels"], shape["input_size"], shape["input_size"])
    t, y = torch.randint(1, 1000, (batch,), generator=g), torch.randint(0, shape["num_classes"], (batch,), generator=g)
    t[0], y[-1] = 1, shape["num_classes"]
    return dit, dict(x=rn(*image), x0=rn(*image), noise=rn(*image), t=t, y=y)


def by_torch(dit, inputs, device, precision):
    """PyTorch's answer, losses and gradients, on the host; autocast where the type is narrow."""
    wide = DTYPES[precision] if precision in ("f32", "f64") else torch.float32
    narrow = precision in ROUNDING
    dit = dit.to(device=device, dtype=wide).eval()
    v = {k: x.to(device=device, dtype=wide if x.is_floating_point() else x.dtype) for k, x in inputs.items()}
    with torch.device(device):
        diffusion = Diffusion()
    cast = lambda: torch.autocast(device, DTYPES[precision] if narrow else torch.bfloat16, enabled=narrow)
    with torch.no_grad(), cast():
        found = dict(out=dit(v["x"], v["t"], v["y"]))
    xt = diffusion.q_sample(v["x0"], v["t"], v["noise"])
    scale = LOSS_SCALE if precision == "f16" else 1.0
    while True:  # as a gradient scaler does
        dit.zero_grad(set_to_none=True)
        with cast():
            out = dit(xt, v["t"], v["y"])
        mse, vb = diffusion.loss_terms(out.to(wide), v["x0"], xt, v["t"], v["noise"])
        ((mse + vb).mean() * scale).backward()
        grads = {f"grad.{k}": p.grad / scale for k, p in dit.named_parameters() if p.requires_grad}
        if scale <= 1.0 or all(g.isfinite().all() for g in grads.values()):
            break
        scale /= 2
    found |= dict(mse=mse, vb=vb) | grads
    found = {k: x.detach().to("cpu", torch.float32) for k, x in found.items()}
    dit.zero_grad(set_to_none=True)
    return found


def by_mudit(args, folder, provider, precision):
    line = [args.worker, "answer", args.model, folder, str(args.threads), provider, precision]
    done = subprocess.run(line, capture_output=True, text=True)
    if done.returncode:
        said = [l for l in done.stderr.splitlines() if l.strip()]
        raise RuntimeError(said[-1] if said else f"it ended with {done.returncode}")
    path = os.path.join(folder, "answer.safetensors")
    with safe_open(path, "pt") as file:
        found = {k: file.get_tensor(k) for k in file.keys()}
    os.remove(path)
    return found


def squares(got, want):
    """Squared distance and squared size."""
    got, want = got.reshape(-1).double(), want.reshape(-1).double()
    return float((got - want).square().sum()), float(want.square().sum())


def distances(got, want):
    """Relative distances by name; `gradients` is of all together."""
    both = {k: squares(got[k], x) for k, x in want.items() if k in got}
    of = lambda pairs: (sum(d for d, _ in pairs) / max(sum(s for _, s in pairs), 1e-300)) ** 0.5
    found = {k: of([pair]) for k, pair in both.items()}
    grads = [pair for k, pair in both.items() if k.startswith("grad.")]
    if grads:
        found["gradients"] = of(grads)
    return found


def judge(precision, ours, theirs, missing):
    """Rows (what, mudit's distance, PyTorch's, limit, kept), of the gradients the worst; and whether all limits are kept."""
    def row(name):
        single = name.startswith("grad.")
        limit = F32_LIMIT
        if precision != "f32":
            limit = max((SINGLE if single else WHOLE) * theirs[name], (2 if single else 1) * ROUNDING[precision])
        return name, ours[name], theirs[name], limit, ours[name] <= limit

    rows = [row(name) for name in ours]
    singles = sorted((r for r in rows if r[0].startswith("grad.")), key=lambda r: r[1] / r[3] if r[1] == r[1] else float("inf"))
    shown = [r for r in rows if not r[0].startswith("grad.")]
    shown += [r for r in singles if not r[4]][-10:] or singles[-1:]
    shown += [(f"{name} is missing", float("inf"), 0.0, 0.0, False) for name in missing]
    return shown, all(r[4] for r in rows) and not missing


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--model", required=True, help="a preset, such as DiT-S/2@8x8x4:10")
    ap.add_argument("--precisions", default="f32,bf16,f16")
    ap.add_argument("--provider", default="cuda", help="mudit's, separated by commas; tensorrt does not train")
    ap.add_argument("--device", default="cuda", help="PyTorch's")
    ap.add_argument("--worker", default=os.path.join(ROOT, "target/release/mudit-speed-worker"))
    ap.add_argument("--batch", type=int, default=8)
    ap.add_argument("--seed", type=int, default=0)
    ap.add_argument("--threads", type=int, default=os.cpu_count())
    ap.add_argument("--work", help="folder for the exchanged files (8 bytes a parameter)")
    ap.add_argument("--out", help="write the table here")
    args = ap.parse_args()
    exact()
    torch.set_num_threads(args.threads)
    dit, inputs = make(args.model, args.batch, args.seed)
    count = sum(p.numel() for p in dit.parameters())
    device = torch.cuda.get_device_name() if args.device == "cuda" else args.device
    lines = [f"### {args.model}, batch {args.batch}, {count / 1e6:.1f} M parameters, PyTorch {torch.__version__} on {device}", "",
             "| precision | provider | what | mudit from PyTorch f32 | PyTorch from f32 (in f32: from f64) | limit | |",
             "|---|---|---|---|---|---|---|"]
    print("\n".join(lines), flush=True)
    good = True
    with tempfile.TemporaryDirectory(dir=args.work) as folder:
        save_file({k: p.detach().contiguous() for k, p in dit.state_dict().items()}, f"{folder}/weights.safetensors")
        save_file(inputs, f"{folder}/inputs.safetensors")
        # The weights come back from the file after f64.
        exactly = by_torch(dit, inputs, args.device, "f64")
        with safe_open(f"{folder}/weights.safetensors", "pt") as file:
            dit = dit.float()
            dit.load_state_dict({k: file.get_tensor(k) for k in file.keys()})
        wanted = by_torch(dit, inputs, args.device, "f32")
        own = distances(wanted, exactly)
        del exactly
        for precision in args.precisions.split(","):
            theirs = own if precision == "f32" else distances(by_torch(dit, inputs, args.device, precision), wanted)
            dit = dit.to("cpu")
            gc.collect()
            if args.device == "cuda":
                torch.cuda.empty_cache()
            for provider in args.provider.split(","):
                shown = f"{provider}, emulated" if provider == "cpu" and precision != "f32" else provider
                try:
                    found = by_mudit(args, folder, provider, precision)
                except RuntimeError as error:
                    rows, kept = [(f"failed: {error}", float("inf"), 0.0, 0.0, False)], False
                else:
                    due = {"out"} if provider.startswith("tensorrt") else wanted.keys()
                    rows, kept = judge(precision, distances(found, wanted), theirs, sorted(due - found.keys()))
                    del found
                good &= kept
                for what, ours, peer, limit, ok in rows:
                    lines.append(f"| {precision} | {shown} | {what} | {ours:.1e} | {peer:.1e} | {limit:.1e} | {'kept' if ok else '**too far**'} |")
                    print(lines[-1], flush=True)
    if args.out:
        with open(args.out, "w") as file:
            file.write("\n".join([*lines, "", ""]))
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main()
