# SPDX-License-Identifier: Apache-2.0
# The package extensions. ChainRulesCore and CUDA.jl are not needed by the package; where ChainRulesCore is
# installed its rule is called, else the same code path is exercised through a stand-in for its few names.

const RULES = try
    Base.require(Base.PkgId(Base.UUID("d360d2e6-b24c-11e9-a2a3-2a2ae2dbcce4"), "ChainRulesCore"))
catch
    @info "ChainRulesCore is not installed: its extension runs against a stand-in of the names it uses"
    nothing
end

if RULES === nothing
    @eval module ChainRulesCore
    export NoTangent, AbstractZero, Tangent, unthunk, rrule
    abstract type AbstractZero end
    struct NoTangent <: AbstractZero end
    struct Tangent{P,T}
        fields::T
    end
    Tangent{P}(; fields...) where {P} = Tangent{P,typeof(values(fields))}(values(fields))
    Base.getproperty(t::Tangent, name::Symbol) = getproperty(getfield(t, :fields), name)
    unthunk(x) = x
    function rrule end
    end
end

const EXTENSION = let path = joinpath(@__DIR__, "..", "ext", "PowerAttentionChainRulesCoreExt.jl")
    text = read(path, String)
    RULES === nothing && (text = replace(text, "using ChainRulesCore" => "using ..ChainRulesCore"))
    RULES === nothing ? include_string(@__MODULE__, text, path) : nothing
end
const CRC = RULES === nothing ? ChainRulesCore : RULES

# Like a Fill: no memory, no strides.
struct Lazy <: AbstractArray{Float64,4}
    value::Float64
    dims::NTuple{4,Int}
end
Base.size(x::Lazy) = x.dims
Base.getindex(x::Lazy, ::Int...) = x.value

@testset "rrule" begin
    q, k, v, log_g = inputs(Float64, 4, 2, 1, 12, 1)
    _, state = power_attention(q, k, v; return_final_state = true)
    dy = randn(MersenneTwister(5), size(power_attention(q, k, v))...)
    y, pull = CRC.rrule(power_attention, q, k, v)
    _, _, back = power_attention_pullback(q, k, v)
    g = back(dy)
    @test y == power_attention(q, k, v)
    @test pull(dy)[2:4] == (g.q, g.k, g.v)
    (y, last), pull = CRC.rrule(power_attention, q, k, v, log_g, state; return_final_state = true)
    d_last = CRC.Tangent{typeof(last)}(; S = last.S, z = last.z)
    d = pull((dy, d_last))
    _, _, back =
        power_attention_pullback(q, k, v; log_g = log_g, initial_state = state, return_final_state = true)
    g = back(dy; d_final_state = last)
    @test d[2:5] == (g.q, g.k, g.v, g.log_g)
    @test d[6].S == g.initial_state.S && d[6].z == g.initial_state.z
    RULES === nothing && @test isempty(detect_ambiguities(PowerAttentionChainRulesCoreExt))
    # Gradients that are missing, in part or whole, lazy, wider, or in another order in memory.
    zero_y, none = zeros(size(dy)), CRC.NoTangent()
    zeros_of(s) = State(zero(s.S), zero(s.z), s.degree, s.head_dim)
    expect(d, dy, d_last) = begin
        g = back(dy; d_final_state = d_last)
        @test d[2:5] == (g.q, g.k, g.v, g.log_g) && d[6].S == g.initial_state.S
    end
    expect(pull((none, d_last)), zero_y, last)
    expect(pull((dy, none)), dy, zeros_of(last))
    only_z = State(zero(last.S), last.z, last.degree, last.head_dim)
    expect(pull((dy, CRC.Tangent{typeof(last)}(; S = none, z = last.z))), dy, only_z)
    expect(pull((Lazy(2.0, size(dy)), none)), fill(2.0, size(dy)), zeros_of(last))
    expect(pull((Float32.(dy), none)), Float64.(Float32.(dy)), zeros_of(last))
    expect(pull((PermutedDimsArray(permutedims(dy, (3, 2, 1, 4)), (3, 2, 1, 4)), none)), dy, zeros_of(last))
end
