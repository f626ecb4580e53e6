//! Products of weights with activations, by cuBLASLt, which is looked for when it is needed.
#![allow(unsafe_code)]

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::ffi::c_void;
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use cudarc::cublaslt::{result as lt, sys};
use cudarc::driver::sys::CUstream;
use libloading::Library;

use crate::CudaError;
use crate::device::{Buffer, Device};

/// Memory that products may use beside their operands: what NVIDIA asks for on Hopper, enough everywhere.
const WORKSPACE: usize = 32 << 20;
/// CUBLAS_OP_T of cublas_api.h.
const TRANSPOSED: i32 = 1;

/// A weight matrix `[rows = outputs][cols = inputs]` in fp16 on a card.
pub(crate) struct Matrix {
    pub weights: Buffer,
    pub rows: usize,
    pub cols: usize,
}

/// How one shape of product is computed: chosen by the library once, then kept.
struct Plan {
    algorithm: sys::cublasLtMatmulAlgo_t,
    weights: sys::cublasLtMatrixLayout_t,
    input: sys::cublasLtMatrixLayout_t,
    output: sys::cublasLtMatrixLayout_t,
    workspace: usize,
}

/// cuBLASLt on one card.
pub(crate) struct Blas {
    handle: sys::cublasLtHandle_t,
    operation: sys::cublasLtMatmulDesc_t,
    preference: sys::cublasLtMatmulPreference_t,
    workspace: Buffer,
    plans: Mutex<HashMap<[usize; 3], Plan>>,
}

// SAFETY: a cuBLASLt handle may be used from any thread; descriptors are only read once they are made; plans are behind a
// lock.
unsafe impl Send for Blas {}
// SAFETY: as above.
unsafe impl Sync for Blas {}

fn failed(operation: &'static str) -> impl Fn(lt::CublasError) -> CudaError {
    move |e| CudaError::Blas { operation, status: format!("{:?}", e.0) }
}

/// Folders that may hold NVIDIA's libraries: those of the user, then the usual ones.
fn folders() -> Vec<PathBuf> {
    let asked = ["KVQUANT_CUBLAS", "KVQUANT_NVRTC"].into_iter().filter_map(std::env::var_os).map(PathBuf::from);
    let usual = ["/usr/local/cuda/lib64", "/usr/local/cuda-13.0/lib64", "/usr/local/cuda-13/lib64"].map(PathBuf::from);
    asked.filter(|p| !p.as_os_str().is_empty()).chain(usual).collect()
}

/// Makes the library known to the loader under its name, so that it is found wherever it lies.
fn preload(folder: &Path) -> Option<Library> {
    let path = folder.join("libcublasLt.so.13");
    // SAFETY: cuBLASLt's initializers only set up its own state.
    path.exists().then(|| unsafe { Library::new(path) }.ok()).flatten()
}

/// Whether the library can be loaded; names what is missing.
pub(crate) fn find() -> Result<(), CudaError> {
    static FOUND: Mutex<Option<Library>> = Mutex::new(None);
    let mut found = FOUND.lock().unwrap_or_else(|e| e.into_inner());
    // SAFETY: only looks whether the library can be loaded; its initializers need nothing from us.
    if found.is_some() || unsafe { sys::is_culib_present() } {
        return Ok(());
    }
    // It stays loaded, since the loader knows it by its name only as long.
    *found = folders().iter().find_map(|f| preload(f));
    // SAFETY: as above.
    if unsafe { sys::is_culib_present() } {
        return Ok(());
    }
    Err(CudaError::NoBlas)
}

