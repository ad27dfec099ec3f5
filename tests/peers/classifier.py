"""An outside judge of generated Fashion-MNIST pictures: a small CNN that has never seen a generated one.

    python classifier.py train --out classifier.pt [--data DIR] [--seconds 140] [--threads 2]
    python classifier.py judge --weights classifier.pt samples.npz [--json]

`train` fits the 60,000 training images and prints the accuracy on the 10,000 test images. `judge` reads `arr_0`
(uint8, N x 28 x 28 x 1 or N x 28 x 28) and `arr_1` (N labels) and prints how often the CNN sees the class that was
asked for, per class and in total.
"""
import argparse
import json
import time

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

import fashion


def network():
    def conv(i, o):
        return nn.Sequential(nn.Conv2d(i, o, 3, padding=1, bias=False), nn.BatchNorm2d(o), nn.ReLU())

    return nn.Sequential(
        conv(1, 32), nn.MaxPool2d(2), conv(32, 64), nn.MaxPool2d(2), conv(64, 96), nn.Flatten(),
        nn.Dropout(0.3), nn.Linear(96 * 49, 128), nn.ReLU(), nn.Dropout(0.3), nn.Linear(128, 10))


def as_input(images):
    """uint8 (N, 28, 28) -> float (N, 1, 28, 28) in [-1, 1]."""
    return torch.tensor(images, dtype=torch.float32).div_(127.5).sub_(1).unsqueeze(1)


@torch.no_grad()
def predict(model, images, batch=1000):
    model.eval()
    return torch.cat([model(as_input(images[i:i + batch])).argmax(1) for i in range(0, len(images), batch)]).numpy()


def train(a):
    torch.manual_seed(a.seed)
    images, labels = fashion.load(a.data, "train")
    x, y = as_input(images), torch.from_numpy(labels.astype(np.int64))
    model = network().to(memory_format=torch.channels_last)
    opt = torch.optim.AdamW(model.parameters(), weight_decay=1e-2)
    steps, batch, peak = a.epochs * (len(x) // a.batch), a.batch, 3e-3
    start, step, done = time.time(), 0, 0.0
    while done < 1.0:
        order = torch.randperm(len(x))
        for i in range(0, len(x) - batch + 1, batch):
            # The schedule follows whichever runs out first, steps or time, so that it always ends at rate zero.
            done = min(1.0, max(step / steps, (time.time() - start) / a.seconds))
            if done >= 1.0:
                break
            for group in opt.param_groups:
                group["lr"] = peak * min(done / 0.15, (1 - done) / 0.85)
            rows = order[i:i + batch]
            xb = torch.where(torch.rand(batch, 1, 1, 1) < 0.5, x[rows].flip(3), x[rows])
            model.train()
            loss = F.cross_entropy(model(xb.contiguous(memory_format=torch.channels_last)), y[rows])
            opt.zero_grad()
            loss.backward()
            opt.step()
            step += 1
    seconds = time.time() - start
    images, labels = fashion.load(a.data, "t10k")
    accuracy = float((predict(model, images) == labels).mean())
    torch.save({"model": model.state_dict(), "test_accuracy": accuracy}, a.out)
    print(json.dumps({"steps": step, "epochs": round(step * batch / len(x), 2), "seconds": round(seconds, 1),
                      "threads": torch.get_num_threads(), "test_accuracy": accuracy}))


def judge(a):
    saved = torch.load(a.weights, weights_only=True)
    model = network()
    model.load_state_dict(saved["model"])
    with np.load(a.samples) as f:
        images, labels = f["arr_0"], f["arr_1"].astype(np.int64)
    if images.ndim == 4 and images.shape[3] == 1:
        images = images[..., 0]
    if images.dtype != np.uint8 or images.shape[1:] != (28, 28) or labels.shape != images.shape[:1]:
        raise SystemExit(f"{a.samples}: expected arr_0 uint8 (N, 28, 28, 1) and arr_1 (N,), "
                         f"got {images.dtype} {images.shape} and {labels.shape}")
    seen = predict(model, images)
    right = seen == labels
    rows = []
    for k in sorted(set(labels.tolist())):
        of = labels == k
        others = np.bincount(seen[of & ~right], minlength=10)
        name = fashion.CLASSES[k] if k < 10 else str(k)
        rows.append({"class": k, "name": name, "samples": int(of.sum()), "accuracy": float(right[of].mean()),
                     "taken_for": fashion.CLASSES[int(others.argmax())] if others.any() else ""})
    total = {"samples": len(labels), "accuracy": float(right.mean()),
             "accuracy_on_test_images": saved["test_accuracy"], "classes": rows}
    if a.json:
        print(json.dumps(total))
        return
    print(f"{'class':<14}{'samples':>8}{'accuracy':>10}  most often taken for")
    for r in rows:
        print(f"{r['name']:<14}{r['samples']:>8}{r['accuracy']:>10.3f}  {r['taken_for']}")
    print(f"{'all':<14}{total['samples']:>8}{total['accuracy']:>10.3f}  (real test images: {saved['test_accuracy']:.3f})")


if __name__ == "__main__":
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sub = ap.add_subparsers(required=True)
    t = sub.add_parser("train", help="fit the CNN and save it")
    t.add_argument("--out", required=True)
    t.add_argument("--data", help="folder with the four idx files")
    t.add_argument("--seconds", type=float, default=140, help="at most so long")
    t.add_argument("--epochs", type=int, default=8, help="at most so many")
    t.add_argument("--batch", type=int, default=128)
    t.add_argument("--seed", type=int, default=0)
    t.set_defaults(run=train)
    j = sub.add_parser("judge", help="accuracy on samples")
    j.add_argument("samples")
    j.add_argument("--weights", required=True)
    j.add_argument("--json", action="store_true")
    j.set_defaults(run=judge)
    for p in (t, j):
        p.add_argument("--threads", type=int, default=2)
    args = ap.parse_args()
    torch.set_num_threads(args.threads)
    args.run(args)
