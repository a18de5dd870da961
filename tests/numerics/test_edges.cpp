// SPDX-License-Identifier: Apache-2.0
// Where such libraries break: zero rows, tiny denominators, NaN and Inf, resets, long sequences, and the gaps
// that the retention package is known for.
#include <algorithm>
#include <cstdio>

#include "doctest/doctest.h"
#include "expect.h"

using namespace powerattn_test;

namespace {

Memory memory;
const double kInf = std::numeric_limits<double>::infinity();
const double kNan = std::numeric_limits<double>::quiet_NaN();

Outputs run_once(const Case &c, const Inputs &in) { return run(memory, c, in, Plan(c.desc())); }

bool finite(const Vector &x) {
  return std::all_of(x.begin(), x.end(), [](double v) { return std::isfinite(v); });
}
bool finite(const Outputs &o) {
  return finite(o.y) && finite(o.norm) && finite(o.s) && finite(o.z) && finite(o.dq) && finite(o.dk) &&
         finite(o.dv) && finite(o.dlog_g) && finite(o.ds0) && finite(o.dz0);
}
bool zero(const Vector &x, int64_t from, int64_t count) {
  return std::all_of(x.begin() + from, x.begin() + from + count, [](double v) { return v == 0; });
}

const char *const kForms[] = {"attn", "chunked c16", ""};

}  // namespace

TEST_CASE("edge: zero queries, zero keys and everything zero give zeros, not NaN") {
  for (const char *form : kForms) {
    for (const char *dtype : {"f32", "bf16", "f16", "f64"}) {
      const Case c = parse_case(std::string("bwd ") + dtype + " b2 t41 h2 d16 p2 gated state " + form);
      INFO(c.line);
      const Inputs in = make_inputs(c, 5);
      Inputs q0 = in;
      q0.q.assign(in.q.size(), 0);
      Outputs out = run_once(c, q0);
      CHECK(zero(out.y, 0, static_cast<int64_t>(out.y.size())));
      CHECK(zero(out.dq, 0, static_cast<int64_t>(out.dq.size())));
      CHECK(finite(out));

      Inputs one_row = in;  // one zero query among others
      for (int64_t x = 0; x < c.heads_q * c.d; ++x) one_row.q[17 * c.heads_q * c.d + x] = 0;
      out = run_once(c, one_row);
      CHECK(zero(out.y, 17 * c.heads_q * c.e, c.heads_q * c.e));
      CHECK(zero(out.dq, 17 * c.heads_q * c.d, c.heads_q * c.d));
      CHECK(finite(out));

      Inputs k0 = in;  // no key and no state: every denominator is 0
      k0.k.assign(in.k.size(), 0);
      k0.s0.assign(in.s0.size(), 0);
      k0.z0.assign(in.z0.size(), 0);
      out = run_once(c, k0);
      CHECK(zero(out.y, 0, static_cast<int64_t>(out.y.size())));
      CHECK(finite(out));
    }
  }
  const Case step = parse_case("step f32 b2 t3 h4/2 d16 p2 gated");
  Inputs in = make_inputs(step, 5);
  in.q.assign(in.q.size(), 0);
  const Outputs out = run_once(step, in);
  CHECK(zero(out.y, 0, static_cast<int64_t>(out.y.size())));
  CHECK(finite(out));
}

TEST_CASE("edge: eps on a zero row, and where scores are near zero, is the same in every form") {
  // Another eps in another path would show here: scores around 1e-3 make the denominators around eps.
  for (const char *dtype : {"f32", "f64"}) {
    const std::string base = std::string(dtype) + " b1 t67 h2 d16 p2 gated state scale0.001 eps1e-6";
    const Case first = parse_case("fwd " + base + " attn");
    const Inputs in = make_inputs(first, 31);
    const Outputs exact = oracle(first, in);
    const std::vector<Outputs> plain = plain_versions(first, in, true);
    for (const char *form : {" attn", " chunked c16", ""}) {
      INFO(base, form);
      CHECK(judge_all(first, run_once(parse_case("fwd " + base + form), in), exact, plain).problems == "");
    }
    Case step = parse_case("step " + base);
    Outputs stepped = run_once(step, [&] {
      Inputs x = in;
      x.num_slots = 1;
      return x;
    }());
    CHECK(judge_all(first, stepped, exact, plain).problems == "");
  }
}

