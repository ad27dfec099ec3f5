"""The peers' side of the speed comparison: one process, one piece of work, timed on request; started by speed.py.

    python speed_torch.py eager|compile|onnxruntime train|forward|sample MODEL BATCH|STEPS THREADS [--export DIR]
        [--device cuda --dtype bfloat16]
    python speed_torch.py numpy|mkl|onednn product FORM:ROWSxINPUTSxOUTPUTS "" THREADS

MODEL is DiT-S/2, DiT-B/2, DiT-L/2, DiT-XL/2 or quickstart. On a GPU training autocasts, and sampling holds its weights in the type. Sets up, runs once, prints a line that says so, then for each line of standard
input (a number of runs) answers with their milliseconds. `sample` is diffusers' DiTTransformer2DModel in the loop of its
DiTPipeline without the VAE. `onnxruntime` runs torch's own dynamo export of the forward pass, made once below --export.
"""
import json
import os
import sys
import time

import torch

from dit_torch import DiT, Diffusion

SIZES = {"DiT-S/2": (12, 384, 6), "DiT-B/2": (12, 768, 12), "DiT-L/2": (24, 1024, 16), "DiT-XL/2": (28, 1152, 16)}
GUIDANCE = 4.0
DEVICE, DTYPE = "cpu", torch.float32  # --device, --dtype
FASTEST_COMPILE = {}  # options of torch.compile; see the results file for those that were tried


def build(name):
    if name == "quickstart":
        return DiT(28, 4, 1, 96, 6, 4, num_classes=10, learn_sigma=False)
    depth, width, heads = SIZES[name]
    return DiT(dim=width, depth=depth, heads=heads)


def trained(model):
    """Parameters of the size that trained ones have, instead of the zeros of the first step."""
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.02)
    return model.to(DTYPE).eval()


def finished():
    if DEVICE != "cpu":
        torch.cuda.synchronize()


def training(mode, name, batch):
    """A whole optimizer step with PyTorch's fastest pieces: fused AdamW, foreach clip and average."""
    model = build(name).train()
    flow = name == "quickstart"
    params = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(params, lr=1e-4, weight_decay=0.0, fused=True)
    average = [p.detach().clone() for p in params]
    diffusion = None if flow else Diffusion()
    side, channels = (28, 1) if flow else (32, 4)
    x0, y = torch.randn(batch, channels, side, side), torch.arange(batch) % (10 if flow else 1000)
    net = torch.compile(model, **FASTEST_COMPILE) if mode == "compile" else model

    def step():
        with torch.autocast(DEVICE, DTYPE, enabled=DTYPE != torch.float32):
            loss = losses()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        torch._foreach_lerp_(average, [p.data for p in params], 1e-4)
        return loss.item()

    def losses():
        noise = torch.randn_like(x0)
        if flow:
            s = torch.sigmoid(torch.randn(batch))
            w = s.view(-1, 1, 1, 1)
            return (net((1 - w) * x0 + w * noise, 1000 * s, y) - (noise - x0)).square().mean()
        else:
            t = torch.randint(0, 1000, (batch,))
            xt = diffusion.q_sample(x0, t, noise)
            mse, vb = diffusion.loss_terms(net(xt, t, y), x0, xt, t, noise)
            return (mse + vb).mean()

    return step


def inputs(batch):
    torch.manual_seed(0)
    return torch.randn(batch, 4, 32, 32, dtype=DTYPE), torch.randint(0, 1000, (batch,)), torch.randint(0, 1000, (batch,))


def forward(mode, name, batch, export):
    model, io = trained(build(name)), inputs(batch)
    if mode == "onnxruntime":
        return exported(model, name, batch, export)
    if mode == "compile":
        torch._inductor.config.freezing = True  # constant weights, packed once
        net = torch.compile(model, **FASTEST_COMPILE)
    else:
        net = model

    def run():
        with torch.inference_mode():
            return net(*io)

    if mode == "compile":  # freezing wants plain no_grad tensors
        def run():
            with torch.no_grad():
                return net(*io)
    return run


