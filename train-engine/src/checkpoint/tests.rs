use std::cell::RefCell;

use safetensors::tensor::{Dtype, TensorView};

use super::*;

fn state(step: u64) -> State {
    State {
        format_version: State::FORMAT_VERSION,
        step,
        total_steps: 100,
        images_seen: step * 8,
        epoch: 1,
        epoch_batch: 2,
        seed: 3,
        elapsed_seconds: 0.1 + 0.2,
        config_hash: "abc".into(),
        loss_scale: Some(crate::loss_scale::LossScale::starting_at(512.0)),
        decay_steps: None,
        data: None,
        origin: None,
        mup: serde_json::json!({"z": {"role": "hidden"}, "a": {"role": "input"}}),
    }
}

fn write_all(step: u64) -> impl FnOnce(&Path) -> Result<()> {
    move |directory| {
        let bytes = (step as f32).to_le_bytes();
        let view = TensorView::new(Dtype::F32, vec![1], &bytes).unwrap();
        let tensors = safetensors::serialize([("w", view)], None).unwrap();
        for name in [MODEL_FILE, EMA_FILE, OPTIMIZER_FILE] {
            fs::write(directory.join(name), &tensors).unwrap();
        }
        fs::write(directory.join(CONFIG_FILE), "{}").unwrap();
        state(step).write(directory)
    }
}

fn run_with(steps: &[u64], keep: usize) -> (tempfile::TempDir, RunLock) {
    let dir = tempfile::tempdir().unwrap();
    let lock = RunLock::acquire(dir.path(), &mut no_trouble).unwrap();
    for &step in steps {
        lock.save(step, keep, &mut no_trouble, write_all(step)).unwrap();
    }
    (dir, lock)
}

fn steps(run: &Path) -> Vec<u64> {
    list(run).unwrap().into_iter().map(|(step, _)| step).collect()
}

/// All names in the checkpoints' directory.
fn names(run: &Path) -> Vec<String> {
    let mut names: Vec<String> =
        entries(&run.join(DIRECTORY)).unwrap().iter().map(|path| file_name(path).to_owned()).collect();
    names.sort();
    names
}

#[expect(clippy::needless_pass_by_value, reason = "shape of a trouble")]
fn no_trouble(what: &'static str, error: TrainError) {
    panic!("{what}: {error}");
}

fn never(line: &str) {
    panic!("warned: {line}");
}

#[test]
fn the_newest_are_kept_and_latest_points_to_the_last() {
    let (dir, _lock) = run_with(&[1000, 2000, 123_456_789, 500_000_000], 2);
    assert_eq!(steps(dir.path()), [123_456_789, 500_000_000]);
    assert_eq!(names(dir.path()), ["latest", "step-123456789", "step-500000000"]);
    let link = fs::read_link(dir.path().join("checkpoints/latest")).unwrap();
    assert_eq!(link, Path::new("step-500000000"));
    let (path, state_read) = latest_valid(dir.path(), &never).unwrap().unwrap();
    assert!(path.ends_with("checkpoints/step-500000000"));
    assert_eq!(state_read, state(500_000_000));
}

#[test]
fn nothing_there_is_none() {
    let dir = tempfile::tempdir().unwrap();
    assert!(latest_valid(dir.path(), &never).unwrap().is_none());
    assert!(find(dir.path(), &never).unwrap_err().to_string().contains("no `model.safetensors`"));
    assert!(list(&dir.path().join("missing")).unwrap().is_empty());
}

#[test]
fn a_failed_write_leaves_the_old_ones_and_no_half_one() {
    let (dir, lock) = run_with(&[1], 3);
    let full = lock.save(2, 3, &mut no_trouble, |directory| {
        fs::write(directory.join(MODEL_FILE), b"half").unwrap();
        Err(TrainError::io("write", directory)(std::io::ErrorKind::StorageFull.into()))
    });
    assert!(full.unwrap_err().to_string().contains("free some space"));
    let partial = lock.save(2, 3, &mut no_trouble, |directory| state(2).write(directory));
    assert!(partial.unwrap_err().to_string().contains("without its `config.json`"));
    assert_eq!(names(dir.path()), ["latest", "step-00000001"]);
    assert_eq!(latest_valid(dir.path(), &never).unwrap().unwrap().1.step, 1);
}

#[test]
fn saving_a_step_again_replaces_it() {
    let (dir, lock) = run_with(&[1, 2], 3);
    fs::write(dir.path().join("checkpoints/step-00000002/state.json"), "damaged").unwrap();
    lock.save(2, 3, &mut no_trouble, write_all(2)).unwrap();
    assert_eq!(latest_valid(dir.path(), &never).unwrap().unwrap().1.step, 2);
    assert_eq!(names(dir.path()), ["latest", "step-00000001", "step-00000002"]);
}

#[test]
fn the_one_just_written_is_never_removed() {
    let (dir, lock) = run_with(&[10, 20, 30], 3);
    lock.save(15, 1, &mut no_trouble, write_all(15)).unwrap();
    assert_eq!(steps(dir.path()), [15]);
    lock.save(16, 0, &mut no_trouble, write_all(16)).unwrap();
    assert_eq!(steps(dir.path()), [16]);
}

#[test]
fn leftovers_of_a_killed_process_go_at_the_next_start() {
    let (dir, lock) = run_with(&[1], 3);
    drop(lock);
    for name in [".step-00000002.new-77", ".step-00000000.old-77"] {
        let path = dir.path().join(DIRECTORY).join(name);
        fs::create_dir(&path).unwrap();
        fs::write(path.join(MODEL_FILE), b"half").unwrap();
    }
    assert_eq!(steps(dir.path()), [1]);
    let _lock = RunLock::acquire(dir.path(), &mut no_trouble).unwrap();
    assert_eq!(names(dir.path()), ["latest", "step-00000001"]);
}

