// SPDX-License-Identifier: Apache-2.0
// States as users hold them: order of the rows, folding segments, conversion, saving, and pools.
#include <algorithm>
#include <cstdio>

#include "doctest/doctest.h"
#include "expect.h"

using namespace powerattn_test;

namespace {

Memory memory;

int64_t rows_of(const Case &c) { return embedding(c.d, c.p).rows(); }

// States of `n` sequences with their total log gates.
struct Segment {
  Vector s, z, total;
};

Segment random_segment(const Case &c, Random *random) {
  Segment x;
  random_states(c, random, c.count(), &x.s, &x.z);
  for (int64_t i = 0; i < c.count() * c.heads_kv; ++i)
    x.total.push_back(round_to(stat_dtype(c), -std::fabs(random->normal())));
  return x;
}

// Folds through the library; the segments lie one after another in one buffer.
Segment compose(const Case &c, const std::vector<Segment> &segments, bool reversed = false) {
  const Plan plan(c.desc());
  const int64_t n = static_cast<int64_t>(segments.size()), rows = rows_of(c), heads = c.heads_kv,
                sequences = c.count();
  const int64_t s_size = sequences * heads * rows * c.e, z_size = sequences * heads * rows,
                g_size = sequences * heads;
  Tensor s(memory, state_dtype(c), {1, 1, 1, std::max<int64_t>(n, 1) * s_size}, {0, 0, 0});
  Tensor z(memory, state_dtype(c), {1, 1, 1, std::max<int64_t>(n, 1) * z_size}, {0, 0, 0});
  Tensor g(memory, stat_dtype(c), {1, 1, 1, std::max<int64_t>(n, 1) * g_size}, {0, 0, 0});
  if (n > 0) {
    Vector all_s, all_z, all_g;
    for (const Segment &x : segments) {
      all_s.insert(all_s.end(), x.s.begin(), x.s.end());
      all_z.insert(all_z.end(), x.z.begin(), x.z.end());
      all_g.insert(all_g.end(), x.total.begin(), x.total.end());
    }
    s.put(all_s);
    z.put(all_z);
    g.put(all_g);
  }
  State out(memory, c, sequences, rows);
  Tensor total(memory, stat_dtype(c), {1, 1, 1, g_size}, {0, 0, 0});
  // A negative stride walks from the last segment to the first.
  const int64_t first = reversed && n > 0 ? n - 1 : 0, sign = reversed ? -1 : 1;
  const auto at = [&](const Tensor &t, int32_t dtype, int64_t element) {
    return static_cast<char *>(t.data()) + element * static_cast<int64_t>(bytes_of(dtype));
  };
  powerattn_compose_args a = {};
  a.struct_size = sizeof a;
  a.count = n;
  a.segments = {at(s, state_dtype(c), first * s_size),
                at(z, state_dtype(c), first * z_size),
                heads * rows * c.e,
                rows * c.e,
                heads * rows,
                rows};
  a.s_stride_segment = sign * s_size;
  a.z_stride_segment = sign * z_size;
  a.log_g = at(g, stat_dtype(c), first * g_size);
  a.log_g_stride_segment = sign * g_size;
  a.log_g_stride_n = heads;
  a.log_g_stride_h = 1;
  a.out = out.arg();
  a.out_log_g = total.data();
  must(powerattn_state_compose(plan, &a), "state_compose");
  Segment result;
  out.take("out", &result.s, &result.z);
  result.total = total.take("out_log_g");
  return result;
}

// What composing must give, in float64.
Segment compose_exactly(const Case &c, const std::vector<Segment> &segments) {
  const int64_t rows = rows_of(c), states = c.count() * c.heads_kv;
  Segment out;
  out.s.assign(static_cast<size_t>(states * rows * c.e), 0);
  out.z.assign(static_cast<size_t>(states * rows), 0);
  out.total.assign(static_cast<size_t>(states), 0);
  for (const Segment &x : segments) {
    for (int64_t i = 0; i < states; ++i) {
      const double decay = std::exp(x.total[i]);
      for (int64_t j = 0; j < rows * c.e; ++j)
        out.s[i * rows * c.e + j] = decay * out.s[i * rows * c.e + j] + x.s[i * rows * c.e + j];
      for (int64_t j = 0; j < rows; ++j) out.z[i * rows + j] = decay * out.z[i * rows + j] + x.z[i * rows + j];
      out.total[i] += x.total[i];
    }
  }
  return out;
}

double largest_difference(const Vector &a, const Vector &b) { return distance(a, b).largest; }
double largest(const Vector &a) { return distance(a, Vector(a.size(), 0.0)).largest; }

Vector convert(const Case &c, const Vector &s, const Vector &z, int64_t slots, int32_t to,
               const std::vector<int64_t> &src_slots, const std::vector<int64_t> &dst_slots, int64_t count,
               Vector *z_out) {
  const Plan plan(c.desc());
  Case other = c;
  other.bf16_state = to == POWERATTN_BFLOAT16;
  State src(memory, c, slots, rows_of(c)), dst(memory, other, slots, rows_of(c));
  src.put(s, z);
  const Buffer from = indices(memory, src_slots), into = indices(memory, dst_slots);
  powerattn_convert_args a = {};
  a.struct_size = sizeof a;
  a.dst_dtype = to;
  a.src = src.arg();
  a.dst = dst.arg();
  a.count = count;
  a.src_slots = static_cast<const int64_t *>(from.data());
  a.dst_slots = static_cast<const int64_t *>(into.data());
  a.src_num_slots = a.dst_num_slots = slots;
  must(powerattn_state_convert(plan, &a), "state_convert");
  Vector out;
  dst.take("dst", &out, z_out);
  return out;
}

}  // namespace

