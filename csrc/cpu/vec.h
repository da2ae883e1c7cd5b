// The vector types of one instruction set: f32 and f64, with the same two dozen names everywhere.
//
// Included inside an ISA's anonymous namespace, once per translation unit, so nothing here can be shared with, or
// chosen by the linker for, code built for a narrower machine. load(p, n) and store(p, n) touch only n lanes.
// max(bound, x) and min(bound, x) return x when x is NaN. scale(x, n) = x * 2^n, for integral n, down to denormals.

#define FASTRNN_INLINE static inline __attribute__((always_inline))
#define FASTRNN_MEMBER inline __attribute__((always_inline))

#if defined(FASTRNN_ISA_AVX512)

struct f32 {
  using T = float;
  static constexpr int lanes = 16;
  __m512 v;
  FASTRNN_INLINE f32 set(float x) { return {_mm512_set1_ps(x)}; }
  FASTRNN_INLINE f32 load(const float* p) { return {_mm512_loadu_ps(p)}; }
  FASTRNN_INLINE f32 load(const float* p, int n) { return {_mm512_maskz_loadu_ps(__mmask16((1u << n) - 1), p)}; }
  void store(float* p) const { _mm512_storeu_ps(p, v); }
  void store(float* p, int n) const { _mm512_mask_storeu_ps(p, __mmask16((1u << n) - 1), v); }
};
FASTRNN_INLINE f32 operator+(f32 a, f32 b) { return {_mm512_add_ps(a.v, b.v)}; }
FASTRNN_INLINE f32 operator-(f32 a, f32 b) { return {_mm512_sub_ps(a.v, b.v)}; }
FASTRNN_INLINE f32 operator*(f32 a, f32 b) { return {_mm512_mul_ps(a.v, b.v)}; }
FASTRNN_INLINE f32 operator/(f32 a, f32 b) { return {_mm512_div_ps(a.v, b.v)}; }
FASTRNN_INLINE f32 fma(f32 a, f32 b, f32 c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
FASTRNN_INLINE f32 max(f32 bound, f32 x) { return {_mm512_max_ps(bound.v, x.v)}; }
FASTRNN_INLINE f32 min(f32 bound, f32 x) { return {_mm512_min_ps(bound.v, x.v)}; }
FASTRNN_INLINE f32 absolute(f32 x) { return {_mm512_andnot_ps(_mm512_set1_ps(-0.0f), x.v)}; }
FASTRNN_INLINE f32 negative_absolute(f32 x) { return {_mm512_or_ps(_mm512_set1_ps(-0.0f), x.v)}; }
FASTRNN_INLINE f32 copy_sign(f32 x, f32 s) {  // x >= 0
  return {_mm512_or_ps(x.v, _mm512_and_ps(_mm512_set1_ps(-0.0f), s.v))};
}
FASTRNN_INLINE f32 nearest(f32 x) { return {_mm512_roundscale_ps(x.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
FASTRNN_INLINE f32 scale(f32 x, f32 n) { return {_mm512_scalef_ps(x.v, n.v)}; }
FASTRNN_INLINE f32 less(f32 x, f32 y, f32 yes, f32 no) {
  return {_mm512_mask_blend_ps(_mm512_cmp_ps_mask(x.v, y.v, _CMP_LT_OQ), no.v, yes.v)};
}
FASTRNN_INLINE f32 less_equal(f32 x, f32 y, f32 yes, f32 no) {
  return {_mm512_mask_blend_ps(_mm512_cmp_ps_mask(x.v, y.v, _CMP_LE_OQ), no.v, yes.v)};
}

struct f64 {
  using T = double;
  static constexpr int lanes = 8;
  __m512d v;
  FASTRNN_INLINE f64 set(double x) { return {_mm512_set1_pd(x)}; }
  FASTRNN_INLINE f64 load(const double* p) { return {_mm512_loadu_pd(p)}; }
  FASTRNN_INLINE f64 load(const double* p, int n) { return {_mm512_maskz_loadu_pd(__mmask8((1u << n) - 1), p)}; }
  void store(double* p) const { _mm512_storeu_pd(p, v); }
  void store(double* p, int n) const { _mm512_mask_storeu_pd(p, __mmask8((1u << n) - 1), v); }
};
FASTRNN_INLINE f64 operator+(f64 a, f64 b) { return {_mm512_add_pd(a.v, b.v)}; }
FASTRNN_INLINE f64 operator-(f64 a, f64 b) { return {_mm512_sub_pd(a.v, b.v)}; }
FASTRNN_INLINE f64 operator*(f64 a, f64 b) { return {_mm512_mul_pd(a.v, b.v)}; }
FASTRNN_INLINE f64 operator/(f64 a, f64 b) { return {_mm512_div_pd(a.v, b.v)}; }
FASTRNN_INLINE f64 fma(f64 a, f64 b, f64 c) { return {_mm512_fmadd_pd(a.v, b.v, c.v)}; }
FASTRNN_INLINE f64 max(f64 bound, f64 x) { return {_mm512_max_pd(bound.v, x.v)}; }
FASTRNN_INLINE f64 min(f64 bound, f64 x) { return {_mm512_min_pd(bound.v, x.v)}; }
FASTRNN_INLINE f64 absolute(f64 x) { return {_mm512_andnot_pd(_mm512_set1_pd(-0.0), x.v)}; }
FASTRNN_INLINE f64 negative_absolute(f64 x) { return {_mm512_or_pd(_mm512_set1_pd(-0.0), x.v)}; }
FASTRNN_INLINE f64 copy_sign(f64 x, f64 s) { return {_mm512_or_pd(x.v, _mm512_and_pd(_mm512_set1_pd(-0.0), s.v))}; }
FASTRNN_INLINE f64 nearest(f64 x) { return {_mm512_roundscale_pd(x.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
FASTRNN_INLINE f64 scale(f64 x, f64 n) { return {_mm512_scalef_pd(x.v, n.v)}; }
FASTRNN_INLINE f64 less(f64 x, f64 y, f64 yes, f64 no) {
  return {_mm512_mask_blend_pd(_mm512_cmp_pd_mask(x.v, y.v, _CMP_LT_OQ), no.v, yes.v)};
}
FASTRNN_INLINE f64 less_equal(f64 x, f64 y, f64 yes, f64 no) {
  return {_mm512_mask_blend_pd(_mm512_cmp_pd_mask(x.v, y.v, _CMP_LE_OQ), no.v, yes.v)};
}

// a0 b0 a1 b1 ... of the lower, and of the upper, halves.
FASTRNN_INLINE f32 zip_low(f32 a, f32 b) {
  const __m512i index = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  return {_mm512_permutex2var_ps(a.v, index, b.v)};
}
FASTRNN_INLINE f32 zip_high(f32 a, f32 b) {
  const __m512i index = _mm512_setr_epi32(8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
  return {_mm512_permutex2var_ps(a.v, index, b.v)};
}
FASTRNN_INLINE f64 zip_low(f64 a, f64 b) {
  return {_mm512_permutex2var_pd(a.v, _mm512_setr_epi64(0, 8, 1, 9, 2, 10, 3, 11), b.v)};
}
FASTRNN_INLINE f64 zip_high(f64 a, f64 b) {
  return {_mm512_permutex2var_pd(a.v, _mm512_setr_epi64(4, 12, 5, 13, 6, 14, 7, 15), b.v)};
}

FASTRNN_INLINE f32 load_bf16(const uint16_t* p) {
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16))};
}
// Words whose halves are bfloat16's one.
FASTRNN_INLINE f32 one_bf16() { return {_mm512_castsi512_ps(_mm512_set1_epi32(0x3f803f80))}; }
// sum + x.low * y.low + x.high * y.high, lane by lane, of pairs of bfloat16; denormal numbers count as zero. As text,
// because the compiler is not told of the extension: only code that asked CPUID comes here.
FASTRNN_INLINE f32 dot_pairs(f32 x, f32 y, f32 sum) {
  __asm__("vdpbf16ps %2, %1, %0" : "+v"(sum.v) : "v"(x.v), "v"(y.v));
  return sum;
}
FASTRNN_INLINE f32 load_f16(const uint16_t* p) { return {_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p))}; }
// x as bfloat16, in the lower half of each lane.
FASTRNN_INLINE __m512i round_bf16(f32 x) {
  const __m512i bits = _mm512_castps_si512(x.v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i round = _mm512_srli_epi32(_mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff))), 16);
  return _mm512_mask_mov_epi32(round, _mm512_cmp_ps_mask(x.v, x.v, _CMP_UNORD_Q), _mm512_set1_epi32(0x7fc0));
}
FASTRNN_INLINE void store_bf16(uint16_t* p, f32 x) {
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtepi32_epi16(round_bf16(x)));
}
// Words whose lower and upper halves are the values of two vectors, rounded to bfloat16.
FASTRNN_INLINE f32 zip_bf16(f32 lower, f32 upper) {
  return {_mm512_castsi512_ps(_mm512_or_si512(round_bf16(lower), _mm512_slli_epi32(round_bf16(upper), 16)))};
}
// The lower, or the upper, halves of the words at p.
FASTRNN_INLINE void store_bf16_half(float* p, f32 x, bool upper) {
  const __m512i halves = round_bf16(x);
  if (upper)
    _mm512_mask_storeu_epi16(p, 0xaaaaaaaa, _mm512_slli_epi32(halves, 16));
  else
    _mm512_mask_storeu_epi16(p, 0x55555555, halves);
}
FASTRNN_INLINE void store_f16(uint16_t* p, f32 x) {
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph(x.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}

// The sum of the lanes. Squares in double: of two lanes in one.
FASTRNN_INLINE float total(f32 x) { return _mm512_reduce_add_ps(x.v); }
FASTRNN_INLINE double total(f64 x) { return _mm512_reduce_add_pd(x.v); }
FASTRNN_INLINE f64 squares(f64 x) { return x * x; }
FASTRNN_INLINE f64 squares(f32 x) {
  const f64 low{_mm512_cvtps_pd(_mm512_castps512_ps256(x.v))}, high{_mm512_cvtps_pd(_mm512_extractf32x8_ps(x.v, 1))};
  return fma(low, low, high * high);
}

#elif defined(FASTRNN_ISA_AVX2)

FASTRNN_INLINE __m256i lane_mask32(int n) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
FASTRNN_INLINE __m256i lane_mask64(int n) {
  return _mm256_cmpgt_epi64(_mm256_set1_epi64x(n), _mm256_setr_epi64x(0, 1, 2, 3));
}

struct f32 {
  using T = float;
  static constexpr int lanes = 8;
  __m256 v;
  FASTRNN_INLINE f32 set(float x) { return {_mm256_set1_ps(x)}; }
  FASTRNN_INLINE f32 load(const float* p) { return {_mm256_loadu_ps(p)}; }
  FASTRNN_INLINE f32 load(const float* p, int n) { return {_mm256_maskload_ps(p, lane_mask32(n))}; }
  void store(float* p) const { _mm256_storeu_ps(p, v); }
  void store(float* p, int n) const { _mm256_maskstore_ps(p, lane_mask32(n), v); }
};
FASTRNN_INLINE f32 operator+(f32 a, f32 b) { return {_mm256_add_ps(a.v, b.v)}; }
FASTRNN_INLINE f32 operator-(f32 a, f32 b) { return {_mm256_sub_ps(a.v, b.v)}; }
FASTRNN_INLINE f32 operator*(f32 a, f32 b) { return {_mm256_mul_ps(a.v, b.v)}; }
FASTRNN_INLINE f32 operator/(f32 a, f32 b) { return {_mm256_div_ps(a.v, b.v)}; }
FASTRNN_INLINE f32 fma(f32 a, f32 b, f32 c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
FASTRNN_INLINE f32 max(f32 bound, f32 x) { return {_mm256_max_ps(bound.v, x.v)}; }
FASTRNN_INLINE f32 min(f32 bound, f32 x) { return {_mm256_min_ps(bound.v, x.v)}; }
FASTRNN_INLINE f32 absolute(f32 x) { return {_mm256_andnot_ps(_mm256_set1_ps(-0.0f), x.v)}; }
FASTRNN_INLINE f32 negative_absolute(f32 x) { return {_mm256_or_ps(_mm256_set1_ps(-0.0f), x.v)}; }
FASTRNN_INLINE f32 copy_sign(f32 x, f32 s) { return {_mm256_or_ps(x.v, _mm256_and_ps(_mm256_set1_ps(-0.0f), s.v))}; }
FASTRNN_INLINE f32 nearest(f32 x) { return {_mm256_round_ps(x.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
FASTRNN_INLINE f32 scale(f32 x, f32 n) {  // in two halves: 2^n itself may not be a normal number
  const __m256i whole = _mm256_cvtps_epi32(n.v);
  const __m256i half = _mm256_srai_epi32(whole, 1);
  const __m256i rest = _mm256_sub_epi32(whole, half);
  const __m256i bias = _mm256_set1_epi32(127);
  const __m256 a = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(half, bias), 23));
  const __m256 b = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(rest, bias), 23));
  return {_mm256_mul_ps(_mm256_mul_ps(x.v, a), b)};
}
FASTRNN_INLINE f32 less(f32 x, f32 y, f32 yes, f32 no) {
  return {_mm256_blendv_ps(no.v, yes.v, _mm256_cmp_ps(x.v, y.v, _CMP_LT_OQ))};
}
FASTRNN_INLINE f32 less_equal(f32 x, f32 y, f32 yes, f32 no) {
  return {_mm256_blendv_ps(no.v, yes.v, _mm256_cmp_ps(x.v, y.v, _CMP_LE_OQ))};
}

struct f64 {
  using T = double;
  static constexpr int lanes = 4;
  __m256d v;
  FASTRNN_INLINE f64 set(double x) { return {_mm256_set1_pd(x)}; }
  FASTRNN_INLINE f64 load(const double* p) { return {_mm256_loadu_pd(p)}; }
  FASTRNN_INLINE f64 load(const double* p, int n) { return {_mm256_maskload_pd(p, lane_mask64(n))}; }
  void store(double* p) const { _mm256_storeu_pd(p, v); }
  void store(double* p, int n) const { _mm256_maskstore_pd(p, lane_mask64(n), v); }
};
FASTRNN_INLINE f64 operator+(f64 a, f64 b) { return {_mm256_add_pd(a.v, b.v)}; }
FASTRNN_INLINE f64 operator-(f64 a, f64 b) { return {_mm256_sub_pd(a.v, b.v)}; }
FASTRNN_INLINE f64 operator*(f64 a, f64 b) { return {_mm256_mul_pd(a.v, b.v)}; }
FASTRNN_INLINE f64 operator/(f64 a, f64 b) { return {_mm256_div_pd(a.v, b.v)}; }
FASTRNN_INLINE f64 fma(f64 a, f64 b, f64 c) { return {_mm256_fmadd_pd(a.v, b.v, c.v)}; }
FASTRNN_INLINE f64 max(f64 bound, f64 x) { return {_mm256_max_pd(bound.v, x.v)}; }
FASTRNN_INLINE f64 min(f64 bound, f64 x) { return {_mm256_min_pd(bound.v, x.v)}; }
FASTRNN_INLINE f64 absolute(f64 x) { return {_mm256_andnot_pd(_mm256_set1_pd(-0.0), x.v)}; }
FASTRNN_INLINE f64 negative_absolute(f64 x) { return {_mm256_or_pd(_mm256_set1_pd(-0.0), x.v)}; }
FASTRNN_INLINE f64 copy_sign(f64 x, f64 s) { return {_mm256_or_pd(x.v, _mm256_and_pd(_mm256_set1_pd(-0.0), s.v))}; }
FASTRNN_INLINE f64 nearest(f64 x) { return {_mm256_round_pd(x.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
FASTRNN_INLINE f64 scale(f64 x, f64 n) {
  const __m128i whole = _mm256_cvtpd_epi32(n.v);
  const __m128i half = _mm_srai_epi32(whole, 1);
  const __m128i rest = _mm_sub_epi32(whole, half);
  const __m256i bias = _mm256_set1_epi64x(1023);
  const __m256i a = _mm256_slli_epi64(_mm256_add_epi64(_mm256_cvtepi32_epi64(half), bias), 52);
  const __m256i b = _mm256_slli_epi64(_mm256_add_epi64(_mm256_cvtepi32_epi64(rest), bias), 52);
  return {_mm256_mul_pd(_mm256_mul_pd(x.v, _mm256_castsi256_pd(a)), _mm256_castsi256_pd(b))};
}
FASTRNN_INLINE f64 less(f64 x, f64 y, f64 yes, f64 no) {
  return {_mm256_blendv_pd(no.v, yes.v, _mm256_cmp_pd(x.v, y.v, _CMP_LT_OQ))};
}
FASTRNN_INLINE f64 less_equal(f64 x, f64 y, f64 yes, f64 no) {
  return {_mm256_blendv_pd(no.v, yes.v, _mm256_cmp_pd(x.v, y.v, _CMP_LE_OQ))};
}

// a0 b0 a1 b1 ... of the lower, and of the upper, halves.
FASTRNN_INLINE f32 zip_low(f32 a, f32 b) {
  return {_mm256_permute2f128_ps(_mm256_unpacklo_ps(a.v, b.v), _mm256_unpackhi_ps(a.v, b.v), 0x20)};
}
FASTRNN_INLINE f32 zip_high(f32 a, f32 b) {
  return {_mm256_permute2f128_ps(_mm256_unpacklo_ps(a.v, b.v), _mm256_unpackhi_ps(a.v, b.v), 0x31)};
}
FASTRNN_INLINE f64 zip_low(f64 a, f64 b) {
  return {_mm256_permute2f128_pd(_mm256_unpacklo_pd(a.v, b.v), _mm256_unpackhi_pd(a.v, b.v), 0x20)};
}
FASTRNN_INLINE f64 zip_high(f64 a, f64 b) {
  return {_mm256_permute2f128_pd(_mm256_unpacklo_pd(a.v, b.v), _mm256_unpackhi_pd(a.v, b.v), 0x31)};
}

FASTRNN_INLINE f32 load_bf16(const uint16_t* p) {
  return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16))};
}
FASTRNN_INLINE f32 load_f16(const uint16_t* p) { return {_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p))}; }
FASTRNN_INLINE void store_bf16(uint16_t* p, f32 x) {
  const __m256i bits = _mm256_castps_si256(x.v);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  __m256i round = _mm256_srli_epi32(_mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff))), 16);
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x.v, x.v, _CMP_UNORD_Q));
  round = _mm256_blendv_epi8(round, _mm256_set1_epi32(0x7fc0), nan);
  const __m256i halves = _mm256_permute4x64_epi64(_mm256_packus_epi32(round, round), 0x08);
  _mm_storeu_si128((__m128i*)p, _mm256_castsi256_si128(halves));
}
FASTRNN_INLINE void store_f16(uint16_t* p, f32 x) {
  _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph(x.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}

FASTRNN_INLINE double total(f64 x) {
  const __m128d halves = _mm_add_pd(_mm256_castpd256_pd128(x.v), _mm256_extractf128_pd(x.v, 1));
  return _mm_cvtsd_f64(_mm_add_sd(halves, _mm_unpackhi_pd(halves, halves)));
}
FASTRNN_INLINE float total(f32 x) {
  const __m128 halves = _mm_add_ps(_mm256_castps256_ps128(x.v), _mm256_extractf128_ps(x.v, 1));
  const __m128 pairs = _mm_add_ps(halves, _mm_movehl_ps(halves, halves));
  return _mm_cvtss_f32(_mm_add_ss(pairs, _mm_shuffle_ps(pairs, pairs, 1)));
}
FASTRNN_INLINE f64 squares(f64 x) { return x * x; }
FASTRNN_INLINE f64 squares(f32 x) {
  const f64 low{_mm256_cvtps_pd(_mm256_castps256_ps128(x.v))}, high{_mm256_cvtps_pd(_mm256_extractf128_ps(x.v, 1))};
  return fma(low, low, high * high);
}

#else  // one lane, plain C++: the oracle, and every machine without a tier of its own

template <class Real, class Bits, int mantissa, int bias>
struct Lane {
  using T = Real;
  static constexpr int lanes = 1;
  Real v;
  FASTRNN_INLINE Lane set(Real x) { return {x}; }
  FASTRNN_INLINE Lane load(const Real* p) { return {*p}; }
  FASTRNN_INLINE Lane load(const Real* p, int) { return {*p}; }
  void store(Real* p) const { *p = v; }
  void store(Real* p, int) const { *p = v; }

  friend Lane operator+(Lane a, Lane b) { return {a.v + b.v}; }
  friend Lane operator-(Lane a, Lane b) { return {a.v - b.v}; }
  friend Lane operator*(Lane a, Lane b) { return {a.v * b.v}; }
  friend Lane operator/(Lane a, Lane b) { return {a.v / b.v}; }
  friend Lane fma(Lane a, Lane b, Lane c) { return {a.v * b.v + c.v}; }
  friend Lane max(Lane bound, Lane x) { return {bound.v > x.v ? bound.v : x.v}; }
  friend Lane min(Lane bound, Lane x) { return {bound.v < x.v ? bound.v : x.v}; }
  friend Lane absolute(Lane x) { return with_sign(x, 0); }
  friend Lane negative_absolute(Lane x) { return with_sign(x, sign_bit); }
  friend Lane copy_sign(Lane x, Lane s) { return with_sign(x, bits(s) & sign_bit); }
  friend Lane nearest(Lane x) {  // |x| is far below 2^mantissa: adding and taking away 1.5 * 2^mantissa rounds
    const Real shift = Real(3) * Real(Bits(1) << (mantissa - 1));
    return {(x.v + shift) - shift};
  }
  friend Lane scale(Lane x, Lane n) {
    const int whole = n.v == n.v ? int(n.v) : 0, half = whole >> 1;
    return {x.v * power_of_two(half) * power_of_two(whole - half)};
  }
  friend Lane zip_low(Lane a, Lane) { return a; }
  friend Lane zip_high(Lane, Lane b) { return b; }
  friend Lane less(Lane x, Lane y, Lane yes, Lane no) { return x.v < y.v ? yes : no; }
  friend Lane less_equal(Lane x, Lane y, Lane yes, Lane no) { return x.v <= y.v ? yes : no; }

 private:
  static constexpr Bits sign_bit = Bits(1) << (sizeof(Bits) * 8 - 1);
  static Bits bits(Lane x) {
    Bits b;
    __builtin_memcpy(&b, &x.v, sizeof b);
    return b;
  }
  static Lane with_sign(Lane x, Bits sign) {
    const Bits b = (bits(x) & ~sign_bit) | sign;
    __builtin_memcpy(&x.v, &b, sizeof b);
    return x;
  }
  static Real power_of_two(int n) {
    const Bits b = Bits(n + bias) << mantissa;
    Real x;
    __builtin_memcpy(&x, &b, sizeof b);
    return x;
  }
};
using f32 = Lane<float, uint32_t, 23, 127>;
using f64 = Lane<double, uint64_t, 52, 1023>;
FASTRNN_INLINE float total(f32 x) { return x.v; }
FASTRNN_INLINE double total(f64 x) { return x.v; }
FASTRNN_INLINE f64 squares(f64 x) { return {x.v * x.v}; }
FASTRNN_INLINE f64 squares(f32 x) { return {double(x.v) * double(x.v)}; }

FASTRNN_INLINE float float_from_bits(uint32_t bits) {
  float x;
  __builtin_memcpy(&x, &bits, 4);
  return x;
}
FASTRNN_INLINE uint32_t bits_from_float(float x) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, 4);
  return bits;
}
FASTRNN_INLINE float from_bf16(uint16_t h) { return float_from_bits(uint32_t(h) << 16); }
FASTRNN_INLINE uint16_t to_bf16(float x) {
  const uint32_t bits = bits_from_float(x);
  return x == x ? uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16) : uint16_t(0x7fc0);
}
FASTRNN_INLINE float from_f16(uint16_t h) {
  const uint32_t sign = uint32_t(h & 0x8000) << 16, magnitude = h & 0x7fff;
  if (magnitude >= 0x7c00) return float_from_bits(sign | 0x7f800000 | (magnitude & 0x3ff) << 13);  // inf, NaN
  if (magnitude < 0x0400) {  // zero and denormals: magnitude * 2^-24, exact
    const float x = float(magnitude) * 5.9604644775390625e-8f;
    return sign ? -x : x;
  }
  return float_from_bits(sign | ((magnitude << 13) + ((127 - 15) << 23)));
}
FASTRNN_INLINE uint16_t to_f16(float x) {
  const uint32_t bits = bits_from_float(x), magnitude = bits & 0x7fffffff;
  const uint16_t sign = uint16_t(bits >> 16 & 0x8000);
  if (magnitude > 0x7f800000) return uint16_t(sign | 0x7e00);   // NaN
  if (magnitude >= 0x477ff000) return uint16_t(sign | 0x7c00);  // rounds to 65536 and up: inf
  if (magnitude < 0x38800000) {                                 // below 2^-14: a multiple of 2^-24, rounded by adding
    const float shifted = float_from_bits(magnitude) + 0.5f;    // 0.5 has 2^-24 as its last bit
    return uint16_t(sign | (bits_from_float(shifted) - 0x3f000000));
  }
  return uint16_t(sign | ((magnitude - ((127 - 15) << 23) + 0xfff + (magnitude >> 13 & 1)) >> 13));
}

FASTRNN_INLINE f32 load_bf16(const uint16_t* p) { return {from_bf16(*p)}; }
FASTRNN_INLINE f32 load_f16(const uint16_t* p) { return {from_f16(*p)}; }
FASTRNN_INLINE void store_bf16(uint16_t* p, f32 x) { *p = to_bf16(x.v); }
FASTRNN_INLINE void store_f16(uint16_t* p, f32 x) { *p = to_f16(x.v); }

#endif
