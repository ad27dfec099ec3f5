//! First values of the parameters.

use graph_builder::{Graph, Init};
use runtime::Arena;

use crate::error::Result;
use crate::random::{Purpose, Stream};

/// Standard deviation of the first value of a weight with axes `sizes` (out, in, …); `None` for a fixed table.
pub(super) fn init_std(init: &Init, sizes: &[f64]) -> Option<f64> {
    let fan_in: f64 = sizes.iter().skip(1).product();
    let fan_out = sizes.first().copied().unwrap_or(1.0);
    match init {
        Init::Zeros => Some(0.0),
        Init::Normal { std } => Some(*std),
        Init::XavierUniform => Some((2.0 / (fan_in + fan_out)).sqrt()),
        Init::KaimingNormal => Some((1.0 / fan_in).sqrt()),
        Init::Values(_) => None,
    }
}

/// Draws the first value of every parameter of `graph` into `parameters`, random ones times `scale` (muP's σ); the same
/// for any number of threads.
///
/// # Errors
/// [`crate::TrainError::Runtime`] when the arena lacks a parameter.
pub fn draw_parameters(graph: &Graph, seed: u64, scale: f64, parameters: &mut Arena) -> Result<()> {
    for (i, parameter) in graph.parameters().iter().enumerate() {
        let values = parameters.view_mut(&parameter.name)?;
        let mut stream = Stream::new(seed, Purpose::Init, 0, i as u64);
        let sizes: Vec<f64> = parameter.dims.iter().map(|d| d.size() as f64).collect();
        let std = init_std(&parameter.init, &sizes).unwrap_or(0.0) * scale;
        match &parameter.init {
            Init::Zeros => values.fill(0.0),
            Init::Normal { .. } | Init::KaimingNormal => {
                stream.fill_normal(values);
                for v in values {
                    *v = (f64::from(*v) * std) as f32;
                }
            }
            Init::XavierUniform => {
                let bound = 3.0_f64.sqrt() * std; // a uniform's half width is √3 standard deviations
                for v in values {
                    *v = ((2.0 * stream.uniform_f64() - 1.0) * bound) as f32;
                }
            }
            Init::Values(table) => values.copy_from_slice(table),
        }
    }
    Ok(())
}
