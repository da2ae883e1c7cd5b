// The products of the resident kernels: a warp's fragments of the weights times a vector in shared memory, for a few
// rows of the batch at a time. layout.h says what is where.
//
//   Tensor cores (16-bit, TF32): four or two tiles of 16 rows by 16 or 8 of the depth, times 8 or 16 columns.
//   Ordinary units (float32 as it is): 16 rows by 32 of the depth, a lane each, times 1 or 2 columns; the lanes' sums
//   meet in a fixed order.
// Sums of one result are always taken in the same order, whatever the number of columns.
#pragma once

#include "device.cuh"
#include "layout.h"

namespace fastrnn {
namespace cuda {

// A value as products take it.
template <Factors factors>
struct Element;
template <>
struct Element<Factors::bf16> {
  using Type = Bf16;
  static FASTRNN_MEMBER_FN Bf16 from(float x) { return narrow<Bf16>(x); }
};
template <>
struct Element<Factors::f16> {
  using Type = F16;
  static FASTRNN_MEMBER_FN F16 from(float x) { return narrow<F16>(x); }
};
template <>
struct Element<Factors::f32> {
  using Type = float;
  static FASTRNN_MEMBER_FN float from(float x) { return x; }
};
template <>
struct Element<Factors::tf32> {
  using Type = float;
  FASTRNN_DEVICE float from(float x) { return to_tf32(x); }
};

// The quad that a lane has of a warp's fragment: `weight(m, k)` is the matrix, m0 and k0 where the fragment begins.
template <Factors factors, class Weight>
FASTRNN_DEVICE Quad make_fragment(const Weight& weight, int m0, int k0, int quad, int lane) {
  using E = Element<factors>;
  Quad q;
  if constexpr (factors == Factors::f32) {
    for (int i = 0; i < 4; ++i) q.word[i] = bits_as<uint32_t>(weight(m0 + 4 * quad + i, k0 + lane));
  } else {
    const int m = m0 + 16 * quad + lane / 4;
    for (int i = 0; i < 4; ++i) {
      const int row = m + 8 * (i & 1);
      if constexpr (factors == Factors::tf32) {
        q.word[i] = bits_as<uint32_t>(E::from(weight(row, k0 + lane % 4 + 4 * (i >> 1))));
      } else {
        const int k = k0 + 2 * (lane % 4) + 8 * (i >> 1);
        const uint32_t low = bits_as<uint16_t>(E::from(weight(row, k)));
        q.word[i] = low | uint32_t(bits_as<uint16_t>(E::from(weight(row, k + 1)))) << 16;
      }
    }
  }
  return q;
}

// What a warp sums up for one tile of rows and the rows of the batch that are multiplied at a time. `two`: there is
// more than the first half of those.
template <Factors factors, int rows>
struct Tile {
  static constexpr int parts = rows / 16;
  float sum[parts][2][4];  // [16 rows][8 columns][of mma's result]

  FASTRNN_DEVICE Tile zero() { return {}; }
  FASTRNN_DEVICE void multiply_one(float (&c)[4], const Quad& q, const uint32_t (&b)[2]) {
    if constexpr (factors == Factors::tf32)
      multiply_tile_tf32(c, q.word, b);
    else
      multiply_tile(c, q.word, b, typename Element<factors>::Type{});
  }
  // vector: the first value of the tile's depth in the first row of the batch; rows are `pitch` bytes apart.
  FASTRNN_DEVICE void add(Tile& t, const Quad (&fragment)[parts], const char* vector, int pitch, bool two, int lane) {
    const char* at = vector + (lane / 4) * pitch + (lane % 4) * 4;
    const uint32_t b[2] = {*reinterpret_cast<const uint32_t*>(at), *reinterpret_cast<const uint32_t*>(at + 16)};
#pragma unroll
    for (int i = 0; i < parts; ++i) multiply_one(t.sum[i][0], fragment[i], b);
    if (!two) return;
    at += 8 * pitch;
    const uint32_t c[2] = {*reinterpret_cast<const uint32_t*>(at), *reinterpret_cast<const uint32_t*>(at + 16)};
#pragma unroll
    for (int i = 0; i < parts; ++i) multiply_one(t.sum[i][1], fragment[i], c);
  }
  // to: of the first row of the batch and of the tile; rows of the batch are `pitch` values apart.
  FASTRNN_DEVICE void store(const Tile& t, float* to, int pitch, bool two, int lane) {
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      if (j == 1 && !two) break;
#pragma unroll
      for (int i = 0; i < parts; ++i)
#pragma unroll
        for (int e = 0; e < 4; ++e)
          to[(8 * j + 2 * (lane % 4) + (e & 1)) * pitch + 16 * i + lane / 4 + 8 * (e >> 1)] = t.sum[i][j][e];
    }
  }
};

template <>
struct Tile<Factors::f32, 16> {
  float sum[2][16];  // [row of the batch][row of the tile], of the lane's share of the depth

  FASTRNN_DEVICE Tile zero() { return {}; }
  FASTRNN_DEVICE void add(Tile& t, const Quad (&fragment)[4], const char* vector, int pitch, bool two, int lane) {
    const float x = *reinterpret_cast<const float*>(vector + lane * 4);
#pragma unroll
    for (int i = 0; i < 16; ++i)
      t.sum[0][i] = __builtin_fmaf(bits_as<float>(fragment[i / 4].word[i % 4]), x, t.sum[0][i]);
    if (!two) return;
    const float y = *reinterpret_cast<const float*>(vector + pitch + lane * 4);
#pragma unroll
    for (int i = 0; i < 16; ++i)
      t.sum[1][i] = __builtin_fmaf(bits_as<float>(fragment[i / 4].word[i % 4]), y, t.sum[1][i]);
  }
  // The sums of the lanes that differ in `half`: a lane keeps one half of its values and gives the other away.
  template <int half>
  FASTRNN_DEVICE void meet(float (&values)[16], int lane) {
    const bool upper = lane & half;
#pragma unroll
    for (int i = 0; i < half; ++i) {
      const float given = upper ? values[i] : values[i + half];
      values[i] = (upper ? values[i + half] : values[i]) + shuffle_xor(given, half);
    }
  }
  FASTRNN_DEVICE void store(Tile& t, float* to, int pitch, bool two, int lane) {
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      if (j == 1 && !two) break;
      meet<8>(t.sum[j], lane);
      meet<4>(t.sum[j], lane);
      meet<2>(t.sum[j], lane);
      meet<1>(t.sum[j], lane);
      const float all = t.sum[j][0] + shuffle_xor(t.sum[j][0], 16);
      if (lane < 16) to[j * pitch + lane] = all;
    }
  }
};

}  // namespace cuda
}  // namespace fastrnn
