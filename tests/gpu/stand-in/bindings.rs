//! Programs bound to memory of the device: what they read and write there, and what crosses the bus. Their ops move
//! values only, which ONNX Runtime does with copies: they work on the stand-ins.

use std::sync::Arc;

use graph_builder::{Builder, DType, Dim, Graph, Init, Precision, Type, Weights};
use mudit_tests::draws::Draws;
use runtime::cuda::kernels::NormalStream;
use runtime::cuda::{DeviceArena, Gpu};
use runtime::{
    Arena, ArenaLayout, Binding, CudaOptions, Provider, Recording, Runtime, RuntimeError, RuntimeOptions,
    Session, SessionOptions,
};
use train_engine::random::{Purpose, Stream};

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

/// Noise for run `k`, one row of it silent.
fn streams(k: u64) -> [Option<Stream>; 2] {
    [
        Some(Stream::new(k, Purpose::SampleNoise, k, 3)).filter(|_| k % 4 != 3),
        Some(Stream::new(7, Purpose::Noise, k, 0)),
    ]
}

fn normals(streams: [Option<Stream>; 2]) -> Vec<f32> {
    let mut values = vec![0.0; 6];
    for (stream, row) in streams.into_iter().zip(values.chunks_mut(3)) {
        if let Some(mut stream) = stream {
            stream.fill_normal(row);
        }
    }
    values
}

/// What is drawn there has the host's bits and does not cross the bus; the host's own values still do, and of the two the
/// later counts; recorded or not, ahead of the run or not.
#[test]
#[ignore = "run by the parent's tests in a process that knows the stand-ins"]
fn inputs_are_drawn_on_the_device_or_given_by_the_host() {
    for provider in [cuda(), recorded()] {
        let mut builder = Binding::builder(&load(&moves(Precision::F32), provider));
        assert!(builder.draw_input("x").unwrap());
        let mut binding = builder.finish().unwrap();
        assert!(binding.draws("x") && !binding.draws("z"));
        for k in 0..24 {
            let on_device = streams(k).map(|s| s.map_or(NormalStream::ZEROS, |s| s.on_device()));
            let given = [k as f32; 6];
            binding.set_input("z", &[k as f32; 300]).unwrap();
            if k % 6 == 4 {
                binding.draw("x", &on_device).unwrap();
                binding.set_input("x", &given).unwrap();
            } else {
                if k % 6 == 5 {
                    binding.set_input("x", &given).unwrap();
                }
                binding.draw("x", &on_device).unwrap();
            }
            if k % 2 == 1 {
                binding.send_ahead().unwrap();
            }
            if k % 8 == 7 {
                binding.set_input("x", &given).unwrap();
                binding.send_ahead().unwrap();
                binding.draw("x", &on_device).unwrap();
            }
            binding.enqueue().unwrap();
            let want = if k % 6 == 4 { given.to_vec() } else { normals(streams(k)) };
            assert_eq!(binding.output_f32("x.flat").unwrap(), want, "run {k}");
            assert_eq!(binding.read_input::<f32>("x").unwrap(), want, "run {k}");
            assert_eq!(binding.output_f32("z.wide").unwrap(), [k as f32; 300], "run {k}");
        }
        // Two streams of 24 bytes, and the other input.
        binding.set_input("z", &[1.0; 300]).unwrap();
        binding.draw("x", &streams(0).map(|s| s.unwrap().on_device())).unwrap();
        let crossed = Counts::during(|| binding.run().unwrap());
        assert_eq!((crossed.to_device, crossed.to_device_bytes), (1, 256 + 1200), "{crossed:?}");
        // What was drawn stays until something else comes.
        let crossed = Counts::during(|| binding.run().unwrap());
        assert_eq!(crossed.to_device, 0, "{crossed:?}");
        assert_eq!(binding.output_f32("x.flat").unwrap(), normals(streams(0)));
        let error = binding.draw("x", &[NormalStream::ZEROS]).unwrap_err().to_string();
        assert!(error.contains("streams for input `x`") && error.contains("expected 2"), "{error}");
        let error = binding.draw("z", &[NormalStream::ZEROS]).unwrap_err().to_string();
        assert!(error.contains("`z`") && error.contains("one that the host fills"), "{error}");
    }
    let mut host = Binding::builder(&load(&moves(Precision::F32), Provider::default()));
    assert!(!host.draw_input("x").unwrap() && !host.finish().unwrap().draws("x"));
}

