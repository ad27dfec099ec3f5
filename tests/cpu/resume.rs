//! Runs that are killed or stopped at any moment and started again end with the bytes of an undisturbed run.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::LazyLock;
use std::time::{Duration, Instant};

use mudit_tests::draws::Draws;
use train_engine::checkpoint;

use crate::tiny_run::{TinyRun, assert_same_result, losses};

/// Between two looks at a directory that is about to change.
const WATCH: Duration = Duration::from_micros(100);

/// A run that nobody disturbed.
static UNDISTURBED: LazyLock<TinyRun> = LazyLock::new(|| {
    let tiny = TinyRun::new();
    tiny.train("run", &[]).succeeds();
    tiny
});

fn undisturbed() -> PathBuf {
    UNDISTURBED.path("run")
}

/// Hidden directories of a run: checkpoints in the making, or on their way out.
fn hidden(run: &Path) -> Vec<String> {
    let entries = fs::read_dir(run.join("checkpoints")).into_iter().flatten();
    let names = entries.map(|e| e.unwrap().file_name().to_string_lossy().into_owned());
    names.filter(|n| n.starts_with('.')).collect()
}

/// Every checkpoint that has its name is whole, and so is the one that `latest` points to.
fn assert_whole(run: &Path) {
    for (step, path) in checkpoint::list(run).unwrap() {
        let state = checkpoint::verify(&path).unwrap_or_else(|e| panic!("{e}"));
        assert_eq!(state.step, step);
    }
    let latest = run.join("checkpoints/latest");
    if latest.symlink_metadata().is_ok() {
        checkpoint::verify(&latest).unwrap_or_else(|e| panic!("{e}"));
    }
}

fn rows(run: &Path) -> usize {
    fs::read_to_string(run.join("metrics.jsonl")).map_or(0, |text| text.lines().count())
}

/// Waits without giving the processor away: a sleep would be longer than a file takes.
fn spin(time: Duration) {
    let start = Instant::now();
    while start.elapsed() < time {
        std::hint::spin_loop();
    }
}

#[test]
fn a_run_that_is_killed_again_and_again_ends_as_if_it_had_not_been() {
    let tiny = TinyRun::new();
    let run = tiny.path("run");
    let mut draws = Draws::named("moments of death");
    let (mut killed, mut in_writing) = (0, 0);
    for attempt in 0.. {
        let running = tiny.train("run", &[]).start();
        let delay = Duration::from_micros(draws.below(4_000) as u64);
        let hit = match attempt {
            0..8 if attempt % 2 == 0 => {
                let mark = format!("-{}", running.id()); // this process's, not one left behind
                let hit = running.until(WATCH, || hidden(&run).iter().any(|name| name.ends_with(&mark)));
                spin(delay);
                hit
            }
            0..8 => {
                let begin = rows(&run);
                let hit = running.until(WATCH, || rows(&run) != begin);
                spin(delay * 10);
                hit
            }
            8..12 => {
                let begin = Instant::now();
                running.until(WATCH, || begin.elapsed() > delay * 60)
            }
            _ => false,
        };
        if !hit {
            let done = running.wait();
            assert_eq!(done.code, Some(0), "{done}");
            break;
        }
        running.signal(libc::SIGKILL);
        let done = running.wait();
        assert!(done.signal == Some(libc::SIGKILL) || done.code == Some(0), "{done}");
        killed += usize::from(done.signal.is_some());
        in_writing += usize::from(hidden(&run).iter().any(|name| name.contains(".new-")));
        assert_whole(&run);
    }
    println!("killed {killed} times, {in_writing} of them in the midst of a checkpoint");
    assert!(killed >= 8, "the run was killed only {killed} times");
    assert_same_result(&run, &undisturbed(), "killed");
    assert_eq!(hidden(&run), Vec::<String>::new());
}

#[test]
fn a_signal_ends_a_run_with_a_checkpoint_and_exit_code_3() {
    let tiny = TinyRun::new();
    let run = tiny.path("run");
    for signal in [libc::SIGTERM, libc::SIGINT] {
        let begin = rows(&run);
        let running = tiny.train("run", &[]).start();
        assert!(running.until(WATCH, || rows(&run) > begin + 2));
        running.signal(signal);
        let done = running.wait();
        assert_eq!(done.code, Some(3), "{done}");
        let step = checkpoint::list(&run).unwrap().last().unwrap().0;
        assert!(step < 80, "it went on to step {step}");
        assert!(done.stderr.contains(&format!("stopped and saved after step {step};")), "{done}");
        assert_eq!(losses(&run).last().unwrap().0, step);
        assert_whole(&run);
    }
    let done = tiny.train("run", &[]).run();
    assert!(done.stderr.contains("going on after step "), "{done}");
    assert_same_result(&run, &undisturbed(), "stopped by signals");
}

#[test]
fn the_number_of_threads_changes_no_bit() {
    let tiny = TinyRun::new();
    tiny.train("run", &["train.threads=2", "data.workers=3", "data.prefetch=1"]).succeeds();
    assert_same_result(&tiny.path("run"), &undisturbed(), "two threads");

    // Products that are cut into many tasks.
    let larger = ["train.steps=4", "train.batch_size=48", "model.hidden_size=96", "model.num_heads=3"];
    for threads in ["1", "2"] {
        let count = format!("train.threads={threads}");
        tiny.train(threads, &[&larger[..], &[&count, "model.patch_size=2"]].concat()).succeeds();
    }
    assert_same_result(&tiny.path("2"), &tiny.path("1"), "a larger model on two threads");
}

#[test]
fn a_finished_run_says_so_and_goes_on_when_asked() {
    let tiny = TinyRun::new();
    let (run, half) = (tiny.path("run"), "train.steps=40");
    tiny.train("run", &[half]).succeeds();
    let before = fs::read(run.join("metrics.jsonl")).unwrap();
    let said = tiny.train("run", &[half]).succeeds();
    assert!(said.contains("has its 40 steps") && said.contains("--set train.steps=80"), "{said}");
    let report = tiny.train("run", &[half]).json();
    assert_eq!((report["outcome"].as_str(), report["step"].as_u64()), (Some("already-finished"), Some(40)));
    assert_eq!(fs::read(run.join("metrics.jsonl")).unwrap(), before);

    let report = tiny.train("run", &[]).json();
    assert_eq!((report["outcome"].as_str(), report["step"].as_u64()), (Some("finished"), Some(80)));
    assert_same_result(&run, &undisturbed(), "extended");
}

#[test]
fn a_checkpoint_that_was_damaged_is_passed_over() {
    let tiny = TinyRun::new();
    let run = tiny.path("run");
    tiny.train("run", &["train.steps=40"]).succeeds();
    let model = run.join("checkpoints/step-00000040/model.safetensors");
    let bytes = fs::read(&model).unwrap();
    fs::write(&model, &bytes[..bytes.len() - 1]).unwrap();
    let done = tiny.train("run", &[]).run();
    assert_eq!(done.code, Some(0), "{done}");
    assert!(
        done.stderr.contains("step-00000040") && done.stderr.contains("going on after step 35"),
        "{done}"
    );
    assert_same_result(&run, &undisturbed(), "after damage");
}

#[test]
fn a_run_has_one_writer() {
    let tiny = TinyRun::new();
    let run = tiny.path("run");
    let first = tiny.train("run", &["train.steps=100000"]).start();
    assert!(first.until(WATCH, || rows(&run) > 0));
    tiny.train("run", &["train.steps=100000"]).run().refuses(1, &["another process is training in", "run`"]);
    first.signal(libc::SIGINT);
    assert_eq!(first.wait().code, Some(3));
}
