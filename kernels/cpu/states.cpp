// SPDX-License-Identifier: Apache-2.0
#include "states.h"

#include <algorithm>
#include <cmath>

#include "element.h"

namespace powerattn {
namespace {

// Elements of one work item: big enough to hide the dispatch, small enough to share out one large state.
constexpr int64_t kBlock = 1 << 15;

// Elements in memory, at any alignment. `get` widens, `put` rounds once.
template <typename T>
struct Native {
  using Bits = T;
  static T get(Bits x) { return x; }
  template <typename X>
  static Bits put(X x) {
    return static_cast<T>(x);
  }
};
struct Bfloat16 {
  using Bits = uint16_t;
  static float get(Bits x) { return bfloat16_to_float(x); }
  static Bits put(float x) { return bfloat16_from_float(x); }
  static Bits put(double x) { return bfloat16_from_float(float_round_to_odd(x)); }
};
struct Float16 {
  using Bits = uint16_t;
  static float get(Bits x) { return float16_to_float(x); }
  static Bits put(float x) { return float16_from_float(x); }
  static Bits put(double x) { return float16_from_float(float_round_to_odd(x)); }
};

template <typename T>
T load_at(const char *data, int64_t i) {
  T x;
  std::memcpy(&x, data + i * static_cast<int64_t>(sizeof x), sizeof x);
  return x;
}
template <typename T>
void store_at(char *data, int64_t i, T x) {
  std::memcpy(data + i * static_cast<int64_t>(sizeof x), &x, sizeof x);
}

template <typename From, typename To>
void convert_block(const char *src, char *dst, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    store_at(dst, i, To::put(From::get(load_at<typename From::Bits>(src, i))));
  }
}

template <typename From>
void convert_to(Dtype to, const char *src, char *dst, int64_t n) {
  switch (to) {
    case Dtype::kFloat64:
      return convert_block<From, Native<double>>(src, dst, n);
    case Dtype::kFloat32:
      return convert_block<From, Native<float>>(src, dst, n);
    case Dtype::kFloat16:
      return convert_block<From, Float16>(src, dst, n);
    case Dtype::kBfloat16:
      return convert_block<From, Bfloat16>(src, dst, n);
  }
}

void convert_elements(Dtype from, Dtype to, const char *src, char *dst, int64_t n) {
  if (from == to) {
    std::memcpy(dst, src, static_cast<size_t>(n * size_of(from)));
    return;
  }
  switch (from) {
    case Dtype::kFloat64:
      return convert_to<Native<double>>(to, src, dst, n);
    case Dtype::kFloat32:
      return convert_to<Native<float>>(to, src, dst, n);
    case Dtype::kFloat16:
      return convert_to<Float16>(to, src, dst, n);
    case Dtype::kBfloat16:
      return convert_to<Bfloat16>(to, src, dst, n);
  }
}

#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ == __ORDER_BIG_ENDIAN__
void swap_bytes(char *data, int64_t n, int64_t size) {
  for (int64_t i = 0; i < n; ++i) std::reverse(data + i * size, data + (i + 1) * size);
}
#else
void swap_bytes(char *, int64_t, int64_t) {}
#endif

int64_t blocks(int64_t elements) { return (elements + kBlock - 1) / kBlock; }

struct Range {
  int64_t begin, end;
};
Range block_range(int64_t block, int64_t elements) {
  return {block * kBlock, std::min(elements, (block + 1) * kBlock)};
}

const char *byte_at(const void *data, Dtype type, int64_t element) {
  return static_cast<const char *>(data) + element * size_of(type);
}
char *byte_at(void *data, Dtype type, int64_t element) {
  return static_cast<char *>(data) + element * size_of(type);
}

double log_gate_at(const Problem &p, const powerattn_compose_args &a, int64_t m, int64_t n, int64_t g) {
  if (!a.log_g) return 0;
  return load_element(p.stat_dtype, a.log_g,
                      m * a.log_g_stride_segment + n * a.log_g_stride_n + g * a.log_g_stride_h);
}

// x <- 0; for m: x <- exp(L_m) x + x_m. Small batches of the row stay in registers or L1 while m runs.
template <typename T>
void fold(const Problem &p, const powerattn_compose_args &a, int64_t n, int64_t g, const void *segments,
          int64_t at, int64_t stride, void *out, int64_t out_at, Range range) {
  constexpr int64_t kBatch = 512;
  double acc[kBatch];
  for (int64_t begin = range.begin; begin < range.end; begin += kBatch) {
    const int64_t count = std::min(kBatch, range.end - begin);
    std::fill(acc, acc + count, 0.0);
    for (int64_t m = 0; m < a.count; ++m) {
      const double decay = std::exp(log_gate_at(p, a, m, n, g));
      const char *x = byte_at(segments, p.state_dtype, at + m * stride + begin);
      // A reset forgets what came before, whatever it was: 0 * Inf must not be NaN.
      if (decay == 0) std::fill(acc, acc + count, 0.0);
      for (int64_t i = 0; i < count; ++i) {
        acc[i] = decay * acc[i] + static_cast<double>(T::get(load_at<typename T::Bits>(x, i)));
      }
    }
    char *y = byte_at(out, p.state_dtype, out_at + begin);
    for (int64_t i = 0; i < count; ++i) store_at(y, i, T::put(acc[i]));
  }
}

void fold_any(const Problem &p, const powerattn_compose_args &a, int64_t n, int64_t g, const void *segments,
              int64_t at, int64_t stride, void *out, int64_t out_at, Range range) {
  if (p.state_dtype == Dtype::kFloat64) {
    fold<Native<double>>(p, a, n, g, segments, at, stride, out, out_at, range);
  } else if (p.state_dtype == Dtype::kFloat32) {
    fold<Native<float>>(p, a, n, g, segments, at, stride, out, out_at, range);
  } else {
    fold<Bfloat16>(p, a, n, g, segments, at, stride, out, out_at, range);
  }
}

}  // namespace

