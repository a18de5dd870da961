# SPDX-License-Identifier: Apache-2.0
# Forward and gradients.

# What a call is about, worked out once from its arrays and keywords.
struct Call
    plan::Plan
    layout::Symbol
    head_dim::Int
    value_dim::Int
    heads_q::Int
    heads_kv::Int
    tokens::Int
    batch::Int
    sequences::Int
    degree::Int
    device::Tuple{Symbol,Int}
    state_type::DataType
end

function make_call(
    q,
    k,
    v;
    degree::Integer = 2,
    normalize::Bool = true,
    layout::Symbol = :dhtb,
    cu_seqlens = nothing,
    use_state::Bool = false,
    state_type::Union{Nothing,Type} = nothing,
    options...,
)
    check_layout(layout)
    d, hq, t, b = extents(q, "q", layout)
    dk, hkv, tk, bk = extents(k, "k", layout)
    e, hv, tv, bv = extents(v, "v", layout)
    T = eltype(q)
    check_size(k, "k", in_layout(layout, d, hkv, t, b), T)
    check_size(v, "v", in_layout(layout, e, hkv, t, b), T)
    device = device_of(q)
    check_device(k, "k", device)
    check_device(v, "v", device)
    S = state_type === nothing ? stat_type(T) : state_type
    sequences = cu_seqlens === nothing ? 0 : length(cu_seqlens) - 1
    sequences >= 0 || throw(DimensionMismatch("cu_seqlens must have length sequences + 1, got 0"))
    cu_seqlens === nothing ||
        sequences > 0 ||
        throw(DimensionMismatch("cu_seqlens must describe at least one sequence"))
    plan = cached_plan(
        make_desc(
            T;
            degree = degree,
            normalize = normalize,
            batch = b,
            seq_len = t,
            heads_q = hq,
            heads_kv = hkv,
            head_dim = d,
            value_dim = e,
            device = device[1],
            device_index = device[2],
            sequences = sequences,
            use_state = use_state,
            state_type = S,
            options...,
        ),
    )
    count = cu_seqlens === nothing ? b : sequences
    return Call(plan, layout, d, e, hq, hkv, t, b, count, degree, device, S)
end

# An output-shaped array, rows of `heads` numbers per token, and states of a call.
function check_output(call::Call, x, name, ::Type{T}) where {T}
    check_size(x, name, in_layout(call.layout, call.value_dim, call.heads_q, call.tokens, call.batch), T)
    return check_device(x, name, call.device)
end

function check_rows(call::Call, x, name, heads, ::Type{T}) where {T}
    check_size(x, name, rows_in_layout(call.layout, heads, call.tokens, call.batch), stat_type(T))
    return check_device(x, name, call.device)
end

function check_call_state(call::Call, state, name; count = call.sequences)
    return check_state(
        state,
        name,
        call.state_type,
        call.device,
        call.head_dim,
        call.value_dim,
        call.degree,
        call.heads_kv,
        count,
    )
end

# The element type of a call's states: that of a state it is given, else what was asked for.
state_type_of(asked, ::Nothing) = asked
state_type_of(asked, state::State) = eltype(state)

function check_offsets(call::Call, rope_offset)
    rope_offset === nothing ||
        length(rope_offset) == call.sequences ||
        throw(DimensionMismatch("rope_offset must have length $(call.sequences), got $(length(rope_offset))"))
    return nothing
end

"""
    power_attention!(y, q, k, v; log_g = nothing, row_norm = nothing, initial_state = nothing,
                     final_state = nothing, cu_seqlens = nothing, rope_offset = nothing,
                     layout = :dhtb, degree = 2, options...)

Forward pass into `y`; see [`power_attention`](@ref). `row_norm` (Float32, Float64 with Float64; `(heads_q,
tokens, batch)`) receives the denominators, `final_state` a [`State`](@ref) the final states; it may be the
`initial_state` itself, which is then replaced.
"""
function power_attention!(
    y::AbstractArray,
    q::AbstractArray,
    k::AbstractArray,
    v::AbstractArray;
    log_g = nothing,
    row_norm = nothing,
    initial_state::Union{Nothing,State} = nothing,
    final_state::Union{Nothing,State} = nothing,
    cu_seqlens = nothing,
    rope_offset = nothing,
    state_type::Union{Nothing,Type} = nothing,
    options...,
)
    call = make_call(
        q,
        k,
        v;
        cu_seqlens = cu_seqlens,
        use_state = initial_state !== nothing || final_state !== nothing,
        state_type = state_type_of(state_type_of(state_type, final_state), initial_state),
        options...,
    )
    forward!(call, y, q, k, v, log_g, row_norm, initial_state, final_state, cu_seqlens, rope_offset, nothing)
    return y
