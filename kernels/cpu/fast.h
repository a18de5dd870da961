// SPDX-License-Identifier: Apache-2.0
// The fast CPU kernels: what one unit of work gets and the table of functions that each instruction set
// offers. Plain data only: this header is compiled with different machine flags, and an inline function with
// external linkage could leak instructions of one into another.
//
// Inside, a state is kept as S~_r = m_r sum_j w_j mono_r(k_j) v_j^T with the plain monomials
// mono_r(x) = x_i1 ... x_ip and m_r the multinomial coefficient: a query needs no weights then. The public
// state is S_r = S~_r / sqrt(m_r). Queries are not scaled: s_ij = scale q_i . k_j, and a state is queried times
// scale^p.
//
// Layouts, with strips of `nr` columns (the width of one microkernel tile):
//   rows    [tokens][width]              row-major, width padded to nr
//   cols    [tokens/nr][width][nr]       transposed, one strip per nr tokens
//   strips  [width/nr][tokens][nr]       column strips of a row-major matrix
//   state   [e/nr][state rows][nr]       strips, state rows padded to mr; beside it z [state rows]
#pragma once

#include <cstddef>
#include <cstdint>

namespace powerattn {
namespace fast {

// State rows of one unit of an update or a conversion, a multiple of every mr: 7 units at d = 64, p = 2.
constexpr int64_t kUpdateRows = 336;
// With call.low: a multiple of the 32 rows of an image's tile; 6 units at d = 64, p = 2.
constexpr int64_t kLowUpdateRows = 352;

// What is the same for every unit of one call.
template <class T>
struct Call {
  int d, e, p;
  int dp, ep;     // padded to nr
  int64_t D, Dp;  // state rows; padded to mr. 0 where no state is used
  int64_t cp;     // tokens of a chunk, padded to nr: the extent of the packed layouts
  int64_t tile;   // tokens per row tile, a multiple of nr
  int dtype;      // powerattn dtype of q, k, v, y
  bool normalize;
  bool gated;
  double scale, eps;
  double scale_p;  // scale^p
  bool low;        // products in bfloat16 (sums in float32): the set has AMX, inputs are bfloat16
  int rope_style;
  int rope_dim;
  const double *rope_frequency;  // [rope_dim / 2]
  T least_log_g;                 // log gates are clamped from below here: exp of it is 0
};

// Token rows of one (sequence, head): row t is data + t * stride elements.
struct Rows {
  void *data;
  int64_t stride;
};

template <class T>
struct Packed {
  T *rows, *cols, *strips;  // null where the layout is not needed
  // With call.low, in bfloat16 by strips of 32 tokens: tiles of keys and of values, and the keys' columns with
  // tokens l and l + 16 side by side [width][16][2] (amx.h).
  uint16_t *keys = nullptr, *values = nullptr, *columns = nullptr;
};

// The gates of one chunk of one (sequence, kv head); null pointers where the call is not gated.
template <class T>
struct Gates {
  // g_t, the inclusive sum of log_g inside the chunk, in two parts whose differences are exact where they
  // matter: resets (-inf, or below least_log_g) count least_log_g each, the rest adds up.
  double *g, *resets;  // [tokens]
  T *from_start;       // [tokens] exp(g_t)
  T *to_end;           // [tokens] exp(g_end - g_t)
  double decay;        // exp(g_end)
};

template <class T>
struct State {
  T *s, *z;
  uint16_t *image = nullptr;  // with call.low: bfloat16 tiles
};

// What the backward needs of one query head of a chunk, with r_i the reciprocal of the row norm (unnormalised:
// 1) and delta_i = dy_i . y_i (unnormalised: 0). Where dy_i . v_j - delta_i cancels, r_i is multiplied last.
template <class T>
struct OutputGrad {
  Packed<T> dy;    // rows and cols are dy_i; strips are dN_i = r_i dy_i
  T *r;            // [tokens]
  T *minus_delta;  // [tokens]
  T *dl;           // [tokens] -r_i delta_i
  double *a;       // [tokens] sum_j w_ij dw_ij = q_i . dq_i / p for the gate gradient, written by dq
};

// tokens `first` .. first + count - 1 of a chunk whose first token is `chunk` in its sequence.
struct Span {
  int64_t chunk, first, count;
};

// Rows that stay in L1 while several tokens or groups of heads pass over them.
constexpr int64_t kStepBytes = 16 * 1024;
constexpr int64_t kStepLeastRows = 8;

// Rows row .. row+rows-1 of one state in a step, for all tokens and query heads (step_rows.h).
template <class T>
struct StepUnit {
  int d, p;
  int64_t e, ep, ld;             // value_dim, its padded extent, stride of phi
  int64_t heads, tokens, batch;  // tokens whose phi is held at once
  int64_t token_stride;          // tokens between the heads of q, y and l
  int64_t row, rows;
  int state_dtype;
  bool direct;         // on the state in place; with bfloat16 v and y come and go as pairs (step_rows.h)
  void *s, *z;         // at `row`; z may be null
  const T *q, *k, *v;  // [heads][token_stride][d] times scale, [tokens][d], [tokens][ep]
  const T *decay;      // [tokens] exp(log_g)
  T *y, *l;            // out: this block's part of the sums, [heads][token_stride][ep], [heads][token_stride]
  T *scratch;          // phi: (1 + heads) batch ld
  T *z_scratch;        // rows
  T *s_scratch;        // max(kStepBytes / sizeof(T), kStepLeastRows e), where not direct
};

template <class T>
struct Kernels {
  const char *name;
  int mr, nr;
  bool low;  // has bfloat16 products with states

