# SPDX-License-Identifier: Apache-2.0
# Julia arrays as C tensors. The functions raw_pointer, device_of, stream_of and allocate are what an array
# type of another device overloads (ext/PowerAttentionCUDAExt.jl).

"""
    BFloat16(x)

bfloat16 storage for Julia versions without one: 16 bits, converted to and from Float32 with rounding to
nearest even. `reinterpret(BFloat16, ::Array{UInt16})` makes an array of bits usable.
"""
struct BFloat16
    bits::UInt16
end

function BFloat16(x::Real)
    bits = reinterpret(UInt32, Float32(x))
    isnan(x) && return BFloat16(UInt16((bits >> 16) | 0x0040))
    return BFloat16(UInt16((bits + 0x7fff + ((bits >> 16) & 0x1)) >> 16))
end
Base.Float32(x::BFloat16) = reinterpret(Float32, UInt32(x.bits) << 16)
Base.Float64(x::BFloat16) = Float64(Float32(x))
Base.convert(::Type{BFloat16}, x::Real) = BFloat16(x)
Base.convert(::Type{T}, x::BFloat16) where {T<:AbstractFloat} = T(Float32(x))
Base.zero(::Type{BFloat16}) = BFloat16(0x0000)
Base.show(io::IO, x::BFloat16) = print(io, "BFloat16(", Float32(x), ")")

dtype_of(::Type{Float32}) = FLOAT32
dtype_of(::Type{Float16}) = FLOAT16
dtype_of(::Type{Float64}) = FLOAT64
dtype_of(::Type{BFloat16}) = BFLOAT16
function dtype_of(::Type{T}) where {T}
    nameof(T) === :BFloat16 && sizeof(T) == 2 && return BFLOAT16  # Core.BFloat16, BFloat16s.jl
    throw(ArgumentError("element type must be Float32, Float64, Float16 or BFloat16, got $(T)"))
end

# Zero, also of Core.BFloat16, whose arithmetic is BFloat16s.jl's.
zero_of(::Type{T}) where {T} =
    isprimitivetype(T) && nameof(T) === :BFloat16 ? reinterpret(T, 0x0000) : zero(T)

# Type of log_g, row_norm and total_log_g, and the default type of states.
stat_type(::Type{Float64}) = Float64
stat_type(::Type) = Float32

# A number that the C side holds in a narrower type.
function narrow(::Type{I}, x::Integer, name::AbstractString) where {I<:Integer}
    typemin(I) <= x <= typemax(I) ||
        throw(ArgumentError("$(name) is $(x); allowed are $(typemin(I)) .. $(typemax(I))"))
    return I(x)
end

raw_pointer(x::AbstractArray) = Ptr{Cvoid}(pointer(x))
device_of(::AbstractArray) = (:cpu, 0)
stream_of(::AbstractArray) = C_NULL
allocate(::AbstractArray, ::Type{T}, dims...) where {T} = Array{T}(undef, dims...)

function strides_of(x::AbstractArray, name::AbstractString)
    local st
    try
        st = strides(x)
    catch
        throw(ArgumentError("$(name) must be a strided array, got $(typeof(x))"))
    end
    return st
end

# Whether the library can read an array where it is: strides in memory, the first dimension contiguous.
function readable(x::AbstractArray)
    try
        return size(x, 1) <= 1 || strides(x)[1] == 1
    catch
        return false
    end
end

function check_layout(layout::Symbol)
    layout === :dhtb || layout === :dthb || throw(ArgumentError("layout must be :dhtb or :dthb, got :$(layout)"))
    return layout
end

# (d, heads, tokens, batch) of a 4-dimensional array in either layout.
function extents(x::AbstractArray, name::AbstractString, layout::Symbol)
    ndims(x) == 4 ||
        throw(DimensionMismatch("$(name) must have 4 dimensions ($(layout)), got size $(size(x))"))
    d, a, b, n = size(x)
    return layout === :dhtb ? (d, a, b, n) : (d, b, a, n)
end

function tensor(x::AbstractArray, name::AbstractString, layout::Symbol)
    st = strides_of(x, name)
    (size(x, 1) <= 1 || st[1] == 1) ||
        throw(ArgumentError("the first dimension of $(name) must be contiguous (stride 1), got stride $(st[1])"))
    h, t = layout === :dhtb ? (st[2], st[3]) : (st[3], st[2])
    return CTensor(raw_pointer(x), st[4], t, h)
end
tensor(::Nothing, ::AbstractString, ::Symbol) = NO_TENSOR

# log_g and row_norm: (heads, tokens, batch), or (tokens, heads, batch) with :dthb.
function row_tensor(x::AbstractArray, name::AbstractString, layout::Symbol)
    st = strides_of(x, name)
    h, t = layout === :dhtb ? (st[1], st[2]) : (st[2], st[1])
    return CTensor(raw_pointer(x), st[3], t, h)
end
row_tensor(::Nothing, ::AbstractString, ::Symbol) = NO_TENSOR

function check_size(x, name::AbstractString, expected::Tuple, ::Type{T}) where {T}
    x === nothing && return nothing
    eltype(x) === T || throw(ArgumentError("$(name) must have element type $(T), got $(eltype(x))"))
    size(x) == expected ||
        throw(DimensionMismatch("$(name) must have size $(expected), got $(size(x))"))
    return nothing
end

# Every array of a call is on the device of the first, `(:cpu, 0)` or `(:cuda, index)`.
function check_device(x, name::AbstractString, device::Tuple{Symbol,Int})
    x === nothing && return nothing
    device_of(x) == device ||
        throw(ArgumentError("$(name) is on $(device_of(x)), the call on $(device): all arrays must share a device"))
    return nothing
end

in_layout(layout::Symbol, d, h, t, n) = layout === :dhtb ? (d, h, t, n) : (d, t, h, n)
rows_in_layout(layout::Symbol, h, t, n) = layout === :dhtb ? (h, t, n) : (t, h, n)

# Index arrays of the host (Int64), or nothing.
index_pointer(::Nothing) = Ptr{Int64}(C_NULL)
index_pointer(x::AbstractArray{Int64}) = Ptr{Int64}(raw_pointer(x))
indices(::AbstractArray, ::Nothing) = nothing
indices(::AbstractArray, x) =
    throw(ArgumentError("cu_seqlens, slots, lengths and rope_offset are vectors of integers, got $(typeof(x))"))
indices(like::AbstractArray, x::AbstractVector{<:Integer}) =
    copyto!(allocate(like, Int64, length(x)), convert(Vector{Int64}, collect(x)))

# 256-byte aligned bytes, and a pointer into them.
struct Workspace{A}
    memory::A
    bytes::UInt64
end
function make_workspace(like::AbstractArray, bytes::Integer)
    return Workspace(allocate(like, UInt8, bytes == 0 ? 0 : Int(bytes) + 255), UInt64(bytes))
end
function aligned_pointer(w::Workspace)
    w.bytes == 0 && return Ptr{Cvoid}(C_NULL)
    address = UInt(raw_pointer(w.memory))
    return Ptr{Cvoid}((address + 255) & ~UInt(255))
end
