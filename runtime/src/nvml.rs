//! The few questions only NVIDIA's management library answers: driver version and clocks. It comes with the driver;
//! where it is missing the answers are `None`.

use libloading::Library;
use std::ffi::{CStr, CString, c_char, c_int, c_uint, c_void};

/// Clocks as the driver reports them now, MHz.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Clocks {
    /// Of the multiprocessors.
    pub sm_mhz: u32,
    /// Of the memory.
    pub memory_mhz: u32,
}

impl std::fmt::Display for Clocks {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "SM {} MHz, memory {} MHz", self.sm_mhz, self.memory_mhz)
    }
}

type Handle = *mut c_void;
type ClockInfo = unsafe extern "C" fn(Handle, c_int, *mut c_uint) -> c_int;

const CLOCK_SM: c_int = 1;
const CLOCK_MEMORY: c_int = 2;

/// NVML, initialised, and one GPU in it.
pub(crate) struct Nvml {
    handle: Handle,
    clock_info: ClockInfo,
    driver: Option<String>,
    /// Keeps the functions above loaded.
    _library: Library,
}

// SAFETY: NVML's calls may be made from any thread, and the handle is a name, not state.
unsafe impl Send for Nvml {}
// SAFETY: as above.
unsafe impl Sync for Nvml {}

impl Nvml {
    /// The GPU with this PCI bus id, as `cuDeviceGetPCIBusId` writes it.
    pub(crate) fn open(pci_bus_id: &CStr) -> Option<Nvml> {
        // SAFETY: loading the driver's own library runs its initialisers, which have no precondition; the types of
        // the functions are those of nvml.h.
        unsafe {
            let library = Library::new("libnvidia-ml.so.1").ok()?;
            let init = library.get::<unsafe extern "C" fn() -> c_int>(b"nvmlInit_v2\0").ok()?;
            if init() != 0 {
                return None;
            }
            let by_bus = library
                .get::<unsafe extern "C" fn(*const c_char, *mut Handle) -> c_int>(
                    b"nvmlDeviceGetHandleByPciBusId_v2\0",
                )
                .ok()?;
            let mut handle = std::ptr::null_mut();
            if by_bus(pci_bus_id.as_ptr(), &mut handle) != 0 {
                return None;
            }
            let clock_info = *library.get::<ClockInfo>(b"nvmlDeviceGetClockInfo\0").ok()?;
            let driver = library
                .get::<unsafe extern "C" fn(*mut c_char, c_uint) -> c_int>(b"nvmlSystemGetDriverVersion\0")
                .ok()
                .and_then(|version| {
                    let mut text = [0 as c_char; 96];
                    (version(text.as_mut_ptr(), text.len() as c_uint) == 0)
                        .then(|| CString::from(CStr::from_ptr(text.as_ptr())))
                })
                .and_then(|text| text.into_string().ok());
            Some(Nvml { handle, clock_info, driver, _library: library })
        }
    }

    pub(crate) fn driver(&self) -> Option<&str> {
        self.driver.as_deref()
    }

    pub(crate) fn clocks(&self) -> Option<Clocks> {
        let clock = |kind| {
            let mut mhz = 0;
            // SAFETY: the handle came from this library, which is loaded as long as self lives.
            (unsafe { (self.clock_info)(self.handle, kind, &mut mhz) } == 0).then_some(mhz)
        };
        Some(Clocks { sm_mhz: clock(CLOCK_SM)?, memory_mhz: clock(CLOCK_MEMORY)? })
    }
}
