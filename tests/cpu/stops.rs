//! Whoever asks a command to stop is answered at once; what is whole is kept, and the exit code says that it was not the end.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::process::Command;
use std::thread::sleep;
use std::time::Duration;

use mudit::STOPPED;
use train_engine::checkpoint;

use crate::process::{Finished, Running, mudit};
use crate::scene::Scene;
use crate::tiny_run::TinyRun;

/// Between two looks at a file or a text.
const WATCH: Duration = Duration::from_millis(2);

fn rows(run: &Path) -> usize {
    fs::read_to_string(run.join("metrics.jsonl")).map_or(0, |text| text.lines().count())
}

fn assert_stopped(done: &Finished, told: &str) {
    assert_eq!(done.code, Some(i32::from(STOPPED)), "{done}");
    assert!(done.stderr.contains("again ends at once"), "{done}");
    assert!(done.stderr.contains(told) && !done.stderr.contains("error:"), "{done}");
}

/// Waits until a command tells of its progress, and has had some time after that.
fn under_way(running: &Running, word: &str) {
    assert!(running.until(WATCH, || running.told().contains(word)), "{}", running.told());
    sleep(Duration::from_secs(1));
}

#[test]
fn whatever_asks_a_run_to_stop_it_saves() {
    let tiny = TinyRun::new();
    let run = tiny.path("run");
    let endless = ["train.steps=10000000", "checkpoint.every_steps=0", "log.tensorboard=false"];
    for signal in [libc::SIGHUP, libc::SIGUSR1, libc::SIGUSR2, libc::SIGXCPU, libc::SIGQUIT, libc::SIGALRM] {
        let begin = rows(&run);
        let running = tiny.train("run", &endless).start();
        assert!(running.until(WATCH, || rows(&run) > begin + 2));
        running.signal(signal);
        if [libc::SIGHUP, libc::SIGXCPU].contains(&signal) {
            running.signal(signal); // these come twice by themselves
        }
        let done = running.wait();
        let step = checkpoint::list(&run).unwrap().last().unwrap().0;
        assert_stopped(&done, &format!("stopped and saved after step {step}; the same command goes on"));
        assert!(step as usize > begin, "{done}");
    }
    // Below `nohup` the end of the terminal is nothing to a run.
    let begin = rows(&run);
    let running = tiny.train("run", &endless).ignoring("HUP").start();
    assert!(running.until(WATCH, || rows(&run) > begin + 2));
    running.signal(libc::SIGHUP);
    let seen = rows(&run);
    assert!(running.until(WATCH, || rows(&run) > seen + 3));
    running.signal(libc::SIGTERM);
    assert_stopped(&running.wait(), "stopped and saved");
}

#[test]
fn the_first_signal_is_answered_while_a_graph_compiles_and_the_second_ends_at_once() {
    let tiny = TinyRun::new();
    let deep = ["model.depth=160", "train.steps=100000"];
    let running = tiny.train("run", &deep).start();
    let lock = tiny.path("run/.lock");
    assert!(running.until(WATCH, || lock.exists()));
    running.signal(libc::SIGINT);
    assert!(
        running.until(WATCH, || running.told().contains("stopping after this step")),
        "{}",
        running.told()
    );
    assert!(!running.told().contains("compiled in"), "it was answered late: {}", running.told());
    running.signal(libc::SIGINT);
    assert_eq!(running.wait().code, Some(130));

    let running = tiny.train("run", &deep[1..]).start();
    let config = tiny.path("run/config.toml");
    assert!(running.until(WATCH, || fs::read_to_string(&config).is_ok_and(|t| t.contains("depth = 2"))));
    running.signal(libc::SIGTERM);
    let done = running.wait();
    let told = if checkpoint::list(&tiny.path("run")).unwrap().is_empty() {
        "before the first step"
    } else {
        "saved"
    };
    assert_stopped(&done, told);
}

#[test]
fn a_stopped_run_says_so_to_machines() {
    let tiny = TinyRun::new();
    let (out, run) = (tiny.text("run"), tiny.path("run"));
    let config = tiny.text("run.toml");
    let line =
        ["train", "--offline", "--config", &config, "--out", &out, "--set", "train.steps=10000000", "--json"];
    let running = mudit(line).start();
    assert!(running.until(WATCH, || rows(&run) > 2));
    running.signal(libc::SIGTERM);
    let done = running.wait();
    assert_stopped(&done, "saved after step");
    let report: serde_json::Value =
        serde_json::from_str(&done.stdout).unwrap_or_else(|e| panic!("{e}: {done}"));
    assert_eq!(report["outcome"], "interrupted");
}

