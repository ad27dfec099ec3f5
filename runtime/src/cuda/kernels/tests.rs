//! Every kernel compiles, for the architectures that are promised, without a GPU.

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
