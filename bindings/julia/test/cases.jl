# SPDX-License-Identifier: Apache-2.0
# Every case of the smoke tier (tests/cases/smoke.txt, grammar in tests/case.h) through the package and through the C
# functions, called here by hand: the results must be the same bits.

const CASE_WORDS = (
    "gated", "fading", "reset", "unnorm", "state", "bstate", "rope-half", "rope-inter", "offset", "bhtd", "wide",
    "bcast", "slots", "lengths", "attn", "chunked", "tf32",
)
const CASE_TYPES = Dict("f32" => Float32, "f16" => Float16, "bf16" => PA.BFloat16, "f64" => Float64)

function parse_case(line)
    words = split(line)
    case = Dict{String,String}("op" => words[1], "dtype" => words[2])
    for word in words[3:end]
        m = match(r"^(seq|pad|scale|eps|rdim|rbase|threads|b|t|h|d|e|p|c)([0-9].*)$", word)
        if m === nothing
            word in CASE_WORDS || error("$(line): unknown word $(word)")
            case[word] = ""
        else
            case[m.captures[1]] = m.captures[2]
        end
    end
    return case
end

# An array in a layout, its storage, and its C form by hand.
struct Strided
    array::AbstractArray
    base::Array
    c::PA.CTensor
end

function strided(T, d, h, t, b, layout, draw)
    fill_in(dims...) = T[T(draw()) for _ in CartesianIndices(dims)]
    c(base, sb, st, sh) = PA.CTensor(Ptr{Cvoid}(pointer(base)), sb, st, sh)
    if layout == "bhtd"
        base = fill_in(d, t, h, b)
        return Strided(PermutedDimsArray(base, (1, 3, 2, 4)), base, c(base, d * t * h, d, d * t))
    elseif layout == "wide"
        base = fill_in(d + 3, h, t, b)
        return Strided(view(base, 1:d, :, :, :), base, c(base, (d + 3) * h * t, (d + 3) * h, d + 3))
    elseif layout == "bcast"
        base = fill_in(d, h, t)
        return Strided(Shared(base, b), base, c(base, 0, d * h, d))
    end
    base = fill_in(d, h, t, b)
    return Strided(base, base, c(base, d * h * t, d * h, d))
end

bits(x::AbstractArray) = collect(reinterpret(UInt8, vec(collect(x))))
bits(x::State) = vcat(bits(x.S), bits(x.z))
c_rows(x) = x === nothing ? PA.NO_TENSOR :
    PA.CTensor(Ptr{Cvoid}(pointer(x)), size(x, 1) * size(x, 2), size(x, 1), 1)
function c_pool(x)
    x === nothing && return PA.NO_STATE
    e, D, h, _ = size(x.S)
    return PA.CState(Ptr{Cvoid}(pointer(x.S)), Ptr{Cvoid}(pointer(x.z)), e * D * h, e * D, D * h, D)
end
c_indices(x) = x === nothing ? Ptr{Int64}(C_NULL) : pointer(x)

# Calls one C function on arguments made by hand; the workspace is memory of its own.
function raw_call(name, plan, make_args, workspace_bytes)
    memory = zeros(UInt8, Int(workspace_bytes) + 256)
    GC.@preserve memory begin
        aligned = Ptr{Cvoid}((UInt(pointer(memory)) + 255) & ~UInt(255))
        args = make_args(workspace_bytes == 0 ? C_NULL : aligned, UInt64(workspace_bytes))
        f = Libdl.dlsym(PA.library().handle, name)
        status = ccall(f, Int32, (Ptr{Cvoid}, Ptr{Cvoid}), plan, Ref(args))
        status == 0 || error("$(name): ", unsafe_string(ccall(PA.symbol(:powerattn_last_error), Ptr{UInt8}, ())))
    end
end

