//! Sweeps as a user runs them: compiled once, killed, shared between workers, collected, judged, transferred.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::os::unix::fs::{PermissionsExt as _, symlink};
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use mudit_tests::draws::Draws;
use train_engine::metrics;
use train_engine::sweep::{Event, Journals, Status};

use crate::process::{Mudit, mudit};
use crate::tiny_run::TinyRun;

/// Between two looks at a folder.
const WATCH: Duration = Duration::from_millis(1);

const GRID: &str = r#"
config = "run.toml"
head_size = 12
[parameters]
"model.hidden_size" = { values = [24, 48] }
"train.learning_rate" = { octaves = [-10, -8] }
"train.seed" = { values = [0, 1] }
[variants.muP]
"mup.enabled" = true
[variants.SP]
"mup.enabled" = false
"mup.init" = "dit"
"#;

fn sweep(tiny: &TinyRun, what: &str, out: &str, more: &[&str]) -> Mudit {
    let (config, out) = (tiny.text("sweep.toml"), tiny.text(out));
    let line = ["sweep", what, "--offline", "--config", &config, "--out", &out];
    mudit(line.into_iter().chain(more.iter().copied()))
}

fn events(folder: &Path) -> Vec<Event> {
    Journals::open(folder).unwrap_or_else(|e| panic!("{e}")).events
}

/// How often each trial began and ended.
fn counts(folder: &Path) -> BTreeMap<String, (usize, usize)> {
    let mut counts: BTreeMap<String, (usize, usize)> = BTreeMap::new();
    for event in events(folder) {
        match event {
            Event::Started { id, .. } => counts.entry(id).or_default().0 += 1,
            Event::Ended(result) => counts.entry(result.id).or_default().1 += 1,
            _ => {}
        }
    }
    counts
}

#[test]
fn a_grid_is_run_on_one_step_a_shape_and_its_losses_are_those_of_a_training() {
    let tiny = TinyRun::new();
    fs::write(tiny.path("sweep.toml"), GRID).unwrap();
    let short = ["--set", "train.steps=12"];
    let planned = sweep(&tiny, "plan", "s", &short).json();
    assert_eq!(
        (planned["trials"].as_u64(), planned["compilations"].as_u64()),
        (Some(24), Some(2)),
        "{planned}"
    );
    assert!(planned["hours"].as_f64().unwrap() > 0.0);
    let given = sweep(&tiny, "plan", "s", &[&short[..], &["--gflops", "1"]].concat()).json();
    let hours = given["flops"].as_f64().unwrap() / 1e9 / 3600.0;
    assert!((given["hours"].as_f64().unwrap() - hours).abs() < 1e-9 * hours, "{given}");

    let done = sweep(&tiny, "run", "s", &short).json();
    assert_eq!(
        (done["done"].as_u64(), done["this_worker"]["compilations"].as_u64()),
        (Some(24), Some(2)),
        "{done}"
    );
    // Another variant shares the step, so muP and SP of a width stand together.
    let collected = mudit(["sweep", "collect", "--offline", "--out", &tiny.text("s")]).json();
    let curves = collected["curves"].as_array().unwrap();
    assert_eq!((curves.len(), collected["compilations"].as_u64()), (4, Some(2)), "{collected}");
    assert!(curves.iter().all(|c| c["points"].as_array().unwrap().len() == 3 && c["best"].is_u64()));
    let on_edge = curves.iter().filter(|c| c["edge"].as_bool().unwrap()).count();
    assert_eq!(
        collected["warnings"].as_array().unwrap().len(),
        on_edge,
        "an optimum on the edge is told: {collected}"
    );
    let csv = fs::read_to_string(tiny.path("s/trials.csv")).unwrap();
    assert_eq!(csv.lines().count(), 25);
    let svg = fs::read_to_string(tiny.path("s/collect.svg")).unwrap();
    assert!(
        svg.contains("width 24") && svg.contains("width 48") && svg.contains(">muP<") && svg.contains(">SP<")
    );

    // The same run by itself.
    let line = csv.lines().find(|l| l.contains(",muP,48,0.00390625,1,")).unwrap_or_else(|| panic!("{csv}"));
    let loss: f64 = line.split(',').nth(7).unwrap().parse().unwrap();
    let set = [
        "train.steps=12",
        "model.hidden_size=48",
        "model.num_heads=4",
        "train.learning_rate=0.00390625",
        "train.seed=1",
    ];
    tiny.train("alone", &set).succeeds();
    let rows = metrics::read(&tiny.path("alone/metrics.jsonl")).unwrap();
    let last: Vec<f64> =
        rows[rows.len() - 3..].iter().map(|(_, row)| row["loss"].as_f64().unwrap()).collect();
    let alone = last.iter().sum::<f64>() / 3.0;
    assert!((loss - alone).abs() <= 1e-12 * alone, "{loss} in the sweep, {alone} alone");

    // The verdict on the widths, and on the steps by the runs' own first parts.
    let judged = mudit(["transfer", "--offline", "--sweep", &tiny.text("s")]).json();
    let verdicts = judged["verdicts"].as_array().unwrap();
    let of = |algorithm: u64| verdicts.iter().filter(|v| v["algorithm"].as_u64() == Some(algorithm)).count();
    assert_eq!((of(1), of(2), of(3)), (2, 0, 4), "{judged}");
    assert!(verdicts.iter().all(|v| v["verdict"]["shift"].is_number() && v["verdict"]["stays"].is_boolean()));

    // Wider than before: what is there stays.
    fs::write(tiny.path("sweep.toml"), GRID.replace("[-10, -8]", "[-10, -7]")).unwrap();
    let wider = sweep(&tiny, "run", "s", &short).json();
    assert_eq!(
        (wider["done"].as_u64(), wider["this_worker"]["ended"].as_u64()),
        (Some(32), Some(8)),
        "{wider}"
    );
}

