//! One GPU: its context, what it is, streams, events, graphs and buffers.
//!
//! Everything here that allocates or waits says so; the launches of the other modules do neither.

use crate::error::Error;
use crate::nvml::{Clocks, Nvml};
use cudarc::driver::sys::{CUdevice_attribute_enum as Attribute, CUstream};
use cudarc::driver::{CudaContext, CudaStream, DriverError, result, sys};
use dsv_spec::Arch;
use std::ffi::{CStr, c_char, c_void};
use std::sync::Arc;

/// Turns the driver's answer into an error that names the call.
pub(crate) fn driver<T>(call: impl Into<String>, answer: Result<T, DriverError>) -> Result<T, Error> {
    answer.map_err(|e| {
        let text = |t: Result<&CStr, DriverError>| match t {
            Ok(t) => t.to_string_lossy().into_owned(),
            Err(_) => "unknown to this driver".to_string(),
        };
        Error::Driver {
            call: call.into(),
            code: e.0 as i32,
            name: text(e.error_name()),
            text: text(e.error_string()),
        }
    })
}

/// The CUDA version whose driver has every call made here (cuEventElapsedTime_v2 is the newest).
const OLDEST_CUDA: i32 = 12_080;

/// What a GPU is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceInfo {
    /// Its name as the driver gives it; the key of the dispatch tables.
    pub name: String,
    /// Compute capability (major, minor).
    pub capability: (i32, i32),
    /// Multiprocessors.
    pub multiprocessors: u32,
    /// Bytes of memory.
    pub memory_bytes: u64,
    /// Bytes of L2 cache.
    pub l2_bytes: u64,
    /// Dynamic shared memory a CTA may opt in to, bytes.
    pub smem_bytes_per_cta: u32,
    /// Driver version, for example `580.95.05`; without NVML the CUDA version it serves, `CUDA 13.0`.
    pub driver: String,
    /// Newest CUDA version the driver serves, for example 13000.
    pub cuda_version: i32,
}

/// A GPU whose primary context (PyTorch's too) this process retains while the value lives.
pub struct Device {
    context: Arc<CudaContext>,
    info: DeviceInfo,
    nvml: Option<Nvml>,
}

impl std::fmt::Debug for Device {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.info.fmt(f)
    }
}

impl Device {
    /// Opens the GPU with this ordinal: loads the driver, retains the primary context, reads what the GPU is.
    ///
    /// # Errors
    /// [`Error::NoDriver`], [`Error::OldDriver`], [`Error::NoSuchGpu`], or what the driver answers.
    pub fn open(ordinal: usize) -> Result<Arc<Device>, Error> {
        // SAFETY: asks the loader for the driver's library; its initialisers have no precondition.
        if !unsafe { sys::is_culib_present() } {
            return Err(Error::NoDriver);
        }
        let mut cuda_version = 0;
        // SAFETY: writes one integer.
        driver("cuDriverGetVersion", unsafe { sys::cuDriverGetVersion(&mut cuda_version).result() })?;
        if cuda_version < OLDEST_CUDA {
            return Err(Error::OldDriver { cuda_version });
        }
        driver("cuInit", result::init())?;
        let count = driver("cuDeviceGetCount", result::device::get_count())?.max(0) as usize;
        if ordinal >= count {
            return Err(Error::NoSuchGpu { ordinal, count });
        }
        let context = driver("cuDevicePrimaryCtxRetain", CudaContext::new(ordinal))?;
        // SAFETY: this crate orders its own streams, and hands out no slice that relies on tracked events.
        unsafe { context.disable_event_tracking() };
        let cu_device = context.cu_device();
        let attribute = |attribute| {
            // SAFETY: the device was found by the driver above.
            driver("cuDeviceGetAttribute", unsafe { result::device::get_attribute(cu_device, attribute) })
        };
        let capability = (
            attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?,
            attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?,
        );
        let mut bus = [0 as c_char; 32];
        // SAFETY: writes at most as many bytes as the buffer has, and a terminator.
        let bus_id = unsafe {
            driver(
                "cuDeviceGetPCIBusId",
                sys::cuDeviceGetPCIBusId(bus.as_mut_ptr(), bus.len() as i32, cu_device).result(),
            )?;
            CStr::from_ptr(bus.as_ptr())
        };
        let nvml = Nvml::open(bus_id);
        let driver_version = nvml
            .as_ref()
            .and_then(|n| n.driver())
            .map(str::to_string)
            .unwrap_or_else(|| format!("CUDA {}.{}", cuda_version / 1000, cuda_version % 1000 / 10));
        let info = DeviceInfo {
            name: driver("cuDeviceGetName", result::device::get_name(cu_device))?,
            capability,
            multiprocessors: attribute(Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)? as u32,
            // SAFETY: the device was found by the driver above.
            memory_bytes: driver("cuDeviceTotalMem", unsafe { result::device::total_mem(cu_device) })? as u64,
            l2_bytes: attribute(Attribute::CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE)? as u64,
            smem_bytes_per_cta: attribute(Attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)?
                as u32,
            driver: driver_version,
            cuda_version,
        };
        Ok(Arc::new(Device { context, info, nvml }))
    }

