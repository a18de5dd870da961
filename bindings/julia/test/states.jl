# SPDX-License-Identifier: Apache-2.0

@testset "sizes" begin
    @test state_rows(64, 2) == 2080
    @test state_bytes(64, 64, 2, PA.BFloat16, 144) == 2 * 144 * 2080 * 65
    x, y = randn(MersenneTwister(3), 6), randn(MersenneTwister(4), 6)
    for degree in 1:4
        phi(u) = [w * prod(u[i]) for (i, w) in (state_monomial(6, degree, r) for r in 1:state_rows(6, degree))]
        @test isapprox(sum(phi(x) .* phi(y)), sum(x .* y)^degree; rtol = 1e-12)
    end
end

@testset "split and resume, step" begin
    q, k, v, log_g = inputs(Float32, 16, 4, 2, 33, 3)
    options = (rope = Rope(),)
    y, last = power_attention(q, k, v; log_g = log_g, return_final_state = true, options...)
    cut(x, r) = x[:, :, r, :]
    y1, mid = power_attention(
        cut(q, 1:20),
        cut(k, 1:20),
        cut(v, 1:20);
        log_g = log_g[:, 1:20, :],
        return_final_state = true,
        options...,
    )
    y2, last2 = power_attention(
        cut(q, 21:33),
        cut(k, 21:33),
        cut(v, 21:33);
        log_g = log_g[:, 21:33, :],
        initial_state = mid,
        return_final_state = true,
        rope_offset = [20, 20, 20],
        options...,
    )
    @test difference(cat(y1, y2; dims = 3), y) < 1e-5
    @test difference(last2.S, last.S) < 1e-5 && difference(last2.z, last.z) < 1e-5
    # Token by token, sequences 1..3 in slots 4, 2, 1 of a pool of five.
    pool = State(Float32, 16, 16, 2, 2, 5)
    pool.S[:, :, :, 3] .= 7
    for i in 1:33
        r = i:i
        yi = step!(
            pool,
            cut(q, r),
            cut(k, r),
            cut(v, r);
            log_g = log_g[:, r, :],
            slots = [4, 2, 1],
            rope_offset = fill(i - 1, 3),
            options...,
        )
        @test difference(yi, cut(y, r)) < 1e-4
    end
    @test difference(pool.S[:, :, :, [4, 2, 1]], last.S) < 1e-5
    @test all(==(7), pool.S[:, :, :, 3]) && all(iszero, pool.S[:, :, :, 5])
    before = copy(pool)
    yi = step!(pool, cut(q, 1:2), cut(k, 1:2), cut(v, 1:2); slots = [0, 2, 1], lengths = [2, 0, 1])
    @test all(iszero, yi[:, :, :, 1:2]) && all(iszero, yi[:, :, 2, 3]) && !all(iszero, yi[:, :, 1, 3])
    @test pool.S[:, :, :, 2:5] == before.S[:, :, :, 2:5] && pool.S[:, :, :, 1] != before.S[:, :, :, 1]
end

module Bare
primitive type BFloat16 <: AbstractFloat 16 end
end

@testset "element types of states" begin
    q, k, v, log_g = inputs(Float32, 8, 2, 2, 20, 2)
    _, state = power_attention(q, k, v; return_final_state = true)
    half = State(PA.BFloat16, 8, 8, 2, 2, 2)
    PA.convert_states!(half, state)
    # The plan's states have the type of the arrays that are given, or the call is refused.
    y = power_attention(q, k, v; initial_state = state)
    y2, last = power_attention(q, k, v; initial_state = half, return_final_state = true)
    @test eltype(last) === PA.BFloat16 && difference(y2, y) < 2e-2
    @test eltype(power_attention(q, k, v; return_final_state = true, state_type = PA.BFloat16)[2]) === PA.BFloat16
    summary, _ = PA.summary(k, v; state_type = PA.BFloat16)
    @test eltype(summary) === PA.BFloat16 && difference(summary.S, state.S) < 1e-2
    @test_throws ArgumentError power_attention!(similar(q), q, k, v; initial_state = half, final_state = copy(state))
    @test_throws PowerAttentionError power_attention(q, k, v; initial_state = State(Float64, 8, 8, 2, 2, 2))
    _, _, back = power_attention_pullback(q, k, v; initial_state = state, return_final_state = true)
    @test_throws ArgumentError back(ones(Float32, size(y)); d_final_state = half)
    @test_throws ArgumentError State(Int32, 8, 8, 2, 2, 2) |> PA.pack
    # A primitive type of that name without arithmetic, as Core.BFloat16 is.
    @test eltype(State(Bare.BFloat16, 8, 8, 2, 2, 2)) === Bare.BFloat16
    bare = PA.convert_states!(State(Bare.BFloat16, 8, 8, 2, 2, 2), half)
    @test reinterpret(UInt16, vec(bare.S)) == reinterpret(UInt16, vec(half.S))
    # bfloat16 as plain 16-bit numbers.
    bits_of(x) = reinterpret(PA.BFloat16, reinterpret(UInt16, PA.BFloat16.(x)))
    @test power_attention(bits_of(q), bits_of(k), bits_of(v)) ==
          power_attention(PA.BFloat16.(q), PA.BFloat16.(k), PA.BFloat16.(v))