TEST_CASE("state: phi(q) . phi(k) = (q . k)^p through the documented order") {
  Random random(5);
  const int64_t shapes[][2] = {{1, 1},  {1, 8},  {2, 8},  {3, 6},  {5, 3},  {7, 4}, {9, 5},
                               {16, 4}, {33, 2}, {64, 1}, {64, 2}, {40, 3}, {4, 7}};
  for (const auto &shape : shapes) {
    const int64_t d = shape[0];
    const int32_t p = static_cast<int32_t>(shape[1]);
    INFO("d ", d, " p ", p);
    int64_t rows = 0;
    must(powerattn_state_rows(d, p, &rows), "state_rows");
    REQUIRE(rows == embedding(d, p).rows());
    const Vector q = random.normals(d, 0, 1, POWERATTN_FLOAT64), k = random.normals(d, 0, 1, POWERATTN_FLOAT64);
    double sum = 0, magnitude = 0;
    int32_t before[8] = {};
    for (int64_t r = 0; r < rows; ++r) {
      int32_t index[8] = {};
      double weight = 0;
      must(powerattn_state_monomial(d, p, r, index, &weight), "state_monomial");
      double a = weight, b = weight;
      for (int m = 0; m < p; ++m) {
        REQUIRE(index[m] >= (m ? index[m - 1] : 0));
        REQUIRE(index[m] < d);
        a *= q[index[m]];
        b *= k[index[m]];
      }
      if (r > 0) REQUIRE(std::lexicographical_compare(before, before + p, index, index + p));
      std::copy(index, index + p, before);
      REQUIRE(weight == doctest::Approx(embedding(d, p).weight[r]).epsilon(1e-14));
      sum += a * b;
      magnitude += std::fabs(a * b);
    }
    const double expected = int_power(dot(q.data(), k.data(), d), p);
    CHECK(std::fabs(sum - expected) <= static_cast<double>(rows + p) * 0x1p-52 * magnitude);
  }
}

