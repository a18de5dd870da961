// SPDX-License-Identifier: Apache-2.0
// Properties that need no oracle: what must hold between calls of the library, whatever the numbers are.
#include <algorithm>
#include <cstdio>

#include "doctest/doctest.h"
#include "expect.h"

using namespace powerattn_test;

namespace {

Memory memory;

Case with_op(Case c, CaseOp op) {
  c.op = op;
  return c;
}

Outputs run_once(const Case &c, const Inputs &in) { return run(memory, c, in, Plan(c.desc())); }

bool same_bits(const Vector &a, const Vector &b) {
  return a.size() == b.size() && (a.empty() || std::memcmp(a.data(), b.data(), a.size() * sizeof(double)) == 0);
}

bool same_bits(const Outputs &a, const Outputs &b) {
  return same_bits(a.y, b.y) && same_bits(a.norm, b.norm) && same_bits(a.s, b.s) && same_bits(a.z, b.z) &&
         same_bits(a.dq, b.dq) && same_bits(a.dk, b.dk) && same_bits(a.dv, b.dv) &&
         same_bits(a.dlog_g, b.dlog_g) && same_bits(a.ds0, b.ds0) && same_bits(a.dz0, b.dz0) &&
         same_bits(a.total, b.total);
}

// Two results of the library for the same numbers: both within tolerance of the truth, so at most two
// tolerances apart. `c` says which plain implementation measures it.
std::string both_near(const Case &c, const Inputs &in, const Outputs &a, const Outputs &b) {
  const Outputs exact = oracle(c, in);
  const std::vector<Outputs> plain = plain_versions(c, in, true);
  return judge_all(c, a, exact, plain).problems + judge_all(c, b, exact, plain).problems;
}

const char *const kForms[] = {"attn", "chunked c16", "chunked c64", ""};

// The cases that every property runs over: both forms, several types.
std::vector<Case> variants(const char *op, const char *rest) {
  std::vector<Case> all;
  for (const char *form : kForms) {
    for (const char *dtype : {"f32", "bf16", "f64"}) {
      all.push_back(parse_case(std::string(op) + " " + dtype + " " + rest + " " + form));
    }
  }
  return all;
}

// The rows [first, first + count) of every token tensor, as a problem of their own.
Inputs cut_tokens(const Case &c, const Inputs &in, int64_t first, int64_t count) {
  Inputs out = in;
  const auto cut = [&](const Vector &x, int64_t heads, int64_t width) {
    Vector y;
    if (x.empty()) return y;
    const int64_t row = heads * width;
    for (int64_t b = 0; b < c.b; ++b) {
      y.insert(y.end(), x.begin() + (b * c.t + first) * row, x.begin() + (b * c.t + first + count) * row);
    }
    return y;
  };
  out.q = cut(in.q, c.heads_q, c.d);
  out.k = cut(in.k, c.heads_kv, c.d);
  out.v = cut(in.v, c.heads_kv, c.e);
  out.log_g = cut(in.log_g, c.heads_kv, 1);
  out.dy = cut(in.dy, c.heads_q, c.e);
  out.y = cut(in.y, c.heads_q, c.e);
  out.norm = cut(in.norm, c.heads_q, 1);
  if (c.rope != POWERATTN_ROPE_NONE) {
    out.offset.resize(static_cast<size_t>(c.b));
    for (int64_t b = 0; b < c.b; ++b) out.offset[b] = (in.offset.empty() ? 0 : in.offset[b]) + first;
  }
  return out;
}

void append_tokens(const Case &c, const Vector &part, int64_t part_tokens, int64_t first, int64_t width,
                   Vector *whole) {
  for (int64_t b = 0; b < c.b; ++b) {
    std::copy(part.begin() + b * part_tokens * width, part.begin() + (b + 1) * part_tokens * width,
              whole->begin() + (b * c.t + first) * width);
  }
}

}  // namespace