TEST_CASE("edge: tiny and huge scores leave the normalised output alone") {
  // y does not change when q is scaled by a power of two; denominators move by 2^(2 x 20).
  for (const char *form : kForms) {
    const Case c = parse_case(std::string("fwd f32 b1 t41 h2 d16 p2 gated ") + form);
    Inputs in = make_inputs(c, 8);
    const Outputs plain = run_once(c, in);
    for (int shift : {-20, 20}) {
      INFO(c.line, " shift ", shift);
      Inputs moved = in;
      for (double &x : moved.q) x = std::ldexp(x, shift);
      CHECK(run_once(c, moved).y == plain.y);
    }
  }
}

TEST_CASE("edge: NaN and Inf in the data propagate, stay in their sequence, and nothing crashes") {
  // A query, key or gate reaches later tokens only. A value is multiplied by the masked weights of its tile,
  // and 0 x NaN is NaN: it may also reach earlier tokens, but never another sequence.
  for (const char *op : {"fwd", "bwd"}) {
    for (const char *form : kForms) {
      for (const char *dtype : {"f32", "bf16", "f16", "f64"}) {
        const Case c = parse_case(std::string(op) + " " + dtype + " b2 t41 h2 d16 p2 gated state " + form);
        INFO(c.line);
        const Inputs in = make_inputs(c, 6);
        const Outputs clean = run_once(c, in);
        for (double bad : {kNan, kInf}) {
          for (Vector Inputs::*field : {&Inputs::q, &Inputs::k, &Inputs::v, &Inputs::log_g}) {
            if (field == &Inputs::log_g && bad == kInf) continue;
            Inputs broken = in;
            const int64_t per_token = static_cast<int64_t>((broken.*field).size()) / (c.b * c.t);
            (broken.*field)[20 * per_token] = bad;  // token 20, head 0
            const Outputs out = run_once(c, broken);
            const int64_t row = c.heads_q * c.e;
            for (int64_t i = 0; i < 20 * row && field != &Inputs::v; ++i) REQUIRE(out.y[i] == clean.y[i]);
            for (int64_t i = c.t * row; i < 2 * c.t * row; ++i) REQUIRE(out.y[i] == clean.y[i]);
            CHECK(!finite(Vector(out.y.begin() + 20 * row, out.y.begin() + 20 * row + c.e)));
          }
        }
      }
    }
  }
  for (const char *line : {"step f32 b2 t2 h2 d16 p2 gated", "step bf16 b2 t1 h2 d16 p2 bstate"}) {
    const Case c = parse_case(line);
    Inputs in = make_inputs(c, 6);
    in.k[0] = kNan;
    const Outputs out = run_once(c, in);
    INFO(line);
    CHECK(std::isnan(out.y[0]));
    CHECK(std::isnan(out.s[0]));
    const int64_t per_sequence = static_cast<int64_t>(out.y.size()) / 2;
    CHECK(finite(Vector(out.y.begin() + per_sequence, out.y.end())));
  }
}

TEST_CASE("edge: a reset hides everything before it") {
  for (const char *form : kForms) {
    const Case c = parse_case(std::string("fwd f32 b1 t67 h2 d16 p2 gated state ") + form);
    INFO(c.line);
    Inputs in = make_inputs(c, 12), other = in;
    const int64_t reset = 30;
    for (int64_t h = 0; h < c.heads_kv; ++h) in.log_g[reset * c.heads_kv + h] = -kInf;
    other.log_g = in.log_g;
    for (int64_t i = 0; i < reset * c.heads_kv * c.d; ++i) other.k[i] = -2 * in.k[i] + 1;
    for (int64_t i = 0; i < reset * c.heads_kv * c.e; ++i) other.v[i] = 7;
    for (double &x : other.s0) x *= 3;
    const Outputs a = run_once(c, in), b = run_once(c, other);
    const int64_t from = reset * c.heads_q * c.e;
    CHECK(std::equal(a.y.begin() + from, a.y.end(), b.y.begin() + from));
    CHECK(a.s == b.s);
    CHECK(finite(a));
  }
}

