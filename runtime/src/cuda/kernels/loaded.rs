//! Kernels in a GPU's memory, and what else a queue of it needs, once for all queues.
#![allow(unsafe_code, reason = "loads machine code into the driver")]

use std::collections::{BTreeMap, HashMap};
use std::ffi::CString;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use cudarc::driver::{result, sys};

use super::products::Products;
use super::scratch::Pool;
use super::{Architecture, Compiler, Source};
use crate::cuda::Gpu;
use crate::error::{Result, RuntimeError};
use crate::library::cache_directory;

/// A kernel, ready to be launched.
#[derive(Debug)]
pub(super) struct Function {
    handle: sys::CUfunction,
    /// Bytes of shared memory that launches may ask for.
    shared_bytes: AtomicU32,
}

// SAFETY: a function's handle belongs to its context, not to a thread; its module is never unloaded.
unsafe impl Send for Function {}
// SAFETY: as above; the driver guards itself.
unsafe impl Sync for Function {}

impl Function {
    pub(super) fn handle(&self) -> sys::CUfunction {
        self.handle
    }

    /// Allows launches with this much shared memory; more than 48 KiB must be asked for.
    pub(super) fn allow_shared(&self, gpu: &Gpu, bytes: u32) -> Result<()> {
        if self.shared_bytes.load(Ordering::Relaxed) >= bytes {
            return Ok(());
        }
        let attribute = sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
        // SAFETY: a function of a loaded module.
        gpu.call("raise the shared memory of a kernel", || unsafe {
            result::function::set_function_attribute(self.handle, attribute, bytes as i32)
        })?;
        self.shared_bytes.store(bytes, Ordering::Relaxed);
        Ok(())
    }
}

type Functions = BTreeMap<&'static str, Arc<Function>>;

/// What the queues of a GPU share.
#[derive(Debug)]
pub(crate) struct Loaded {
    compiler: Compiler,
    architecture: Architecture,
    sources: Mutex<HashMap<&'static str, Arc<Functions>>>,
    pub(super) products: Products,
    pub(super) pool: Arc<Pool>,
}

impl Loaded {
    /// The compiler and the library of products, for a GPU.
    ///
    /// # Errors
    /// [`RuntimeError::ProviderUnavailable`] without NVRTC or cuBLASLt; [`RuntimeError::InvalidValue`] for a GPU older
    /// than the kernels.
    pub(crate) fn open(gpu: &Gpu) -> Result<Self> {
        let compiler = Compiler::open(cache_directory().as_deref())?;
        let (major, minor) = gpu.info().compute_capability;
        let architecture = Architecture::of(major.unsigned_abs(), minor.unsigned_abs())?;
        let products = Products::open(gpu)?;
        Ok(Self { compiler, architecture, sources: Mutex::default(), products, pool: Arc::default() })
    }

    /// A kernel of a source, which is compiled and loaded by its first caller.
    pub(super) fn function(&self, gpu: &Gpu, source: &'static Source, kernel: &str) -> Result<Arc<Function>> {
        self.functions(gpu, source)?.get(kernel).cloned().ok_or_else(|| RuntimeError::Kernel {
            source_file: source.name.to_owned(),
            reason: format!("it has no kernel `{kernel}`"),
        })
    }

    /// Compiles and loads a source ahead of its first launch.
    pub(super) fn prepare(&self, gpu: &Gpu, source: &'static Source) -> Result<()> {
        self.functions(gpu, source).map(drop)
    }

    fn functions(&self, gpu: &Gpu, source: &'static Source) -> Result<Arc<Functions>> {
        // Before the lock: who has the turn may wait for the lock.
        let _turn = gpu.turn();
        let mut sources = self.sources.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(functions) = sources.get(source.name) {
            return Ok(functions.clone());
        }
        let functions = Arc::new(self.load(gpu, source)?);
        sources.insert(source.name, functions.clone());
        Ok(functions)
    }

    fn load(&self, gpu: &Gpu, source: &'static Source) -> Result<Functions> {
        let compiled = self.compiler.compile(source, self.architecture)?;
        gpu.call("load kernels", || {
            // SAFETY: a whole image, which the driver copies. The module stays loaded as long as the process runs.
            let module = unsafe { result::module::load_data(compiled.cubin.as_ptr().cast()) }?;
            let function = |&name: &&'static str| {
                let c_name = CString::new(name).unwrap_or_default();
                // SAFETY: the module was just loaded.
                let handle = unsafe { result::module::get_function(module, c_name) }?;
                Ok((name, Arc::new(Function { handle, shared_bytes: AtomicU32::new(0) })))
            };
            source.kernels.iter().map(function).collect()
        })
    }
}
