# SPDX-License-Identifier: Apache-2.0
# What Aqua.jl checks, with the standard library alone: ambiguities, unbound type parameters, undefined exports, missing
# docstrings, and a Project.toml whose names agree. JET.jl needs a newer Julia than the oldest one tested.

@testset "quality" begin
    @test isempty(detect_ambiguities(PA))
    @test isempty(detect_unbound_args(PA))
    exported = filter(name -> name !== :PowerAttention, names(PA))
    documented = keys(Base.Docs.meta(PA))
    for name in exported
        @test isdefined(PA, name)
        @test any(binding -> binding.var === name, documented)
    end
    # docs/src/api.md lists every documented name, so that the manual is whole.
    page = read(joinpath(ROOT, "docs", "src", "api.md"), String)
    listed = Set(Symbol(m.captures[1]) for m in eachmatch(r"^(?:PowerAttention\.)?([A-Za-z]\w*!?)$"m, page))
    for binding in documented
        binding.var === :PowerAttention || @test binding.var in listed
    end
    project = read(joinpath(ROOT, "Project.toml"), String)
    section(name) = begin
        m = match(Regex("^\\[$(name)\\]\\n(.*?)(?=^\\[|\\z)", "ms"), project)
        Dict(Pair(strip.(split(line, '='; limit = 2))...) for line in split(m.captures[1], '\n') if occursin('=', line))
    end
    weak, extras, compat = section("weakdeps"), section("extras"), section("compat")
    @test all(get(extras, name, "") == uuid for (name, uuid) in weak)  # Pkg before 1.9 reads extras only
    @test all(haskey(compat, name) for name in [collect(keys(weak)); collect(keys(section("deps"))); "julia"])
    @test Set(string(e, ".jl") for e in keys(section("extensions"))) == Set(readdir(joinpath(ROOT, "ext")))
end

@testset "manual" begin
    # The Julia blocks of docs/src run, one module per page.
    for page in readdir(joinpath(ROOT, "docs", "src"))
        scratch = Module(Symbol(page))
        for m in eachmatch(r"```@example[^\n]*\n(.*?)```"s, read(joinpath(ROOT, "docs", "src", page), String))
            include_string(scratch, String(m.captures[1]), page)
        end
        @test true
    end
end