fn recorded() -> Provider {
    "cuda+graph".parse().unwrap()
}

/// Recorded once and replayed from then on, from several threads, while another one allocates: what is recorded is one
/// binding's run and nothing else.
#[test]
#[ignore = "run by the parent's tests in a process that knows the stand-ins"]
fn each_binding_is_recorded_for_itself() {
    let sessions = [0, 1].map(|_| load(&moves(Precision::F32), recorded()));
    assert_eq!(sessions[0].recording(), &Recording::On);
    let gpu = Gpu::open(0).unwrap();
    let thread = &|number: u8| {
        let mut binding = Binding::owned(&sessions[usize::from(number % 2)]).unwrap();
        for run in 0..10 {
            let (x, z) = (f32::from(10 * number + run), f32::from(number));
            binding.input_f32("x").unwrap().fill(x);
            binding.input_f32("z").unwrap().fill(z);
            binding.run().unwrap_or_else(|e| panic!("{e}"));
            assert_eq!(binding.output_f32("x.flat").unwrap(), [x; 6], "thread {number}, run {run}");
            assert_eq!(binding.output_f32("z.wide").unwrap(), [z; 300], "thread {number}, run {run}");
        }
    };
    std::thread::scope(|scope| {
        for number in 0..4 {
            scope.spawn(move || thread(number));
        }
        scope.spawn(|| {
            for _ in 0..200 {
                DeviceArena::zeros(&gpu, layout(), DType::F32, "a proof").unwrap();
            }
        });
    });
}

#[test]
#[ignore = "run by the parent's tests in a process that knows the stand-ins"]
fn what_cannot_be_recorded_goes_without_and_says_why() {
    let b = Builder::new("joins");
    let (x, z) = (b.input("x", Type::f32([2, 3])), b.input("z", Type::f32([2, 4])));
    b.output("both", x.concat(&[z], 1));
    b.output("x.flat", x.reshape([6]));
    let session = load(&b.finish().unwrap(), recorded());
    let Recording::Refused(reason) = session.recording() else { panic!("{:?}", session.recording()) };
    assert!(reason.contains("Concat"), "{reason}");
    let mut binding = Binding::owned(&session).unwrap();
    for value in [1.0, 2.0, 3.0] {
        binding.input_f32("x").unwrap().fill(value);
        binding.run().unwrap();
        assert_eq!(binding.output_f32("x.flat").unwrap(), [value; 6]);
    }
    assert_eq!(load(&moves(Precision::F32), cuda()).recording(), &Recording::Off);
}

/// Asked of cuBLASLt in so many words; what ONNX Runtime's own products do is told to it by the same option.
#[test]
#[ignore = "run by the parent's tests in a process that knows the stand-ins"]
fn products_of_f32_are_rounded_only_when_asked_for() {
    let b = Builder::new("layer");
    let (x, w) = (b.input("x", Type::f32([3, 40])), b.input("w", Type::f32([5, 40])));
    b.output("y", x.linear(w, b.input("b", Type::f32([5]))));
    let graph = b.finish().unwrap();
    let mut draws = Draws::new(5);
    let [x, w] = [120, 200].map(|n| (0..n).map(|_| draws.between(0.5, 1.0) as f32).collect::<Vec<_>>());
    for (provider, range) in [("cuda", 0.0..1e-6), ("cuda+tf32", 1e-5..1e-3)] {
        let mut binding = Binding::owned(&load(&graph, provider.parse().unwrap())).unwrap();
        binding.set_input("x", &x).unwrap();
        binding.set_input("w", &w).unwrap();
        binding.run().unwrap();
        let worst = binding.output_f32("y").unwrap().iter().enumerate().map(|(i, got)| {
            let (x, w) = (&x[i / 5 * 40..][..40], &w[i % 5 * 40..][..40]);
            let want: f64 = x.iter().zip(w).map(|(x, w)| f64::from(*x) * f64::from(*w)).sum();
            (f64::from(*got) / want - 1.0).abs()
        });
        let worst = worst.fold(0.0, f64::max);
        assert!(range.contains(&worst), "{provider}: off by {worst:e}");
    }
}
