//! GPUs: the driver's context, and the one stream on which everything runs.
#![allow(
    unsafe_code,
    reason = "asks the driver, and switches off cudarc's tracking of memory that one stream alone uses"
)]

use std::collections::BTreeMap;
use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use cudarc::driver::{CudaContext, CudaEvent, CudaStream, DriverError, sys};
use serde::Serialize;

use super::kernels::Loaded;
use super::libraries::DRIVER;
use super::turns::{Turn, Turns};
use crate::error::{Result, RuntimeError};

/// What a GPU is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct GpuInfo {
    /// The CUDA driver's number.
    pub ordinal: usize,
    /// Its name.
    pub name: String,
    /// Major and minor number of what its code may use: (8, 0) for A100, (9, 0) for H100 and H200.
    pub compute_capability: (i32, i32),
    /// Memory in bytes.
    pub memory_bytes: usize,
}

impl fmt::Display for GpuInfo {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (major, minor) = self.compute_capability;
        let gib = self.memory_bytes as f64 / (1_u64 << 30) as f64;
        write!(f, "{} (number {}, sm_{major}{minor}, {gib:.1} GiB)", self.name, self.ordinal)
    }
}

impl GpuInfo {
    /// The architecture's name for compilers: `sm_80`.
    pub fn architecture(&self) -> String {
        format!("sm_{}{}", self.compute_capability.0, self.compute_capability.1)
    }
}

/// A GPU in use: its primary context and the process's stream on it. Programs, kernels and copies of one GPU are all
/// queued on that stream, so each sees what the one before it wrote.
pub struct Gpu {
    info: GpuInfo,
    context: Arc<CudaContext>,
    stream: Arc<CudaStream>,
    transfers: Arc<CudaStream>,
    turns: Turns,
    /// Kernels and what goes with them, once somebody asked.
    loaded: OnceLock<Loaded>,
    /// Machine code of kernels that came with an engine, by source.
    given: Mutex<BTreeMap<String, Arc<[u8]>>>,
}

impl fmt::Debug for Gpu {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Gpu").field(&self.info).finish()
    }
}

/// What the kernels are written for: A100 and newer.
const OLDEST: (i32, i32) = (8, 0);
/// CUDA 13, as `cuDriverGetVersion` counts.
const OLDEST_DRIVER: i32 = 13_000;

static OPEN: Mutex<BTreeMap<usize, Arc<Gpu>>> = Mutex::new(BTreeMap::new());

impl Gpu {
    /// The GPU of a number; the same object for all callers in the process.
    ///
    /// # Errors
    /// [`RuntimeError::ProviderUnavailable`] without a driver or such a GPU; [`RuntimeError::Cuda`].
    pub fn open(ordinal: usize) -> Result<Arc<Self>> {
        let mut open = OPEN.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(gpu) = open.get(&ordinal) {
            return Ok(gpu.clone());
        }
        let count = count()?;
        if ordinal >= count {
            return Err(unavailable(format!("there is no GPU number {ordinal}: the driver sees {count}")));
        }
        let (info, context, stream, transfers) = guarded("open a GPU", || {
            let context = CudaContext::new(ordinal)?;
            // SAFETY: all memory is of this crate's own making, which orders its use by streams and events itself.
            unsafe { context.disable_event_tracking() };
            let info = info(ordinal, &context)?;
            let (stream, transfers) = (context.new_stream()?, context.new_stream()?);
            Ok((info, context, stream, transfers))
        })?;
        if info.compute_capability < OLDEST {
            let (major, minor) = OLDEST;
            return Err(unavailable(format!("{info} is too old: sm_{major}{minor} or newer is needed")));
        }
        let (turns, loaded, given) = (Turns::default(), OnceLock::new(), Mutex::default());
        let gpu = Arc::new(Self { info, context, stream, transfers, turns, loaded, given });
        open.insert(ordinal, gpu.clone());
        Ok(gpu)
    }

    /// All GPUs that the driver sees.
    ///
    /// # Errors
    /// [`RuntimeError::ProviderUnavailable`] without a driver; [`RuntimeError::Cuda`].
    pub fn list() -> Result<Vec<GpuInfo>> {
        let count = count()?;
        guarded("ask for the GPUs", || (0..count).map(|i| info(i, &*CudaContext::new(i)?)).collect())
    }

    /// What it is.
    pub fn info(&self) -> &GpuInfo {
        &self.info
    }

    /// The driver's context.
    pub fn context(&self) -> &Arc<CudaContext> {
        &self.context
    }

    /// The stream on which programs, kernels and copies are queued.
    pub fn stream(&self) -> &Arc<CudaStream> {
        &self.stream
    }

    /// A stream for copies that go on beside the computation.
    pub fn transfers(&self) -> &Arc<CudaStream> {
        &self.transfers
    }

    /// Free and total memory in bytes.
    ///
    /// # Errors
    /// [`RuntimeError::Cuda`].
    pub fn memory(&self) -> Result<(usize, usize)> {
        guarded("ask for the free memory", || self.context.mem_get_info())
    }

