//! `mudit profile`: where a program's time goes, operator by operator and layer by layer, against the machine's best.

use std::path::PathBuf;
use std::time::Duration;

use clap::Args;
use models::{Guidance, ProgramKind};
use runtime::file::{check_writable, write_atomically};
use serde_json::{Value, json};

use super::{Machine, weights};
use crate::console;
use crate::profile::measure::{Measured, Subject};
use crate::profile::memory::{Prediction, megabytes};
use crate::profile::{Spent, UNJOINED};
use crate::render::icicle;
use crate::roof::{self, Roof};
use crate::sampler::channels;

/// Time that measuring the machine itself may take.
const ROOF_BUDGET: Duration = Duration::from_secs(3);
/// Name of the update's line.
const UPDATE: &str = "clip, AdamW, average";
/// Name of the line of what is no node.
const OVERHEAD: &str = "session overhead";

/// Arguments of `mudit profile`.
#[derive(Debug, Args)]
pub struct ProfileArgs {
    /// A preset such as `DiT-S/2` or `DiT-S/2@8x8x4:10`, a config.json, a checkpoint or run directory, or an engine.
    model: String,
    /// The program.
    #[arg(long, default_value = "train-step")]
    program: ProgramKind,
    /// Samples of one run.
    #[arg(long, default_value_t = 1)]
    batch: usize,
    /// Channels that guidance changes: a number, `all` or `off`. Default 3 for DDPM models as in the reference, else all.
    #[arg(long, value_parser = channels, alias = "guided-channels")]
    cfg_channels: Option<Guidance>,
    /// Timed runs, with and without the profiler.
    #[arg(long, default_value_t = 10)]
    repeat: usize,
    /// Write a picture of nested shares here.
    #[arg(long, value_name = "FILE")]
    svg: Option<PathBuf>,
    /// Write everything as JSON to a file; without a name, print it instead of the tables.
    #[arg(long, value_name = "FILE", num_args = 0..=1)]
    #[expect(clippy::option_option, reason = "absent, without a name, with one")]
    json: Option<Option<PathBuf>>,
    #[command(flatten)]
    machine: Machine,
}

impl ProfileArgs {
    pub(super) fn run(self) -> anyhow::Result<()> {
        let model = weights::model(&self.model)?;
        self.svg.iter().chain(self.json.iter().flatten()).try_for_each(check_writable)?;
        let runtime = self.machine.runtime()?;
        let (threads, batch, repeat) = (self.machine.threads, self.batch, self.repeat.max(1));
        let (kind, guidance) = (self.program, self.cfg_channels.unwrap_or(Guidance::usual(model.objective)));
        let measured = Subject { model: &model, kind, batch, guidance, threads, repeat }.measure(&runtime)?;
        console::note("measuring this machine's best");
        let roof = roof::measure(&runtime, threads, ROOF_BUDGET)?;
        let report = Report { model: &self.model, kind, batch, measured: &measured, roof: &roof };
        if let Some(path) = &self.svg {
            let after: Vec<(&str, f64)> = measured.update.iter().map(|u| (UPDATE, u.ms)).collect();
            icicle::save(
                &report.title(),
                &report.summary(),
                &measured.profile.frames(kind.name(), &after),
                path,
            )?;
        }
        match &self.json {
            Some(None) => return console::json(&report.json()),
            Some(Some(path)) => {
                let text = serde_json::to_string_pretty(&report.json())?;
                write_atomically(path, |out| out.write_all(text.as_bytes()))?;
            }
            None => {}
        }
        report.print()
    }
}

struct Report<'a> {
    model: &'a str,
    kind: ProgramKind,
    batch: usize,
    measured: &'a Measured,
    roof: &'a Roof,
}

