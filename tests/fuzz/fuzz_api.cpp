// SPDX-License-Identifier: Apache-2.0
// Arbitrary descriptions and arguments. Descriptions are free; so is every size, stride, flag and slot of the
// arguments. Pointers are NULL, misaligned or into one arena of known size, and a call is executed only when
// all that its arguments reach lies in the arena, because memory that the caller does not own is not the
// library's to detect. Workspace and saved have blocks of their own, to the byte, so that AddressSanitizer sees
// what leaves them. What must hold: no crash, a known status, a message with every failure, and no byte written
// by a call that refused its arguments.
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <vector>

#include "backend.h"
#include "check.h"
#include "power_attention.h"

namespace {

#define EXPECT(condition)                                                                  \
  do {                                                                                     \
    if (!(condition)) {                                                                    \
      std::fprintf(stderr, "%s:%d: %s; status text: %s\n", __FILE__, __LINE__, #condition, \
                   powerattn_last_error());                                                \
      std::abort();                                                                        \
    }                                                                                      \
  } while (0)

class Input {
 public:
  Input(const uint8_t *data, size_t size) : data_(data), size_(size) {}
  uint8_t byte() { return at_ < size_ ? data_[at_++] : 0; }
  template <class T>
  T raw() {
    T value{};
    for (size_t i = 0; i < sizeof(T); ++i) reinterpret_cast<uint8_t *>(&value)[i] = byte();
    return value;
  }
  // Mostly small, now and then extreme.
  int64_t number(int64_t usual) {
    const uint8_t kind = byte();
    if (kind < 200) return usual;
    if (kind < 240) return static_cast<int8_t>(byte());
    if (kind < 250) return raw<int64_t>();
    static const int64_t extremes[] = {INT64_MIN, INT64_MAX, INT64_MAX / 2, -1, INT32_MAX, INT64_C(1) << 32};
    return extremes[byte() % 6];
  }
  bool chance(int of256) { return byte() >= 256 - of256; }

 private:
  const uint8_t *data_;
  size_t size_, at_ = 0;
};

constexpr size_t kArena = size_t{1} << 18;
constexpr uint64_t kMostWorkspace = uint64_t{8} << 20;
alignas(256) unsigned char arena[kArena];
alignas(256) unsigned char copy[kArena];

// Small floats, different everywhere; read as another dtype they are whatever they are.
const std::vector<float> &pattern() {
  static const std::vector<float> values = [] {
    std::vector<float> x(kArena / sizeof(float));
    for (size_t i = 0; i < x.size(); ++i) {
      x[i] = static_cast<float>(static_cast<int>(i * 4 * 2654435761u >> 20 & 255) - 128) / 128;
    }
    return x;
  }();
  return values;
}

struct Free {
  void operator()(void *p) const { std::free(p); }
};
using Block = std::unique_ptr<void, Free>;

// Strides are anything: their products stick at the end of int64_t.
int64_t product(int64_t a, int64_t b) {
  int64_t result = 0;
  if (!__builtin_mul_overflow(a, b, &result)) return result;
  return (a < 0) == (b < 0) ? std::numeric_limits<int64_t>::max() : std::numeric_limits<int64_t>::min();
}

powerattn_desc description(Input &in) {
  powerattn_desc d = {};
  if (in.chance(40)) {  // any bytes at all
    d = in.raw<powerattn_desc>();
    if (in.chance(128)) d.struct_size = sizeof(d);
    if (d.struct_size > sizeof(d)) d.struct_size = sizeof(d);  // more would be read: not ours to give
    d.num_threads = d.num_threads > 4 ? 2 : d.num_threads;
    return d;
  }
  static const int32_t degrees[] = {2, 2, 4, 1, 3, 6, 8, 5};
  d.struct_size = sizeof(d);
  d.dtype = 1 + in.byte() % 4;
  d.state_dtype = in.chance(40) ? in.byte() % 5 : 0;
  d.degree = degrees[in.byte() % 8];
  d.flags = in.byte() % 16;
  if (d.degree % 2 != 0) d.flags |= POWERATTN_UNNORMALIZED;
  d.form = in.byte() % 3;
  d.batch = in.number(in.byte() % 3);
  d.seq_len = in.number(in.byte() % 9);
  d.heads_kv = in.number(1 + in.byte() % 2);
  d.heads_q =
      in.chance(230) && d.heads_kv > 0 && d.heads_kv < 100 ? d.heads_kv * (1 + in.byte() % 2) : in.number(2);
  d.head_dim = in.number(1 + in.byte() % 8);
  d.value_dim = in.number(in.byte() % 6);
  d.sequences = in.chance(60) ? in.number(in.byte() % 4) : 0;
  if (d.sequences > 0) d.batch = 1;
  d.max_seq_len = in.chance(30) ? in.number(d.seq_len) : 0;
  d.chunk_size = in.chance(60) && d.form != POWERATTN_FORM_ATTENTION ? in.number(in.byte() % 8) : 0;
  d.scale = (d.flags & POWERATTN_CUSTOM_SCALE) != 0 ? in.raw<float>() : 0;
  d.eps = in.chance(40) ? static_cast<double>(in.raw<float>()) : 0;
  d.rope_style = in.chance(80) ? in.byte() % 4 : 0;
  d.rope_dim = in.chance(40) ? in.byte() % 10 : 0;
  d.num_threads = in.chance(32) ? 2 : 1;
  d.state_limit = in.chance(30) ? in.raw<uint32_t>() : uint64_t{1} << 30;
  return d;
}

class Arguments {
 public:
  Arguments(Input &in, const powerattn_plan *plan) : in_(in), p_(plan->problem) {}

