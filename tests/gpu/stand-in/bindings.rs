//! Programs bound to memory of the device: what they read and write there, and what crosses the bus. Their ops move
//! values only, which ONNX Runtime does with copies: they work on the stand-ins.

use std::sync::Arc;

use graph_builder::{Builder, DType, Dim, Graph, Init, Precision, Type, Weights};
use runtime::cuda::{DeviceArena, Gpu};
use runtime::{
    Arena, ArenaLayout, Binding, CudaOptions, Provider, Runtime, RuntimeError, RuntimeOptions, Session,
    SessionOptions,
};

use super::counts::Counts;

/// Moves its parameters and its two inputs to outputs of other shapes.
fn moves(precision: Precision) -> Graph {
    let b = Builder::new("moves");
    let x = b.input("x", Type::f32([2, 3]));
    let z = b.input("z", Type::f32([300]));
    let w = b.root().param("w", &[Dim::Fixed(3), Dim::Fixed(5)], Init::Zeros);
    let c = b.root().param("c", &[Dim::Fixed(15)], Init::Zeros);
    b.output("x.flat", x.reshape([6]));
    b.output("z.wide", z.reshape([30, 10]));
    b.output("grad.w", c.reshape([3, 5]));
    b.output("grad.c", w.reshape([15]));
    b.finish().unwrap().in_precision(precision).unwrap()
}

fn load(graph: &Graph, provider: Provider) -> Arc<Session> {
    let options = RuntimeOptions { gpu: true, offline: true, ..RuntimeOptions::default() };
    let runtime = Runtime::start(&options).unwrap_or_else(|e| panic!("{e}"));
    let options = SessionOptions { provider, ..SessionOptions::default() };
    let program = graph.emit(Weights::Inputs).unwrap();
    Session::load(&runtime, &program, &runtime::Weights::Inside, &options).unwrap_or_else(|e| panic!("{e}"))
}

fn cuda() -> Provider {
    Provider::Cuda(CudaOptions::default())
}

fn layout() -> Arc<ArenaLayout> {
    let entries = [("c", vec![15]), ("unrelated", vec![33]), ("w", vec![3, 5])];
    Arc::new(ArenaLayout::new(entries.map(|(n, s)| (n.to_owned(), s.into()))).unwrap())
}

/// Each value another one, all of them exact in bf16.
fn numbered(first: usize) -> Arena {
    let mut arena = Arena::zeros(layout()).unwrap();
    for (i, value) in arena.views_mut().into_iter().flatten().enumerate() {
        *value = (first + i) as f32;
    }
    arena
}

#[test]
#[ignore = "run by the parent's tests in a process that knows the stand-ins"]
fn arenas_on_the_device_are_used_in_place() {
    for precision in [Precision::F32, Precision::Bf16, Precision::F16] {
        let (gpu, dtype) = (Gpu::open(0).unwrap(), precision.dtype());
        let arena = |dtype| Arc::new(DeviceArena::zeros(&gpu, layout(), dtype, "a proof").unwrap());
        let (parameters, gradients) = (arena(dtype), arena(dtype));
        parameters.upload(&numbered(1)).unwrap();
        let mut builder = Binding::builder(&load(&moves(precision), cuda()));
        assert_eq!(builder.bind_device_inputs_by_name(&parameters).unwrap(), 2);
        assert_eq!(builder.bind_device_outputs_by_name(&gradients, "grad.").unwrap(), 2);
        let mut binding = builder.finish().unwrap();
        let (x, z) = ([1.0, 2.0, 3.0, 4.0, 5.0, 6.0], vec![7.0; 300]);
        binding.set_input("x", &x).unwrap();
        binding.set_input("z", &z).unwrap();
        // One copy in each direction, both inputs and both outputs in it (at multiples of 256 bytes), and one wait.
        let bytes = 256 + 300 * 4;
        let crossed = Counts::during(|| binding.run().unwrap());
        assert_eq!((crossed.to_device, crossed.to_device_bytes), (1, bytes), "{precision}");
        assert_eq!(
            (crossed.from_device, crossed.from_device_bytes, crossed.waits),
            (1, bytes, 1),
            "{precision}"
        );
        assert_eq!(binding.output_f32("x.flat").unwrap(), x);
        assert_eq!(binding.output_f32("z.wide").unwrap(), z);
        let mut got = Arena::zeros(layout()).unwrap();
        gradients.download(&mut got).unwrap();
        assert_eq!(got.view("w").unwrap(), numbered(1).view("c").unwrap(), "{precision}");
        assert_eq!(got.view("c").unwrap(), numbered(1).view("w").unwrap(), "{precision}");
        assert!(got.view("unrelated").unwrap().iter().all(|v| *v == 0.0));
        // What has not changed does not cross again; new parameters are seen where they are.
        parameters.upload(&numbered(100)).unwrap();
        let crossed = Counts::during(|| binding.run().unwrap());
        assert_eq!((crossed.to_device, crossed.from_device, crossed.waits), (0, 1, 1), "{precision}");
        gradients.download(&mut got).unwrap();
        assert_eq!(got.view("w").unwrap(), numbered(100).view("c").unwrap(), "{precision}");
        assert!(matches!(
            binding.input_f32("w"),
            Err(RuntimeError::BoundToArena { .. } | RuntimeError::WrongType { .. })
        ));
    }
}

