//! Products of matrices by cuBLASLt.
//!
//! The library counts columns first. A matrix stored row after row is to it the transposed one, so `out = a b` is asked
//! for as `outᵀ = bᵀ aᵀ`: the operands change places, and what is stored as its transpose is transposed for it.
#![allow(unsafe_code, reason = "calls cuBLASLt")]

use std::collections::HashMap;
use std::ffi::c_void;
use std::fmt;
use std::sync::{Mutex, PoisonError};

use cudarc::cublaslt::result::{self, CublasError};
use cudarc::cublaslt::sys;
use graph_builder::DType;

use super::queue::{Address, Product};
use crate::cuda::Gpu;
use crate::cuda::libraries::CUBLAS_LT;
use crate::error::{Result, RuntimeError};

/// Most memory that a product may ask for beside its matrices.
pub(super) const MOST_WORKSPACE: usize = 32 << 20;
/// Alignments beyond this make no difference.
const WIDEST_ALIGNMENT: u64 = 256;

/// Memory beside the matrices.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Workspace {
    pub(super) at: Address,
    pub(super) bytes: usize,
}

/// What the choice of an algorithm depends on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Kind {
    dtype: DType,
    tf32: bool,
    size: [usize; 3],
    transposed: (bool, bool),
    bias: bool,
    /// In bytes, of left and right matrix and answer.
    alignment: [u32; 3],
}

impl Kind {
    fn of(p: &Product, tf32: bool) -> Self {
        let alignment = |at: Address| (at.0 | WIDEST_ALIGNMENT).trailing_zeros();
        Self {
            dtype: p.dtype,
            tf32: tf32 && p.dtype == DType::F32,
            size: [p.m, p.n, p.k],
            transposed: (p.a.1, p.b.1),
            bias: p.bias != Address::NONE,
            alignment: [p.a.0, p.b.0, p.out].map(|at| 1 << alignment(at)),
        }
    }
}

/// An algorithm of the library for one kind of product.
#[derive(Clone, Copy)]
pub(super) struct Plan {
    kind: Kind,
    algorithm: sys::cublasLtMatmulAlgo_t,
    workspace_bytes: usize,
}

impl Plan {
    pub(super) fn workspace_bytes(&self) -> usize {
        self.workspace_bytes
    }
}

/// The library, open on one GPU, and the algorithms that it chose.
pub(super) struct Products {
    handle: sys::cublasLtHandle_t,
    plans: Mutex<HashMap<Kind, Plan>>,
}

// SAFETY: the library's handle may be used by any thread, by several at once too.
unsafe impl Send for Products {}
// SAFETY: as above.
unsafe impl Sync for Products {}

impl fmt::Debug for Products {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Products").finish_non_exhaustive()
    }
}

impl Drop for Products {
    fn drop(&mut self) {
        // SAFETY: made by `open` and destroyed once; a library that shuts down already frees it itself.
        _ = unsafe { result::destroy_handle(self.handle) };
    }
}

impl Products {
    pub(super) fn open(gpu: &Gpu) -> Result<Self> {
        // What was opened by its path is found by its name from then on.
        let complaint = CUBLAS_LT.complaint();
        // SAFETY: asks the dynamic loader for the library by its usual names.
        if complaint.is_some() || !unsafe { sys::is_culib_present() } {
            return Err(RuntimeError::ProviderUnavailable {
                provider: "cuda".to_owned(),
                reason: complaint.unwrap_or_else(|| format!("{CUBLAS_LT} has another name than expected")),
                remedy: CUBLAS_LT.install.to_owned(),
            });
        }
        CUBLAS_LT.same_as(&version().map_err(|e| refused("ask for its version", e))?)?;
        gpu.call("make its context current", || Ok(()))?;
        let handle = result::create_handle().map_err(|e| refused("open it", e))?;
        Ok(Self { handle, plans: Mutex::default() })
    }

