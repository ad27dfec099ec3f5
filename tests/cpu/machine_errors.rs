//! What a machine may lack: the library, room, permission, a GPU, a reader. One message says what and what to do.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use mudit_tests::execution::onnx_runtime;
use train_engine::checkpoint;

use crate::process::{Finished, mudit};
use crate::scene::{Scene, contents};
use crate::tiny_run::{TinyRun, assert_same_result};

/// Commands that write, each to `{}`.
const WRITERS: [&str; 5] = [
    "train --offline --config run.toml --out {}",
    "sample --offline --checkpoint checkpoint --steps 2 --count 2 --out {}/x.png",
    "sample --offline --checkpoint checkpoint --steps 2 --count 2 --out {}/x.npz",
    "build-engine --model checkpoint --program loss --provider none --out {}",
    "replay --offline --model checkpoint --weights checkpoint/model.safetensors --batches batches.safetensors --out {}/o",
];

#[test]
fn a_library_that_cannot_be_used_is_named() {
    let scene = Scene::new();
    let sample = "sample --checkpoint checkpoint --steps 2 --count 1 --out x.png";
    let with = |library: &str| scene.mudit(sample).env("ORT_DYLIB_PATH", library);
    scene.untouched(
        with("/nowhere/libonnxruntime.so"),
        1,
        &["/nowhere/libonnxruntime.so", "no such file", "ORT_DYLIB_PATH"],
    );
    scene.untouched(with("data"), 1, &["data", "not a file"]);
    scene.untouched(
        with("run.toml"),
        1,
        &["cannot use the ONNX Runtime library run.toml", "set ORT_DYLIB_PATH"],
    );
    if let Some(other) = another_library() {
        scene.untouched(with(&other), 1, &[&other, "set ORT_DYLIB_PATH"]);
    }
}

/// A shared library that is not ONNX Runtime: one that this process has loaded.
fn another_library() -> Option<String> {
    let maps = fs::read_to_string("/proc/self/maps").ok()?;
    maps.lines()
        .filter_map(|l| l.split_whitespace().last())
        .find(|p| p.contains("/libc.so"))
        .map(str::to_owned)
}

#[test]
fn nothing_is_fetched_offline() {
    let scene = Scene::new();
    fs::create_dir(scene.path("cache")).unwrap();
    fs::create_dir(scene.path("no programs")).unwrap();
    let bare = |line: &str| {
        let (cache, path) = (scene.path("cache"), scene.path("no programs"));
        scene.mudit(line).env("MUDIT_CACHE", cache).env("PATH", path).env("ORT_DYLIB_PATH", "")
    };
    let sample = "sample --checkpoint checkpoint --steps 2 --count 1 --out x.png";
    scene.untouched(
        bare(&format!("{sample} --offline")),
        1,
        &["ONNX Runtime 1.31.1", "--offline", "ORT_DYLIB_PATH"],
    );
    bare(sample).run().refuses(1, &["python3", "ORT_DYLIB_PATH"]);
    assert!(contents(&scene.path("cache")).keys().all(|p| p.is_dir()), "a fetch that failed left files");
    // What needs no library works without one.
    bare("inspect checkpoint").succeeds();
    bare("build-engine --model checkpoint --program loss --provider none --out e").succeeds();

    let doctor = bare("doctor").run();
    let products = |text: &str| text.lines().any(|l| l.contains("f32 products") && l.contains("  ok  "));
    assert!(products(&doctor.stdout), "{doctor}");
    assert!(!products(&bare("doctor").env("NVIDIA_TF32_OVERRIDE", "1").run().stdout));
    doctor.refuses(1, &["training and sampling on the CPU lack"]);
    assert!(doctor.stdout.contains("missing") && doctor.stdout.contains("→"), "{doctor}");
    if Path::new("/usr/share/datasets/fashion-mnist").exists() {
        println!("not tried: Fashion-MNIST is installed as a package here, so it is never missing");
    } else {
        scene.untouched(
            bare("data fetch --offline"),
            1,
            &["Fashion-MNIST is not on this machine", "--offline"],
        );
    }
}

