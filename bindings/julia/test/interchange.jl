# SPDX-License-Identifier: Apache-2.0
# A state made by a C program continues here, and back.

const MAKER = raw"""
#include <power_attention.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
/* maker make FILE: packs the state of 3 tokens. maker check FILE: prints the first elements of S and z. */
int main(int argc, char **argv) {
  powerattn_desc desc;
  powerattn_plan *plan = NULL;
  memset(&desc, 0, sizeof desc);
  desc.struct_size = sizeof desc; desc.dtype = POWERATTN_FLOAT32; desc.degree = 2; desc.flags = POWERATTN_USE_STATE;
  desc.batch = 1; desc.seq_len = 3; desc.heads_q = desc.heads_kv = 1; desc.head_dim = 2;
  if (powerattn_plan_create(&desc, &plan)) { fprintf(stderr, "%s\n", powerattn_last_error()); return 1; }
  powerattn_plan_info info;
  memset(&info, 0, sizeof info); info.struct_size = sizeof info;
  powerattn_plan_query(plan, &info);
  float k[6] = {1, 2, 3, 4, 5, 6}, v[6] = {1, 0, 0, 1, 1, 1}, S[6] = {0}, z[3] = {0};
  powerattn_state state = {S, z, 6, 6, 3, 3};
  powerattn_pack_args pack;
  memset(&pack, 0, sizeof pack);
  uint64_t bytes = 0;
  powerattn_state_pack_size(plan, 0, 1, &bytes);
  void *block = malloc(bytes);
  pack.struct_size = sizeof pack; pack.state = state; pack.count = 1; pack.packed = block; pack.packed_bytes = bytes;
  if (argc > 2 && !strcmp(argv[1], "make")) {
    powerattn_summary_args args;
    memset(&args, 0, sizeof args);
    args.struct_size = sizeof args;
    args.k.data = k; args.k.stride_b = 6; args.k.stride_t = 2; args.k.stride_h = 2;
    args.v = args.k; args.v.data = v;
    args.state = state;
    args.workspace_bytes = info.workspace_summary;
    args.workspace = aligned_alloc(256, (info.workspace_summary + 511) / 256 * 256);
    if (powerattn_summary(plan, &args) || powerattn_state_pack(plan, &pack)) {
      fprintf(stderr, "%s\n", powerattn_last_error()); return 1;
    }
    FILE *f = fopen(argv[2], "wb"); fwrite(block, 1, bytes, f); fclose(f);
  } else {
    FILE *f = fopen(argv[2], "rb"); size_t got = fread(block, 1, bytes, f); fclose(f);
    pack.packed_bytes = got;
    if (powerattn_state_unpack(plan, &pack)) { fprintf(stderr, "%s\n", powerattn_last_error()); return 1; }
    for (int i = 0; i < 6; i++) printf("%.9g ", S[i]);
    for (int i = 0; i < 3; i++) printf("%.9g ", z[i]);
  }
  return 0;
}
"""

@testset "states between C and Julia" begin
    compiler = Sys.which("cc")
    include_dir = joinpath(@__DIR__, "..", "..", "..", "include")
    if compiler === nothing || !isdir(include_dir)
        @info "no C compiler or header here: the exchange of states with a C program is not tested"
    else
        mktempdir() do dir
            library = PA.library().path
            write(joinpath(dir, "maker.c"), MAKER)
            maker = joinpath(dir, "maker")
            run(`$compiler -std=c11 -I$include_dir $(joinpath(dir, "maker.c")) $library -Wl,-rpath,$(dirname(library)) -o $maker`)
            file = joinpath(dir, "state.bin")
            run(`$maker make $file`)
            state = PA.load!(State(Float32, 2, 2, 2, 1, 1), file)
            k = reshape(Float32[1, 2, 3, 4, 5, 6], 2, 1, 3, 1)
            v = reshape(Float32[1, 0, 0, 1, 1, 1], 2, 1, 3, 1)
            here, _ = PA.summary(k, v)
            @test state.S == here.S && state.z == here.z
            # One more token here, then read back in C.
            one = ones(Float32, 2, 1, 1, 1)
            step!(state, one, one, one)
            PA.save(file, state)
            numbers = parse.(Float32, split(read(`$maker check $file`, String)))
            @test numbers == vcat(vec(state.S), vec(state.z))
        end
    end
end
