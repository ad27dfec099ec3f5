"""The peers' side of the speed comparison: one process, one piece of work, timed on request; started by speed.py.

    python speed_torch.py MODE train|forward|sample|guided|unguided|update|copy MODEL BATCH|STEPS THREADS [--export DIR]
        [--device cuda --dtype bfloat16]
    python speed_torch.py numpy|mkl|onednn product FORM:ROWSxINPUTSxOUTPUTS "" THREADS

MODEL is a preset as mudit names them (DiT-S/2 …) or quickstart. MODE is eager, compile, graphs (torch.compile that records
CUDA graphs), tuned (torch.compile that tries out kernels, and records) or onnxruntime (torch's own dynamo export of the
forward pass, made once below --export). On a GPU training autocasts, and sampling holds its weights in the type. Sets up, runs
once, prints a line that says so, then for each line of standard input (a number of runs) answers with their milliseconds.
`sample` is diffusers' DiTTransformer2DModel in the loop of its DiTPipeline without the VAE; `guided` and `unguided` are ten
steps of DDPM; `update` is clip, fused AdamW and average alone; `copy` copies the parameters.
"""
import json
import os
import sys
import time

import torch

from dit_torch import DiT, Diffusion, preset

GUIDANCE, GUIDED = 4.0, 3
STEPS = 10
DEVICE, DTYPE = "cpu", torch.float32  # --device, --dtype
FASTEST_COMPILE = {}  # options of torch.compile; see the results file for those that were tried
COMPILE = {"compile": FASTEST_COMPILE, "graphs": dict(mode="reduce-overhead"), "tuned": dict(mode="max-autotune")}


def build(name):
    with torch.device(DEVICE):
        if name == "quickstart":
            return DiT(28, 4, 1, 96, 6, 4, num_classes=10, learn_sigma=False)
        return DiT(**preset(name))


def trained(model):
    """Parameters of the size that trained ones have, instead of the zeros of the first step."""
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.02)
    return model.to(DTYPE).eval()


def compiled(mode, model):
    return torch.compile(model, **COMPILE[mode]) if mode in COMPILE else model


def fixed(mode, model):
    """The model for inference, and the context that it runs in."""
    if mode not in COMPILE:
        return model, torch.inference_mode
    torch._inductor.config.freezing = True  # constant weights, packed once; wants plain no_grad tensors
    return compiled(mode, model), torch.no_grad


def finished():
    if DEVICE != "cpu":
        torch.cuda.synchronize()


def optimizer_of(model):
    """Clip, AdamW and average by PyTorch's fastest pieces, as one call."""
    params = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(params, lr=1e-4, weight_decay=0.0, fused=True)
    average = [p.detach().clone() for p in params]

    def update():
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        torch._foreach_lerp_(average, [p.data for p in params], 1e-4)

    return params, optimizer, update


def training(mode, name, batch):
    """A whole optimizer step."""
    model = build(name).train()
    flow = name == "quickstart"
    _, optimizer, update = optimizer_of(model)
    with torch.device(DEVICE):
        diffusion = None if flow else Diffusion()
        x0 = torch.randn(batch, model.channels, model.side * model.patch, model.side * model.patch)
        y = torch.arange(batch) % model.y_embedder.num_classes
    net = compiled(mode, model)

    def step():
        with torch.autocast(DEVICE, DTYPE, enabled=DTYPE != torch.float32):
            loss = losses()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        update()
        return loss.item()

    def losses():
        noise = torch.randn_like(x0)
        if flow:
            s = torch.sigmoid(torch.randn(batch, device=DEVICE))
            w = s.view(-1, 1, 1, 1)
            return (net((1 - w) * x0 + w * noise, 1000 * s, y) - (noise - x0)).square().mean()
        t = torch.randint(0, 1000, (batch,), device=DEVICE)
        xt = diffusion.q_sample(x0, t, noise)
        mse, vb = diffusion.loss_terms(net(xt, t, y), x0, xt, t, noise)
        return (mse + vb).mean()

    return step


def updating(name):
    params, _, update = optimizer_of(build(name).train())
    for p in params:
        p.grad = torch.full_like(p, 1e-3)
    return update


def copying(name):
    count = sum(p.numel() for p in build(name).parameters())
    source, target = torch.zeros(count, device=DEVICE), torch.zeros(count, device=DEVICE)
    return lambda: target.copy_(source)