end

function forward!(
    call::Call,
    y,
    q,
    k,
    v,
    log_g,
    row_norm,
    initial_state,
    final_state,
    cu_seqlens,
    rope_offset,
    saved,
)
    T = eltype(q)
    check_output(call, y, "y", T)
    check_rows(call, log_g, "log_g", call.heads_kv, T)
    check_rows(call, row_norm, "row_norm", call.heads_q, T)
    check_call_state(call, initial_state, "initial_state")
    check_call_state(call, final_state, "final_state")
    check_offsets(call, rope_offset)
    plan = call.plan
    lens = indices(q, cu_seqlens)
    offsets = indices(q, rope_offset)
    workspace = make_workspace(q, plan.info.workspace_forward)
    GC.@preserve plan y q k v log_g row_norm initial_state final_state lens offsets workspace saved begin
        args = ForwardArgs(
            struct_size(ForwardArgs),
            0,
            tensor(q, "q", call.layout),
            tensor(k, "k", call.layout),
            tensor(v, "v", call.layout),
            row_tensor(log_g, "log_g", call.layout),
            tensor(y, "y", call.layout),
            row_tensor(row_norm, "row_norm", call.layout),
            c_state(initial_state, "initial_state"),
            c_state(final_state, "final_state"),
            index_pointer(lens),
            index_pointer(offsets),
            saved === nothing ? C_NULL : aligned_pointer(saved),
            saved === nothing ? 0 : saved.bytes,
            aligned_pointer(workspace),
            workspace.bytes,
            stream_of(q),
        )
        check(ccall(symbol(:powerattn_forward), Int32, (Ptr{Cvoid}, Ptr{ForwardArgs}), plan.handle, Ref(args)))
    end
    return y
end

"""
    power_attention(q, k, v; kwargs...) -> y
    power_attention(q, k, v; return_final_state = true, kwargs...) -> (y, state)

Symmetric power attention: causal attention whose weights are `(scale * q'k)^degree`, decayed by the gates.

Arrays are `(head_dim, heads, tokens, batch)`; `k` and `v` may have fewer heads (GQA), `v` another head_dim.

Keywords
- `log_g`: `(heads_kv, tokens, batch)` log gates, Float32 (Float64 with Float64).
- `degree = 2`; odd degrees need `normalize = false`.
- `scale = nothing` for `1/sqrt(head_dim)`; `eps = 0` is added to the denominator.
- `initial_state`, `return_final_state`: [`State`](@ref), one per sequence.
- `cu_seqlens`: cumulative token offsets (from 0) of packed sequences; then `batch` is 1.
- `rope`: a [`Rope`](@ref), with `rope_offset` the position of each sequence's first token.
- `state_type`: element type of the states, by default that of `initial_state`, else Float32 (Float64 with
  Float64).
- `form = :auto`, `:attention`, `:chunked`; `chunk_size = 0` lets the library choose.
- `layout = :dhtb` or `:dthb`; `num_threads = 0`.
"""
function power_attention(
    q::AbstractArray,
    k::AbstractArray,
    v::AbstractArray;
    return_final_state::Bool = false,
    initial_state::Union{Nothing,State} = nothing,
    cu_seqlens = nothing,
    degree::Integer = 2,
    layout::Symbol = :dhtb,
    state_type::Union{Nothing,Type} = nothing,
    options...,
)
    check_layout(layout)
    d, hq, t, b = extents(q, "q", layout)
    e, hkv, _, _ = extents(v, "v", layout)
    T = eltype(q)
    y = allocate(q, T, in_layout(layout, e, hq, t, b)...)
    final_state = nothing
    if return_final_state
        S = state_type_of(state_type === nothing ? stat_type(T) : state_type, initial_state)
        count = cu_seqlens === nothing ? b : length(cu_seqlens) - 1
        final_state = zero_state(q, S, d, e, degree, hkv, count)
    end
    power_attention!(
        y,
        q,
        k,
        v;
        initial_state = initial_state,
        final_state = final_state,
        cu_seqlens = cu_seqlens,
        degree = degree,
        layout = layout,
        state_type = state_type,
        options...,
    )
    return return_final_state ? (y, final_state) : y
end

# The differentiable arguments by position, for automatic differentiation.
function power_attention(
    q::AbstractArray,
    k::AbstractArray,
    v::AbstractArray,
    log_g::Union{Nothing,AbstractArray},
    initial_state::Union{Nothing,State} = nothing;
    options...,
)
    return power_attention(q, k, v; log_g = log_g, initial_state = initial_state, options...)