impl Blas {
    pub fn new(device: &Device) -> Result<Self, CudaError> {
        find()?;
        device.bind()?;
        let handle = lt::create_handle().map_err(failed("start cuBLASLt"))?;
        let kind = sys::cudaDataType::CUDA_R_32F;
        let operation = lt::create_matmul_desc(sys::cublasComputeType_t::CUBLAS_COMPUTE_32F, kind)
            .map_err(failed("describe a product"))?;
        let transposed = TRANSPOSED;
        // SAFETY: the descriptor was just made; the attribute is 4 bytes, which are copied.
        unsafe {
            lt::set_matmul_desc_attribute(
                operation,
                sys::cublasLtMatmulDescAttributes_t::CUBLASLT_MATMUL_DESC_TRANSA,
                (&raw const transposed).cast(),
                size_of::<i32>(),
            )
        }
        .map_err(failed("describe a product"))?;
        let preference = lt::create_matmul_pref().map_err(failed("describe a product"))?;
        let most = WORKSPACE;
        // SAFETY: as above, 8 bytes.
        unsafe {
            lt::set_matmul_pref_attribute(
                preference,
                sys::cublasLtMatmulPreferenceAttributes_t::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES,
                (&raw const most).cast(),
                size_of::<usize>(),
            )
        }
        .map_err(failed("describe a product"))?;
        let workspace = device.room(WORKSPACE)?;
        Ok(Blas { handle, operation, preference, workspace, plans: Mutex::new(HashMap::new()) })
    }

    fn plan(&self, rows: usize, cols: usize, n: usize) -> Result<Plan, CudaError> {
        // The library's matrices lie column by column: ours are their transposes.
        let layout = |kind, r: usize, c: usize| {
            lt::create_matrix_layout(kind, r as u64, c as u64, r as i64).map_err(failed("describe a matrix"))
        };
        let (half, float) = (sys::cudaDataType::CUDA_R_16F, sys::cudaDataType::CUDA_R_32F);
        let (weights, input, output) = (layout(half, cols, rows)?, layout(half, cols, n)?, layout(float, rows, n)?);
        // SAFETY: all descriptors were made above and live.
        let best = unsafe {
            lt::get_matmul_algo_heuristic(self.handle, self.operation, weights, input, output, output, self.preference)
        }
        .map_err(failed("choose how to multiply"))?;
        Ok(Plan { algorithm: best.algo, weights, input, output, workspace: best.workspaceSize.min(WORKSPACE) })
    }

    /// out `[n][rows]` f32 = x `[n][cols]` fp16 times the transposed weights; sums in f32.
    pub fn product(&self, device: &Device, w: &Matrix, x: &Buffer, n: usize, out: &Buffer) -> Result<(), CudaError> {
        if x.bytes() < n * w.cols * 2 || out.bytes() < n * w.rows * 4 || w.weights.bytes() < w.rows * w.cols * 2 {
            return Err(CudaError::Append { problem: "a product's operand is too small" });
        }
        let mut plans = self.plans.lock().unwrap_or_else(|e| e.into_inner());
        let p = match plans.entry([w.rows, w.cols, n]) {
            Entry::Occupied(known) => known.into_mut(),
            Entry::Vacant(new) => new.insert(self.plan(w.rows, w.cols, n)?),
        };
        device.bind()?;
        let (one, zero) = (1.0f32, 0.0f32);
        let at = |b: &Buffer| b.at() as *mut c_void;
        let stream: CUstream = device.stream().cu_stream();
        // SAFETY: operands have the sizes that the plan's layouts say (checked above); scalars are read before the call
        // returns; the workspace serves one product at a time, since one stream does everything in order.
        unsafe {
            lt::matmul(
                self.handle,
                self.operation,
                (&raw const one).cast(),
                (&raw const zero).cast(),
                at(&w.weights),
                p.weights,
                at(x),
                p.input,
                at(out),
                p.output,
                at(out),
                p.output,
                &p.algorithm,
                at(&self.workspace),
                p.workspace,
                stream.cast(),
            )
        }
        .map_err(failed("multiply"))
    }
}

impl Drop for Blas {
    fn drop(&mut self) {
        let plans = self.plans.get_mut().unwrap_or_else(|e| e.into_inner());
        // SAFETY: each was made by this value and is destroyed once; products under way have what they need.
        unsafe {
            for p in plans.values() {
                for layout in [p.weights, p.input, p.output] {
                    let _ = lt::destroy_matrix_layout(layout);
                }
            }
            let _ = lt::destroy_matmul_pref(self.preference);
            let _ = lt::destroy_matmul_desc(self.operation);
            let _ = lt::destroy_handle(self.handle);
        }
    }
}

impl Matrix {
    /// Rows `[rows][cols]` of fp16, as bits.
    pub fn new(device: &Device, weights: &[u16], cols: usize) -> Result<Self, CudaError> {
        Ok(Matrix { weights: device.upload(weights)?, rows: weights.len() / cols.max(1), cols })
    }
}
