//! The commands. Each is *resolve, call, report*; what is computed lives in the libraries.

mod bench_serve;
mod build_engine;
mod convert;
mod coord_check;
mod data;
mod doctor;
mod fid;
mod inspect;
mod mup_table;
mod observer;
mod profile;
mod quickstart;
mod replay;
mod sample;
mod serve;
mod solving;
mod sweep;
mod train;
mod transfer;
mod triton;
mod weights;
mod weights_file;

use std::sync::Arc;

use clap::{Args, Subcommand};
use graph_builder::Precision;
use runtime::{Provider, Runtime, RuntimeOptions};
use train_engine::config::TrainConfig;
use train_engine::signals::StopSignal;

use crate::Usage;
use crate::built::BuiltEngine;
use crate::console;
use crate::execution::Execution;

/// What `mudit` can do.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Train a small class-conditional model on Fashion-MNIST and show its pictures.
    Quickstart(quickstart::QuickstartArgs),
    /// Tell what this machine has and what is missing.
    Doctor(doctor::DoctorArgs),
    /// Count a model's parameters and work, or print the signature of a program or an engine.
    Inspect(inspect::InspectArgs),
    /// Tell where the time of a program goes, by operator and by layer, and how far it is from this machine's best.
    Profile(profile::ProfileArgs),
    /// Compile programs of a model into an engine directory.
    BuildEngine(build_engine::BuildEngineArgs),
    /// Train a model from a configuration file; the same command goes on where it stopped.
    Train(train::TrainArgs),
    /// Run AdamW steps on given batches, to compare with another trainer.
    Replay(replay::ReplayArgs),
    /// Make images from a checkpoint.
    Sample(sample::SampleArgs),
    /// Serve images over HTTP, with a page to try it.
    Serve(serve::ServeArgs),
    /// Put load on a server and measure it.
    BenchServe(bench_serve::BenchServeArgs),
    /// Check that activations and their updates keep their size over widths; exit code 1 when they do not.
    CoordCheck(coord_check::CoordCheckArgs),
    /// Run many trainings over settings and sizes on few compiled steps.
    Sweep(sweep::SweepArgs),
    /// Tell whether optima stay over widths, batches and steps; or tune a proxy and train the target with its settings.
    Transfer(transfer::TransferArgs),
    /// Rewrite a checkpoint for other programs.
    Convert(convert::ConvertArgs),
    /// Fetch, check and look at data sets.
    Data(data::DataArgs),
    /// Measure how far samples are from real images: FID, sFID, IS, precision, recall, KID.
    Fid(fid::FidArgs),
}

impl Command {
    /// Runs the command.
    ///
    /// # Errors
    /// Whatever the command says; [`crate::Usage`] for wrong usage, [`crate::Stopped`] after a signal.
    pub fn run(self) -> anyhow::Result<()> {
        match self {
            Self::Quickstart(args) => args.run(),
            Self::Doctor(args) => args.run(),
            Self::Inspect(args) => args.run(),
            Self::Profile(args) => args.run(),
            Self::BuildEngine(args) => args.run(),
            Self::Train(args) => args.run(),
            Self::Replay(args) => args.run(),
            Self::Sample(args) => args.run(),
            Self::Serve(args) => args.run(),
            Self::BenchServe(args) => args.run(),
            Self::CoordCheck(args) => args.run(),
            Self::Sweep(args) => args.run(),
            Self::Transfer(args) => args.run(),
            Self::Convert(args) => args.run(),
            Self::Data(args) => args.run(),
            Self::Fid(args) => args.run(),
        }
    }

    /// Names of all commands, for the proof that each is run.
    pub fn names() -> Vec<String> {
        let command = Self::augment_subcommands(clap::Command::new("mudit"));
        command.get_subcommands().map(|c| c.get_name().to_owned()).collect()
    }
}

/// Listens for what asks to stop, which `what` ends with; the first is answered at once.
fn listen(what: &'static str) -> anyhow::Result<StopSignal> {
    let told = move || console::interrupt(&format!("stopping after this {what}; again ends at once"));
    Ok(StopSignal::install(told)?)
}

