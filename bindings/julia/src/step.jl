# SPDX-License-Identifier: Apache-2.0

"""
    step!(state, q, k, v; log_g = nothing, slots = nothing, lengths = nothing, rope_offset = nothing,
          degree = state.degree, options...) -> y

One or a few tokens of each sequence against a pool of states, in place: the cost of a token does not grow
with the context. `slots` (1-based; 0 skips the sequence) says which state each sequence uses, by default
its own number; `lengths` how many of the tokens are valid, the rest never touch a state.
"""
function step!(
    state::State,
    q::AbstractArray,
    k::AbstractArray,
    v::AbstractArray;
    layout::Symbol = :dhtb,
    options...,
)
    check_layout(layout)
    _, hq, t, b = extents(q, "q", layout)
    y = allocate(q, eltype(q), in_layout(layout, value_dim_of(state), hq, t, b)...)
    return step!(y, state, q, k, v; layout = layout, options...)
end

function step!(
    y::AbstractArray,
    state::State,
    q::AbstractArray,
    k::AbstractArray,
    v::AbstractArray;
    log_g = nothing,
    slots = nothing,
    lengths = nothing,
    rope_offset = nothing,
    options...,
)
    call = make_call(
        q,
        k,
        v;
        degree = state.degree,
        state_type = eltype(state),
        use_state = true,
        options...,
    )
    T = eltype(q)
    check_call_state(call, state, "state"; count = nothing)
    check_output(call, y, "y", T)
    check_rows(call, log_g, "log_g", call.heads_kv, T)
    for (x, name) in ((slots, "slots"), (lengths, "lengths"), (rope_offset, "rope_offset"))
        x === nothing ||
            length(x) == call.batch ||
            throw(DimensionMismatch("$(name) must have length $(call.batch), got $(length(x))"))
    end
    slots === nothing &&
        count_of(state) < call.batch &&
        throw(DimensionMismatch("state holds $(count_of(state)) states for $(call.batch) sequences; pass slots"))
    plan = call.plan
    slot_indices = indices(q, zero_based(slots))
    valid = indices(q, lengths)
    offsets = indices(q, rope_offset)
    workspace = make_workspace(q, plan.info.workspace_step)
    GC.@preserve plan y state q k v log_g slot_indices valid offsets workspace begin
        args = StepArgs(
            struct_size(StepArgs),
            0,
            tensor(q, "q", call.layout),
            tensor(k, "k", call.layout),
            tensor(v, "v", call.layout),
            row_tensor(log_g, "log_g", call.layout),
            tensor(y, "y", call.layout),
            c_state(state, "state"),
            count_of(state),
            index_pointer(slot_indices),
            index_pointer(valid),
            index_pointer(offsets),
            aligned_pointer(workspace),
            workspace.bytes,
            stream_of(q),
        )
        check(ccall(symbol(:powerattn_step), Int32, (Ptr{Cvoid}, Ptr{StepArgs}), plan.handle, Ref(args)))
    end
    return y
end
