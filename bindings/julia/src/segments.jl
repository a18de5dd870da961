# SPDX-License-Identifier: Apache-2.0
# Summaries of segments and their composition: context parallelism, prefix caching.

"""
    summary(k, v; log_g = nothing, degree = 2, cu_seqlens = nothing, options...) -> (state, total_log_g)

State and total log gate `(heads_kv, sequences)` of each sequence from its keys, values and gates alone.
`state_type` asks for states of another element type.
"""
function summary(
    k::AbstractArray,
    v::AbstractArray;
    log_g = nothing,
    cu_seqlens = nothing,
    rope_offset = nothing,
    options...,
)
    call = make_call(k, k, v; cu_seqlens = cu_seqlens, use_state = true, options...)
    T = eltype(k)
    check_rows(call, log_g, "log_g", call.heads_kv, T)
    check_offsets(call, rope_offset)
    state =
        zero_state(k, call.state_type, call.head_dim, call.value_dim, call.degree, call.heads_kv, call.sequences)
    total = allocate(k, stat_type(T), call.heads_kv, call.sequences)
    plan = call.plan
    lens = indices(k, cu_seqlens)
    offsets = indices(k, rope_offset)
    workspace = make_workspace(k, plan.info.workspace_summary)
    GC.@preserve plan k v log_g state total lens offsets workspace begin
        args = SummaryArgs(
            struct_size(SummaryArgs),
            0,
            tensor(k, "k", call.layout),
            tensor(v, "v", call.layout),
            row_tensor(log_g, "log_g", call.layout),
            c_state(state, "state"),
            raw_pointer(total),
            index_pointer(lens),
            index_pointer(offsets),
            aligned_pointer(workspace),
            workspace.bytes,
            stream_of(k),
        )
        check(ccall(symbol(:powerattn_summary), Int32, (Ptr{Cvoid}, Ptr{SummaryArgs}), plan.handle, Ref(args)))
    end
    return state, total
end

"""
    summary_reverse(q, y, row_norm, d_y; heads_kv, log_g = nothing, ...) -> (d_state, total_log_g)

Gradient of each sequence's initial state when its final state gets no gradient. `y` and `row_norm` are those
of the forward call with the true initial state; `nothing` for both when unnormalised.
"""
function summary_reverse(
    q::AbstractArray,
    y::Union{Nothing,AbstractArray},
    row_norm::Union{Nothing,AbstractArray},
    d_y::AbstractArray;
    heads_kv::Integer,
    log_g = nothing,
    cu_seqlens = nothing,
    rope_offset = nothing,
    layout::Symbol = :dhtb,
    degree::Integer = 2,
    state_type::Union{Nothing,Type} = nothing,
    options...,
)
    check_layout(layout)
    d, hq, t, b = extents(q, "q", layout)
    e = size(d_y, 1)
    T = eltype(q)
    device = device_of(q)
    S = state_type === nothing ? stat_type(T) : state_type
    sequences = cu_seqlens === nothing ? b : length(cu_seqlens) - 1
    plan = cached_plan(
        make_desc(
            T;
            degree = degree,
            batch = b,
            seq_len = t,
            heads_q = hq,
            heads_kv = heads_kv,
            head_dim = d,
            value_dim = e,
            device = device[1],
            device_index = device[2],
            state_type = S,
            sequences = cu_seqlens === nothing ? 0 : sequences,
            use_state = true,
            options...,
        ),
    )
    call = Call(plan, layout, d, e, hq, heads_kv, t, b, sequences, degree, device, S)
    check_output(call, y, "y", T)
    check_output(call, d_y, "d_y", T)
    check_rows(call, row_norm, "row_norm", hq, T)
    check_rows(call, log_g, "log_g", heads_kv, T)
    check_offsets(call, rope_offset)
    state = zero_state(q, S, d, e, degree, heads_kv, sequences)
    total = allocate(q, stat_type(T), heads_kv, sequences)
    lens = indices(q, cu_seqlens)
    offsets = indices(q, rope_offset)
    workspace = make_workspace(q, plan.info.workspace_summary)
    GC.@preserve plan q y row_norm d_y log_g state total lens offsets workspace begin
        args = SummaryReverseArgs(
            struct_size(SummaryReverseArgs),
            0,
            tensor(q, "q", layout),
            row_tensor(log_g, "log_g", layout),
            tensor(y, "y", layout),
            row_tensor(row_norm, "row_norm", layout),
            tensor(d_y, "d_y", layout),
            c_state(state, "d_state"),
            raw_pointer(total),
            index_pointer(lens),
            index_pointer(offsets),
            aligned_pointer(workspace),
            workspace.bytes,
            stream_of(q),
        )
        check(
            ccall(
                symbol(:powerattn_summary_reverse),
                Int32,
                (Ptr{Cvoid}, Ptr{SummaryReverseArgs}),
                plan.handle,
                Ref(args),
            ),
        )
    end
    return state, total
end

"""
    compose(S, z, total_log_g; degree, head_dim) -> (state, total_log_g)

Folds segments in order, `S <- exp(L_m) S + S_m`. `S` is `(value_dim, D, heads_kv, sequences, segments)`, `z`
`(D, heads_kv, sequences, segments)`, `total_log_g` `(heads_kv, sequences, segments)` or `nothing`.
"""
function compose(S::AbstractArray, z::AbstractArray, total_log_g; degree::Integer, head_dim::Integer)
    ndims(S) == 5 && ndims(z) == 4 ||
        throw(DimensionMismatch("S must have 5 dimensions and z 4, got $(size(S)) and $(size(z))"))
    e, rows, heads, sequences, segments = size(S)
    T = eltype(S)
    check_size(z, "z", (rows, heads, sequences, segments), T)
    check_size(total_log_g, "total_log_g", (heads, sequences, segments), stat_type(T))
    check_device(z, "z", device_of(S))
    check_device(total_log_g, "total_log_g", device_of(S))
    out = zero_state(S, T, head_dim, e, degree, heads, sequences)
    total = allocate(S, stat_type(T), heads, sequences)
    plan = state_plan(out)
    sst, zst = strides_of(S, "S"), strides_of(z, "z")
    (sst[1] == 1 || e <= 1) && (sst[2] == e || rows <= 1) && (zst[1] == 1 || rows <= 1) ||
        throw(ArgumentError("each [D, value_dim] block of S and z must be contiguous, got strides $(sst), $(zst)"))
    rows == state_rows(head_dim, degree) ||
        throw(DimensionMismatch("S has $(rows) rows, head_dim $(head_dim) and degree $(degree) need $(state_rows(head_dim, degree))"))
    g = total_log_g === nothing ? (0, 0, 0) : strides_of(total_log_g, "total_log_g")
    GC.@preserve plan S z total_log_g out total begin
        args = ComposeArgs(
            struct_size(ComposeArgs),
            0,
            segments,
            CState(raw_pointer(S), raw_pointer(z), sst[4], sst[3], zst[3], zst[2]),
            sst[5],
            zst[4],
            total_log_g === nothing ? C_NULL : raw_pointer(total_log_g),
            g[3],
            g[2],
            g[1],
            c_state(out, "out"),
            raw_pointer(total),
            stream_of(S),
        )
        check(
            ccall(symbol(:powerattn_state_compose), Int32, (Ptr{Cvoid}, Ptr{ComposeArgs}), plan.handle, Ref(args)),
        )
    end
    return out, total
end
