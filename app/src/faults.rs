//! All files of a set that cannot be used, told in one error: nobody should have to run a large set once for each.

use std::fmt::Write as _;

use anyhow::bail;

/// Files that the error names.
const NAMED: usize = 100;

/// The one fault, or all of them among `images` as one.
///
/// # Errors
/// When there is a fault.
pub(crate) fn one_error(mut faults: Vec<anyhow::Error>, images: u64) -> anyhow::Result<()> {
    if faults.len() < 2 {
        return faults.pop().map_or(Ok(()), Err);
    }
    let mut text = format!("{} of {images} images cannot be used:", faults.len());
    for fault in faults.iter().take(NAMED) {
        write!(text, "\n  {fault:#}")?;
    }
    if faults.len() > NAMED {
        write!(text, "\n  and {} more", faults.len() - NAMED)?;
    }
    bail!(text)
}
