//! What asks a job to stop: Ctrl-C, SIGTERM, a terminal that is gone, a scheduler's warning or limit.
//!
//! The first lets the loop finish its step and save, and is answered at once; who asks again ends the process.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::thread::JoinHandle;

use signal_hook::SigId;
use signal_hook::consts::{
    SIGALRM, SIGHUP, SIGINT, SIGQUIT, SIGTERM, SIGUSR1, SIGUSR2, SIGVTALRM, SIGXCPU, SIGXFSZ,
};
use signal_hook::flag;
use signal_hook::iterator::{Handle, Signals};

use crate::error::{Result, TrainError};

/// Exit status after a second signal: 128 + SIGINT, as shells report it.
const EXIT_INTERRUPTED: i32 = 130;

/// All that ends a process which does not listen, and that somebody sends so that it can save: a person, a terminal that
/// closes (SIGHUP), a batch system before or at a limit (SIGUSR1, SIGUSR2, SIGXCPU), a timer.
const STOPS: [i32; 9] = [SIGINT, SIGTERM, SIGHUP, SIGQUIT, SIGUSR1, SIGUSR2, SIGXCPU, SIGALRM, SIGVTALRM];
/// Those by which a person asks. Others come twice by themselves: a closed terminal and its shell both send SIGHUP, SIGXCPU
/// comes every second, and SIGTERM follows a scheduler's warning.
const PERSONAL: [i32; 3] = [SIGINT, SIGTERM, SIGQUIT];

/// A flag that the first signal which asks for a stop sets; when it is dropped, signals do again what they did before.
#[derive(Debug)]
pub struct StopSignal {
    flag: Arc<AtomicBool>,
    handlers: Vec<SigId>,
    listener: Option<(Handle, JoinHandle<()>)>,
}

impl StopSignal {
    /// Listens from now on. The first signal calls `told`, whatever the process is at; Ctrl-C after that, or a second
    /// SIGTERM, exits at once with status 130. What was ignored when the process began, as SIGHUP below `nohup`, stays so.
    ///
    /// # Errors
    /// [`TrainError::Internal`] when the system refuses the handlers.
    pub fn install(told: impl FnOnce() + Send + 'static) -> Result<Self> {
        let ignored = ignored();
        let stops: Vec<i32> = STOPS.into_iter().filter(|s| ignored & 1 << (s - 1) == 0).collect();
        defaults_while_nobody_listens(&stops)?;
        let mut stop = Self { flag: Arc::default(), handlers: Vec::new(), listener: None };
        count_listeners(1);
        let asked = Arc::new(AtomicBool::new(false));
        for &signal in &stops {
            // Handlers run in order: an exit looks at its flag before this signal sets it.
            let again = if signal == SIGTERM { &asked } else { &stop.flag };
            if PERSONAL.contains(&signal) {
                let exit = flag::register_conditional_shutdown(signal, EXIT_INTERRUPTED, Arc::clone(again));
                stop.handlers.push(exit.map_err(refused)?);
                let set = flag::register(signal, Arc::clone(&asked));
                stop.handlers.push(set.map_err(refused)?);
            }
            let set = flag::register(signal, Arc::clone(&stop.flag));
            stop.handlers.push(set.map_err(refused)?);
        }
        let mut signals = Signals::new(&stops).map_err(refused)?;
        let handle = signals.handle();
        let listen = move || {
            // One that came just before the end is answered, too.
            if signals.forever().next().is_some() || signals.pending().next().is_some() {
                told();
            }
        };
        let thread = std::thread::Builder::new().name("signals".into()).spawn(listen).map_err(refused)?;
        stop.listener = Some((handle, thread));
        Ok(stop)
    }

    /// Whether a signal has come, or [`request`](Self::request) was called.
    pub fn is_set(&self) -> bool {
        self.flag.load(Ordering::Relaxed)
    }

    /// Asks for the stop as a signal would.
    pub fn request(&self) {
        self.flag.store(true, Ordering::Relaxed);
    }
}

impl Drop for StopSignal {
    fn drop(&mut self) {
        for handler in self.handlers.drain(..) {
            signal_hook::low_level::unregister(handler);
        }
        if let Some((handle, thread)) = self.listener.take() {
            handle.close();
            // A panic of the one that was told has been printed.
            drop(thread.join());
        }
        count_listeners(-1);
    }
}

/// A file that outgrows the process's limit (`ulimit -f`) is then an error of its writing, in words, rather than the
/// silent end of the process.
///
/// # Errors
/// [`TrainError::Internal`] when the system refuses the handler.
pub fn survive_file_size_limit() -> Result<()> {
    flag::register(SIGXFSZ, Arc::default()).map(drop).map_err(refused)
}

/// Takes down that one [`StopSignal`] more or less listens.
fn count_listeners(more: isize) {
    static LISTENERS: Mutex<isize> = Mutex::new(0);
    let mut count = LISTENERS.lock().unwrap_or_else(PoisonError::into_inner);
    *count += more;
    idle().store(*count == 0, Ordering::SeqCst);
}

/// Whether nobody listens.
fn idle() -> &'static Arc<AtomicBool> {
    static IDLE: OnceLock<Arc<AtomicBool>> = OnceLock::new();
    IDLE.get_or_init(|| Arc::new(AtomicBool::new(true)))
}

/// A signal that was once listened to is never handed back to the system: this gives it its default again.
fn defaults_while_nobody_listens(stops: &[i32]) -> Result<()> {
    static DONE: OnceLock<()> = OnceLock::new();
    if DONE.set(()).is_ok() {
        for signal in stops {
            flag::register_conditional_default(*signal, Arc::clone(idle())).map_err(refused)?;
        }
    }
    Ok(())
}

/// The signals that the process ignores, a bit each; none where the system does not tell.
fn ignored() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    let mask = mask.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok()).unwrap_or_default();
    // A shell lets the jobs behind `&` ignore Ctrl-C; what is sent to the job itself is meant.
    mask & !(1 << (SIGINT - 1) | 1 << (SIGTERM - 1))
}

#[expect(clippy::needless_pass_by_value, reason = "shape of map_err")]
fn refused(error: std::io::Error) -> TrainError {
    TrainError::Internal(format!("cannot listen for signals: {error}"))
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::channel;
    use std::time::Duration;

    use super::*;

    #[test]
    fn every_signal_sets_the_flag_and_is_answered_once() {
        for signal in STOPS {
            let (told, hears) = channel();
            let stop = StopSignal::install(move || told.send(()).unwrap()).unwrap();
            assert!(!stop.is_set());
            signal_hook::low_level::raise(signal).unwrap();
            assert!(stop.is_set(), "{signal}");
            hears.recv_timeout(Duration::from_secs(20)).unwrap();
            if !PERSONAL.contains(&signal) {
                signal_hook::low_level::raise(signal).unwrap(); // comes again by itself
            }
        }
        let stop = StopSignal::install(|| panic!("nothing was asked")).unwrap();
        assert!(!stop.is_set(), "signals of before are not this one's");
    }

    #[test]
    fn a_file_beyond_the_limit_does_not_end_the_process() {
        survive_file_size_limit().unwrap();
        signal_hook::low_level::raise(SIGXFSZ).unwrap();
    }
}
