# SPDX-License-Identifier: Apache-2.0

"""
    PowerAttentionError(status, message)

What the library refused, with the C status and the message that names the argument and what is allowed. Status -1:
there is no library, and the message says where it was looked for.
"""
struct PowerAttentionError <: Exception
    status::Int32
    message::String
end

function Base.showerror(io::IO, e::PowerAttentionError)
    return print(io, "PowerAttentionError (status ", e.status, "): ", e.message)
end

# The message is thread-local: it is read here, before the task can move to another thread.
function check(status::Integer)
    status == OK && return nothing
    text = unsafe_string(ccall(symbol(:powerattn_last_error), Ptr{UInt8}, ()))
    if isempty(text)
        text = unsafe_string(ccall(symbol(:powerattn_status_string), Ptr{UInt8}, (Int32,), status))
    end
    throw(PowerAttentionError(Int32(status), text))
end
