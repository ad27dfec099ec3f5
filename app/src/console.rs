//! Standard output and standard error: the only place that prints.

use std::io::Write as _;

use serde::Serialize;

/// One line of a result.
///
/// # Errors
/// A broken pipe and other failures of standard output.
pub fn out(line: &str) -> anyhow::Result<()> {
    Ok(writeln!(std::io::stdout().lock(), "{line}")?)
}

/// A result for machines.
///
/// # Errors
/// As [`out`].
pub fn json(value: &impl Serialize) -> anyhow::Result<()> {
    out(&serde_json::to_string_pretty(value)?)
}

/// One line of progress; a reader that is gone does not end the job.
pub fn note(line: &str) {
    let _ = writeln!(std::io::stderr().lock(), "{line}");
}

/// An error with its causes, each said once.
pub fn error(error: &anyhow::Error) {
    let mut said = error.to_string();
    note(&format!("error: {said}"));
    for cause in error.chain().skip(1) {
        let text = cause.to_string();
        if !said.contains(&text) {
            note(&format!("  cause: {text}"));
            said = text;
        }
    }
}
