"""Does mudit's loss follow PyTorch's? The same weights, images, times, noise and labels for some steps of training.

    python curves.py --model DiT-S/2 [--precisions f32,bf16] [--provider cuda --device cuda] [--batch 32 --steps 100]

Both sides: the paper's first weights, AdamW, clip 1, a fixed set of noisy pictures. mudit runs `mudit replay`. The largest
relative difference of a step's loss from PyTorch's in f32 may be 1e-4 in f32; in bf16 and f16 1.5 times that of PyTorch's own
autocast, or one rounding of the type where that is more. Writes --out FILE.md with a table and all curves. Exit code 1 when a limit is
passed.
"""
import argparse
import json
import os
import subprocess
import sys
import tempfile

import torch
from safetensors.torch import save_file

from answers import DTYPES, LOSS_SCALE, ROOT, ROUNDING, exact
from dit_torch import Diffusion, DiT, preset

F32_LIMIT, TIMES = 1e-4, 1.5
CLIP = 1.0
PICTURES = 64


def batches(shape, batch, steps, seed):
    """A fixed set of pictures, smooth patterns with some noise, and every step's draws. No time is 0, as in `answers`."""
    g = torch.Generator().manual_seed(seed)
    side, channels, classes = shape["input_size"], shape["channels"], shape["num_classes"]
    rough = torch.randn(PICTURES, channels, 4, 4, generator=g)
    pictures = torch.nn.functional.interpolate(rough, size=(side, side), mode="bicubic")
    pictures += 0.1 * torch.randn(*pictures.shape, generator=g)
    labels = torch.randint(0, classes, (PICTURES,), generator=g)
    for _ in range(steps):
        rows = torch.randint(0, PICTURES, (batch,), generator=g)
        y = torch.where(torch.rand(batch, generator=g) < 0.1, torch.full_like(rows, classes), labels[rows])
        yield dict(x0=pictures[rows], noise=torch.randn(batch, channels, side, side, generator=g),
                   t=torch.randint(1, 1000, (batch,), generator=g), y=y)


def by_torch(shape, weights, given, args, precision):
    """PyTorch's losses."""
    with torch.device(args.device):
        dit, diffusion = DiT(**shape), Diffusion()
    dit.load_state_dict(weights)
    dit.eval()  # labels are dropped already
    params = [p for p in dit.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(params, lr=args.lr, weight_decay=0.0)
    scale, losses = LOSS_SCALE if precision == "f16" else 1.0, []
    for step in given:
        v = {k: x.to(args.device) for k, x in step.items()}
        xt = diffusion.q_sample(v["x0"], v["t"], v["noise"])
        while True:  # as a gradient scaler does
            with torch.autocast(args.device, DTYPES[precision], enabled=precision != "f32"):
                out = dit(xt, v["t"], v["y"])
            mse, vb = diffusion.loss_terms(out.float(), v["x0"], xt, v["t"], v["noise"])
            loss = (mse + vb).mean()
            optimizer.zero_grad(set_to_none=True)
            (loss * scale).backward()
            torch._foreach_div_([p.grad for p in params], scale)
            if torch.nn.utils.clip_grad_norm_(params, CLIP).isfinite() or scale <= 1.0:
                break
            scale /= 2
        optimizer.step()
        losses.append(loss.item())
    return losses


def by_mudit(args, folder, precision):
    line = [args.mudit, "replay", "--model", args.model, "--weights", f"{folder}/weights.safetensors", "--batches",
            f"{folder}/batches.safetensors", "--lr", str(args.lr), "--clip", str(CLIP), "--out", f"{folder}/after.safetensors",
            "--threads", str(args.threads), "--provider", args.provider, "--precision", precision, "--json"]
    done = subprocess.run(line, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"mudit replay in {precision}: {done.stderr.strip()}")
    return [step["loss"] for step in json.loads(done.stdout)["steps"]]


def furthest(curve, wanted):
    """The largest relative difference, and its step."""
    apart = [abs(a - b) / abs(b) if a == a else float("inf") for a, b in zip(curve, wanted, strict=True)]
    return max(apart), apart.index(max(apart))


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--model", required=True, help="a preset, such as DiT-S/2@8x8x4:10")
    ap.add_argument("--precisions", default="f32,bf16")
    ap.add_argument("--provider", default="cuda", help="mudit's")
    ap.add_argument("--device", default="cuda", help="PyTorch's")
    ap.add_argument("--mudit", default=os.path.join(ROOT, "target/release/mudit"))
    ap.add_argument("--batch", type=int, default=32)
    ap.add_argument("--steps", type=int, default=100)
    ap.add_argument("--lr", type=float, default=3e-4)
    ap.add_argument("--seed", type=int, default=0)
    ap.add_argument("--threads", type=int, default=os.cpu_count())
    ap.add_argument("--out", help="write the table and the curves here")
    args = ap.parse_args()
    exact()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    shape = preset(args.model)
    weights = {k: v.detach().contiguous() for k, v in DiT(**shape).state_dict().items()}
    given = list(batches(shape, args.batch, args.steps, args.seed))
    device = torch.cuda.get_device_name() if args.device == "cuda" else args.device
    lines = [f"### {args.model}, batch {args.batch}, {args.steps} steps, PyTorch {torch.__version__} on {device}", "",
             "| precision | largest difference from PyTorch f32, at step | PyTorch's autocast | limit | |", "|---|---|---|---|---|"]
    print("\n".join(lines), flush=True)
    curves, good = {"PyTorch f32": by_torch(shape, weights, given, args, "f32")}, True
    wanted = curves["PyTorch f32"]
    with tempfile.TemporaryDirectory() as folder:
        save_file(weights, f"{folder}/weights.safetensors")
        save_file({f"step{k}.{name}": v.contiguous() for k, step in enumerate(given) for name, v in step.items()},
                  f"{folder}/batches.safetensors")
        for precision in args.precisions.split(","):
            limit, peer = F32_LIMIT, "–"
            if precision != "f32":
                curves[f"PyTorch {precision}"] = by_torch(shape, weights, given, args, precision)
                theirs, at = furthest(curves[f"PyTorch {precision}"], wanted)
                limit, peer = max(TIMES * theirs, ROUNDING[precision]), f"{theirs:.1e}, {at}"
            curves[f"mudit {precision}"] = by_mudit(args, folder, precision)
            ours, at = furthest(curves[f"mudit {precision}"], wanted)
            good &= ours <= limit
            lines.append(f"| {precision} | {ours:.1e}, {at} | {peer} | {limit:.1e} | {'kept' if ours <= limit else '**too far**'} |")
            print(lines[-1], flush=True)
    tenth = max(1, args.steps // 10)
    first, last = sum(wanted[:tenth]) / tenth, sum(wanted[-tenth:]) / tenth
    lines += ["", f"PyTorch's f32 loss goes from {first:.4f} (mean of the first {tenth}) to {last:.4f} (the last {tenth}).", "",
              "| step | " + " | ".join(curves) + " |", "|---" * (len(curves) + 1) + "|"]
    print(lines[-4], flush=True)
    good &= last < first
    lines += [f"| {k} | " + " | ".join(f"{c[k]:.6f}" for c in curves.values()) + " |" for k in range(args.steps)]
    if args.out:
        with open(args.out, "w") as file:
            file.write("\n".join([*lines, "", ""]))
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main()
