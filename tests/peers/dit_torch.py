"""Reference DiT (Peebles & Xie 2022, arXiv:2212.09748) and its diffusion, in plain PyTorch.

Own code, written from the paper and from the behaviour of the official code; the fixtures and the other scripts of
this folder are made with it. Parameter names are those of the official checkpoints, so the same safetensors load in both.

Conventions that are easy to get wrong (all checked against the official code):
* latents are NCHW; token i = row * (W/p) + col.
* pos_embed: first half of the channels encodes the COLUMN (x), second half the ROW (y); in each half
  the sines come first, then the cosines; frequencies 10000^(-k/(D/4)), k = 0..D/4-1.
* timestep embedding: cosines first, then sines; frequencies 10000^(-k/128); t is the ORIGINAL step (0..999)
  also when the schedule is respaced.
* adaLN chunk order: shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp; final layer: shift, scale.
* the final linear's outputs are laid out (p_row, p_col, channel), channel fastest.
* the first C output channels are epsilon, the next C the variance interpolation value v in [-1, 1].
"""
import math
import re

import torch
import torch.nn as nn
import torch.nn.functional as F

def sincos_2d(dim, side, dtype=torch.float64):
    k = torch.arange(dim // 4, dtype=torch.float64)
    omega = torch.pow(10000.0, -k / (dim / 4))
    ar = torch.arange(side, dtype=torch.float64)
    col = ar.repeat(side)               # x varies fastest
    row = ar.repeat_interleave(side)
    parts = []
    for pos in (col, row):
        a = pos[:, None] * omega[None, :]
        parts += [a.sin(), a.cos()]
    return torch.cat(parts, 1).to(dtype)


class TimestepEmbedder(nn.Module):
    def __init__(self, dim, freq_dim=256):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(freq_dim, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.freq_dim = freq_dim

    def forward(self, t):
        w = self.mlp[0].weight
        half = self.freq_dim // 2
        k = torch.arange(half, dtype=w.dtype, device=t.device)
        a = t.to(w.dtype)[:, None] * torch.exp(k * (-math.log(10000.0) / half))[None]
        return self.mlp(torch.cat([a.cos(), a.sin()], -1))


class LabelEmbedder(nn.Module):
    """Row num_classes of the table is the null class, used for classifier-free guidance."""

    def __init__(self, num_classes, dim, drop):
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + int(drop > 0), dim)
        self.num_classes, self.drop = num_classes, drop

    def forward(self, y, drop_mask=None):
        if drop_mask is None and self.training and self.drop > 0:
            drop_mask = torch.rand(y.shape, device=y.device) < self.drop
        if drop_mask is not None:
            y = torch.where(drop_mask.bool(), torch.full_like(y, self.num_classes), y)
        return self.embedding_table(y)


class Attention(nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.heads = heads

    def forward(self, x):
        n, t, d = x.shape
        q, k, v = self.qkv(x).view(n, t, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        o = F.scaled_dot_product_attention(q, k, v)
        return self.proj(o.transpose(1, 2).reshape(n, t, d))


class Mlp(nn.Module):
    def __init__(self, dim, hidden):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


def _ada(x, shift, scale):
    """LayerNorm without affine parameters, then the conditioned affine map."""
    return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale[:, None]) + shift[:, None]


class Block(nn.Module):
    def __init__(self, dim, heads, ratio):
        super().__init__()
        self.attn = Attention(dim, heads)
        self.mlp = Mlp(dim, int(dim * ratio))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))

    def forward(self, x, c):
        sa, ca, ga, sm, cm, gm = self.adaLN_modulation(c).chunk(6, 1)
        x = x + ga[:, None] * self.attn(_ada(x, sa, ca))
        return x + gm[:, None] * self.mlp(_ada(x, sm, cm))


class FinalLayer(nn.Module):
    def __init__(self, dim, out):
        super().__init__()
        self.linear = nn.Linear(dim, out)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 2 * dim))

    def forward(self, x, c):
        s, k = self.adaLN_modulation(c).chunk(2, 1)
        return self.linear(_ada(x, s, k))


class PatchEmbed(nn.Module):
    def __init__(self, patch, channels, dim):
        super().__init__()
        self.proj = nn.Conv2d(channels, dim, patch, patch)

    def forward(self, x):
        return self.proj(x).flatten(2).transpose(1, 2)