TEST_CASE("state: the rows that a summary writes are in the documented order") {
  for (const char *line :
       {"sum f64 b1 t1 h1 d6 e2 p2", "sum f64 b1 t1 h1 d5 e1 p3 unnorm", "sum f64 b1 t1 h1 d9 e3 p4"}) {
    const Case c = parse_case(line);
    Inputs in = make_inputs(c, 3);
    const Outputs out = run(memory, c, in, Plan(c.desc()));
    INFO(line);
    for (int64_t r = 0; r < rows_of(c); ++r) {
      int32_t index[8];
      double weight;
      must(powerattn_state_monomial(c.d, c.p, r, index, &weight), "state_monomial");
      double phi = weight;
      for (int m = 0; m < c.p; ++m) phi *= in.k[index[m]];
      CHECK(std::fabs(out.z[r] - phi) <= (c.p + 3) * 0x1p-52 * std::fabs(phi));
      for (int64_t x = 0; x < c.e; ++x) {
        CHECK(std::fabs(out.s[r * c.e + x] - phi * in.v[x]) <= (c.p + 4) * 0x1p-52 * std::fabs(phi * in.v[x]));
      }
    }
  }
}

TEST_CASE("state: composing is right, associative, and honours negative strides") {
  for (const char *line : {"sum f32 b2 t1 h2 d8 e5 p2", "sum f64 b1 t1 h3 d5 p3 unnorm",
                           "sum f32 b1 t1 h1 d64 p2", "sum bf16 b2 t1 h2 d8 p2 wide"}) {
    const Case c = parse_case(line);
    INFO(line);
    Random random(seed_of(line));
    const Segment a = random_segment(c, &random), b = random_segment(c, &random),
                  d = random_segment(c, &random);
    const Segment exact = compose_exactly(c, {a, b, d}), all = compose(c, {a, b, d});
    const double u = unit_roundoff(state_dtype(c));
    // One rounding when all are folded at once, two (and a decay in between) when folded in pairs.
    CHECK(largest_difference(all.s, exact.s) <= 2 * u * largest(exact.s));
    CHECK(largest_difference(all.z, exact.z) <= 2 * u * largest(exact.z));
    CHECK(largest_difference(all.total, exact.total) <=
          2 * unit_roundoff(stat_dtype(c)) * largest(exact.total));
    const Segment left = compose(c, {compose(c, {a, b}), d}), right = compose(c, {a, compose(c, {b, d})});
    CHECK(largest_difference(left.s, exact.s) <= 6 * u * largest(exact.s));
    CHECK(largest_difference(right.s, exact.s) <= 6 * u * largest(exact.s));
    CHECK(largest_difference(left.z, right.z) <= 12 * u * largest(exact.z));
    const Segment backwards = compose(c, {d, b, a}, true);
    CHECK(backwards.s == all.s);
    CHECK(backwards.z == all.z);
    const Segment nothing = compose(c, {});
    CHECK(largest(nothing.s) == 0);
    CHECK(largest(nothing.total) == 0);
    const Segment one = compose(c, {a});
    CHECK(one.s == a.s);
    // A reset in a later segment forgets the earlier ones, even an Inf.
    Segment poisoned_state = a, reset = b;
    poisoned_state.s[0] = std::numeric_limits<double>::infinity();
    for (double &g : reset.total) g = -std::numeric_limits<double>::infinity();
    CHECK(compose(c, {poisoned_state, reset}).s == b.s);
  }
}

