//! A card: memory, launches; `time` measures them.
#![allow(unsafe_code)]

mod time;

use std::cell::Cell;
use std::collections::HashMap;
use std::ffi::c_void;
use std::sync::{Arc, Mutex};

use bytemuck::Pod;
use cudarc::driver::sys::{
    CUdevice_attribute_enum as Attribute, CUfunction_attribute_enum, CUgraphInstantiate_flags, CUlaunchAttribute,
    CUlaunchAttributeID, CUlaunchAttributeValue, CUlaunchConfig, CUstreamCaptureMode, cuLaunchKernelEx,
    is_culib_present,
};
use cudarc::driver::{
    CudaContext, CudaEvent, CudaFunction, CudaGraph, CudaSlice, CudaStream, DevicePtr, DeviceRepr, LaunchConfig,
};
use cudarc::nvrtc::Ptx;

use crate::CudaError;
use crate::error::During;
use crate::modules::{Build, Modules};

/// Memory of a card.
pub struct Buffer {
    slice: CudaSlice<u8>,
}

impl Buffer {
    /// Where it lies.
    pub(crate) fn at(&self) -> u64 {
        // The main stream orders all that uses a buffer: the side stream's work lies between two of its marks.
        self.slice.device_ptr(self.slice.stream()).0
    }

    /// Bytes.
    pub fn bytes(&self) -> usize {
        self.slice.len()
    }
}

/// What the driver tells of a card.
#[derive(Debug, Clone)]
pub struct Info {
    /// The vendor's name.
    pub name: String,
    /// Compute capability.
    pub capability: (u32, u32),
    /// What kernels are compiled for.
    pub arch: String,
    /// Multiprocessors.
    pub processors: usize,
    /// Shared memory of a block of threads, at most.
    pub shared: usize,
    /// Second-level cache.
    pub cache: usize,
    /// Memory.
    pub memory: usize,
}

/// One card.
pub struct Device {
    context: Arc<CudaContext>,
    stream: Arc<CudaStream>,
    side: Arc<CudaStream>,
    modules: Modules,
    /// Stands for the main stream on a thread that records, so that what other threads do is not recorded too.
    recording: Arc<CudaStream>,
    records: Mutex<()>,
    loaded: Mutex<HashMap<Build, HashMap<&'static str, CudaFunction>>>,
    info: Info,
}

thread_local! {
    static RECORDS: Cell<bool> = const { Cell::new(false) };
}

/// A queue of work. What is in the side queue may run beside the main one's, where that leaves room on the card.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Queue {
    Main,
    Side,
}

/// A point in a queue, which the other one can wait for.
pub(crate) struct Mark(CudaEvent);

/// When a kernel may take room on the card.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Start {
    /// Once the one before it in the queue has ended.
    After,
    /// As soon as the one before it lets it, where cards can do that: it waits by itself before it uses what others write
    /// (kernels/device.cuh, `wait_for_former`).
    Early,
}

/// An argument of a kernel.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Arg {
    Word(u32),
    Long(u64),
    Float(f32),
}

/// How many cards the driver sees; 0 without a driver.
pub fn count() -> usize {
    // SAFETY: only looks whether the driver's library can be loaded; its initializers need nothing from us.
    if !unsafe { is_culib_present() } {
        return 0;
    }
    CudaContext::device_count().map_or(0, |n| n.max(0) as usize)
}

