//! The binary `mudit`: parses, runs, maps the outcome to an exit code.

use std::process::ExitCode;

fn main() -> ExitCode {
    mudit::run_from_env()
}