    /// What the GPU is.
    pub fn info(&self) -> &DeviceInfo {
        &self.info
    }

    /// The architecture whose kernels run here.
    ///
    /// # Errors
    /// [`Error::UnsupportedGpu`].
    pub fn arch(&self) -> Result<Arch, Error> {
        let (major, minor) = self.info.capability;
        Arch::ALL.iter().copied().find(|a| a.runs_on(major, minor)).ok_or_else(|| Error::UnsupportedGpu {
            gpu: self.info.name.clone(),
            capability: self.info.capability,
        })
    }

    /// The architecture asked for, where this GPU has its instructions; its own where none is asked for.
    ///
    /// # Errors
    /// [`Error::UnsupportedGpu`]; [`Error::Architecture`] with those this GPU runs.
    pub fn arch_or(&self, asked: Option<Arch>) -> Result<Arch, Error> {
        let own = self.arch()?;
        let (major, minor) = self.info.capability;
        match asked {
            None => Ok(own),
            Some(arch) if arch.nvrtc_for(major, minor).is_some() => Ok(arch),
            Some(arch) => Err(Error::Architecture {
                arch,
                gpu: self.info.name.clone(),
                capability: self.info.capability,
            }),
        }
    }

    /// The clocks now; `None` without NVML.
    pub fn clocks(&self) -> Option<Clocks> {
        self.nvml.as_ref().and_then(Nvml::clocks)
    }

    /// The driver's major version (580 of `580.95.05`); without NVML, the one that introduced its CUDA version.
    pub fn driver_major(&self) -> u32 {
        let named = self.nvml.as_ref().and_then(|n| n.driver()?.split('.').next()?.parse().ok());
        named.unwrap_or(match self.info.cuda_version / 1000 {
            ..=11 => 450,
            12 => 525,
            _ => 580,
        })
    }

    /// cudarc's context, for libraries that want one (cublasLt).
    pub fn context(&self) -> &Arc<CudaContext> {
        &self.context
    }

    /// Makes the context current on this thread, as every call here does by itself.
    ///
    /// # Errors
    /// What the driver answers, also for an earlier failure in a destructor.
    pub fn bind(&self) -> Result<(), Error> {
        driver("cuCtxSetCurrent", self.context.bind_to_thread())
    }

    /// A new stream that does not wait for the default one.
    ///
    /// # Errors
    /// What the driver answers.
    pub fn new_stream(&self) -> Result<Stream, Error> {
        Ok(Stream { inner: driver("cuStreamCreate", self.context.new_stream())? })
    }

    /// The default stream.
    pub fn default_stream(&self) -> Stream {
        Stream { inner: self.context.default_stream() }
    }

