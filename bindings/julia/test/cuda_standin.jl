# SPDX-License-Identifier: Apache-2.0
# A stand-in for the names of CUDA.jl that the extension uses, and the extension on top of it. On the emulated CUDA device
# of tests/emulation its arrays hold memory of that device; elsewhere their addresses are made up and never followed.

module CUDA
using Libdl
export CuArray, CuPtr

primitive type CuPtr{T} 64 end
CuPtr{T}(x::UInt) where {T} = reinterpret(CuPtr{T}, x)
Base.UInt(x::CuPtr) = reinterpret(UInt, x)

mutable struct CuArray{T,N} <: DenseArray{T,N}
    at::UInt
    dims::NTuple{N,Int}
    device::Int
end

# A function of the emulated runtime, C_NULL where the library has no emulated device.
function runtime(name)
    library = Libdl.dlopen("libpowerattn_emulation.so", Libdl.RTLD_LAZY; throw_error = false)
    return library === nothing ? C_NULL : Libdl.dlsym(library, name)
end
emulated() = runtime(:_Z10cudaMallocPPvm) != C_NULL

const NEXT = Ref(UInt(1) << 40)
function address(bytes)
    f = runtime(:_Z10cudaMallocPPvm)
    if f == C_NULL
        NEXT[] += UInt(1) << 32
        return NEXT[]
    end
    out = Ref{Ptr{Cvoid}}(C_NULL)
    ccall(f, Cint, (Ptr{Ptr{Cvoid}}, Csize_t), out, max(bytes, 1)) == 0 || error("no device memory")
    return UInt(out[])
end
transfer(to, from, bytes) =
    ccall(runtime(:_Z10cudaMemcpyPvPKvm14cudaMemcpyKind), Cint, (UInt, UInt, Csize_t, Cint), to, from, bytes, 4) == 0 ||
    error("the copy failed")

CuArray{T}(::UndefInitializer, dims::Integer...) where {T} =
    CuArray{T,length(dims)}(address(prod(dims) * sizeof(T)), Int.(dims), 0)
CuArray(x::Array{T}) where {T} = copyto!(CuArray{T}(undef, size(x)...), x)
Base.size(x::CuArray) = x.dims
Base.elsize(::Type{<:CuArray{T}}) where {T} = sizeof(T)
Base.getindex(::CuArray, ::Int...) = error("scalar access to device memory")
function Base.copyto!(to::CuArray{T}, from::Array{T}) where {T}
    GC.@preserve from transfer(to.at, UInt(pointer(from)), sizeof(from))
    return to
end
function Base.Array(x::CuArray{T}) where {T}
    out = Array{T}(undef, size(x))
    GC.@preserve out transfer(UInt(pointer(out)), x.at, sizeof(out))
    return out
end
Base.fill!(x::CuArray{T}, value) where {T} = emulated() ? copyto!(x, fill(T(value), size(x))) : x
Base.unsafe_convert(::Type{Ptr{T}}, ::CuArray{T}) where {T} = throw(ArgumentError("no CPU address"))
Base.unsafe_convert(::Type{CuPtr{T}}, x::CuArray{T}) where {T} = CuPtr{T}(x.at)
Base.unsafe_convert(::Type{CuPtr{T}}, x::SubArray) where {T} =
    CuPtr{T}(UInt(Base.unsafe_convert(CuPtr{T}, parent(x))) + UInt(sizeof(T) * (Base.first_index(x) - 1)))
Base.unsafe_convert(::Type{CuPtr{T}}, x::PermutedDimsArray) where {T} = Base.unsafe_convert(CuPtr{T}, parent(x))
device(x::CuArray) = x.device
deviceid(device) = device
const STREAM = Ref(Ptr{Nothing}(0))
stream() = (handle = STREAM[],)
end

let path = joinpath(@__DIR__, "..", "ext", "PowerAttentionCUDAExt.jl")
    include_string(@__MODULE__, replace(read(path, String), "using CUDA" => "using ..CUDA"), path)
end
