//! The families of networks behind one enum, and what every other room knows of a network: what goes in, what comes out,
//! how wide it is, how another width of it looks.

use graph_builder::{Scope, Value};
use serde_json::{Map, Value as Json};

use crate::condition::{Condition, Conditioning};
use crate::dit::Dit;
use crate::error::ModelError;
use crate::fields::Fields;
use crate::model::InitScheme;
use crate::objective::Objective;

/// Size of what a network denoises: a latent of an autoencoder, or pixels.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Latent {
    /// Channels.
    pub channels: usize,
    /// Rows.
    pub height: usize,
    /// Columns.
    pub width: usize,
}

impl Latent {
    /// Values of one sample.
    pub const fn values(self) -> usize {
        self.channels * self.height * self.width
    }

    /// `[C, H, W]`.
    pub const fn shape(self) -> [usize; 3] {
        [self.channels, self.height, self.width]
    }

    /// `[N, C, H, W]`.
    pub const fn batch(self, n: usize) -> [usize; 4] {
        [n, self.channels, self.height, self.width]
    }
}

/// How a network's parameters begin and how its output is scaled.
#[derive(Debug, Clone, Copy)]
pub struct Parameterised<'g> {
    /// Distributions of the first values.
    pub(crate) init: InitScheme,
    /// muP's `m`: the width over the base's, 1 under the standard parameterisation.
    pub(crate) width_multiplier: f64,
    /// muP's α, a scalar: the output layer computes `W·(α·x/m) + b`.
    pub(crate) output_multiplier: Value<'g>,
}

/// What a family's configuration can say and do. No defaults: each family answers each question.
pub(crate) trait Denoiser {
    /// Checks that the sizes make a network.
    fn validate(&self) -> Result<(), ModelError>;

    /// What goes in as `x`.
    fn latent(&self) -> Latent;

    /// What else goes in, beside `x` and `t`.
    fn conditioning(&self) -> Conditioning;

    /// Probability with which training puts the null condition in the place of a sample's own.
    fn dropout(&self) -> f64;

    /// Channels of `out`: those of the latent, twice over where the variance is predicted too.
    fn out_channels(&self) -> usize;

    /// Width of the residual stream.
    fn width(&self) -> usize;

    /// Width of one attention head.
    fn head_size(&self) -> usize;

    /// Blocks of all stacks.
    fn depth(&self) -> usize;

    /// The same network at another width, with heads of a size; everything that is a multiple of the width follows.
    fn resized(&self, width: usize, head_size: usize) -> Network;

    /// The same network without what no program depends on, such as the probability of dropping a condition: networks whose
    /// canonical forms are equal have the same programs.
    fn canonical(&self) -> Network;

    /// Scopes of the stacks of blocks: `blocks` where the first block is `blocks.0`.
    fn stacks(&self) -> &'static [&'static str];

    /// Its answer (N, Cout, H, W) for `x` (N, C, H, W), `t` (N) f32 and the condition.
    ///
    /// The first C channels are the noise or the velocity, the next C the variance logits of a network that predicts them.
    fn forward<'g>(
        &self,
        s: &Scope<'g>,
        x: Value<'g>,
        t: Value<'g>,
        condition: &Condition<'g>,
        parameterised: Parameterised<'g>,
    ) -> Value<'g>;

    /// Writes its constructor's keys, in a fixed order.
    fn write(&self, keys: &mut Map<String, Json>);
}

/// A family as the registry knows it.
struct Family {
    /// The value of `model` in `config.json`.
    name: &'static str,
    /// Constructor's keys that must be given.
    required: &'static [&'static str],
    /// Constructor's keys that may be left out.
    optional: &'static [&'static str],
    /// Reads the keys; the objective decides on some defaults.
    read: fn(&Fields<'_>, Objective) -> Result<Network, ModelError>,
    /// The keys that images of a size and their number of classes fix.
    fixed_by_data: fn(Latent, usize) -> Result<Map<String, Json>, ModelError>,
    /// Names of the published sizes.
    presets: &'static [&'static str],
    /// A published size.
    preset: fn(&str) -> Option<Network>,
}