#[test]
fn a_gpu_that_is_not_there_is_refused_by_every_command_that_takes_one() {
    let scene = Scene::new();
    let sweep = "config = \"run.toml\"\nmethod = \"grid\"\n[parameters]\n\"train.learning_rate\" = { values = [1e-3, 2e-3] }\n";
    scene.write("sweep.toml", sweep);
    let commands = [
        "train --offline --config run.toml --out x",
        "sample --offline --checkpoint checkpoint --steps 2 --count 1 --out x.png",
        "serve --offline --port 0 --checkpoint checkpoint",
        "fid ref --offline --preset fashion --few x.npz --out y.npz",
        "fid calc --offline --preset fashion --few --checkpoint checkpoint -n 4 --ref r.npz --out x.json",
        "sweep run --offline --config sweep.toml --out x",
        "build-engine --model checkpoint --program loss --out x",
        "replay --offline --model checkpoint --weights checkpoint/model.safetensors --batches batches.safetensors --out x",
    ];
    for command in commands {
        // On a machine that has GPUs they are hidden.
        let with =
            |options: &str| scene.mudit(&format!("{command} {options}")).env("CUDA_VISIBLE_DEVICES", "");
        for provider in ["cuda", "tensorrt"] {
            let named = format!("provider `{provider}` is not available");
            let done = with(&format!("--provider {provider}")).run();
            let trains = ["train", "sweep", "replay"].iter().any(|name| command.starts_with(name));
            if trains && provider == "tensorrt" {
                done.refuses(2, &["TensorRT does not train", "--provider cuda"]);
            } else {
                done.refuses(1, &[&named, "provider `cpu`"]);
            }
        }
        with("--provider gpu").run().refuses(2, &["expected cpu, cuda, tensorrt"]);
        if command.starts_with("fid ref") {
            continue;
        }
        for precision in ["bf16", "f16"] {
            with(&format!("--precision {precision}")).run().refuses(2, &["--precision f32", "--provider"]);
        }
    }
    // A command for the CPU alone does not pretend.
    let alone = scene.mudit("coord-check --offline --model checkpoint --widths 24,48 --out x");
    alone.env("MUDIT_PROVIDER", "cuda").run().refuses(2, &["CPU only", "MUDIT_PROVIDER"]);
    assert!(!scene.path("x").join("engine.json").exists() && !scene.path("x.png").exists());
}

#[test]
fn a_place_below_a_file_is_no_place() {
    let scene = Scene::new();
    for writer in WRITERS {
        scene.refuses(&writer.replace("{}", "run.toml/below"), 1, &["run.toml/below"]);
    }
    scene.refuses(
        "data check --offline --kind idx --path data --grid run.toml/g.png",
        1,
        &["run.toml/g.png"],
    );
}

#[test]
fn a_directory_without_permission_is_named() {
    let scene = Scene::new();
    let locked = scene.path("locked");
    fs::create_dir(&locked).unwrap();
    fs::set_permissions(&locked, fs::Permissions::from_mode(0o555)).unwrap();
    let is_root = fs::write(locked.join("probe"), "").is_ok();
    if is_root {
        // Root may write anywhere: the commands run as nobody, who can read the scene, the library and the binary.
        fs::remove_file(locked.join("probe")).unwrap();
        for path in contents(&scene.path("")).into_keys().chain([scene.path("")]) {
            let mode = fs::metadata(&path).unwrap().permissions().mode() & 0o755;
            fs::set_permissions(&path, fs::Permissions::from_mode(mode | 0o444)).unwrap();
        }
    }
    for writer in WRITERS {
        let line = writer.replace("{}", "locked/new");
        let command = if is_root {
            let (program, library) = (scene.path("mudit"), scene.path("libonnxruntime.so.1.31.1"));
            if !program.exists() {
                fs::copy(env!("CARGO_BIN_EXE_mudit-under-test"), &program).unwrap();
                fs::copy(&onnx_runtime().library().path, &library).unwrap();
            }
            scene.mudit(&line).program(&program).env("ORT_DYLIB_PATH", &library).by_user(65_534)
        } else {
            scene.mudit(&line)
        };
        scene.untouched(command, 1, &["locked/new", "Permission denied"]);
    }
}

/// A file system of its own and of a fixed size; gone when dropped.
struct SmallDisk(PathBuf);

impl SmallDisk {
    fn mount(at: PathBuf, size: &str) -> Result<Self, String> {
        fs::create_dir_all(&at).unwrap();
        Self::call(
            "mount",
            &["-t", "tmpfs", "-o", &format!("size={size}"), "mudit-test", at.to_str().unwrap()],
        )?;
        Ok(Self(at))
    }

    fn grow(&self, size: &str) {
        Self::call("mount", &["-o", &format!("remount,size={size}"), self.0.to_str().unwrap()]).unwrap();
    }

    fn call(program: &str, args: &[&str]) -> Result<(), String> {
        let output = Command::new(program).args(args).output().map_err(|e| e.to_string())?;
        if output.status.success() {
            Ok(())
        } else {
            Err(String::from_utf8_lossy(&output.stderr).trim().to_owned())
        }
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        drop(Self::call("umount", &["-l", self.0.to_str().unwrap()]));
    }
}