function run_case(line)
    case = parse_case(line)
    has(word) = haskey(case, word)
    number(word, default) = has(word) ? parse(Int, case[word]) : default
    T = CASE_TYPES[case["dtype"]]
    G = PA.stat_type(T)
    S = has("bstate") ? PA.BFloat16 : G
    heads = has("h") ? parse.(Int, split(case["h"], '/')) : [1]
    hq, hkv = heads[1], heads[end]
    d = number("d", 0)
    e, p = number("e", d), number("p", 2)
    lens = has("seq") ? cumsum([0; parse.(Int, split(case["seq"], ','))]) : nothing
    b = lens === nothing ? number("b", 1) : 1
    t = number("t", lens === nothing ? 0 : lens[end] + number("pad", 0))
    count = lens === nothing ? b : length(lens) - 1
    stateful = has("state") || !(case["op"] in ("fwd", "bwd"))
    scale = has("scale") ? parse(Float64, case["scale"]) : nothing
    eps = has("eps") ? parse(Float64, case["eps"]) : 0.0
    rope = has("rope-half") || has("rope-inter") ? Rope(
        style = has("rope-half") ? :half : :interleaved,
        dim = number("rdim", 0),
        base = has("rbase") ? parse(Float64, case["rbase"]) : 10000.0,
    ) : nothing
    form = has("attn") ? :attention : has("chunked") ? :chunked : :auto

    desc = PA.Desc(
        sizeof(PA.Desc), 0, 0, PA.dtype_of(T), PA.dtype_of(S), p,
        (has("unnorm") ? 1 : 0) + (scale === nothing ? 0 : 2) + (stateful ? 4 : 0) + (has("tf32") ? 8 : 0),
        form === :auto ? 0 : form === :attention ? 1 : 2, b, t, hq, hkv, d, e, lens === nothing ? 0 : count, 0,
        number("c", 0), scale === nothing ? 0.0 : scale, eps, rope === nothing ? 0.0 : rope.base,
        rope === nothing ? 0 : rope.dim, has("rope-half") ? 1 : has("rope-inter") ? 2 : 0, number("threads", 0), 0,
        (0, 0, 0, 0),
    )
    options = (
        degree = p, normalize = !has("unnorm"), scale = scale, eps = eps, rope = rope, form = form,
        chunk_size = number("c", 0), num_threads = number("threads", 0), allow_tf32 = has("tf32"),
    )
    raw = Ref{Ptr{Cvoid}}(C_NULL)
    @test ccall(PA.symbol(:powerattn_plan_create), Int32, (Ptr{PA.Desc}, Ptr{Ptr{Cvoid}}), Ref(desc), raw) == 0
    info = PA.Plan(desc).info

    rng = MersenneTwister(31 * t + d)
    layout = has("bhtd") ? "bhtd" : has("wide") ? "wide" : has("bcast") ? "bcast" : ""
    own = layout == "bcast" ? "" : layout
    normal() = randn(rng)
    nan() = NaN
    q = strided(T, d, hq, t, b, own, normal)
    k = strided(T, d, hkv, t, b, layout, normal)
    v = strided(T, e, hkv, t, b, layout, normal)
    gated = has("gated") || has("fading") || has("reset")
    gate(x) = has("reset") && x > 1.5 ? -Inf : -(has("fading") ? 2.0 : 0.02) * abs(x)
    log_g = gated ? G[gate(normal()) for _ in CartesianIndices((hkv, t, b))] : nothing
    offsets = has("offset") ? Int64[3 + 17n for n in 0:count-1] : nothing
    new_state(n) = State(
        S[S(0.1normal()) for _ in CartesianIndices((e, state_rows(d, p), hkv, n))],
        S[S(0.1abs(normal())) for _ in CartesianIndices((state_rows(d, p), hkv, n))],
        p,
        d,
    )
    output() = strided(T, e, hq, t, b, own, nan)
    rows(h) = fill(G(NaN), h, t, b)
    y, raw_y = output(), output()

    GC.@preserve q k v log_g offsets lens y raw_y begin
        if case["op"] == "step"
            pool = new_state(has("slots") ? 2b + 1 : b)
            raw_pool = copy(pool)
            slots = has("slots") ? Int64[n % 3 == 2 ? -1 : 2b - 2n for n in 0:b-1] : nothing
            lengths = has("lengths") ? Int64[n % (t + 1) for n in 0:b-1] : nothing
            step!(
                y.array, pool, q.array, k.array, v.array;
                log_g = log_g, slots = slots === nothing ? nothing : slots .+ 1, lengths = lengths,
                rope_offset = offsets, options...,
            )
            GC.@preserve raw_pool slots lengths raw_call(
                :powerattn_step,
                raw[],
                (w, n) -> PA.StepArgs(
                    sizeof(PA.StepArgs), 0, q.c, k.c, v.c, c_rows(log_g), raw_y.c, c_pool(raw_pool), size(pool.S, 4),
                    c_indices(slots), c_indices(lengths), c_indices(offsets), w, n, C_NULL,
                ),
                info.workspace_step,
            )
            @test bits(y.base) == bits(raw_y.base)
            @test bits(pool) == bits(raw_pool)
        elseif case["op"] == "sum"
            state, total = PA.summary(
                k.array, v.array; log_g = log_g, cu_seqlens = lens, rope_offset = offsets, state_type = S, options...,
            )
            raw_state, raw_total = new_state(count), fill(G(NaN), hkv, count)
            # The plan of summary has as many query heads as kv heads; the numbers do not depend on them.
            GC.@preserve raw_state raw_total raw_call(
                :powerattn_summary,
                raw[],
                (w, n) -> PA.SummaryArgs(
                    sizeof(PA.SummaryArgs), 0, k.c, v.c, c_rows(log_g), c_pool(raw_state), pointer(raw_total),
                    c_indices(lens), c_indices(offsets), w, n, C_NULL,
                ),
                info.workspace_summary,
            )
            @test bits(state) == bits(raw_state)
            @test bits(total) == bits(raw_total)
        else
            state = has("state") ? new_state(count) : nothing
            last, raw_last = has("state") ? (new_state(count), new_state(count)) : (nothing, nothing)
            norm, raw_norm = rows(hq), rows(hq)
            calls = (cu_seqlens = lens, rope_offset = offsets)
            gates = (log_g = log_g, initial_state = state)
            power_attention!(
                y.array, q.array, k.array, v.array; row_norm = norm, final_state = last, gates..., calls...,
                (stateful && !has("state") ? (state_type = S,) : NamedTuple())..., options...,
            )
            saved = zeros(UInt8, Int(info.saved_bytes) + 256)
            saved_at = info.saved_bytes == 0 ? C_NULL : Ptr{Cvoid}((UInt(pointer(saved)) + 255) & ~UInt(255))
            GC.@preserve state raw_last raw_norm saved begin
                raw_call(
                    :powerattn_forward,
                    raw[],
                    (w, n) -> PA.ForwardArgs(
                        sizeof(PA.ForwardArgs), 0, q.c, k.c, v.c, c_rows(log_g), raw_y.c, c_rows(raw_norm),
                        c_pool(state), c_pool(raw_last), c_indices(lens), c_indices(offsets), saved_at,
                        info.saved_bytes, w, n, C_NULL,
                    ),
                    info.workspace_forward,
                )
                @test bits(y.base) == bits(raw_y.base)
                @test bits(norm) == bits(raw_norm)
                has("state") && @test bits(last) == bits(raw_last)
                d_y = strided(T, e, hq, t, b, own, normal)
                if case["op"] == "rsum"
                    d_state, total = PA.summary_reverse(
                        q.array, has("unnorm") ? nothing : y.array, has("unnorm") ? nothing : norm, d_y.array;
                        heads_kv = hkv, log_g = log_g, calls..., options...,
                    )
                    raw_state, raw_total = new_state(count), fill(G(NaN), hkv, count)
                    GC.@preserve d_y raw_state raw_total raw_call(
                        :powerattn_summary_reverse,
                        raw[],
                        (w, n) -> PA.SummaryReverseArgs(
                            sizeof(PA.SummaryReverseArgs), 0, q.c, c_rows(log_g), has("unnorm") ? PA.NO_TENSOR : raw_y.c,
                            has("unnorm") ? PA.NO_TENSOR : c_rows(raw_norm), d_y.c, c_pool(raw_state),
                            pointer(raw_total), c_indices(lens), c_indices(offsets), w, n, C_NULL,
                        ),
                        info.workspace_summary,
                    )
                    @test bits(d_state) == bits(raw_state)
                    @test bits(total) == bits(raw_total)
                elseif case["op"] == "bwd"
                    # Gradients are new contiguous arrays in the package's pullback.
                    d_last = has("state") ? new_state(count) : nothing
                    y2, _, back = power_attention_pullback(
                        q.array, k.array, v.array; return_final_state = has("state"), gates..., calls..., options...,
                    )
                    @test bits(y2) == bits(y.array)
                    g = back(d_y.array; d_final_state = d_last)
                    dq, dk, dv = (strided(T, n, h, t, b, "", nan) for (n, h) in ((d, hq), (d, hkv), (e, hkv)))
                    dg = gated ? rows(hkv) : nothing
                    d_first = has("state") ? new_state(count) : nothing
                    bytes = info.saved_bytes == 0 ? info.workspace_backward : info.workspace_backward_saved
                    GC.@preserve d_y d_last dq dk dv dg d_first raw_call(
                        :powerattn_backward,
                        raw[],
                        (w, n) -> PA.BackwardArgs(
                            sizeof(PA.BackwardArgs), 0, q.c, k.c, v.c, c_rows(log_g), raw_y.c, c_rows(raw_norm), d_y.c,
                            dq.c, dk.c, dv.c, c_rows(dg), c_pool(state), c_pool(d_last), c_pool(d_first),
                            c_indices(lens), c_indices(offsets), saved_at, info.saved_bytes, w, n, C_NULL,
                        ),
                        bytes,
                    )
                    @test bits(g.q) == bits(dq.base) && bits(g.k) == bits(dk.base) && bits(g.v) == bits(dv.base)
                    gated && @test bits(g.log_g) == bits(dg)
                    has("state") && @test bits(g.initial_state) == bits(d_first)
                end
            end
        end
    end
    ccall(PA.symbol(:powerattn_plan_destroy), Cvoid, (Ptr{Cvoid},), raw[])
    return nothing
end

@testset "smoke tier, bit for bit the C results" begin
    file = joinpath(ROOT, "..", "..", "tests", "cases", "smoke.txt")
    if isfile(file)
        lines = filter(!isempty, [strip(first(split(line, '#'))) for line in eachline(file)])
        @test length(lines) > 20
        foreach(run_case, lines)
    else
        @info "the repository's case files are not here: the smoke tier is not run"
    end
end
