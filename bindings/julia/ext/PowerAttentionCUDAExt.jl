# SPDX-License-Identifier: Apache-2.0
# CuArrays go to the library's CUDA backend: device pointers, the task's stream, memory from CUDA.jl's pool.
module PowerAttentionCUDAExt

using CUDA
using PowerAttention

root(x::CuArray) = x
root(x::AbstractArray) = root(parent(x))

const CuView = Union{
    CuArray,
    SubArray{<:Any,<:Any,<:CuArray},
    PermutedDimsArray{<:Any,<:Any,<:Any,<:Any,<:CuArray},
}

# Not pointer(x), which CUDA.jl does not define for a PermutedDimsArray.
PowerAttention.raw_pointer(x::CuView) = Ptr{Cvoid}(UInt(Base.unsafe_convert(CuPtr{eltype(x)}, x)))
PowerAttention.device_of(x::CuView) = (:cuda, Int(CUDA.deviceid(CUDA.device(root(x)))))
PowerAttention.stream_of(::CuView) = Ptr{Cvoid}(UInt(CUDA.stream().handle))
PowerAttention.allocate(::CuView, ::Type{T}, dims...) where {T} = CuArray{T}(undef, dims...)

end # module