macro_rules! families {
    ($($(#[$doc:meta])* $name:ident($ty:ty)),+ $(,)?) => {
        /// A network: the configuration of one of the families.
        #[derive(Debug, Clone, PartialEq)]
        pub enum Network { $($(#[$doc])* $name($ty)),+ }

        impl Network {
            fn family(&self) -> &dyn Denoiser {
                match self { $(Self::$name(family) => family),+ }
            }

            /// The value of `model` in `config.json`.
            pub fn name(&self) -> &'static str {
                match self { $(Self::$name(_) => <$ty>::NAME),+ }
            }
        }

        const FAMILIES: &[Family] = &[$(Family {
            name: <$ty>::NAME,
            required: <$ty>::REQUIRED,
            optional: <$ty>::OPTIONAL,
            read: |fields, objective| Ok(Network::$name(<$ty>::read(fields, objective)?)),
            fixed_by_data: <$ty>::fixed_by_data,
            presets: <$ty>::PRESETS,
            preset: |name| <$ty>::preset(name).map(Network::$name),
        }),+];
    };
}

families! {
    /// The diffusion transformer with adaLN-Zero blocks.
    Dit(Dit),
}

/// The family where `config.json` names none.
const DEFAULT: &str = Dit::NAME;

/// The family of that name, or the default.
fn family(name: Option<&str>) -> Result<&'static Family, ModelError> {
    let name = name.unwrap_or(DEFAULT);
    FAMILIES.iter().find(|f| f.name == name).ok_or_else(|| ModelError::BadValue {
        key: "model",
        expected: FAMILIES.iter().map(|f| format!("\"{}\"", f.name)).collect::<Vec<_>>().join(" or "),
        got: format!("\"{name}\""),
    })
}

impl Network {
    /// Reads the keys of the family that `model` names; `own` are keys beside the constructor's.
    pub(crate) fn read(
        fields: &Fields<'_>,
        own: &[&'static str],
        objective: Objective,
    ) -> Result<Self, ModelError> {
        let family = family(fields.text("model")?)?;
        fields.check_keys(family.required, &[family.optional, own].concat())?;
        (family.read)(fields, objective)
    }

    /// The constructor's keys of a family that images of a size and their number of classes fix.
    pub(crate) fn fixed_by_data(
        name: Option<&str>,
        latent: Latent,
        classes: usize,
    ) -> Result<Map<String, Json>, ModelError> {
        (family(name)?.fixed_by_data)(latent, classes)
    }

    /// Names of all published sizes.
    pub fn presets() -> Vec<&'static str> {
        FAMILIES.iter().flat_map(|f| f.presets).copied().collect()
    }

    /// A published size, one of [`Self::presets`].
    pub(crate) fn preset(name: &str) -> Option<Self> {
        FAMILIES.iter().find(|f| f.presets.contains(&name)).and_then(|f| (f.preset)(name))
    }

    /// The family's constructor's keys; `model` comes first.
    pub(crate) fn write(&self, keys: &mut Map<String, Json>) {
        keys.insert("model".to_owned(), self.name().into());
        self.family().write(keys);
    }

    /// Checks that the sizes make a network.
    ///
    /// # Errors
    /// [`ModelError::BadValue`], for the first that does not fit, with what it would have to be.
    pub fn validate(&self) -> Result<(), ModelError> {
        self.family().validate()
    }

    /// What goes in as `x`.
    pub fn latent(&self) -> Latent {
        self.family().latent()
    }

    /// What else goes in, beside `x` and `t`.
    pub fn conditioning(&self) -> Conditioning {
        self.family().conditioning()
    }

    /// Probability with which training puts the null condition in the place of a sample's own, where a run says nothing else.
    pub fn dropout(&self) -> f64 {
        self.family().dropout()
    }

    /// Channels of `out`.
    pub fn out_channels(&self) -> usize {
        self.family().out_channels()
    }

    /// Width of the residual stream.
    pub fn width(&self) -> usize {
        self.family().width()
    }

    /// Width of one attention head.
    pub fn head_size(&self) -> usize {
        self.family().head_size()
    }

    /// Blocks of all stacks.
    pub fn depth(&self) -> usize {
        self.family().depth()
    }

    /// The same network at another width, with heads of a size.
    #[must_use]
    pub fn resized(&self, width: usize, head_size: usize) -> Self {
        self.family().resized(width, head_size)
    }

    /// The same network without what no program depends on: equal ones have the same programs.
    #[must_use]
    pub fn canonical(&self) -> Self {
        self.family().canonical()
    }

    /// Scopes of the stacks of blocks.
    pub fn stacks(&self) -> &'static [&'static str] {
        self.family().stacks()
    }

    /// Its answer; see the family's file.
    pub(crate) fn forward<'g>(
        &self,
        s: &Scope<'g>,
        x: Value<'g>,
        t: Value<'g>,
        condition: &Condition<'g>,
        parameterised: Parameterised<'g>,
    ) -> Value<'g> {
        self.family().forward(s, x, t, condition, parameterised)
    }
}
