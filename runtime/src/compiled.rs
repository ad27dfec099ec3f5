//! What the loaded ONNX Runtime was compiled with.
#![allow(unsafe_code, reason = "asks ONNX Runtime's C interface")]

use std::ffi::CStr;
use std::ptr;

use crate::error::{Result, RuntimeError};
use crate::library::Runtime;

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
