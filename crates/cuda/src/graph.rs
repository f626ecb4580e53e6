//! Launches that are recorded once and then repeated by a single call.
#![allow(unsafe_code)]

use cudarc::driver::CudaGraph;
use cudarc::driver::result::graph::launch;

use crate::CudaError;
use crate::device::Device;
use crate::error::During;

/// Work for the main queue, with the places of memory that it was recorded with.
pub(crate) struct Graph(CudaGraph);

// SAFETY: the driver asks that nobody else uses a graph at the same time: it has one owner, who launches it through `&mut`.
unsafe impl Send for Graph {}

impl Graph {
    /// Records what `launches` would put into the main queue; none of it runs. It must take no memory and wait for nothing.
    ///
    /// # Errors
    /// Those of `launches`; or the driver can't record it.
    pub fn record(device: &Device, launches: impl FnOnce() -> Result<(), CudaError>) -> Result<Self, CudaError> {
        device.record(launches).map(Graph)
    }

    /// Puts all of it into the main queue of the device that it was recorded on.
    ///
    /// # Errors
    /// The driver fails.
    pub fn launch(&mut self, device: &Device) -> Result<(), CudaError> {
        device.bind()?;
        // SAFETY: the graph lives, and what its kernels use is there as long as its owner's key holds (model/sequence).
        unsafe { launch(self.0.cu_graph_exec(), device.stream().cu_stream()) }.during("launch a graph")
    }
}
