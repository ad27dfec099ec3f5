//! Every kernel compiles, for the architectures that are promised, without a GPU; and which operands kernels take.

use graph_builder::{Builder, Type, Value, Weights};

use super::*;
use crate::cuda::libraries;
use crate::library::RuntimeOptions;

/// The compiler, or a word about why the proof is left out. Where `MUDIT_NEEDS_NVRTC` is set it must be there, and is
/// fetched.
fn compiler() -> Option<Compiler> {
    if std::env::var_os("MUDIT_NEEDS_NVRTC").is_some() {
        let options = RuntimeOptions { progress: &|line| eprintln!("{line}"), ..RuntimeOptions::default() };
        libraries::find_or_fetch_compiler(&options).unwrap();
        return Some(Compiler::open(None).unwrap());
    }
    Compiler::open(None).map_err(|e| eprintln!("skipped: {e}")).ok()
}

#[test]
fn architectures_are_named_and_too_old_ones_refused() {
    for architecture in [Architecture::SM_80, Architecture::SM_90] {
        assert_eq!(architecture.to_string().parse::<Architecture>().unwrap(), architecture);
    }
    assert_eq!(Architecture::of(10, 0).unwrap().to_string(), "sm_100");
    for text in ["sm_75", "80", "sm_", "hopper"] {
        assert!(text.parse::<Architecture>().unwrap_err().to_string().contains("expected sm_80"), "{text}");
    }
    assert!(Architecture::of(7, 5).is_err());
}

#[test]
fn every_kernel_compiles_for_a100_and_h200_and_the_lists_are_complete() {
    let Some(compiler) = compiler() else { return };
    for architecture in [Architecture::SM_80, Architecture::SM_90] {
        for source in SOURCES {
            let compiled = compiler.compile(source, architecture).unwrap();
            let mut listed: Vec<&str> = source.kernels.to_vec();
            listed.sort_unstable();
            let found: Vec<&str> = compiled.kernels.iter().map(|k| k.name.as_str()).collect();
            assert_eq!(found, listed, "{} for {architecture}", source.name);
            assert!(compiled.cubin.starts_with(b"\x7fELF"));
            for kernel in &compiled.kernels {
                let KernelInfo { name, registers, shared_bytes, spilled_bytes } = kernel;
                println!("| `{name}` | {architecture} | {registers} | {shared_bytes} | {spilled_bytes} |");
                // A few words of the scalar tail's loop are harmless; more would be the hot loop.
                assert!(*spilled_bytes <= 16, "{name} for {architecture} spills {spilled_bytes} bytes");
            }
        }
    }
}

#[test]
fn what_was_compiled_is_kept_and_an_error_names_file_and_line() {
    let Some(_) = compiler() else { return };
    let folder = tempfile::tempdir().unwrap();
    let compiler = Compiler::open(Some(folder.path())).unwrap();
    let first = compiler.compile(&RANDOM, Architecture::SM_80).unwrap();
    let kept: Vec<_> = std::fs::read_dir(folder.path().join("kernels")).unwrap().flatten().collect();
    assert_eq!(kept.len(), 2, "{kept:?}");
    let again = compiler.compile(&RANDOM, Architecture::SM_80).unwrap();
    assert_eq!((first.cubin, first.kernels), (again.cubin, again.kernels));

    let wrong = Source { name: "wrong.cu", text: "\nint x = nothing;\n", options: &[], kernels: &[] };
    let error = compiler.compile(&wrong, Architecture::SM_80).unwrap_err().to_string();
    assert!(error.contains("wrong.cu(2)") && error.contains("nothing"), "{error}");
}

/// How the first `mudit` op of a program on `x` is run.
fn kernel(op: &str, x: Type, build: impl for<'g> FnOnce(Value<'g>) -> Value<'g>) -> NativeKernel {
    let b = Builder::new("one op");
    b.output("y", build(b.input("x", x)));
    let program = b.finish().unwrap().emit(Weights::Inputs).unwrap();
    let mut found = None;
    program.each_native_call(&mut |call| found = (call.op() == op).then(|| kernel_for(call))).unwrap();
    found.unwrap_or_else(|| panic!("no {op}"))
}

#[test]
fn operands_that_no_kernel_takes_are_told_apart() {
    let attention = |samples: usize, size: usize, dtype| {
        kernel("Attention", Type::new(dtype, [samples, 2, 3 * size]), |x| x.attention(1, 1.0))
    };
    for dtype in [DType::F32, DType::Bf16, DType::F16] {
        assert_eq!(attention(65_535, 72, dtype), NativeKernel::Own);
        assert_eq!(attention(1, 128, dtype), NativeKernel::Own);
        let unfit = |n: &str| NativeKernel::Unfit(n.to_owned());
        assert_eq!(attention(1, 136, dtype), unfit("136 features a head; at most 128 are taken"));
        assert_eq!(attention(65_536, 64, dtype), unfit("65536 samples; at most 65535 are taken"));
    }
}