    /// Another library's stream (PyTorch's `cuda_stream`, as an address); it is not destroyed here.
    ///
    /// # Safety
    /// The stream belongs to this GPU's primary context and outlives the value.
    pub unsafe fn borrow_stream(&self, raw: CUstream) -> Stream {
        // SAFETY: the caller's promise.
        Stream { inner: unsafe { self.context.wrap_borrowed_stream(raw) } }
    }

    /// A new event that takes the time.
    ///
    /// # Errors
    /// What the driver answers.
    pub fn new_event(&self) -> Result<Event, Error> {
        self.bind()?;
        let raw = driver("cuEventCreate", result::event::create(sys::CUevent_flags_enum::CU_EVENT_DEFAULT))?;
        Ok(Event { context: self.context.clone(), raw })
    }

    /// Allocates `bytes` of device memory (at least one), aligned to 256 bytes, uninitialised.
    ///
    /// # Errors
    /// What the driver answers, out of memory above all.
    pub fn alloc(&self, bytes: usize) -> Result<DeviceBuffer, Error> {
        self.bind()?;
        // SAFETY: the context is current; the address is owned by the buffer.
        let address =
            driver(format!("cuMemAlloc of {bytes} bytes"), unsafe { result::malloc_sync(bytes.max(1)) })?;
        Ok(DeviceBuffer { context: self.context.clone(), address, bytes })
    }

    /// Allocates device memory and copies `data` into it.
    ///
    /// # Errors
    /// As [`Device::alloc`] and [`DeviceBuffer::write`].
    pub fn upload<T: Plain>(&self, stream: &Stream, data: &[T]) -> Result<DeviceBuffer, Error> {
        let buffer = self.alloc(size_of_val(data))?;
        buffer.write(stream, 0, data)?;
        Ok(buffer)
    }

    /// Allocates page-locked host memory, zeroed, for copies that run beside the host.
    ///
    /// # Errors
    /// What the driver answers.
    pub fn alloc_pinned(&self, bytes: usize) -> Result<PinnedBuffer, Error> {
        self.bind()?;
        // SAFETY: the context is current; the memory is owned by the buffer and zeroed before anyone reads it.
        let pointer = unsafe {
            let pointer =
                driver(format!("cuMemHostAlloc of {bytes} bytes"), result::malloc_host(bytes.max(1), 0))?;
            std::ptr::write_bytes(pointer.cast::<u8>(), 0, bytes.max(1));
            pointer
        };
        Ok(PinnedBuffer { context: self.context.clone(), pointer, bytes })
    }

    /// (free, total) bytes of device memory now.
    ///
    /// # Errors
    /// What the driver answers.
    pub fn memory(&self) -> Result<(u64, u64), Error> {
        self.bind()?;
        let (free, total) = driver("cuMemGetInfo", result::mem_get_info())?;
        Ok((free as u64, total as u64))
    }

    /// Waits for everything on this GPU's context.
    ///
    /// # Errors
    /// What the driver answers, failures of earlier kernels included.
    pub fn synchronize(&self) -> Result<(), Error> {
        self.bind()?;
        driver("cuCtxSynchronize", result::ctx::synchronize())
    }
}

/// Element types that may be copied byte for byte and read from any bytes.
///
/// # Safety
/// No padding, no invalid bit pattern, no pointer.
pub unsafe trait Plain: Copy + 'static {}
macro_rules! plain { ($($t:ty),+) => { $(
    // SAFETY: a number: no padding, every bit pattern valid.
    unsafe impl Plain for $t {}
)+ } }
plain!(u8, i8, u16, i16, u32, i32, u64, i64, f32, f64, half::bf16, half::f16);

/// A queue of work on one GPU. Cheap to clone; clones are the same queue.
#[derive(Clone, Debug)]
pub struct Stream {
    inner: Arc<CudaStream>,
}

impl Stream {
    /// cudarc's stream, for libraries that want one (cublasLt).
    pub fn cuda(&self) -> &Arc<CudaStream> {
        &self.inner
    }

