//! The binary `mudit`: parses, runs, maps the outcome to an exit code.

use std::env;
use std::process::ExitCode;

use mudit::TF32;

fn main() -> ExitCode {
    // f32 means f32 in all of NVIDIA's libraries, which look here once, when they are loaded. Who says otherwise is heard.
    if env::var_os(TF32).is_none() {
        #[allow(unsafe_code, reason = "the environment of the process")]
        // SAFETY: no other thread runs yet.
        unsafe {
            env::set_var(TF32, "0");
        };
    }
    mudit::run_from_env()
}
