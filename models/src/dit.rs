//! The diffusion transformer with adaLN-Zero blocks.
//!
//! # Source
//! Peebles & Xie, *Scalable Diffusion Models with Transformers*, section 3.2, figure 3, table 1; keys are the official
//! constructor's, parameter names those of the published checkpoints.

use std::sync::Arc;

use graph_builder::{Dim, Init, PatchOrder, Scope, Value};
use serde_json::{Map, Value as Json};

use crate::condition::{Classes, Condition, Conditioning};
use crate::error::ModelError;
use crate::fields::{Amounts, Fields, check, check_mlp_ratio, check_sizes, mlp_hidden};
use crate::layers::{
    Inits, attention, label_embed, mlp, modulate, modulation, output_linear, patch_embed, sin_cos_positions,
    timestep_embed,
};
use crate::network::{Denoiser, Latent, Network, Parameterised};
use crate::objective::Objective;

/// A class-conditional diffusion transformer.
#[derive(Debug, Clone, PartialEq)]
pub struct Dit {
    /// The side of the square latent, in latent pixels.
    pub input_size: usize,
    /// The side of a patch, in latent pixels.
    pub patch_size: usize,
    /// The channels of the latent.
    pub in_channels: usize,
    /// The width `D`.
    pub hidden_size: usize,
    /// The number of blocks.
    pub depth: usize,
    /// The number of attention heads.
    pub num_heads: usize,
    /// The hidden width of the MLP over `hidden_size`.
    pub mlp_ratio: f64,
    /// The probability with which training replaces a label by the null class; at 0 there is no null class.
    pub class_dropout_prob: f64,
    /// The number of classes, without the null class.
    pub num_classes: usize,
    /// Whether the model also predicts the variance, in as many channels again.
    pub learn_sigma: bool,
}

impl Dit {
    pub(crate) const NAME: &str = "dit";
    pub(crate) const REQUIRED: &[&str] =
        &["input_size", "patch_size", "in_channels", "hidden_size", "depth", "num_heads", "num_classes"];
    pub(crate) const OPTIONAL: &[&str] = &["mlp_ratio", "class_dropout_prob", "learn_sigma"];
    pub(crate) const PRESETS: &[&str] = &[
        "DiT-S/2", "DiT-S/4", "DiT-S/8", "DiT-B/2", "DiT-B/4", "DiT-B/8", "DiT-L/2", "DiT-L/4", "DiT-L/8",
        "DiT-XL/2", "DiT-XL/4", "DiT-XL/8",
    ];

    /// `mlp_ratio` is 4, `class_dropout_prob` 0.1 and `learn_sigma` true for `ddpm` and false for `flow` where they are left
    /// out.
    pub(crate) fn read(fields: &Fields<'_>, objective: Objective) -> Result<Self, ModelError> {
        Ok(Self {
            input_size: fields.size("input_size")?,
            patch_size: fields.size("patch_size")?,
            in_channels: fields.size("in_channels")?,
            hidden_size: fields.size("hidden_size")?,
            depth: fields.size("depth")?,
            num_heads: fields.size("num_heads")?,
            mlp_ratio: fields.number("mlp_ratio")?.unwrap_or(4.0),
            class_dropout_prob: fields.number("class_dropout_prob")?.unwrap_or(0.1),
            num_classes: fields.size("num_classes")?,
            learn_sigma: fields.truth("learn_sigma")?.unwrap_or(objective == Objective::Ddpm),
        })
    }

    /// The published sizes, for 32 × 32 × 4 latents and 1000 classes.
    pub(crate) fn preset(name: &str) -> Option<Self> {
        let (size, patch) = name.strip_prefix("DiT-")?.split_once('/')?;
        let (depth, hidden_size, num_heads) = match size {
            "S" => (12, 384, 6),
            "B" => (12, 768, 12),
            "L" => (24, 1024, 16),
            "XL" => (28, 1152, 16),
            _ => return None,
        };
        Some(Self {
            input_size: 32,
            patch_size: patch.parse().ok()?,
            in_channels: 4,
            hidden_size,
            depth,
            num_heads,
            mlp_ratio: 4.0,
            class_dropout_prob: 0.1,
            num_classes: 1000,
            learn_sigma: true,
        })
    }