void compose_states(const Problem &p, const powerattn_compose_args &a, const ParallelFor &parallel) {
  const int64_t s_elements = p.state_rows * p.value_dim, per_state = blocks(s_elements);
  parallel(p.sequences * p.heads_kv * per_state, [&](int64_t item) {
    const int64_t block = item % per_state, g = item / per_state % p.heads_kv,
                  n = item / per_state / p.heads_kv;
    fold_any(p, a, n, g, a.segments.s, n * a.segments.s_stride_n + g * a.segments.s_stride_h,
             a.s_stride_segment, a.out.s, n * a.out.s_stride_n + g * a.out.s_stride_h,
             block_range(block, s_elements));
    if (block != 0) return;
    if (a.out.z && a.segments.z) {
      fold_any(p, a, n, g, a.segments.z, n * a.segments.z_stride_n + g * a.segments.z_stride_h,
               a.z_stride_segment, a.out.z, n * a.out.z_stride_n + g * a.out.z_stride_h, {0, p.state_rows});
    } else if (a.out.z) {
      const int64_t at = n * a.out.z_stride_n + g * a.out.z_stride_h;
      for (int64_t r = 0; r < p.state_rows; ++r) store_element(p.state_dtype, a.out.z, at + r, 0.0);
    }
    if (a.out_log_g) {
      double total = 0;
      for (int64_t m = 0; m < a.count; ++m) total += log_gate_at(p, a, m, n, g);
      store_element(p.stat_dtype, a.out_log_g, n * p.heads_kv + g, total);
    }
  });
}

