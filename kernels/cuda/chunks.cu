// SPDX-License-Identifier: Apache-2.0
#include <algorithm>

#include "kernels/cuda/chunks.cuh"
#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/numeric.cuh"

namespace powerattn::cuda {
namespace {

constexpr int kThreads = 256;

// ---- Tables ----------------------------------------------------------------------------------------------

// Sequence n of a packed call covers [E(n), E(n+1)) with E(n) = max over m <= n of clamp(cu[m], 0, t):
// increasing and inside the tensors whatever cu_seqlens holds. first_chunk is the running sum of ceil(length /
// chunk). One block; each thread owns a run of sequences, so both scans are over per-thread totals.
__global__ void __launch_bounds__(1024)
    packed_sequences(Sequence *out, const int64_t *cu, int64_t n, int64_t tokens, int64_t chunk) {
  __shared__ int64_t totals[1024];
  __shared__ int64_t maxima[1024];
  const int tid = threadIdx.x;
  const int64_t per = (n + 1023) / 1024;
  const int64_t begin = min(tid * per, n), end = min(begin + per, n);
  auto offset = [&](int64_t m) { return min(max(cu[m], int64_t(0)), tokens); };

  int64_t highest = 0;
  for (int64_t m = begin; m < end; ++m) highest = max(highest, offset(m));
  maxima[tid] = highest;
  __syncthreads();
  int64_t before = 0;  // max over everything that earlier threads own
  for (int i = 0; i < tid; ++i) before = max(before, maxima[i]);

  int64_t total = 0, running = before;
  for (int64_t m = begin; m < end; ++m) {
    running = max(running, offset(m));
    const int64_t stop = max(running, offset(m + 1));
    total += (stop - running + chunk - 1) / chunk;
  }
  totals[tid] = total;
  __syncthreads();
  int64_t first = 0;
  for (int i = 0; i < tid; ++i) first += totals[i];

  running = before;
  for (int64_t m = begin; m < end; ++m) {
    running = max(running, offset(m));
    const int64_t stop = max(running, offset(m + 1));
    const int64_t chunks = (stop - running + chunk - 1) / chunk;
    out[m] = {running, stop - running, int32_t(first), int32_t(chunks)};
    first += chunks;
  }
}

// Sequences of one length: every table at once, since nothing depends on what a device array holds.
__global__ void __launch_bounds__(kThreads)
    uniform_tables(Sequence *sequences, Chunk *out_chunks, Tile *out_tiles, int64_t n, int64_t tokens,
                   int32_t chunks, int64_t chunk, int64_t tiles, int64_t tile) {
  fill_uniform_tables({sequences, out_chunks, out_tiles, n, tokens, chunks, chunk, tiles, tile},
                      blockIdx.x * int64_t(kThreads) + threadIdx.x);
}

// The last sequence whose first_chunk <= id: it is the one that owns chunk id, if any does, since empty
// sequences share the first_chunk of the next one.
__device__ int64_t owner_of(const Sequence *sequences, int64_t n, int64_t id) {
  int64_t low = 0, high = n;  // first with first_chunk > id
  while (low < high) {
    const int64_t mid = (low + high) / 2;
    if (sequences[mid].first_chunk <= id) {
      low = mid + 1;
    } else {
      high = mid;
    }
  }
  return low - 1;
}

__global__ void __launch_bounds__(kThreads)
    fill_chunks(Chunk *out, const Sequence *sequences, int64_t n, int64_t bound, int64_t chunk) {
  const int64_t id = blockIdx.x * int64_t(kThreads) + threadIdx.x;
  if (id >= bound) return;
  Chunk c{0, 0, 0, 0, 0};
  const int64_t m = owner_of(sequences, n, id);
  if (m >= 0) {
    const Sequence s = sequences[m];
    const int64_t index = id - s.first_chunk;
    if (index < s.chunks) {
      const int64_t left = s.length - index * chunk;
      c = {s.start + index * chunk, int32_t(min(left, chunk)), int32_t(m), int32_t(index), s.chunks};
    }
  }
  out[id] = c;
}

// Tiles of chunk i of its sequence follow each other; a sequence's tiles start at the slot
//   base(m) = first_chunk(m) * ceil(chunk / tile), the same arithmetic that bounds the table
// when every chunk gets ceil(chunk / tile) slots. Slots past a chunk's length stay empty.
__global__ void __launch_bounds__(kThreads)
    fill_tiles(Tile *out, const Chunk *chunks, int64_t bound, int64_t per_chunk, int64_t tile) {
  const int64_t id = blockIdx.x * int64_t(kThreads) + threadIdx.x;
  if (id >= bound) return;
  Tile t{0, 0, 0, 0, 0};
  const int64_t chunk = id / per_chunk, offset = id % per_chunk * tile;
  const Chunk c = chunks[chunk];
  if (offset < c.length) {
    t = {c.start + offset, int32_t(min(int64_t(c.length) - offset, tile)), c.sequence, int32_t(chunk),
         int32_t(offset)};
  }
  out[id] = t;
}

// The same when chunks are as long as sequences and sequences many: tiles are packed without gaps. Slot
// floor(start / tile) + sequence is free for a sequence's first tile, since floor(a) + ceil(b) <= floor(a + b)
// + 1.
__global__ void __launch_bounds__(kThreads) clear_tiles(Tile *out, int64_t bound) {
  const int64_t id = blockIdx.x * int64_t(kThreads) + threadIdx.x;
  if (id < bound) out[id] = Tile{0, 0, 0, 0, 0};
}
__global__ void __launch_bounds__(kThreads)
    scatter_tiles(Tile *out, const Sequence *sequences, int64_t n, int64_t chunk, int64_t tile) {
  for (int64_t m = blockIdx.x; m < n; m += gridDim.x) {
    const Sequence s = sequences[m];
    const int64_t base = s.start / tile + m, tiles = (s.length + tile - 1) / tile;
    for (int64_t i = threadIdx.x; i < tiles; i += kThreads) {
      const int64_t offset = i * tile;  // chunk % tile == 0: no tile crosses a chunk
      out[base + i] = {s.start + offset, int32_t(min(s.length - offset, tile)), int32_t(m),
                       int32_t(s.first_chunk + offset / chunk), int32_t(offset % chunk)};
    }
  }
}

// Slots per chunk of a table with gaps. Packed: sequences may be longer than max_seq_len says.
int64_t tiles_per_chunk(const Problem &p, int64_t chunk, int64_t tile) {
  return ceil_div(std::min(chunk, p.packed ? p.seq_len : p.max_seq_len), tile);
}

bool gap_free(const Problem &p, int64_t chunk, int64_t tile) { return p.packed && chunk % tile == 0; }

// ---- Gates -----------------------------------------------------------------------------------------------

template <int kBlock>
__global__ void __launch_bounds__(kBlock)
    gates_kernel(const Chunk *chunks, const float *log_g, powerattn_tensor shape, bool packed, int64_t heads,
                 int64_t seq_len, float *g, double *g64) {
  scan_gates<kBlock>(chunks[blockIdx.x / heads], log_g, shape, packed, blockIdx.x % heads, heads, seq_len, g,
                     g64);
}

__global__ void __launch_bounds__(kThreads)
    total_kernel(const Sequence *sequences, const float *log_g, powerattn_tensor shape, bool packed,
                 int64_t heads, float *total) {
  __shared__ double partial[kThreads];
  const int64_t head = blockIdx.x % heads, m = blockIdx.x / heads;
  double sum = 0;
  if (log_g) {
    const Sequence s = sequences[m];
    const float *in = log_g + (packed ? 0 : m * shape.stride_b) + head * shape.stride_h;
    for (int64_t t = threadIdx.x; t < s.length; t += kThreads) sum += in[(s.start + t) * shape.stride_t];
  }
  partial[threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.x == 0) {
    double all = 0;
    for (int i = 0; i < kThreads; ++i) all += partial[i];
    total[m * heads + head] = float(all);
  }
}

// ---- Zeros -----------------------------------------------------------------------------------------------

// Rows from `first` (packed: the end of the last sequence) to seq_len of every batch entry.
template <class T>
__global__ void __launch_bounds__(kThreads)
    zero_rows(const Sequence *last, T *out, powerattn_tensor shape, int64_t batch, int64_t seq_len,
              int64_t heads, int64_t dim) {
  const int64_t first = last ? last->start + last->length : 0;
  const int64_t rows = seq_len - first, total = batch * rows * heads * dim;
  for (int64_t i = blockIdx.x * int64_t(kThreads) + threadIdx.x; i < total;
       i += int64_t(gridDim.x) * kThreads) {
    const int64_t col = i % dim, h = i / dim % heads, r = i / dim / heads % rows, b = i / dim / heads / rows;
    out[b * shape.stride_b + (first + r) * shape.stride_t + h * shape.stride_h + col] = from_float<T>(0.0f);
  }
}

cudaError_t zero(const Problem &p, const Sequence *last, const powerattn_tensor &out, Dtype dtype,
                 int64_t heads, int64_t dim, cudaStream_t stream) {
  const int64_t total = p.batch * p.seq_len * heads * dim;
  if (total == 0) return cudaSuccess;
  const int blocks = int(std::min<int64_t>(ceil_div(total, kThreads * 8), 1056));
  return with_dtype(dtype, [&](auto t) {
    using T = decltype(t);
    return launch_kernel(zero_rows<T>, blocks, kThreads, 0, stream, last, static_cast<T *>(out.data), out,
                         p.batch, p.seq_len, heads, dim);
  });
}

}  // namespace

int64_t chunk_bound(const Problem &p, int64_t chunk) {
  if (p.sequences == 0 || p.seq_len == 0) return 0;
  if (!p.packed) return p.sequences * ceil_div(p.seq_len, chunk);
  // sum of ceil(length / chunk) <= sum of (length / chunk + 1), and no more than one per token
  return std::min(p.seq_len / chunk + p.sequences, p.seq_len);
}

int64_t tile_bound(const Problem &p, int64_t chunk, int64_t tile) {
  if (tile == 0) return 0;
  if (gap_free(p, chunk, tile)) return p.seq_len == 0 ? 0 : p.seq_len / tile + p.sequences;
  return chunk_bound(p, chunk) * tiles_per_chunk(p, chunk, tile);
}

size_t chunk_table_bytes(const Problem &p, int64_t chunk, int64_t tile) {
  return align256(size_t(p.sequences) * sizeof(Sequence)) +
         align256(size_t(chunk_bound(p, chunk)) * sizeof(Chunk)) +
         align256(size_t(tile_bound(p, chunk, tile)) * sizeof(Tile));
}

ChunkTable place_chunks(const Problem &p, int64_t chunk, int64_t tile, void *memory) {
  ChunkTable table;
  table.num_sequences = p.sequences;
  table.num_chunks = chunk_bound(p, chunk);
  table.num_tiles = tile_bound(p, chunk, tile);
  table.chunk = chunk;
  table.tile = tile;
  char *next = static_cast<char *>(memory);
  table.sequences = reinterpret_cast<Sequence *>(next);
  next += align256(size_t(p.sequences) * sizeof(Sequence));
  table.chunks = reinterpret_cast<Chunk *>(next);
  next += align256(size_t(table.num_chunks) * sizeof(Chunk));
  table.tiles = tile ? reinterpret_cast<Tile *>(next) : nullptr;
  return table;
}

cudaError_t build_chunks(const Problem &p, int64_t chunk, int64_t tile, const int64_t *cu_seqlens, void *memory,
                         ChunkTable *table, cudaStream_t stream) {
  *table = place_chunks(p, chunk, tile, memory);
  auto *sequences = const_cast<Sequence *>(table->sequences);
  auto *chunks = const_cast<Chunk *>(table->chunks);
  auto *tiles = const_cast<Tile *>(table->tiles);
  if (p.sequences == 0) return cudaSuccess;

  if (!p.packed) {
    const int64_t per_sequence = ceil_div(p.seq_len, chunk),
                  per_chunk = tile ? tiles_per_chunk(p, chunk, tile) : 0;
    const int64_t entries = std::max({p.sequences, table->num_chunks, table->num_tiles});
    return launch_kernel(uniform_tables, int(ceil_div(entries, kThreads)), kThreads, 0, stream, sequences,
                         chunks, tiles, p.sequences, p.seq_len, int32_t(per_sequence), chunk, per_chunk, tile);
  }
  launch_kernel(packed_sequences, 1, 1024, 0, stream, sequences, cu_seqlens, p.sequences, p.seq_len, chunk);
  if (table->num_chunks > 0) {
    launch_kernel(fill_chunks, int(ceil_div(table->num_chunks, kThreads)), kThreads, 0, stream, chunks,
                  sequences, p.sequences, table->num_chunks, chunk);
  }
  if (table->num_tiles > 0) {
    const int blocks = int(ceil_div(table->num_tiles, kThreads));
    if (gap_free(p, chunk, tile)) {
      launch_kernel(clear_tiles, blocks, kThreads, 0, stream, tiles, table->num_tiles);
      launch_kernel(scatter_tiles, int(std::min<int64_t>(p.sequences, 4096)), kThreads, 0, stream, tiles,
                    sequences, p.sequences, chunk, tile);
    } else {
      launch_kernel(fill_tiles, blocks, kThreads, 0, stream, tiles, chunks, table->num_tiles,
                    tiles_per_chunk(p, chunk, tile), tile);
    }
  }
  return cudaGetLastError();
}

cudaError_t chunk_gates(const Problem &p, const ChunkTable &table, const powerattn_tensor &log_g, float *g,
                        double *g64, cudaStream_t stream) {
  const size_t count = size_t(p.batch) * p.heads_kv * p.seq_len;
  if (count == 0) return cudaSuccess;
  if (!log_g.data) {
    if (g) cudaMemsetAsync(g, 0, count * sizeof(float), stream);
    if (g64) cudaMemsetAsync(g64, 0, count * sizeof(double), stream);
    return cudaGetLastError();
  }
  const auto *data = static_cast<const float *>(log_g.data);
  const int blocks = int(table.num_chunks * p.heads_kv);
  if (blocks == 0) return cudaSuccess;
  if (table.chunk <= 128 * kGatesPerThread) {
    launch_kernel(gates_kernel<128>, blocks, 128, 0, stream, table.chunks, data, log_g, p.packed, p.heads_kv,
                  p.seq_len, g, g64);
  } else {
    launch_kernel(gates_kernel<512>, blocks, 512, 0, stream, table.chunks, data, log_g, p.packed, p.heads_kv,
                  p.seq_len, g, g64);
  }
  return cudaGetLastError();
}

cudaError_t total_gates(const Problem &p, const ChunkTable &table, const powerattn_tensor &log_g, float *total,
                        cudaStream_t stream) {
  const int64_t blocks = p.sequences * p.heads_kv;
  if (blocks == 0) return cudaSuccess;
  return launch_kernel(total_kernel, int(blocks), kThreads, 0, stream, table.sequences,
                       static_cast<const float *>(log_g.data), log_g, p.packed, p.heads_kv, total);
}

cudaError_t zero_padding(const Problem &p, const ChunkTable &table, const powerattn_tensor &out, Dtype dtype,
                         int64_t heads, int64_t dim, cudaStream_t stream) {
  if (!p.packed || !out.data) return cudaSuccess;
  return zero(p, table.sequences + (p.sequences - 1), out, dtype, heads, dim, stream);
}

cudaError_t zero_tensor(const Problem &p, const powerattn_tensor &out, Dtype dtype, int64_t heads, int64_t dim,
                        cudaStream_t stream) {
  return out.data ? zero(p, nullptr, out, dtype, heads, dim, stream) : cudaSuccess;
}

}  // namespace powerattn::cuda