TEST_CASE("state: summaries of segments fold to the pass over the whole, forward and backward") {
  for (const char *rest : {"f32 b2 t60 h4/2 d12 e10 p2 gated rope-half offset",
                           "f64 b1 t60 h2 d6 p3 unnorm gated", "bf16 b1 t60 h2 d16 p2 reset"}) {
    const Case whole = parse_case(std::string("bwd ") + rest + " state");
    INFO(rest);
    Inputs in = make_inputs(whole, seed_of(rest));
    // The whole pass: from no state, no gradient of the final state.
    in.s0.clear();
    in.z0.clear();
    in.ds.clear();
    in.dz.clear();
    const Outputs exact = oracle(whole, in);
    const std::vector<Outputs> plain = plain_versions(whole, in, true);
    const int64_t cuts[] = {0, 13, 13, 40, 60};
    const int64_t width_q = whole.heads_q;
    Outputs joined;
    joined.y.resize(exact.y.size());
    joined.norm.resize(exact.norm.size());
    joined.dq.resize(exact.dq.size());
    joined.dk.resize(exact.dk.size());
    joined.dv.resize(exact.dv.size());
    joined.dlog_g.resize(exact.dlog_g.size());
    const auto segment_inputs = [&](int64_t first, int64_t count) {
      Inputs out;
      const auto cut = [&](const Vector &x, int64_t width) {
        Vector y;
        for (int64_t b = 0; b < whole.b && !x.empty(); ++b) {
          y.insert(y.end(), x.begin() + (b * whole.t + first) * width,
                   x.begin() + (b * whole.t + first + count) * width);
        }
        return y;
      };
      out.q = cut(in.q, whole.heads_q * whole.d);
      out.k = cut(in.k, whole.heads_kv * whole.d);
      out.v = cut(in.v, whole.heads_kv * whole.e);
      out.log_g = cut(in.log_g, whole.heads_kv);
      out.dy = cut(in.dy, whole.heads_q * whole.e);
      for (int64_t b = 0; b < whole.b && whole.rope; ++b) out.offset.push_back(in.offset[b] + first);
      return out;
    };
    const auto put = [&](const Vector &part, int64_t first, int64_t count, int64_t width, Vector *to) {
      for (int64_t b = 0; b < whole.b; ++b) {
        std::copy(part.begin() + b * count * width, part.begin() + (b + 1) * count * width,
                  to->begin() + (b * whole.t + first) * width);
      }
    };
    std::vector<Segment> forward, reverse;
    std::vector<Inputs> inputs;
    std::vector<Case> cases;
    for (int i = 0; i < 4; ++i) {
      Case c = whole;
      c.t = cuts[i + 1] - cuts[i];
      c.op = CaseOp::kSummary;
      inputs.push_back(segment_inputs(cuts[i], c.t));
      const Outputs out = run(memory, c, inputs.back(), Plan(c.desc()));
      forward.push_back({out.s, out.z, out.total});
      cases.push_back(c);
    }
    // Each segment's initial state is the fold of those before it.
    for (int i = 0; i < 4; ++i) {
      Case c = cases[i];
      const Segment initial = compose(c, std::vector<Segment>(forward.begin(), forward.begin() + i));
      inputs[i].s0 = initial.s;
      inputs[i].z0 = initial.z;
      c.op = CaseOp::kForward;
      const Outputs out = run(memory, c, inputs[i], Plan(c.desc()));
      put(out.y, cuts[i], c.t, width_q * whole.e, &joined.y);
      put(out.norm, cuts[i], c.t, width_q, &joined.norm);
      Inputs r = inputs[i];
      r.s0.clear();
      r.z0.clear();
      r.y = out.y;
      r.norm = out.norm;
      c.op = CaseOp::kSummaryReverse;
      const Outputs summary = run(memory, c, r, Plan(c.desc()));
      reverse.push_back({summary.ds0, summary.dz0, summary.total});
    }
    for (int i = 0; i < 4; ++i) {
      Case c = cases[i];
      // Segments after i, last first.
      const Segment after = compose(c, std::vector<Segment>(reverse.begin() + i + 1, reverse.end()), true);
      Inputs b = inputs[i];
      b.ds = after.s;
      b.dz = after.z;
      c.op = CaseOp::kBackward;
      const Outputs out = run(memory, c, b, Plan(c.desc()));
      put(out.dq, cuts[i], c.t, width_q * whole.d, &joined.dq);
      put(out.dk, cuts[i], c.t, whole.heads_kv * whole.d, &joined.dk);
      put(out.dv, cuts[i], c.t, whole.heads_kv * whole.e, &joined.dv);
      put(out.dlog_g, cuts[i], c.t, whole.heads_kv, &joined.dlog_g);
    }
    CHECK(judge_all(whole, joined, exact, plain).problems == "");
  }
}

