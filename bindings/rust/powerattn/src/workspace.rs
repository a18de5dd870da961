// SPDX-License-Identifier: Apache-2.0
use std::ffi::c_void;

const ALIGNMENT: usize = 256;

/// Scratch memory for calls; grows as plans need it. One per thread or call; plans are shared instead.
#[derive(Debug, Default)]
pub struct Workspace {
    memory: Vec<u8>,
    device: Option<(*mut c_void, u64)>,
}

// SAFETY: the workspace owns its host memory; a device pointer was given by the caller of the unsafe constructor,
// who promised it to this workspace alone. It is not Sync: two calls at once need two workspaces.
unsafe impl Send for Workspace {}

impl Workspace {
    /// Empty host memory that grows at need.
    pub fn new() -> Self {
        Self::default()
    }

    /// Memory of a device; it cannot grow, and a plan that needs more gets `WorkspaceTooSmall`.
    ///
    /// # Safety
    /// `data` must be `bytes` bytes of the plan's device, aligned to 256, used by nothing else while calls with
    /// this workspace are in flight on their stream.
    pub unsafe fn from_raw_parts(data: *mut c_void, bytes: u64) -> Self {
        Self { memory: Vec::new(), device: Some((data, bytes)) }
    }

    /// A pointer aligned to 256 and the bytes behind it.
    pub(crate) fn get(&mut self, bytes: u64) -> (*mut c_void, u64) {
        if let Some((data, size)) = self.device {
            return (data, size);
        }
        if bytes == 0 {
            return (std::ptr::null_mut(), 0);
        }
        let needed = usize::try_from(bytes).unwrap_or(usize::MAX).saturating_add(ALIGNMENT - 1);
        if self.memory.len() < needed {
            self.memory = vec![0; needed];
        }
        let address = self.memory.as_mut_ptr();
        let pad = address.align_offset(ALIGNMENT);
        // SAFETY: pad < 256 and the memory has 255 bytes more than asked for.
        (unsafe { address.add(pad) } as *mut c_void, bytes)
    }
}

/// A device stream; the default is the CPU's, which has none.
#[derive(Clone, Copy, Debug)]
pub struct Stream(pub(crate) *mut c_void);

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
