// SPDX-License-Identifier: Apache-2.0
// One case as a line of text, shared by the tests and the benchmarks:
//
//   fwd bf16 b2 t4097 h8/2 d64 p2 gated
//
//   operation    fwd | bwd | step | sum | rsum        (forward, backward, step, summary, summary_reverse)
//   dtype        f32 | f16 | bf16 | f64
//   b2 t4097     batch, tokens (step: tokens of one call)        default b1
//   h8/2         query heads / kv heads; h8 = h8/8               default h1
//   d64 e32      head_dim, value_dim                             default e = d
//   p2           degree                                          default p2
//   seq5,0,17    packed sequences of these lengths (b1; t defaults to their sum plus pad)
//   pad3         padding rows after the last packed sequence
//   gated        log gates around -0.02 | fading: around -2 | steep: around -20
//   reset        gated, and some are -inf
//   qx30 kx0.001 vx1e4 dyx1e-5   sizes of q, k, v, d_y (states follow), default 1
//   thin         every fifth query is 2^-10 of its size: row sums 2^-10p of the others'
//   unnorm       unnormalised
//   state        initial and final states (backward: their gradients)
//   bstate       states in bfloat16
//   scale0.3 eps0.001
//   rope-half | rope-inter, rdim6 rbase100, offset (random positions of the first token)
//   bhtd | wide | bcast   layout: [b,h,t,d] | rows with gaps | k and v shared by the batch (stride 0)
//   slots lengths         step: a larger pool in another order with skipped sequences | padded tokens
//   attn | chunked, c64   pinned form and chunk
//   threads2 tf32
//
// '#' starts a comment; empty lines are skipped.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <fstream>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "power_attention.h"

namespace powerattn_test {

enum class CaseOp { kForward, kBackward, kStep, kSummary, kSummaryReverse };
enum class Gate { kNone, kGated, kFading, kSteep, kReset };
enum class Layout { kBthd, kBhtd, kWide, kBroadcast };

struct Case {
  std::string line;
  CaseOp op = CaseOp::kForward;
  int32_t dtype = POWERATTN_FLOAT32;
  int64_t b = 1, t = 0, heads_q = 1, heads_kv = 1, d = 0, e = 0;
  int32_t p = 2;
  std::vector<int64_t> sequences;  // lengths of packed sequences
  bool packed = false;
  int64_t pad = 0;
  Gate gate = Gate::kNone;
  bool normalize = true, state = false, bf16_state = false;
  bool custom_scale = false, offset = false, slots = false, lengths = false, tf32 = false;
  double scale = 0, eps = 0;
  double size_q = 1, size_k = 1, size_v = 1, size_dy = 1;
  bool thin = false;
  int32_t rope = POWERATTN_ROPE_NONE;
  int64_t rope_dim = 0;
  double rope_base = 0;
  Layout layout = Layout::kBthd;
  int32_t form = POWERATTN_FORM_AUTO;
  int64_t chunk = 0;
  int32_t threads = 0;

  // Weights leave the range of the type: a plain implementation is given the digits without the range.
  bool out_of_range() const {
    return thin || gate == Gate::kSteep || size_q != 1 || size_k != 1 || size_v != 1 || size_dy != 1;
  }
  int64_t group() const { return heads_q / heads_kv; }
  int64_t count() const { return packed ? static_cast<int64_t>(sequences.size()) : b; }
  double scale_in_force() const;