def inputs(model, batch):
    torch.manual_seed(0)
    side = model.side * model.patch
    with torch.device(DEVICE):
        x = torch.randn(batch, model.channels, side, side, dtype=DTYPE)
        return x, torch.randint(0, 1000, (batch,)), torch.randint(0, model.y_embedder.num_classes, (batch,))


def forward(mode, name, batch, export):
    model = trained(build(name))
    io = inputs(model, batch)
    if mode == "onnxruntime":
        return exported(model, name, batch, export)
    net, context = fixed(mode, model)

    def run():
        with context():
            return net(*io)

    return run


def stepping(mode, name, batch, guided):
    """Ten steps of DDPM; with guidance the conditional and the null pass are one batch."""
    model = trained(build(name))
    side, null = model.side * model.patch, model.y_embedder.num_classes
    with torch.device(DEVICE):
        diffusion = Diffusion(str(STEPS))
        labels = torch.full((batch,), 7)
        both = torch.cat([labels, torch.full((batch,), null)])
    net, context = fixed(mode, model)

    def answer(x, t):
        if not guided:
            return net(x, t, labels)
        cond, free = net(torch.cat([x, x]), torch.cat([t, t]), both).chunk(2)
        return torch.cat([free[:, :GUIDED] + GUIDANCE * (cond[:, :GUIDED] - free[:, :GUIDED]), cond[:, GUIDED:]], 1)

    def run():
        with context():
            x = torch.randn(batch, model.channels, side, side, dtype=DTYPE, device=DEVICE)
            noises = torch.randn(STEPS, *x.shape, dtype=DTYPE, device=DEVICE)
            for x in diffusion.ddpm(answer, x, noises):
                pass
            return x

    return run


def exported(model, name, batch, folder):
    import onnxruntime
    path = os.path.join(folder, f"{name.replace('/', '-')}-{batch}.onnx")
    if not os.path.exists(path):
        os.makedirs(folder, exist_ok=True)
        torch.onnx.export(model, inputs(model, batch), dynamo=True, input_names=["x", "t", "y"], external_data=True,
                          verbose=False).save(path, external_data=True)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = torch.get_num_threads(), 1
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    feed = dict(zip(("x", "t", "y"), (v.numpy() for v in inputs(model, batch))))
    return lambda: session.run(None, feed)


def sampling(mode, name, steps):
    from diffusers import DDIMScheduler, DiTTransformer2DModel
    dit = preset(name)
    heads, classes, side, channels = dit["heads"], dit["num_classes"], dit["input_size"], dit["channels"]
    with torch.device(DEVICE):
        model = trained(DiTTransformer2DModel(
            num_attention_heads=heads, attention_head_dim=dit["dim"] // heads, in_channels=channels, out_channels=2 * channels,
            num_layers=dit["depth"], sample_size=side, patch_size=dit["patch"], num_embeds_ada_norm=classes,
            norm_type="ada_norm_zero"))
        scheduler = DDIMScheduler(num_train_timesteps=1000, beta_start=1e-4, beta_end=2e-2, beta_schedule="linear",
                                  clip_sample=False)
        labels = torch.tensor([7, classes])
    net, context = fixed(mode, model)

    def loop():
        with context():
            latents = torch.randn(1, channels, side, side, dtype=DTYPE, device=DEVICE)
            x = torch.cat([latents, latents])
            scheduler.set_timesteps(steps, device=DEVICE)
            for t in scheduler.timesteps:
                half = x[:1]
                x = scheduler.scale_model_input(torch.cat([half, half]), t)
                out = net(x, timestep=t.expand(2), class_labels=labels).sample
                cond, free = out[:, :channels].chunk(2)
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
    torch.backends.cudnn.allow_tf32 = False  # as products: f32 is f32
    torch.manual_seed(0)
    size = int(size or 0)
    work = {"train": lambda: training(mode, name, size), "forward": lambda: forward(mode, name, size, export),
            "sample": lambda: sampling(mode, name, size), "product": lambda: product(mode, name),
            "guided": lambda: stepping(mode, name, size, True), "unguided": lambda: stepping(mode, name, size, False),
            "update": lambda: updating(name), "copy": lambda: copying(name)}[kind]()
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