#[test]
fn sampling_keeps_the_images_that_are_whole() {
    let scene = Scene::new();
    let sample =
        "sample --offline --checkpoint checkpoint --steps 2 --batch 4 --save-trajectory t.safetensors --out";
    let running = scene.mudit(&format!("{sample} part.safetensors,part.npz --count 60000")).start();
    under_way(&running, "sample ");
    running.signal(libc::SIGINT);
    let done = running.wait();
    let read = |name: &str| {
        runtime::read_safetensors_file(scene.path(name)).unwrap_or_else(|e| panic!("{e}: {done}"))
    };
    let (part, way) = (read("part.safetensors"), read("t.safetensors"));
    let kept = part["y"].shape().numel();
    assert!(kept > 0 && kept.is_multiple_of(4), "{done}");
    let rest = format!("--first {kept} --count {}", 60_000 - kept);
    assert_stopped(&done, &format!("the first {kept} of 60000 images were written; {rest} makes the rest"));
    assert_eq!(way["trajectory"].shape().numel(), 2 * part["samples"].shape().numel());
    assert!(scene.path("part.npz").is_file());

    scene.mudit(&format!("{sample} whole.safetensors --count {kept}")).succeeds();
    let whole = read("whole.safetensors");
    assert_eq!(whole["samples"].to_f32(), part["samples"].to_f32());
    assert_eq!(read("t.safetensors")["trajectory"].to_f32(), way["trajectory"].to_f32());
}

#[test]
fn checks_and_sweeps_that_are_stopped_are_not_done() {
    let scene = Scene::new();
    let check =
        "coord-check --offline --model checkpoint --widths 24,48 --steps 1 --batch 2 --seeds 100000 --out c";
    let running = scene.mudit(check).start();
    under_way(&running, "coord-check ");
    running.signal(libc::SIGTERM);
    assert_stopped(&running.wait(), "nothing was written");
    assert!(!scene.path("c").exists());

    let sweep = "config = \"run.toml\"\nmethod = \"grid\"\n[parameters]\n\"train.learning_rate\" = { values = [1e-3, 2e-3] }\n";
    scene.write("sweep.toml", sweep);
    let line = "sweep run --offline --config sweep.toml --set train.steps=10000000 --out s";
    let running = scene.mudit(line).start();
    under_way(&running, "sweep of ");
    running.signal(libc::SIGUSR1);
    assert_stopped(&running.wait(), "0 of 2 trials done; the same command goes on");
}

#[test]
fn clusters_start_a_stopped_worker_again_and_no_wrong_one() {
    let scene = Scene::new();
    let sweep = "config = \"run.toml\"\nmethod = \"grid\"\n[parameters]\n\"train.learning_rate\" = { values = [1e-3, 2e-3] }\n";
    scene.write("sweep.toml", sweep);
    let submit = |more: &str| {
        let line = ["sweep", "submit", "--offline", "--config", "sweep.toml", "--out", "a sweep's 100%"];
        mudit(line.into_iter().chain(more.split(' '))).within(&scene.path("")).succeeds()
    };
    let script = submit("--slurm");
    assert!(script.contains("#SBATCH --signal=USR1@") && script.contains("100%%/slurm-"), "{script}");
    scene.write("array.sh", &script);
    scene.write("bin/srun", "#!/bin/sh\nprintf '%s\\n' \"$@\" > words\nexit $CODE\n");
    scene.write("bin/scontrol", "#!/bin/sh\necho \"$@\" > requeued\n");
    for name in ["bin/srun", "bin/scontrol"] {
        fs::set_permissions(scene.path(name), fs::Permissions::from_mode(0o755)).unwrap();
    }
    let path = format!("{}:{}", scene.path("bin").display(), std::env::var("PATH").unwrap());
    for (code, restarts, again) in
        [(0, 0, false), (3, 0, true), (3, 500, true), (1, 0, true), (1, 20, false), (2, 0, false)]
    {
        let requeued = scene.path("requeued");
        drop(fs::remove_file(&requeued));
        let done = Command::new("bash")
            .arg(scene.path("array.sh"))
            .current_dir(scene.path(""))
            .env("PATH", &path)
            .env("CODE", code.to_string())
            .env("SLURM_RESTART_COUNT", restarts.to_string())
            .env("SLURM_ARRAY_TASK_ID", "1")
            .env("SLURM_ARRAY_JOB_ID", "7")
            .status()
            .unwrap();
        assert_eq!(done.code(), Some(code));
        assert_eq!(requeued.exists(), again, "code {code} after {restarts} restarts");
    }
    let words = fs::read_to_string(scene.path("words")).unwrap();
    assert!(words.contains(&format!("--out\n{}\n", scene.path("a sweep's 100%").display())), "{words}");

    let job = submit("--k8s --image i --claim c");
    for part in ["podFailurePolicy", "action: Ignore", "values: [3]", "action: FailIndex", "values: [2]"] {
        assert!(job.contains(part), "{part}: {job}");
    }
}
