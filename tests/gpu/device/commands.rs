//! Whole commands on the GPU, compared with the same commands on the CPU.

use std::collections::BTreeMap;
use std::path::Path;
use std::process::{Command, Stdio};

use mudit_tests::difference::relative_l2;
use mudit_tests::execution::array;
use runtime::{HostTensor, read_safetensors_file, write_safetensors_file};

use super::{fixture, on_gpu};

/// A checkpoint of the smallest fixture.
pub(super) fn checkpoint(folder: &Path) {
    let place = folder.join("checkpoint");
    std::fs::create_dir(&place).unwrap();
    for (from, to) in [("config.json", "config.json"), ("weights.safetensors", "model.safetensors")] {
        std::fs::copy(fixture().join(from), place.join(to)).unwrap();
    }
}

fn mudit(folder: &Path, line: &str) -> Command {
    // An executable that was built elsewhere is told where the program lies.
    let program = std::env::var_os("MUDIT_UNDER_TEST");
    let mut command = Command::new(program.unwrap_or_else(|| env!("CARGO_BIN_EXE_mudit-under-test").into()));
    command.current_dir(folder).args(line.split_whitespace());
    command
}

pub(super) fn succeeds(folder: &Path, line: &str) -> String {
    let done = mudit(folder, line).output().unwrap();
    let (out, err) = (String::from_utf8_lossy(&done.stdout), String::from_utf8_lossy(&done.stderr));
    assert!(done.status.success(), "mudit {line}\n{out}\n{err}");
    out.into_owned()
}

/// The comparison with the f32 programs of the CPU, and the probe of the slots, are `build-engine`'s own.
#[test]
fn every_program_answers_as_the_cpus_in_every_precision() {
    if on_gpu("programs").is_none() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    checkpoint(folder.path());
    for precision in ["f32", "bf16", "f16"] {
        let line = format!(
            "build-engine --model checkpoint --weights checkpoint/model.safetensors --buckets 1,3 --precision {precision} \
             --program denoise,denoise-cfg,step,step-rows,loss,train-step --provider cuda --explain --out {precision}"
        );
        let told = succeeds(folder.path(), &line);
        println!("{told}");
        assert!(!told.contains("nodes on CPU"), "{told}");
        assert!(succeeds(folder.path(), &line).contains("is up to date"));
        let large = format!(
            "build-engine --model DiT-B/2 --batch 4 --precision {precision} --program train-step --provider cuda --out B-{precision}"
        );
        println!("{}", succeeds(folder.path(), &large));
    }
}

#[test]
fn the_same_seeds_give_the_same_images() {
    if on_gpu("sampling").is_none() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    checkpoint(folder.path());
    let samples = |provider: &str, precision: &str| {
        let out = format!("{provider}-{precision}.safetensors");
        let line = format!(
            "sample --checkpoint checkpoint --sampler ddim --steps 10 --count 8 --provider {provider} --precision {precision} --out {out}"
        );
        succeeds(folder.path(), &line);
        let mut file = read_safetensors_file(folder.path().join(out)).unwrap();
        let found = file.shift_remove("samples").unwrap();
        array(found.shape().dims(), &found.to_f32())
    };
    let cpu = samples("cpu", "f32");
    for (precision, limit) in [("f32", 1e-3), ("bf16", 5e-2), ("f16", 1e-2)] {
        let error = relative_l2(&samples("cuda", precision), &cpu);
        println!("10 steps of ddim in {precision}: {error:.1e} from the CPU's");
        assert!(error <= limit, "{precision}: {error:e}");
    }
}

#[test]
fn a_server_answers_from_the_gpu() {
    if on_gpu("serving").is_none() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    checkpoint(folder.path());
    let line = "serve --checkpoint checkpoint --provider cuda --precision bf16 --port 0";
    let log = std::fs::File::create(folder.path().join("log")).unwrap();
    let mut server = mudit(folder.path(), line).stderr(log).stdout(Stdio::null()).spawn().unwrap();
    let url = (0..600).find_map(|_| {
        std::thread::sleep(std::time::Duration::from_millis(100));
        let log = std::fs::read_to_string(folder.path().join("log")).unwrap();
        log.contains("ready after").then(|| {
            let line = log.lines().find(|l| l.contains("http://")).unwrap();
            line.split_whitespace().find(|w| w.starts_with("http://")).unwrap().to_owned()
        })
    });
    let told = url
        .map(|url| succeeds(folder.path(), &format!("bench-serve --url {url} --requests 8 --concurrency 2")));
    server.kill().unwrap();
    server.wait().unwrap();
    println!("{}", told.expect("the server is ready within a minute"));
}

#[test]
fn tensorrt_builds_once_and_fills_weights_in() {
    if on_gpu("TensorRT").is_none() {
        return;
    }
    let tensorrt: runtime::Provider = "tensorrt".parse().unwrap();
    if let Err(reason) = tensorrt.check() {
        return println!("SKIPPED: TensorRT: {reason}");
    }
    let folder = tempfile::tempdir().unwrap();
    checkpoint(folder.path());
    let line = "build-engine --model checkpoint --weights checkpoint/model.safetensors --buckets 1,4 --precision f16 \
                --program step,denoise-cfg --provider tensorrt --strip-weights --out e";
    println!("{}", succeeds(folder.path(), line));
    assert!(succeeds(folder.path(), line).contains("is up to date"));
    // Other values are another build, compared with their own plain program.
    let mut tensors = read_safetensors_file(folder.path().join("checkpoint/model.safetensors")).unwrap();
    for tensor in tensors.values_mut() {
        let values = tensor.to_f32().into_iter().map(|v| v * 1.25).collect();
        *tensor = HostTensor::f32(tensor.shape().clone(), values).unwrap();
    }
    write_safetensors_file(folder.path().join("tuned.safetensors"), &tensors, &BTreeMap::new()).unwrap();
    let again = line.replace("checkpoint/model.safetensors", "tuned.safetensors");
    println!("{}", succeeds(folder.path(), &again));
}