    /// Waits for the turn to queue work: one thread at a time has it, and a run keeps it until it is queued whole.
    pub fn turn(&self) -> Turn<'_> {
        self.turns.take()
    }

    /// Waits until everything that was queued on [`Gpu::stream`] is done. Other threads may queue more meanwhile.
    ///
    /// # Errors
    /// [`RuntimeError::Cuda`] with the first failure of what was queued.
    pub fn synchronize(&self) -> Result<()> {
        let mark = self.event()?;
        self.record(&mark, &self.stream)?;
        self.wait(&mark)
    }

    /// A mark for a stream.
    pub(crate) fn event(&self) -> Result<CudaEvent> {
        self.call("make an event", || self.context.new_event(None))
    }

    /// Queues the mark on a stream.
    pub(crate) fn record(&self, event: &CudaEvent, stream: &CudaStream) -> Result<()> {
        self.call("record an event", || event.record(stream))
    }

    /// Lets what is queued on a stream from now on wait until another stream has come to its mark.
    pub(crate) fn order(&self, stream: &CudaStream, after: &CudaEvent) -> Result<()> {
        self.call("order two streams", || stream.wait(after))
    }

    /// Waits on the host until a stream has come to its mark.
    pub(crate) fn wait(&self, event: &CudaEvent) -> Result<()> {
        guarded("wait for the GPU", || {
            self.context.bind_to_thread()?;
            let before = exchange_mode(sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL)?;
            let waited = event.synchronize();
            exchange_mode(before)?;
            waited
        })
    }

    /// This crate's kernels on it.
    pub(crate) fn loaded(&self) -> Result<&Loaded> {
        if let Some(loaded) = self.loaded.get() {
            return Ok(loaded);
        }
        let loaded = Loaded::open(self)?;
        Ok(self.loaded.get_or_init(|| loaded))
    }

    /// Takes machine code of a source's kernels that was compiled elsewhere for this GPU's architecture.
    pub(crate) fn give_kernels(&self, source: &str, code: Vec<u8>) {
        let mut given = self.given.lock().unwrap_or_else(PoisonError::into_inner);
        given.entry(source.to_owned()).or_insert_with(|| code.into());
    }

    /// Machine code of a source that was given.
    pub(crate) fn given_kernels(&self, source: &str) -> Option<Arc<[u8]>> {
        self.given.lock().unwrap_or_else(PoisonError::into_inner).get(source).cloned()
    }

    /// Calls the driver with this GPU's context current, when it is this thread's turn.
    pub(crate) fn call<T>(
        &self,
        action: &'static str,
        call: impl FnOnce() -> std::result::Result<T, DriverError>,
    ) -> Result<T> {
        let _turn = self.turn();
        guarded(action, || {
            self.context.bind_to_thread()?;
            call()
        })
    }
}

/// Sets what this thread may do while streams are recorded as CUDA graphs, and gives what it was. ONNX Runtime records in a
/// way that forbids waits to every thread, and spoils the recording, but for threads that mind their own recordings only.
fn exchange_mode(
    mut mode: sys::CUstreamCaptureMode,
) -> std::result::Result<sys::CUstreamCaptureMode, DriverError> {
    // SAFETY: a place for the old mode that holds the new one.
    unsafe { sys::cuThreadExchangeStreamCaptureMode(&raw mut mode) }.result()?;
    Ok(mode)
}

fn info(ordinal: usize, context: &CudaContext) -> std::result::Result<GpuInfo, DriverError> {
    Ok(GpuInfo {
        ordinal,
        name: context.name()?,
        compute_capability: context.compute_capability()?,
        memory_bytes: context.total_mem()?,
    })
}

fn count() -> Result<usize> {
    if let Some(complaint) = DRIVER.complaint() {
        return Err(unavailable(complaint));
    }
    let driver = guarded("ask for the driver's version", || {
        let mut version = 0;
        // SAFETY: a place for the answer.
        unsafe { sys::cuDriverGetVersion(&raw mut version) }.result().map(|()| version)
    })?;
    if driver < OLDEST_DRIVER {
        let (major, minor) = (driver / 1000, driver % 1000 / 10);
        return Err(unavailable(format!("the driver is for CUDA {major}.{minor}, CUDA 13 is needed")));
    }
    let count = guarded("ask for the number of GPUs", CudaContext::device_count)
        .map_err(|e| unavailable(format!("the driver does not work: {e}")))?;
    Ok(usize::try_from(count).unwrap_or(0))
}

fn unavailable(reason: String) -> RuntimeError {
    RuntimeError::ProviderUnavailable {
        provider: "cuda".to_owned(),
        reason,
        remedy: format!("{}, or use provider `cpu`", DRIVER.install),
    }
}

/// Calls the bindings, which panic when the driver is too old to have a function.
pub(crate) fn guarded<T>(
    action: &'static str,
    call: impl FnOnce() -> std::result::Result<T, DriverError>,
) -> Result<T> {
    let Ok(done) = catch_unwind(AssertUnwindSafe(call)) else {
        let reason = "the driver lacks a function that CUDA 13 has; update it".to_owned();
        return Err(RuntimeError::Cuda { action, reason });
    };
    done.map_err(|e| RuntimeError::cuda(action, e))
}
