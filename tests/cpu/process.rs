//! The binary as a child process: arguments in, exit code and texts out, under a time limit.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::os::unix::process::{CommandExt as _, ExitStatusExt as _};
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use mudit_tests::execution::onnx_runtime;
use tempfile::TempDir;

/// For one command on small inputs: it takes a second or two, so a hang is seen soon and a loaded machine passes.
const LIMIT: Duration = Duration::from_mins(3);
/// Between two looks at a child.
const PAUSE: Duration = Duration::from_millis(2);

/// A command line that is being put together.
pub(crate) struct Mudit {
    command: Command,
    texts: TempDir,
    line: String,
}

/// A command that runs; killed when it is dropped.
pub(crate) struct Running {
    child: Child,
    texts: TempDir,
    line: String,
    start: Instant,
    reaped: bool,
}

/// A command that ended.
pub(crate) struct Finished {
    /// Exit code; `None` after a signal.
    pub(crate) code: Option<i32>,
    /// The signal that ended it.
    pub(crate) signal: Option<i32>,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
    pub(crate) seconds: f64,
    /// Largest memory it ever held, in bytes.
    pub(crate) peak_bytes: u64,
    line: String,
}

/// `mudit` with arguments, on one thread and without fetching anything.
///
/// ONNX Runtime is found, or fetched, by this process first, so that a child finds it in the cache.
pub(crate) fn mudit(args: impl IntoIterator<Item = impl AsRef<OsStr>>) -> Mudit {
    onnx_runtime();
    let mut command = Command::new(env!("CARGO_BIN_EXE_mudit-under-test"));
    command.arg0("mudit").args(args).env("MUDIT_THREADS", "1").stdin(Stdio::null());
    let words: Vec<_> = command.get_args().map(|a| a.to_string_lossy().into_owned()).collect();
    let line = format!("mudit {}", words.join(" "));
    Mudit { command, texts: tempfile::tempdir().unwrap(), line }
}

impl Mudit {
    /// One more argument, as it is.
    pub(crate) fn with(mut self, argument: &str) -> Self {
        self.command.arg(argument);
        self.line = format!("{} {argument}", self.line);
        self
    }

    pub(crate) fn env(mut self, name: &str, value: impl AsRef<OsStr>) -> Self {
        self.command.env(name, value);
        self
    }

    /// The same line for a copy of the binary.
    pub(crate) fn program(mut self, copy: &Path) -> Self {
        self.command = Self::moved(&self.command, Command::new(copy));
        self
    }

    /// Another program with the arguments and surroundings of a command.
    fn moved(from: &Command, mut to: Command) -> Command {
        to.args(from.get_args()).stdin(Stdio::null());
        for (name, value) in from.get_envs() {
            to.env(name, value.unwrap_or_default());
        }
        if let Some(folder) = from.get_current_dir() {
            to.current_dir(folder);
        }
        to
    }

    pub(crate) fn within(mut self, folder: &Path) -> Self {
        self.command.current_dir(folder);
        self
    }

    /// Runs with a signal ignored, as `nohup` starts a program.
    pub(crate) fn ignoring(mut self, signal: &str) -> Self {
        let mut command = Command::new("sh");
        command
            .arg("-c")
            .arg(format!("trap '' {signal}; exec \"$0\" \"$@\""))
            .arg(self.command.get_program());
        self.command = Self::moved(&self.command, command);
        self
    }

    /// Runs as a user that owns nothing; only root can.
    pub(crate) fn by_user(mut self, id: u32) -> Self {
        self.command.uid(id).gid(id);
        self
    }

    /// Standard output goes to a pipe that nobody reads.
    pub(crate) fn into_broken_pipe(mut self) -> Running {
        let (reader, writer) = std::io::pipe().unwrap();
        drop(reader);
        self.command.stdout(writer);
        self.spawn()
    }

    pub(crate) fn start(mut self) -> Running {
        self.command.stdout(File::create(self.texts.path().join("out")).unwrap());
        self.spawn()
    }

    fn spawn(mut self) -> Running {
        self.command.stderr(File::create(self.texts.path().join("err")).unwrap());
        let start = Instant::now();
        let child = self.command.spawn().unwrap_or_else(|e| panic!("{}: {e}", self.line));
        Running { child, texts: self.texts, line: self.line, start, reaped: false }
    }

    /// Runs to the end.
    pub(crate) fn run(self) -> Finished {
        self.start().wait()
    }

    /// Runs to the end, which is a success; gives standard output.
    pub(crate) fn succeeds(self) -> String {
        let done = self.run();
        assert_eq!(done.code, Some(0), "{done}");
        done.stdout
    }

