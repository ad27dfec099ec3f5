//! The diffusion transformer with adaLN-Zero blocks.
//!
//! # Source
//! Peebles & Xie, *Scalable Diffusion Models with Transformers*, section 3.2 and figure 3; parameter names are
//! those of the published checkpoints.

use std::sync::Arc;

use graph_builder::{Dim, Init, PatchOrder, Scope, Value};

use crate::config::DitConfig;
use crate::layers::{
    Inits, attention, label_embed, mlp, modulate, modulation, patch_embed, sin_cos_positions, timestep_embed,
};

/// Scope of the stack of blocks: the first is `blocks.0`.
pub(crate) const BLOCKS: &str = "blocks";

/// The model's answer (N, Cout, H, W) for `x` (N, C, H, W), `t` (N) f32 and `y` (N) i64.
///
/// The first C channels are ε or the velocity, the next C the variance logits of a model that learns them.
/// `output_multiplier` is muP's α, a scalar; the output weight is scaled by α·base_width/width.
pub fn dit<'g>(
    s: &Scope<'g>,
    x: Value<'g>,
    t: Value<'g>,
    y: Value<'g>,
    output_multiplier: Value<'g>,
    cfg: &DitConfig,
) -> Value<'g> {
    let (h, t) = embed(s, x, t, cfg); // (N, T, D) and (N, D)
    let c = t + label(s, y, cfg); // (N, D)
    answer(s, h, c, output_multiplier, cfg) // (N, Cout, H, W)
}

/// The model's answers (N, Cout, H, W) with the label and without it, from one run of 2N samples.
///
/// Both see the same image at the same time, which are embedded once.
pub(crate) fn dit_with_and_without_label<'g>(
    s: &Scope<'g>,
    x: Value<'g>,
    t: Value<'g>,
    [y, null]: [Value<'g>; 2],
    output_multiplier: Value<'g>,
    cfg: &DitConfig,
) -> [Value<'g>; 2] {
    let (h, t) = embed(s, x, t, cfg); // (N, T, D) and (N, D)
    let h = h.concat(&[h], 0); // (2N, T, D)
    let c = (t + label(s, y, cfg)).concat(&[t + label(s, null, cfg)], 0); // (2N, D)
    answer(s, h, c, output_multiplier, cfg).chunk(0) // 2 × (N, Cout, H, W)
}

/// Tokens of the image at their places, and the embedded time.
fn embed<'g>(s: &Scope<'g>, x: Value<'g>, t: Value<'g>, cfg: &DitConfig) -> (Value<'g>, Value<'g>) {
    let (d, inits) = (cfg.hidden_size, Inits(cfg.init));
    let positions = pos_embed(s, cfg); // (1, T, D)
    let h = s.within("x_embedder", |s| patch_embed(s, x, cfg.patch_size, d, inits)) + positions; // (N, T, D)
    let t = s.within("t_embedder", |s| timestep_embed(s, t, d, inits)); // (N, D)
    (h, t)
}

fn label<'g>(s: &Scope<'g>, y: Value<'g>, cfg: &DitConfig) -> Value<'g> {
    s.within("y_embedder", |s| label_embed(s, y, cfg.label_rows(), cfg.hidden_size, Inits(cfg.init))) // (N, D)
}

/// Blocks and final layer on tokens `h` (N, T, D) under the condition `c` (N, D).
fn answer<'g>(
    s: &Scope<'g>,
    mut h: Value<'g>,
    c: Value<'g>,
    output_multiplier: Value<'g>,
    cfg: &DitConfig,
) -> Value<'g> {
    let c = c.silu(); // (N, D), before the linear layer of every modulation
    for i in 0..cfg.depth {
        h = s.within(format!("{BLOCKS}.{i}"), |s| block(s, h, c, cfg)); // (N, T, D)
    }
    let h = s.within("final_layer", |s| final_layer(s, h, c, output_multiplier, cfg)); // (N, T, P·P·Cout)
    h.unpatchify(cfg.patch_size, PatchOrder::ChannelsLast, cfg.input_size, cfg.input_size) // (N, Cout, H, W)
}

fn pos_embed<'g>(s: &Scope<'g>, cfg: &DitConfig) -> Value<'g> {
    let table: Arc<[f32]> = sin_cos_positions(cfg.hidden_size, cfg.input_size / cfg.patch_size).into();
    let dims = [Dim::Fixed(1), Dim::Fixed(cfg.tokens()), Dim::Width(cfg.hidden_size)];
    s.frozen("pos_embed", &dims, Init::Values(table))
}

fn block<'g>(s: &Scope<'g>, x: Value<'g>, c: Value<'g>, cfg: &DitConfig) -> Value<'g> {
    let inits = Inits(cfg.init);
    let [shift_a, scale_a, gate_a, shift_m, scale_m, gate_m] = modulation(s, c, inits); // 6 × (N, 1, D)
    let h = modulate(x, shift_a, scale_a); // (N, T, D)
    let x = x.gate_residual(gate_a, s.within("attn", |s| attention(s, h, cfg.num_heads, inits))); // (N, T, D)
    let h = modulate(x, shift_m, scale_m); // (N, T, D)
    x.gate_residual(gate_m, s.within("mlp", |s| mlp(s, h, cfg.mlp_hidden(), inits))) // (N, T, D)
}

fn final_layer<'g>(
    s: &Scope<'g>,
    x: Value<'g>,
    c: Value<'g>,
    output_multiplier: Value<'g>,
    cfg: &DitConfig,
) -> Value<'g> {
    let (d, features) = (cfg.hidden_size, cfg.patch_size * cfg.patch_size * cfg.out_channels());
    let [shift, scale] = modulation(s, c, Inits(cfg.init)); // 2 × (N, 1, D)
    let h = modulate(x, shift, scale); // (N, T, D)
    s.within("linear", |s| {
        let weight = s.param("weight", &[Dim::Fixed(features), Dim::Width(d)], Init::Zeros);
        let bias = s.param("bias", &[Dim::Fixed(features)], Init::Zeros);
        let weight = weight * (output_multiplier * (1.0 / cfg.width_multiplier())); // (P·P·Cout, D)
        h.linear(weight, bias) // (N, T, P·P·Cout)
    })
}
