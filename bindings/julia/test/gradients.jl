# SPDX-License-Identifier: Apache-2.0
# Directional derivatives of <y, c> + <final state, C> against central differences in float64.

inner(a, b) = sum(Float64.(a) .* Float64.(b))

@testset "gradients $(form) degree $(degree)" for form in (:attention, :chunked), degree in (2, 3)
    options = (degree = degree, form = form, normalize = iseven(degree), rope = Rope())
    q, k, v, log_g = inputs(Float64, 6, 4, 2, 23, 2; e = 3)
    rng = MersenneTwister(7)
    state = State(Float64, 6, 3, degree, 2, 2)
    # A state that comes from tokens, so that the denominators stay positive.
    _, state = power_attention(q[:, :, 1:9, :], k[:, :, 1:9, :], v[:, :, 1:9, :]; return_final_state = true, options...)
    dy = randn(rng, 3, 4, 23, 2)
    dS, dz = randn(rng, size(state.S)...), randn(rng, size(state.z)...)
    _, final_state, back = power_attention_pullback(
        q,
        k,
        v;
        log_g = log_g,
        initial_state = state,
        return_final_state = true,
        options...,
    )
    g = back(dy; d_final_state = State(dS, dz, degree, 6))
    function loss(q, k, v, log_g, S, z)
        y, last = power_attention(
            q,
            k,
            v;
            log_g = log_g,
            initial_state = State(S, z, degree, 6),
            return_final_state = true,
            options...,
        )
        return inner(y, dy) + inner(last.S, dS) + inner(last.z, dz)
    end
    base = (q, k, v, log_g, state.S, state.z)
    grads = (g.q, g.k, g.v, g.log_g, g.initial_state.S, g.initial_state.z)
    for i in 1:6
        dir = randn(rng, size(base[i])...)
        step = 1e-6
        shifted(s) = loss([j == i ? base[j] .+ s .* dir : base[j] for j in 1:6]...)
        numeric = (shifted(step) - shifted(-step)) / 2step
        @test isapprox(inner(grads[i], dir), numeric; rtol = 2e-6, atol = 1e-6)
    end
end

@testset "gradients without options" begin
    q, k, v, _ = inputs(Float32, 8, 2, 2, 40, 1)
    y, final_state, back = power_attention_pullback(q, k, v)
    @test final_state === nothing && y == power_attention(q, k, v)
    g = back(ones(Float32, size(y)))
    @test g.log_g === nothing && g.initial_state === nothing
    # The rows of a normalised output are averages of v: the gradients of v sum to the number of rows.
    @test isapprox(sum(g.v), length(y); rtol = 1e-4)
end