  // Bytes of scratch that one worker needs for any unit of the call.
  int64_t (*scratch)(const Call<T> &);

  // Loads tokens (converted, rotated at position + t), zero-filled to a multiple of nr.
  void (*pack)(const Call<T> &, const Rows &, bool rotate, double position, int width, Span, const Packed<T> &,
               void *scratch);
  // Everything in Gates from log_g.
  void (*gates)(const Call<T> &, const Rows &, Span, Gates<T> *);
  // OutputGrad, but for a, from dy, y and row_norm.
  void (*output_grad)(const Call<T> &, const Rows &d_y, const Rows &y, const Rows &row_norm, Span,
                      const OutputGrad<T> &, void *scratch);

  // y_i and row_norm_i of one row tile: the state's part (s may be null) and the chunk's.
  void (*output)(const Call<T> &, const Rows &q, double position, const Packed<T> &k, const Packed<T> &v,
                 const Gates<T> &, const State<T> &, Span, const Rows &y, const Rows &row_norm, void *scratch);

  // Rows row .. row+rows-1 of: out = decay in + sum_t factor base_t m_r mono_r(x_t) [b_t, u_t]. base null: 1;
  // u null: 1; in.s null: nothing. z is skipped where out.z is null. Reads x.cols and b.strips; with call.low
  // x.columns and b.values, u is null, there are tokens, and out.image, if not null, is brought up to date.
  void (*update)(const Call<T> &, const Packed<T> &x, const Packed<T> &b, const T *base, double factor,
                 const T *u, double decay, const State<T> &in, const State<T> &out, int64_t tokens, int64_t row,
                 int64_t rows, void *scratch);

  // dq and a of one row tile.
  void (*dq)(const Call<T> &, const Packed<T> &q, const OutputGrad<T> &, const Packed<T> &k, const Packed<T> &v,
             const Gates<T> &, const State<T> &, Span, int64_t tokens, double position, const Rows &d_q,
             void *scratch);
  // dk and dv of one key tile, over the `heads` query heads of its group; b_j = k_j . dk_j / p.
  void (*dkv)(const Call<T> &, int heads, const Packed<T> *q, const OutputGrad<T> *, const Packed<T> &k,
              const Packed<T> &v, const Gates<T> &, const State<T> &d_state, Span, int64_t tokens,
              double position, const Rows &d_k, const Rows &d_v, double *b, void *scratch);

  // Elements of a state's image for call.low (0 without), of S in bfloat16 and z as it is; and that of some
  // rows, a multiple of 32 but at the end.
  int64_t (*image_size)(const Call<T> &);
  void (*image)(const Call<T> &, const State<T> &, int64_t row, int64_t rows, uint16_t *image);

  // Public to inner form and back, rows row .. row+rows-1: S~ = sqrt(m_r) S.
  void (*import_state)(const Call<T> &, int state_dtype, const void *s, const void *z, int64_t row,
                       int64_t rows, const State<T> &);
  void (*export_state)(const Call<T> &, int state_dtype, const State<T> &, int64_t row, int64_t rows, void *s,
                       void *z);
  // <S, dS> + <z, dz> over the rows, in the public form's inner product: sum_r S~_r dS~_r / m_r.
  double (*inner)(const Call<T> &, const State<T> &, const State<T> &, int64_t row, int64_t rows);

  void (*step)(const StepUnit<T> &);
};

struct Isa {
  Kernels<float> f32;
  Kernels<double> f64;
};

}  // namespace fast

// One per instruction set that this build holds.
namespace baseline {
const fast::Isa &isa();
}
namespace avx2 {
const fast::Isa &isa();
}
namespace avx512 {
const fast::Isa &isa();
}
namespace amx {
const fast::Isa &isa();
}

}  // namespace powerattn
