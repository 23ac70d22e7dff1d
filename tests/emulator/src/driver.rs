//! The CUDA driver's interface, as far as this project uses it. Everything happens at the call: streams are in order
//! by themselves, and a fault is sticky, as it is on a GPU.
//!
//! Functions, types and numbers are those of NVIDIA's documentation of the driver API.

#![allow(non_snake_case)]
#![allow(
    clippy::undocumented_unsafe_blocks,
    reason = "every block here follows pointers that the caller gives as the driver API documents them, or handles made here"
)]

use crate::launch::{MULTIPROCESSORS, SHARED_LIMIT, Shape, launch};
use crate::memory::Region;
use crate::module::{Module, load};
use crate::tensor_map::TensorMap;
use std::alloc::{Layout, alloc, dealloc};
use std::collections::BTreeMap;
use std::ffi::{CStr, c_char, c_int, c_uint, c_void};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Instant;

type Status = u32;
const SUCCESS: Status = 0;
const INVALID_VALUE: Status = 1;
const OUT_OF_MEMORY: Status = 2;
const INVALID_DEVICE: Status = 101;
const INVALID_IMAGE: Status = 200;
const INVALID_HANDLE: Status = 400;
const NOT_FOUND: Status = 500;
const NOT_READY: Status = 600;
const CAPTURE_UNSUPPORTED: Status = 900;

/// Version of the interface: 13.0.
const VERSION: c_int = 13_000;
const NAME: &CStr = c"DSV emulated sm_90";
/// What the device says it has; allocations are limited by it, so that running out of memory can be tested.
const MEMORY_BYTES: usize = 8 << 30;
/// Bytes on both sides of an allocation that belong to none.
const GUARD: usize = 512;
const ALIGN: usize = 512;

/// Something a stream does.
#[derive(Clone)]
enum Work {
    Launch { module: Arc<Module>, shape: Shape, params: Vec<u8> },
    CopyToDevice { to: u64, from: *const c_void, bytes: usize },
    CopyToHost { to: *mut c_void, from: u64, bytes: usize },
    Copy { to: u64, from: u64, bytes: usize },
    Fill { to: u64, pattern: [u8; 4], unit: usize, count: usize },
}

// SAFETY: host pointers are the caller's, who keeps them alive as the API asks.
unsafe impl Send for Work {}

struct Stream {
    /// What a capture has recorded so far.
    captured: Option<Vec<Work>>,
}

struct Event {
    at: Option<Instant>,
}

#[derive(Default)]
struct Driver {
    /// Start and size of each allocation.
    memory: BTreeMap<u64, usize>,
    host: BTreeMap<u64, usize>,
    used: usize,
    /// The fault that ended the context.
    fault: Status,
    launches: u64,
}

static DRIVER: Mutex<Option<Driver>> = Mutex::new(None);

