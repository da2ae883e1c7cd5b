// sigmoid and tanh over any value type V: the scalar, AVX2 and AVX-512 vectors of cpu/vec.h, cuda/value.cuh's numbers.
//
// Both are at most 2 ulp from the exact value (tests/csrc measures it, tier by tier). exp(x) is reduced by
// x = n ln 2 + r, |r| <= ln 2 / 2, with ln 2 in two pieces (Cody and Waite), and 1 + r + r^2 q(r), q a Chebyshev
// fit; the small exponent bits stay exact because the last addition is to 1. tanh takes an odd polynomial below
// 0.625, where 1 - 2 / (exp(2x) + 1) would cancel.
//
// NaN goes through: every bound is applied by max(bound, x), which returns x when x is NaN.
#pragma once

#ifndef FASTRNN_FN
#define FASTRNN_FN static inline __attribute__((always_inline))
#endif

namespace fastrnn {

// c0 + c1 x + c2 x^2 + ...
template <class V>
FASTRNN_FN V polynomial(V, typename V::T c) {
  return V::set(c);
}
template <class V, class... More>
FASTRNN_FN V polynomial(V x, typename V::T c, More... more) {
  return fma(polynomial(x, more...), x, V::set(c));
}

template <class T>
struct ExpConstants;

template <>
struct ExpConstants<float> {
  static constexpr float log2e = 1.44269504088896341f;
  static constexpr float ln2_high = 0.693359375f;  // 10 bits: n * ln2_high is exact
  static constexpr float ln2_low = -2.12194440054690583e-4f;
  static constexpr float lowest = -104.0f;  // exp is 0 below
  static constexpr float tanh_one = 9.1f;   // tanh is 1 above
  template <class V>
  FASTRNN_FN V q(V x) {
    return polynomial(x, 0.5f, 0.16666576953788770f, 0.041666554572345138f, 0.0083631850315332238f,
                      0.0013926191056242138f);
  }
  template <class V>
  FASTRNN_FN V tanh(V x) {
    return polynomial(x, -0.33333333172140361638f, 0.13333303556915741766f, -0.053959259577204542744f,
                      0.021768918651028210152f, -0.008343945515839152048f, 0.0022927448161781423431f);
  }
};

template <>
struct ExpConstants<double> {
  static constexpr double log2e = 1.44269504088896340736;
  static constexpr double ln2_high = 0x1.62e42fee00000p-1;
  static constexpr double ln2_low = 1.908214929270587816144e-10;
  static constexpr double lowest = -746.0;
  static constexpr double tanh_one = 19.1;
  template <class V>
  FASTRNN_FN V q(V x) {
    return polynomial(x, 0.50000000000000010231, 0.16666666666666667454, 0.04166666666662409382,
                      0.0083333333333300592137, 0.0013888888917230723233, 0.00019841269863066695027,
                      0.000024801521269532121095, 2.7557268439678002354e-6, 2.7620101012098000228e-7,
                      2.5100395159429244017e-8);
  }
  template <class V>
  FASTRNN_FN V tanh(V x) {
    return polynomial(x, -0.33333333333333332938, 0.13333333333333041602, -0.05396825396789699169,
                      0.021869488519008305756, -0.008863235103240877925, 0.0035921217511549622695,
                      -0.0014557754120478055104, 0.0005896606577757043347, -0.00023759064960555619551,
                      0.000092571161295567682707, -0.000031201101425797400033, 6.48516348279311315e-6);
  }
};

// exp(x) for ExpConstants::lowest <= x <= 2 * tanh_one, and NaN.
template <class V>
FASTRNN_FN V exp_bounded(V x) {
  using C = ExpConstants<typename V::T>;
  const V n = nearest(x * V::set(C::log2e));
  V r = fma(n, V::set(-C::ln2_high), x);
  r = fma(n, V::set(-C::ln2_low), r);
  const V p = fma(r * r, C::q(r), r);
  return scale(V::set(1) + p, n);
}

template <class V>
FASTRNN_FN V sigmoid(V x) {
  using C = ExpConstants<typename V::T>;
  const V one = V::set(1);
  const V e = exp_bounded(max(V::set(C::lowest), negative_absolute(x)));
  const V s = one + e;
  const V q = less(x, V::set(0), e, one) / s;
  return fma(q, (s - one) - e, q);  // what rounding 1 + e lost
}

template <class V>
FASTRNN_FN V tanh(V x) {
  using C = ExpConstants<typename V::T>;
  const V one = V::set(1), two = V::set(2);
  const V z = min(V::set(C::tanh_one), absolute(x));
  const V square = z * z;
  const V small = fma(z, square * C::tanh(square), z);
  const V large = one - two / (exp_bounded(z + z) + one);
  return copy_sign(less(z, V::set(0.625), small, large), x);
}

}  // namespace fastrnn
