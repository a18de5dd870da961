# SPDX-License-Identifier: Apache-2.0
# Runs with `Pkg.test()` and, with no Pkg operation at all, with `julia --project=. test/runtests.jl`.
using Libdl
using PowerAttention
using Random
using Test

const PA = PowerAttention
const ROOT = dirname(@__DIR__)

include("oracle.jl")

@testset "PowerAttention" begin
    include("structs.jl")
    include("cases.jl")
    include("forward.jl")
    include("gradients.jl")
    include("states.jl")
    include("bad_input.jl")
    include("library.jl")
    include("threads.jl")
    include("interchange.jl")
    include("rules.jl")
    include("cuda.jl")
    include("quality.jl")
    include("readme.jl")
end
