"""Writes one fixture: a folder with a small DiT's weights, inputs, outputs, losses, gradients, AdamW steps and samples.

    python make_fixture.py --seed 0 --out DIR [--dim 96 --depth 2 --heads 4 --patch 2 --side 8 --classes 10]

Every expected value is computed in float32, as a user would, and again in float64; manifest.json holds the largest
absolute and the relative (L2) difference of the two: the rounding noise that a comparison must allow for.
All tensors are float32 or int64. Deterministic for a seed, torch version and CPU.

| file | holds |
| --- | --- |
| config.json | the model, as the commands of mudit take it |
| weights.safetensors | every parameter by its checkpoint name, pos_embed included |
| inputs.safetensors | what goes in: forward_*, train<k>_*, sample_* |
| expected.safetensors | what comes out: forward, guided forward, losses of 3 steps, 8 sampling trajectories |
| grads.safetensors | gradients of the first step, all trainable parameters |
| adamw3.safetensors, ema3.safetensors | parameters after 3 AdamW steps; some of their running means (decay 0.9) |
| batches.safetensors | the 3 training batches for `mudit replay`; dropped labels already are the null class |
| sample-noise.safetensors | starting noise and every step's noise for `mudit sample --noise` |
"""
import argparse
import copy
import json
import os

import torch
from safetensors.torch import save_file

from dit_torch import Diffusion, DiT, ema_update

BATCH, SAMPLES, STEPS, TRAIN_STEPS = 4, 2, 10, 3
GUIDANCE, EMA_DECAY, LR = 4.0, 0.9, 1e-4


def random_model(a, rn):
    """A DiT whose every parameter matters: the paper's initial zeros would hide most of the graph."""
    model = DiT(input_size=a.side, patch=a.patch, dim=a.dim, depth=a.depth, heads=a.heads, num_classes=a.classes)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name == "pos_embed":
                continue
            fan_in = p[0].numel() if p.dim() > 1 else 1
            if name.endswith(".bias"):
                p.copy_(0.1 * rn(*p.shape))
            elif "embedding_table" in name:
                p.copy_(0.5 * rn(*p.shape))
            elif "t_embedder.mlp.0" in name:
                p.copy_(rn(*p.shape) * (2 / fan_in) ** 0.5)
            else:
                p.copy_(rn(*p.shape) * fan_in ** -0.5)
            if "adaLN_modulation" in name and name.endswith(".bias"):
                p.copy_(0.3 * rn(*p.shape))
        model.final_layer.linear.weight.mul_(0.7)  # so that epsilon and v are of the order of 1
    return model


def random_inputs(a, rn, ri):
    c, s, k = 4, a.side, a.classes
    x = rn(BATCH, c, s, s)
    inputs = dict(forward_x=x, forward_t=torch.tensor([0, 17, 500, 999]), forward_y=torch.tensor([1, 7 % k, 3, k]))
    train = []
    for step in range(TRAIN_STEPS):
        t = ri(1000, BATCH)
        if step == 0:
            t[0] = 0  # exercises the decoder likelihood
        y = ri(k, BATCH)
        drop = torch.zeros(BATCH, dtype=torch.int64)
        drop[step] = 1
        train.append(dict(x0=rn(BATCH, c, s, s), t=t, y=y, drop=drop, noise=rn(BATCH, c, s, s)))
    inputs |= {f"train{i}_{k}": v for i, d in enumerate(train) for k, v in d.items()}
    inputs |= dict(sample_xT=rn(SAMPLES, c, s, s), sample_noises=rn(STEPS, SAMPLES, c, s, s),
                   sample_y=torch.tensor([2, k - 1]))
    return inputs, train


def trajectories(m, inputs, cast, null):
    y, start, noises = inputs["sample_y"], cast(inputs["sample_xT"]), cast(inputs["sample_noises"])
    fns = dict(plain=lambda x, t: m(x, t, y), cfg3=lambda x, t: m.forward_cfg(x, t, y, null, GUIDANCE, 3),
               cfg4=lambda x, t: m.forward_cfg(x, t, y, null, GUIDANCE, 4))
    spread, even = Diffusion("10"), Diffusion("ddim10")
    runs = {f"ddpm10_{n}": spread.ddpm(f, start, noises) for n, f in fns.items()}
    runs |= {f"ddim10_{n}": spread.ddim(f, start) for n, f in fns.items()}
    runs["ddim10int_cfg4"] = even.ddim(fns["cfg4"], start)  # steps 0, 100, .., 900
    runs["ddim10_eta05_cfg4"] = spread.ddim(fns["cfg4"], start, 0.5, noises)
    return {name: torch.stack(list(run)) for name, run in runs.items()}