    /// The algorithm for a product, chosen by the library the first time that its kind occurs.
    pub(super) fn plan(&self, gpu: &Gpu, product: &Product, tf32: bool) -> Result<Plan> {
        let kind = Kind::of(product, tf32);
        // Before the lock: who has the turn may wait for the lock.
        let _turn = gpu.turn();
        let mut plans = self.plans.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(plan) = plans.get(&kind) {
            return Ok(*plan);
        }
        gpu.call("make its context current", || Ok(()))?;
        let plan = self.choose(kind).map_err(|e| refused(&format!("multiply {kind:?}"), e))?;
        plans.insert(kind, plan);
        Ok(plan)
    }

    fn choose(&self, kind: Kind) -> std::result::Result<Plan, CublasError> {
        // A sum cut into parts would be cut elsewhere in another batch, and a sample would have other bits there. Gradients
        // of weights sum over all samples anyway.
        let whole = !kind.transposed.0;
        self.choose_with(kind, whole).or_else(|e| if whole { self.choose_with(kind, false) } else { Err(e) })
    }

    fn choose_with(&self, kind: Kind, whole_sums: bool) -> std::result::Result<Plan, CublasError> {
        use sys::cublasLtMatmulPreferenceAttributes_t as Attribute;
        let call = Call::new(&kind)?;
        let preference = Preference(result::create_matmul_pref()?);
        let [a, b, out] = kind.alignment;
        // The library's first operand is our second.
        for (attribute, bytes) in [
            (Attribute::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, b),
            (Attribute::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, a),
            (Attribute::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, out),
            (Attribute::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, out),
        ] {
            preference.set(attribute, &bytes)?;
        }
        preference.set(Attribute::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &MOST_WORKSPACE)?;
        if whole_sums {
            // None of the schemes.
            preference.set(Attribute::CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK, &0_u32)?;
        }
        // SAFETY: everything was made just now and is alive.
        let found = unsafe {
            let (first, second, out) = (call.first.0, call.second.0, call.out.0);
            result::get_matmul_algo_heuristic(
                self.handle,
                call.description.0,
                first,
                second,
                out,
                out,
                preference.0,
            )
        }?;
        Ok(Plan { kind, algorithm: found.algo, workspace_bytes: found.workspaceSize })
    }

    /// Enqueues a product by an algorithm of its kind.
    pub(super) fn enqueue(&self, gpu: &Gpu, p: &Product, plan: &Plan, workspace: Workspace) -> Result<()> {
        let _turn = gpu.turn();
        gpu.call("make its context current", || Ok(()))?;
        let run = || {
            let call = Call::new(&plan.kind)?;
            if plan.kind.bias {
                call.description
                    .set(sys::cublasLtMatmulDescAttributes_t::CUBLASLT_MATMUL_DESC_BIAS_POINTER, &p.bias.0)?;
            }
            let (alpha, beta) = (1.0_f32, 0.0_f32);
            let at = |address: Address| address.0 as *mut c_void;
            // SAFETY: descriptions fit the addresses, which callers answer for; the scalars are read at once.
            unsafe {
                result::matmul(
                    self.handle,
                    call.description.0,
                    (&raw const alpha).cast(),
                    (&raw const beta).cast(),
                    at(p.b.0),
                    call.first.0,
                    at(p.a.0),
                    call.second.0,
                    at(p.out),
                    call.out.0,
                    at(p.out),
                    call.out.0,
                    &raw const plan.algorithm,
                    at(workspace.at),
                    workspace.bytes,
                    gpu.stream().cu_stream().cast(),
                )
            }
        };
        run().map_err(|e| refused(&format!("multiply {:?}", plan.kind), e))
    }
}

/// Of the library that the bindings opened.
fn version() -> std::result::Result<String, CublasError> {
    use sys::libraryPropertyType as Part;
    let mut parts = [0; 3];
    let kinds = [Part::MAJOR_VERSION, Part::MINOR_VERSION, Part::PATCH_LEVEL];
    for (kind, value) in kinds.into_iter().zip(&mut parts) {
        // SAFETY: a place for the answer.
        unsafe { sys::cublasLtGetProperty(kind, value) }.result()?;
    }
    Ok(parts.map(|p| p.to_string()).join("."))
}