  // A pointer into the arena where the memory is known to suffice, else NULL or a lie that must be refused.
  void *place(uint64_t bytes, uint64_t alignment) {
    if (in_.chance(8)) return nullptr;
    uint64_t at = (next_ + 255) / 256 * 256;
    if (bytes > kArena || at + bytes > kArena) {
      fits_ = false;
      return arena;
    }
    next_ = at + bytes;
    if (in_.chance(6)) at = in_.byte() * alignment;  // on top of another one: reach is checked below
    if (in_.chance(4)) at += 1;
    if (at + bytes > kArena) fits_ = false;
    return arena + at;
  }

  powerattn_tensor tensor(int64_t heads, int64_t inner, powerattn::Dtype dtype) {
    powerattn_tensor t = {};
    if (in_.chance(4)) return t;
    const int64_t size = powerattn::size_of(dtype);
    t.stride_h = stride(inner);
    t.stride_t = stride(heads * inner);
    t.stride_b = stride(p_.seq_len * heads * inner);
    t.data =
        place(static_cast<uint64_t>(p_.batch * p_.seq_len * heads * inner * size), static_cast<uint64_t>(size));
    reach(t.data, size, inner, {p_.batch, p_.seq_len, heads}, {t.stride_b, t.stride_t, t.stride_h});
    return t;
  }

  powerattn_state state(int64_t count, powerattn::Dtype dtype, int percent) {
    powerattn_state s = {};
    if (!in_.chance(percent)) return s;
    const int64_t size = powerattn::size_of(dtype), heads = p_.heads_kv;
    if (p_.state_rows > static_cast<int64_t>(kArena) || count < 0 || count > 64 || heads > 64) {
      fits_ = false;
      return s;
    }
    s.s_stride_h = stride(p_.state_rows * p_.value_dim);
    s.s_stride_n = stride(heads * p_.state_rows * p_.value_dim);
    s.z_stride_h = stride(p_.state_rows);
    s.z_stride_n = stride(heads * p_.state_rows);
    s.s = place(static_cast<uint64_t>(count * heads * p_.state_rows * p_.value_dim * size),
                static_cast<uint64_t>(size));
    s.z = place(static_cast<uint64_t>(count * heads * p_.state_rows * size), static_cast<uint64_t>(size));
    reach(s.s, size, p_.state_rows * p_.value_dim, {1, count, heads}, {0, s.s_stride_n, s.s_stride_h});
    reach(s.z, size, p_.state_rows, {1, count, heads}, {0, s.z_stride_n, s.z_stride_h});
    return s;
  }

