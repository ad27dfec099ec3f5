//! The networks of `mudit fid` on the CUDA provider.

use graph_builder::{Graph, Weights};
use models::classifier::Classifier;
use models::inception::{SIDE, Taps, features};
use runtime::{CudaOptions, Provider, Runtime, RuntimeOptions, Session, SessionOptions};

#[test]
#[ignore = "run by the parent's tests in a process that knows the stand-ins"]
fn placed() {
    let options = RuntimeOptions { gpu: true, offline: true, ..RuntimeOptions::default() };
    let runtime = Runtime::start(&options).unwrap();
    let fashion = Classifier { channels: 1, height: 28, width: 28, classes: 10 };
    let networks: [(&str, Graph); 2] = [
        ("inception", features(8, SIDE, Taps { spatial: true, logits: true }).unwrap()),
        ("fashion", fashion.features(8).unwrap()),
    ];
    for (name, graph) in networks {
        let emitted = graph.optimised().unwrap().emit(Weights::Inputs).unwrap();
        let provider = Provider::Cuda(CudaOptions::default());
        let options = SessionOptions { provider, record_placement: true, ..SessionOptions::default() };
        let session = Session::load(&runtime, &emitted, &runtime::Weights::Inside, &options)
            .unwrap_or_else(|e| panic!("{name}: {e}"));
        let placement = session.placement().unwrap();
        let elsewhere: Vec<_> =
            placement.elsewhere("CUDAExecutionProvider").map(ToString::to_string).collect();
        assert!(!placement.nodes.is_empty() && elsewhere.is_empty(), "{name}: not on CUDA: {elsewhere:#?}");
    }
}
