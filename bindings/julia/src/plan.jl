# SPDX-License-Identifier: Apache-2.0

"""
    Rope(; style = :half, dim = 0, base = 10000.0)

Rotary embedding of queries and keys inside the call. `style` is `:half` (pairs `i`, `i + dim/2`) or
`:interleaved` (pairs `2i`, `2i+1`); `dim` is the number of leading dimensions rotated, 0 for all.
"""
struct Rope
    style::Symbol
    dim::Int
    base::Float64
end
function Rope(; style::Symbol = :half, dim::Integer = 0, base::Real = 10000.0)
    style in (:half, :interleaved) ||
        throw(ArgumentError("rope style must be :half or :interleaved, got :$(style)"))
    return Rope(style, Int(dim), Float64(base))
end

"""
    Plan(T; degree = 2, batch, seq_len, heads_q, heads_kv = heads_q, head_dim, value_dim = head_dim, ...)

An immutable plan for arrays of element type `T`; holds no data and may be used by many tasks at once.
Keywords beyond the sizes: `device = :cpu`, `device_index = 0`, `state_type` (default Float32, Float64 with
Float64), `normalize = true`, `use_state = false`, `form = :auto` (`:attention`, `:chunked`), `sequences = 0`
(packed sequences), `max_seq_len = 0`, `chunk_size = 0`, `scale = nothing` (1/sqrt(head_dim)), `eps = 0`,
`rope = nothing`, `num_threads = 0`, `allow_tf32 = false`, `state_limit = 0`.
"""
mutable struct Plan
    handle::Ptr{Cvoid}
    desc::Desc
    info::PlanInfo
    function Plan(desc::Desc)
        out = Ref{Ptr{Cvoid}}(C_NULL)
        check(ccall(symbol(:powerattn_plan_create), Int32, (Ptr{Desc}, Ptr{Ptr{Cvoid}}), Ref(desc), out))
        info = Ref(PlanInfo(struct_size(PlanInfo), 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0.0, 0.0, 0.0))
        destroy = symbol(:powerattn_plan_destroy)
        status = ccall(symbol(:powerattn_plan_query), Int32, (Ptr{Cvoid}, Ptr{PlanInfo}), out[], info)
        if status != OK
            ccall(destroy, Cvoid, (Ptr{Cvoid},), out[])
            check(status)
        end
        plan = new(out[], desc, info[])
        finalizer(p -> ccall(destroy, Cvoid, (Ptr{Cvoid},), p.handle), plan)
        return plan
    end
end

function Plan(::Type{T}; options...) where {T}
    return Plan(make_desc(T; options...))
end

function make_desc(
    ::Type{T};
    degree::Integer = 2,
    batch::Integer,
    seq_len::Integer,
    heads_q::Integer,
    heads_kv::Integer = heads_q,
    head_dim::Integer,
    value_dim::Integer = head_dim,
    device::Symbol = :cpu,
    device_index::Integer = 0,
    state_type::Union{Nothing,Type} = nothing,
    normalize::Bool = true,
    use_state::Bool = false,
    form::Symbol = :auto,
    sequences::Integer = 0,
    max_seq_len::Integer = 0,
    chunk_size::Integer = 0,
    scale::Union{Nothing,Real} = nothing,
    eps::Real = 0.0,
    rope::Union{Nothing,Rope} = nothing,
    num_threads::Integer = 0,
    allow_tf32::Bool = false,
    state_limit::Integer = 0,
) where {T}
    haskey(FORMS, form) || throw(ArgumentError("form must be one of $(keys(FORMS)), got :$(form)"))
    flags = Int32(0)
    normalize || (flags |= UNNORMALIZED)
    scale === nothing || (flags |= CUSTOM_SCALE)
    use_state && (flags |= USE_STATE)
    allow_tf32 && (flags |= ALLOW_TF32)
    return Desc(
        struct_size(Desc),
        device_type(device),
        narrow(Int32, device_index, "device_index"),
        dtype_of(T),
        state_type === nothing ? Int32(0) : dtype_of(state_type),
        narrow(Int32, degree, "degree"),
        flags,
        FORMS[form],
        narrow(Int64, batch, "batch"),
        narrow(Int64, seq_len, "seq_len"),
        narrow(Int64, heads_q, "heads_q"),
        narrow(Int64, heads_kv, "heads_kv"),
        narrow(Int64, head_dim, "head_dim"),
        narrow(Int64, value_dim, "value_dim"),
        narrow(Int64, sequences, "sequences"),
        narrow(Int64, max_seq_len, "max_seq_len"),
        narrow(Int64, chunk_size, "chunk_size"),
        scale === nothing ? 0.0 : scale,
        eps,
        rope === nothing ? 0.0 : rope.base,
        rope === nothing ? 0 : rope.dim,
        rope === nothing ? ROPE_STYLES.none : ROPE_STYLES[rope.style],
        narrow(Int32, num_threads, "num_threads"),
        narrow(UInt64, state_limit, "state_limit"),
        (0, 0, 0, 0),
    )
end

# Plans by description: making one costs far more than looking it up.
const PLANS = Dict{Desc,Plan}()
const PLANS_LOCK = ReentrantLock()
const PLANS_LIMIT = 128

function cached_plan(desc::Desc)
    return lock(PLANS_LOCK) do
        plan = get(PLANS, desc, nothing)
        plan === nothing || return plan
        length(PLANS) >= PLANS_LIMIT && empty!(PLANS)
        return PLANS[desc] = Plan(desc)
    end
end

"""
    describe(plan) -> String

What the plan will run: form, chunk, kernels, tiling with its reasons, costs, memory.
"""
function describe(plan::Plan)
    needed = Ref{Csize_t}(0)
    f = symbol(:powerattn_plan_describe)
    GC.@preserve plan begin
        check(ccall(f, Int32, (Ptr{Cvoid}, Ptr{UInt8}, Csize_t, Ptr{Csize_t}), plan.handle, C_NULL, 0, needed))
        text = Vector{UInt8}(undef, needed[])
        check(
            ccall(
                f,
                Int32,
                (Ptr{Cvoid}, Ptr{UInt8}, Csize_t, Ptr{Csize_t}),
                plan.handle,
                text,
                length(text),
                needed,
            ),
        )
    end
    return String(text[1:end-1])
end
