//! Launches that are recorded once and then repeated by a single call.

use cudarc::driver::CudaGraph;
use cudarc::driver::sys::{CUgraphInstantiate_flags, CUstreamCaptureMode};

use crate::CudaError;
use crate::device::Device;
use crate::error::During;

/// Work of the main queue, with the places of memory that it was recorded with.
pub(crate) struct Graph(CudaGraph);

// SAFETY: the driver asks that nobody else uses a graph at the same time: it has one owner, who launches it through `&mut`.
#[allow(unsafe_code)]
unsafe impl Send for Graph {}

impl Graph {
    /// Records what `launches` puts into the main queue, none of which runs yet. It takes no memory and waits for nothing.
    ///
    /// # Errors
    /// Those of `launches`; or the driver can't record it.
    pub fn record(device: &Device, launches: impl FnOnce() -> Result<(), CudaError>) -> Result<Self, CudaError> {
        const DURING: &str = "record a graph";
        let mode = CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        device.stream().begin_capture(mode).during(DURING)?;
        let launched = launches();
        // Ended in any case, or the queue would go on recording.
        let graph = device.stream().end_capture(CUgraphInstantiate_flags(0)).during(DURING);
        launched?;
        graph?.map(Graph).ok_or(CudaError::Append { problem: "nothing was recorded" })
    }

    /// Puts all of it into the main queue.
    ///
    /// # Errors
    /// The driver fails.
    pub fn launch(&mut self) -> Result<(), CudaError> {
        self.0.launch().during("launch a graph")
    }
}