fn refused(action: &str, error: CublasError) -> RuntimeError {
    RuntimeError::Kernel {
        source_file: "cuBLASLt".to_owned(),
        reason: format!("cannot {action}: {:?}", error.0),
    }
}

/// A product in the library's terms.
struct Call {
    description: Description,
    first: Layout,
    second: Layout,
    out: Layout,
}

impl Call {
    fn new(kind: &Kind) -> std::result::Result<Self, CublasError> {
        use sys::cublasLtMatmulDescAttributes_t as Attribute;
        let element = match kind.dtype {
            DType::F32 => sys::cudaDataType::CUDA_R_32F,
            DType::F16 => sys::cudaDataType::CUDA_R_16F,
            DType::Bf16 => sys::cudaDataType::CUDA_R_16BF,
            DType::I64 | DType::Bool => {
                return Err(CublasError(sys::cublasStatus_t::CUBLAS_STATUS_NOT_SUPPORTED));
            }
        };
        let compute = if kind.tf32 {
            sys::cublasComputeType_t::CUBLAS_COMPUTE_32F_FAST_TF32
        } else {
            sys::cublasComputeType_t::CUBLAS_COMPUTE_32F
        };
        let description = Description(result::create_matmul_desc(compute, sys::cudaDataType::CUDA_R_32F)?);
        let (a, b) = kind.transposed;
        // `CUBLAS_OP_N` is 0, `CUBLAS_OP_T` is 1.
        description.set(Attribute::CUBLASLT_MATMUL_DESC_TRANSA, &i32::from(b))?;
        description.set(Attribute::CUBLASLT_MATMUL_DESC_TRANSB, &i32::from(a))?;
        if kind.bias {
            // One element for each row of the library's answer: for each column of ours.
            let epilogue = sys::cublasLtEpilogue_t::CUBLASLT_EPILOGUE_BIAS;
            description.set(Attribute::CUBLASLT_MATMUL_DESC_EPILOGUE, &epilogue)?;
        }
        let [m, n, k] = kind.size;
        // Rows as stored become columns.
        let layout = |rows: usize, columns: usize| {
            result::create_matrix_layout(element, columns as u64, rows as u64, columns as i64).map(Layout)
        };
        Ok(Self {
            first: if b { layout(n, k) } else { layout(k, n) }?,
            second: if a { layout(k, m) } else { layout(m, k) }?,
            out: layout(m, n)?,
            description,
        })
    }
}

struct Description(sys::cublasLtMatmulDesc_t);

impl Description {
    fn set<T>(
        &self,
        attribute: sys::cublasLtMatmulDescAttributes_t,
        value: &T,
    ) -> std::result::Result<(), CublasError> {
        // SAFETY: alive; the library copies as many bytes as the value has.
        unsafe {
            result::set_matmul_desc_attribute(self.0, attribute, (&raw const *value).cast(), size_of::<T>())
        }
    }
}

impl Drop for Description {
    fn drop(&mut self) {
        // SAFETY: made once, destroyed once; so below.
        _ = unsafe { result::destroy_matmul_desc(self.0) };
    }
}

struct Layout(sys::cublasLtMatrixLayout_t);

impl Drop for Layout {
    fn drop(&mut self) {
        // SAFETY: as above.
        _ = unsafe { result::destroy_matrix_layout(self.0) };
    }
}

struct Preference(sys::cublasLtMatmulPreference_t);

impl Preference {
    fn set<T>(
        &self,
        attribute: sys::cublasLtMatmulPreferenceAttributes_t,
        value: &T,
    ) -> std::result::Result<(), CublasError> {
        // SAFETY: as for a description.
        unsafe {
            result::set_matmul_pref_attribute(self.0, attribute, (&raw const *value).cast(), size_of::<T>())
        }
    }
}

impl Drop for Preference {
    fn drop(&mut self) {
        // SAFETY: as above.
        _ = unsafe { result::destroy_matmul_pref(self.0) };
    }
}