    /// The driver's handle.
    pub fn raw(&self) -> CUstream {
        self.inner.cu_stream()
    }

    pub(crate) fn bind(&self) -> Result<(), Error> {
        driver("cuCtxSetCurrent", self.inner.context().bind_to_thread())
    }

    /// Waits for all work queued so far.
    ///
    /// # Errors
    /// What the driver answers, failures of earlier kernels included.
    pub fn synchronize(&self) -> Result<(), Error> {
        self.bind()?;
        // SAFETY: the stream is alive.
        driver("cuStreamSynchronize", unsafe { result::stream::synchronize(self.raw()) })
    }

    /// Queues the event: it happens when all work queued so far is done.
    ///
    /// # Errors
    /// What the driver answers.
    pub fn record(&self, event: &Event) -> Result<(), Error> {
        self.bind()?;
        // SAFETY: both are alive.
        driver("cuEventRecord", unsafe { result::event::record(event.raw, self.raw()) })
    }

    /// Work queued after this waits, on the GPU, for the event.
    ///
    /// # Errors
    /// What the driver answers.
    pub fn wait(&self, event: &Event) -> Result<(), Error> {
        self.bind()?;
        // SAFETY: both are alive.
        driver("cuStreamWaitEvent", unsafe {
            result::stream::wait_event(
                self.raw(),
                event.raw,
                sys::CUevent_wait_flags_enum::CU_EVENT_WAIT_DEFAULT,
            )
        })
    }

    /// Queues setting `bytes` bytes at a device address to `value`. 0xFF makes NaN of every float: poison for
    /// memory nobody may read before writing.
    ///
    /// # Safety
    /// The bytes are device memory that stays allocated until the work is done.
    ///
    /// # Errors
    /// What the driver answers.
    pub unsafe fn fill(&self, address: u64, value: u8, bytes: usize) -> Result<(), Error> {
        if bytes == 0 {
            return Ok(());
        }
        self.bind()?;
        // SAFETY: the caller's promise.
        driver("cuMemsetD8Async", unsafe { result::memset_d8_async(address, value, bytes, self.raw()) })
    }

    /// Queues a copy from host memory. From memory that is not page-locked the driver copies it aside first, and may
    /// wait for that.
    ///
    /// # Safety
    /// The target is device memory that stays allocated, and page-locked `data` stays unchanged, until the work is
    /// done.
    ///
    /// # Errors
    /// What the driver answers.
    pub unsafe fn copy_to_device<T: Plain>(&self, address: u64, data: &[T]) -> Result<(), Error> {
        if data.is_empty() {
            return Ok(());
        }
        self.bind()?;
        // SAFETY: the caller's promise.
        driver("cuMemcpyHtoDAsync", unsafe { result::memcpy_htod_async(address, data, self.raw()) })
    }

    /// Queues a copy to host memory; see [`Stream::copy_to_device`].
    ///
    /// # Safety
    /// The source is device memory that stays allocated, and `data` is neither read nor freed, until the work is
    /// done.
    ///
    /// # Errors
    /// What the driver answers.
    pub unsafe fn copy_to_host<T: Plain>(&self, data: &mut [T], address: u64) -> Result<(), Error> {
        if data.is_empty() {
            return Ok(());
        }
        self.bind()?;
        // SAFETY: the caller's promise.
        driver("cuMemcpyDtoHAsync", unsafe { result::memcpy_dtoh_async(data, address, self.raw()) })
    }

    /// Queues a copy within device memory.
    ///
    /// # Safety
    /// Both are device memory that stays allocated until the work is done, and do not overlap.
    ///
    /// # Errors
    /// What the driver answers.
    pub unsafe fn copy(&self, to: u64, from: u64, bytes: usize) -> Result<(), Error> {
        if bytes == 0 {
            return Ok(());
        }
        self.bind()?;
        // SAFETY: the caller's promise.
        driver("cuMemcpyDtoDAsync", unsafe { result::memcpy_dtod_async(to, from, bytes, self.raw()) })
    }

