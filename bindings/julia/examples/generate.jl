# SPDX-License-Identifier: Apache-2.0
# Text from a saved state: one power attention state memorises a paragraph (a context of eight bytes is a key, the
# byte that follows its value) and recites it; half-way the state is saved, loaded again, and the text goes on.
# usage: julia --project=.. examples/generate.jl [--tokens N] [FILE]
using PowerAttention
using CRC32c
using Random

const PA = PowerAttention

function main(args)
    tokens = 200
    file = @__FILE__
    i = 1
    while i <= length(args)
        if args[i] == "--tokens"
            tokens = parse(Int, args[i+1])
            i += 1
        else
            file = args[i]
        end
        i += 1
    end
    text = read(file)
    text = text[1:min(end, 400)]

    # A random vector for the last bytes, the same each time: keys of different contexts are nearly orthogonal,
    # and the square of a small inner product is smaller still, so the state recalls each of them.
    d, context = 128, 8
    key(history) = randn(MersenneTwister(crc32c(collect(history[end-context+1:end]))), Float32, d)
    n = length(text) - context
    n > 0 || error("the text is too short")
    tokens = min(tokens, n)
    keys = reshape(reduce(hcat, [key(view(text, i:i+context-1)) for i in 1:n]), d, 1, n, 1)
    values = zeros(Float32, 256, 1, n, 1)
    for i in 1:n
        values[Int(text[i+context])+1, 1, i, 1] = 1
    end
    state, _ = PA.summary(keys, values; degree = 2)
    println("state: ", size(state.S, 2), " x ", size(state.S, 1), " for ", n, " contexts")

    # Reading is a step that does not write: a copy is queried.
    function next(history)
        probe = copy(state)
        zero_key = zeros(Float32, d, 1, 1, 1)
        y = step!(probe, reshape(key(history), d, 1, 1, 1), zero_key, zeros(Float32, 256, 1, 1, 1))
        return UInt8(argmax(vec(y)) - 1)
    end

    history = copy(text[1:context])
    first_half = div(tokens, 2)
    for _ in 1:first_half
        push!(history, next(history))
    end
    path = PA.save(joinpath(mktempdir(), "state.bin"), state)
    resumed = State(Float32, d, 256, 2, 1, 1)
    PA.load!(resumed, path)
    resumed.S == state.S || error("the saved state differs")
    state = resumed
    seconds = @elapsed for _ in first_half+1:tokens
        push!(history, next(history))
    end
    println("resumed from ", filesize(path), " bytes, ", round(1e6 * seconds / (tokens - first_half); digits = 1), " us per byte")
    println(String(map(b -> 0x20 <= b < 0x7f || b == 0x0a ? b : UInt8('?'), history)))
    right = count(history .== text[1:length(history)])
    println(right, " of ", length(history), " bytes recited")
    return nothing
end

main(ARGS)
