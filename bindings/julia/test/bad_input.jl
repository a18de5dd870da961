# SPDX-License-Identifier: Apache-2.0

status_of(f) =
    try
        f()
        PA.OK
    catch e
        e isa PowerAttentionError || rethrow()
        @test !isempty(e.message)
        e.status
    end

@testset "bad input" begin
    q, k, v, log_g = inputs(Float32, 8, 2, 2, 10, 2)
    # What the library refuses arrives with its own message.
    message = try
        power_attention(q, k, v; degree = 3)
        ""
    catch e
        sprint(showerror, e)
    end
    @test occursin("degree", message)
    @test status_of(() -> power_attention(q, k, v; degree = 3)) == PA.ERROR_INVALID_ARGUMENT
    @test status_of(() -> power_attention(q, k, v; degree = 0)) == PA.ERROR_INVALID_ARGUMENT
    @test status_of(() -> power_attention(q, k, v; degree = 9)) == PA.ERROR_INVALID_ARGUMENT
    @test status_of(() -> power_attention(q, k, v; eps = -1)) == PA.ERROR_INVALID_ARGUMENT
    @test status_of(() -> power_attention(q, k, v; chunk_size = -1)) == PA.ERROR_INVALID_ARGUMENT
    @test status_of(() -> power_attention(q, k, v; num_threads = -1)) == PA.ERROR_INVALID_ARGUMENT
    @test status_of(() -> power_attention(q, k, v; rope = Rope(dim = 3))) == PA.ERROR_INVALID_ARGUMENT
    one(x) = x[:, :, :, 1:1]
    @test status_of(() -> power_attention(one(q), one(k), one(v); cu_seqlens = [0, 6, 4])) ==
          PA.ERROR_INVALID_ARGUMENT
    @test status_of(() -> power_attention(one(q), one(k), one(v); cu_seqlens = [0, 11])) == PA.ERROR_INVALID_ARGUMENT
    @test status_of(() -> power_attention(q, k, v; cu_seqlens = [0, 5])) == PA.ERROR_INVALID_ARGUMENT
    @test status_of(() -> Plan(
        Float32;
        batch = 1,
        seq_len = 1024,
        heads_q = 1,
        head_dim = 64,
        degree = 6,
        form = :chunked,
    )) == PA.ERROR_STATE_TOO_LARGE
    @test status_of(() -> Plan(Float32; batch = typemax(Int64), seq_len = 4, heads_q = 4, head_dim = 4)) ==
          PA.ERROR_INVALID_ARGUMENT
    PA.device_count(:cuda) == 0 &&
        @test status_of(() -> Plan(Float32; batch = 1, seq_len = 1, heads_q = 1, head_dim = 4, device = :cuda)) in
              (PA.ERROR_NO_DEVICE, PA.ERROR_UNSUPPORTED)
    state = State(Float32, 8, 8, 2, 2, 2)
    @test status_of(() -> step!(state, q, k, v; slots = [1, 3])) == PA.ERROR_INVALID_ARGUMENT
    @test status_of(() -> step!(state, q, k, v; slots = [2, 2])) == PA.ERROR_INVALID_ARGUMENT
    @test status_of(() -> step!(state, q, k, v; lengths = [1, 11])) == PA.ERROR_INVALID_ARGUMENT
    @test all(iszero, state.S)
    # What only Julia can know.
    @test_throws ArgumentError power_attention(Int.(ones(8, 2, 10, 2)), k, v)
    @test_throws ArgumentError power_attention(Float64.(q), k, v)
    @test_throws DimensionMismatch power_attention(q, k[:, :, 1:9, :], v)
    @test_throws DimensionMismatch power_attention(q[:, :, :, 1], k, v)
    @test_throws DimensionMismatch power_attention(q, k, v; log_g = log_g[:, 1:9, :])
    @test_throws ArgumentError power_attention(q, k, v; log_g = Float64.(log_g))
    @test_throws ArgumentError power_attention(PermutedDimsArray(permutedims(q, (2, 1, 3, 4)), (2, 1, 3, 4)), k, v)
    @test_throws ArgumentError power_attention(q, k, v; layout = :bthd)
    @test_throws ArgumentError power_attention(q, k, v; form = :fast)
    @test_throws ArgumentError Rope(style = :spiral)
    @test_throws DimensionMismatch power_attention(q, k, v; initial_state = State(Float32, 8, 8, 2, 1, 2))
    @test_throws DimensionMismatch power_attention(q, k, v; initial_state = State(Float32, 8, 8, 4, 2, 2))
    @test_throws ArgumentError power_attention(q, k, v; degree = 1 << 40)
    @test_throws ArgumentError power_attention(q, k, v; num_threads = 1 << 40)
    @test_throws ArgumentError Plan(Float32; batch = big(2)^70, seq_len = 1, heads_q = 1, head_dim = 4)
    @test_throws ArgumentError Plan(Float32; batch = 1, seq_len = 1, heads_q = 1, head_dim = 4, state_limit = -1)
    @test_throws ArgumentError state_rows(64, 1 << 40)
    @test_throws ArgumentError power_attention(one(q), one(k), one(v); cu_seqlens = [0.0, 5.0])
    @test status_of(() -> state_monomial(3, 100, 1)) == PA.ERROR_INVALID_ARGUMENT
    @test status_of(() -> state_monomial(3, 2, 7)) == PA.ERROR_INVALID_ARGUMENT
    # An output that is also an input, and one whose columns overlap.
    @test status_of(() -> power_attention!(q, q, k, v)) == PA.ERROR_INVALID_ARGUMENT
    @test status_of(() -> power_attention!(Shared(zeros(Float32, 8, 2, 10), 2), q, k, v)) == PA.ERROR_INVALID_ARGUMENT
end