TEST_CASE("property: linear in v") {
  // Scaling v by a power of two scales y by exactly as much; adding values adds outputs (unnormalised weights
  // are the same for both).
  for (const Case &c : variants("fwd", "b2 t67 h4/2 d16 e12 p2 gated")) {
    INFO(c.line);
    Inputs in = make_inputs(c, seed_of(c.line));
    const Outputs one = run_once(c, in);
    for (double &x : in.v) x *= 4;
    const Outputs four = run_once(c, in);
    Vector expected = one.y;
    for (double &x : expected) x *= 4;
    CHECK(same_bits(four.y, expected));
    CHECK(same_bits(four.norm, one.norm));
  }
  for (const Case &c : variants("fwd", "b1 t67 h2 d16 p3 unnorm gated")) {
    INFO(c.line);
    Inputs a = make_inputs(c, 1), b = a, both = a;
    Random random(2);
    b.v = random.normals(static_cast<int64_t>(a.v.size()), 0, 1, c.dtype);
    for (size_t i = 0; i < a.v.size(); ++i) {  // values whose sum is exact
      a.v[i] = std::nearbyint(a.v[i] * 4);
      b.v[i] = std::nearbyint(b.v[i] * 4);
      both.v[i] = a.v[i] + b.v[i];
    }
    const Outputs ya = run_once(c, a), yb = run_once(c, b), yboth = run_once(c, both);
    Outputs sum = ya;
    for (size_t i = 0; i < sum.y.size(); ++i) sum.y[i] += yb.y[i];
    // ya and yb carry a rounding each: the judge allows one for the result.
    const Outputs exact = oracle(c, both);
    std::vector<Outputs> plain = plain_versions(c, both, true);
    const Report report = judge_all(c, yboth, exact, plain);
    CHECK(report.problems == "");
    const double u = unit_roundoff(c.dtype);
    double largest = 0, off = 0;
    for (size_t i = 0; i < sum.y.size(); ++i) {
      largest = std::max({largest, std::fabs(ya.y[i]), std::fabs(yb.y[i]), std::fabs(yboth.y[i])});
      off = std::max(off, std::fabs(sum.y[i] - yboth.y[i]));
    }
    Distance plain_error;
    for (const Outputs &p : plain)
      plain_error.largest = std::max(plain_error.largest, distance(p.y, exact.y).largest);
    CHECK(off <= 3 * (2 * plain_error.largest + u * largest));
  }
}

TEST_CASE("property: any chunk size and any form give the same answer") {
  for (const char *rest : {"b1 t131 h2/1 d16 p2 gated state", "b1 t131 h2/1 d16 p2 reset state",
                           "b2 t67 h2 d5 p3 unnorm gated state", "b1 t67 h1 d8 p4"}) {
    for (const char *op : {"fwd", "bwd"}) {
      for (const char *dtype : {"f32", "bf16"}) {
        const std::string base = std::string(op) + " " + dtype + " " + rest;
        const Case first = parse_case(base + " attn");
        const Inputs in = make_inputs(first, seed_of(base));
        const Outputs exact = oracle(first, in);
        const std::vector<Outputs> plain = plain_versions(first, in, true);
        for (const char *form : {" attn", " chunked c1", " chunked c7", " chunked c32", " chunked c64",
                                 " chunked c128", " chunked c131", " chunked c4096", ""}) {
          const Case c = parse_case(base + form);
          INFO(c.line);
          CHECK(judge_all(c, run_once(c, in), exact, plain).problems == "");
        }
      }
    }
  }
}