TEST_CASE("state: conversion rounds to nearest, keeps what it should, and honours slots") {
  const Case c = parse_case("sum f32 b3 t1 h2 d8 e5 p2 wide");
  Random random(9);
  Vector s, z, z_out;
  random_states(c, &random, 3, &s, &z);
  s[0] = std::numeric_limits<double>::infinity();
  s[1] = std::numeric_limits<double>::quiet_NaN();
  s[2] = -0.0;
  s[3] = 1 + 0x1p-8;  // a tie: to even
  s[4] = 1 + 3 * 0x1p-8;
  const Vector bf16 = convert(c, s, z, 3, POWERATTN_BFLOAT16, {}, {}, 3, &z_out);
  for (size_t i = 0; i < s.size(); ++i) {
    if (i == 1)
      CHECK(std::isnan(bf16[i]));
    else
      CHECK(bf16[i] == round_to(POWERATTN_BFLOAT16, s[i]));
  }
  for (size_t i = 0; i < z.size(); ++i) CHECK(z_out[i] == round_to(POWERATTN_BFLOAT16, z[i]));

  const int64_t size = static_cast<int64_t>(s.size()) / 3;
  const Vector moved = convert(c, s, z, 3, 0, {2, -1, 0}, {0, 1, 2}, 3, &z_out);  // slot 1 is skipped
  CHECK(Vector(moved.begin(), moved.begin() + size) == Vector(s.begin() + 2 * size, s.end()));
  CHECK(std::memcmp(&moved[2 * size], &s[0], 8) == 0);
  CHECK(std::isnan(moved[size]));  // still the poison
}

TEST_CASE("state: pack and unpack") {
  for (const char *line :
       {"sum f32 b3 t1 h2 d8 e5 p2 wide", "sum f64 b1 t1 h1 d5 p3 unnorm", "step bf16 b2 t1 h2 d8 p2 bstate"}) {
    const Case c = parse_case(line);
    INFO(line);
    const Plan plan(c.desc());
    Random random(4);
    Vector s, z;
    random_states(c, &random, c.b, &s, &z);
    State state(memory, c, c.b, rows_of(c));
    state.put(s, z);
    uint64_t bytes = 0;
    must(powerattn_state_pack_size(plan, 0, c.b, &bytes), "pack_size");
    CHECK(bytes == 64 + bytes_of(state_dtype(c)) * (s.size() + z.size()));
    std::vector<unsigned char> block(bytes, 0xcd);
    powerattn_pack_args a = {};
    a.struct_size = sizeof a;
    a.state = state.arg();
    a.count = c.b;
    a.packed = block.data();
    a.packed_bytes = bytes;
    must(powerattn_state_pack(plan, &a), "pack");
    CHECK(std::memcmp(block.data(), "PWRATTN", 7) == 0);
    // The documented payload: per state and kv head z, then S.
    const size_t element = bytes_of(state_dtype(c));
    const int64_t rows = rows_of(c);
    size_t at = 64;
    bool right = true;
    for (int64_t i = 0; i < c.b * c.heads_kv; ++i) {
      for (int64_t r = 0; r < rows; ++r, at += element) {
        right = right && decode(state_dtype(c), reinterpret_cast<const char *>(&block[at])) == z[i * rows + r];
      }
      for (int64_t r = 0; r < rows * c.e; ++r, at += element) {
        right = right &&
                decode(state_dtype(c), reinterpret_cast<const char *>(&block[at])) == s[i * rows * c.e + r];
      }
    }
    CHECK(right);

    State back(memory, c, c.b, rows);
    powerattn_pack_args b = a;
    b.state = back.arg();
    must(powerattn_state_unpack(plan, &b), "unpack");
    Vector s_back, z_back;
    back.take("unpacked", &s_back, &z_back);
    CHECK(s_back == s);
    CHECK(z_back == z);

    // Any difference is refused before anything is written.
    const auto refused = [&](const powerattn_plan *with, const powerattn_pack_args &args,
                             powerattn_status expected) {
      State untouched(memory, c, c.b, rows);
      powerattn_pack_args x = args;
      x.state = untouched.arg();
      CHECK(powerattn_state_unpack(with, &x) == expected);
      CHECK(std::string(powerattn_last_error()) != "");
      Vector s_now, z_now;
      untouched.take("refused", &s_now, &z_now);
      CHECK(std::all_of(s_now.begin(), s_now.end(), [](double v) { return std::isnan(v); }));
    };
    block[8] ^= 2;  // the version
    refused(plan, b, POWERATTN_ERROR_VERSION);
    block[8] ^= 2;
    block[0] = 'Q';
    refused(plan, b, POWERATTN_ERROR_INVALID_ARGUMENT);
    block[0] = 'P';
    b.packed_bytes = bytes - 1;
    refused(plan, b, POWERATTN_ERROR_INVALID_ARGUMENT);
    b.packed_bytes = bytes;
    Case wider = c;
    wider.d += 1;
    refused(Plan(wider.desc()), b, POWERATTN_ERROR_INVALID_ARGUMENT);
  }
}

