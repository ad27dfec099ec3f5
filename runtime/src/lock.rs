//! The sole right to a place among processes.
//!
//! It is a lock of the file system, which ends with the process however that ends. Where a file system has none (Lustre
//! without `flock`, NFS without its lock service, autofs), a file that only one process can create says who has the right.

use std::fmt;
use std::fs::{self, File, TryLockError};
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};
use std::process;

use serde::{Deserialize, Serialize};

use crate::error::{Result, RuntimeError};

/// What comes after a lock's name for the file that names its owner.
const OWNER: &str = ".owner";
/// Attempts to take over a right whose owner is gone, while others try the same.
const ATTEMPTS: usize = 8;

/// The sole right to what a lock file stands for; given back when it is dropped.
#[derive(Debug)]
pub struct Lock {
    _file: File,
    written: Option<Written>,
}

/// How an attempt to get a [`Lock`] ended.
#[derive(Debug)]
pub enum Tried {
    /// It is ours.
    Ours(Lock),
    /// Another process has it.
    Held(Holder),
}

/// Who has a [`Lock`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Holder {
    /// The file that names the owner, where the file system has no locks.
    note: Option<(PathBuf, Option<Owner>)>,
}

/// A process, told from all others.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Owner {
    host: String,
    pid: u32,
    /// When it was started, in the kernel's ticks: a number is given again to later processes.
    started: u64,
    /// The start of the machine and the process namespace in which the number means something.
    realm: String,
}

/// The file that names this process; removed when dropped.
#[derive(Debug)]
struct Written {
    path: PathBuf,
    /// What the file system answered to the request for a lock.
    reason: String,
}

impl Lock {
    /// Tries to get the right that the file `path` stands for; the file is made where it is not there.
    ///
    /// # Errors
    /// [`RuntimeError::Io`] when neither the lock file nor, where there are no locks, its owner's can be written.
    pub fn take(path: &Path) -> Result<Tried> {
        let file = File::options().write(true).create(true).truncate(false).open(path);
        let file = file.map_err(|e| RuntimeError::io("open", path, e))?;
        let mut note = path.as_os_str().to_owned();
        note.push(OWNER);
        let note = PathBuf::from(note);
        match file.try_lock() {
            // Another machine may see this file system without its locks.
            Ok(()) => Ok(match Holder::of(&note) {
                Some(holder) if !holder.is_gone() => Tried::Held(holder),
                _ => Tried::Ours(Self { _file: file, written: None }),
            }),
            Err(TryLockError::WouldBlock) => Ok(Tried::Held(Holder { note: None })),
            Err(TryLockError::Error(reason)) => Ok(match write_down(&note, &reason)? {
                Ok(written) => Tried::Ours(Self { _file: file, written: Some(written) }),
                Err(holder) => Tried::Held(holder),
            }),
        }
    }

    /// Where the file system has no locks: what it answered, and the file that stands in.
    pub fn stand_in(&self) -> Option<String> {
        let Written { path, reason } = self.written.as_ref()?;
        Some(format!(
            "this file system has no locks ({reason}): `{}` keeps other processes out instead",
            path.display()
        ))
    }
}

impl Drop for Written {
    fn drop(&mut self) {
        // Left behind, it is taken over by the next process of this machine.
        drop(fs::remove_file(&self.path));
    }
}

impl Holder {
    /// Whom an owner's file names; none where it is not there.
    fn of(note: &Path) -> Option<Self> {
        let text = match fs::read(note) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => return None,
            text => text.unwrap_or_default(),
        };
        Some(Self { note: Some((note.to_path_buf(), serde_json::from_slice(&text).ok())) })
    }

    /// Whether all that is known is what a file says: the process may be gone.
    pub fn is_written(&self) -> bool {
        self.note.is_some()
    }

    /// Whether it is a process of this machine that has ended.
    fn is_gone(&self) -> bool {
        let Some((_, Some(owner))) = &self.note else { return false };
        let Some(here) = Owner::here() else { return false };
        (&owner.host, &owner.realm) == (&here.host, &here.realm) && started(owner.pid) != Some(owner.started)
    }
}

impl fmt::Display for Holder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.note {
            None => f.write_str("another process"),
            Some((path, owner)) => {
                match owner {
                    Some(Owner { host, pid, .. }) => write!(f, "process {pid} on {host}")?,
                    None => f.write_str("a process")?,
                }
                write!(f, " (so says `{}`: remove that file if the process is gone)", path.display())
            }
        }
    }
}

