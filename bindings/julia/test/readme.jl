# SPDX-License-Identifier: Apache-2.0
# Runs every Julia example of the README, and the generation example.

@testset "README" begin
    text = read(joinpath(@__DIR__, "..", "README.md"), String)
    blocks = [String(m.captures[1]) for m in eachmatch(r"```julia\n(.*?)```"s, text)]
    @test !isempty(blocks)
    for (i, block) in enumerate(blocks)
        scratch = Module(Symbol("Readme", i))
        include_string(scratch, block, "README.md block $(i)")
        @test true
    end
end

@testset "example" begin
    script = joinpath(@__DIR__, "..", "examples", "generate.jl")
    command = `$(Base.julia_cmd()) --startup-file=no --project=$(ROOT) $script --tokens 60`
    out = withenv(() -> read(command, String), "POWERATTN_LIBRARY" => PA.library().path)
    @test occursin("resumed", out) && occursin("68 of 68 bytes recited", out)
end
