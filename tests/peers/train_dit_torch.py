"""Plain PyTorch on the quickstart's task: a class-conditional DiT on Fashion-MNIST, flow matching, AdamW, EMA.

    python train_dit_torch.py --minutes 4 --out run [--width 96 --depth 6 --heads 4 --patch 4] [--base-width 48]

The peer of `mudit quickstart`: the same model family, objective and sampler, eager PyTorch float32 on the CPU.
s = sigmoid(N(0, 1)), x_s = (1 - s) x0 + s noise, the model sees 1000 s and predicts noise - x0. Writes
`samples.npz` (arr_0 uint8 N x 28 x 28 x 1, arr_1 labels; for classifier.py), `log.jsonl` and `result.json`.

--base-width B turns on muP: initial weights N(0, 1/fan_in), label table N(0, 1), output layer zero with its input
divided by m = width/B, and the rate of every hidden matrix divided by m. Without it: the original DiT's own.
"""
import argparse
import json
import math
import os
import time

import numpy as np
import torch

import fashion
from dit_torch import DiT

SIDE, CLASSES = 28, 10


def is_hidden(name, p):
    """Matrices whose both sides grow with the width."""
    return p.dim() == 2 and not any(k in name for k in ("t_embedder.mlp.0", "embedding_table", "final_layer.linear"))


def mup_init(model):
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name == "pos_embed":
                continue
            if p.dim() < 2 or "final_layer.linear" in name:
                p.zero_()
            elif "embedding_table" in name:
                p.normal_()
            else:
                p.normal_(std=p[0].numel() ** -0.5)


def groups(model, lr, m):
    """Hidden matrices at lr / m, all else at lr."""
    named = [(k, p) for k, p in model.named_parameters() if p.requires_grad]
    hidden = [p for k, p in named if is_hidden(k, p)]
    rest = [p for k, p in named if not is_hidden(k, p)]
    return [dict(params=rest, peak=lr), dict(params=hidden, peak=lr / m)]