  const int64_t *integers(int64_t count, int64_t usual_limit) {
    if (count < 0 || count > 64) {
      fits_ = false;
      return nullptr;
    }
    void *at = place(static_cast<uint64_t>(count) * 8, 8);
    if (at == nullptr || !fits_) return static_cast<const int64_t *>(at);
    int64_t value = 0;
    for (int64_t i = 0; i < count; ++i) {
      const int64_t x = in_.number(usual_limit == 0 ? (value += in_.byte() % 3) : in_.byte() % usual_limit);
      std::memcpy(static_cast<unsigned char *>(at) + 8 * i, &x, 8);
    }
    return static_cast<const int64_t *>(at);
  }

  // Workspace or saved: mostly a block of exactly the size that the plan asks for, now and then the arena's.
  void buffer(void **data, uint64_t *bytes, uint64_t needed) {
    *bytes = in_.chance(8) ? in_.byte() : needed;
    if (in_.chance(20)) {
      *data = place(needed, 256);
      return;
    }
    void *block = nullptr;
    if (needed > kMostWorkspace || posix_memalign(&block, 256, needed == 0 ? 1 : needed) != 0) {
      fits_ = false;
      return;
    }
    std::memset(block, 0xff, needed);  // what is read before it is written is NaN
    blocks_.emplace_back(block);
    *data = block;
  }

  bool runnable() const { return fits_; }

 private:
  int64_t stride(int64_t usual) { return in_.chance(10) ? in_.number(usual) : usual; }

  // Everything that these strides reach is in the arena; else the call may only be checked, not made.
  void reach(const void *data, int64_t size, int64_t run, const int64_t (&extent)[3],
             const int64_t (&stride)[3]) {
    if (data == nullptr) return;
    __int128 low = static_cast<const unsigned char *>(data) - arena,
             high = low + static_cast<__int128>(run) * size;
    for (int k = 0; k < 3; ++k) {
      if (extent[k] == 0) return;
      const __int128 span = static_cast<__int128>(stride[k]) * (extent[k] - 1) * size;
      (span < 0 ? low : high) += span;
    }
    if (low < 0 || high > static_cast<__int128>(kArena)) fits_ = false;
  }

