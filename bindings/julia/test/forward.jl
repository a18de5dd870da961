# SPDX-License-Identifier: Apache-2.0

@testset "forward $T" for T in (Float32, Float64, Float16, PA.BFloat16)
    for (d, hq, hkv, t, b, e, degree) in
        ((8, 2, 2, 1, 1, 8, 2), (16, 4, 2, 37, 2, 8, 2), (5, 3, 1, 65, 1, 7, 4), (64, 2, 1, 130, 1, 64, 2))
        q, k, v, log_g = inputs(T, d, hq, hkv, t, b; e = e)
        for form in (:attention, :chunked)
            y = power_attention(q, k, v; log_g = log_g, degree = degree, form = form)
            @test eltype(y) === T && size(y) == (e, hq, t, b)
            @test difference(y, oracle(q, k, v; log_g = log_g, degree = degree)) < tolerance(T)
        end
    end
end

@testset "options" begin
    q, k, v, log_g = inputs(Float64, 8, 2, 2, 19, 2)
    @test difference(power_attention(q, k, v), oracle(q, k, v)) < 1e-12
    @test difference(
        power_attention(q, k, v; degree = 3, normalize = false, scale = 0.3),
        oracle(q, k, v; degree = 3, normalize = false, scale = 0.3),
    ) < 1e-12
    @test all(iszero, power_attention(q, k, v; scale = 0))
    @test difference(power_attention(q, k, v; eps = 0.5), oracle(q, k, v; eps = 0.5)) < 1e-12
    # A rotation of every token by one more position changes nothing: only differences of positions count.
    y = power_attention(q, k, v; rope = Rope())
    @test difference(power_attention(q, k, v; rope = Rope(), rope_offset = [5, 5]), y) < 1e-10
    @test difference(y, power_attention(q, k, v)) > 1e-3
    @test difference(power_attention(q, k, v; rope = Rope(style = :interleaved, dim = 4)), y) > 1e-3
end

@testset "layouts" begin
    q, k, v, log_g = inputs(Float32, 8, 4, 2, 21, 2)
    y = power_attention(q, k, v; log_g = log_g)
    swap(x) = permutedims(x, (1, 3, 2, 4))
    y2 = power_attention(swap(q), swap(k), swap(v); log_g = permutedims(log_g, (2, 1, 3)), layout = :dthb)
    @test swap(y2) == y
    lazy(x) = PermutedDimsArray(swap(x), (1, 3, 2, 4))
    @test power_attention(lazy(q), lazy(k), lazy(v); log_g = log_g) == y
    packed = cat(q, k, v; dims = 2)
    views = (view(packed, :, 1:4, :, :), view(packed, :, 5:6, :, :), view(packed, :, 7:8, :, :))
    @test power_attention(views...; log_g = log_g) == y
    into = fill(NaN32, 8, 8, 21, 2)
    power_attention!(view(into, :, 3:6, :, :), q, k, v; log_g = log_g)
    @test into[:, 3:6, :, :] == y && all(isnan, into[:, [1, 2, 7, 8], :, :])
end

@testset "packed sequences" begin
    q, k, v, log_g = inputs(Float64, 6, 2, 1, 30, 1)
    y = power_attention(q, k, v; log_g = log_g, cu_seqlens = [0, 7, 7, 25])
    for r in (1:7, 8:25)
        part = power_attention(q[:, :, r, :], k[:, :, r, :], v[:, :, r, :]; log_g = log_g[:, r, :])
        @test difference(y[:, :, r, :], part) < 1e-12
    end
    @test all(iszero, y[:, :, 26:30, :])
    @test size(power_attention(q[:, :, 1:0, :], k[:, :, 1:0, :], v[:, :, 1:0, :])) == (6, 2, 0, 1)
end