    /// The keys that images of a size and their classes fix.
    pub(crate) fn fixed_by_data(latent: Latent, classes: usize) -> Result<Map<String, Json>, ModelError> {
        let Latent { channels, height, width } = latent;
        check(height == width, "input_size", format!("height {height} and width {width}"), || {
            "one side: the latents of `dit` are square".into()
        })?;
        let keys = [("input_size", height), ("in_channels", channels), ("num_classes", classes)];
        Ok(keys.into_iter().map(|(key, size)| (key.to_owned(), size.into())).collect())
    }

    fn amounts(&self) -> Amounts {
        let [d, depth, side, patch, channels, classes, out] = [
            self.hidden_size,
            self.depth,
            self.input_size,
            self.patch_size,
            self.in_channels,
            self.num_classes,
            self.out_channels(),
        ]
        .map(|size| size as u128);
        let (positions, mlp) =
            ((side / patch).pow(2) * d, mlp_hidden(self.hidden_size, self.mlp_ratio) as u128);
        let block = 10 * d * d + 2 * d * mlp;
        let parameters = depth * block + (channels + out) * patch * patch * d + classes * d + positions;
        let from = format!("hidden_size {d}, depth {depth}, patch_size {patch} and num_classes {classes}");
        Amounts {
            parameters: (parameters, from),
            positions: (positions, format!("input_size {side}, patch_size {patch} and hidden_size {d}")),
            input: (channels * side * side, format!("in_channels {channels} and input_size {side}")),
        }
    }

    fn classes(&self) -> Classes {
        Classes { count: self.num_classes, null: self.class_dropout_prob > 0.0 }
    }
}

impl Denoiser for Dit {
    fn validate(&self) -> Result<(), ModelError> {
        check_sizes(&[
            ("input_size", self.input_size),
            ("patch_size", self.patch_size),
            ("in_channels", self.in_channels),
            ("hidden_size", self.hidden_size),
            ("depth", self.depth),
            ("num_heads", self.num_heads),
            ("num_classes", self.num_classes),
        ])?;
        let (d, heads, side, patch) = (self.hidden_size, self.num_heads, self.input_size, self.patch_size);
        check(side.is_multiple_of(patch), "input_size", side, || {
            format!("a multiple of patch_size {patch}")
        })?;
        check(d.is_multiple_of(heads), "hidden_size", d, || format!("a multiple of num_heads {heads}"))?;
        check(d.is_multiple_of(4), "hidden_size", d, || {
            "a multiple of 4, for the sines and cosines of two axes".into()
        })?;
        check_mlp_ratio(d, self.mlp_ratio)?;
        self.amounts().check()?;
        let dropout = self.class_dropout_prob;
        check((0.0..=1.0).contains(&dropout), "class_dropout_prob", dropout, || "within 0..=1".into())
    }

    fn latent(&self) -> Latent {
        Latent { channels: self.in_channels, height: self.input_size, width: self.input_size }
    }

    fn conditioning(&self) -> Conditioning {
        Conditioning::Class(self.classes())
    }

    fn dropout(&self) -> f64 {
        self.class_dropout_prob
    }

    fn out_channels(&self) -> usize {
        self.in_channels * if self.learn_sigma { 2 } else { 1 }
    }

    fn width(&self) -> usize {
        self.hidden_size
    }

    fn head_size(&self) -> usize {
        self.hidden_size / self.num_heads
    }

    fn depth(&self) -> usize {
        self.depth
    }

    fn resized(&self, width: usize, head_size: usize) -> Network {
        Network::Dit(Self { hidden_size: width, num_heads: width / head_size.max(1), ..self.clone() })
    }