const RANDOM: &str = r#"
config = "run.toml"
method = "random"
run_cap = 80
[parameters]
"train.learning_rate" = { distribution = "log_uniform_values", min = 1e-4, max = 1e3 }
"train.clip" = { distribution = "log_uniform_values", min = 0.01, max = 100.0 }
"train.warmup_steps" = { distribution = "int_log_uniform", min = 1, max = 6 }
"mup.output_multiplier" = { octaves = [-6, 6] }
"objective.vb_weight" = { distribution = "uniform", min = 0.1, max = 1.0 }
"mup.init_scale" = { values = [0.5, 1.0, 2.0] }
"#;

#[test]
fn eighty_random_trials_share_one_compiled_step_and_divergence_is_a_result() {
    let tiny = TinyRun::new();
    fs::write(tiny.path("sweep.toml"), RANDOM).unwrap();
    let done = sweep(&tiny, "run", "s", &["--set", "train.steps=15", "--set", "model.depth=1"]).json();
    assert_eq!(
        (done["done"].as_u64(), done["compilations_of_all_workers"].as_u64()),
        (Some(80), Some(1)),
        "{done}"
    );
    assert!((0.0..1.0).contains(&done["overhead"].as_f64().unwrap()), "{done}");
    let journals = Journals::open(&tiny.path("s")).unwrap();
    let results = journals.results();
    let diverged: Vec<_> = results.values().filter(|r| r.status == Status::Diverged).collect();
    assert!(diverged.len() > 5 && diverged.len() < 75, "{} diverged", diverged.len());
    assert!(
        diverged.iter().all(|r| r.loss.is_none()) && diverged.iter().any(|r| r.steps < 15),
        "they end early"
    );
    let text = mudit(["sweep", "collect", "--offline", "--out", &tiny.text("s")]).succeeds();
    assert!(text.contains("80 of 80 trials have results") && text.contains("1 compilations"), "{text}");
    let svg = fs::read_to_string(tiny.path("s/collect.svg")).unwrap();
    assert!(svg.contains("mup.output_multiplier") && svg.contains("objective.vb_weight"));

    // Another judge's numbers.
    let trial = results.values().find(|r| r.status == Status::Finished).unwrap().trial.to_string();
    let tell = |trial: &str, metric: &str| {
        mudit(["sweep", "tell", "--offline", "--out", &tiny.text("s"), "--trial", trial, metric])
    };
    tell(&trial, "fid=12.5").succeeds();
    let by_fid = mudit(["sweep", "collect", "--offline", "--metric", "fid", "--out", &tiny.text("s")]).json();
    assert_eq!(by_fid["best"]["mean"].as_f64(), Some(12.5), "{by_fid}");
    tell("80", "fid=1").run().refuses(2, &["trial 80 is not in 0..80"]);
    tell(&trial, "fid").run().refuses(2, &["`fid` is no METRIC=VALUE"]);
}

