# SPDX-License-Identifier: Apache-2.0
# The definition in float64, straight from the header, for one batch of (d, h, t, b) arrays; inputs and comparisons.

function oracle(q, k, v; log_g = nothing, degree = 2, scale = nothing, normalize = true, eps = 0.0)
    d, hq, t, b = size(q)
    e, hkv = size(v, 1), size(v, 2)
    s = scale === nothing ? 1 / sqrt(d) : scale
    y = zeros(e, hq, t, b)
    for n in 1:b, h in 1:hq
        g = cld(h, div(hq, hkv))
        G = log_g === nothing ? zeros(t) : cumsum(Float64.(log_g[g, :, n]))
        for i in 1:t
            total = zeros(e)
            norm = 0.0
            for j in 1:i
                w = exp(G[i] - G[j]) * (s * sum(Float64.(q[:, h, i, n]) .* Float64.(k[:, g, j, n])))^degree
                total .+= w .* Float64.(v[:, g, j, n])
                norm += w
            end
            y[:, h, i, n] .= normalize ? (norm == 0 ? zero(total) : total ./ (norm + eps)) : total
        end
    end
    return y
end

difference(a, b) = sqrt(sum(abs2, Float64.(a) .- Float64.(b)) / max(sum(abs2, Float64.(b)), 1e-300))

# What rounding the result to T costs by itself, times a margin for the inputs' own rounding.
tolerance(::Type{Float64}) = 1e-12
tolerance(::Type{Float32}) = 1e-5
tolerance(::Type{Float16}) = 2e-3
tolerance(::Type{PA.BFloat16}) = 1.5e-2

function inputs(T, d, hq, hkv, t, b; e = d, seed = 1)
    rng = MersenneTwister(seed)
    draw(dims...) = T.(randn(rng, dims...))
    log_g = PA.stat_type(T).(-0.1 .* rand(rng, hkv, t, b))
    return draw(d, hq, t, b), draw(d, hkv, t, b), draw(e, hkv, t, b), log_g
end

# One (d, h, t) block for every batch entry: a stride of 0, as only a custom array has it in Julia.
struct Shared{T} <: AbstractArray{T,4}
    base::Array{T,3}
    batch::Int
end
Base.size(x::Shared) = (size(x.base)..., x.batch)
Base.getindex(x::Shared, i::Int, h::Int, t::Int, b::Int) = x.base[i, h, t]
Base.strides(x::Shared) = (strides(x.base)..., 0)
Base.pointer(x::Shared) = pointer(x.base)
