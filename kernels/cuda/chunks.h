// SPDX-License-Identifier: Apache-2.0
// Tables of sequences, chunks and row tiles, made on the device from uniform lengths or cu_seqlens, and the
// cumulative log gates inside a chunk. The host knows upper bounds only, so grids are fixed and every launch
// can be captured in a graph.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

#include "problem.h"

namespace powerattn::cuda {

// One sequence = one state. `start` is its first token in its batch entry (packed: in the packed tokens).
struct Sequence {
  int64_t start;
  int64_t length;
  int32_t first_chunk;  // in the chunk table
  int32_t chunks;       // 0 for an empty sequence
};

struct Chunk {
  int64_t start;     // first token, counted as in Sequence
  int32_t length;    // tokens, 1 .. chunk; 0 = unused descriptor (only at the end of the table)
  int32_t sequence;  // index of the state
  int32_t index;     // in its sequence; 0 = first
  int32_t count;     // chunks of its sequence
};

// Up to `tile` rows of one chunk: the unit of work of a thread block that owns rows.
struct Tile {
  int64_t start;   // first token, counted as in Sequence
  int32_t length;  // rows, 1 .. tile; 0 = unused descriptor
  int32_t sequence;
  int32_t chunk;   // in the chunk table
  int32_t offset;  // start - the chunk's start
};

// Device pointers and the bounds of the grids. tiles is null when no tile table was asked for.
struct ChunkTable {
  const Sequence *sequences = nullptr;
  const Chunk *chunks = nullptr;
  const Tile *tiles = nullptr;
  int64_t num_sequences = 0;
  int64_t num_chunks = 0;  // upper bound; exact when not packed
  int64_t num_tiles = 0;   // upper bound; exact when not packed
  int64_t chunk = 0;       // tokens per chunk
  int64_t tile = 0;        // rows per tile; 0 = no table
};

// Upper bounds for `chunk` tokens per chunk and `tile` rows per tile (0 = none). Uniform: exact.
int64_t chunk_bound(const Problem &p, int64_t chunk);
int64_t tile_bound(const Problem &p, int64_t chunk, int64_t tile);

// Bytes of device memory (256-byte aligned) of the tables.
size_t chunk_table_bytes(const Problem &p, int64_t chunk, int64_t tile);

// Where the tables lie in `memory`, and their sizes; nothing is written.
ChunkTable place_chunks(const Problem &p, int64_t chunk, int64_t tile, void *memory);

// Fills `memory` and *table. Offsets that are not increasing or that pass seq_len are cut to what is legal,
// so a bad cu_seqlens cannot address memory outside the tensors.
cudaError_t build_chunks(const Problem &p, int64_t chunk, int64_t tile, const int64_t *cu_seqlens, void *memory,
                         ChunkTable *table, cudaStream_t stream);

// The entry of the batch stride that a sequence lives in.
#if defined(__CUDACC__)
__host__ __device__
#endif
    inline int64_t
    batch_of(bool packed, int32_t sequence) {
  return packed ? 0 : sequence;
}

// Tokens of a thread where a block adds gates up.
constexpr int kGatesPerThread = 4;

// A gate below this is a reset: exp(-110) is 0 in float32, and finite sums never give inf - inf.
constexpr float kResetLogGate = -110.0f;

// Inclusive cumulative sum of log_g inside each chunk, for kv heads, stored contiguously [b, heads_kv, t]:
//   g[b,h,t] = sum over t' in the chunk of t, t' <= t, of max(log_g[b,t',h], kResetLogGate)
// Sums run in double; `g` is rounded to float, `g64` is not (differences of far tokens in a long chunk).
// Either may be null; a null log_g gives zeros. Rows outside the sequences are not written.
cudaError_t chunk_gates(const Problem &p, const ChunkTable &table, const powerattn_tensor &log_g, float *g,
                        double *g64, cudaStream_t stream);

// total[sequence, heads_kv] = the plain sum of log_g over the sequence (-inf stays -inf); null log_g: zeros.
cudaError_t total_gates(const Problem &p, const ChunkTable &table, const powerattn_tensor &log_g, float *total,
                        cudaStream_t stream);

// Writes zeros to the rows of `out` [b, t, heads, dim] past the last sequence. Nothing to do when not packed.
cudaError_t zero_padding(const Problem &p, const ChunkTable &table, const powerattn_tensor &out, Dtype dtype,
                         int64_t heads, int64_t dim, cudaStream_t stream);

// Writes zeros to the whole strided [b, t, heads, dim].
cudaError_t zero_tensor(const Problem &p, const powerattn_tensor &out, Dtype dtype, int64_t heads, int64_t dim,
                        cudaStream_t stream);

}  // namespace powerattn::cuda
