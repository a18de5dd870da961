# SPDX-License-Identifier: Apache-2.0
# Where the library is looked for, and what happens when it is missing, broken or of another version. Each process
# finds its library once, so this runs in others.

# What `script` prints in a new process that has PowerAttention and the active project `project`.
function in_process(script, project, environment...)
    separator = Sys.iswindows() ? ";" : ":"
    command = `$(Base.julia_cmd()) --startup-file=no --project=$project -e $("using PowerAttention\n" * script)`
    path = join(("@", ROOT, "@stdlib"), separator)
    return withenv(() -> read(command, String), "JULIA_LOAD_PATH" => path, environment...)
end

@testset "library" begin
    @test_throws PowerAttentionError PA.check_version(10000, "elsewhere")
    @test PA.check_version(100, "here") === nothing
    real = PA.library().path
    mktempdir() do dir
        # All that goes wrong, in one process: the library that works comes last.
        garbage = joinpath(dir, "garbage.so")
        write(garbage, "not a library")
        paths = ["/nowhere/libpowerattn.so", garbage]
        compiler = Sys.which("cc")
        if compiler === nothing
            @info "no C compiler here: libraries of another version are not tried"
        else
            for (name, functions) in (
                ("other", "unsigned powerattn_version(void) { return 200; }"),
                ("newer", join(["unsigned $(f)(void) { return 200; }" for f in PA.SYMBOLS], "\n")),
            )
                source = joinpath(dir, "$(name).c")
                write(source, functions)
                library = joinpath(dir, "$(name).so")
                run(`$compiler -shared -fPIC $source -o $library`)
                push!(paths, library)
            end
        end
        push!(paths, real)
        script = """
        for path in ARGS_
            ENV["POWERATTN_LIBRARY"] = path
            try
                println(PowerAttention.library_version())
            catch e
                e isa PowerAttentionError || rethrow()
                println(e.status, " ", e.message)
            end
        end
        try
            PowerAttention.use_library!("another")
        catch e
            println(sprint(showerror, e))
        end
        """
        lines = split(in_process("const ARGS_ = $(repr(paths))\n" * script, dir), '\n'; keepempty = false)
        @test startswith(lines[1], "-1 ") && occursin("/nowhere/libpowerattn.so", lines[1])
        @test occursin("POWERATTN_LIBRARY", lines[1]) && occursin("LocalPreferences.toml", lines[1])
        @test startswith(lines[2], "-1 ") && occursin("garbage.so", lines[2])
        if compiler !== nothing
            @test startswith(lines[3], "$(PA.ERROR_VERSION) ") && occursin("has no powerattn_", lines[3])
            @test startswith(lines[4], "$(PA.ERROR_VERSION) ") && occursin("is version 0.2", lines[4])
        end
        @test lines[end-1] == string(PA.library_version())
        @test occursin("loaded already", lines[end])

        # The preference beside the active project, then the system's loader.
        where_from = "print(PowerAttention.library().path)"
        write(joinpath(dir, "Project.toml"), "")
        write(
            joinpath(dir, "LocalPreferences.toml"),
            "[Other]\nlibpowerattn_path = \"wrong\"\n\n[PowerAttention]\nlibpowerattn_path = \"$(escape_string(real))\" # here\n",
        )
        @test in_process(where_from, dir, "POWERATTN_LIBRARY" => nothing) == real
        rm(joinpath(dir, "LocalPreferences.toml"))
        if Sys.islinux()
            search = string(dirname(realpath(real)), ":", get(ENV, "LD_LIBRARY_PATH", ""))
            found = in_process(where_from, dir, "POWERATTN_LIBRARY" => nothing, "LD_LIBRARY_PATH" => search)
            @test found == "libpowerattn.so.0"
        end
    end
end