TEST_CASE("property: split anywhere and resume") {
  for (const char *form : kForms) {
    for (const char *dtype : {"f32", "bf16", "f64"}) {
      const Case c = parse_case(std::string("fwd ") + dtype +
                                " b2 t67 h4/2 d12 e10 p2 gated state rope-half offset " + form);
      const Inputs in = make_inputs(c, seed_of(c.line));
      const Outputs exact = oracle(c, in);
      const std::vector<Outputs> plain = plain_versions(c, in, true);
      for (int64_t split : {0, 1, 16, 33, 66, 67}) {
        INFO(c.line, " split ", split);
        Case head = c, tail = c;
        head.t = split;
        tail.t = c.t - split;
        const Outputs a = run_once(head, cut_tokens(c, in, 0, split));
        Inputs rest = cut_tokens(c, in, split, c.t - split);
        rest.s0 = a.s;
        rest.z0 = a.z;
        Outputs whole = run_once(tail, rest);
        Vector y(static_cast<size_t>(c.b * c.t * c.heads_q * c.e)),
            norm(static_cast<size_t>(c.b * c.t * c.heads_q));
        append_tokens(c, a.y, split, 0, c.heads_q * c.e, &y);
        append_tokens(c, a.norm, split, 0, c.heads_q, &norm);
        append_tokens(c, whole.y, c.t - split, split, c.heads_q * c.e, &y);
        append_tokens(c, whole.norm, c.t - split, split, c.heads_q, &norm);
        whole.y = y;
        whole.norm = norm;
        CHECK(judge_all(c, whole, exact, plain).problems == "");
      }
    }
  }
}

TEST_CASE("property: the backward of two segments is the backward of the whole") {
  for (const char *form : kForms) {
    for (const char *line : {"b1 t67 h4/2 d12 p2 gated state", "b2 t43 h2 d7 p3 unnorm gated state",
                             "b1 t67 h2 d8 p2 reset state"}) {
      const Case c = parse_case(std::string("bwd f32 ") + line + " " + form);
      const Inputs in = make_inputs(c, seed_of(c.line));
      for (int64_t split : {int64_t{1}, int64_t{32}, c.t - 1}) {
        INFO(c.line, " split ", split);
        Case head = c, tail = c;
        head.t = split;
        tail.t = c.t - split;
        Inputs first = cut_tokens(c, in, 0, split), second = cut_tokens(c, in, split, c.t - split);
        const Outputs middle = run_once(with_op(head, CaseOp::kForward), first);
        second.s0 = middle.s;
        second.z0 = middle.z;
        const Outputs b = run_once(tail, second);
        first.ds = b.ds0;
        first.dz = b.dz0;
        const Outputs a = run_once(head, first);
        Outputs whole = a;  // dS0, dz0 are the head's
        const auto join = [&](Vector Outputs::*field, int64_t width) {
          (whole.*field).assign(static_cast<size_t>(c.b * c.t * width), 0);
          append_tokens(c, a.*field, split, 0, width, &(whole.*field));
          append_tokens(c, b.*field, c.t - split, split, width, &(whole.*field));
        };
        join(&Outputs::y, c.heads_q * c.e);
        join(&Outputs::norm, c.heads_q);
        join(&Outputs::dq, c.heads_q * c.d);
        join(&Outputs::dk, c.heads_kv * c.d);
        join(&Outputs::dv, c.heads_kv * c.e);
        join(&Outputs::dlog_g, c.heads_kv);
        CHECK(judge_all(c, whole, oracle(c, in), plain_versions(c, in, true)).problems == "");
      }
    }
  }
}

TEST_CASE("property: causal, bit for bit") {
  // Whatever comes later, NaN included, does not change an earlier output.
  for (const Case &c : variants("fwd", "b2 t67 h4/2 d16 p2 gated")) {
    const Inputs in = make_inputs(c, seed_of(c.line));
    const Outputs before = run_once(c, in);
    for (int64_t changed : {1, 17, 40, 66}) {
      INFO(c.line, " from token ", changed);
      Inputs other = in;
      Random random(static_cast<uint64_t>(changed));
      for (int64_t b = 0; b < c.b; ++b) {
        for (int64_t i = changed; i < c.t; ++i) {
          const int64_t row = b * c.t + i;
          for (int64_t x = 0; x < c.heads_q * c.d; ++x)
            other.q[row * c.heads_q * c.d + x] = round_to(c.dtype, random.normal());
          for (int64_t x = 0; x < c.heads_kv * c.d; ++x)
            other.k[row * c.heads_kv * c.d + x] = round_to(c.dtype, random.normal());
          for (int64_t x = 0; x < c.heads_kv * c.e; ++x)
            other.v[row * c.heads_kv * c.e + x] = round_to(c.dtype, 9 * random.normal());
          for (int64_t x = 0; x < c.heads_kv; ++x) other.log_g[row * c.heads_kv + x] = -3;
        }
      }
      const Outputs after = run_once(c, other);
      bool same = true, differs = false;
      for (int64_t b = 0; b < c.b; ++b) {
        for (int64_t i = 0; i < c.t; ++i) {
          for (int64_t x = 0; x < c.heads_q * c.e; ++x) {
            const int64_t at = (b * c.t + i) * c.heads_q * c.e + x;
            if (i < changed)
              same = same && before.y[at] == after.y[at];
            else
              differs = differs || before.y[at] != after.y[at];
          }
        }
      }
      CHECK(same);
      CHECK(differs);
    }
  }
}