  Input &in_;
  const powerattn::Problem &p_;
  uint64_t next_ = 0;
  bool fits_ = true;
  std::vector<Block> blocks_;
};

// A refusal has a message and leaves every byte as it was.
void judge(powerattn_status status) {
  EXPECT(status >= POWERATTN_OK && status <= POWERATTN_ERROR_VERSION);  // never INTERNAL
  EXPECT((status == POWERATTN_OK) == (powerattn_last_error()[0] == '\0'));
  if (status != POWERATTN_OK) EXPECT(std::memcmp(arena, copy, kArena) == 0);
}

// Arguments that reach outside of the arena are only checked.
template <class Args, class Check, class Call>
void call(const powerattn_plan *plan, const Args &args, bool runnable, Check check, Call run) {
  std::memcpy(copy, arena, kArena);
  if (runnable) {
    judge(run(plan, &args));
  } else {
    const powerattn_status status = check(*plan, args);
    EXPECT(status >= POWERATTN_OK && status <= POWERATTN_ERROR_VERSION);
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
  using powerattn::Dtype;
  Input in(data, size);
  const powerattn_desc d = description(in);
  powerattn_plan *plan = nullptr;
  std::memcpy(copy, arena, kArena);
  const powerattn_status status = powerattn_plan_create(&d, &plan);
  judge(status);
  EXPECT((status == POWERATTN_OK) == (plan != nullptr));
  if (plan == nullptr) return 0;

  size_t needed = 0;
  EXPECT(powerattn_plan_describe(plan, nullptr, 0, &needed) == POWERATTN_OK);
  EXPECT(needed > 1);
  const powerattn::Problem &p = plan->problem;
  if (p.device_type != POWERATTN_CPU || p.batch > 64 || p.seq_len > 64 || p.heads_q > 64 || p.sequences > 64 ||
      p.state_rows > 100000) {
    powerattn_plan_destroy(plan);  // legal, but not for this arena
    return 0;
  }

  std::memcpy(arena, pattern().data(), kArena);
  Arguments make(in, plan);
  const auto q = [&](int64_t inner) { return make.tensor(p.heads_q, inner, p.dtype); };
  const auto kv = [&](int64_t inner) { return make.tensor(p.heads_kv, inner, p.dtype); };
  const auto stat = [&](int64_t heads) {
    return in.chance(128) ? make.tensor(heads, 1, p.stat_dtype) : powerattn_tensor{};
  };
  const auto sequence = [&](const int64_t **cu_seqlens, const int64_t **rope_offset) {
    *cu_seqlens = p.packed != in.chance(4) ? make.integers(p.sequences + 1, 0) : nullptr;
    *rope_offset = in.chance(60) ? make.integers(p.sequences, 100) : nullptr;
  };

  switch (in.byte() % 8) {
    case 0: {
      powerattn_forward_args a = {};
      a.struct_size = sizeof(a);
      a.q = q(p.head_dim), a.k = kv(p.head_dim), a.v = kv(p.value_dim), a.y = q(p.value_dim);
      a.log_g = stat(p.heads_kv), a.row_norm = stat(p.heads_q);
      a.initial_state = make.state(p.sequences, p.state_dtype, 60);
      a.final_state = in.chance(30) ? a.initial_state : make.state(p.sequences, p.state_dtype, 60);
      sequence(&a.cu_seqlens, &a.rope_offset);
      if (in.chance(60)) make.buffer(&a.saved, &a.saved_bytes, plan->sizes.saved);
      make.buffer(&a.workspace, &a.workspace_bytes, plan->sizes.forward);
      call(plan, a, make.runnable(), powerattn::check_forward, powerattn_forward);
      break;
    }
    case 1: {
      powerattn_backward_args a = {};
      a.struct_size = sizeof(a);
      a.q = q(p.head_dim), a.k = kv(p.head_dim), a.v = kv(p.value_dim), a.y = q(p.value_dim),
      a.d_y = q(p.value_dim);
      a.log_g = stat(p.heads_kv), a.row_norm = make.tensor(p.heads_q, 1, p.stat_dtype);
      a.d_q = q(p.head_dim), a.d_k = kv(p.head_dim), a.d_v = kv(p.value_dim), a.d_log_g = stat(p.heads_kv);
      a.initial_state = make.state(p.sequences, p.state_dtype, 60);
      a.d_final_state = make.state(p.sequences, p.state_dtype, 60);
      a.d_initial_state = make.state(p.sequences, p.state_dtype, 60);
      sequence(&a.cu_seqlens, &a.rope_offset);
      make.buffer(&a.workspace, &a.workspace_bytes, plan->sizes.backward);
      call(plan, a, make.runnable(), powerattn::check_backward, powerattn_backward);
      break;
    }
    case 2: {
      powerattn_step_args a = {};
      a.struct_size = sizeof(a);
      a.q = q(p.head_dim), a.k = kv(p.head_dim), a.v = kv(p.value_dim), a.y = q(p.value_dim);
      a.log_g = stat(p.heads_kv);
      a.num_slots = in.number(in.byte() % 5);
      a.state = make.state(a.num_slots, p.state_dtype, 250);
      a.slots = in.chance(128) ? make.integers(p.batch, 5) : nullptr;
      a.lengths = in.chance(128) ? make.integers(p.batch, 9) : nullptr;
      a.rope_offset = in.chance(60) ? make.integers(p.batch, 100) : nullptr;
      make.buffer(&a.workspace, &a.workspace_bytes, plan->sizes.step);
      call(plan, a, make.runnable(), powerattn::check_step, powerattn_step);
      break;
    }
    case 3: {
      powerattn_summary_args a = {};
      a.struct_size = sizeof(a);
      a.k = kv(p.head_dim), a.v = kv(p.value_dim), a.log_g = stat(p.heads_kv);
      a.state = make.state(p.sequences, p.state_dtype, 250);
      if (in.chance(128)) {
        a.total_log_g = make.place(static_cast<uint64_t>(p.sequences * p.heads_kv * size_of(p.stat_dtype)), 8);
      }
      sequence(&a.cu_seqlens, &a.rope_offset);
      make.buffer(&a.workspace, &a.workspace_bytes, plan->sizes.summary);
      call(plan, a, make.runnable(), powerattn::check_summary, powerattn_summary);
      break;
    }
    case 4: {
      powerattn_summary_reverse_args a = {};
      a.struct_size = sizeof(a);
      a.q = q(p.head_dim), a.y = q(p.value_dim), a.d_y = q(p.value_dim), a.log_g = stat(p.heads_kv);
      a.row_norm = make.tensor(p.heads_q, 1, p.stat_dtype);
      a.d_state = make.state(p.sequences, p.state_dtype, 250);
      sequence(&a.cu_seqlens, &a.rope_offset);
      make.buffer(&a.workspace, &a.workspace_bytes, plan->sizes.summary);
      call(plan, a, make.runnable(), powerattn::check_summary_reverse, powerattn_summary_reverse);
      break;
    }
    case 5: {
      powerattn_compose_args a = {};
      a.struct_size = sizeof(a);
      a.count = in.number(in.byte() % 4);
      const bool countable = a.count >= 0 && a.count < 16;
      a.segments = make.state(countable ? a.count * p.sequences : -1, p.state_dtype, 250);
      a.s_stride_segment = product(p.sequences, a.segments.s_stride_n);
      a.z_stride_segment = product(p.sequences, a.segments.z_stride_n);
      a.out = make.state(p.sequences, p.state_dtype, 250);
      // Strides of the last segment reach farther than the pool's own when they were changed: check only.
      const int64_t rows = p.state_rows, e = p.value_dim, h = p.heads_kv;
      const bool plain = a.segments.s_stride_h == rows * e && a.segments.s_stride_n == h * rows * e &&
                         a.segments.z_stride_h == rows && a.segments.z_stride_n == h * rows;
      call(plan, a, make.runnable() && countable && (plain || a.segments.s == nullptr),
           powerattn::check_compose, powerattn_state_compose);
      break;
    }
    case 6: {
      powerattn_convert_args a = {};
      a.struct_size = sizeof(a);
      a.src_dtype = in.chance(128) ? 0 : in.byte() % 6;
      a.dst_dtype = in.chance(128) ? 0 : in.byte() % 6;
      const auto legal = [](int32_t t) { return t >= 1 && t <= 4; };
      a.src_num_slots = in.number(in.byte() % 5);
      a.dst_num_slots = in.number(in.byte() % 5);
      a.count = in.number(in.byte() % 4);
      a.src = make.state(a.src_num_slots, legal(a.src_dtype) ? static_cast<Dtype>(a.src_dtype) : p.state_dtype,
                         250);
      a.dst = make.state(a.dst_num_slots, legal(a.dst_dtype) ? static_cast<Dtype>(a.dst_dtype) : p.state_dtype,
                         250);
      a.src_slots = in.chance(128) ? make.integers(a.count, 5) : nullptr;
      a.dst_slots = in.chance(128) ? make.integers(a.count, 5) : nullptr;
      call(plan, a, make.runnable(), powerattn::check_convert, powerattn_state_convert);
      break;
    }
    default: {  // pack, then unpack a block with some bytes changed
      powerattn_pack_args a = {};
      a.struct_size = sizeof(a);
      a.dtype = in.chance(128) ? 0 : in.byte() % 6;
      a.count = in.number(in.byte() % 4);
      uint64_t bytes = 0;
      if (powerattn_state_pack_size(plan, a.dtype, a.count, &bytes) != POWERATTN_OK || bytes > kArena / 2)
        break;
      a.state = make.state(a.count, p.state_dtype, 250);
      a.packed_bytes = in.chance(20) ? in.raw<uint16_t>() : bytes;
      std::vector<unsigned char> block(a.packed_bytes + 1);  // exact, so that ASan sees a byte too many
      a.packed = block.data() + (in.chance(20) ? 1 : 0);
      if (!make.runnable()) break;
      std::memcpy(copy, arena, kArena);
      judge(powerattn_state_pack(plan, &a));
      for (int i = in.byte() % 4; i > 0 && a.packed_bytes > 0; --i) {
        static_cast<unsigned char *>(a.packed)[in.byte() % (a.packed_bytes < 64 ? a.packed_bytes : 64)] =
            in.byte();
      }
      std::memcpy(copy, arena, kArena);
      judge(powerattn_state_unpack(plan, &a));
    }
  }
  powerattn_plan_destroy(plan);
  return 0;
}