void convert_states(const Problem &p, const powerattn_convert_args &a, const ParallelFor &parallel) {
  const Dtype from = a.src_dtype ? static_cast<Dtype>(a.src_dtype) : p.state_dtype;
  const Dtype to = a.dst_dtype ? static_cast<Dtype>(a.dst_dtype) : p.state_dtype;
  const int64_t s_elements = p.state_rows * p.value_dim, per_state = blocks(s_elements);
  parallel(a.count * p.heads_kv * per_state, [&](int64_t item) {
    const int64_t block = item % per_state, g = item / per_state % p.heads_kv,
                  i = item / per_state / p.heads_kv;
    const int64_t from_slot = a.src_slots ? a.src_slots[i] : i, to_slot = a.dst_slots ? a.dst_slots[i] : i;
    if (from_slot < 0 || to_slot < 0) return;
    const Range range = block_range(block, s_elements);
    convert_elements(from, to,
                     byte_at(a.src.s, from, from_slot * a.src.s_stride_n + g * a.src.s_stride_h + range.begin),
                     byte_at(a.dst.s, to, to_slot * a.dst.s_stride_n + g * a.dst.s_stride_h + range.begin),
                     range.end - range.begin);
    if (block != 0 || !a.dst.z) return;
    const int64_t to_at = to_slot * a.dst.z_stride_n + g * a.dst.z_stride_h;
    if (a.src.z) {
      convert_elements(from, to, byte_at(a.src.z, from, from_slot * a.src.z_stride_n + g * a.src.z_stride_h),
                       byte_at(a.dst.z, to, to_at), p.state_rows);
    } else {
      for (int64_t r = 0; r < p.state_rows; ++r) store_element(to, a.dst.z, to_at + r, 0.0);
    }
  });
}

void pack_states(const Problem &p, const powerattn_pack_args &a, Dtype dtype, void *payload,
                 const ParallelFor &parallel) {
  const int64_t rows = p.state_rows, s_elements = rows * p.value_dim, per_state = blocks(s_elements);
  parallel(a.count * p.heads_kv * per_state, [&](int64_t item) {
    const int64_t block = item % per_state, g = item / per_state % p.heads_kv,
                  i = item / per_state / p.heads_kv;
    const Range range = block_range(block, s_elements);
    char *base = byte_at(payload, dtype, (i * p.heads_kv + g) * (rows + s_elements));
    char *s = byte_at(base, dtype, rows + range.begin);
    convert_elements(
        p.state_dtype, dtype,
        byte_at(a.state.s, p.state_dtype, i * a.state.s_stride_n + g * a.state.s_stride_h + range.begin), s,
        range.end - range.begin);
    swap_bytes(s, range.end - range.begin, size_of(dtype));
    if (block != 0) return;
    if (a.state.z) {
      convert_elements(p.state_dtype, dtype,
                       byte_at(a.state.z, p.state_dtype, i * a.state.z_stride_n + g * a.state.z_stride_h), base,
                       rows);
      swap_bytes(base, rows, size_of(dtype));
    } else {
      std::memset(base, 0, static_cast<size_t>(rows * size_of(dtype)));
    }
  });
}

void unpack_states(const Problem &p, const powerattn_pack_args &a, Dtype dtype, const void *payload,
                   const ParallelFor &parallel) {
  const int64_t rows = p.state_rows, s_elements = rows * p.value_dim, per_state = blocks(s_elements);
  // Swapping, where it is needed, goes through a small copy: the block is the caller's and is not written.
  const auto read = [&](const char *from, char *to, int64_t n) {
    constexpr int64_t kBatch = 512;
    char copy[kBatch * 8];
    for (int64_t begin = 0; begin < n; begin += kBatch) {
      const int64_t count = std::min(kBatch, n - begin);
      std::memcpy(copy, from + begin * size_of(dtype), static_cast<size_t>(count * size_of(dtype)));
      swap_bytes(copy, count, size_of(dtype));
      convert_elements(dtype, p.state_dtype, copy, to + begin * size_of(p.state_dtype), count);
    }
  };
  parallel(a.count * p.heads_kv * per_state, [&](int64_t item) {
    const int64_t block = item % per_state, g = item / per_state % p.heads_kv,
                  i = item / per_state / p.heads_kv;
    const Range range = block_range(block, s_elements);
    const char *base = byte_at(payload, dtype, (i * p.heads_kv + g) * (rows + s_elements));
    read(byte_at(base, dtype, rows + range.begin),
         byte_at(a.state.s, p.state_dtype, i * a.state.s_stride_n + g * a.state.s_stride_h + range.begin),
         range.end - range.begin);
    if (block == 0 && a.state.z) {
      read(base, byte_at(a.state.z, p.state_dtype, i * a.state.z_stride_n + g * a.state.z_stride_h), rows);
    }
  });
}

}  // namespace powerattn