TEST_CASE("property: the step is the forward, token by token") {
  for (const char *line : {"f32 b2 t23 h4/2 d16 p2 gated", "bf16 b2 t23 h2 d12 e20 p2 reset",
                           "f32 b1 t23 h2/1 d6 p3 unnorm gated rope-inter offset", "f16 b2 t23 h2 d8 p4 gated",
                           "f64 b2 t23 h6/3 d9 p2 gated rope-half rdim6 offset"}) {
    for (int64_t tokens : {1, 4, 23}) {
      const Case whole = parse_case(std::string("fwd ") + line + " state");
      INFO(whole.line, " tokens per step ", tokens);
      const Inputs in = make_inputs(whole, seed_of(line));
      Outputs stepped;
      stepped.y.resize(static_cast<size_t>(whole.b * whole.t * whole.heads_q * whole.e));
      Vector s = in.s0, z = in.z0;
      for (int64_t i = 0; i < whole.t; i += tokens) {
        Case c = with_op(whole, CaseOp::kStep);
        c.t = std::min(tokens, whole.t - i);
        Inputs part = cut_tokens(whole, in, i, c.t);
        part.s0 = s;
        part.z0 = z;
        part.num_slots = c.b;
        const Outputs out = run_once(c, part);
        append_tokens(whole, out.y, c.t, i, whole.heads_q * whole.e, &stepped.y);
        s = out.s;
        z = out.z;
      }
      stepped.s = s;
      stepped.z = z;
      CHECK(judge_all(whole, stepped, oracle(whole, in), plain_versions(whole, in, true)).problems == "");
    }
  }
}

TEST_CASE("property: with an even degree the sign of q and of k is lost") {
  for (const Case &c : variants("fwd", "b1 t67 h2 d16 p2 gated")) {
    INFO(c.line);
    Inputs in = make_inputs(c, seed_of(c.line));
    const Outputs plus = run_once(c, in);
    for (double &x : in.q) x = -x;
    CHECK(same_bits(run_once(c, in), plus));
    for (double &x : in.k) x = -x;
    CHECK(same_bits(run_once(c, in), plus));
  }
}

TEST_CASE("property: constant values come back") {
  for (const Case &c : variants("fwd", "b2 t131 h4/2 d16 p2 gated")) {
    INFO(c.line);
    Inputs in = make_inputs(c, seed_of(c.line));
    for (double &x : in.v) x = 1.5;
    const Outputs out = run_once(c, in), exact = oracle(c, in);
    std::vector<Outputs> plain = plain_versions(c, in, true);
    CHECK(judge_all(c, out, exact, plain).problems == "");
    for (double y : exact.y) REQUIRE(y == doctest::Approx(1.5).epsilon(1e-12));
  }
}

