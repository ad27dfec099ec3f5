//! What the stand-in driver counted.
#![allow(unsafe_code, reason = "asks the stand-in driver, whose functions it declares")]

use std::ffi::CString;

/// Copies over the bus and on the device, and waits of the host, as the stand-in driver counts them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub(super) struct Counts {
    pub(super) to_device: u64,
    pub(super) to_device_bytes: u64,
    pub(super) from_device: u64,
    pub(super) from_device_bytes: u64,
    pub(super) on_device: u64,
    pub(super) waits: u64,
}

impl Counts {
    /// Since the process began.
    pub(super) fn now() -> Self {
        let folder = std::env::var("MUDIT_CUDA_LIBRARIES").unwrap();
        let path = CString::new(format!("{folder}/libcuda.so.1")).unwrap();
        let mut counts = Self::default();
        // SAFETY: the library is the stand-in's, which is loaded already; its function fills a record of this layout.
        unsafe {
            let library = libc::dlopen(path.as_ptr(), libc::RTLD_NOW);
            assert!(!library.is_null(), "{path:?}");
            let function = libc::dlsym(library, c"stand_in_counts".as_ptr());
            assert!(!function.is_null());
            let ask: unsafe extern "C" fn(*mut Self) = std::mem::transmute(function);
            ask(&raw mut counts);
        }
        counts
    }

    /// During a piece of work.
    pub(super) fn during(work: impl FnOnce()) -> Self {
        let before = Self::now();
        work();
        let after = Self::now();
        Self {
            to_device: after.to_device - before.to_device,
            to_device_bytes: after.to_device_bytes - before.to_device_bytes,
            from_device: after.from_device - before.from_device,
            from_device_bytes: after.from_device_bytes - before.from_device_bytes,
            on_device: after.on_device - before.on_device,
            waits: after.waits - before.waits,
        }
    }
}
