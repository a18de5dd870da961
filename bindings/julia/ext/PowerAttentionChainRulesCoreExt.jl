# SPDX-License-Identifier: Apache-2.0
# rrule for power_attention: gradients of q, k, v, and of log_g and the initial state when they are given by
# position. The maths is the library's; this only routes tangents.
module PowerAttentionChainRulesCoreExt

using ChainRulesCore
using PowerAttention

# A gradient as an array like `like`: what comes from other rules may be lazy (the gradient of sum is a Fill) or wider.
plain(::AbstractZero, like::AbstractArray) = fill!(similar(like), PowerAttention.zero_of(eltype(like)))
plain(x::AbstractArray, like::AbstractArray) =
    eltype(x) === eltype(like) && PowerAttention.readable(x) ? x : (similar(like) .= x)

# Tangent of a State -> State, with zeros for what the loss does not use.
state_gradient(::State, ::Union{Nothing,AbstractZero}) = nothing
function state_gradient(like::State, tangent)
    S = unthunk(tangent.S)
    z = unthunk(tangent.z)
    S isa AbstractZero && z isa AbstractZero && return nothing
    return State(plain(S, like.S), plain(z, like.z), like.degree, like.head_dim)
end

tangent_of(::Nothing, ::Any) = NoTangent()
tangent_of(d::AbstractArray, ::Any) = d
tangent_of(d::State, like::State) = Tangent{typeof(like)}(; S = d.S, z = d.z)

function pullback(q, k, v, log_g, initial_state; return_final_state = false, options...)
    y, final_state, back = PowerAttention.power_attention_pullback(
        q,
        k,
        v;
        log_g = log_g,
        initial_state = initial_state,
        return_final_state = return_final_state,
        options...,
    )
    function gradients(change)
        delta = unthunk(change)
        d_y = plain(return_final_state ? unthunk(delta[1]) : delta, y)
        d_state = return_final_state ? state_gradient(final_state, unthunk(delta[2])) : nothing
        return back(d_y; d_final_state = d_state)
    end
    return return_final_state ? (y, final_state) : y, gradients
end

function ChainRulesCore.rrule(
    ::typeof(power_attention),
    q::AbstractArray,
    k::AbstractArray,
    v::AbstractArray;
    log_g = nothing,
    initial_state = nothing,
    options...,
)
    out, gradients = pullback(q, k, v, log_g, initial_state; options...)
    function power_attention_rule(change)
        d = gradients(change)
        return NoTangent(), d.q, d.k, d.v
    end
    return out, power_attention_rule
end

function ChainRulesCore.rrule(
    ::typeof(power_attention),
    q::AbstractArray,
    k::AbstractArray,
    v::AbstractArray,
    log_g::Union{Nothing,AbstractArray},
    initial_state::Union{Nothing,State} = nothing;
    options...,
)
    out, gradients = pullback(q, k, v, log_g, initial_state; options...)
    function power_attention_rule(change)
        d = gradients(change)
        return NoTangent(),
        d.q,
        d.k,
        d.v,
        tangent_of(d.log_g, log_g),
        tangent_of(d.initial_state, initial_state)
    end
    return out, power_attention_rule
end

end # module