class DiT(nn.Module):
    def __init__(self, input_size=32, patch=2, channels=4, dim=1152, depth=28, heads=16, mlp_ratio=4.0,
                 class_dropout=0.1, num_classes=1000, learn_sigma=True):
        super().__init__()
        self.patch, self.channels, self.dim, self.depth, self.heads = patch, channels, dim, depth, heads
        self.out_channels = channels * (2 if learn_sigma else 1)
        self.side = input_size // patch
        self.x_embedder = PatchEmbed(patch, channels, dim)
        self.t_embedder = TimestepEmbedder(dim)
        self.y_embedder = LabelEmbedder(num_classes, dim, class_dropout)
        self.pos_embed = nn.Parameter(sincos_2d(dim, self.side)[None].float(), requires_grad=False)
        self.blocks = nn.ModuleList(Block(dim, heads, mlp_ratio) for _ in range(depth))
        self.final_layer = FinalLayer(dim, patch * patch * self.out_channels)
        self.init_weights()

    def init_weights(self):
        """Paper / official initialisation: Xavier linears, adaLN-Zero, zero output layer."""
        for m in self.modules():
            if isinstance(m, nn.Linear):
                nn.init.xavier_uniform_(m.weight)
                nn.init.zeros_(m.bias)
        nn.init.xavier_uniform_(self.x_embedder.proj.weight.data.flatten(1))
        nn.init.zeros_(self.x_embedder.proj.bias)
        for w in (self.y_embedder.embedding_table.weight, self.t_embedder.mlp[0].weight, self.t_embedder.mlp[2].weight):
            nn.init.normal_(w, std=0.02)
        for m in [b.adaLN_modulation[1] for b in self.blocks] + [self.final_layer.adaLN_modulation[1], self.final_layer.linear]:
            nn.init.zeros_(m.weight)
            nn.init.zeros_(m.bias)

    def forward(self, x, t, y, drop_mask=None):
        c = self.t_embedder(t) + self.y_embedder(y, drop_mask)
        h = self.x_embedder(x) + self.pos_embed
        for b in self.blocks:
            h = b(h, c)
        h = self.final_layer(h, c)
        n, s, p, o = h.shape[0], self.side, self.patch, self.out_channels
        return h.view(n, s, s, p, p, o).permute(0, 5, 1, 3, 2, 4).reshape(n, o, s * p, s * p)

    def forward_cfg(self, x, t, y, null_y, scale, guided_channels=3):
        """x, t, y: the N wanted samples. The conditional and the null pass run as one batch of 2N.
        The official code guides only the first 3 channels (guided_channels=3) of epsilon; the others, and the
        variance, are those of the conditional pass. guided_channels=channels guides all of epsilon."""
        out = self.forward(torch.cat([x, x]), torch.cat([t, t]), torch.cat([y, torch.full_like(y, null_y)]))
        cond, null = out.chunk(2)
        g = guided_channels
        return torch.cat([null[:, :g] + scale * (cond[:, :g] - null[:, :g]), cond[:, g:]], 1)


SIZES = {"DiT-S": (12, 384, 6), "DiT-B": (12, 768, 12), "DiT-L": (24, 1024, 16), "DiT-XL": (28, 1152, 16)}


def preset(text):
    """DiT's arguments for `DiT-S/2`, or `DiT-S/2@8x8x4:10` for other latents and classes, as mudit names them."""
    _, size, patch, side, channels, classes = re.fullmatch(
        r"((\S+)/(\d+))(?:@(\d+)x\d+(?:x(\d+))?)?(?::(\d+))?", text).groups()
    depth, dim, heads = SIZES[size]
    return dict(input_size=int(side or 32), patch=int(patch), channels=int(channels or 4), dim=dim, depth=depth, heads=heads,
                num_classes=int(classes or 1000))


# ----------------------------------------------------------------------------------------------- diffusion

def space_timesteps(total, spec):
    """'10': N steps spread so that the first is 0 and the last total-1 (fractional stride, Python's round, i.e.
    half to even); 'ddim10': range(0, total, s) for the integer s that gives exactly N."""
    if isinstance(spec, str) and spec.startswith("ddim"):
        n = int(spec[4:])
        return next(list(range(0, total, s)) for s in range(1, total) if len(range(0, total, s)) == n)
    n = int(spec)
    stride = (total - 1) / (n - 1) if n > 1 else 1
    out, cur = [], 0.0
    for _ in range(n):
        out.append(round(cur))
        cur += stride
    return out


