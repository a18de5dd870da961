# SPDX-License-Identifier: Apache-2.0
# Sizes of the mirrors against the C compiler's: the library refuses a wrong struct_size, so each size is
# checked by the library itself, and the whole list against the header where a C compiler is at hand.

const MIRRORS = (
    ("powerattn_desc", PA.Desc),
    ("powerattn_plan_info", PA.PlanInfo),
    ("powerattn_tensor", PA.CTensor),
    ("powerattn_state", PA.CState),
    ("powerattn_forward_args", PA.ForwardArgs),
    ("powerattn_backward_args", PA.BackwardArgs),
    ("powerattn_step_args", PA.StepArgs),
    ("powerattn_summary_args", PA.SummaryArgs),
    ("powerattn_summary_reverse_args", PA.SummaryReverseArgs),
    ("powerattn_compose_args", PA.ComposeArgs),
    ("powerattn_convert_args", PA.ConvertArgs),
    ("powerattn_pack_args", PA.PackArgs),
)

@testset "structs" begin
    for (_, T) in MIRRORS
        @test isbitstype(T)
    end
    header = joinpath(@__DIR__, "..", "..", "..", "include")
    compiler = Sys.which("cc")
    if compiler === nothing || !isfile(joinpath(header, "power_attention.h"))
        @info "no C compiler or header here: struct offsets are not compared"
    else
        mktempdir() do dir
            source = joinpath(dir, "sizes.c")
            open(source, "w") do io
                println(io, "#include <power_attention.h>\n#include <stdio.h>\nint main(void) {")
                for (name, T) in MIRRORS
                    println(io, "printf(\"%zu\\n\", sizeof($name));")
                    for field in fieldnames(T)
                        println(io, "printf(\"%zu\\n\", offsetof($name, $field));")
                    end
                end
                println(io, "return 0; }")
            end
            program = joinpath(dir, "sizes")
            run(`$compiler -I$header $source -o $program`)
            numbers = parse.(Int, split(read(`$program`, String)))
            expected = Int[]
            for (_, T) in MIRRORS
                push!(expected, sizeof(T))
                append!(expected, [Int(fieldoffset(T, i)) for i in 1:fieldcount(T)])
            end
            @test numbers == expected
        end
    end
    @test PA.library_version() >= v"0.1.0"
    @test PA.device_count(:cpu) == 1
    @test PA.device_count(:cuda) >= 0
end