def compute(model, inputs, train, null, dtype):
    m = copy.deepcopy(model).to(dtype).eval()
    cast = lambda v: v.to(dtype) if v.is_floating_point() else v
    x, t, y = cast(inputs["forward_x"]), inputs["forward_t"], inputs["forward_y"]
    with torch.no_grad():
        out = dict(forward_out=m(x, t, y))
        for guided in (3, 4):
            out[f"forward_cfg{guided}_out"] = m.forward_cfg(x[:2], t[:2], y[:2], null, GUIDANCE, guided)
    out |= trajectories(m, inputs, cast, null)
    m.train()
    diffusion = Diffusion()
    opt = torch.optim.AdamW([p for p in m.parameters() if p.requires_grad], lr=LR, weight_decay=0.0)
    ema = [p.detach().clone() for p in m.parameters()]
    for step, d in enumerate(train):
        x0, noise = cast(d["x0"]), cast(d["noise"])
        xt = diffusion.q_sample(x0, d["t"], noise)
        answer = m(xt, d["t"], d["y"], d["drop"])
        mse, vb = diffusion.loss_terms(answer, x0, xt, d["t"], noise)
        loss = (mse + vb).mean()
        opt.zero_grad()
        loss.backward()
        out |= {f"train{step}_mse": mse.detach(), f"train{step}_vb": vb.detach(),
                f"train{step}_loss": loss.detach().view(1)}
        if step == 0:
            out |= dict(train0_xt=xt, train0_out=answer.detach())
            grads = {k: p.grad.clone() for k, p in m.named_parameters() if p.requires_grad}
        opt.step()
        ema_update(ema, m, EMA_DECAY)
    after = {k: p.detach().clone() for k, p in m.named_parameters() if p.requires_grad}
    some = ("final_layer.linear", "blocks.0.attn.proj", "x_embedder.proj")
    means = {k: e for (k, _), e in zip(m.named_parameters(), ema) if k.startswith(some)}
    return dict(expected=out, grads=grads, adamw3=after, ema3=means)


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--seed", type=int, default=0)
    ap.add_argument("--out", required=True)
    for name, default in dict(dim=96, depth=2, heads=4, patch=2, side=8, classes=10).items():
        ap.add_argument(f"--{name}", type=int, default=default)
    a = ap.parse_args()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    os.makedirs(a.out, exist_ok=True)
    g = torch.Generator().manual_seed(a.seed)
    rn = lambda *s: torch.randn(*s, generator=g)
    ri = lambda hi, *s: torch.randint(hi, s, generator=g)

    def save(name, tensors):
        path = f"{a.out}/{name}.safetensors"
        save_file({k: v.contiguous() for k, v in tensors.items()}, path)
        os.chmod(path, 0o644)

    def save_json(name, value):
        with open(f"{a.out}/{name}.json", "w") as f:
            json.dump(value, f, indent=1)
            f.write("\n")

    model = random_model(a, rn)
    save("weights", {k: v.detach().clone() for k, v in model.state_dict().items()})
    inputs, train = random_inputs(a, rn, ri)
    save("inputs", inputs)
    batches = {}
    for step, d in enumerate(train):
        labels = torch.where(d["drop"].bool(), torch.full_like(d["y"], a.classes), d["y"])
        batches |= {f"step{step}.{k}": v for k, v in dict(x0=d["x0"], noise=d["noise"], t=d["t"], y=labels).items()}
    save("batches", batches)
    save("sample-noise", dict(x_T=inputs["sample_xT"], noise=inputs["sample_noises"], y=inputs["sample_y"]))

    single, double = (compute(model, inputs, train, a.classes, d) for d in (torch.float32, torch.float64))
    noise = {}
    for group, tensors in single.items():
        save(group, {k: v.float() for k, v in tensors.items()})
        noise[group] = {}
        for k, v in tensors.items():
            exact = double[group][k]
            error = v.double() - exact
            noise[group][k] = dict(shape=list(v.shape), max_abs=float(exact.abs().max()), err_max=float(error.abs().max()),
                                   err_rel_l2=float(error.norm() / exact.norm().clamp(min=1e-300)))
    save_json("config", dict(model="dit", input_size=a.side, patch_size=a.patch, in_channels=4, hidden_size=a.dim,
                             depth=a.depth, num_heads=a.heads, mlp_ratio=4.0, num_classes=a.classes, learn_sigma=True))
    save_json("manifest", dict(
        seed=a.seed, torch=torch.__version__,
        train=dict(optimizer="AdamW", lr=LR, betas=[0.9, 0.999], eps=1e-8, weight_decay=0.0, steps=TRAIN_STEPS,
                   ema_decay=EMA_DECAY, loss="mean over the batch of mse + vb (vb in bits/dim, mean detached, unscaled)"),
        sampling=dict(steps_10=Diffusion("10").steps, steps_ddim10=Diffusion("ddim10").steps, cfg_scale=GUIDANCE,
                      clip_denoised=False,
                      note="trajectory[k] is x after the k-th executed step (noisiest first); sample_noises[k] is used at "
                           "that step; the last step adds no noise; cfg3 guides channels 0..2 of epsilon, cfg4 all four"),
        float32_noise_vs_float64=noise))
    print(a.out, sum(os.path.getsize(f"{a.out}/{f}") for f in os.listdir(a.out)) / 1e6, "MB")


if __name__ == "__main__":
    main()
