# SPDX-License-Identifier: Apache-2.0

"""
    state_rows(head_dim, degree)

`D = C(head_dim + degree - 1, degree)`, the rows of a state.
"""
function state_rows(head_dim::Integer, degree::Integer)
    rows = Ref{Int64}(0)
    check(ccall(symbol(:powerattn_state_rows), Int32, (Int64, Int32, Ptr{Int64}), head_dim, narrow(Int32, degree, "degree"), rows))
    return Int(rows[])
end

"""
    state_bytes(head_dim, value_dim, degree, T, count)

Bytes of `count` states (sequences x kv heads x layers) with element type `T`.
"""
function state_bytes(head_dim::Integer, value_dim::Integer, degree::Integer, ::Type{T}, count::Integer) where {T}
    bytes = Ref{UInt64}(0)
    check(
        ccall(
            symbol(:powerattn_state_bytes),
            Int32,
            (Int64, Int64, Int32, Int32, Int64, Ptr{UInt64}),
            head_dim,
            value_dim,
            narrow(Int32, degree, "degree"),
            dtype_of(T),
            count,
            bytes,
        ),
    )
    return bytes[]
end

"""
    state_monomial(head_dim, degree, row) -> (indices, weight)

Row `row` (1-based) of the canonical order: `phi(x)[row] = weight * prod(x[indices])`, indices 1-based.
"""
function state_monomial(head_dim::Integer, degree::Integer, row::Integer)
    found = zeros(Int32, clamp(degree, 1, 64))  # the library refuses degrees above 8 before it writes
    weight = Ref{Float64}(0)
    check(
        ccall(
            symbol(:powerattn_state_monomial),
            Int32,
            (Int64, Int32, Int64, Ptr{Int32}, Ptr{Float64}),
            head_dim,
            narrow(Int32, degree, "degree"),
            row - 1,
            found,
            weight,
        ),
    )
    return Int.(found) .+ 1, weight[]
end

"""
    State(T, head_dim, value_dim, degree, heads_kv, count = 1)

Zero states of `count` sequences (or slots): `S` is `(value_dim, D, heads_kv, count)`, `z` is
`(D, heads_kv, count)`; element type `T` is Float32, Float64 or BFloat16.
"""
struct State{A<:AbstractArray,B<:AbstractArray}
    S::A
    z::B
    degree::Int
    head_dim::Int
    function State(S::AbstractArray, z::AbstractArray, degree::Integer, head_dim::Integer)
        ndims(S) == 4 && ndims(z) == 3 ||
            throw(DimensionMismatch("S must have 4 dimensions and z 3, got $(size(S)) and $(size(z))"))
        rows = state_rows(head_dim, degree)
        (size(S, 2) == rows && size(z) == (rows, size(S, 3), size(S, 4))) || throw(
            DimensionMismatch(
                "S must be (value_dim, $(rows), heads_kv, count) and z ($(rows), heads_kv, count), got " *
                "$(size(S)) and $(size(z))",
            ),
        )
        eltype(S) === eltype(z) ||
            throw(ArgumentError("S and z must have one element type, got $(eltype(S)) and $(eltype(z))"))
        return new{typeof(S),typeof(z)}(S, z, Int(degree), Int(head_dim))
    end
end

function State(
    ::Type{T},
    head_dim::Integer,
    value_dim::Integer,
    degree::Integer,
    heads_kv::Integer,
    count::Integer = 1,
) where {T}
    rows = state_rows(head_dim, degree)
    S = fill(zero_of(T), value_dim, rows, heads_kv, count)
    return State(S, fill(zero_of(T), rows, heads_kv, count), degree, head_dim)
end

# Zero states in the array type of `like`.
function zero_state(like::AbstractArray, ::Type{T}, head_dim, value_dim, degree, heads_kv, count) where {T}
    rows = state_rows(head_dim, degree)
    S = fill!(allocate(like, T, value_dim, rows, heads_kv, count), zero_of(T))
    return State(S, fill!(allocate(like, T, rows, heads_kv, count), zero_of(T)), degree, head_dim)
end

Base.eltype(state::State) = eltype(state.S)
Base.copy(state::State) = State(copy(state.S), copy(state.z), state.degree, state.head_dim)
count_of(state::State) = size(state.S, 4)
heads_of(state::State) = size(state.S, 3)
value_dim_of(state::State) = size(state.S, 1)

function c_state(state::State, name::AbstractString)
    s, z = strides_of(state.S, name), strides_of(state.z, name)
    (s[1] == 1 || size(state.S, 1) <= 1) &&
        (s[2] == size(state.S, 1) || size(state.S, 2) <= 1) &&
        (z[1] == 1 || size(state.z, 1) <= 1) ||
        throw(ArgumentError("each [D, value_dim] block of $(name) must be contiguous, got strides $(s) and $(z)"))
    return CState(raw_pointer(state.S), raw_pointer(state.z), s[4], s[3], z[3], z[2])
end
c_state(::Nothing, ::AbstractString) = NO_STATE

