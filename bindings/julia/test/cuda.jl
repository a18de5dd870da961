# SPDX-License-Identifier: Apache-2.0
# The CUDA extension against a stand-in of the names of CUDA.jl that it uses: device pointers, device numbers and the
# stream reach the C call. Numbers on a device need CUDA.jl and a GPU, and are the C library's own tests.

module CUDA
export CuArray, CuPtr
primitive type CuPtr{T} 64 end
CuPtr{T}(x::UInt) where {T} = reinterpret(CuPtr{T}, x)
Base.UInt(x::CuPtr) = reinterpret(UInt, x)
mutable struct CuArray{T,N} <: DenseArray{T,N}
    at::UInt
    dims::NTuple{N,Int}
    device::Int
end
const NEXT = Ref(UInt(1) << 40)
function CuArray{T}(::UndefInitializer, dims::Integer...) where {T}
    at = NEXT[]
    NEXT[] += UInt(1) << 32
    return CuArray{T,length(dims)}(at, Int.(dims), 0)
end
Base.size(x::CuArray) = x.dims
Base.elsize(::Type{<:CuArray{T}}) where {T} = sizeof(T)
Base.getindex(::CuArray, ::Int...) = error("scalar access to device memory")
Base.unsafe_convert(::Type{Ptr{T}}, ::CuArray{T}) where {T} = throw(ArgumentError("no CPU address"))
Base.unsafe_convert(::Type{CuPtr{T}}, x::CuArray{T}) where {T} = CuPtr{T}(x.at)
Base.unsafe_convert(::Type{CuPtr{T}}, x::SubArray) where {T} =
    CuPtr{T}(UInt(Base.unsafe_convert(CuPtr{T}, parent(x))) + UInt(sizeof(T) * (Base.first_index(x) - 1)))
Base.unsafe_convert(::Type{CuPtr{T}}, x::PermutedDimsArray) where {T} = Base.unsafe_convert(CuPtr{T}, parent(x))
device(x::CuArray) = x.device
deviceid(device) = device
stream() = (handle = Ptr{Nothing}(UInt(0x5eed)),)
end

let path = joinpath(@__DIR__, "..", "ext", "PowerAttentionCUDAExt.jl")
    include_string(@__MODULE__, replace(read(path, String), "using CUDA" => "using ..CUDA"), path)
end

@testset "CuArrays" begin
    x = CUDA.CuArray{Float32}(undef, 8, 2, 10, 1)
    slice = view(x, :, 2:2, :, :)
    swapped = PermutedDimsArray(x, (1, 3, 2, 4))
    @test PA.device_of(x) == PA.device_of(slice) == PA.device_of(swapped) == (:cuda, 0)
    @test PA.tensor(x, "x", :dhtb) == PA.CTensor(Ptr{Cvoid}(x.at), 160, 16, 8)
    @test PA.tensor(slice, "x", :dhtb) == PA.CTensor(Ptr{Cvoid}(x.at + 32), 160, 16, 8)
    @test PA.tensor(swapped, "x", :dthb) == PA.CTensor(Ptr{Cvoid}(x.at), 160, 16, 8)
    @test PA.stream_of(slice) == Ptr{Cvoid}(UInt(0x5eed))
    @test PA.allocate(swapped, Float32, 3, 4) isa CUDA.CuArray{Float32,2}
    w = PA.make_workspace(x, 1000)
    @test w.memory isa CUDA.CuArray{UInt8,1} && UInt(PA.aligned_pointer(w)) % 256 == 0
    # Arrays of two devices are told apart before anything is read.
    host = zeros(Float32, 8, 2, 10, 1)
    @test_throws ArgumentError power_attention(x, host, x)
    # A plan for the device: refused with the library's words where there is none.
    if PA.device_count(:cuda) == 0
        @test status_of(() -> power_attention(x, x, x)) in (PA.ERROR_NO_DEVICE, PA.ERROR_UNSUPPORTED)
        other = CUDA.CuArray{Float32,4}(x.at, x.dims, 1)
        @test_throws ArgumentError power_attention(x, other, x)
    end
end