    /// Records what `work` queues on this stream as a graph instead of running it. Not on the default stream.
    ///
    /// # Errors
    /// The first error of `work` or of the driver; the stream is usable again either way.
    pub fn capture(&self, work: impl FnOnce() -> Result<(), Error>) -> Result<Graph, Error> {
        self.bind()?;
        // SAFETY: the stream is alive; the capture is ended below on every path that does not unwind.
        driver("cuStreamBeginCapture", unsafe {
            result::stream::begin_capture(
                self.raw(),
                sys::CUstreamCaptureMode_enum::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL,
            )
        })?;
        let outcome = work();
        // SAFETY: a capture is under way on this stream.
        let ended = driver("cuStreamEndCapture", unsafe { result::stream::end_capture(self.raw()) });
        let context = self.inner.context().clone();
        let mut graph = Graph { context, graph: std::ptr::null_mut(), exec: std::ptr::null_mut() };
        if let Ok(raw) = &ended {
            graph.graph = *raw;
        }
        outcome?;
        ended?;
        // SAFETY: the graph is alive, and the executable one is owned by the value.
        graph.exec = driver("cuGraphInstantiate", unsafe {
            let mut exec = std::ptr::null_mut();
            sys::cuGraphInstantiateWithFlags(&mut exec, graph.graph, 0).result().map(|()| exec)
        })?;
        Ok(graph)
    }

    /// Median-ready times: runs `work` once per sample between two events, waits at the end, and returns
    /// microseconds. `before` is queued before each sample and not timed (an L2 flush, say).
    ///
    /// # Errors
    /// The first error of either closure or of the driver.
    pub fn time_us(
        &self,
        device: &Device,
        samples: usize,
        mut before: impl FnMut() -> Result<(), Error>,
        mut work: impl FnMut() -> Result<(), Error>,
    ) -> Result<Vec<f64>, Error> {
        let mut events = Vec::with_capacity(samples);
        for _ in 0..samples {
            let (start, end) = (device.new_event()?, device.new_event()?);
            before()?;
            self.record(&start)?;
            work()?;
            self.record(&end)?;
            events.push((start, end));
        }
        self.synchronize()?;
        events.iter().map(|(start, end)| end.microseconds_since(start)).collect()
    }
}

/// A point in a stream.
pub struct Event {
    context: Arc<CudaContext>,
    raw: sys::CUevent,
}

// SAFETY: the driver's events may be used from any thread with the context current, which every call ensures.
unsafe impl Send for Event {}
// SAFETY: as above.
unsafe impl Sync for Event {}

impl Event {
    /// Waits until it has happened.
    ///
    /// # Errors
    /// What the driver answers.
    pub fn synchronize(&self) -> Result<(), Error> {
        driver("cuCtxSetCurrent", self.context.bind_to_thread())?;
        // SAFETY: the event is alive.
        driver("cuEventSynchronize", unsafe { result::event::synchronize(self.raw) })
    }

    /// Whether it has happened.
    ///
    /// # Errors
    /// What the driver answers, failures of earlier kernels included.
    pub fn happened(&self) -> Result<bool, Error> {
        driver("cuCtxSetCurrent", self.context.bind_to_thread())?;
        // SAFETY: the event is alive.
        match unsafe { result::event::query(self.raw) } {
            Err(DriverError(sys::CUresult::CUDA_ERROR_NOT_READY)) => Ok(false),
            answer => driver("cuEventQuery", answer).map(|()| true),
        }
    }

    /// Microseconds from `start` to this event; both must have happened.
    ///
    /// # Errors
    /// What the driver answers, `CUDA_ERROR_NOT_READY` where one has not happened.
    pub fn microseconds_since(&self, start: &Event) -> Result<f64, Error> {
        driver("cuCtxSetCurrent", self.context.bind_to_thread())?;
        // SAFETY: both events are alive.
        let ms = driver("cuEventElapsedTime", unsafe { result::event::elapsed(start.raw, self.raw) })?;
        Ok(ms as f64 * 1e3)
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        let _ = self.context.bind_to_thread();
        // SAFETY: created by this value and destroyed once.
        let _ = unsafe { result::event::destroy(self.raw) };
    }
}

