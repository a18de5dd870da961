// SPDX-License-Identifier: Apache-2.0
// The AMX and AVX-512 instructions that amx*.h use, in plain C++: so that its kernels can be tested, and their
// memory accesses judged by the sanitizers, on any processor. Included by isa.h only, with
// POWERATTN_EMULATE_ISA.

typedef float __m512 __attribute__((vector_size(64)));
typedef double __m512d __attribute__((vector_size(64)));
typedef int64_t __m512i __attribute__((vector_size(64)));
typedef uint16_t Bits16 __attribute__((vector_size(64)));  // 32 of them
typedef int32_t Bits32 __attribute__((vector_size(64)));   // 16 of them

struct TileRegisters {
  bool configured = false;
  uint32_t tile[8][16][16];  // pairs of bfloat16, or floats
};
static thread_local TileRegisters amx_registers;

// Palette 1 with every tile of 16 rows of 64 bytes: the one configuration that amx.h asks for.
inline void _tile_loadconfig(const void *config) {
  uint8_t bytes[64];
  __builtin_memcpy(bytes, config, sizeof bytes);
  bool expected = bytes[0] == 1 && bytes[1] == 0;
  for (int i = 0; i < 8; ++i) {
    expected = expected && bytes[16 + 2 * i] == 64 && bytes[17 + 2 * i] == 0 && bytes[48 + i] == 16;
  }
  if (!expected) __builtin_trap();
  amx_registers = TileRegisters{};
  amx_registers.configured = true;
}
inline void _tile_release() { amx_registers.configured = false; }

inline uint32_t (&amx_tile(int i))[16][16] {
  if (!amx_registers.configured) __builtin_trap();  // #UD on the processor
  return amx_registers.tile[i];
}
inline void _tile_zero(int i) { __builtin_memset(amx_tile(i), 0, 1024); }
inline void _tile_loadd(int i, const void *from, int64_t stride) {
  auto &tile = amx_tile(i);
  for (int row = 0; row < 16; ++row) {
    __builtin_memcpy(tile[row], static_cast<const char *>(from) + row * stride, 64);
  }
}
inline void _tile_stored(int i, void *to, int64_t stride) {
  const auto &tile = amx_tile(i);
  for (int row = 0; row < 16; ++row) {
    __builtin_memcpy(static_cast<char *>(to) + row * stride, tile[row], 64);
  }
}

inline float bits_to_float(uint32_t bits) {
  float x;
  __builtin_memcpy(&x, &bits, sizeof x);
  return x;
}
inline uint32_t float_to_bits(float x) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, sizeof bits);
  return bits;
}

// C[m][n] += sum over pairs k of A[m][k].low B[k][n].low + A[m][k].high B[k][n].high
inline void _tile_dpbf16ps(int c, int a, int b) {
  auto &sums = amx_tile(c);
  const auto &left = amx_tile(a), &right = amx_tile(b);
  for (int m = 0; m < 16; ++m) {
    for (int n = 0; n < 16; ++n) {
      float sum = bits_to_float(sums[m][n]);
      for (int k = 0; k < 16; ++k) {
        sum += bits_to_float(left[m][k] << 16) * bits_to_float(right[k][n] << 16);
        sum += bits_to_float(left[m][k] & 0xffff0000u) * bits_to_float(right[k][n] & 0xffff0000u);
      }
      sums[m][n] = float_to_bits(sum);
    }
  }
}

// To nearest even; subnormals become 0, NaNs quiet.
inline uint16_t bfloat_bits(float x) {
  const uint32_t bits = float_to_bits(x), magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return static_cast<uint16_t>(bits >> 16 | 0x40u);
  if (magnitude < 0x00800000u) return static_cast<uint16_t>(bits >> 16 & 0x8000u);
  return static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}
inline Bits16 _mm512_cvtne2ps_pbh(__m512 high, __m512 low) {
  Bits16 out;
  for (int i = 0; i < 16; ++i) {
    out[i] = bfloat_bits(low[i]);
    out[16 + i] = bfloat_bits(high[i]);
  }
  return out;
}
inline __m512i _mm512_permutexvar_epi16(__m512i order, __m512i x) {
  const Bits16 index = (Bits16)order, from = (Bits16)x;
  Bits16 out;
  for (int i = 0; i < 32; ++i) out[i] = from[index[i] & 31];
  return (__m512i)out;
}
inline __m512 _mm512_permutex2var_ps(__m512 a, __m512i order, __m512 b) {
  const Bits32 index = (Bits32)order;
  __m512 out;
  for (int i = 0; i < 16; ++i) out[i] = (index[i] & 16) != 0 ? b[index[i] & 15] : a[index[i] & 15];
  return out;
}
inline __m512 _mm512_maskz_moveldup_ps(unsigned, __m512 x) {
  for (int i = 0; i < 16; i += 2) x[i + 1] = x[i];
  return x;
}
inline __m512d _mm512_set1_pd(double x) { return __m512d{x, x, x, x, x, x, x, x}; }
inline __m512i _mm512_load_si512(const void *from) {
  if (reinterpret_cast<uintptr_t>(from) % 64 != 0) __builtin_trap();  // #GP on the processor
  __m512i x;
  __builtin_memcpy(&x, from, sizeof x);
  return x;
}
inline __m512i _mm512_loadu_si512(const void *from) {
  __m512i x;
  __builtin_memcpy(&x, from, sizeof x);
  return x;
}
// sums[i] += a[2 i] b[2 i] + a[2 i + 1] b[2 i + 1]
typedef __m512i __m512bh;
inline __m512 _mm512_dpbf16_ps(__m512 sums, __m512bh a, __m512bh b) {
  const Bits32 left = (Bits32)a, right = (Bits32)b;
  for (int i = 0; i < 16; ++i) {
    const uint32_t l = static_cast<uint32_t>(left[i]), r = static_cast<uint32_t>(right[i]);
    sums[i] += bits_to_float(l << 16) * bits_to_float(r << 16);
    sums[i] += bits_to_float(l & 0xffff0000u) * bits_to_float(r & 0xffff0000u);
  }
  return sums;
}
inline void _mm512_storeu_si512(void *to, __m512i x) { __builtin_memcpy(to, &x, sizeof x); }