TEST_CASE("property: batch entries and heads commute with the operation, bit for bit") {
  for (const char *op : {"fwd", "bwd"}) {
    for (const Case &c : variants(op, "b3 t37 h3 d16 p2 gated")) {
      INFO(c.line);
      const Inputs in = make_inputs(c, seed_of(c.line));
      Inputs moved = in;
      const auto permute = [&](const Vector &x, int64_t width,
                               Vector *y) {  // entry b, head h -> (b + 1, h + 2)
        for (int64_t b = 0; b < 3; ++b)
          for (int64_t i = 0; i < c.t; ++i)
            for (int64_t h = 0; h < 3; ++h)
              for (int64_t w = 0; w < width; ++w) {
                (*y)[(((b + 1) % 3 * c.t + i) * 3 + (h + 2) % 3) * width + w] =
                    x[((b * c.t + i) * 3 + h) * width + w];
              }
      };
      permute(in.q, c.d, &moved.q);
      permute(in.k, c.d, &moved.k);
      permute(in.v, c.e, &moved.v);
      permute(in.log_g, 1, &moved.log_g);
      if (!in.dy.empty()) permute(in.dy, c.e, &moved.dy);
      const Outputs a = run_once(c, in), b = run_once(c, moved);
      Outputs expected = a;
      permute(a.y, c.e, &expected.y);
      permute(a.norm, 1, &expected.norm);
      if (!in.dy.empty()) {
        permute(a.dq, c.d, &expected.dq);
        permute(a.dk, c.d, &expected.dk);
        permute(a.dv, c.e, &expected.dv);
        permute(a.dlog_g, 1, &expected.dlog_g);
      }
      CHECK(same_bits(b, expected));
    }
  }
}

TEST_CASE("property: the same bits from every call and any number of threads") {
  for (const char *line : {"fwd f32 b2 t131 h4/2 d32 p2 gated state", "fwd bf16 b1 t257 h2 d32 p2 chunked c64",
                           "fwd f64 b1 t67 h2 d9 p2 attn", "bwd f32 b2 t131 h4/2 d32 p2 gated state",
                           "bwd f32 b1 t257 h2 d16 p2 chunked c32 gated", "bwd bf16 b1 t67 h2 d32 p2 attn",
                           "step f32 b3 t2 h4/2 d32 p2 gated", "step bf16 b3 t1 h2 d32 p2 bstate",
                           "sum f32 b2 t67 h2 d32 p2 gated"}) {
    INFO(line);
    Case c = parse_case(line);
    const Inputs in = make_inputs(c, 7);
    c.threads = 1;
    const Outputs first = run_once(c, in);
    for (int threads : {1, 2, 3, 8}) {
      c.threads = threads;
      CHECK(same_bits(run_once(c, in), first));
    }
  }
}

TEST_CASE("property: a packed sequence gives what it gives alone") {
  for (const char *op : {"fwd", "bwd"}) {
    const Case c =
        parse_case(std::string(op) + " f32 seq17,0,1,64 pad5 h4/2 d16 p2 gated state rope-half offset");
    const Inputs in = make_inputs(c, 11);
    const Outputs all = run_once(c, in);
    for (int64_t n = 0; n < c.count(); ++n) {
      Case one = c;
      one.packed = false;
      one.b = 1;
      one.t = c.sequences[n];
      Inputs alone;
      const int64_t start = in.cu_seqlens[n], rows = embedding(c.d, c.p).rows();
      const auto cut = [&](const Vector &x, int64_t width) {
        return x.empty() ? Vector() : Vector(x.begin() + start * width, x.begin() + (start + one.t) * width);
      };
      alone.q = cut(in.q, c.heads_q * c.d);
      alone.k = cut(in.k, c.heads_kv * c.d);
      alone.v = cut(in.v, c.heads_kv * c.e);
      alone.log_g = cut(in.log_g, c.heads_kv);
      alone.dy = cut(in.dy, c.heads_q * c.e);
      alone.offset = {in.offset[n]};
      alone.s0 = part(in.s0, n, c.heads_kv * rows * c.e);
      alone.z0 = part(in.z0, n, c.heads_kv * rows);
      alone.ds = part(in.ds, n, c.heads_kv * rows * c.e);
      alone.dz = part(in.dz, n, c.heads_kv * rows);
      const Outputs a = run_once(one, alone);
      INFO(op, " sequence ", n);
      Outputs mine;
      mine.y = cut(all.y, c.heads_q * c.e);
      mine.norm = cut(all.norm, c.heads_q);
      if (c.op == CaseOp::kForward) {
        mine.s = part(all.s, n, c.heads_kv * rows * c.e);
        mine.z = part(all.z, n, c.heads_kv * rows);
      } else {
        mine.dq = cut(all.dq, c.heads_q * c.d);
        mine.dk = cut(all.dk, c.heads_kv * c.d);
        mine.dv = cut(all.dv, c.heads_kv * c.e);
        mine.dlog_g = cut(all.dlog_g, c.heads_kv);
        mine.ds0 = part(all.ds0, n, c.heads_kv * rows * c.e);
        mine.dz0 = part(all.dz0, n, c.heads_kv * rows);
      }
      CHECK(both_near(one, alone, a, mine) == "");
    }
    bool zero = true;
    for (int64_t i = in.cu_seqlens.back(); i < c.t; ++i) {
      for (int64_t x = 0; x < c.heads_q * c.e; ++x) zero = zero && all.y[i * c.heads_q * c.e + x] == 0;
    }
    CHECK(zero);
  }
}

