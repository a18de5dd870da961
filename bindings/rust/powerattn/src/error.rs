// SPDX-License-Identifier: Apache-2.0
use powerattn_sys as sys;
use std::ffi::CStr;
use std::fmt;
use std::io;
use std::path::{Path, PathBuf};

/// The C library's status of a failed call.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Status {
    /// An argument is outside what is allowed.
    InvalidArgument,
    /// Legal, but nothing in this build or on this device runs it.
    Unsupported,
    /// The state needs more memory than there is.
    StateTooLarge,
    /// The library could not allocate its own small objects.
    OutOfMemory,
    /// A workspace or saved buffer is below what the plan needs.
    WorkspaceTooSmall,
    /// No such device, no driver, or one that is too old.
    NoDevice,
    /// The device reported an error.
    Device,
    /// A packed state of another format version, or a library of another version.
    Version,
    /// A defect of the library.
    Internal,
    /// A number that this crate does not know.
    Other(i32),
}

impl Status {
    fn from_raw(raw: i32) -> Self {
        match raw as u32 {
            sys::POWERATTN_ERROR_INVALID_ARGUMENT => Status::InvalidArgument,
            sys::POWERATTN_ERROR_UNSUPPORTED => Status::Unsupported,
            sys::POWERATTN_ERROR_STATE_TOO_LARGE => Status::StateTooLarge,
            sys::POWERATTN_ERROR_OUT_OF_MEMORY => Status::OutOfMemory,
            sys::POWERATTN_ERROR_WORKSPACE_TOO_SMALL => Status::WorkspaceTooSmall,
            sys::POWERATTN_ERROR_NO_DEVICE => Status::NoDevice,
            sys::POWERATTN_ERROR_DEVICE => Status::Device,
            sys::POWERATTN_ERROR_VERSION => Status::Version,
            sys::POWERATTN_ERROR_INTERNAL => Status::Internal,
            _ => Status::Other(raw),
        }
    }
}

/// What went wrong.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Error {
    /// The C library refused or failed; the message names the argument, what it was and what is allowed.
    Library {
        /// The C status.
        status: Status,
        /// The library's message.
        message: String,
    },
    /// A slice, shape or stride does not fit; found before the C library was called.
    Shape {
        /// The argument.
        argument: &'static str,
        /// What it was and what is needed.
        message: String,
    },
    /// Memory for a state or a workspace is not to be had.
    OutOfMemory {
        /// What was asked for.
        bytes: u64,
    },
    /// A state could not be written to a file or read from it.
    File {
        /// The file.
        path: PathBuf,
        /// The kind of the system's error.
        kind: io::ErrorKind,
        /// The system's message.
        message: String,
    },
}

impl Error {
    /// The C status; what this crate found itself has the nearest one, `Other(-1)` where there is none.
    pub fn status(&self) -> Status {
        match self {
            Error::Library { status, .. } => *status,
            Error::Shape { .. } => Status::InvalidArgument,
            Error::OutOfMemory { .. } => Status::OutOfMemory,
            Error::File { .. } => Status::Other(-1),
        }
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Error::Library { status, message } => write!(f, "{message} ({status:?})"),
            Error::Shape { argument, message } => write!(f, "{argument}: {message}"),
            Error::OutOfMemory { bytes } => write!(f, "no memory for {bytes} bytes"),
            Error::File { path, message, .. } => write!(f, "{}: {message}", path.display()),
        }
    }
}

impl std::error::Error for Error {}

pub(crate) fn shape(argument: &'static str, message: String) -> Error {
    Error::Shape { argument, message }
}

pub(crate) fn file(path: &Path, error: &io::Error) -> Error {
    Error::File { path: path.into(), kind: error.kind(), message: error.to_string() }
}

/// Turns a status into a result. The message is thread-local, so it is read right here.
pub(crate) fn check(status: i32) -> Result<(), Error> {
    if status == sys::POWERATTN_OK as i32 {
        return Ok(());
    }
    // SAFETY: both functions return NUL-terminated text that lives until this thread's next call.
    let message = unsafe {
        let text = CStr::from_ptr(sys::powerattn_last_error());
        let text = if text.to_bytes().is_empty() { CStr::from_ptr(sys::powerattn_status_string(status)) } else { text };
        text.to_string_lossy().into_owned()
    };
    Err(Error::Library { status: Status::from_raw(status), message })
}
