//! `latest`: a convenience for people and other programs. mudit itself never needs it, so nothing fails for it.
//!
//! Tools that copy a run and follow links (scp, zip, object stores) leave a directory in its place, others a file with the
//! link's text.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use super::{FILES, Trouble, hide, name_of, remove_hidden, try_sync, verify};
use crate::error::{Result, TrainError};

const LATEST: &str = "latest";
const STALE: &str = "`latest` does not lead to the newest checkpoint";

/// Points `latest` to a checkpoint: a new link is renamed over whatever is there.
pub(super) fn point(directory: &Path, name: &str, trouble: &mut Trouble<'_>) {
    let (latest, link) = (directory.join(LATEST), directory.join(format!(".{LATEST}.new")));
    if link.symlink_metadata().is_ok() {
        remove_hidden(&link, trouble);
    }
    let linked = make_room(&latest, trouble).and_then(|()| {
        symlink(name, &link)
            .and_then(|()| fs::rename(&link, &latest))
            .map_err(TrainError::io("write", &latest))
    });
    match linked {
        Ok(()) => try_sync(directory, trouble),
        Err(error) => trouble(STALE, error),
    }
}

/// Takes a directory away that a copy has left in the place of the link.
fn make_room(latest: &Path, trouble: &mut Trouble<'_>) -> Result<()> {
    if !is_directory(latest) {
        return Ok(());
    }
    if let Some(other) = others(latest)?.first() {
        let reason = format!("it is a directory with `{}`; move it away", other.display());
        return Err(TrainError::io("replace", latest)(std::io::Error::other(reason)));
    }
    remove_hidden(&hide(latest)?, trouble);
    Ok(())
}

/// Gives a checkpoint its name that has come without: a copy that took `latest` alone.
///
/// # Errors
/// [`TrainError::Io`] when it cannot be renamed: to start anew would throw it away.
pub(super) fn adopt(directory: &Path, trouble: &mut Trouble<'_>) -> Result<()> {
    let latest = directory.join(LATEST);
    if !is_directory(&latest) {
        return Ok(());
    }
    let Ok(state) = verify(&latest) else { return Ok(()) };
    let target = directory.join(name_of(state.step));
    if verify(&target).is_ok() {
        return Ok(());
    }
    if target.exists() {
        remove_hidden(&hide(&target)?, trouble);
    }
    fs::rename(&latest, &target).map_err(TrainError::io("rename", &latest))?;
    try_sync(directory, trouble);
    Ok(())
}

fn is_directory(path: &Path) -> bool {
    path.symlink_metadata().is_ok_and(|there| there.is_dir())
}

/// What is in a directory beside the files of a checkpoint.
fn others(directory: &Path) -> Result<Vec<PathBuf>> {
    let entries = super::entries(directory)?;
    Ok(entries.into_iter().filter(|path| !FILES.contains(&super::file_name(path))).collect())
}