function check_state(state, name, ::Type{T}, device, head_dim, value_dim, degree, heads_kv, count) where {T}
    state === nothing && return nothing
    dtype_of(eltype(state)) == dtype_of(T) ||
        throw(ArgumentError("$(name) must have element type $(T), got $(eltype(state))"))
    check_device(state.S, string(name, ".S"), device)
    check_device(state.z, string(name, ".z"), device)
    (state.head_dim, state.degree) == (head_dim, degree) || throw(
        DimensionMismatch(
            "$(name) has head_dim $(state.head_dim) and degree $(state.degree), the call $(head_dim) and $(degree)",
        ),
    )
    (value_dim_of(state), heads_of(state)) == (value_dim, heads_kv) || throw(
        DimensionMismatch(
            "$(name) has value_dim $(value_dim_of(state)) and $(heads_of(state)) kv heads, the call $(value_dim) " *
            "and $(heads_kv)",
        ),
    )
    count === nothing ||
        count_of(state) == count ||
        throw(DimensionMismatch("$(name) holds $(count_of(state)) states, the call has $(count) sequences"))
    return nothing
end

# A plan that only moves states.
function state_plan(state::State)
    device, index = device_of(state.S)
    T = eltype(state)
    return cached_plan(
        make_desc(
            T;
            degree = state.degree,
            batch = count_of(state),
            seq_len = 1,
            heads_q = heads_of(state),
            head_dim = state.head_dim,
            value_dim = value_dim_of(state),
            device = device,
            device_index = index,
            state_type = T,
            normalize = iseven(state.degree),
            use_state = true,
        ),
    )
end

"""
    pack(state; T = eltype(state)) -> Vector{UInt8}

The versioned, self-describing block of bytes that [`unpack!`](@ref) reads, here, in C or in another language.
"""
function pack(state::State; T::Type = eltype(state))
    plan = state_plan(state)
    bytes = Ref{UInt64}(0)
    GC.@preserve plan state begin
        check(
            ccall(
                symbol(:powerattn_state_pack_size),
                Int32,
                (Ptr{Cvoid}, Int32, Int64, Ptr{UInt64}),
                plan.handle,
                dtype_of(T),
                count_of(state),
                bytes,
            ),
        )
        block = Vector{UInt8}(undef, bytes[])
        transfer(:powerattn_state_pack, plan, state, block, dtype_of(T))
    end
    return block
end

"""
    unpack!(state, block)

Reads a packed block into `state`, converting its element type if need be. A block of another format version,
degree, size or count is refused before anything is written.
"""
function unpack!(state::State, block::Vector{UInt8})
    plan = state_plan(state)
    GC.@preserve plan state block transfer(:powerattn_state_unpack, plan, state, block, Int32(0))
    return state
end

function transfer(name::Symbol, plan::Plan, state::State, block::Vector{UInt8}, dtype::Int32)
    GC.@preserve plan state block begin
        args = PackArgs(
            struct_size(PackArgs),
            dtype,
            c_state(state, "state"),
            count_of(state),
            Ptr{Cvoid}(pointer(block)),
            length(block),
            stream_of(state.S),
        )
        check(ccall(symbol(name), Int32, (Ptr{Cvoid}, Ptr{PackArgs}), plan.handle, Ref(args)))
    end
    return nothing
end

"""
    save(path, state; T = eltype(state))

Writes the packed state to a file, whole or not at all.
"""
function save(path::AbstractString, state::State; T::Type = eltype(state))
    block = pack(state; T = T)
    partial = string(path, ".partial")
    open(io -> write(io, block), partial, "w")
    mv(partial, path; force = true)
    return path
end

"""
    load!(state, path)

Reads a state saved by [`save`](@ref), or by any program that wrote a packed block.
"""
load!(state::State, path::AbstractString) = unpack!(state, read(path))

"""
    convert_states!(dst, src; src_slots = nothing, dst_slots = nothing)

Copies states between pools and element types: fork, rollback, Float32 <-> BFloat16. Slots are 1-based;
0 skips.
"""
function convert_states!(dst::State, src::State; src_slots = nothing, dst_slots = nothing)
    check_state(
        src,
        "src",
        eltype(src),
        device_of(dst.S),
        dst.head_dim,
        value_dim_of(dst),
        dst.degree,
        heads_of(dst),
        nothing,
    )
    count = src_slots !== nothing ? length(src_slots) :
        dst_slots !== nothing ? length(dst_slots) : min(count_of(src), count_of(dst))
    for (slots, name) in ((src_slots, "src_slots"), (dst_slots, "dst_slots"))
        slots === nothing ||
            length(slots) == count ||
            throw(DimensionMismatch("$(name) must have length $(count), got $(length(slots))"))
    end
    plan = state_plan(dst)
    from = indices(src.S, zero_based(src_slots))
    to = indices(dst.S, zero_based(dst_slots))
    GC.@preserve plan src dst from to begin
        args = ConvertArgs(
            struct_size(ConvertArgs),
            dtype_of(eltype(src)),
            dtype_of(eltype(dst)),
            0,
            c_state(src, "src"),
            c_state(dst, "dst"),
            count,
            index_pointer(from),
            index_pointer(to),
            count_of(src),
            count_of(dst),
            stream_of(dst.S),
        )
        check(
            ccall(symbol(:powerattn_state_convert), Int32, (Ptr{Cvoid}, Ptr{ConvertArgs}), plan.handle, Ref(args)),
        )
    end
    return dst
end

zero_based(::Nothing) = nothing
zero_based(slots) = Int64[s - 1 for s in slots]