#[test]
fn a_full_disk_stops_a_run_that_goes_on_once_there_is_room() {
    let tiny = TinyRun::new();
    let disk = match SmallDisk::mount(tiny.path("disk"), "3m") {
        Ok(disk) => disk,
        Err(reason) => return println!("not tried: no small disk can be mounted here: {reason}"),
    };
    let everything = ["checkpoint.keep=1000"];
    let done = tiny.train("disk/run", &everything).run();
    assert_full(&done, "disk/run");
    let run = tiny.path("disk/run");
    let kept = checkpoint::list(&run).unwrap();
    assert!(!kept.is_empty() && kept.len() < 16, "{} checkpoints are there", kept.len());
    for (_, path) in kept {
        checkpoint::verify(&path).unwrap_or_else(|e| panic!("{e}"));
    }
    assert!(
        contents(&run).keys().all(|p| !p.to_string_lossy().contains(".new-")),
        "a half checkpoint is left"
    );
    // No room for anything else either, and nothing half-written.
    assert_full(&tiny.train("disk/run", &everything).run(), "disk/run");
    disk.grow("64m");
    tiny.train("disk/run", &everything).succeeds();
    tiny.train("run", &[]).succeeds();
    assert_same_result(&run, &tiny.path("run"), "after a full disk");
}

#[test]
fn a_full_disk_leaves_no_half_file() {
    let scene = Scene::new();
    let disk = match SmallDisk::mount(scene.path("disk"), "64k") {
        Ok(disk) => disk,
        Err(reason) => return println!("not tried: no small disk can be mounted here: {reason}"),
    };
    fs::write(disk.0.join("ballast"), vec![0; 64 << 10]).unwrap();
    for (writer, part) in WRITERS.iter().zip(["disk/new", "x.png", "x.npz", "loss-b1.onnx", "disk/new/o"]) {
        let done = scene.mudit(&writer.replace("{}", "disk/new")).run();
        assert_full(&done, part);
        let files: Vec<PathBuf> = contents(&disk.0).into_keys().filter(|p| p.is_file()).collect();
        // A run's configuration is whole, and its logs are made to be cut short.
        let logs = ["ballast", ".lock", "config.toml", "metrics.jsonl", "events.out"];
        let may_stay =
            |p: &PathBuf| logs.iter().any(|l| p.file_name().unwrap().to_string_lossy().starts_with(l));
        assert!(files.iter().all(may_stay), "it left {files:?}: {done}");
        drop(fs::remove_dir_all(disk.0.join("new")));
    }
}

fn assert_full(done: &Finished, part: &str) {
    done.refuses(1, &[part, "No space left on device"]);
}

#[test]
fn a_reader_that_is_gone_is_no_failure() {
    let scene = Scene::new();
    for line in
        ["inspect checkpoint", "inspect DiT-S/2 --program step --json", "data check --kind idx --path data"]
    {
        let done = scene.mudit(line).into_broken_pipe().wait();
        assert_eq!((done.code, done.stderr.as_str()), (Some(0), ""), "{done}");
    }
    // A run is not worth less because nobody listens.
    let done = scene.mudit("train --offline --config run.toml --out r").into_broken_pipe().wait();
    assert_eq!(done.code, Some(0), "{done}");
    assert_eq!(checkpoint::list(&scene.path("r")).unwrap().len(), 1);
    assert_eq!(mudit(["--help"]).into_broken_pipe().wait().code, Some(0));
}

#[test]
fn tensorrt_computes_f32_in_f32_or_is_refused() {
    let scene = Scene::new();
    for line in [
        "sample --offline --checkpoint checkpoint --provider tensorrt",
        "build-engine --offline --model checkpoint --program loss --provider tensorrt --out e",
    ] {
        // It starts again once; what comes after that, an error or not, is this machine's.
        let again = "starting again with NVIDIA_TF32_OVERRIDE=0";
        let done = scene.mudit(line).run();
        assert_eq!(done.stderr.matches(again).count(), 1, "{done}");
        let done = scene.mudit(line).env("NVIDIA_TF32_OVERRIDE", "0").run();
        assert!(!done.stderr.contains(again), "{done}");
        let rounded = scene.mudit(line).env("NVIDIA_TF32_OVERRIDE", "1");
        scene.untouched(rounded, 2, &["NVIDIA_TF32_OVERRIDE=1", "f32 products"]);
    }
}
