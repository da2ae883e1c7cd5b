// Numbers on the device: the value type that cells.h and math.h are written over, and the storage dtypes.
//
// Value<float> and Value<double> have the names of cpu/vec.h's vectors, one lane wide. bfloat16 and float16 travel as
// their bits; load() widens, store() rounds to nearest even. For nvcc, and for g++ where the kernels are emulated.
#pragma once

#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#define FASTRNN_FN static __host__ __device__ __forceinline__
#define FASTRNN_MEMBER_FN __host__ __device__ __forceinline__
#define FASTRNN_METHOD __device__ __forceinline__
#else
#define FASTRNN_FN static inline __attribute__((always_inline))
#define FASTRNN_MEMBER_FN inline __attribute__((always_inline))
#define FASTRNN_METHOD inline
#endif

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

#include "../cells.h"

namespace fastrnn {
namespace cuda {

// Cell::hidden_gate[s], which device code cannot index by a variable; constant where s is one after unrolling.
template <class Cell>
FASTRNN_MEMBER_FN int hidden_gate(int s) {
  constexpr int g0 = Cell::hidden_gate[0], g1 = Cell::hidden_gate[1], g2 = Cell::hidden_gate[2];
  constexpr int g3 = Cell::hidden_gate[3];
  return s == 0 ? g0 : s == 1 ? g1 : s == 2 ? g2 : g3;
}

template <class To, class From>
FASTRNN_MEMBER_FN To bits_as(From x) {
  static_assert(sizeof(To) == sizeof(From), "the same bits");
  To y;
  memcpy(&y, &x, sizeof y);
  return y;
}

template <class Real>
struct Value;

template <>
struct Value<float> {
  using T = float;
  float v;
  FASTRNN_FN Value set(float x) { return {x}; }
  // x * 2^n by two factors, for denormal results.
  friend FASTRNN_MEMBER_FN Value scale(Value x, Value n) {
    const int whole = n.v == n.v ? int(n.v) : 0, half = whole >> 1;
    return {x.v * bits_as<float>(uint32_t(half + 127) << 23) * bits_as<float>(uint32_t(whole - half + 127) << 23)};
  }
  friend FASTRNN_MEMBER_FN Value fma(Value a, Value b, Value c) { return {__builtin_fmaf(a.v, b.v, c.v)}; }
  friend FASTRNN_MEMBER_FN Value absolute(Value x) { return {__builtin_fabsf(x.v)}; }
  friend FASTRNN_MEMBER_FN Value copy_sign(Value x, Value s) { return {__builtin_copysignf(x.v, s.v)}; }
  friend FASTRNN_MEMBER_FN Value nearest(Value x) { return {__builtin_rintf(x.v)}; }
  friend FASTRNN_MEMBER_FN Value operator+(Value a, Value b) { return {a.v + b.v}; }
  friend FASTRNN_MEMBER_FN Value operator-(Value a, Value b) { return {a.v - b.v}; }
  friend FASTRNN_MEMBER_FN Value operator*(Value a, Value b) { return {a.v * b.v}; }
  // Of denominators from 1 to 1e8, as math.h has them: an estimate, a better one, and the quotient set right by what it
  // leaves. No branch, so that a cell's gates do not wait for each other.
  friend FASTRNN_MEMBER_FN Value operator/(Value a, Value b) {
#ifdef __CUDA_ARCH__
    float estimate;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(estimate) : "f"(b.v));
    estimate = __builtin_fmaf(estimate, __builtin_fmaf(-b.v, estimate, 1.f), estimate);
    const float quotient = a.v * estimate;
    return {__builtin_fmaf(__builtin_fmaf(-b.v, quotient, a.v), estimate, quotient)};
#else
    return {a.v / b.v};
#endif
  }
  friend FASTRNN_MEMBER_FN Value max(Value bound, Value x) { return {bound.v > x.v ? bound.v : x.v}; }
  friend FASTRNN_MEMBER_FN Value min(Value bound, Value x) { return {bound.v < x.v ? bound.v : x.v}; }
  friend FASTRNN_MEMBER_FN Value negative_absolute(Value x) { return {-__builtin_fabsf(x.v)}; }
  friend FASTRNN_MEMBER_FN Value less(Value x, Value y, Value yes, Value no) { return x.v < y.v ? yes : no; }
  friend FASTRNN_MEMBER_FN Value less_equal(Value x, Value y, Value yes, Value no) { return x.v <= y.v ? yes : no; }
};

template <>
struct Value<double> {
  using T = double;
  double v;
  FASTRNN_FN Value set(double x) { return {x}; }
  friend FASTRNN_MEMBER_FN Value scale(Value x, Value n) {
    const int whole = n.v == n.v ? int(n.v) : 0, half = whole >> 1;
    return {x.v * bits_as<double>(uint64_t(half + 1023) << 52) * bits_as<double>(uint64_t(whole - half + 1023) << 52)};
  }
  friend FASTRNN_MEMBER_FN Value fma(Value a, Value b, Value c) { return {__builtin_fma(a.v, b.v, c.v)}; }
  friend FASTRNN_MEMBER_FN Value absolute(Value x) { return {__builtin_fabs(x.v)}; }
  friend FASTRNN_MEMBER_FN Value copy_sign(Value x, Value s) { return {__builtin_copysign(x.v, s.v)}; }
  friend FASTRNN_MEMBER_FN Value nearest(Value x) { return {__builtin_rint(x.v)}; }
  friend FASTRNN_MEMBER_FN Value operator+(Value a, Value b) { return {a.v + b.v}; }
  friend FASTRNN_MEMBER_FN Value operator-(Value a, Value b) { return {a.v - b.v}; }
  friend FASTRNN_MEMBER_FN Value operator*(Value a, Value b) { return {a.v * b.v}; }
  friend FASTRNN_MEMBER_FN Value operator/(Value a, Value b) { return {a.v / b.v}; }
  friend FASTRNN_MEMBER_FN Value max(Value bound, Value x) { return {bound.v > x.v ? bound.v : x.v}; }
  friend FASTRNN_MEMBER_FN Value min(Value bound, Value x) { return {bound.v < x.v ? bound.v : x.v}; }
  friend FASTRNN_MEMBER_FN Value negative_absolute(Value x) { return {-__builtin_fabs(x.v)}; }
  friend FASTRNN_MEMBER_FN Value less(Value x, Value y, Value yes, Value no) { return x.v < y.v ? yes : no; }
  friend FASTRNN_MEMBER_FN Value less_equal(Value x, Value y, Value yes, Value no) { return x.v <= y.v ? yes : no; }
};

// Storage dtypes as types of their own. Compute is what sums, gates and states are.
struct Bf16 {
  uint16_t bits;
};
struct F16 {
  uint16_t bits;
};

template <class Storage>
struct ComputeOf {
  using type = float;
};
template <>
struct ComputeOf<double> {
  using type = double;
};
template <class Storage>
using Compute = typename ComputeOf<Storage>::type;

FASTRNN_MEMBER_FN float widen(float x) { return x; }
FASTRNN_MEMBER_FN double widen(double x) { return x; }
FASTRNN_MEMBER_FN float widen(Bf16 x) { return bits_as<float>(uint32_t(x.bits) << 16); }
FASTRNN_MEMBER_FN float widen(F16 x) {
#ifdef __CUDA_ARCH__
  return __half2float(bits_as<__half>(x.bits));
#else
  const uint32_t sign = uint32_t(x.bits & 0x8000) << 16, rest = x.bits & 0x7fff;
  if (rest >= 0x7c00) return bits_as<float>(sign | 0x7f800000 | (rest & 0x3ff) << 13);
  if (rest < 0x400) return bits_as<float>(sign | bits_as<uint32_t>(float(rest) * 0x1p-24f));
  return bits_as<float>(sign | ((rest << 13) + (112u << 23)));
#endif
}

// Rounds to the nearest value of Storage, ties to even; NaN stays NaN.
template <class Storage>
FASTRNN_MEMBER_FN Storage narrow(Compute<Storage> x) {
  return x;
}
template <>
FASTRNN_MEMBER_FN Bf16 narrow<Bf16>(float x) {
#ifdef __CUDA_ARCH__
  return bits_as<Bf16>(__float2bfloat16_rn(x));
#else
  const uint32_t b = bits_as<uint32_t>(x);
  return {x != x ? uint16_t(0x7fff) : uint16_t((b + 0x7fff + (b >> 16 & 1)) >> 16)};
#endif
}
template <>
FASTRNN_MEMBER_FN F16 narrow<F16>(float x) {
#ifdef __CUDA_ARCH__
  return bits_as<F16>(__float2half_rn(x));
#else
  const uint32_t b = bits_as<uint32_t>(x), size = b & 0x7fffffff;
  const uint16_t sign = uint16_t(b >> 16 & 0x8000);
  if (size > 0x7f800000) return {uint16_t(sign | 0x7fff)};
  if (size >= 0x477ff000) return {uint16_t(sign | 0x7c00)};  // from 65520 on
  if (size < 0x38800000) {                                   // a denormal: the addition rounds to multiples of 2^-24
    const float shifted = bits_as<float>(size) + 0.5f;
    return {uint16_t(sign | (bits_as<uint32_t>(shifted) - 0x3f000000))};
  }
  return {uint16_t(sign | ((size - (112u << 23) + 0xfff + (size >> 13 & 1)) >> 13))};
#endif
}

template <class Storage>
FASTRNN_MEMBER_FN Compute<Storage> rounded(Compute<Storage> x) {
  return widen(narrow<Storage>(x));
}

}  // namespace cuda
}  // namespace fastrnn