impl Device {
    /// Opens a card.
    ///
    /// # Errors
    /// No driver, or no such card.
    pub fn open(ordinal: usize, modules: Modules) -> Result<Self, CudaError> {
        // SAFETY: as in `count`.
        if !unsafe { is_culib_present() } {
            return Err(CudaError::NoDriver);
        }
        cudarc::driver::result::init().during("start the driver")?;
        let count = CudaContext::device_count().during("count GPUs")?.max(0) as usize;
        if ordinal >= count {
            return Err(CudaError::NoDevice { ordinal, count });
        }
        let context = CudaContext::new(ordinal).during("open the GPU")?;
        // SAFETY: the main stream does everything in order, but for work between its marks, so buffers need no events.
        unsafe { context.disable_event_tracking() };
        let number = |a| context.attribute(a).map(|n| n.max(0) as usize).during("ask for an attribute");
        let (major, minor) = context.compute_capability().during("ask for the compute capability")?;
        let arch = format!("sm_{major}{minor}{}", if (major, minor) == (9, 0) { "a" } else { "" });
        if major < 8 {
            return Err(CudaError::Unsupported {
                what: format!("compute capability {major}.{minor}"),
                supported: "8.0 and later",
            });
        }
        let info = Info {
            name: context.name().during("ask for the name")?,
            capability: (major as u32, minor as u32),
            arch,
            processors: number(Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?,
            shared: number(Attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)?,
            cache: number(Attribute::CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE)?,
            memory: context.total_mem().during("ask for the memory")?,
        };
        let (last, first) = cudarc::driver::result::stream::get_priority_range().during("ask for priorities")?;
        let stream = context.new_stream_with_priority(first).during("make a stream")?;
        let side = context.new_stream_with_priority(last).during("make a stream")?;
        let recording = context.new_stream().during("make a stream")?;
        let (records, loaded) = (Mutex::new(()), Mutex::new(HashMap::new()));
        Ok(Device { context, stream, side, modules, recording, records, loaded, info })
    }

    /// What the driver tells.
    pub fn info(&self) -> &Info {
        &self.info
    }

    /// Memory that is free.
    ///
    /// # Errors
    /// The driver fails.
    pub fn free_memory(&self) -> Result<usize, CudaError> {
        self.wait()?;
        Ok(self.context.mem_get_info().during("ask for free memory")?.0)
    }

    /// Memory with every bit set: a float that is read before it is written is no number.
    ///
    /// # Errors
    /// Too little memory.
    pub fn poisoned(&self, bytes: usize) -> Result<Buffer, CudaError> {
        // SAFETY: written before anything reads it.
        let slice = unsafe { self.stream.alloc::<u8>(bytes.max(16)) }.during("take GPU memory")?;
        let buffer = Buffer { slice };
        // SAFETY: the range is the buffer, which outlives the operation by the order of the stream.
        unsafe { cudarc::driver::result::memset_d8_async(buffer.at(), 0xff, buffer.bytes(), self.stream.cu_stream()) }
            .during("fill GPU memory")?;
        Ok(buffer)
    }

    /// Memory of zeros.
    ///
    /// # Errors
    /// Too little memory.
    pub fn zeros(&self, bytes: usize) -> Result<Buffer, CudaError> {
        Ok(Buffer { slice: self.stream.alloc_zeros::<u8>(bytes.max(16)).during("take GPU memory")? })
    }

    /// Memory with anything in it, for what is written before it is read.
    ///
    /// # Errors
    /// Too little memory.
    pub fn room(&self, bytes: usize) -> Result<Buffer, CudaError> {
        // SAFETY: bytes have no invalid values, and the callers within the crate write before they read.
        let slice = unsafe { self.stream.alloc::<u8>(bytes.max(16)) }.during("take GPU memory")?;
        Ok(Buffer { slice })
    }

    /// A copy on the card.
    ///
    /// # Errors
    /// Too little memory.
    pub fn upload<T: Pod>(&self, data: &[T]) -> Result<Buffer, CudaError> {
        let mut buffer = self.zeros(size_of_val(data))?;
        self.write(&mut buffer, 0, data)?;
        Ok(buffer)
    }

    /// Overwrites a part, from a byte on.
    ///
    /// # Errors
    /// The driver fails.
    pub fn write<T: Pod>(&self, buffer: &mut Buffer, from: usize, data: &[T]) -> Result<(), CudaError> {
        let bytes: &[u8] = bytemuck::cast_slice(data);
        if bytes.is_empty() {
            return Ok(());
        }
        let mut part = buffer.slice.slice_mut(from..from + bytes.len());
        self.stream.memcpy_htod(bytes, &mut part).during("copy to the GPU")
    }

    /// Overwrites the beginning of a buffer that is shared.
    pub(crate) fn overwrite<T: Pod>(&self, buffer: &Buffer, data: &[T]) -> Result<(), CudaError> {
        let bytes: &[u8] = bytemuck::cast_slice(data);
        if bytes.len() > buffer.bytes() {
            return Err(CudaError::Append { problem: "more bytes than the buffer has" });
        }
        // SAFETY: the range lies in the buffer (checked above); what else uses it is ordered by the one stream.
        unsafe { cudarc::driver::result::memcpy_htod_async(buffer.at(), bytes, self.stream.cu_stream()) }
            .during("copy to the GPU")?;
        self.wait()
    }

    /// The first `n` elements.
    ///
    /// # Errors
    /// The driver fails, or a kernel before this failed.
    pub fn read<T: Pod>(&self, buffer: &Buffer, n: usize) -> Result<Vec<T>, CudaError> {
        let mut out = vec![T::zeroed(); n];
        let bytes: &mut [u8] = bytemuck::cast_slice_mut(&mut out);
        let part = buffer.slice.slice(0..bytes.len());
        self.stream.memcpy_dtoh(&part, bytes).during("copy from the GPU")?;
        self.wait()?;
        Ok(out)
    }

    /// Elements from a byte on, once all before is done.
    ///
    /// # Errors
    /// The driver fails, or a kernel before this failed.
    pub fn read_into<T: Pod>(&self, buffer: &Buffer, from: usize, out: &mut [T]) -> Result<(), CudaError> {
        let bytes: &mut [u8] = bytemuck::cast_slice_mut(out);
        if !bytes.is_empty() {
            let part = buffer.slice.slice(from..from + bytes.len());
            self.stream.memcpy_dtoh(&part, bytes).during("copy from the GPU")?;
        }
        self.wait()
    }

    /// Copies bytes from one buffer to another.
    ///
    /// # Errors
    /// The driver fails.
    pub(crate) fn copy(
        &self,
        from: &Buffer,
        from_byte: usize,
        to: &mut Buffer,
        to_byte: usize,
        bytes: usize,
    ) -> Result<(), CudaError> {
        if bytes == 0 {
            return Ok(());
        }
        let from = from.slice.slice(from_byte..from_byte + bytes);
        let mut to = to.slice.slice_mut(to_byte..to_byte + bytes);
        self.stream.memcpy_dtod(&from, &mut to).during("copy on the GPU")
    }

    /// The stream that does everything.
    pub(crate) fn stream(&self) -> &Arc<CudaStream> {
        self.queue(Queue::Main)
    }

    /// Records what `launches` would put into the main queue.
    pub(crate) fn record(&self, launches: impl FnOnce() -> Result<(), CudaError>) -> Result<CudaGraph, CudaError> {
        const DURING: &str = "record a graph";
        let _alone = self.records.lock().unwrap_or_else(|e| e.into_inner());
        let mode = CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        self.recording.begin_capture(mode).during(DURING)?;
        RECORDS.set(true);
        let launched = launches();
        RECORDS.set(false);
        // Ended in any case, or the stream would go on recording.
        let graph = self.recording.end_capture(CUgraphInstantiate_flags(0)).during(DURING);
        launched?;
        graph?.ok_or(CudaError::Append { problem: "nothing was recorded" })
    }

    /// Makes this card the current one of the calling thread.
    ///
    /// # Errors
    /// The driver fails.
    pub(crate) fn bind(&self) -> Result<(), CudaError> {
        self.context.bind_to_thread().during("use the GPU from this thread")
    }

    /// Waits until all is done.
    ///
    /// # Errors
    /// A kernel failed.
    pub fn wait(&self) -> Result<(), CudaError> {
        self.stream.synchronize().during("run kernels")
    }

    /// A function, with its right to so much shared memory.
    pub(crate) fn function(&self, build: &Build, name: &'static str, shared: usize) -> Result<CudaFunction, CudaError> {
        let mut loaded = self.loaded.lock().unwrap_or_else(|e| e.into_inner());
        if let Some(f) = loaded.get(build).and_then(|names| names.get(name)) {
            return Ok(f.clone());
        }
        let code = self.modules.get(build, &self.info.arch)?;
        let module = self.context.load_module(Ptx::from_binary(code)).during("load a kernel")?;
        let f = module.load_function(name).during("find a kernel")?;
        if shared > 0 {
            f.set_attribute(CUfunction_attribute_enum::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, shared as i32)
                .during("reserve shared memory")?;
        }
        loaded.entry(build.clone()).or_default().insert(name, f.clone());
        Ok(f)
    }

    /// # Safety
    /// The kernel takes exactly these arguments, and stays within the memory that they point to. If it starts early, it waits by
    /// itself.
    pub(crate) unsafe fn launch(
        &self,
        f: &CudaFunction,
        grid: [usize; 3],
        threads: usize,
        args: &[Arg],
        start: Start,
    ) -> Result<(), CudaError> {
        let at = |a: &Arg| match a {
            Arg::Word(x) => std::ptr::from_ref(x).cast_mut().cast(),
            Arg::Long(x) => std::ptr::from_ref(x).cast_mut().cast(),
            Arg::Float(x) => std::ptr::from_ref(x).cast_mut().cast(),
        };
        let mut arguments: Vec<*mut c_void> = args.iter().map(at).collect();
        // SAFETY: the caller's promise; the arguments live.
        unsafe { self.launch_all(Queue::Main, f, config(grid, threads, 0), &mut arguments, start) }
    }

    /// # Safety
    /// The kernel takes exactly this argument, by value, and stays within the memory that it points to.
    pub(crate) unsafe fn launch_with<A: DeviceRepr>(
        &self,
        f: &CudaFunction,
        grid: [usize; 3],
        threads: usize,
        shared: usize,
        args: &A,
    ) -> Result<(), CudaError> {
        // SAFETY: the caller's promise.
        unsafe { self.launch_in(Queue::Main, f, grid, threads, shared, args) }
    }

    /// # Safety
    /// As for [`launch_with`](Device::launch_with); in the side queue, also that marks order the kernel with all others that
    /// use the same memory.
    pub(crate) unsafe fn launch_in<A: DeviceRepr>(
        &self,
        queue: Queue,
        f: &CudaFunction,
        grid: [usize; 3],
        threads: usize,
        shared: usize,
        args: &A,
    ) -> Result<(), CudaError> {
        let mut arguments = [std::ptr::from_ref(args).cast_mut().cast()];
        // SAFETY: the caller's promise; the argument lives.
        unsafe { self.launch_all(queue, f, config(grid, threads, shared), &mut arguments, Start::After) }
    }

    /// [`launch_with`](Device::launch_with) of a kernel that starts early.
    ///
    /// # Safety
    /// As for `launch_with`; the kernel waits by itself (see [`Start::Early`]).
    pub(crate) unsafe fn launch_early<A: DeviceRepr>(
        &self,
        f: &CudaFunction,
        grid: [usize; 3],
        threads: usize,
        shared: usize,
        args: &A,
    ) -> Result<(), CudaError> {
        let mut arguments = [std::ptr::from_ref(args).cast_mut().cast()];
        // SAFETY: the caller's promise; the argument lives.
        unsafe { self.launch_all(Queue::Main, f, config(grid, threads, shared), &mut arguments, Start::Early) }
    }

    /// # Safety
    /// The arguments point to what the kernel takes, which stays within the memory that it is told of. If it starts early, it
    /// waits by itself.
    unsafe fn launch_all(
        &self,
        queue: Queue,
        f: &CudaFunction,
        c: LaunchConfig,
        arguments: &mut [*mut c_void],
        start: Start,
    ) -> Result<(), CudaError> {
        self.bind()?;
        let mut early = CUlaunchAttribute {
            id: CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION,
            pad: [0; 4],
            value: CUlaunchAttributeValue { programmaticStreamSerializationAllowed: 1 },
        };
        let is_early = matches!(start, Start::Early) && self.info.capability.0 >= 9;
        let launch = CUlaunchConfig {
            gridDimX: c.grid_dim.0,
            gridDimY: c.grid_dim.1,
            gridDimZ: c.grid_dim.2,
            blockDimX: c.block_dim.0,
            blockDimY: c.block_dim.1,
            blockDimZ: c.block_dim.2,
            sharedMemBytes: c.shared_mem_bytes,
            hStream: self.queue(queue).cu_stream(),
            attrs: &mut early,
            numAttrs: is_early.into(),
        };
        // SAFETY: the caller's promise; the driver reads the configuration and the arguments during the call.
        unsafe { cuLaunchKernelEx(&launch, f.cu_function(), arguments.as_mut_ptr(), std::ptr::null_mut()) }
            .result()
            .during("launch a kernel")
    }

    fn queue(&self, queue: Queue) -> &Arc<CudaStream> {
        match queue {
            Queue::Main if RECORDS.get() => &self.recording,
            Queue::Main => &self.stream,
            Queue::Side => &self.side,
        }
    }

    /// Where a queue's work ends now.
    pub(crate) fn mark(&self, queue: Queue) -> Result<Mark, CudaError> {
        self.queue(queue).record_event(None).map(Mark).during("record an event")
    }

    /// What comes into a queue from now on begins after a mark.
    pub(crate) fn after(&self, queue: Queue, mark: &Mark) -> Result<(), CudaError> {
        self.queue(queue).wait(&mark.0).during("wait for an event")
    }
}

fn config(grid: [usize; 3], threads: usize, shared: usize) -> LaunchConfig {
    LaunchConfig {
        grid_dim: (grid[0] as u32, grid[1] as u32, grid[2] as u32),
        block_dim: (threads as u32, 1, 1),
        shared_mem_bytes: shared as u32,
    }
}