struct Guarded(MutexGuard<'static, Option<Driver>>);

impl std::ops::Deref for Guarded {
    type Target = Driver;
    fn deref(&self) -> &Driver {
        self.0.as_ref().expect("made by `driver`")
    }
}

impl std::ops::DerefMut for Guarded {
    fn deref_mut(&mut self) -> &mut Driver {
        self.0.as_mut().expect("made by `driver`")
    }
}

fn driver() -> Guarded {
    let mut guard = DRIVER.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
    guard.get_or_insert_with(Driver::default);
    Guarded(guard)
}

impl Driver {
    fn has(&self, address: u64, bytes: usize) -> bool {
        let region = self.memory.range(..=address).next_back();
        region.is_some_and(|(start, size)| address + bytes as u64 <= start + *size as u64)
    }

    fn run(&mut self, work: &Work) -> Status {
        if self.fault != SUCCESS {
            return self.fault;
        }
        match work {
            Work::Launch { module, shape, params } => {
                let memory: Vec<Region> = self
                    .memory
                    .iter()
                    .map(|(&start, &size)| Region { start, end: start + size as u64, writable: true })
                    .collect();
                let seed = seed() ^ self.launches.wrapping_mul(0xA076_1D64_78BD_642F);
                self.launches += 1;
                if let Err(fault) = launch(&module.kernel, shape, params, &memory, seed) {
                    eprintln!("emulator: {}", fault.text);
                    if fault.code == INVALID_VALUE {
                        return INVALID_VALUE;
                    }
                    // As on a GPU, the call succeeds and the context is lost.
                    self.fault = fault.code;
                }
            }
            Work::CopyToDevice { to, from, bytes } => {
                if !self.has(*to, *bytes) {
                    return INVALID_VALUE;
                }
                unsafe { std::ptr::copy_nonoverlapping(from.cast::<u8>(), *to as *mut u8, *bytes) };
            }
            Work::CopyToHost { to, from, bytes } => {
                if !self.has(*from, *bytes) {
                    return INVALID_VALUE;
                }
                unsafe { std::ptr::copy_nonoverlapping(*from as *const u8, to.cast::<u8>(), *bytes) };
            }
            Work::Copy { to, from, bytes } => {
                if !self.has(*from, *bytes) || !self.has(*to, *bytes) {
                    return INVALID_VALUE;
                }
                unsafe { std::ptr::copy(*from as *const u8, *to as *mut u8, *bytes) };
            }
            Work::Fill { to, pattern, unit, count } => {
                if !self.has(*to, unit * count) {
                    return INVALID_VALUE;
                }
                for i in 0..*count {
                    let at = (*to as usize + i * unit) as *mut u8;
                    unsafe { std::ptr::copy_nonoverlapping(pattern.as_ptr(), at, *unit) };
                }
            }
        }
        SUCCESS
    }
}

/// `DSV_EMULATOR_SEED`: another order of everything that has none.
fn seed() -> u64 {
    std::env::var("DSV_EMULATOR_SEED").ok().and_then(|text| text.parse().ok()).unwrap_or(0)
}

/// Does the work now, or records it where the stream is captured.
unsafe fn queue(stream: *mut c_void, work: Work) -> Status {
    // The default streams are null, 1 and 2.
    if stream as usize > 2 {
        let stream = unsafe { &mut *stream.cast::<Stream>() };
        if let Some(captured) = &mut stream.captured {
            captured.push(work);
            return SUCCESS;
        }
    }
    driver().run(&work)
}

fn fault() -> Status {
    driver().fault
}

#[unsafe(no_mangle)]
extern "C" fn cuInit(_flags: c_uint) -> Status {
    SUCCESS
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuDriverGetVersion(version: *mut c_int) -> Status {
    unsafe { *version = VERSION };
    SUCCESS
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuDeviceGetCount(count: *mut c_int) -> Status {
    unsafe { *count = 1 };
    SUCCESS
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuDeviceGet(device: *mut c_int, ordinal: c_int) -> Status {
    if ordinal != 0 {
        return INVALID_DEVICE;
    }
    unsafe { *device = 0 };
    SUCCESS
}

unsafe fn text_to(text: &CStr, to: *mut c_char, len: c_int) {
    let bytes = text.to_bytes_with_nul();
    let n = bytes.len().min(len.max(0) as usize);
    unsafe {
        std::ptr::copy_nonoverlapping(bytes.as_ptr().cast(), to, n);
        if n > 0 {
            *to.add(n - 1) = 0;
        }
    }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuDeviceGetName(name: *mut c_char, len: c_int, _device: c_int) -> Status {
    unsafe { text_to(NAME, name, len) };
    SUCCESS
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuDeviceGetPCIBusId(id: *mut c_char, len: c_int, _device: c_int) -> Status {
    unsafe { text_to(c"0000:00:00.0", id, len) };
    SUCCESS
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuDeviceGetUuid_v2(uuid: *mut [u8; 16], _device: c_int) -> Status {
    unsafe { *uuid = *b"dsv-emulated-gpu" };
    SUCCESS
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuDeviceTotalMem_v2(bytes: *mut usize, _device: c_int) -> Status {
    unsafe { *bytes = MEMORY_BYTES };
    SUCCESS
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuDeviceGetAttribute(value: *mut c_int, attribute: c_int, _device: c_int) -> Status {
    let found = match attribute {
        1 => 1024,     // threads of a CTA
        2 | 3 => 1024, // its dimensions
        4 => 64,
        5 => i32::MAX, // grid dimensions
        6 | 7 => 65_535,
        8 => 48 << 10,        // shared memory without opting in
        10 => 32,             // lanes of a warp
        12 | 82 => 65_536,    // registers of a CTA, of a multiprocessor
        13 | 36 => 1_000_000, // clock and memory clock, kHz
        16 => MULTIPROCESSORS as c_int,
        31 => 1,        // kernels beside each other
        37 => 5120,     // bits of the memory bus
        38 => 50 << 20, // L2
        39 => 2048,     // threads of a multiprocessor
        40 => 1,        // copies beside kernels
        41 => 1,        // unified addressing
        75 => 9,
        76 => 0,
        81 => 228 << 10,             // shared memory of a multiprocessor
        97 => SHARED_LIMIT as c_int, // with opting in
        106 => 32,                   // CTAs of a multiprocessor
        111 => 1 << 10,              // shared memory the driver keeps
        120 => 1,                    // clusters
        127 => 1,                    // tensor maps
        // Memory pools, managed memory, and what else there is: no.
        _ => 0,
    };
    unsafe { *value = found };
    SUCCESS
}

/// NVRTC looks here for a cache that a driver may keep. There is none.
#[unsafe(no_mangle)]
unsafe extern "C" fn cuGetExportTable(table: *mut *const c_void, _id: *const c_void) -> Status {
    unsafe { *table = std::ptr::null() };
    NOT_FOUND
}

/// Contexts are one: any address that is not null.
const CONTEXT: usize = 0x1000;

#[unsafe(no_mangle)]
unsafe extern "C" fn cuDevicePrimaryCtxRetain(context: *mut usize, _device: c_int) -> Status {
    unsafe { *context = CONTEXT };
    SUCCESS
}

#[unsafe(no_mangle)]
extern "C" fn cuDevicePrimaryCtxRelease_v2(_device: c_int) -> Status {
    SUCCESS
}

#[unsafe(no_mangle)]
extern "C" fn cuCtxSetCurrent(_context: usize) -> Status {
    SUCCESS
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuCtxGetCurrent(context: *mut usize) -> Status {
    unsafe { *context = CONTEXT };
    SUCCESS
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuCtxGetDevice(device: *mut c_int) -> Status {
    unsafe { *device = 0 };
    SUCCESS
}

#[unsafe(no_mangle)]
extern "C" fn cuCtxSynchronize() -> Status {
    fault()
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuMemAlloc_v2(address: *mut u64, bytes: usize) -> Status {
    let mut driver = driver();
    if driver.fault != SUCCESS {
        return driver.fault;
    }
    if bytes == 0 {
        return INVALID_VALUE;
    }
    if driver.used + bytes > MEMORY_BYTES {
        return OUT_OF_MEMORY;
    }
    let Ok(layout) = Layout::from_size_align(bytes + 2 * GUARD, ALIGN) else { return OUT_OF_MEMORY };
    let start = unsafe { alloc(layout) };
    if start.is_null() {
        return OUT_OF_MEMORY;
    }
    // Fresh memory holds what nobody may rely on: NaN.
    let first = unsafe { start.add(GUARD) };
    unsafe { std::ptr::write_bytes(first, 0xFF, bytes) };
    driver.memory.insert(first as u64, bytes);
    driver.used += bytes;
    unsafe { *address = first as u64 };
    SUCCESS
}

#[unsafe(no_mangle)]
extern "C" fn cuMemFree_v2(address: u64) -> Status {
    let mut driver = driver();
    let Some(bytes) = driver.memory.remove(&address) else { return INVALID_VALUE };
    driver.used -= bytes;
    if let Ok(layout) = Layout::from_size_align(bytes + 2 * GUARD, ALIGN) {
        unsafe { dealloc((address as *mut u8).sub(GUARD), layout) };
    }
    driver.fault
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuMemGetInfo_v2(free: *mut usize, total: *mut usize) -> Status {
    unsafe { (*free, *total) = (MEMORY_BYTES - driver().used, MEMORY_BYTES) };
    SUCCESS
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuMemHostAlloc(address: *mut *mut c_void, bytes: usize, _flags: c_uint) -> Status {
    let Ok(layout) = Layout::from_size_align(bytes.max(1), 4096) else { return OUT_OF_MEMORY };
    let start = unsafe { alloc(layout) };
    if start.is_null() {
        return OUT_OF_MEMORY;
    }
    driver().host.insert(start as u64, layout.size());
    unsafe { *address = start.cast() };
    SUCCESS
}

#[unsafe(no_mangle)]
extern "C" fn cuMemFreeHost(address: *mut c_void) -> Status {
    let Some(bytes) = driver().host.remove(&(address as u64)) else { return INVALID_VALUE };
    if let Ok(layout) = Layout::from_size_align(bytes, 4096) {
        unsafe { dealloc(address.cast(), layout) };
    }
    SUCCESS
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuMemcpyHtoD_v2(to: u64, from: *const c_void, bytes: usize) -> Status {
    unsafe { queue(std::ptr::null_mut(), Work::CopyToDevice { to, from, bytes }) }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuMemcpyHtoDAsync_v2(
    to: u64,
    from: *const c_void,
    bytes: usize,
    stream: *mut c_void,
) -> Status {
    unsafe { queue(stream, Work::CopyToDevice { to, from, bytes }) }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuMemcpyDtoH_v2(to: *mut c_void, from: u64, bytes: usize) -> Status {
    unsafe { queue(std::ptr::null_mut(), Work::CopyToHost { to, from, bytes }) }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuMemcpyDtoHAsync_v2(
    to: *mut c_void,
    from: u64,
    bytes: usize,
    stream: *mut c_void,
) -> Status {
    unsafe { queue(stream, Work::CopyToHost { to, from, bytes }) }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuMemcpyDtoD_v2(to: u64, from: u64, bytes: usize) -> Status {
    unsafe { queue(std::ptr::null_mut(), Work::Copy { to, from, bytes }) }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuMemcpyDtoDAsync_v2(to: u64, from: u64, bytes: usize, stream: *mut c_void) -> Status {
    unsafe { queue(stream, Work::Copy { to, from, bytes }) }
}

unsafe fn fill(stream: *mut c_void, to: u64, value: u32, unit: usize, count: usize) -> Status {
    unsafe { queue(stream, Work::Fill { to, pattern: value.to_le_bytes(), unit, count }) }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuMemsetD8_v2(to: u64, value: u8, count: usize) -> Status {
    unsafe { fill(std::ptr::null_mut(), to, value as u32, 1, count) }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuMemsetD16_v2(to: u64, value: u16, count: usize) -> Status {
    unsafe { fill(std::ptr::null_mut(), to, value as u32, 2, count) }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuMemsetD32_v2(to: u64, value: u32, count: usize) -> Status {
    unsafe { fill(std::ptr::null_mut(), to, value, 4, count) }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuMemsetD8Async(to: u64, value: u8, count: usize, stream: *mut c_void) -> Status {
    unsafe { fill(stream, to, value as u32, 1, count) }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuMemsetD16Async(to: u64, value: u16, count: usize, stream: *mut c_void) -> Status {
    unsafe { fill(stream, to, value as u32, 2, count) }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuMemsetD32Async(to: u64, value: u32, count: usize, stream: *mut c_void) -> Status {
    unsafe { fill(stream, to, value, 4, count) }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuStreamCreate(stream: *mut *mut Stream, _flags: c_uint) -> Status {
    unsafe { *stream = Box::into_raw(Box::new(Stream { captured: None })) };
    SUCCESS
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuStreamCreateWithPriority(
    stream: *mut *mut Stream,
    flags: c_uint,
    _priority: c_int,
) -> Status {
    unsafe { cuStreamCreate(stream, flags) }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuStreamDestroy_v2(stream: *mut Stream) -> Status {
    if stream as usize <= 2 {
        return INVALID_HANDLE;
    }
    drop(unsafe { Box::from_raw(stream) });
    SUCCESS
}

#[unsafe(no_mangle)]
extern "C" fn cuStreamSynchronize(_stream: *mut Stream) -> Status {
    fault()
}

#[unsafe(no_mangle)]
extern "C" fn cuStreamQuery(_stream: *mut Stream) -> Status {
    fault()
}

#[unsafe(no_mangle)]
extern "C" fn cuStreamWaitEvent(_stream: *mut Stream, _event: *mut Event, _flags: c_uint) -> Status {
    SUCCESS
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuStreamIsCapturing(stream: *mut Stream, status: *mut c_int) -> Status {
    let capturing = stream as usize > 2 && unsafe { &*stream }.captured.is_some();
    unsafe { *status = capturing as c_int };
    SUCCESS
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuStreamBeginCapture_v2(stream: *mut Stream, _mode: c_int) -> Status {
    if stream as usize <= 2 {
        return CAPTURE_UNSUPPORTED;
    }
    unsafe { (*stream).captured = Some(Vec::new()) };
    SUCCESS
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuStreamEndCapture(stream: *mut Stream, graph: *mut *mut Vec<Work>) -> Status {
    if stream as usize <= 2 {
        return INVALID_HANDLE;
    }
    let Some(captured) = (unsafe { (*stream).captured.take() }) else { return INVALID_VALUE };
    unsafe { *graph = Box::into_raw(Box::new(captured)) };
    SUCCESS
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuGraphInstantiateWithFlags(
    exec: *mut *mut Vec<Work>,
    graph: *mut Vec<Work>,
    _flags: u64,
) -> Status {
    unsafe { *exec = Box::into_raw(Box::new((*graph).clone())) };
    SUCCESS
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuGraphLaunch(exec: *mut Vec<Work>, stream: *mut c_void) -> Status {
    for work in unsafe { &*exec } {
        let status = unsafe { queue(stream, work.clone()) };
        if status != SUCCESS {
            return status;
        }
    }
    SUCCESS
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuGraphExecDestroy(exec: *mut Vec<Work>) -> Status {
    drop(unsafe { Box::from_raw(exec) });
    SUCCESS
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuGraphDestroy(graph: *mut Vec<Work>) -> Status {
    drop(unsafe { Box::from_raw(graph) });
    SUCCESS
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuEventCreate(event: *mut *mut Event, _flags: c_uint) -> Status {
    unsafe { *event = Box::into_raw(Box::new(Event { at: None })) };
    SUCCESS
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuEventDestroy_v2(event: *mut Event) -> Status {
    drop(unsafe { Box::from_raw(event) });
    SUCCESS
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuEventRecord(event: *mut Event, _stream: *mut Stream) -> Status {
    unsafe { (*event).at = Some(Instant::now()) };
    fault()
}

#[unsafe(no_mangle)]
extern "C" fn cuEventSynchronize(_event: *mut Event) -> Status {
    fault()
}

#[unsafe(no_mangle)]
extern "C" fn cuEventQuery(_event: *mut Event) -> Status {
    fault()
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuEventElapsedTime_v2(ms: *mut f32, start: *mut Event, end: *mut Event) -> Status {
    match unsafe { ((*start).at, (*end).at) } {
        (Some(start), Some(end)) => {
            unsafe { *ms = end.saturating_duration_since(start).as_secs_f32() * 1e3 };
            SUCCESS
        }
        _ => NOT_READY,
    }
}

/// A module is its own function.
type Handle = *mut Arc<Module>;

#[unsafe(no_mangle)]
unsafe extern "C" fn cuModuleLoadData(module: *mut Handle, image: *const u8) -> Status {
    // The size of a cubin is where its section headers or its program headers end, whichever is later.
    let read = |at: usize, bytes: usize| {
        (0..bytes).fold(0usize, |value, i| value | (unsafe { *image.add(at + i) } as usize) << (8 * i))
    };
    if unsafe { std::slice::from_raw_parts(image, 4) } != b"\x7FELF" {
        eprintln!("emulator: the module is no cubin");
        return INVALID_IMAGE;
    }
    let sections = read(0x28, 8) + read(0x3A, 2) * read(0x3C, 2);
    let programs = read(0x20, 8) + read(0x36, 2) * read(0x38, 2);
    let cubin = unsafe { std::slice::from_raw_parts(image, sections.max(programs)) };
    match load(cubin) {
        Ok(loaded) => {
            unsafe { *module = Box::into_raw(Box::new(Arc::new(loaded))) };
            SUCCESS
        }
        Err(why) => {
            eprintln!("emulator: {why}");
            INVALID_IMAGE
        }
    }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuModuleUnload(module: Handle) -> Status {
    drop(unsafe { Box::from_raw(module) });
    SUCCESS
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuModuleGetFunction(
    function: *mut Handle,
    module: Handle,
    name: *const c_char,
) -> Status {
    let name = unsafe { CStr::from_ptr(name) }.to_string_lossy();
    if unsafe { &*module }.kernel.name != name {
        return NOT_FOUND;
    }
    unsafe { *function = module };
    SUCCESS
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuFuncGetAttribute(value: *mut c_int, attribute: c_int, function: Handle) -> Status {
    let module = unsafe { &**function };
    let found = match attribute {
        0 => module.kernel.max_threads.clamp(1, 1024),
        1 => module.kernel.static_shared,
        3 => module.local_bytes,
        4 => module.registers,
        5 | 6 => 90,
        8 => SHARED_LIMIT,
        _ => 0,
    };
    unsafe { *value = found as c_int };
    SUCCESS
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuFuncSetAttribute(function: Handle, attribute: c_int, value: c_int) -> Status {
    let module = unsafe { &**function };
    // Dynamic shared memory, beside the kernel's own.
    if attribute == 8 && (value < 0 || value as u32 + module.kernel.static_shared > SHARED_LIMIT) {
        return INVALID_VALUE;
    }
    SUCCESS
}

unsafe fn launch_with(
    function: Handle,
    stream: *mut c_void,
    shape: Shape,
    arguments: *mut *mut c_void,
) -> Status {
    let module = unsafe { &*function }.clone();
    let mut params = vec![0u8; module.kernel.params_bytes as usize];
    for (i, &(offset, bytes)) in module.kernel.param_places.iter().enumerate() {
        let to = params[offset as usize..][..bytes as usize].as_mut_ptr();
        unsafe { std::ptr::copy_nonoverlapping((*arguments.add(i)).cast::<u8>(), to, bytes as usize) };
    }
    unsafe { queue(stream, Work::Launch { module, shape, params }) }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuLaunchKernel(
    function: Handle,
    grid_x: c_uint,
    grid_y: c_uint,
    grid_z: c_uint,
    block_x: c_uint,
    block_y: c_uint,
    block_z: c_uint,
    dynamic_shared: c_uint,
    stream: *mut c_void,
    arguments: *mut *mut c_void,
    _extra: *mut *mut c_void,
) -> Status {
    let shape = Shape {
        grid: [grid_x, grid_y, grid_z],
        block: [block_x, block_y, block_z],
        cluster: unsafe { &**function }.kernel.cluster,
        dynamic_shared,
    };
    unsafe { launch_with(function, stream, shape, arguments) }
}

/// `CUlaunchAttribute`.
#[repr(C)]
struct Attribute {
    id: c_uint,
    pad: u32,
    value: [u32; 16],
}

/// `CUlaunchConfig`.
#[repr(C)]
struct Config {
    grid: [c_uint; 3],
    block: [c_uint; 3],
    dynamic_shared: c_uint,
    stream: *mut c_void,
    attributes: *const Attribute,
    count: c_uint,
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuLaunchKernelEx(
    config: *const Config,
    function: Handle,
    arguments: *mut *mut c_void,
    _extra: *mut *mut c_void,
) -> Status {
    /// `CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION`.
    const CLUSTER: c_uint = 4;
    let config = unsafe { &*config };
    let mut shape = Shape {
        grid: config.grid,
        block: config.block,
        cluster: unsafe { &**function }.kernel.cluster,
        dynamic_shared: config.dynamic_shared,
    };
    for i in 0..config.count as usize {
        let attribute = unsafe { &*config.attributes.add(i) };
        if attribute.id == CLUSTER {
            shape.cluster = [attribute.value[0], attribute.value[1], attribute.value[2]];
        }
    }
    unsafe { launch_with(function, config.stream, shape, arguments) }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuTensorMapEncodeTiled(
    map: *mut [u64; 16],
    ty: c_uint,
    rank: c_uint,
    address: u64,
    dims: *const u64,
    strides: *const u64,
    window: *const u32,
    element_strides: *const u32,
    interleave: c_uint,
    swizzle: c_uint,
    _l2: c_uint,
    outside: c_uint,
) -> Status {
    if !(1..=5).contains(&rank) {
        return INVALID_VALUE;
    }
    let n = rank as usize;
    let made = unsafe {
        TensorMap::encode(
            ty,
            rank,
            address,
            std::slice::from_raw_parts(dims, n),
            if n > 1 { std::slice::from_raw_parts(strides, n - 1) } else { &[] },
            std::slice::from_raw_parts(window, n),
            std::slice::from_raw_parts(element_strides, n),
            interleave,
            swizzle,
            outside == 1,
        )
    };
    match made {
        Ok(made) => {
            unsafe { *map = made.to_words() };
            SUCCESS
        }
        Err(why) => {
            eprintln!("emulator: cuTensorMapEncodeTiled: {why}");
            INVALID_VALUE
        }
    }
}

fn error_text(status: Status) -> Option<(&'static CStr, &'static CStr)> {
    Some(match status {
        0 => (c"CUDA_SUCCESS", c"no error"),
        1 => (c"CUDA_ERROR_INVALID_VALUE", c"invalid argument"),
        2 => (c"CUDA_ERROR_OUT_OF_MEMORY", c"out of memory"),
        101 => (c"CUDA_ERROR_INVALID_DEVICE", c"invalid device ordinal"),
        200 => (c"CUDA_ERROR_INVALID_IMAGE", c"device kernel image is invalid"),
        400 => (c"CUDA_ERROR_INVALID_HANDLE", c"invalid resource handle"),
        500 => (c"CUDA_ERROR_NOT_FOUND", c"named symbol not found"),
        600 => (c"CUDA_ERROR_NOT_READY", c"device not ready"),
        700 => (
            c"CUDA_ERROR_ILLEGAL_ADDRESS",
            c"an illegal memory access was encountered (the emulator says which on stderr)",
        ),
        702 => (c"CUDA_ERROR_LAUNCH_TIMEOUT", c"the launch timed out and was terminated"),
        716 => (c"CUDA_ERROR_MISALIGNED_ADDRESS", c"misaligned address (the emulator says which on stderr)"),
        719 => (c"CUDA_ERROR_LAUNCH_FAILED", c"unspecified launch failure (the emulator says why on stderr)"),
        900 => {
            (c"CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED", c"operation not permitted when stream is capturing")
        }
        _ => return None,
    })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuGetErrorName(status: Status, text: *mut *const c_char) -> Status {
    match error_text(status) {
        Some((name, _)) => unsafe { *text = name.as_ptr() },
        None => return INVALID_VALUE,
    }
    SUCCESS
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuGetErrorString(status: Status, text: *mut *const c_char) -> Status {
    match error_text(status) {
        Some((_, words)) => unsafe { *text = words.as_ptr() },
        None => return INVALID_VALUE,
    }
    SUCCESS
}