    /// [`succeeds`](Self::succeeds) with `--json`.
    pub(crate) fn json(mut self) -> serde_json::Value {
        self.command.arg("--json");
        let text = self.succeeds();
        serde_json::from_str(&text).unwrap_or_else(|e| panic!("{e}: {text}"))
    }
}

impl Running {
    pub(crate) fn id(&self) -> u32 {
        self.child.id()
    }

    /// What it wrote to standard output so far.
    pub(crate) fn said(&self) -> String {
        fs::read_to_string(self.texts.path().join("out")).unwrap_or_default()
    }

    /// What it wrote to standard error so far.
    pub(crate) fn told(&self) -> String {
        fs::read_to_string(self.texts.path().join("err")).unwrap_or_default()
    }

    /// Whether it runs still.
    pub(crate) fn is_alive(&self) -> bool {
        // A child that ended and is not waited for is a zombie.
        let stat = fs::read_to_string(format!("/proc/{}/stat", self.id())).unwrap_or_default();
        stat.rsplit(')').next().is_some_and(|rest| !rest.is_empty() && !rest.trim_start().starts_with('Z'))
    }

    /// Waits until `holds`, or until the command ends; whether it held.
    pub(crate) fn until(&self, pause: Duration, mut holds: impl FnMut() -> bool) -> bool {
        while self.is_alive() {
            if holds() {
                return true;
            }
            assert!(self.start.elapsed() < LIMIT, "{} takes longer than {LIMIT:?}", self.line);
            sleep(pause);
        }
        false
    }

    #[allow(unsafe_code, reason = "the standard library sends no signal but SIGKILL")]
    pub(crate) fn signal(&self, signal: i32) {
        // SAFETY: the child is not waited for yet, so the number is its own.
        let sent = unsafe { libc::kill(self.id() as i32, signal) };
        assert_eq!(sent, 0, "{}: {}", self.line, std::io::Error::last_os_error());
    }

    /// Waits for the end.
    ///
    /// # Panics
    /// When it takes longer than a minute, and when the command panicked.
    pub(crate) fn wait(mut self) -> Finished {
        let ended = self.until(PAUSE, || false);
        assert!(!ended);
        let (status, peak_bytes) = self.reap();
        let text = |name: &str| fs::read(self.texts.path().join(name)).unwrap_or_default();
        let [stdout, stderr] = ["out", "err"].map(|n| String::from_utf8_lossy(&text(n)).into_owned());
        let seconds = self.start.elapsed().as_secs_f64();
        let (code, signal, line) = (status.code(), status.signal(), self.line.clone());
        let done = Finished { code, signal, stdout, stderr, seconds, peak_bytes, line };
        assert!(!done.stderr.contains("panicked at"), "{done}");
        done
    }

    #[allow(unsafe_code, reason = "the standard library does not tell a child's memory")]
    fn reap(&mut self) -> (ExitStatus, u64) {
        let mut status = 0;
        // SAFETY: all zeros is a valid rusage, and both pointers are to locals that outlive the call.
        let (waited, usage) = unsafe {
            let mut usage: libc::rusage = std::mem::zeroed();
            (libc::wait4(self.child.id() as i32, &raw mut status, 0, &raw mut usage), usage)
        };
        assert_eq!(waited, self.child.id() as i32, "{}", std::io::Error::last_os_error());
        self.reaped = true;
        (ExitStatus::from_raw(status), usage.ru_maxrss as u64 * 1024)
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if !self.reaped {
            drop(self.child.kill());
            drop(self.child.wait());
        }
    }
}

impl std::fmt::Display for Finished {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { code, signal, stdout, stderr, line, .. } = self;
        write!(f, "{line}\nexit code {code:?}, signal {signal:?}\n{stdout}\n{stderr}")
    }
}

impl Finished {
    /// Its one error, with its causes.
    pub(crate) fn error(&self) -> String {
        let lines: Vec<&str> = self.stderr.lines().collect();
        let starts: Vec<usize> = (0..lines.len()).filter(|i| lines[*i].starts_with("error: ")).collect();
        assert_eq!(starts.len(), 1, "one error is told: {self}");
        lines[starts[0]..].join("\n")
    }

    /// Checks that it failed with a code and an error that names all of `parts`.
    pub(crate) fn refuses(&self, code: i32, parts: &[&str]) {
        assert_eq!(self.code, Some(code), "{self}");
        let error = self.error();
        for part in parts {
            assert!(error.contains(part), "`{part}` is not named: {self}");
        }
    }
}