end

@testset "a state in place" begin
    q, k, v, log_g = inputs(Float32, 8, 2, 2, 20, 2)
    carried, expected = State(Float32, 8, 8, 2, 2, 2), State(Float32, 8, 8, 2, 2, 2)
    for _ in 1:3
        y = power_attention!(similar(q), q, k, v; log_g = log_g, initial_state = carried, final_state = carried)
        y2, expected = power_attention(q, k, v; log_g = log_g, initial_state = expected, return_final_state = true)
        @test y == y2 && carried.S == expected.S && carried.z == expected.z
    end
end

@testset "segments" begin
    q, k, v, log_g = inputs(Float64, 6, 2, 2, 24, 2)
    y, last = power_attention(q, k, v; log_g = log_g, return_final_state = true)
    parts = [
        PA.summary(k[:, :, r, :], v[:, :, r, :]; log_g = log_g[:, r, :]) for r in (1:5, 6:17, 18:24)
    ]
    S = cat((p[1].S for p in parts)...; dims = 5)
    z = cat((p[1].z for p in parts)...; dims = 4)
    L = cat((p[2] for p in parts)...; dims = 3)
    total, gate = PA.compose(S, z, L; degree = 2, head_dim = 6)
    @test difference(total.S, last.S) < 1e-12 && difference(total.z, last.z) < 1e-12
    @test isapprox(gate, dropdims(sum(log_g; dims = 2); dims = 2); rtol = 1e-12)
    # The reverse summary is the gradient of the initial state.
    state = State(Float64, 6, 6, 2, 2, 2)
    row_norm = zeros(2, 24, 2)
    y2 = similar(y)
    power_attention!(y2, q, k, v; log_g = log_g, initial_state = state, row_norm = row_norm)
    dy = randn(MersenneTwister(2), size(y)...)
    d, _ = PA.summary_reverse(q, y2, row_norm, dy; heads_kv = 2, log_g = log_g)
    _, _, back = power_attention_pullback(q, k, v; log_g = log_g, initial_state = state)
    g = back(dy)
    @test difference(d.S, g.initial_state.S) < 1e-10 && difference(d.z, g.initial_state.z) < 1e-10
end

@testset "convert and pack" begin
    q, k, v, log_g = inputs(Float32, 8, 2, 2, 20, 2)
    _, state = power_attention(q, k, v; log_g = log_g, return_final_state = true)
    pool = State(PA.BFloat16, 8, 8, 2, 2, 4)
    PA.convert_states!(pool, state; dst_slots = [4, 1])
    @test difference(pool.S[:, :, :, [4, 1]], state.S) < 1e-2 && all(x -> x.bits == 0, pool.S[:, :, :, 2:3])
    again = State(Float32, 8, 8, 2, 2, 2)
    PA.unpack!(again, PA.pack(state))
    @test again.S == state.S && again.z == state.z
    mktempdir() do dir
        path = PA.save(joinpath(dir, "state.bin"), state)
        fill!(again.S, 0)
        PA.load!(again, path)
        @test again.S == state.S
        @test readdir(dir) == ["state.bin"]
    end
    block = PA.pack(state)
    for change in (1, 9)  # magic, version
        broken = copy(block)
        broken[change] = broken[change] ⊻ 0x40
        keep = copy(again)
        @test_throws PowerAttentionError PA.unpack!(again, broken)
        @test again.S == keep.S
    end
    @test_throws PowerAttentionError PA.unpack!(again, block[1:40])
    @test_throws PowerAttentionError PA.unpack!(State(Float32, 8, 8, 2, 1, 2), block)
end
