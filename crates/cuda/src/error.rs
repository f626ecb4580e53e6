//! What can go wrong with a card.

use std::path::PathBuf;

use cudarc::driver::DriverError;

/// A GPU operation failed.
#[derive(Debug, thiserror::Error)]
pub enum CudaError {
    /// No driver on this machine.
    #[error("no NVIDIA driver: libcuda.so.1 is not found; install one, or compute on the CPU")]
    NoDriver,
    /// The driver knows no such card.
    #[error("no GPU {ordinal}: the driver sees {count}")]
    NoDevice {
        /// The card asked for.
        ordinal: usize,
        /// Cards there are.
        count: usize,
    },
    /// The runtime compiler is missing.
    #[error(
        "no CUDA compiler: {tried}; install NVRTC (libnvrtc.so.13), set KVQUANT_NVRTC to its folder, or set KVQUANT_MODULES to a folder that `kvquant gpu-check --compile` filled for this card"
    )]
    NoCompiler {
        /// What was looked for.
        tried: String,
    },
    /// The library of matrix products is missing.
    #[error(
        "no cuBLASLt: libcublasLt.so.13 is not found; install it (it comes with CUDA 13, and as the pip package nvidia-cublas), or set KVQUANT_CUBLAS to its folder, or compute on the CPU"
    )]
    NoBlas,
    /// cuBLASLt refused.
    #[error("cannot {operation}: cuBLASLt says {status}")]
    Blas {
        /// What was tried.
        operation: &'static str,
        /// Its answer.
        status: String,
    },
    /// NVRTC refused a kernel.
    #[error("cannot compile {kernel} for {arch}: {log}")]
    Compile {
        /// Its file and definitions.
        kernel: String,
        /// The architecture.
        arch: String,
        /// What the compiler says.
        log: String,
    },
    /// The driver refused.
    #[error("{operation}: {source}")]
    Driver {
        /// What was tried.
        operation: &'static str,
        /// The driver's answer.
        source: DriverError,
    },
    /// A file of compiled kernels.
    #[error("{}: cannot {operation}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What was tried.
        operation: &'static str,
        /// Why not.
        source: std::io::Error,
    },
    /// The kernels do not do this.
    #[error("the GPU kernels do not support {what}; supported: {supported}")]
    Unsupported {
        /// What was asked for.
        what: String,
        /// What there is.
        supported: &'static str,
    },
    /// Appending met something that it cannot store.
    #[error("append: {problem}")]
    Append {
        /// Which.
        problem: &'static str,
    },
    /// A quantizer does not fit.
    #[error(transparent)]
    Quant(#[from] kvquant_quant::QuantError),
}

/// Names the operation that the driver refused.
pub(crate) trait During<T> {
    fn during(self, operation: &'static str) -> Result<T, CudaError>;
}

impl<T> During<T> for Result<T, DriverError> {
    fn during(self, operation: &'static str) -> Result<T, CudaError> {
        self.map_err(|source| CudaError::Driver { operation, source })
    }
}