TEST_CASE("property: gradients are directional derivatives") {
  // (L(x + h dx) - L(x - h dx)) / 2h in float64 against <gradient, dx>, for each input and the initial state.
  for (const char *line :
       {"f64 b2 t19 h4/2 d6 e5 p2 gated state", "f64 b1 t19 h2 d5 p3 unnorm gated state",
        "f64 b1 t19 h2/1 d4 p4 gated state eps0.1", "f64 b1 t23 h2 d8 p2 gated rope-inter rdim6 offset state",
        "f64 seq5,0,11 h2 d6 p2 gated state", "f64 b1 t40 h2 d6 p2 gated state chunked c8",
        "f64 b1 t40 h2 d6 p2 gated attn"}) {
    const Case c = parse_case(std::string("bwd ") + line);
    const Case forward = with_op(c, CaseOp::kForward);
    const Inputs in = make_inputs(c, seed_of(line));
    const Outputs gradient = run_once(c, in);
    const auto loss = [&](const Inputs &x) {
      const Outputs out = run_once(forward, x);
      double sum = 0;
      for (size_t i = 0; i < out.y.size(); ++i) sum += out.y[i] * in.dy[i];
      for (size_t i = 0; i < in.ds.size(); ++i) sum += out.s[i] * in.ds[i];
      for (size_t i = 0; i < in.dz.size(); ++i) sum += out.z[i] * in.dz[i];
      return sum;
    };
    const struct {
      const char *name;
      Vector Inputs::*input;
      const Vector *gradient;
    } parts[] = {{"q", &Inputs::q, &gradient.dq},    {"k", &Inputs::k, &gradient.dk},
                 {"v", &Inputs::v, &gradient.dv},    {"log_g", &Inputs::log_g, &gradient.dlog_g},
                 {"S0", &Inputs::s0, &gradient.ds0}, {"z0", &Inputs::z0, &gradient.dz0}};
    for (const auto &one : parts) {
      if ((in.*one.input).empty()) continue;
      if (std::string(one.name) == "z0" && !c.normalize) continue;
      INFO(line, " ", one.name);
      Random random(3);
      Vector direction;
      double expected = 0, norm = 0;
      for (double g : *one.gradient) {
        direction.push_back(random.normal());
        expected += g * direction.back();
        norm += g * g;
      }
      // Two step sizes: a central difference errs by O(h^2), so the ratio of the errors is 4 where it is not
      // yet rounding. Richardson removes that term.
      const auto difference = [&](double h) {
        Inputs plus = in, minus = in;
        for (size_t i = 0; i < direction.size(); ++i) {
          (plus.*one.input)[i] += h * direction[i];
          (minus.*one.input)[i] -= h * direction[i];
        }
        return (loss(plus) - loss(minus)) / (2 * h);
      };
      const double h = 1e-4, coarse = difference(2 * h), fine = difference(h);
      const double derivative = (4 * fine - coarse) / 3;
      // What is left: O(h^4) and rounding of the losses over h; the scale is the gradient's own length.
      CHECK(std::fabs(derivative - expected) <= 1e-6 * std::sqrt(norm) + std::fabs(fine - coarse));
    }
  }
}
