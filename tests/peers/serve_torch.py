"""The usual way to put a model behind HTTP: FastAPI around a PyTorch sampling loop, one request at a time.

It takes the same requests as `mudit serve` (class_label, seed, steps, guidance_scale, n; Euler on a flow model) and loads
the same checkpoint, so that `mudit bench-serve` can put the same load on both.

    python serve_torch.py CHECKPOINT PORT        # needs torch, safetensors, pillow, fastapi, uvicorn
"""
import base64
import io
import json
import sys
import threading
import time
from pathlib import Path

import torch
import uvicorn
from fastapi import FastAPI, Response
from PIL import Image
from pydantic import BaseModel
from safetensors.torch import load_file

from dit_torch import DiT

checkpoint, port = Path(sys.argv[1]), int(sys.argv[2])
cfg = json.loads((checkpoint / "config.json").read_text())
mup = cfg.get("mup") or {}
assert cfg["objective"] == "flow" and mup.get("base_width", cfg["hidden_size"]) == cfg["hidden_size"]
assert mup.get("output_multiplier", 1.0) == 1.0
model = DiT(cfg["input_size"], cfg["patch_size"], cfg["in_channels"], cfg["hidden_size"], cfg["depth"], cfg["num_heads"],
            cfg["mlp_ratio"], cfg.get("class_dropout_prob", 0.1), cfg["num_classes"], cfg["learn_sigma"])
weights = checkpoint / "ema.safetensors"
model.load_state_dict(load_file(weights if weights.exists() else checkpoint / "model.safetensors"))
model.eval()
shape = (cfg["in_channels"], cfg["input_size"], cfg["input_size"])
app, turn = FastAPI(), threading.Lock()


class Request(BaseModel):
    class_label: int
    seed: int = 0
    steps: int = 50
    guidance_scale: float = 1.5
    n: int = 1


@torch.inference_mode()
def sample(r):
    x = torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(r.seed + i)) for i in range(r.n)])
    y = torch.full((r.n,), r.class_label)
    null = torch.full((r.n,), cfg["num_classes"])
    times = torch.linspace(1, 0, r.steps + 1)
    for s, after in zip(times[:-1], times[1:]):
        t = torch.full((r.n,), 1000 * float(s))
        if r.guidance_scale == 1:
            v = model(x, t, y)
        else:
            v, u = model(torch.cat([x, x]), torch.cat([t, t]), torch.cat([y, null])).chunk(2)
            v = u + r.guidance_scale * (v - u)
        x = x + (after - s) * v
    return (127.5 * x + 128).clamp(0, 255).byte()


@app.post("/v1/images/generations")
def generate(r: Request):
    with turn:
        images = sample(r)
    data = []
    for i, image in enumerate(images):
        out = io.BytesIO()
        Image.fromarray(image[0].numpy() if shape[0] == 1 else image.permute(1, 2, 0).numpy()).save(out, "PNG")
        data.append({"b64_json": base64.b64encode(out.getvalue()).decode(), "seed": r.seed + i})
    return {"created": int(time.time()), "data": data}


@app.get("/metrics")
def metrics():
    return Response("", media_type="text/plain")


uvicorn.run(app, host="127.0.0.1", port=port, log_level="error")