#[test]
#[ignore = "run by the parent's tests in a process that knows the stand-ins"]
fn arenas_of_the_host_cross_when_they_have_changed() {
    for precision in [Precision::F32, Precision::Bf16] {
        let shared = numbered(1).into_shared();
        let gradients = Arena::zeros(layout()).unwrap().into_shared();
        let mut builder = Binding::builder(&load(&moves(precision), cuda()));
        assert_eq!(builder.bind_inputs_by_name(&shared).unwrap(), 2);
        let narrow = builder.bind_outputs_by_name(&gradients, "grad.");
        assert_eq!(narrow.is_err(), precision != Precision::F32, "an arena of the host takes f32");
        let mut binding = builder.finish().unwrap();
        let crossed = Counts::during(|| binding.run().unwrap());
        assert_eq!(crossed.to_device, 2, "{precision}: {crossed:?}");
        let crossed = Counts::during(|| binding.run().unwrap());
        assert_eq!(crossed.to_device, 0, "{precision}: {crossed:?}");
        shared.write().unwrap().view_mut("c").unwrap().fill(9.0);
        let crossed = Counts::during(|| binding.run().unwrap());
        assert_eq!(crossed.to_device, 2, "{precision}: {crossed:?}");
        if precision == Precision::F32 {
            assert_eq!(gradients.read().unwrap().view("w").unwrap(), [9.0; 15]);
            assert_eq!(gradients.read().unwrap().view("c").unwrap(), numbered(1).view("w").unwrap());
        }
    }
}

#[test]
#[ignore = "run by the parent's tests in a process that knows the stand-ins"]
fn the_next_runs_inputs_go_ahead_of_it() {
    let mut binding = Binding::owned(&load(&moves(Precision::F32), cuda())).unwrap();
    let step = |k: u16| (vec![f32::from(k); 6], vec![f32::from(k) + 0.5; 300]);
    let fill = |binding: &mut Binding, k: u16| {
        let (x, z) = step(k);
        binding.set_input("x", &x).unwrap();
        binding.set_input("z", &z).unwrap();
    };
    fill(&mut binding, 0);
    for k in 0..20 {
        binding.enqueue().unwrap();
        if k % 3 != 2 {
            fill(&mut binding, k + 1);
            binding.send_ahead().unwrap();
        }
        if k % 5 == 1 {
            // A value that is known late overtakes the one that went ahead.
            binding.set_input("z", &step(k + 1).1).unwrap();
        }
        let (x, z) = step(k);
        assert_eq!(binding.output_f32("x.flat").unwrap(), x, "run {k}");
        assert_eq!(binding.output_f32("z.wide").unwrap(), z, "run {k}");
        if k % 3 == 2 {
            fill(&mut binding, k + 1);
        }
    }
}

#[test]
#[ignore = "run by the parent's tests in a process that knows the stand-ins"]
fn bindings_on_the_device_are_checked() {
    let gpu = Gpu::open(0).unwrap();
    let arena = |layout: Arc<ArenaLayout>, dtype| {
        Arc::new(DeviceArena::zeros(&gpu, layout, dtype, "a proof").unwrap())
    };
    let (wide, narrow) = (arena(layout(), DType::F32), arena(layout(), DType::Bf16));
    let text = |e: RuntimeError| e.to_string();
    let session = load(&moves(Precision::Bf16), cuda());
    let mut builder = Binding::builder(&session);
    assert_eq!(builder.bind_device_inputs_by_name(&wide).unwrap(), 0, "the parameters are bf16");
    let error = text(builder.bind_device_input("w", &wide, "w").map(|_| ()).unwrap_err());
    assert!(error.contains("element type bf16, expected f32, as in the arena"), "{error}");
    let error = text(builder.bind_device_input("w", &narrow, "c").map(|_| ()).unwrap_err());
    assert!(error.contains("(15), expected (3, 5)"), "{error}");
    let error = text(builder.bind_device_input("W", &narrow, "w").map(|_| ()).unwrap_err());
    assert!(error.contains("no input named `W`"), "{error}");
    builder.bind_device_input("w", &narrow, "w").unwrap();
    let error = builder.bind_device_output("grad.w", &narrow, "w").map(|_| ()).unwrap_err();
    assert!(matches!(error, RuntimeError::Aliased { .. }), "{error}");
    let host = load(&moves(Precision::F32), Provider::default());
    let error = text(Binding::builder(&host).bind_device_input("w", &wide, "w").map(|_| ()).unwrap_err());
    assert!(error.contains("is GPU 0, expected the CPU, where the program runs"), "{error}");
    let other: Arc<ArenaLayout> = Arc::new(ArenaLayout::new([("w".to_owned(), [5, 3].into())]).unwrap());
    let error = text(
        Binding::builder(&host)
            .bind_device_input("w", &arena(other, DType::F32), "w")
            .map(|_| ())
            .unwrap_err(),
    );
    assert!(error.contains("the CPU"), "{error}");
}