/// Captured work, ready to be launched again and again with the addresses it was captured with.
pub struct Graph {
    context: Arc<CudaContext>,
    graph: sys::CUgraph,
    exec: sys::CUgraphExec,
}

// SAFETY: a graph may move between threads; it is not Sync, so no two use it at once.
unsafe impl Send for Graph {}

impl Graph {
    /// Queues the captured work.
    ///
    /// # Errors
    /// What the driver answers.
    pub fn launch(&self, stream: &Stream) -> Result<(), Error> {
        stream.bind()?;
        // SAFETY: the executable graph is alive.
        driver("cuGraphLaunch", unsafe { result::graph::launch(self.exec, stream.raw()) })
    }
}

impl Drop for Graph {
    fn drop(&mut self) {
        let _ = self.context.bind_to_thread();
        // SAFETY: each was created by this value and is destroyed once.
        unsafe {
            if !self.exec.is_null() {
                let _ = result::graph::exec_destroy(self.exec);
            }
            if !self.graph.is_null() {
                let _ = result::graph::destroy(self.graph);
            }
        }
    }
}

/// One allocation of device memory, freed with the value (which waits for the GPU).
pub struct DeviceBuffer {
    context: Arc<CudaContext>,
    address: u64,
    bytes: usize,
}

impl DeviceBuffer {
    /// Address of the first byte.
    pub fn address(&self) -> u64 {
        self.address
    }

    /// Size in bytes.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    fn range<T>(&self, offset_bytes: usize, elements: usize) -> Result<u64, Error> {
        let end = elements
            .checked_mul(size_of::<T>())
            .and_then(|b| b.checked_add(offset_bytes))
            .unwrap_or(usize::MAX);
        if end > self.bytes {
            return Err(Error::Argument {
                kernel: "copy of a device buffer".to_string(),
                what: "range",
                value: format!("{elements} elements of {} bytes from byte {offset_bytes}", size_of::<T>()),
                allowed: format!("within the buffer's {} bytes", self.bytes),
            });
        }
        Ok(self.address + offset_bytes as u64)
    }

    /// Copies `data` to byte `offset_bytes` in stream order, and waits.
    ///
    /// # Errors
    /// A range outside the buffer, or what the driver answers.
    pub fn write<T: Plain>(&self, stream: &Stream, offset_bytes: usize, data: &[T]) -> Result<(), Error> {
        let address = self.range::<T>(offset_bytes, data.len())?;
        // SAFETY: within this allocation, and both live until the wait below is over.
        unsafe { stream.copy_to_device(address, data)? };
        stream.synchronize()
    }

    /// Copies `elements` elements from byte `offset_bytes` in stream order, and waits.
    ///
    /// # Errors
    /// A range outside the buffer, or what the driver answers.
    pub fn read<T: Plain>(
        &self,
        stream: &Stream,
        offset_bytes: usize,
        elements: usize,
    ) -> Result<Vec<T>, Error> {
        let address = self.range::<T>(offset_bytes, elements)?;
        // SAFETY: every element type here may be all zeros.
        let mut data = vec![unsafe { std::mem::zeroed::<T>() }; elements];
        // SAFETY: within this allocation, and both live until the wait below is over.
        unsafe { stream.copy_to_host(&mut data, address)? };
        stream.synchronize()?;
        Ok(data)
    }

    /// Queues setting every byte to `value`; see [`Stream::fill`].
    ///
    /// # Errors
    /// What the driver answers.
    pub fn fill(&self, stream: &Stream, value: u8) -> Result<(), Error> {
        // SAFETY: this allocation; freeing it waits for the GPU.
        unsafe { stream.fill(self.address, value, self.bytes) }
    }

    /// Queues setting every byte to 0xFF: NaN as any float, -1 as any signed integer.
    ///
    /// # Errors
    /// What the driver answers.
    pub fn poison(&self, stream: &Stream) -> Result<(), Error> {
        self.fill(stream, 0xFF)
    }
}