#[test]
fn twenty_kills_lose_no_finished_trial_and_repeat_none() {
    const KILLS: usize = 20;
    let tiny = TinyRun::new();
    let grid =
        GRID.replace("[-10, -8]", "[-13, -8]").replace("[24, 48]", "[24]").replace("[0, 1]", "[0, 1, 2, 3]");
    fs::write(tiny.path("sweep.toml"), grid).unwrap();
    let folder = tiny.path("s");
    let mut draws = Draws::named("ends of workers");
    let (mut killed, mut finished, mut torn) = (0, BTreeSet::new(), 0);
    while killed < KILLS {
        let before = counts(&folder).values().map(|(started, _)| started).sum::<usize>();
        let worker = sweep(&tiny, "run", "s", &["--set", "train.steps=200"]).start();
        // From its first trial on, at any moment of the next ones; all the delays together are a small part of the sweep.
        let begins = || counts(&folder).values().map(|(started, _)| started).sum::<usize>() > before;
        assert!(worker.until(WATCH, begins), "all trials were done after {killed} kills");
        let delay = Duration::from_millis(draws.below(150) as u64);
        let begin = Instant::now();
        worker.until(WATCH, || begin.elapsed() > delay);
        worker.signal(libc::SIGKILL);
        assert_eq!(worker.wait().signal, Some(libc::SIGKILL));
        killed += 1;
        let now: BTreeSet<String> =
            counts(&folder).into_iter().filter(|(_, (_, ended))| *ended > 0).map(|(id, _)| id).collect();
        assert!(finished.is_subset(&now), "a finished trial is gone");
        finished = now;
        if killed % 5 == 0 {
            // As a machine that loses its power would leave it.
            let journal = folder.join(format!("journal/worker-{:04}.jsonl", killed - 1));
            let text = fs::read_to_string(&journal).unwrap();
            fs::write(&journal, format!("{text}{{\"event\":\"ended\",\"id\":\"")).unwrap();
            torn += 1;
        }
    }
    let done = sweep(&tiny, "run", "s", &["--set", "train.steps=200"]).json();
    assert_eq!(done["done"], done["trials"], "{done}");
    let counts = counts(&folder);
    assert_eq!(counts.len(), done["trials"].as_u64().unwrap() as usize);
    assert!(counts.values().all(|(_, ended)| *ended == 1), "a trial was repeated: {counts:?}");
    let started: usize = counts.values().map(|(started, _)| started).sum();
    println!(
        "{KILLS} kills, {} of {} trials done by then, {started} starts, {torn} torn lines",
        finished.len(),
        counts.len()
    );
    assert!(started <= counts.len() + KILLS, "only trials that were cut are begun again: {started}");
}

#[test]
fn two_workers_share_the_trials_and_do_none_twice() {
    let tiny = TinyRun::new();
    fs::write(tiny.path("sweep.toml"), GRID.replace("[0, 1]", "[0, 1, 2]")).unwrap();
    let start = || sweep(&tiny, "run", "s", &["--set", "train.steps=40", "--json"]).start();
    let workers = [start(), start()];
    let reports = workers.map(|worker| {
        let done = worker.wait();
        assert_eq!(done.code, Some(0), "{done}");
        serde_json::from_str::<serde_json::Value>(&done.stdout).unwrap()
    });
    let ended: Vec<u64> = reports.iter().map(|r| r["this_worker"]["ended"].as_u64().unwrap()).collect();
    assert_eq!(ended.iter().sum::<u64>(), 36, "{reports:?}");
    let counts = counts(&tiny.path("s"));
    assert_eq!(counts.len(), 36);
    assert!(counts.values().all(|c| *c == (1, 1)), "{counts:?}");
    println!("two workers did {ended:?} trials");
}