TEST_CASE("edge: gates that add up to far beyond what exp can hold") {
  // -40 a token: exp(G) is 0 after three tokens, the weights of neighbours are not.
  for (const char *form : kForms) {
    const Case c = parse_case(std::string("bwd f32 b1 t67 h2 d16 p2 gated state ") + form);
    INFO(c.line);
    Inputs in = make_inputs(c, 12);
    for (size_t i = 0; i < in.log_g.size(); ++i)
      in.log_g[i] = i % 7 == 0 ? -40 : i % 11 == 0 ? -200 : in.log_g[i];
    const Outputs out = run_once(c, in);
    CHECK(finite(out));
    CHECK(judge_all(c, out, oracle(c, in), plain_versions(c, in, true)).problems == "");
  }
}

TEST_CASE("edge: long sequences stay right") {
  // The last rows of a long sequence against the recurrence in float64; constant values come back at any
  // length.
  const Case c = parse_case("fwd f32 b1 t8209 h1 d8 p2 gated state");
  const Inputs in = make_inputs(c, 2);
  const HeadOutput exact = recurrent_forward<double>(head_input(c, in, 0, 0), Exact());
  const HeadOutput plain = recurrent_forward<float>(head_input(c, in, 0, 0), Rounded{POWERATTN_FLOAT32});
  const Outputs out = run_once(c, in);
  CHECK(distance(out.y, exact.y).largest <= 2 * distance(plain.y, exact.y).largest + 0x1p-24 * 4);
  CHECK(distance(out.s, exact.s).largest <= 2 * distance(plain.s, exact.s).largest);
}

// ---- The gaps of the retention package ----------------------------------------------------------------------

TEST_CASE("retention: an initial state works in training, in every form") {
  for (const char *form : kForms) {
    for (const char *dtype : {"f32", "bf16"}) {
      const Case c = parse_case(std::string("bwd ") + dtype + " b1 t70 h4/2 d16 p2 gated state " + form);
      INFO(c.line);
      CHECK(check_case(memory, c, seed_of(c.line)) == "");
    }
  }
}

TEST_CASE("retention: the final state holds the last chunk, whole or partial, and short sequences too") {
  for (const char *t : {"t1", "t3", "t15", "t16", "t17", "t32", "t47"}) {
    for (const char *form : kForms) {
      const Case c = parse_case(std::string("fwd f32 b1 ") + t + " h2 d8 p2 gated state " + form);
      INFO(c.line);
      CHECK(check_case(memory, c, seed_of(c.line)) == "");
    }
  }
}

TEST_CASE("retention: several queries against a state each get the discount of their own position") {
  const Case c = parse_case("step f32 b2 t6 h2 d8 p2 fading");
  CHECK(check_case(memory, c, 1) == "");
}

TEST_CASE("retention: no channel of v carries the normaliser") {
  const Case c = parse_case("fwd f32 b1 t33 h1 d8 e1 p2 gated");
  Inputs in = make_inputs(c, 3);
  for (size_t i = 0; i < in.v.size(); ++i) in.v[i] = static_cast<double>(i);
  CHECK(judge_all(c, run_once(c, in), oracle(c, in), plain_versions(c, in, true)).problems == "");
}

TEST_CASE("retention: a scale of 0 is 0, and the default is 1/sqrt(d)") {
  const Case zero_scale = parse_case("fwd f32 b1 t9 h1 d16 p2 scale0");
  const Inputs in = make_inputs(zero_scale, 3);
  const Outputs out = run_once(zero_scale, in);
  CHECK(zero(out.y, 0, static_cast<int64_t>(out.y.size())));
  const Case automatic = parse_case("fwd f32 b1 t9 h1 d16 p2 unnorm"),
             given = parse_case("fwd f32 b1 t9 h1 d16 p2 unnorm scale0.25");
  CHECK(Plan(automatic.desc()).info().scale == 0.25);
  CHECK(run_once(automatic, in).y == run_once(given, in).y);
}

TEST_CASE("retention: packed sequences, RoPE, a degree other than 2 and a training state at once") {
  for (const char *line : {"bwd f32 seq9,0,30,1 pad2 h4/2 d8 p4 gated state rope-half offset",
                           "bwd f32 seq9,0,30,1 pad2 h4/2 d8 p3 unnorm gated state rope-inter offset",
                           "fwd bf16 seq9,0,30,1 pad2 h4/2 d8 p4 gated state rope-half offset"}) {
    const Case c = parse_case(line);
    INFO(line);
    CHECK(check_case(memory, c, seed_of(line)) == "");
  }
}