#[test]
fn a_second_process_is_refused() {
    let (dir, lock) = run_with(&[], 3);
    assert!(matches!(RunLock::acquire(dir.path(), &mut no_trouble), Err(TrainError::Locked { .. })));
    drop(lock);
    assert!(RunLock::acquire(dir.path(), &mut no_trouble).is_ok());
}

#[test]
fn damaged_checkpoints_are_told_and_passed_over() {
    let (dir, _lock) = run_with(&[1, 2, 3, 4], 9);
    let at = |step: u64| dir.path().join(DIRECTORY).join(format!("step-{step:08}"));
    let model = at(4).join(MODEL_FILE);
    let whole = fs::read(&model).unwrap();
    fs::write(&model, &whole[..whole.len() - 1]).unwrap();
    fs::remove_file(at(3).join(EMA_FILE)).unwrap();
    fs::write(at(2).join(STATE_FILE), "{\"step\": 2}").unwrap();
    let told = RefCell::new(Vec::new());
    let (path, _) =
        latest_valid(dir.path(), &|line| told.borrow_mut().push(line.to_owned())).unwrap().unwrap();
    assert_eq!(path, at(1));
    let told = told.borrow();
    assert_eq!(told.len(), 3);
    assert!(
        told[0].contains("step-00000004` cannot be used") && told[0].contains("not a complete"),
        "{told:?}"
    );
    assert!(told[1].contains("`ema.safetensors` is missing"), "{told:?}");
    assert!(told[2].contains("`state.json` is no state: missing field"), "{told:?}");

    fs::write(at(1).join(STATE_FILE), "{\"format_version\": 99}").unwrap();
    let error = latest_valid(dir.path(), &|_| ()).unwrap_err().to_string();
    assert!(error.contains("none of those in it is whole") && error.contains("its format is 99"), "{error}");
}

#[test]
fn a_checkpoint_is_found_by_itself_and_by_its_run() {
    let (dir, _lock) = run_with(&[1, 2], 9);
    let newest = dir.path().join("checkpoints/step-00000002");
    assert_eq!(find(dir.path(), &never).unwrap(), newest);
    assert_eq!(find(&newest, &never).unwrap(), newest);
    let latest = dir.path().join("checkpoints/latest");
    assert_eq!(find(&latest, &never).unwrap(), latest);
}

/// Makes of a run what the tools leave that copy it; gives what is wrong with it, if anything is told.
type Copied = (&'static str, fn(&Path), Option<&'static str>);

#[test]
fn nothing_fails_for_what_is_a_convenience() {
    let copies: [Copied; 7] = [
        ("a link-following copy", |at| copy_of_newest(&at.join("latest")), None),
        ("a file with the link's text", |at| fs::write(at.join("latest"), "step-00000002").unwrap(), None),
        ("a link to nowhere", |at| std::os::unix::fs::symlink("gone", at.join("latest")).unwrap(), None),
        ("half a copy", |at| fs::create_dir(at.join("latest")).unwrap(), None),
        ("a copied new link", |at| copy_of_newest(&at.join(".latest.new")), None),
        ("a copied hidden link", |at| fs::write(at.join(".step-00000001.old-3"), "").unwrap(), None),
        (
            "somebody's own",
            |at| {
                fs::create_dir(at.join("latest")).unwrap();
                fs::write(at.join("latest/notes.txt"), "mine").unwrap();
            },
            Some("notes.txt"),
        ),
    ];
    for (what, spoil, told) in copies {
        let (dir, lock) = run_with(&[1, 2], 3);
        drop(lock);
        let at = dir.path().join(DIRECTORY);
        fs::remove_file(at.join("latest")).unwrap();
        spoil(&at);
        let mut troubles = Vec::new();
        let mut trouble = |_: &'static str, error: TrainError| troubles.push(error.to_string());
        let lock = RunLock::acquire(dir.path(), &mut trouble).unwrap();
        lock.save(3, 3, &mut trouble, write_all(3)).unwrap();
        assert_eq!(steps(dir.path()), [1, 2, 3], "{what}");
        assert_eq!(troubles.len(), usize::from(told.is_some()), "{what}: {troubles:?}");
        if let Some(part) = told {
            assert!(troubles[0].contains(part) && troubles[0].contains("move it away"), "{troubles:?}");
            assert_eq!(fs::read(at.join("latest/notes.txt")).unwrap(), b"mine");
        } else {
            assert_eq!(fs::read_link(at.join("latest")).unwrap(), Path::new("step-00000003"), "{what}");
        }
        assert!(names(dir.path()).iter().all(|name| !name.starts_with('.')), "{what}");
    }
}

fn copy_of_newest(to: &Path) {
    fs::create_dir(to).unwrap();
    for name in FILES {
        fs::copy(to.with_file_name("step-00000002").join(name), to.join(name)).unwrap();
    }
}

#[test]
fn a_checkpoint_that_was_copied_as_latest_alone_is_not_lost() {
    let (dir, lock) = run_with(&[1, 2], 3);
    drop(lock);
    let at = dir.path().join(DIRECTORY);
    fs::remove_file(at.join("latest")).unwrap();
    copy_of_newest(&at.join("latest"));
    fs::remove_dir_all(at.join("step-00000001")).unwrap();
    // Of the same step there is a damaged one.
    fs::write(at.join("step-00000002").join(STATE_FILE), "damaged").unwrap();
    let _lock = RunLock::acquire(dir.path(), &mut no_trouble).unwrap();
    assert_eq!(latest_valid(dir.path(), &never).unwrap().unwrap().1.step, 2);
}
