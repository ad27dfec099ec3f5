//! Typed provider options. A provider that cannot be had is an error; nothing falls back to another one.

use std::fmt;

use crate::device::Device;
use crate::dylib;
use crate::error::{Result, RuntimeError};

/// Options of the CPU provider.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CpuOptions {
    /// Keep freed intermediate buffers for the next run: about a quarter faster, more memory held.
    pub memory_arena: bool,
}

impl Default for CpuOptions {
    fn default() -> Self {
        Self { memory_arena: true }
    }
}

/// Options of the CUDA provider.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CudaOptions {
    /// The CUDA driver's number of the GPU.
    pub ordinal: usize,
}

/// Options of the TensorRT provider.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TensorRtOptions {
    /// The CUDA driver's number of the GPU.
    pub ordinal: usize,
}

/// Who executes a program's nodes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Provider {
    /// ONNX Runtime's own CPU kernels.
    Cpu(CpuOptions),
    /// NVIDIA GPUs through CUDA libraries.
    Cuda(CudaOptions),
    /// NVIDIA GPUs through TensorRT engines.
    TensorRt(TensorRtOptions),
}

impl Default for Provider {
    fn default() -> Self {
        Self::Cpu(CpuOptions::default())
    }
}

impl fmt::Display for Provider {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Cpu(_) => "cpu",
            Self::Cuda(_) => "cuda",
            Self::TensorRt(_) => "tensorrt",
        })
    }
}

impl Provider {
    /// Where the provider's buffers live.
    pub fn device(&self) -> Device {
        match self {
            Self::Cpu(_) => Device::Cpu,
            Self::Cuda(CudaOptions { ordinal }) | Self::TensorRt(TensorRtOptions { ordinal }) => {
                Device::Cuda { ordinal: *ordinal }
            }
        }
    }

    /// Refuses a provider that cannot run programs here.
    ///
    /// # Errors
    /// [`RuntimeError::ProviderUnavailable`] with the libraries that were looked for and not found.
    pub fn check(&self) -> Result<()> {
        let wanted: &[_] = match self {
            Self::Cpu(_) => return Ok(()),
            Self::Cuda(_) => &[dylib::CUDA_DRIVER, dylib::CUBLAS, dylib::CUDNN],
            Self::TensorRt(_) => &[dylib::CUDA_DRIVER, dylib::CUBLAS, dylib::CUDNN, dylib::TENSORRT],
        };
        let missing: Vec<_> = wanted.iter().filter(|l| l.find().is_none()).map(ToString::to_string).collect();
        let (reason, remedy) = if missing.is_empty() {
            ("this build runs programs on the CPU only".to_owned(), "use provider `cpu`")
        } else {
            (format!("not found: {}", missing.join("; ")), "install them or use provider `cpu`")
        };
        let (provider, remedy) = (self.to_string(), remedy.to_owned());
        Err(RuntimeError::ProviderUnavailable { provider, reason, remedy })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gpu_providers_are_refused_with_a_reason_and_a_remedy() {
        Provider::default().check().unwrap();
        for provider in
            [Provider::Cuda(CudaOptions::default()), Provider::TensorRt(TensorRtOptions::default())]
        {
            let text = provider.check().unwrap_err().to_string();
            assert!(text.contains(&format!("`{provider}`")) && text.contains("use provider `cpu`"), "{text}");
        }
        assert_eq!(Provider::Cuda(CudaOptions { ordinal: 2 }).device(), Device::Cuda { ordinal: 2 });
    }
}