impl Owner {
    /// This process; none where the system does not tell.
    fn here() -> Option<Self> {
        let told = |path: &str| fs::read_to_string(path).ok().map(|text| text.trim().to_owned());
        let namespace = fs::read_link("/proc/self/ns/pid").ok()?;
        let boot = told("/proc/sys/kernel/random/boot_id")?;
        let pid = process::id();
        Some(Self {
            host: told("/proc/sys/kernel/hostname")?,
            pid,
            started: started(pid)?,
            realm: format!("{boot} {}", namespace.display()),
        })
    }
}

/// When a process of this machine was started; none when it has ended.
fn started(pid: u32) -> Option<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name in parentheses may hold anything; the state comes first after it, the start as the twentieth.
    let fields: Vec<&str> = stat.rsplit_once(')')?.1.split_whitespace().collect();
    if matches!(*fields.first()?, "Z" | "X") {
        return None;
    }
    fields.get(19)?.parse().ok()
}

/// Creates the file that names this process, in the place of one whose process is gone.
fn write_down(note: &Path, reason: &io::Error) -> Result<Result<Written, Holder>> {
    let failed = |e| RuntimeError::io("write", note, e);
    for _ in 0..ATTEMPTS {
        match File::create_new(note) {
            Ok(mut file) => {
                let written = Written { path: note.to_path_buf(), reason: reason.to_string() };
                let owner = serde_json::to_string(&Owner::here()).map_err(|e| failed(e.into()))?;
                writeln!(file, "{owner}").map_err(failed)?;
                return Ok(Ok(written));
            }
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {}
            Err(e) => return Err(failed(e)),
        }
        let Some(holder) = Holder::of(note) else { continue };
        if !holder.is_gone() {
            return Ok(Err(holder));
        }
        // Under a name of our own it is looked at again: another process may have put its own file there meanwhile.
        let mut aside = note.as_os_str().to_owned();
        aside.push(format!(".{}", process::id()));
        let aside = PathBuf::from(aside);
        if fs::rename(note, &aside).is_ok() {
            if Holder::of(&aside).is_some_and(|h| !h.is_gone()) {
                drop(fs::hard_link(&aside, note));
            }
            fs::remove_file(&aside).map_err(failed)?;
        }
    }
    Ok(Err(Holder { note: Some((note.to_path_buf(), None)) }))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lacking() -> io::Error {
        io::Error::from_raw_os_error(libc::ENOSYS)
    }

    #[test]
    fn a_lock_is_one_process_at_a_time() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("lock");
        let Tried::Ours(lock) = Lock::take(&path).unwrap() else { panic!("it is free") };
        assert!(lock.stand_in().is_none());
        assert!(matches!(Lock::take(&path).unwrap(), Tried::Held(h) if h.to_string() == "another process"));
        drop(lock);
        assert!(matches!(Lock::take(&path).unwrap(), Tried::Ours(_)));
    }

    #[test]
    fn without_locks_a_file_names_the_owner_until_it_is_dropped() {
        let dir = tempfile::tempdir().unwrap();
        let (path, note) = (dir.path().join("lock"), dir.path().join("lock.owner"));
        let written = write_down(&note, &lacking()).unwrap().unwrap();
        let holder = write_down(&note, &lacking()).unwrap().unwrap_err();
        let words = holder.to_string();
        assert!(words.contains(&format!("process {} on ", process::id())), "{words}");
        assert!(
            words.contains("remove that file if the process is gone") && words.contains("lock.owner"),
            "{words}"
        );
        // Who has locks there is kept out, too.
        assert!(matches!(Lock::take(&path).unwrap(), Tried::Held(h) if h == holder));
        drop(written);
        assert!(!note.exists());
        assert!(matches!(Lock::take(&path).unwrap(), Tried::Ours(_)));
    }

    #[test]
    fn owners_that_are_gone_are_known_and_others_are_not_guessed() {
        let dir = tempfile::tempdir().unwrap();
        let note = dir.path().join("lock.owner");
        let here = Owner::here().unwrap();
        let ended = u32::MAX;
        for (owner, gone) in [
            (Some(Owner { pid: ended, ..here.clone() }), true),
            (Some(Owner { started: here.started + 1, ..here.clone() }), true),
            (Some(Owner { pid: ended, host: "elsewhere".into(), ..here.clone() }), false),
            (Some(Owner { pid: ended, realm: "another container".into(), ..here.clone() }), false),
            (Some(here), false),
            (None, false),
        ] {
            fs::write(&note, owner.as_ref().map_or(String::new(), |o| serde_json::to_string(o).unwrap()))
                .unwrap();
            let taken = write_down(&note, &lacking()).unwrap();
            assert_eq!(taken.is_ok(), gone, "{owner:?}");
            drop(taken);
        }
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1, "nothing is left beside it");
    }
}
