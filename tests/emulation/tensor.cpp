// SPDX-License-Identifier: Apache-2.0
// Tensor maps and the copies that follow them: boxes of a strided tensor, zeros where a box leaves it.
#include <cuda.h>

#include <cstring>

#include "machine.h"

namespace {

// What the 128 bytes of an emulated CUtensorMap hold.
struct Map {
  uint32_t magic, swizzled;
  const char *address;
  uint64_t extents[4], strides[3];  // of columns, then of what lies outside; strides in bytes
  uint32_t box[4];
};
static_assert(sizeof(Map) <= sizeof(CUtensorMap), "");
constexpr uint32_t kMagic = 0x7e502a4d, kElement = 2;

}  // namespace

// The rules of the driver's manual, for what is modelled: 16-bit elements in four dimensions.
CUresult cuTensorMapEncodeTiled(CUtensorMap *map, CUtensorMapDataType type, cuuint32_t rank, void *address,
                                const cuuint64_t *extents, const cuuint64_t *strides, const cuuint32_t *box,
                                const cuuint32_t *steps, CUtensorMapInterleave interleave,
                                CUtensorMapSwizzle swizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill) {
  bool good = reinterpret_cast<uintptr_t>(map) % 64 == 0 && reinterpret_cast<uintptr_t>(address) % 16 == 0 &&
              type == CU_TENSOR_MAP_DATA_TYPE_UINT16 && rank == 4 &&
              interleave == CU_TENSOR_MAP_INTERLEAVE_NONE;
  for (cuuint32_t i = 0; good && i < rank; ++i) {
    good = extents[i] >= 1 && extents[i] <= uint64_t(1) << 32 && box[i] >= 1 && box[i] <= 256 && steps[i] == 1;
    if (i > 0)
      good = good && strides[i - 1] >= 16 && strides[i - 1] % 16 == 0 && strides[i - 1] < uint64_t(1) << 40;
  }
  good = good && box[0] * kElement % 16 == 0 &&
         (swizzle == CU_TENSOR_MAP_SWIZZLE_NONE ||
          (swizzle == CU_TENSOR_MAP_SWIZZLE_128B && box[0] * kElement <= 128));
  if (!good) return CUDA_ERROR_INVALID_VALUE;
  Map m = {kMagic, swizzle == CU_TENSOR_MAP_SWIZZLE_128B, static_cast<const char *>(address), {}, {}, {}};
  std::memcpy(m.extents, extents, sizeof(m.extents));
  std::memcpy(m.strides, strides, sizeof(m.strides));
  std::memcpy(m.box, box, sizeof(m.box));
  std::memcpy(map, &m, sizeof(m));
  return CUDA_SUCCESS;
}

namespace emulation {
namespace {

// The box at `at` in pieces of 16 bytes, in order of their addresses from `shared` on.
std::vector<Piece> box_pieces(uint32_t shared, const void *map, const int32_t (&at)[4], const char *what) {
  if (reinterpret_cast<uintptr_t>(map) % 64) fail("%s: a map at %p, not a multiple of 64", what, map);
  Map m;
  std::memcpy(&m, map, sizeof(m));
  if (m.magic != kMagic) fail("%s: there is no tensor map at %p", what, map);
  if (shared % 128) fail("%s: shared address 0x%x, not a multiple of 128", what, shared);
  const uint32_t row_bytes = m.box[0] * kElement, rows = m.box[1] * m.box[2] * m.box[3];
  std::vector<Piece> pieces(rows * row_bytes / 16);
  for (uint32_t row = 0; row < rows; ++row) {
    const int64_t inside[4] = {0, int64_t(row % m.box[1]), int64_t(row / m.box[1] % m.box[2]),
                               int64_t(row / m.box[1] / m.box[2])};
    const char *global = m.address;
    bool valid = true;
    for (int i = 1; i < 4; ++i) {
      const int64_t x = at[i] + inside[i];
      valid = valid && x >= 0 && uint64_t(x) < m.extents[i];
      global += valid ? x * int64_t(m.strides[i - 1]) : 0;
    }
    for (uint32_t column = 0; column < row_bytes; column += 16) {
      const int64_t first = int64_t(at[0]) + column / kElement;
      if (first < 0 && first > -8) fail("%s at column %d: not modelled", what, at[0]);
      const int64_t left = valid && first >= 0 ? int64_t(m.extents[0]) - first : 0;
      // Address bits 4 to 6 XOR bits 7 to 9.
      const uint32_t plain = shared + row * row_bytes + column,
                     place = m.swizzled ? plain ^ ((plain >> 7 & 7) << 4) : plain;
      Piece &piece = pieces[(place - shared) / 16];
      piece.bytes = left <= 0 ? 0 : uint32_t(left < 8 ? left * kElement : 16);
      piece.src = global + first * kElement;
      if (piece.bytes > 0 && !is_global(piece.src, piece.bytes))
        fail("%s touches %u bytes at %p, which no allocation holds", what, piece.bytes, piece.src);
    }
  }
  return pieces;
}

}  // namespace

void tensor_load(uint32_t dst, const void *map, const int32_t (&at)[4], uint32_t barrier) {
  const char *const what = "cp.async.bulk.tensor to shared memory";
  std::vector<Piece> pieces = box_pieces(dst, map, at, what);
  const auto bytes = uint32_t(pieces.size() * 16);
  begin_load({self, {dst, bytes, barrier, nullptr, {}}, std::move(pieces)}, what);
}
void tensor_store(const void *map, uint32_t src, const int32_t (&at)[4]) {
  const char *const what = "cp.async.bulk.tensor from shared memory";
  std::vector<Piece> pieces = box_pieces(src, map, at, what);
  const auto bytes = uint32_t(pieces.size() * 16);
  begin_store({nullptr, src, bytes, false, std::move(pieces)}, what);
}

}  // namespace emulation
