// SPDX-License-Identifier: Apache-2.0
#include "sm90_plan.h"

#include <algorithm>
#include <cinttypes>

#include "kernels/cuda/chunks.h"
#include "kernels/cuda/tiles.h"
#include "text.h"

namespace powerattn::cuda::sm90 {
namespace {

const char kNotMeasured[] = "not yet run on a device (POWERATTN_CUDA_IMPLEMENTATION=cuda.sm90.next tries it)";

// The features that a problem needs and a row does not offer, as words; empty: none.
std::string missing(const Problem &p, const Features &f) {
  std::string text;
  const auto need = [&](bool needed, bool offered, const char *what) {
    if (needed && !offered) text += (text.empty() ? "" : ", ") + std::string(what);
  };
  need(p.use_state, f.states, "initial and final states");
  need(p.head_dim == 128, f.d128, "head_dim 128");
  need(with_rope(p), f.rope, "rotary embedding");
  need(p.dtype == Dtype::kFloat16, f.half, "float16");
  return text;
}

// Executed rates (multiply-adds counted twice) of the kernels of one head_dim, each alone.
struct Rates {
  double intra;           // output: two products per pair of tokens
  double state;           // output: phi(q) S
  double update;          // update: phi(k)^T v
  double joint;           // dq, dk and dv of the attention form in one pass: five products
  double gradient;        // dq, dk and dv inside a chunk: seven products
  double gradient_state;  // their parts of the state
};
// Measured on an H100 and an H200 with 132 multiprocessors, at the lengths where forms cross
// (docs/performance-log.md).
constexpr Rates kRates64 = {600e12, 620e12, 460e12, 470e12, 480e12, 455e12};
constexpr Rates kRates128 = {680e12, 740e12, 630e12, 580e12, 560e12, 530e12};
constexpr double kBandwidth = 3.2e12, kScanBandwidth = 4.0e12;
constexpr double kLaunch = 3e-6;

// Most bytes of the sums of dq of one pass, for one sequence and key head at a time, have to
// stay in the L2 cache: two passes were faster with 33 MB of them, one with 17 MB (docs/performance-log.md).
constexpr int64_t kMostSums = int64_t(24) << 20;

// chunk = 0: attention form. Padded state rows; a row tile sees half of the span and, on average, half of
// itself.
Cost cost(const Problem &p, int64_t chunk, int sms) {
  const Rates &rate = p.head_dim == 128 ? kRates128 : kRates64;
  const double speed = static_cast<double>(std::max(sms, 1)) / kReferenceSms;
  const double d = static_cast<double>(p.head_dim), t = static_cast<double>(p.max_seq_len);
  const double total = static_cast<double>(p.batch) * static_cast<double>(p.seq_len);
  const double q = total * static_cast<double>(p.heads_q), kv = total * static_cast<double>(p.heads_kv);
  const double span = (chunk > 0 ? std::min(static_cast<double>(chunk), t) : t) / 2;
  const double io = 4 * d * (q + kv) / (kBandwidth * speed);  // q, k, v, y once
  Cost c;
  c.forward = std::max(q * (span + 64) * 4 * d / (rate.intra * speed), io) + 4 * kLaunch;
  if (in_one_pass(p, chunk > 0))
    c.backward = q * (span + 64) * 10 * d / (rate.joint * speed) + io;
  else  // three products for dq, four for dk and dv
    c.backward = q * (span + 64) * 14 * d / (rate.gradient * speed) + io;
  c.backward += 8 * kLaunch;
  if (with_rope(p)) {  // q and k read and written; backward also their gradients, float32 into bfloat16
    c.forward += io + 2 * kLaunch;
    c.backward += 3 * io + 4 * kLaunch;
  }
  if (chunk > 0) {
    const double rows = tile_rows(p.degree, static_cast<int>(p.head_dim));
    const double pass = kv / static_cast<double>(chunk) * rows * d * 2 / (kScanBandwidth * speed);
    const double update = 2 * rows * d / (rate.update * speed);
    // States are written, then read and written by the scan, which backward also reads S.
    c.forward += kv * update + q * 2 * rows * d / (rate.state * speed) + 3 * pass + 3 * kLaunch;
    c.backward +=
        q * update + (q + 2 * kv) * 2 * rows * d / (rate.gradient_state * speed) + 4 * pass + 4 * kLaunch;
  }
  return c;
}

// The state's traffic against the work inside a chunk is flat around 1024 for d = 64, 2048 for d = 128. Shorter
// when that would leave multiprocessors without a slice of a state's tiles (3 of 12, 23 of 6).
int64_t automatic_chunk(const Problem &p, int sms) {
  int64_t chunk = p.head_dim == 128 ? 2048 : 1024;
  const int64_t slices = p.head_dim == 128 ? 23 : 3;
  while (chunk > 256 && p.batch * (p.seq_len / chunk) * p.heads_kv * slices < sms) chunk /= 2;
  return chunk;
}

}  // namespace

bool in_one_pass(const Problem &p, bool chunks) {
  return !chunks && p.degree > 1 && p.max_seq_len * p.head_dim * p.group() <= kMostSums / 4;
}

bool choose(const Features &features, Op op, const Problem &p, const Pins &pins, Tiling *tiling,
            std::string *why) {
  auto no = [&](const char *reason) {
    *why = reason;
    return false;
  };
  if (op == Op::kStep || op == Op::kSummary) return no("forward and backward only");
  const bool half = p.dtype == Dtype::kFloat16;
  if (!half && p.dtype != Dtype::kBfloat16) return no("bfloat16 and float16 only");
  if (p.head_dim != p.value_dim || (p.head_dim != 64 && p.head_dim != 128))
    return no("head_dim = value_dim of 64 or 128 only");
  if (p.degree != 1 && p.degree != 2 && p.degree != 4) return no("degrees 1, 2 and 4 only");
  if (p.use_state && p.state_dtype != Dtype::kFloat32) return no("float32 states only");
  if (p.use_state && p.degree != 2) return no("states of degree 2 only");
  const DeviceProperties *const device = device_of(p);
  if (device == nullptr || device->major != 9 || device->minor != 0)
    return no("needs a device of compute capability 9.0 (its instructions exist nowhere else)");
  if (device->sm_count < 3) return no("needs three multiprocessors");
  const char *no_chunks = p.degree == 2 ? nullptr
                          : p.degree == 1
                              ? "no chunked form of degree 1: its row norms would miss the part of the state"
                              : "chunked form for degree 2 only";
  const bool pinned = pins.form == POWERATTN_FORM_CHUNKED;
  if (no_chunks && pinned) return no(no_chunks);
  if (p.use_state && no_chunks) return no(no_chunks);
  if (p.use_state && pins.form == POWERATTN_FORM_ATTENTION) return no("states need the chunked form");
  if (const std::string unmeasured = missing(p, features); !unmeasured.empty())
    return no((unmeasured + ": " + kNotMeasured).c_str());

  const int sms = device->sm_count;
  const int64_t chunk = pins.chunk > 0 ? pins.chunk : automatic_chunk(p, sms);
  // A degree whose chunked form runs elsewhere is only taken here where the attention form wins.
  if (p.degree == 1 && pins.form == POWERATTN_FORM_AUTO && p.max_seq_len > 1024) return no(no_chunks);
  *tiling = choose_form(p, pins, chunk, no_chunks == nullptr, cost, sms);
  return true;
}

void describe(const Problem &p, const Tiling &t, std::string *text) {
  if (const std::string unmeasured = missing(p, kMeasured); !unmeasured.empty())
    text->append("  NOT YET RUN ON A DEVICE: " + unmeasured + "; checked in emulation only\n");
  const bool wide = p.head_dim == 128;
  text->append(
      "  wgmma m64n64k16 and m64n128k16, one producer and two consumer warpgroups, persistent blocks\n"
      "    output: 256 rows (4 x m64; a state tile from L2 serves 256 rows, so L2 gives 1/256 byte per "
      "FLOP);\n");
  text->append(
      wide
          ? "      q is the A operand in shared memory (sums of 2 x 64 x 128 fill 128 registers); 64 KB q + 4\n"
            "      stages x 32 KB + 16 KB y + meta = 213 KB\n"
          : "      A in registers; 32 KB q + 8 stages x 16 KB + 16 KB y + meta = 181 KB\n");
  if (in_one_pass(p, chunked(t)))
    text->append(wide ? "    dq, dk and dv in one pass: 128 keys (2 x m64), 64 queries a stage; 216 KB\n"
                      : "    dq, dk and dv in one pass: 128 keys (2 x m64), 64 queries a stage; 225 KB\n");
  else
    text->append(wide ? "    dq, dk and dv: 128 rows (2 x m64), x and u in shared memory; 224 KB\n"
                      : "    dq, dk and dv: 128 rows (2 x m64: two score tiles and the gradients fill 240 "
                        "registers); 196 KB\n");
  if (chunked(t)) {
    const int d = static_cast<int>(p.head_dim);
    const char *const name = with_units(p) ? "float16" : "bfloat16";
    if (p.degree == 2)
      text->append(wide ? "    update: 6 of the 136 state tiles per unit (3 accumulators of 64 registers per "
                          "warpgroup), 64 tokens a\n"
                          "      stage; 4 stages x 36 KB (k, v, weighted scalars of k; 40 KB with states) + 32 "
                          "KB = 178 KB\n"
                        : "    update: 12 of the 36 state tiles per block (6 accumulators of 32 registers per "
                          "warpgroup), chunk by\n"
                          "      chunk, 64 tokens a stage; 6 stages x 24 KB (k, v, weighted scalars of k; with "
                          "states 5 x 32 KB)\n"
                          "      + 32 KB = 179 KB\n");
    append(text,
           "  states: %d tiles of 64 x %d %s per chunk and head, %" PRId64
           " chunks; sums in float32, kept as %s, scan in float32; row sums through Z in two parts\n",
           tile_count(p.degree, d), d, name, chunk_bound(p, t.chunk), name);
  }
  describe_costs(p, cost, text);
  if (with_rope(p))
    text->append(
        "  prepare pass: q and k are rotated into contiguous copies, their gradients back from float32\n");
  text->append(
      "  rows come through tensor maps; the last ones of a packed sequence, or of a chunk whose size is no "
      "multiple\n"
      "  of 64, by threads; and so, element by element (slower, no copy), what is not 16-byte aligned\n");
}

}  // namespace powerattn::cuda::sm90