    fn canonical(&self) -> Network {
        // Only whether there is a null class.
        let class_dropout_prob = if self.class_dropout_prob > 0.0 { 0.5 } else { 0.0 };
        Network::Dit(Self { class_dropout_prob, ..self.clone() })
    }

    fn stacks(&self) -> &'static [&'static str] {
        &["blocks"]
    }

    fn forward<'g>(
        &self,
        s: &Scope<'g>,
        x: Value<'g>,
        t: Value<'g>,
        condition: &Condition<'g>,
        parameterised: Parameterised<'g>,
    ) -> Value<'g> {
        let (d, inits) = (self.hidden_size, Inits(parameterised.init));
        let positions = self.positions(s); // (1, T, D)
        let mut h = s.within("x_embedder", |s| patch_embed(s, x, self.patch_size, d, inits)) + positions; // (N, T, D)
        let t = s.within("t_embedder", |s| timestep_embed(s, t, d, inits)); // (N, D)
        let y =
            s.within("y_embedder", |s| label_embed(s, condition.class(), self.classes().rows(), d, inits)); // (N, D)
        let c = (t + y).silu(); // (N, D), before the linear layer of every modulation
        for i in 0..self.depth {
            h = s.within(format!("blocks.{i}"), |s| self.block(s, h, c, inits)); // (N, T, D)
        }
        let h = s.within("final_layer", |s| self.final_layer(s, h, c, parameterised)); // (N, T, P·P·Cout)
        h.unpatchify(self.patch_size, PatchOrder::ChannelsLast, self.input_size, self.input_size) // (N, Cout, H, W)
    }

    fn write(&self, keys: &mut Map<String, Json>) {
        let mut put = |key: &str, value: Json| keys.insert(key.to_owned(), value);
        put("input_size", self.input_size.into());
        put("patch_size", self.patch_size.into());
        put("in_channels", self.in_channels.into());
        put("hidden_size", self.hidden_size.into());
        put("depth", self.depth.into());
        put("num_heads", self.num_heads.into());
        put("mlp_ratio", self.mlp_ratio.into());
        put("class_dropout_prob", self.class_dropout_prob.into());
        put("num_classes", self.num_classes.into());
        put("learn_sigma", self.learn_sigma.into());
    }
}

impl Dit {
    fn positions<'g>(&self, s: &Scope<'g>) -> Value<'g> {
        let side = self.input_size / self.patch_size;
        let table: Arc<[f32]> = sin_cos_positions(self.hidden_size, side).into();
        let dims = [Dim::Fixed(1), Dim::Fixed(side * side), Dim::Width(self.hidden_size)];
        s.frozen("pos_embed", &dims, Init::Values(table)) // (1, T, D)
    }

    fn block<'g>(&self, s: &Scope<'g>, x: Value<'g>, c: Value<'g>, inits: Inits) -> Value<'g> {
        let [shift_a, scale_a, gate_a, shift_m, scale_m, gate_m] = modulation(s, c, inits); // 6 × (N, 1, D)
        let h = modulate(x, shift_a, scale_a); // (N, T, D)
        let x = x.gate_residual(gate_a, s.within("attn", |s| attention(s, h, self.num_heads, inits))); // (N, T, D)
        let h = modulate(x, shift_m, scale_m); // (N, T, D)
        let hidden = mlp_hidden(self.hidden_size, self.mlp_ratio);
        x.gate_residual(gate_m, s.within("mlp", |s| mlp(s, h, hidden, inits))) // (N, T, D)
    }

    fn final_layer<'g>(&self, s: &Scope<'g>, x: Value<'g>, c: Value<'g>, p: Parameterised<'g>) -> Value<'g> {
        let [shift, scale] = modulation(s, c, Inits(p.init)); // 2 × (N, 1, D)
        let h = modulate(x, shift, scale); // (N, T, D)
        let features = self.patch_size * self.patch_size * self.out_channels();
        s.within("linear", |s| output_linear(s, h, features, p)) // (N, T, P·P·Cout)
    }
}
