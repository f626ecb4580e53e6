//! How long work on a card takes.

use cudarc::driver::CudaEvent;
use cudarc::driver::sys::CUevent_flags_enum;

use super::Device;
use crate::CudaError;
use crate::error::During;

impl Device {
    fn event(&self) -> Result<CudaEvent, CudaError> {
        let event = self.context.new_event(Some(CUevent_flags_enum::CU_EVENT_DEFAULT)).during("make an event")?;
        event.record(&self.stream).during("record an event")?;
        Ok(event)
    }

    /// Seconds that a call takes: the median of `runs` timings of `each` calls in a row. Calls are numbered, so that they
    /// can rotate over buffers.
    ///
    /// # Errors
    /// A call fails.
    pub fn time(
        &self,
        runs: usize,
        each: usize,
        mut call: impl FnMut(usize) -> Result<(), CudaError>,
    ) -> Result<f64, CudaError> {
        let mut n = 0;
        let mut times = Vec::with_capacity(runs);
        for _ in 0..each.min(2) {
            call(n)?;
            n += 1;
        }
        self.wait()?;
        for _ in 0..runs {
            let start = self.event()?;
            for _ in 0..each {
                call(n)?;
                n += 1;
            }
            let end = self.event()?;
            times.push(start.elapsed_ms(&end).during("time a kernel")? as f64 / 1e3 / each as f64);
        }
        times.sort_by(f64::total_cmp);
        Ok(times[times.len() / 2])
    }
}