class Diffusion:
    """Linear betas 1e-4..2e-2 over 1000 steps, epsilon prediction, learned-range variance. Tables are float64;
    each is cast to the dtype of the data when used (float32 in the official code)."""

    def __init__(self, spec=None, total=1000):
        beta = torch.linspace(1e-4 * 1000 / total, 2e-2 * 1000 / total, total, dtype=torch.float64)
        abar = torch.cumprod(1 - beta, 0)
        self.steps = list(range(total)) if spec is None else space_timesteps(total, spec)
        if spec is not None:
            abar = abar[self.steps]
            prev = torch.cat([torch.ones(1, dtype=torch.float64), abar[:-1]])
            beta = 1 - abar / prev
            abar = torch.cumprod(1 - beta, 0)
        self.n = len(self.steps)
        prev = torch.cat([torch.ones(1, dtype=torch.float64), abar[:-1]])
        pv = beta * (1 - prev) / (1 - abar)
        self.tab = dict(
            beta=beta, abar=abar, abar_prev=prev,
            sqrt_abar=abar.sqrt(), sqrt_1m_abar=(1 - abar).sqrt(),
            recip=(1 / abar).sqrt(), recipm1=(1 / abar - 1).sqrt(),
            coef1=beta * prev.sqrt() / (1 - abar), coef2=(1 - prev) * (1 - beta).sqrt() / (1 - abar),
            min_log=torch.cat([pv[1:2], pv[1:]]).log(), max_log=beta.log())

    def get(self, name, i, like):
        return self.tab[name][i].to(like.dtype).view(-1, *[1] * (like.dim() - 1))

    def q_sample(self, x0, i, noise):
        return self.get("sqrt_abar", i, x0) * x0 + self.get("sqrt_1m_abar", i, x0) * noise

    def posterior(self, out, x, i):
        """Model output (2C channels) -> (x0 prediction, mean, log variance) of p(x_{i-1} | x_i). No clipping."""
        eps, v = out.chunk(2, 1)
        x0 = self.get("recip", i, x) * x - self.get("recipm1", i, x) * eps
        mean = self.get("coef1", i, x) * x0 + self.get("coef2", i, x) * x
        frac = (v + 1) / 2
        return x0, mean, frac * self.get("max_log", i, x) + (1 - frac) * self.get("min_log", i, x)

    def loss_terms(self, out, x0, xt, i, noise):
        """Per-sample mse and vb, each of shape [N]. The training loss is (mse + vb).mean(); vb is in bits per
        dimension, its gradient reaches only the variance channels, and it is NOT scaled (the T/1000 factor belongs
        to another loss type, and is 1 at T=1000 anyway)."""
        c = x0.shape[1]
        eps = out[:, :c]
        mse = ((noise - eps) ** 2).flatten(1).mean(1)
        _, mean, logv = self.posterior(torch.cat([eps.detach(), out[:, c:]], 1), xt, i)
        tmean = self.get("coef1", i, x0) * x0 + self.get("coef2", i, x0) * xt
        tlogv = self.get("min_log", i, x0)
        kl = 0.5 * (-1 + logv - tlogv + (tlogv - logv).exp() + (tmean - mean) ** 2 * (-logv).exp())
        nll = -self._disc_loglik(x0, mean, 0.5 * logv)
        ln2 = math.log(2.0)
        vb = torch.where(i == 0, nll.flatten(1).mean(1) / ln2, kl.flatten(1).mean(1) / ln2)
        return mse, vb

    @staticmethod
    def _disc_loglik(x, mean, log_scale):
        """Log-likelihood of a Gaussian integrated over bins of width 2/255, tanh approximation of the normal cdf."""
        def cdf(z):
            return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z ** 3)))
        inv = (-log_scale).exp()
        up, lo = cdf(inv * (x - mean + 1 / 255)), cdf(inv * (x - mean - 1 / 255))
        lg = lambda p: p.clamp(min=1e-12).log()
        return torch.where(x < -0.999, lg(up), torch.where(x > 0.999, lg(1 - lo), lg(up - lo)))

    @torch.no_grad()
    def ddpm(self, fn, x, noises):
        """noises[k] is used at the k-th executed step (from the noisiest); the last step adds none. Yields each x."""
        for k, j in enumerate(reversed(range(self.n))):
            i = torch.full((x.shape[0],), j, dtype=torch.long, device=x.device)
            t = torch.full((x.shape[0],), self.steps[j], dtype=torch.long, device=x.device)
            _, mean, logv = self.posterior(fn(x, t), x, i)
            x = mean + ((0.5 * logv).exp() * noises[k] if j else 0)
            yield x

    @torch.no_grad()
    def ddim(self, fn, x, eta=0.0, noises=None):
        for k, j in enumerate(reversed(range(self.n))):
            i = torch.full((x.shape[0],), j, dtype=torch.long, device=x.device)
            t = torch.full((x.shape[0],), self.steps[j], dtype=torch.long, device=x.device)
            x0, _, _ = self.posterior(fn(x, t), x, i)
            eps = (self.get("recip", i, x) * x - x0) / self.get("recipm1", i, x)
            a, ap = self.get("abar", i, x), self.get("abar_prev", i, x)
            sigma = eta * ((1 - ap) / (1 - a)).sqrt() * (1 - a / ap).sqrt()
            x = x0 * ap.sqrt() + (1 - ap - sigma ** 2).sqrt() * eps
            if eta and j:
                x = x + sigma * noises[k]
            yield x


@torch.no_grad()
def ema_update(ema, model, decay):
    for e, p in zip(ema, model.parameters()):
        e.mul_(decay).add_(p, alpha=1 - decay)