def exported(model, name, batch, folder):
    import onnxruntime
    path = os.path.join(folder, f"{name.replace('/', '-')}-{batch}.onnx")
    if not os.path.exists(path):
        os.makedirs(folder, exist_ok=True)
        torch.onnx.export(model, inputs(batch), dynamo=True, input_names=["x", "t", "y"], external_data=True,
                          verbose=False).save(path, external_data=True)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = torch.get_num_threads(), 1
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    feed = dict(zip(("x", "t", "y"), (v.numpy() for v in inputs(batch))))
    return lambda: session.run(None, feed)


def sampling(mode, name, steps):
    from diffusers import DDIMScheduler, DiTTransformer2DModel
    depth, width, heads = SIZES[name]
    model = trained(DiTTransformer2DModel(
        num_attention_heads=heads, attention_head_dim=width // heads, in_channels=4, out_channels=8, num_layers=depth,
        sample_size=32, patch_size=2, num_embeds_ada_norm=1000, norm_type="ada_norm_zero"))
    scheduler = DDIMScheduler(num_train_timesteps=1000, beta_start=1e-4, beta_end=2e-2, beta_schedule="linear",
                              clip_sample=False)
    labels = torch.tensor([7, 1000])
    if mode == "compile":
        torch._inductor.config.freezing = True
        net = torch.compile(model, **FASTEST_COMPILE)
    else:
        net = model

    def loop():
        with torch.no_grad() if mode == "compile" else torch.inference_mode():
            latents = torch.randn(1, 4, 32, 32, dtype=DTYPE)
            x = torch.cat([latents, latents])
            scheduler.set_timesteps(steps)
            for t in scheduler.timesteps:
                half = x[:1]
                x = scheduler.scale_model_input(torch.cat([half, half]), t)
                out = net(x, timestep=t.expand(2), class_labels=labels).sample
                eps, _ = out[:, :4], out[:, 4:]
                cond, free = eps.chunk(2)
                eps = free + GUIDANCE * (cond - free)
                x = scheduler.step(torch.cat([eps, eps]), t, x).prev_sample
            return x[:1]

    return loop


def product(mode, what):
    """One product of a linear layer: y = x Wᵀ, dx = ct W or dW = ctᵀ x."""
    form, sizes = what.split(":")
    rows, inputs, outputs = map(int, sizes.split("x"))
    x, weight, ct = torch.randn(rows, inputs), torch.randn(outputs, inputs), torch.randn(rows, outputs)
    left, right = {"forward": (x, weight.t()), "grad-input": (ct, weight), "grad-weight": (ct.t(), x)}[form]
    if mode == "numpy":
        left, right = left.numpy(), right.numpy()
        return lambda: left @ right
    if mode == "onednn":
        packed = torch.ops.mkldnn._reorder_linear_weight(weight, rows)
        return lambda: torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], "")
    return lambda: left @ right


def main():
    global DEVICE, DTYPE
    mode, kind, name, size, threads = sys.argv[1:6]
    options = dict(zip(sys.argv[6::2], sys.argv[7::2]))
    export, DEVICE = options.get("--export", "."), options.get("--device", "cpu")
    DTYPE = getattr(torch, options.get("--dtype", "float32"))
    torch.set_num_threads(int(threads))
    torch.set_default_device(DEVICE)
    torch.manual_seed(0)
    size = int(size or 0)
    work = {"train": lambda: training(mode, name, size), "forward": lambda: forward(mode, name, size, export),
            "sample": lambda: sampling(mode, name, size), "product": lambda: product(mode, name)}[kind]()
    start = time.perf_counter()
    with torch.inference_mode(kind == "product"):
        work()
        finished()
    first = time.perf_counter() - start
    version = f"torch {torch.__version__}"
    if mode == "onnxruntime":
        import onnxruntime
        version = f"onnxruntime {onnxruntime.__version__} on an export of {version}"
    if mode == "numpy":
        import numpy
        version = f"numpy {numpy.__version__}"
    if kind == "sample":
        import diffusers
        version = f"diffusers {diffusers.__version__}, {version}"
    print(json.dumps(dict(ready=True, first_run_s=first, version=version)), flush=True)
    for line in sys.stdin:
        milliseconds = []
        for _ in range(int(line)):
            start = time.perf_counter()
            work()
            finished()
            milliseconds.append((time.perf_counter() - start) * 1e3)
        print(json.dumps(dict(ms=milliseconds)), flush=True)


if __name__ == "__main__":
    main()