  powerattn_desc desc(int32_t device_type = POWERATTN_CPU) const;
};

inline double Case::scale_in_force() const {
  return custom_scale ? scale : 1.0 / std::sqrt(static_cast<double>(d));
}

inline powerattn_desc Case::desc(int32_t device_type) const {
  powerattn_desc x = {};
  x.struct_size = sizeof x;
  x.device_type = device_type;
  x.dtype = dtype;
  x.state_dtype = bf16_state ? static_cast<int32_t>(POWERATTN_BFLOAT16) : 0;
  x.degree = p;
  const bool needs_state = op != CaseOp::kForward && op != CaseOp::kBackward;
  x.flags = (normalize ? 0 : POWERATTN_UNNORMALIZED) | (custom_scale ? POWERATTN_CUSTOM_SCALE : 0) |
            (state || needs_state ? POWERATTN_USE_STATE : 0) | (tf32 ? POWERATTN_ALLOW_TF32 : 0);
  x.form = form;
  x.batch = packed ? 1 : b;
  x.seq_len = t;
  x.heads_q = heads_q;
  x.heads_kv = heads_kv;
  x.head_dim = d;
  x.value_dim = e;
  x.sequences = packed ? count() : 0;
  x.chunk_size = chunk;
  x.scale = scale;
  x.eps = eps;
  x.rope_base = rope_base;
  x.rope_dim = rope_dim;
  x.rope_style = rope;
  x.num_threads = threads;
  return x;
}

namespace detail {

inline bool starts_with(const std::string &word, const char *prefix, std::string *rest) {
  const std::string p(prefix);
  if (word.compare(0, p.size(), p) != 0) return false;
  *rest = word.substr(p.size());
  return true;
}

inline int64_t integer(const std::string &text, const std::string &line) {
  char *end = nullptr;
  const long long x = std::strtoll(text.c_str(), &end, 10);
  if (text.empty() || *end != 0) throw std::runtime_error("case '" + line + "': '" + text + "' is no integer");
  return x;
}

inline double number(const std::string &text, const std::string &line) {
  char *end = nullptr;
  const double x = std::strtod(text.c_str(), &end);
  if (text.empty() || *end != 0) throw std::runtime_error("case '" + line + "': '" + text + "' is no number");
  return x;
}

}  // namespace detail

inline Case parse_case(const std::string &line) {
  using detail::integer;
  using detail::number;
  using detail::starts_with;
  Case c;
  c.line = line;
  std::istringstream words(line);
  std::string word, rest;
  bool t_given = false;
  for (int position = 0; words >> word; ++position) {
    if (position == 0) {
      if (word == "fwd")
        c.op = CaseOp::kForward;
      else if (word == "bwd")
        c.op = CaseOp::kBackward;
      else if (word == "step")
        c.op = CaseOp::kStep;
      else if (word == "sum")
        c.op = CaseOp::kSummary;
      else if (word == "rsum")
        c.op = CaseOp::kSummaryReverse;
      else
        throw std::runtime_error("case '" + line + "': unknown operation '" + word + "'");
    } else if (word == "f32")
      c.dtype = POWERATTN_FLOAT32;
    else if (word == "f16")
      c.dtype = POWERATTN_FLOAT16;
    else if (word == "bf16")
      c.dtype = POWERATTN_BFLOAT16;
    else if (word == "f64")
      c.dtype = POWERATTN_FLOAT64;
    else if (word == "gated")
      c.gate = Gate::kGated;
    else if (word == "fading")
      c.gate = Gate::kFading;
    else if (word == "steep")
      c.gate = Gate::kSteep;
    else if (word == "thin")
      c.thin = true;
    else if (word == "reset")
      c.gate = Gate::kReset;
    else if (word == "unnorm")
      c.normalize = false;
    else if (word == "state")
      c.state = true;
    else if (word == "bstate")
      c.bf16_state = true;
    else if (word == "offset")
      c.offset = true;
    else if (word == "slots")
      c.slots = true;
    else if (word == "lengths")
      c.lengths = true;
    else if (word == "tf32")
      c.tf32 = true;
    else if (word == "rope-half")
      c.rope = POWERATTN_ROPE_HALF;
    else if (word == "rope-inter")
      c.rope = POWERATTN_ROPE_INTERLEAVED;
    else if (word == "bthd")
      c.layout = Layout::kBthd;
    else if (word == "bhtd")
      c.layout = Layout::kBhtd;
    else if (word == "wide")
      c.layout = Layout::kWide;
    else if (word == "bcast")
      c.layout = Layout::kBroadcast;
    else if (word == "attn")
      c.form = POWERATTN_FORM_ATTENTION;
    else if (word == "chunked")
      c.form = POWERATTN_FORM_CHUNKED;
    else if (starts_with(word, "qx", &rest))
      c.size_q = number(rest, line);
    else if (starts_with(word, "kx", &rest))
      c.size_k = number(rest, line);
    else if (starts_with(word, "vx", &rest))
      c.size_v = number(rest, line);
    else if (starts_with(word, "dyx", &rest))
      c.size_dy = number(rest, line);
    else if (starts_with(word, "scale", &rest))
      c.custom_scale = true, c.scale = number(rest, line);
    else if (starts_with(word, "eps", &rest))
      c.eps = number(rest, line);
    else if (starts_with(word, "rdim", &rest))
      c.rope_dim = integer(rest, line);
    else if (starts_with(word, "rbase", &rest))
      c.rope_base = number(rest, line);
    else if (starts_with(word, "threads", &rest))
      c.threads = static_cast<int32_t>(integer(rest, line));
    else if (starts_with(word, "pad", &rest))
      c.pad = integer(rest, line);
    else if (starts_with(word, "seq", &rest)) {
      std::istringstream lengths(rest);
      for (std::string one; std::getline(lengths, one, ',');) c.sequences.push_back(integer(one, line));
      c.packed = true;
    } else if (starts_with(word, "b", &rest))
      c.b = integer(rest, line);
    else if (starts_with(word, "t", &rest))
      c.t = integer(rest, line), t_given = true;
    else if (starts_with(word, "d", &rest))
      c.d = integer(rest, line);
    else if (starts_with(word, "e", &rest))
      c.e = integer(rest, line);
    else if (starts_with(word, "p", &rest))
      c.p = static_cast<int32_t>(integer(rest, line));
    else if (starts_with(word, "c", &rest))
      c.chunk = integer(rest, line);
    else if (starts_with(word, "h", &rest)) {
      const size_t slash = rest.find('/');
      c.heads_q = integer(rest.substr(0, slash), line);
      c.heads_kv = slash == std::string::npos ? c.heads_q : integer(rest.substr(slash + 1), line);
    } else
      throw std::runtime_error("case '" + line + "': unknown word '" + word + "'");
  }
  if (c.packed && !t_given) {
    c.t = c.pad;
    for (int64_t n : c.sequences) c.t += n;
  }
  if (c.e == 0) c.e = c.d;
  if (c.d < 1) throw std::runtime_error("case '" + line + "': d is missing");
  return c;
}

inline std::vector<Case> load_cases(const std::string &path) {
  std::ifstream file(path);
  if (!file) throw std::runtime_error("cannot read " + path);
  std::vector<Case> cases;
  for (std::string line; std::getline(file, line);) {
    line = line.substr(0, line.find('#'));
    const size_t begin = line.find_first_not_of(" \t\r"), end = line.find_last_not_of(" \t\r");
    if (begin != std::string::npos) cases.push_back(parse_case(line.substr(begin, end - begin + 1)));
  }
  if (cases.empty()) throw std::runtime_error(path + " holds no case");
  return cases;
}

}  // namespace powerattn_test