end

"""
    power_attention_pullback(q, k, v; kwargs...) -> (y, final_state, back)

Forward pass that keeps what the gradients need. `back(d_y; d_final_state = nothing)` returns a named tuple
`(q, k, v, log_g, initial_state)` of gradients; `log_g` and `initial_state` are `nothing` where the forward
had none. Keywords as in [`power_attention`](@ref); `final_state` is `nothing` unless asked for.
"""
function power_attention_pullback(
    q::AbstractArray,
    k::AbstractArray,
    v::AbstractArray;
    log_g = nothing,
    initial_state::Union{Nothing,State} = nothing,
    return_final_state::Bool = false,
    cu_seqlens = nothing,
    rope_offset = nothing,
    state_type::Union{Nothing,Type} = nothing,
    options...,
)
    call = make_call(
        q,
        k,
        v;
        cu_seqlens = cu_seqlens,
        use_state = initial_state !== nothing || return_final_state,
        state_type = state_type_of(state_type, initial_state),
        options...,
    )
    T = eltype(q)
    y = allocate(q, T, in_layout(call.layout, call.value_dim, call.heads_q, call.tokens, call.batch)...)
    row_norm =
        allocate(q, stat_type(T), rows_in_layout(call.layout, call.heads_q, call.tokens, call.batch)...)
    new_state() = zero_state(
        q,
        call.state_type,
        call.head_dim,
        call.value_dim,
        call.degree,
        call.heads_kv,
        call.sequences,
    )
    final_state = return_final_state ? new_state() : nothing
    saved = make_workspace(q, call.plan.info.saved_bytes)
    saved.bytes == 0 && (saved = nothing)
    forward!(call, y, q, k, v, log_g, row_norm, initial_state, final_state, cu_seqlens, rope_offset, saved)

    function back(d_y::AbstractArray; d_final_state::Union{Nothing,State} = nothing)
        dq, dk, dv = similar_plain(q), similar_plain(k), similar_plain(v)
        d_log_g = log_g === nothing ? nothing : similar_plain(log_g)
        d_initial = initial_state === nothing ? nothing : new_state()
        backward!(
            call,
            (q = dq, k = dk, v = dv, log_g = d_log_g, initial_state = d_initial),
            d_y,
            (q, k, v, log_g, y, row_norm, initial_state, cu_seqlens, rope_offset, saved),
            d_final_state,
        )
        return (q = dq, k = dk, v = dv, log_g = d_log_g, initial_state = d_initial)
    end
    return y, final_state, back
end

similar_plain(x::AbstractArray) = allocate(x, eltype(x), size(x)...)

function backward!(call::Call, gradients, d_y, inputs, d_final_state)
    q, k, v, log_g, y, row_norm, initial_state, cu_seqlens, rope_offset, saved = inputs
    check_output(call, d_y, "d_y", eltype(q))
    check_call_state(call, d_final_state, "d_final_state")
    plan = call.plan
    lens = indices(q, cu_seqlens)
    offsets = indices(q, rope_offset)
    bytes = saved === nothing ? plan.info.workspace_backward : plan.info.workspace_backward_saved
    workspace = make_workspace(q, bytes)
    GC.@preserve plan gradients d_y inputs d_final_state lens offsets workspace begin
        args = BackwardArgs(
            struct_size(BackwardArgs),
            0,
            tensor(q, "q", call.layout),
            tensor(k, "k", call.layout),
            tensor(v, "v", call.layout),
            row_tensor(log_g, "log_g", call.layout),
            tensor(y, "y", call.layout),
            row_tensor(row_norm, "row_norm", call.layout),
            tensor(d_y, "d_y", call.layout),
            tensor(gradients.q, "d_q", call.layout),
            tensor(gradients.k, "d_k", call.layout),
            tensor(gradients.v, "d_v", call.layout),
            row_tensor(gradients.log_g, "d_log_g", call.layout),
            c_state(initial_state, "initial_state"),
            c_state(d_final_state, "d_final_state"),
            c_state(gradients.initial_state, "d_initial_state"),
            index_pointer(lens),
            index_pointer(offsets),
            saved === nothing ? C_NULL : aligned_pointer(saved),
            saved === nothing ? 0 : saved.bytes,
            aligned_pointer(workspace),
            workspace.bytes,
            stream_of(q),
        )
        check(ccall(symbol(:powerattn_backward), Int32, (Ptr{Cvoid}, Ptr{BackwardArgs}), plan.handle, Ref(args)))
    end
    return nothing
end
