//! Provider options in ONNX Runtime's words.
#![allow(unsafe_code, reason = "hands the stream that everything is queued on to ONNX Runtime")]

use std::path::Path;

use graph_builder::DType;
use ort::ep::{
    ArbitrarilyConfigurableExecutionProvider, CPU, CUDA, ExecutionProviderDispatch, TensorRT, cuda,
};
use ort::session::builder::SessionBuilder;

use super::{CudaOptions, Provider, ShapeProfile, TensorRtOptions};
use crate::cuda::Gpu;
use crate::device::Device;
use crate::error::{Result, RuntimeError};
use crate::library::Runtime;

/// Gives a session its provider, and no other beside: a node that it cannot run is an error, never a detour.
pub(crate) fn register(
    builder: SessionBuilder,
    provider: &Provider,
    gpu: Option<&Gpu>,
) -> ort::Result<SessionBuilder> {
    let stream = gpu.map_or(std::ptr::null_mut(), |g| g.stream().cu_stream().cast());
    let providers: Vec<ExecutionProviderDispatch> = match provider {
        Provider::Cpu(options) => vec![CPU::default().with_arena_allocator(options.memory_arena).build()],
        Provider::Cuda(options) => vec![cuda_provider(options, stream).build()],
        Provider::TensorRt(options) => {
            let rest = CudaOptions { ordinal: options.ordinal, ..CudaOptions::default() };
            vec![tensorrt_provider(options, stream).build(), cuda_provider(&rest, stream).build()]
        }
    };
    let providers: Vec<_> = providers.into_iter().map(ExecutionProviderDispatch::error_on_failure).collect();
    let builder = builder.with_execution_providers(providers)?;
    if provider.is_gpu() { Ok(builder.with_disable_cpu_fallback()?) } else { Ok(builder) }
}

/// Lets ONNX Runtime load a provider's library, without a program.
///
/// # Errors
/// [`RuntimeError::ProviderUnavailable`] with ONNX Runtime's words.
pub(crate) fn try_out(runtime: &Runtime, provider: &Provider) -> Result<()> {
    let gpu = match provider.device() {
        Device::Cpu => None,
        Device::Cuda { ordinal } => {
            runtime.library().require_gpu_providers()?;
            Some(Gpu::open(ordinal)?)
        }
    };
    let tried = ort::session::Session::builder(runtime.environment())
        .and_then(|builder| register(builder, provider, gpu.as_deref()));
    tried.map(|_| ()).map_err(|e| RuntimeError::ProviderUnavailable {
        provider: provider.to_string(),
        reason: e.to_string(),
        remedy: "`mudit doctor` tells what is missing; or use provider `cpu`".to_owned(),
    })
}

fn cuda_provider(options: &CudaOptions, stream: *mut ()) -> CUDA {
    let provider = CUDA::default()
        .with_device_id(options.ordinal as i32)
        .with_cuda_graph(options.cuda_graph)
        .with_tf32(options.tf32)
        // The arena holds what a run needs, not the next power of two.
        .with_arena_extend_strategy(ort::ep::ArenaExtendStrategy::SameAsRequested)
        .with_conv_algorithm_search(cuda::ConvAlgorithmSearch::Heuristic);
    // SAFETY: the session keeps the GPU, whose stream this is.
    unsafe { provider.with_compute_stream(stream) }
}

fn tensorrt_provider(options: &TensorRtOptions, stream: *mut ()) -> TensorRT {
    let text = |path: &Path| path.to_string_lossy().into_owned();
    for folder in [&options.engine_cache, &options.timing_cache].into_iter().flatten() {
        // ONNX Runtime makes the last folder of a path only, and says itself what it cannot write.
        drop(std::fs::create_dir_all(folder));
    }
    let mut provider = TensorRT::default()
        .with_device_id(options.ordinal as i32)
        .with_cuda_graph(options.cuda_graph)
        .with_bf16(options.narrow == Some(DType::Bf16))
        .with_fp16(options.narrow == Some(DType::F16))
        .with_engine_hw_compatible(options.hardware_compatible);
    if options.weights_in_memory {
        provider = provider.with_arbitrary_config("trt_load_user_initializer", "1");
    }
    if let Some(folder) = &options.engine_cache {
        provider = provider.with_engine_cache(true).with_engine_cache_path(text(folder));
    }
    if let Some(prefix) = &options.engine_prefix {
        provider = provider.with_engine_cache_prefix(prefix);
    }
    if let Some(folder) = &options.timing_cache {
        provider = provider.with_timing_cache(true).with_timing_cache_path(text(folder));
    }
    if let Some(file) = &options.context_file {
        provider = provider
            // Without a path of its own: ONNX Runtime wants the engine in the model's folder.
            .with_engine_cache(true)
            .with_dump_ep_context_model(true)
            .with_ep_context_file_path(text(file))
            .with_ep_context_embed_mode(embed_mode(options));
    }
    if let Some(level) = options.builder_level {
        provider = provider.with_builder_optimization_level(level);
    }
    if let Some(limit) = options.workspace_limit {
        provider = provider.with_max_workspace_size(limit);
    }
    if let Some(folder) = &options.weights_from {
        provider = provider.with_weight_stripped_engine(true).with_onnx_model_folder_path(text(folder));
    }
    for (key, shape) in [
        ("trt_profile_min_shapes", (|p| &p.min) as fn(&ShapeProfile) -> &Vec<usize>),
        ("trt_profile_opt_shapes", |p| &p.opt),
        ("trt_profile_max_shapes", |p| &p.max),
    ] {
        if !options.profiles.is_empty() {
            provider = provider.with_arbitrary_config(key, profile_text(&options.profiles, shape));
        }
    }
    // SAFETY: the session keeps the GPU, whose stream this is.
    unsafe { provider.with_compute_stream(stream) }
}

/// Whether the engine is in the model (1) or in a file beside it (0), as a protobuf message ends at 2 GB. Without weights it is
/// small, and must be inside: one that is beside its model is written with its weights to the *current* folder when it is
/// loaded, and the next load of that name takes what is there, whatever weights these are (ONNX Runtime 1.31,
/// `GetEpContextFromGraph`).
fn embed_mode(options: &TensorRtOptions) -> u8 {
    u8::from(options.weights_from.is_some())
}

/// `input:1x3x8x8,other:1x4`
fn profile_text(profiles: &[ShapeProfile], shape: impl Fn(&ShapeProfile) -> &Vec<usize>) -> String {
    let one = |p: &ShapeProfile| {
        let axes: Vec<String> = shape(p).iter().map(ToString::to_string).collect();
        format!("{}:{}", p.input, axes.join("x"))
    };
    profiles.iter().map(one).collect::<Vec<_>>().join(",")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_engine_that_takes_its_weights_when_it_is_loaded_is_inside_its_model() {
        let plain = TensorRtOptions::default();
        let refitted = TensorRtOptions { weights_from: Some("engine".into()), ..plain.clone() };
        assert_eq!([plain, refitted].map(|options| embed_mode(&options)), [0, 1]);
    }

    #[test]
    fn profiles_are_written_as_tensorrt_reads_them() {
        let profile = |input: &str, n| ShapeProfile {
            input: input.to_owned(),
            min: vec![1, 4],
            opt: vec![n, 4],
            max: vec![8, 4],
        };
        let profiles = [profile("x", 2), profile("y", 3)];
        assert_eq!(profile_text(&profiles, |p| &p.opt), "x:2x4,y:3x4");
    }
}