@torch.no_grad()
def sample(model, labels, steps, scale, seed, batch=250):
    """Euler from noise (s = 1) to images (s = 0) with classifier-free guidance on all channels."""
    model.eval()
    g = torch.Generator().manual_seed(seed)
    done = []
    for y in labels.split(batch):
        x = torch.randn(len(y), 1, SIDE, SIDE, generator=g)
        for k in range(steps):
            s = 1 - k / steps
            x = x - model.forward_cfg(x, torch.full((len(y),), 1000 * s), y, CLASSES, scale, 1) / steps
        done.append(x)
    return torch.cat(done)


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--out", required=True)
    ap.add_argument("--data", help="folder with the idx files")
    ap.add_argument("--minutes", type=float, default=4.0, help="training time")
    for name, default in dict(width=96, depth=6, heads=4, patch=4, batch=128, base_width=0, samples=1000,
                              sample_steps=50, threads=2, seed=0, warmup=100).items():
        ap.add_argument(f"--{name.replace('_', '-')}", type=int, default=default)
    ap.add_argument("--lr", type=float, default=2e-3)
    ap.add_argument("--schedule", choices=("constant", "cosine", "linear"), default="linear", help="over the training time")
    ap.add_argument("--betas", type=float, nargs=2, default=(0.9, 0.999))
    ap.add_argument("--weight-decay", type=float, default=0.0)
    ap.add_argument("--clip", type=float, default=1.0)
    ap.add_argument("--ema", type=float, default=0.998)
    ap.add_argument("--drop", type=float, default=0.1)
    ap.add_argument("--flip", type=float, default=0.0)
    ap.add_argument("--output-multiplier", type=float, default=1.0)
    ap.add_argument("--cfg", type=float, default=2.0)
    a = ap.parse_args()
    os.makedirs(a.out, exist_ok=True)
    torch.set_num_threads(a.threads)
    torch.manual_seed(a.seed)
    images, labels = fashion.load(a.data, "train")
    images = torch.tensor(images, dtype=torch.float32).div_(127.5).sub_(1).unsqueeze(1)
    labels = torch.tensor(labels, dtype=torch.int64)

    model = DiT(SIDE, a.patch, 1, a.width, a.depth, a.heads, class_dropout=a.drop, num_classes=CLASSES, learn_sigma=False)
    m = a.width / a.base_width if a.base_width else 1.0
    if a.base_width:
        mup_init(model)
        model.final_layer.linear.register_forward_pre_hook(lambda _, x: (x[0] * (a.output_multiplier / m),))
    averaged = DiT(SIDE, a.patch, 1, a.width, a.depth, a.heads, class_dropout=a.drop, num_classes=CLASSES, learn_sigma=False)
    averaged.load_state_dict(model.state_dict())
    if a.base_width:
        averaged.final_layer.linear.register_forward_pre_hook(lambda _, x: (x[0] * (a.output_multiplier / m),))
    opt = torch.optim.AdamW(groups(model, a.lr, m), lr=a.lr, betas=tuple(a.betas), weight_decay=a.weight_decay)
    trainable = [(e, p) for e, p in zip(averaged.parameters(), model.parameters()) if p.requires_grad]
    means, params = [e.data for e, _ in trainable], [p for _, p in trainable]

    start, step, order, at, recent = time.time(), 0, torch.randperm(len(images)), 0, []
    model.train()
    with open(f"{a.out}/log.jsonl", "w") as log:
        while True:
            done = (time.time() - start) / (60 * a.minutes)
            if done >= 1:
                break
            decay = dict(constant=1.0, linear=1 - done, cosine=0.5 + 0.5 * math.cos(math.pi * done))[a.schedule]
            for group in opt.param_groups:
                group["lr"] = group["peak"] * min(1.0, (step + 1) / a.warmup) * decay
            if at + a.batch > len(images):
                order, at = torch.randperm(len(images)), 0
            rows = order[at:at + a.batch]
            at += a.batch
            x0 = images[rows]
            if a.flip:
                x0 = torch.where(torch.rand(a.batch, 1, 1, 1) < a.flip, x0.flip(3), x0)
            s, noise = torch.sigmoid(torch.randn(a.batch)), torch.randn_like(x0)
            w = s.view(-1, 1, 1, 1)
            loss = (model((1 - w) * x0 + w * noise, 1000 * s, labels[rows]) - (noise - x0)).square().mean()
            opt.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(params, a.clip)
            opt.step()
            # The running mean's start is short, so that it forgets the initial weights.
            torch._foreach_lerp_(means, [p.data for p in params], 1 - min(a.ema, (1 + step) / (10 + step)))
            step += 1
            recent.append(loss.item())
            if step % 50 == 0:
                seconds = time.time() - start
                row = dict(step=step, seconds=round(seconds, 1), loss=round(float(np.mean(recent[-200:])), 4),
                           images_per_s=round(step * a.batch / seconds, 1))
                log.write(json.dumps(row) + "\n")
                log.flush()
    seconds = time.time() - start
    began = time.time()
    asked = torch.arange(a.samples) % CLASSES
    pictures = sample(averaged, asked, a.sample_steps, a.cfg, a.seed + 1)
    pixels = (127.5 * pictures + 128).clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous().numpy()
    np.savez(f"{a.out}/samples.npz", arr_0=pixels, arr_1=asked.numpy())
    result = dict(steps=step, seconds=round(seconds, 1), steps_per_s=round(step / seconds, 3),
                  images_per_s=round(step * a.batch / seconds, 1), loss_last_200=round(float(np.mean(recent[-200:])), 4),
                  parameters=sum(p.numel() for p in params), sampling_seconds=round(time.time() - began, 1),
                  torch=torch.__version__, settings=vars(a))
    with open(f"{a.out}/result.json", "w") as f:
        json.dump(result, f, indent=1)
    print(json.dumps({k: v for k, v in result.items() if k != "settings"}))


if __name__ == "__main__":
    main()
