// SPDX-License-Identifier: Apache-2.0
use crate::error::{shape as shape_error, Error};
use crate::memory::zeros;
use crate::plan::Device;
use std::ffi::c_void;

const ALIGNMENT: usize = 256;

/// Scratch memory for calls; grows as plans need it. One per thread or call; plans are shared instead.
#[derive(Debug, Default)]
pub struct Workspace {
    memory: Vec<u8>,
    foreign: Option<(*mut c_void, u64, Device)>,
}

// SAFETY: the workspace owns its host memory; a device pointer was given by the caller of the unsafe constructor,
// who promised it to this workspace alone. It is not Sync: two calls at once need two workspaces.
unsafe impl Send for Workspace {}

impl Workspace {
    /// Empty host memory that grows at need.
    pub fn new() -> Self {
        Self::default()
    }

    /// Memory of `device`; it cannot grow, and a plan that needs more gets `WorkspaceTooSmall`.
    ///
    /// # Safety
    /// `data` must be `bytes` bytes of `device`, aligned to 256, used by nothing else while calls with this
    /// workspace are in flight on their stream.
    pub unsafe fn from_raw_parts(data: *mut c_void, bytes: u64, device: Device) -> Self {
        Self { memory: Vec::new(), foreign: Some((data, bytes, device)) }
    }

    /// A pointer aligned to 256 and the bytes behind it, for a plan on `device`.
    pub(crate) fn get(&mut self, bytes: u64, device: Device) -> Result<(*mut c_void, u64), Error> {
        let own = self.foreign.map_or(Device::Cpu, |(_, _, device)| device);
        if bytes == 0 {
            return Ok((std::ptr::null_mut(), 0));
        }
        if own != device {
            return Err(shape_error("workspace", format!("is on {own:?}; the plan is for {device:?}")));
        }
        if let Some((data, size, _)) = self.foreign {
            return Ok((data, size));
        }
        let needed = usize::try_from(bytes).unwrap_or(usize::MAX).saturating_add(ALIGNMENT - 1);
        if self.memory.len() < needed {
            self.memory = Vec::new(); // freed before the larger one is asked for
            self.memory = zeros(needed)?;
        }
        let pad = self.memory.as_ptr().align_offset(ALIGNMENT);
        // In bounds: the memory has 255 bytes more than asked for.
        let aligned = self.memory.get_mut(pad..).ok_or(Error::OutOfMemory { bytes })?;
        Ok((aligned.as_mut_ptr() as *mut c_void, bytes))
    }
}

/// A device stream; the default is the CPU's, which has none.
#[derive(Clone, Copy, Debug)]
pub struct Stream(pub(crate) *mut c_void);

// SAFETY: a handle that this crate never follows; CUDA takes a stream from any thread.
unsafe impl Send for Stream {}
// SAFETY: as above.
unsafe impl Sync for Stream {}

impl Default for Stream {
    fn default() -> Self {
        Stream(std::ptr::null_mut())
    }
}

impl Stream {
    /// A `cudaStream_t`.
    ///
    /// # Safety
    /// `stream` must be a live stream of the plan's device for as long as calls use it.
    pub unsafe fn from_raw(stream: *mut c_void) -> Self {
        Stream(stream)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn host_memory_grows_and_is_aligned() {
        let mut work = Workspace::new();
        assert_eq!(work.get(0, Device::Cpu).unwrap(), (std::ptr::null_mut(), 0));
        for bytes in [1, 100, 5000, 20] {
            let (data, size) = work.get(bytes, Device::Cpu).unwrap();
            assert_eq!((data as usize % ALIGNMENT, size), (0, bytes));
            // SAFETY: `bytes` bytes of the workspace, which nothing else touches.
            unsafe { std::ptr::write_bytes(data as *mut u8, 7, bytes as usize) };
        }
        assert!(matches!(work.get(u64::MAX, Device::Cpu), Err(Error::OutOfMemory { .. })));
        assert!(work.get(1, Device::Cpu).is_ok());
    }

    #[test]
    fn memory_of_another_device_is_refused() {
        assert!(Workspace::new().get(1, Device::Cuda(0)).is_err());
        // SAFETY: never followed.
        let mut work = unsafe { Workspace::from_raw_parts(256 as *mut c_void, 64, Device::Cuda(1)) };
        assert!(work.get(8, Device::Cpu).is_err());
        assert!(work.get(8, Device::Cuda(0)).is_err());
        assert_eq!(work.get(8, Device::Cuda(1)).unwrap(), (256 as *mut c_void, 64));
    }
}
