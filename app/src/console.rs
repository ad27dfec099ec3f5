//! Standard output and standard error: the only place that prints.

use std::ffi::OsStr;
use std::io::{IsTerminal as _, Write as _};
use std::os::unix::ffi::OsStrExt as _;

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

/// One line that interrupts whatever is shown: a terminal's cursor may be in the midst of a bar.
pub fn interrupt(line: &str) {
    let begin = if std::io::stderr().is_terminal() { "\n" } else { "" };
    note(&format!("{begin}{line}"));
}

/// A word of a command that is printed to be copied into a shell.
pub fn quoted(word: impl AsRef<OsStr>) -> String {
    let word = word.as_ref();
    match word.to_str() {
        Some(text) => {
            let quoted = shlex::Quoter::new().allow_nul(true).quote(text);
            quoted.map_or_else(|_| text.to_owned(), std::borrow::Cow::into_owned)
        }
        None => word.as_bytes().iter().fold("$'".to_owned(), |text, b| format!("{text}\\x{b:02x}")) + "'",
    }
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_shell_reads_quoted_words_as_they_are() {
        let words: [&[u8]; 9] = [
            b"runs/plain-1.5,x=%",
            b"my run",
            b"it's",
            b"a\"b",
            b"$HOME",
            b"line\nbreak",
            b"",
            b"~/x*?",
            b"caf\xe9 x",
        ];
        assert_eq!(quoted("runs/plain-1.5"), "runs/plain-1.5");
        for word in words {
            let line = format!("printf %s {}", quoted(OsStr::from_bytes(word)));
            let told = std::process::Command::new("bash").args(["-c", &line]).output().unwrap();
            assert_eq!(told.stdout, word, "{line}");
        }
    }
}
