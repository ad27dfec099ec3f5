//! Engines in use: what they answer is what the checkpoint that they were built from answers on the same GPU.

use mudit_tests::difference::relative_l2;
use mudit_tests::execution::array;
use runtime::read_safetensors_file;

use super::commands::{checkpoint, succeeds};
use super::on_gpu;

#[test]
fn an_engine_samples_what_its_checkpoint_does() {
    if on_gpu("engines in use").is_none() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    checkpoint(folder.path());
    let samples = |from: &str, out: &str| {
        let line =
            format!("sample {from} --sampler ddim --steps 10 --count 8 --cfg 2 --out {out}.safetensors");
        succeeds(folder.path(), &line);
        let mut file = read_safetensors_file(folder.path().join(format!("{out}.safetensors"))).unwrap();
        let found = file.shift_remove("samples").unwrap();
        array(found.shape().dims(), &found.to_f32())
    };
    let tensorrt: runtime::Provider = "tensorrt".parse().unwrap();
    let mut providers = vec!["cuda"];
    match tensorrt.check() {
        Ok(()) => providers.push("tensorrt"),
        Err(reason) => println!("SKIPPED: engines of TensorRT: {reason}"),
    }
    for (precision, limit) in [("f32", 1e-3), ("bf16", 5e-2), ("f16", 1e-2)] {
        let from = format!("--checkpoint checkpoint --provider cuda --precision {precision}");
        let want = samples(&from, "checkpoint");
        for provider in &providers {
            let engine = format!("{provider}-{precision}");
            let line = format!(
                "build-engine --model checkpoint --weights checkpoint/model.safetensors --program step-rows \
                 --buckets 2,4,8,16 --precision {precision} --provider {provider} --out {engine}"
            );
            println!("{}", succeeds(folder.path(), &line));
            for graph in ["", "+graph"] {
                let from = format!("--engine {engine} --provider {provider}{graph}");
                let error = relative_l2(&samples(&from, "engine"), &want);
                println!("{engine}{graph}: {error:.1e} from the checkpoint's images");
                assert!(error <= limit, "{engine}{graph}: {error:e}");
            }
        }
    }
}