#[test]
fn a_cluster_runs_the_sweep_with_the_scripts_as_they_are() {
    let tiny = TinyRun::new();
    fs::write(tiny.path("sweep.toml"), GRID).unwrap();
    let script = tiny.text("array.sh");
    let short = ["--set", "train.steps=3", "--tasks", "2", "--cpus", "1"];
    sweep(&tiny, "submit", "s", &[&short[..], &["--slurm", "--gpus", "1", "--script", &script]].concat())
        .succeeds();
    let text = fs::read_to_string(&script).unwrap();
    for part in ["#SBATCH --array=0-1", "#SBATCH --requeue", "#SBATCH --gpus-per-task=1", "--of 2"] {
        assert!(text.contains(part), "{part}: {text}");
    }
    // A cluster of one machine: `srun` runs what it is given.
    let bin = tiny.path("bin");
    fs::create_dir(&bin).unwrap();
    symlink(env!("CARGO_BIN_EXE_mudit-under-test"), bin.join("mudit")).unwrap();
    fs::write(bin.join("srun"), "#!/bin/sh\nexec \"$@\"\n").unwrap();
    fs::set_permissions(bin.join("srun"), fs::Permissions::from_mode(0o755)).unwrap();
    let path = format!("{}:{}", bin.display(), std::env::var("PATH").unwrap());
    for (task, expected) in [("0", 12), ("1", 24)] {
        let done = Command::new("bash")
            .arg(&script)
            .env("PATH", &path)
            .env("SLURM_ARRAY_TASK_ID", task)
            .output()
            .unwrap();
        assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
        assert_eq!(counts(&tiny.path("s")).len(), expected);
    }
    let k8s = ["--k8s", "--image", "registry/mudit:1", "--claim", "data"];
    let job = sweep(&tiny, "submit", "s", &[&short[..], &k8s].concat()).succeeds();
    for part in ["completionMode: Indexed", "completions: 2", "$JOB_COMPLETION_INDEX", "claimName: \"data\""]
    {
        assert!(job.contains(part), "{part}: {job}");
    }
    sweep(&tiny, "submit", "s", &["--k8s"]).run().refuses(2, &["--image", "--claim"]);
    sweep(&tiny, "run", "s", &["--index", "2", "--of", "2"])
        .run()
        .refuses(2, &["--index 2 is not below --of 2"]);
    mudit(["sweep", "run", "--out", &tiny.text("none")])
        .run()
        .refuses(2, &["no sweep", "--config FILE.toml"]);
}

#[test]
fn a_target_is_trained_with_the_proxys_best_settings_and_its_cost_told() {
    let tiny = TinyRun::new();
    let spec = r#"
        config = "run.toml"
        head_size = 12
        [parameters]
        "train.learning_rate" = { octaves = [-9, -7] }
        "train.seed" = { values = [0, 1] }
        [target]
        "model.hidden_size" = 48
        "train.steps" = 30
        [baseline]
        "mup.enabled" = false
        "train.learning_rate" = 1e-4
    "#;
    fs::write(tiny.path("sweep.toml"), spec).unwrap();
    let (config, out) = (tiny.text("sweep.toml"), tiny.text("t"));
    let line = ["transfer", "--offline", "--config", &config, "--out", &out, "--set", "train.steps=10"];
    let report = mudit(line).json();
    let parameters = |width: &str| {
        let set =
            ["--set", "train.steps=1", "--set", &format!("model.hidden_size={width}")].map(str::to_owned);
        let plan = mudit(
            ["sweep", "plan", "--offline", "--gflops", "1", "--config", &config, "--out", &tiny.text("p")]
                .into_iter()
                .map(str::to_owned)
                .chain(set),
        );
        plan.json()["shapes"][0]["parameters"].as_f64().unwrap()
    };
    // Six trials of 10 steps against one of 30, at one batch: equation (1).
    let expected = 6.0 * parameters("24") * 10.0 / (parameters("48") * 30.0);
    let ratio = report["cost_ratio"]["parameter_images"].as_f64().unwrap();
    assert!((ratio - expected).abs() < 1e-9, "{ratio}, expected {expected}");
    assert!(report["cost_ratio"]["seconds"].as_f64().unwrap() > 0.0);
    assert!(report["gain"].is_number() && report["target_loss"].is_number(), "{report}");
    let best = report["best"]["set"]["train.learning_rate"].as_f64().unwrap();
    let saved = |run: &str| -> toml::Table {
        fs::read_to_string(tiny.path("t").join(run).join("config.toml")).unwrap().parse().unwrap()
    };
    let (target, baseline) = (saved("target"), saved("baseline"));
    assert_eq!(target["train"]["learning_rate"].as_float(), Some(best));
    assert_eq!(target["model"]["hidden_size"].as_integer(), Some(48));
    assert_eq!(target["model"]["num_heads"].as_integer(), Some(4));
    assert_eq!(
        (baseline["mup"]["enabled"].as_bool(), baseline["train"]["learning_rate"].as_float()),
        (Some(false), Some(1e-4))
    );
    // All is done: nothing runs again.
    let before = fs::read(tiny.path("t/target/metrics.jsonl")).unwrap();
    assert_eq!(mudit(line).json()["target_loss"], report["target_loss"]);
    assert_eq!(fs::read(tiny.path("t/target/metrics.jsonl")).unwrap(), before);
    mudit(["transfer", "--offline"]).run().refuses(2, &["--sweep FOLDER"]);
}
