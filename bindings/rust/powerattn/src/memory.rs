// SPDX-License-Identifier: Apache-2.0
use crate::element::sealed::Number;
use crate::error::Error;
use std::alloc::{alloc_zeroed, Layout};

/// `len` zeros, or an error where `vec![0; len]` would end the process: states can ask for more than there is. Fresh
/// pages come zeroed from the system, so nothing is touched before it is used.
pub(crate) fn zeros<T: Number>(len: usize) -> Result<Vec<T>, Error> {
    let refused = || Error::OutOfMemory { bytes: (len as u64).saturating_mul(std::mem::size_of::<T>() as u64) };
    let layout = Layout::array::<T>(len).map_err(|_| refused())?;
    if layout.size() == 0 {
        return Ok(Vec::new());
    }
    // SAFETY: the layout is not empty.
    let data = unsafe { alloc_zeroed(layout) } as *mut T;
    if data.is_null() {
        return Err(refused());
    }
    // SAFETY: allocated above, by the global allocator, for exactly `len` elements; zero bytes are a Number.
    Ok(unsafe { Vec::from_raw_parts(data, len, len) })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn zeros_or_an_error() {
        assert_eq!(zeros::<f64>(3).unwrap(), [0.0; 3]);
        assert!(zeros::<f32>(0).unwrap().is_empty());
        let mut grown = zeros::<u8>(5).unwrap();
        grown.push(7);
        assert_eq!(grown, [0, 0, 0, 0, 0, 7]);
        for len in [usize::MAX, usize::MAX / 4, isize::MAX as usize / 4] {
            if cfg!(miri) && len == isize::MAX as usize / 4 {
                continue; // a legal layout; Miri stops where an allocator would answer null
            }
            assert!(matches!(zeros::<f32>(len), Err(Error::OutOfMemory { bytes }) if bytes >= len as u64));
        }
    }
}
