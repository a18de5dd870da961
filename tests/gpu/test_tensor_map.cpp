// SPDX-License-Identifier: Apache-2.0
// Which tensors the Hopper kernels load by tensor maps: results do not show it, since threads load the others.
#include <doctest/doctest.h>

#include "kernels/cuda/sm90/tensor_map.h"

using namespace powerattn::cuda::sm90;

namespace {

constexpr int64_t kBatch = 3, kTokens = 70, kHeads = 2, kDim = 64;

Shape shape(int64_t batch, int64_t tokens) {
  Shape p;
  p.head_dim = kDim;
  p.tokens = tokens;
  p.table.num_sequences = batch;
  return p;
}
// Whether [batch][tokens][heads][64] from `offset` bytes on, with strides in elements, has a map.
bool tiled(int64_t stride_b, int64_t stride_t, int64_t stride_h, int64_t offset = 0, int64_t batch = kBatch,
           int64_t tokens = kTokens, int heads = kHeads, TileMap *map = nullptr) {
  alignas(16) static char memory[16];
  Tensor x;
  x.data = memory + offset;
  x.stride_b = stride_b;
  x.stride_t = stride_t;
  x.stride_h = stride_h;
  TileMap own;
  if (map == nullptr) map = &own;
  REQUIRE(tile_map(x, shape(batch, tokens), heads, map) == cudaSuccess);
  return map->tiled != 0;
}

TEST_CASE("tensor maps: layouts that have one") {
  CHECK(tiled(kTokens * kHeads * kDim, kHeads * kDim, kDim));          // [b, t, h, d]
  CHECK(tiled(kTokens * kHeads * kDim, kDim, kTokens * kDim));         // [b, h, t, d]
  CHECK(tiled(3 * kTokens * kHeads * kDim, 3 * kHeads * kDim, kDim));  // a part of a packed qkv
  CHECK(tiled(kDim, kBatch * kHeads * kDim, kBatch * kDim));           // tokens outermost
}
TEST_CASE("tensor maps: strides that nobody uses may be anything") {
  CHECK(tiled(-7, kDim, 5, 0, 1, kTokens, 1));
  CHECK(tiled(1, 3, kDim, 0, 1, 1, kHeads));
}
TEST_CASE("tensor maps: a stride of 0 keeps its coordinate at 0") {
  TileMap map;
  CHECK(tiled(0, kHeads * kDim, kDim, 0, kBatch, kTokens, kHeads, &map));
  CHECK((map.step_batch == 0 && map.step_head == 1));
  CHECK(tiled(kTokens * kDim, kDim, 0, 0, kBatch, kTokens, kHeads, &map));
  CHECK((map.step_batch == 1 && map.step_head == 0));
}
TEST_CASE("tensor maps: what threads must load") {
  CHECK_FALSE(tiled(kTokens * kHeads * kDim, kHeads * kDim, kDim, 2));   // base
  CHECK_FALSE(tiled(kTokens * kHeads * kDim, kHeads * kDim + 4, kDim));  // strides of 8 bytes,
  CHECK_FALSE(tiled(kTokens * kHeads * kDim, kHeads * kDim, kDim + 1));
  CHECK_FALSE(tiled(kTokens * kHeads * kDim, -kHeads * kDim, kDim));  // backwards,
  CHECK_FALSE(tiled(kTokens * kHeads * kDim, 0, kDim));               // one row for all tokens,
  CHECK_FALSE(tiled(int64_t(1) << 39, kHeads * kDim, kDim));          // too far apart
  CHECK_FALSE(tiled(kTokens * kHeads * kDim, kHeads * kDim, kDim, 0, kBatch, 0));
}

}  // namespace
