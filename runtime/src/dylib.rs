//! What dynamic libraries offer: which of the GPU stack can be opened, what ONNX Runtime was compiled with.
#![allow(unsafe_code, reason = "asks the dynamic loader and ONNX Runtime's C interface")]

use std::ffi::{CStr, CString};
use std::fmt;
use std::ptr;

use crate::error::{Result, RuntimeError};
use crate::library::Runtime;

/// A shared library under the names that its versions have.
pub(crate) struct SharedLibrary {
    /// What it is called in words.
    pub(crate) title: &'static str,
    /// File names, preferred first.
    pub(crate) names: &'static [&'static str],
}

pub(crate) const CUDA_DRIVER: SharedLibrary =
    SharedLibrary { title: "CUDA driver", names: &["libcuda.so.1"] };
pub(crate) const CUBLAS: SharedLibrary =
    SharedLibrary { title: "cuBLAS", names: &["libcublas.so.13", "libcublas.so.12"] };
pub(crate) const CUDNN: SharedLibrary = SharedLibrary { title: "cuDNN", names: &["libcudnn.so.9"] };
pub(crate) const NVRTC: SharedLibrary =
    SharedLibrary { title: "NVRTC", names: &["libnvrtc.so.13", "libnvrtc.so.12"] };
pub(crate) const NCCL: SharedLibrary = SharedLibrary { title: "NCCL", names: &["libnccl.so.2"] };
pub(crate) const TENSORRT: SharedLibrary = SharedLibrary { title: "TensorRT", names: &["libnvinfer.so.10"] };

impl fmt::Display for SharedLibrary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({})", self.title, self.names.join(" or "))
    }
}

impl SharedLibrary {
    /// The first of the names that the dynamic loader can open.
    pub(crate) fn find(&self) -> Option<&'static str> {
        self.names.iter().copied().find(|name| can_open(name))
    }
}

fn can_open(name: &str) -> bool {
    let Ok(name) = CString::new(name) else { return false };
    // SAFETY: `name` is a C string; opening runs the library's constructors, which are the vendor's own. The handle
    // is kept open: unloading GPU libraries at run time is not reliable.
    !unsafe { libc::dlopen(name.as_ptr(), libc::RTLD_LAZY | libc::RTLD_LOCAL) }.is_null()
}

/// Names of the execution providers that the loaded ONNX Runtime was compiled with.
pub(crate) fn compiled_providers(_: &Runtime) -> Result<Vec<String>> {
    let api = ort::api();
    let (mut names, mut count) = (ptr::null_mut(), 0);
    // SAFETY: places for the answers; the list holds `count` C strings until it is released.
    unsafe {
        let asked = (api.GetAvailableProviders)(&raw mut names, &raw mut count);
        ort::Error::result_from_status(asked).map_err(|e| RuntimeError::ort("list its providers", &e))?;
        let list = (0..count as usize).map(|i| CStr::from_ptr(*names.add(i)).to_string_lossy().into_owned());
        let list = list.collect();
        let released = (api.ReleaseAvailableProviders)(names, count);
        ort::Error::result_from_status(released).map_err(|e| RuntimeError::ort("list its providers", &e))?;
        Ok(list)
    }
}
