// SPDX-License-Identifier: Apache-2.0
// cuda.generic: what it runs, how it is tiled, and where its memory lies.
#pragma once

#include <string>

#include "common.h"
#include "kernels/cuda/generic/generic.h"

namespace powerattn::cuda::generic {

enum class Pass { kForward, kBackward, kSummary };

// The gate gradient takes the difference of large sums over states, which bfloat16 operands would blur: TF32
// there.
inline Math backward_state_math(Math math) { return math == Math::kBfloat16 ? Math::kTf32 : math; }

// Chunks as the kernels see them: the attention form is one chunk per sequence, rounded up to whole row tiles
// so that the tile table has no gaps.
int64_t chunk_of(const Problem &p, const Tiling &t);
int64_t summary_chunk(const Problem &p);
inline bool with_states(const Problem &p, const Tiling &t) { return t.form == Form::kChunked || p.use_state; }

bool choose(Op op, const Problem &p, const Pins &pins, Tiling *tiling, std::string *why);
void describe(const Problem &p, const Tiling &t, std::string *text);

struct StateBuffers {
  float *s = nullptr;      // sums of the chunks
  void *prefix = nullptr;  // operand type; the same memory as s for float32 operands
  float *z = nullptr;      // sums, then prefix sums
};

struct Buffers {
  void *tables = nullptr;
  float *g = nullptr;
  double *g64 = nullptr;
  void *q = nullptr, *k = nullptr;  // rotated
  Monomial *monomials = nullptr;
  StateBuffers state, grad;
  float *state_out = nullptr, *state_norm = nullptr;
  float *initial_s = nullptr, *initial_z = nullptr;  // float32 copies of bfloat16 states
  float *final_s = nullptr, *final_z = nullptr;
  float *inverse = nullptr, *delta = nullptr;
  float *dq = nullptr, *dk = nullptr, *dv = nullptr;
  float *boundary = nullptr, *scratch = nullptr, *q_dots = nullptr, *k_dots = nullptr;
};

inline size_t rows_q(const Problem &p) { return size_t(p.batch) * p.heads_q * p.seq_len; }
inline size_t rows_kv(const Problem &p) { return size_t(p.batch) * p.heads_kv * p.seq_len; }

// The bytes of a call's workspace and, into *b, its pointers; base null: the bytes alone.
size_t carve(const Problem &p, int64_t chunk, bool states, Pass pass, void *base, Buffers *b);
Sizes sizes(const Problem &p, const Tiling &t);

}  // namespace powerattn::cuda::generic
