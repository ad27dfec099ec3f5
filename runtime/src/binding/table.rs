//! ONNX Runtime's table of bound addresses, through its C interface: the safe wrappers copy what is borrowed.
#![allow(unsafe_code, reason = "hands addresses of memory to ONNX Runtime's C interface")]

use std::ffi::CString;
use std::fmt;
use std::ptr::{self, NonNull};

use graph_builder::{DType, TensorSpec};
use ort::{AsPointer, sys};

use crate::error::{Result, RuntimeError};
use crate::session::Session;

/// ONNX Runtime's table of bound addresses.
pub(super) struct AddressTable(NonNull<sys::OrtIoBinding>);

impl AddressTable {
    pub(super) fn new(session: &Session) -> Result<Self> {
        let mut binding = ptr::null_mut();
        let inner = session.lock();
        // SAFETY: the session is alive and `binding` is a place for the answer.
        check(unsafe { (ort::api().CreateIoBinding)(inner.ptr().cast_mut(), &raw mut binding) })
            .map_err(|e| RuntimeError::ort("create a binding", &e))?;
        NonNull::new(binding).map(Self).ok_or_else(|| RuntimeError::ort("create a binding", &"no object"))
    }

    /// Tells ONNX Runtime that a tensor's values are at `address`, of the host or of the GPU of a number.
    ///
    /// # Safety
    /// `address` must be valid for the tensor's size and aligned for its element type during every later run:
    /// for reads if it is an input, exclusively for writes if it is an output.
    pub(super) unsafe fn bind(
        &self,
        input: bool,
        spec: &TensorSpec,
        address: *mut u8,
        gpu: Option<usize>,
    ) -> Result<()> {
        let failed = |e: &dyn fmt::Display| RuntimeError::ort("bind a tensor", e);
        let name = CString::new(spec.name.as_str()).map_err(|e| failed(&e))?;
        let shape: Vec<i64> = spec.shape.dims().iter().map(|&d| d as i64).collect();
        let bytes = spec.shape.numel() * spec.dtype.bytes();
        let api = ort::api();
        let (mut memory, mut value) = (ptr::null_mut(), ptr::null_mut());
        // SAFETY: plain creations with places for the answers; the binding keeps a reference of its own to the value
        // (not to the memory), so both handles are released here.
        unsafe {
            let (kind, place) =
                (sys::OrtAllocatorType::OrtDeviceAllocator, sys::OrtMemType::OrtMemTypeDefault);
            let made = check(match gpu {
                None => (api.CreateCpuMemoryInfo)(kind, place, &raw mut memory),
                Some(n) => (api.CreateMemoryInfo)(c"Cuda".as_ptr(), kind, n as i32, place, &raw mut memory),
            })
            .and_then(|()| {
                check((api.CreateTensorWithDataAsOrtValue)(
                    memory,
                    address.cast(),
                    bytes,
                    shape.as_ptr(),
                    shape.len(),
                    element_type(spec.dtype),
                    &raw mut value,
                ))
            });
            let bound = made.and_then(|()| {
                let bind = if input { api.BindInput } else { api.BindOutput };
                check(bind(self.0.as_ptr(), name.as_ptr(), value))
            });
            if !value.is_null() {
                (api.ReleaseValue)(value);
            }
            if !memory.is_null() {
                (api.ReleaseMemoryInfo)(memory);
            }
            bound.map_err(|e| failed(&e))
        }
    }

    /// Runs the session on the bound addresses.
    ///
    /// # Safety
    /// As [`AddressTable::bind`]: every address must be valid now, and `session` the one the table was made for; if the
    /// options only queue the run, until it is done.
    pub(super) unsafe fn run(
        &self,
        session: &ort::session::Session,
        options: Option<&RunOptions>,
    ) -> ort::Result<()> {
        let api = ort::api();
        let options = options.map_or(ptr::null(), |o| o.0.as_ptr().cast_const());
        // SAFETY: the caller's promise; a null pointer asks for the default run options.
        check(unsafe { (api.RunWithBinding)(session.ptr().cast_mut(), options, self.0.as_ptr()) })
    }
}

/// Options of the runs of one binding on a GPU.
pub(super) struct RunOptions(NonNull<sys::OrtRunOptions>);

impl RunOptions {
    /// Runs that are queued and not waited for; where they are recorded as a CUDA graph, it has this number.
    pub(super) fn queued(graph: u32) -> Result<Self> {
        let failed = |e: &dyn fmt::Display| RuntimeError::ort("make run options", e);
        let mut options = ptr::null_mut();
        // SAFETY: `options` is a place for the answer.
        check(unsafe { (ort::api().CreateRunOptions)(&raw mut options) }).map_err(|e| failed(&e))?;
        let options = NonNull::new(options).map(Self).ok_or_else(|| failed(&"no object"))?;
        let number = CString::new(graph.to_string()).map_err(|e| failed(&e))?;
        // A graph replays the addresses that it was recorded with: each binding has its own.
        for (key, value) in
            [(c"disable_synchronize_execution_providers", c"1"), (c"gpu_graph_id", number.as_c_str())]
        {
            // SAFETY: the options are alive, and ONNX Runtime copies both texts.
            let added =
                unsafe { (ort::api().AddRunConfigEntry)(options.0.as_ptr(), key.as_ptr(), value.as_ptr()) };
            check(added).map_err(|e| failed(&e))?;
        }
        Ok(options)
    }
}

impl Drop for RunOptions {
    fn drop(&mut self) {
        // SAFETY: made by `CreateRunOptions`, released once.
        unsafe { (ort::api().ReleaseRunOptions)(self.0.as_ptr()) };
    }
}

impl Drop for AddressTable {
    fn drop(&mut self) {
        // SAFETY: made by `CreateIoBinding`, released once.
        unsafe { (ort::api().ReleaseIoBinding)(self.0.as_ptr()) };
    }
}

fn check(status: sys::OrtStatusPtr) -> ort::Result<()> {
    // SAFETY: `status` comes straight from a call of the C interface.
    unsafe { ort::Error::result_from_status(status) }
}

fn element_type(dtype: DType) -> sys::ONNXTensorElementDataType {
    use sys::ONNXTensorElementDataType as T;
    match dtype {
        DType::F32 => T::ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT,
        DType::F16 => T::ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16,
        DType::Bf16 => T::ONNX_TENSOR_ELEMENT_DATA_TYPE_BFLOAT16,
        DType::I64 => T::ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64,
        DType::Bool => T::ONNX_TENSOR_ELEMENT_DATA_TYPE_BOOL,
    }
}
