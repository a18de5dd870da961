# SPDX-License-Identifier: Apache-2.0

@testset "garbage collection" begin
    expected = nothing
    for i in 1:30
        # Nothing but the call holds these arrays; a collection runs between and in other tasks.
        task = @async GC.gc(false)
        y = let (q, k, v, log_g) = inputs(Float32, 8, 2, 1, 50, 1)
            power_attention(q, k, v; log_g = log_g, chunk_size = 16 + i)
        end
        wait(task)
        i % 10 == 0 && GC.gc()
        expected === nothing && (expected = y)
        @test difference(y, expected) < 1e-5
    end
    plans = [Plan(Float32; batch = 1, seq_len = n, heads_q = 1, head_dim = 4) for n in 1:50]
    @test all(p -> p.handle != C_NULL, plans)
    @test occursin("2", describe(plans[1]))
    plans = nothing
    GC.gc()
end

@testset "threads" begin
    q, k, v, log_g = inputs(Float32, 16, 4, 2, 200, 2)
    y = power_attention(q, k, v; log_g = log_g)
    same = zeros(Bool, 24)
    Threads.@threads for i in 1:24
        same[i] = power_attention(q, k, v; log_g = log_g) == y
    end
    @test all(same)
    @test power_attention(q, k, v; log_g = log_g, num_threads = 1) == y
    # Each thread reads the message of its own call.
    own = zeros(Bool, 200)
    Threads.@threads for i in 1:200
        own[i] = try
            Plan(Float32; batch = 1, seq_len = 1, heads_q = 1, head_dim = 1000 + i)
            false
        catch e
            e isa PowerAttentionError && occursin(string(1000 + i), e.message)
        end
    end
    @test all(own)
end
