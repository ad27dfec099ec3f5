//! Ctrl-C and SIGTERM: the first asks the loop to finish its step and save, the second ends the process.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use signal_hook::SigId;
use signal_hook::consts::{SIGINT, SIGTERM};

use crate::error::{Result, TrainError};

/// Exit status after a second signal: 128 + SIGINT, as shells report it.
const EXIT_INTERRUPTED: i32 = 130;

/// A flag that SIGINT or SIGTERM sets; the handlers go when it is dropped.
#[derive(Debug)]
pub struct StopSignal {
    flag: Arc<AtomicBool>,
    handlers: Vec<SigId>,
}

impl StopSignal {
    /// Listens for SIGINT and SIGTERM from now on. A second signal exits at once with status 130.
    ///
    /// # Errors
    /// [`TrainError::Internal`] when the system refuses the handlers.
    pub fn install() -> Result<Self> {
        let mut stop = Self { flag: Arc::default(), handlers: Vec::new() };
        for signal in [SIGINT, SIGTERM] {
            // Handlers run in order: the exit looks at the flag before this signal sets it.
            let exit = signal_hook::flag::register_conditional_shutdown(
                signal,
                EXIT_INTERRUPTED,
                Arc::clone(&stop.flag),
            );
            stop.handlers.push(exit.map_err(refused)?);
            let set = signal_hook::flag::register(signal, Arc::clone(&stop.flag));
            stop.handlers.push(set.map_err(refused)?);
        }
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
    }
}

#[expect(clippy::needless_pass_by_value, reason = "shape of map_err")]
fn refused(error: std::io::Error) -> TrainError {
    TrainError::Internal(format!("cannot listen for signals: {error}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_signal_sets_the_flag() {
        let stop = StopSignal::install().unwrap();
        assert!(!stop.is_set());
        signal_hook::low_level::raise(SIGTERM).unwrap();
        assert!(stop.is_set());
    }
}
