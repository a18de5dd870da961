# SPDX-License-Identifier: Apache-2.0
# Every call with arrays of a CUDA device and with those of the host: the same results. Needs the library with the emulated
# device of tests/emulation, which scripts/julia.sh builds: POWERATTN_LIBRARY=... julia --project=. test/device.jl
using Libdl
using PowerAttention
using Random
using Test

const PA = PowerAttention

PA.device_count(:cuda)  # loads the library, and with it the emulated device
include("oracle.jl")
include("cuda_standin.jl")

host(x::Array) = x
host(x::CUDA.CuArray) = Array(x)
host(x::State) = State(host(x.S), host(x.z), x.degree, x.head_dim)
there(x::Array) = CUDA.CuArray(x)
there(x::State) = State(there(x.S), there(x.z), x.degree, x.head_dim)

# What comes out of every call, on the host's arrays or, through `to`, on the device's.
function results(to)
    q, k, v, log_g = map(to, inputs(Float32, 16, 4, 2, 40, 2))
    options = (rope = Rope(), rope_offset = [3, 5])
    y, state = power_attention(q, k, v; log_g = log_g, return_final_state = true, options...)
    y2, state2, back = power_attention_pullback(
        q, k, v; log_g = log_g, initial_state = state, return_final_state = true, options...,
    )
    g = back(to(ones(Float32, size(y))); d_final_state = state2)
    parts, totals = PA.summary(k, v; log_g = log_g)
    S, z = to(reshape(host(parts.S), size(parts.S)..., 1)), to(reshape(host(parts.z), size(parts.z)..., 1))
    folded, total = PA.compose(S, z, to(reshape(host(totals), size(totals)..., 1)); degree = 2, head_dim = 16)
    block = PA.pack(state)
    again = PA.unpack!(to(State(Float32, 16, 16, 2, 2, 2)), block)
    pool = to(State(Float32, 16, 16, 2, 2, 3))
    PA.convert_states!(pool, again; src_slots = [1, 2], dst_slots = [3, 1])
    one = to(ones(Float32, 16, 4, 1, 2)), to(ones(Float32, 16, 2, 1, 2))
    y3 = step!(pool, one[1], one[2], one[2]; slots = [3, 1], lengths = [1, 0])
    heads = view(q, :, 1:2, :, :)
    y4 = power_attention(heads, k, v)
    x, w = to(ones(Float32, 16, 2, 30, 1)), to(randn(MersenneTwister(2), Float32, 16, 2, 30, 1))
    y5 = power_attention(x, x, w; cu_seqlens = [0, 7, 7, 29])
    return map(host, (
        y, state.S, state.z, y2, state2.S, g.q, g.k, g.v, g.log_g, g.initial_state.S, g.initial_state.z, parts.S, parts.z,
        totals, folded.S, folded.z, total, again.S, pool.S, pool.z, y3, y4, y5,
    ))
end

@testset "device" begin
    @test PA.device_count(:cuda) == 1
    @test CUDA.emulated()
    for (i, (a, b)) in enumerate(zip(results(identity), results(there)))
        error = difference(b, a)
        error < 1e-4 || @info "result $(i) differs by $(error)"
        @test error < 1e-4
    end
    # Arrays of the host beside those of the device, and a pool of states there.
    q = randn(Float32, 16, 2, 5, 1)
    @test_throws ArgumentError power_attention(there(q), there(q), q)
    @test_throws ArgumentError power_attention!(similar(q), there(q), there(q), there(q))
    @test_throws ArgumentError power_attention(there(q), there(q), there(q); initial_state = State(Float32, 16, 16, 2, 2, 1))
    @test_throws ArgumentError step!(there(State(Float32, 16, 16, 2, 2, 1)), q, q, q)
end