impl Report<'_> {
    /// One step: the program without the profiler, and the update where there is one.
    fn step_ms(&self) -> f64 {
        self.measured.plain_ms + self.measured.update.map_or(0.0, |u| u.ms)
    }

    /// Matrix products of a step over its time.
    fn product_rate(&self) -> f64 {
        2.0 * self.measured.cost.macs as f64 / self.step_ms() / 1e6
    }

    fn title(&self) -> String {
        format!("{} {}, batch {}", self.model, self.kind, self.batch)
    }

    fn summary(&self) -> String {
        format!(
            "{:.1} ms, {:.1} GFLOP/s of matrix products: {:.0} % of this machine's {:.0}; {} threads",
            self.step_ms(),
            self.product_rate(),
            100.0 * self.product_rate() / self.roof.gflops_per_s,
            self.roof.gflops_per_s,
            self.roof.threads
        )
    }

    fn print(&self) -> anyhow::Result<()> {
        let (measured, profile, roof) = (self.measured, &self.measured.profile, self.roof);
        console::out(&format!("{}: {}", self.title(), self.summary()))?;
        console::out(&format!(
            "roof: {:.0} GFLOP/s ({}), {:.1} GB/s of memory",
            roof.gflops_per_s, roof.product, roof.gb_per_s
        ))?;
        let update = measured.update.map_or(String::new(), |u| format!(", {UPDATE} {:.2} ms", u.ms));
        console::out(&format!(
            "program {:.2} ms{update}; under the profiler {:.2} ms, of which {:.2} ms are no node",
            measured.plain_ms, profile.run_ms, profile.overhead_ms
        ))?;
        self.memory()?;
        let whole = profile.run_ms + measured.update.map_or(0.0, |u| u.ms);
        let share = |ms: f64| 100.0 * ms / whole;
        console::out(&format!(
            "\n{:28} {:>6} {:>10} {:>6} {:>9} {:>10} {:>7}",
            "operator", "calls", "ms", "%", "GFLOP/s", "MB moved", "GB/s"
        ))?;
        let row = |name: &str, s: &Spent| {
            console::out(&format!(
                "{name:28} {:>6} {:>10.3} {:>6.1} {:>9.1} {:>10.1} {:>7.1}",
                s.calls,
                s.ms,
                share(s.ms),
                s.gflops_per_s(),
                s.bytes as f64 / 1e6,
                s.gb_per_s()
            ))
        };
        for (op, spent) in profile.grouped(|line| line.op.clone()) {
            row(&op, &spent)?;
        }
        let rest = Spent { ms: profile.overhead_ms, ..Spent::default() };
        row(OVERHEAD, &rest)?;
        if let Some(update) = &measured.update {
            row(UPDATE, update)?;
        }
        row("all", &Spent { ms: whole, ..Spent::default() })?;
        console::out(&format!(
            "\n{:28} {:>10} {:>6} {:>9} {:>12} {:>6} {:>9}",
            "layer", "forward ms", "%", "GFLOP/s", "backward ms", "%", "GFLOP/s"
        ))?;
        for (layer, [forward, backward]) in profile.by_layer() {
            console::out(&format!(
                "{layer:28} {:>10.3} {:>6.1} {:>9.1} {:>12.3} {:>6.1} {:>9.1}",
                forward.ms,
                share(forward.ms),
                forward.gflops_per_s(),
                backward.ms,
                share(backward.ms),
                backward.gflops_per_s()
            ))?;
        }
        Ok(())
    }

    fn memory(&self) -> anyhow::Result<()> {
        let prediction = Prediction::new(&self.measured.graph, self.kind);
        console::out(&prediction.words())?;
        let resident = self.measured.peak_resident_bytes.map_or("not told".into(), megabytes);
        let activations = self.measured.profile.activation_peak_bytes;
        console::out(&format!(
            "measured: {resident} MB resident at most, {} MB in ONNX Runtime's allocator",
            megabytes(activations)
        ))
    }

    fn json(&self) -> Value {
        let (measured, profile) = (self.measured, &self.measured.profile);
        let entry = |name: &str, s: &Spent| {
            json!({
                "name": name, "calls": s.calls, "ms": s.ms, "gflops_per_s": s.gflops_per_s(), "bytes": s.bytes,
                "gb_per_s": s.gb_per_s(),
            })
        };
        let operators = profile.grouped(|line| line.op.clone());
        let layers = profile.by_layer();
        json!({
            "model": self.model, "program": self.kind.name(), "batch": self.batch, "roof": self.roof,
            "step_ms": self.step_ms(), "program_ms": measured.plain_ms, "update_ms": measured.update.map(|u| u.ms),
            "gflops_per_s": self.product_rate(), "of_roof": self.product_rate() / self.roof.gflops_per_s,
            "macs": measured.cost.macs, "flops": measured.cost.flops,
            "profiled_ms": profile.run_ms, "overhead_ms": profile.overhead_ms,
            "unjoined_ms": layers.get(UNJOINED).map_or(0.0, |[s, _]| s.ms),
            "memory": {
                "predicted": Prediction::new(&measured.graph, self.kind),
                "predicted_bytes": Prediction::new(&measured.graph, self.kind).total(),
                "peak_resident_bytes": measured.peak_resident_bytes,
                "allocator_peak_bytes": profile.activation_peak_bytes,
            },
            "operators": operators.iter().map(|(op, s)| entry(op, s)).collect::<Vec<_>>(),
            "layers": layers.iter().map(|(name, [forward, backward])| {
                json!({ "name": name, "forward": entry(name, forward), "backward": entry(name, backward) })
            }).collect::<Vec<_>>(),
            "nodes": profile.lines,
        })
    }
}