/// Options of every command that runs programs or reads data.
#[derive(Clone, Copy, Debug, Args)]
struct Machine {
    /// Threads inside one op; 0 is one a core.
    #[arg(long, default_value_t = 0, env = "MUDIT_THREADS")]
    threads: usize,
    /// Fetch nothing; fail where something is missing.
    #[arg(long)]
    offline: bool,
}

/// Options of commands that run programs on a GPU, too.
#[derive(Clone, Debug, Args)]
struct Target {
    /// Who runs the programs: cpu, cuda, tensorrt; cuda:1 is the GPU of that number. Default cpu, or an engine's.
    #[arg(long, env = "MUDIT_PROVIDER")]
    provider: Option<Provider>,
    /// Element type of the computation: f32, bf16 or f16; other than f32 on GPUs only. Default f32, or an engine's.
    #[arg(long)]
    precision: Option<Precision>,
}

impl Target {
    /// How programs are computed; refuses what this machine cannot do.
    fn execution(&self, machine: Machine) -> anyhow::Result<Execution> {
        let execution = self.asked(machine);
        execution.check()?;
        Ok(execution)
    }

    /// [`Self::execution`] of training steps.
    fn training(&self, machine: Machine) -> anyhow::Result<Execution> {
        let execution = self.asked(machine);
        execution.check_training()?;
        Ok(execution)
    }

    fn asked(&self, machine: Machine) -> Execution {
        Execution {
            provider: self.provider.clone().unwrap_or_default(),
            precision: self.precision.unwrap_or_default(),
            threads: machine.threads,
        }
    }

    /// [`Self::execution`] of an engine's programs, which says what is not said here.
    fn execution_of(&self, engine: &BuiltEngine, machine: Machine) -> anyhow::Result<Execution> {
        engine.execution(self.provider.as_ref(), self.precision, machine.threads)
    }
}

/// [`Target`] where a configuration file says it otherwise.
#[derive(Clone, Debug, Default, Args)]
struct TargetOverrides {
    /// Who runs the programs: cpu, cuda; cuda:1 is the GPU of that number. In place of `train.provider`.
    #[arg(long, env = "MUDIT_PROVIDER")]
    provider: Option<Provider>,
    /// Element type of the computation: f32, bf16 or f16; other than f32 on GPUs only. In place of `train.precision`.
    #[arg(long)]
    precision: Option<Precision>,
}

impl TargetOverrides {
    /// Writes what was given, and the threads where none are set, into a configuration.
    fn apply(&self, config: &mut TrainConfig, machine: Machine) {
        let train = &mut config.train;
        if let Some(provider) = &self.provider {
            train.provider = provider.clone();
        }
        if let Some(precision) = self.precision {
            train.precision = precision;
        }
        if train.threads == 0 {
            train.threads = machine.threads;
        }
    }
}

/// How the steps of a run are computed.
fn of_training(config: &TrainConfig) -> Execution {
    let train = &config.train;
    Execution { provider: train.provider.clone(), precision: train.precision, threads: train.threads }
}

impl Machine {
    /// Finds (or fetches) and loads ONNX Runtime for the CPU.
    fn runtime(self) -> anyhow::Result<Arc<Runtime>> {
        if let Ok(wanted) = std::env::var("MUDIT_PROVIDER")
            && wanted.parse::<Provider>().is_ok_and(|p| p.is_gpu())
        {
            let text =
                format!("this command computes on the CPU only, and MUDIT_PROVIDER says {wanted}: unset it");
            return Err(Usage(text).into());
        }
        self.runtime_for(&Provider::default())
    }

    /// Finds (or fetches) and loads an ONNX Runtime that has a provider.
    fn runtime_for(self, provider: &Provider) -> anyhow::Result<Arc<Runtime>> {
        let options =
            RuntimeOptions { offline: self.offline, gpu: provider.is_gpu(), progress: &console::note };
        Ok(Runtime::start(&options)?)
    }
}
