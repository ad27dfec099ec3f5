//! The binary `mudit` as a library: arguments, dispatch, exit codes.
//!
//! | module | holds |
//! |---|---|
//! | [`built`] | engine directories, as commands run them |
//! | [`commands`] | one module a command: resolve, call, report |
//! | [`execution`] | who computes a program, in which type, and where its parameters are |
//! | [`fid`] | feature networks and the distances between image sets |
//! | [`sampler`] | a `step` program, a solver and seeds → images |
//! | [`profile`] | executed nodes joined with the graph: where the time goes |
//! | [`roof`] | what this machine can do at best, measured |
//! | [`serve`] | the sampling server |
//! | [`render`] | pictures, plots, arrays, progress |
//! | [`external`] | where the tensors lie that programs point to |
//! | [`torch_file`] | PyTorch's files, read without executing anything |
//! | [`console`] | standard output and error, the only place that prints |
//!
//! Results go to standard output (`--json` for machines), progress to standard error. Exit code 0 is done, 1 failed,
//! 2 bad usage, 3 stopped by a signal: what is whole is kept.

pub mod built;
pub mod commands;
pub mod console;
pub mod execution;
pub mod external;
mod faults;
pub mod fid;
mod gpu_memory;
mod limits;
pub mod profile;
pub mod render;
pub mod roof;
pub mod sampler;
pub mod serve;
pub mod torch_file;

use std::ffi::OsString;
use std::process::ExitCode;

use clap::{CommandFactory as _, FromArgMatches as _, Parser};
use models::ModelError;
use train_engine::TrainError;
use train_engine::signals::survive_file_size_limit;

use crate::commands::Command;

/// The end of the help.
const EXIT_CODES: &str = "Exit codes: 0 done, 1 failed, 2 bad usage, 3 stopped by a signal (Ctrl-C, SIGTERM, SIGHUP, SIGUSR1 …): \
    what is whole is kept, and what is printed says how to go on.";

/// A static-graph compiler, trainer and sampler for diffusion transformers.
#[derive(Debug, Parser)]
#[command(name = "mudit", version, propagate_version = true, after_help = EXIT_CODES)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

/// Wrong usage that the parser cannot see: exit code 2.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct Usage(pub String);

/// A signal ended the command before its end; says what is kept and how to go on: exit code 3.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct Stopped(pub String);

/// Exit code of wrong usage.
const BAD_USAGE: u8 = 2;
/// Exit code of a command that a signal stopped.
pub const STOPPED: u8 = 3;

/// Runs the process's own arguments.
pub fn run_from_env() -> ExitCode {
    runtime::library::forbid_telemetry();
    run(std::env::args_os())
}

/// Runs one command line, the program's name first.
pub fn run(args: impl IntoIterator<Item = OsString>) -> ExitCode {
    let mut command = limits::judged(Cli::command());
    let parsed = command.try_get_matches_from_mut(args);
    let cli = match parsed.and_then(|found| Cli::from_arg_matches(&found)) {
        Ok(cli) => cli,
        Err(error) => {
            let code = if error.use_stderr() { BAD_USAGE } else { 0 };
            // Nobody is left to tell when help cannot be printed.
            let _ = error.print();
            return ExitCode::from(code);
        }
    };
    let ended = survive_file_size_limit().map_err(Into::into).and_then(|()| cli.command.run());
    match ended {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) if error.is::<Stopped>() => {
            console::note(&error.to_string());
            ExitCode::from(STOPPED)
        }
        Err(error) if is_broken_pipe(&error) => ExitCode::SUCCESS,
        Err(error) => {
            console::error(&error);
            ExitCode::from(if is_usage(&error) { BAD_USAGE } else { 1 })
        }
    }
}

fn is_broken_pipe(error: &anyhow::Error) -> bool {
    let io = error.chain().find_map(|cause| cause.downcast_ref::<std::io::Error>());
    io.is_some_and(|e| e.kind() == std::io::ErrorKind::BrokenPipe)
}

/// Whether what was asked is wrong, rather than what was found.
fn is_usage(error: &anyhow::Error) -> bool {
    let wrong_model = |e: &ModelError| !matches!(e, ModelError::Graph(_));
    error.chain().any(|cause| {
        let model = cause.downcast_ref::<ModelError>().is_some_and(wrong_model);
        let mut train = cause.downcast_ref::<TrainError>();
        while let Some(TrainError::BadTrial { source, .. }) = train {
            train = Some(source.as_ref());
        }
        let train = train.is_some_and(|e| {
            match e {
                // It is transparent, so the model's error is not in the chain.
                TrainError::Model(e) => wrong_model(e),
                _ => matches!(
                    e,
                    TrainError::UnknownKey { .. }
                        | TrainError::ConfigSyntax { .. }
                        | TrainError::Override { .. }
                        | TrainError::BadValue { .. }
                ),
            }
        });
        cause.is::<Usage>() || model || train
    })
}