impl Drop for DeviceBuffer {
    fn drop(&mut self) {
        let _ = self.context.bind_to_thread();
        // SAFETY: allocated by this value and freed once.
        let _ = unsafe { result::free_sync(self.address) };
    }
}

/// Hands out pieces of one allocation, never back one by one: for tests and the tuner, where one buffer per problem
/// is enough.
pub struct Arena {
    buffer: DeviceBuffer,
    used: usize,
}

impl Arena {
    /// Alignment of every piece, bytes.
    pub const ALIGN: usize = 256;

    /// Allocates the memory all pieces come from.
    ///
    /// # Errors
    /// As [`Device::alloc`].
    pub fn new(device: &Device, bytes: usize) -> Result<Arena, Error> {
        Ok(Arena { buffer: device.alloc(bytes)?, used: 0 })
    }

    /// The address of the next `bytes` bytes, aligned to 256.
    ///
    /// # Errors
    /// [`Error::Argument`] where less is left.
    pub fn take(&mut self, bytes: usize) -> Result<u64, Error> {
        let left = self.buffer.bytes().saturating_sub(self.used);
        if bytes > left {
            return Err(Error::Argument {
                kernel: "arena".to_string(),
                what: "bytes",
                value: bytes.to_string(),
                allowed: format!("{left} bytes left of {}", self.buffer.bytes()),
            });
        }
        let address = self.buffer.address() + self.used as u64;
        self.used += bytes.next_multiple_of(Self::ALIGN);
        Ok(address)
    }

    /// Takes every piece back at once. Addresses handed out before must not be used any more.
    pub fn reset(&mut self) {
        self.used = 0;
    }

    /// The allocation.
    pub fn buffer(&self) -> &DeviceBuffer {
        &self.buffer
    }
}

/// Page-locked host memory.
pub struct PinnedBuffer {
    context: Arc<CudaContext>,
    pointer: *mut c_void,
    bytes: usize,
}

// SAFETY: plain memory owned by the value.
unsafe impl Send for PinnedBuffer {}
// SAFETY: shared access only reads.
unsafe impl Sync for PinnedBuffer {}

impl PinnedBuffer {
    /// Size in bytes.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// The memory as elements; bytes that do not fill one are left out.
    pub fn as_slice<T: Plain>(&self) -> &[T] {
        // SAFETY: page-aligned, initialised, and any bytes are a T.
        unsafe { std::slice::from_raw_parts(self.pointer.cast(), self.bytes / size_of::<T>()) }
    }

    /// The memory as elements, for writing.
    pub fn as_mut_slice<T: Plain>(&mut self) -> &mut [T] {
        // SAFETY: as above, and borrowed mutably.
        unsafe { std::slice::from_raw_parts_mut(self.pointer.cast(), self.bytes / size_of::<T>()) }
    }
}

impl Drop for PinnedBuffer {
    fn drop(&mut self) {
        let _ = self.context.bind_to_thread();
        // SAFETY: allocated by this value and freed once.
        let _ = unsafe { result::free_host(self.pointer) };
    }
}

/// Memory larger than the L2 cache, to evict it between timed launches.
pub struct L2Flush {
    buffer: DeviceBuffer,
}

impl L2Flush {
    /// Allocates twice the L2 cache, at least 64 MiB.
    ///
    /// # Errors
    /// As [`Device::alloc`].
    pub fn new(device: &Device) -> Result<L2Flush, Error> {
        let bytes = (2 * device.info().l2_bytes as usize).max(64 << 20);
        Ok(L2Flush { buffer: device.alloc(bytes)? })
    }

    /// Queues writing all of it.
    ///
    /// # Errors
    /// What the driver answers.
    pub fn flush(&self, stream: &Stream) -> Result<(), Error> {
        self.buffer.fill(stream, 0)
    }
}