TEST_CASE("state: a saved float32 state continues as bfloat16 and back") {
  const Case c = parse_case("sum f32 b2 t1 h2 d8 p2");
  const Plan plan(c.desc());
  Random random(4);
  Vector s, z, s_back, z_back;
  random_states(c, &random, c.b, &s, &z);
  State state(memory, c, c.b, rows_of(c)), back(memory, c, c.b, rows_of(c));
  state.put(s, z);
  uint64_t bytes = 0;
  must(powerattn_state_pack_size(plan, POWERATTN_BFLOAT16, c.b, &bytes), "pack_size");
  std::vector<unsigned char> block(bytes);
  powerattn_pack_args a = {};
  a.struct_size = sizeof a;
  a.dtype = POWERATTN_BFLOAT16;
  a.state = state.arg();
  a.count = c.b;
  a.packed = block.data();
  a.packed_bytes = bytes;
  must(powerattn_state_pack(plan, &a), "pack");
  a.state = back.arg();
  must(powerattn_state_unpack(plan, &a), "unpack");
  back.take("unpacked", &s_back, &z_back);
  for (double &x : s) x = round_to(POWERATTN_BFLOAT16, x);
  CHECK(s_back == s);
}

TEST_CASE("state: padded tokens and skipped slots never touch a state") {
  Case c = parse_case("step f32 b4 t5 h4/2 d8 p2 gated slots lengths");
  Inputs in = make_inputs(c, 21);
  in.slots = {6, -1, 0, 3};
  in.lengths = {2, 5, 0, 5};
  // NaN in every padded token.
  for (int64_t b = 0; b < c.b; ++b) {
    for (int64_t i = in.slots[b] < 0 ? 0 : in.lengths[b]; i < c.t; ++i) {
      const double nan = std::numeric_limits<double>::quiet_NaN();
      for (int64_t x = 0; x < c.heads_q * c.d; ++x) in.q[(b * c.t + i) * c.heads_q * c.d + x] = nan;
      for (int64_t x = 0; x < c.heads_kv * c.d; ++x) in.k[(b * c.t + i) * c.heads_kv * c.d + x] = nan;
      for (int64_t x = 0; x < c.heads_kv * c.e; ++x) in.v[(b * c.t + i) * c.heads_kv * c.e + x] = nan;
      for (int64_t x = 0; x < c.heads_kv; ++x) in.log_g[(b * c.t + i) * c.heads_kv + x] = nan;
    }
  }
  const Outputs out = run(memory, c, in, Plan(c.desc()));
  const int64_t size = c.heads_kv * rows_of(c) * c.e;
  for (int64_t slot = 0; slot < in.num_slots; ++slot) {
    INFO("slot ", slot);
    const bool stepped = slot == 6 || slot == 3;
    CHECK((part(out.s, slot, size) == part(in.s0, slot, size)) == !stepped);
  }
  for (int64_t b = 0; b < c.b; ++b) {
    for (int64_t i = 0; i < c.t; ++i) {
      const bool valid = in.slots[b] >= 0 && i < in.lengths[b];
      for (int64_t x = 0; x < c.heads_q * c.e; ++x) {
        const double y = out.y[(b * c.t + i) * c.heads_q * c.e + x];
        REQUIRE(valid ? std::isfinite(y) : y == 0);
      }
    }
  }
}
