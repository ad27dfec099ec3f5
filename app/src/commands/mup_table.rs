//! `mudit inspect --mup`: the muP table of a model, or the one saved with a checkpoint, a run or an engine.

use std::path::Path;

use anyhow::Context;
use models::{InitScheme, Model, MupConfig, ProgramKind, ProgramSpec};
use runtime::{Engine, engine};
use train_engine::checkpoint::{CONFIG_FILE, STATE_FILE, State};
use train_engine::mup::{MupRow, MupTable};

use super::weights;
use crate::Usage;
use crate::console;

/// Prints the table of what `name` names.
pub(super) fn show(name: &str, base_width: Option<usize>, json: bool) -> anyhow::Result<()> {
    let (table, origin) = table(name, base_width)?;
    if json {
        return console::json(&table);
    }
    let m = table.width_multiplier();
    console::out(&format!(
        "{name}: {}, width {}, base width {}, m = {m}, output multiplier {}; {origin}",
        if table.enabled { "muP" } else { "standard parameterisation" },
        table.width,
        table.base_width,
        table.output_multiplier
    ))?;
    console::out(&format!(
        "{:42} {:16} {:7} {:>10} {:>10} {:>10} {:>8} {:>8} {:>8}",
        "parameter", "shape", "role", "init std", "at base", "multiplier", "rate", "decay", "eps"
    ))?;
    table.parameters.iter().try_for_each(|row| console::out(&line(row)))?;
    console::out(&format!(
        "rate, decay and eps are factors on train.learning_rate, train.weight_decay (mup.weight_decay = \"{}\") and \
         train.eps (mup.eps = \"{}\"); at the base width all are 1. train.clip, train.warmup_steps and loss weights do \
         not depend on the width.",
        table.conventions.weight_decay, table.conventions.eps
    ))
}

fn line(row: &MupRow) -> String {
    let shape = row.shape.iter().map(ToString::to_string).collect::<Vec<_>>().join("x");
    let std = |std: Option<f64>| std.map_or_else(|| "table".to_owned(), |s| format!("{s:.5}"));
    let rate = if row.lr == 0.0 { "fixed".to_owned() } else { format!("{:.4}", row.lr) };
    format!(
        "{:42} {shape:16} {:7} {:>10} {:>10} {:>10.5} {rate:>8} {:>8.4} {:>8.4}",
        row.name,
        format!("{:?}", row.role).to_lowercase(),
        std(row.init_std),
        std(row.base_init_std),
        row.multiplier,
        row.weight_decay,
        row.eps
    )
}

/// The table and where it is from.
fn table(name: &str, base_width: Option<usize>) -> anyhow::Result<(MupTable, &'static str)> {
    let path = Path::new(name);
    let saved = if path.join(engine::MANIFEST).is_file() {
        let manifest = Engine::open(path)?.manifest().clone();
        let value = manifest.extra.get("mup").cloned().context("the engine's manifest holds no muP table")?;
        Some((value, "as saved with the engine"))
    } else if path.is_dir() && !path.join(CONFIG_FILE).is_file() || path.join(STATE_FILE).is_file() {
        Some((State::read(&weights::directory(path)?)?.mup, "as saved with the checkpoint"))
    } else {
        None
    };
    if let Some((value, origin)) = saved {
        if base_width.is_some() {
            return Err(Usage(format!(
                "`{name}` was made with a base width; --base-width is for models that have none"
            ))
            .into());
        }
        let table = serde_json::from_value(value).context("the saved muP table does not read")?;
        return Ok((table, origin));
    }
    let mut model = Model::resolve(name)?;
    if let Some(base_width) = base_width {
        if model.mup.is_none() {
            model.init = InitScheme::Mup;
        }
        let output_multiplier = model.mup.map_or(1.0, |mup| mup.output_multiplier);
        model.mup = Some(MupConfig { base_width, output_multiplier });
    }
    let graph = model.program(&ProgramSpec::new(ProgramKind::Loss, 1))?;
    Ok((MupTable::new(&graph, &model), "derived from the graph"))
}
