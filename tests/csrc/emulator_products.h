// Products of matrices as the emulator does them: in plain loops, each sum in the order of its depth, by fused
// multiply-adds. The same bits with and without the processor's own instruction for them.
#pragma once

#include <cstdint>
#include <vector>

#include "../../csrc/cuda/runtime.h"
#include "emulator.h"
#include "emulator_fiber.h"

namespace fastrnn {
namespace cuda {
namespace emulator {

// c [m, n] += a [m, k] b [k, n], all contiguous.
template <class T>
FASTRNN_UNSEEN_INLINE void multiply_loops(int64_t m, int64_t n, int64_t k, const T* __restrict a, const T* __restrict b,
                                          T* __restrict c) {
  for (int64_t i = 0; i < m; ++i)
    for (int64_t p = 0; p < k; ++p) {
      const T x = a[i * k + p];
      for (int64_t j = 0; j < n; ++j) {
        T& sum = c[i * n + j];
        if constexpr (sizeof(T) == 8)
          sum = __builtin_fma(x, b[p * n + j], sum);
        else
          sum = __builtin_fmaf(x, b[p * n + j], sum);
      }
    }
}

#ifdef __x86_64__
static const bool has_fma = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#define FASTRNN_FMA __attribute__((target("avx2,fma"), optimize("O3"))) FASTRNN_UNSEEN
template <class T>
FASTRNN_FMA void multiply_by_fma(int64_t m, int64_t n, int64_t k, const T* a, const T* b, T* c) {
  multiply_loops(m, n, k, a, b, c);
}
FASTRNN_FMA inline void tile_by_fma(int depth, const float* a, const float* b, float* c) {
  multiply_loops<float>(16, 8, depth, a, b, c);
}
#else
constexpr bool has_fma = false;
template <class T>
void multiply_by_fma(int64_t, int64_t, int64_t, const T*, const T*, T*) {}
inline void tile_by_fma(int, const float*, const float*, float*) {}
#endif

template <class T>
FASTRNN_UNSEEN void multiply_contiguous(int64_t m, int64_t n, int64_t k, const T* a, const T* b, T* c) {
  if (has_fma)
    multiply_by_fma(m, n, k, a, b, c);
  else
    multiply_loops(m, n, k, a, b, c);
}

// c [16, 8] += a [16, depth] b [depth, 8].
FASTRNN_UNSEEN inline void multiply_one_tile(int depth, const float* a, const float* b, float* c) {
  if (has_fma)
    tile_by_fma(depth, a, b, c);
  else
    multiply_loops<float>(16, 8, depth, a, b, c);
}

// ------------------------------------------------------------------------------------- runtime.h's products of
// matrices

// Element (i, j) of what the matrix is after transposition, as T.
template <class T>
std::vector<T> values_of(const Matrix& m, int64_t rows, int64_t columns, bool tf32) {
  std::vector<T> values(size_t(rows * columns));
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = 0; j < columns; ++j) {
      const int64_t at = m.transposed ? j * m.stride + i : i * m.stride + j;
      T& v = values[size_t(i * columns + j)];
      switch (m.dtype) {
        case Dtype::f64:
          v = T(static_cast<const double*>(m.data)[at]);
          break;
        case Dtype::f32:
          v = T(static_cast<const float*>(m.data)[at]);
          if (tf32) v = T(to_tf32(float(v)));
          break;
        case Dtype::bf16:
          v = T(widen(static_cast<const Bf16*>(m.data)[at]));
          break;
        case Dtype::f16:
          v = T(widen(static_cast<const F16*>(m.data)[at]));
          break;
      }
    }
  return values;
}

template <class Storage, class T>
void store_product(const Product& p, const std::vector<T>& sums) {
  for (int64_t i = 0; i < p.m; ++i)
    for (int64_t j = 0; j < p.n; ++j) {
      Storage& to = static_cast<Storage*>(p.c)[i * p.c_stride + j];
      const T sum = sums[size_t(i * p.n + j)];
      to = narrow<Storage>(Compute<Storage>(p.add ? sum + T(widen(to)) : sum));
    }
}

template <class T>
void multiply_as(const Product& p) {
  const std::vector<T> a = values_of<T>(p.a, p.m, p.k, p.tf32), b = values_of<T>(p.b, p.k, p.n, p.tf32);
  std::vector<T> sums(size_t(p.m * p.n), T(0));
  multiply_contiguous(p.m, p.n, p.k, a.data(), b.data(), sums.data());
  switch (p.c_dtype) {
    case Dtype::f64:
      return store_product<double>(p, sums);
    case Dtype::f32:
      return store_product<float>(p, sums);
    case Dtype::bf16:
      return store_product<Bf16>(p, sums);
    case Dtype::f16:
      return store_product<F16>(p, sums);
  }
}

}  // namespace emulator
}  // namespace cuda
}  // namespace fastrnn
