# SPDX-License-Identifier: Apache-2.0
"""
Symmetric power attention through libpowerattn: forward, gradients, and the one-token state step.

Arrays are `(head_dim, heads, tokens, batch)`, which is C's row-major `[b, t, h, d]` without a copy;
`log_g` is `(heads_kv, tokens, batch)`. With `layout = :dthb` they are `(head_dim, tokens, heads, batch)`.
Views and `PermutedDimsArray`s work as long as the first dimension is contiguous.

See [`power_attention`](@ref), [`power_attention!`](@ref), [`power_attention_pullback`](@ref),
[`State`](@ref), [`step!`](@ref).
"""
module PowerAttention

using Libdl

export power_attention,
    power_attention!,
    power_attention_pullback,
    step!,
    State,
    Plan,
    Rope,
    PowerAttentionError,
    state_rows,
    state_bytes,
    state_monomial,
    describe

include("structs.jl")
include("library.jl")
include("errors.jl")
include("arrays.jl")
include("plan.jl")
include("states.jl")
include("attention.jl")
include("step.jl")
include("segments.jl")

function __init__()
    LIBRARY[] = nothing  # found at the first call, so that loading the package never fails
    return nothing
end

end # module
