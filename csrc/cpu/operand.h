// What a product multiplies: single values of the compute type, or pairs of bfloat16, which one instruction multiplies
// and sums two by two. Either way as words of the size of a compute value: a row of the left matrix is broadcast word
// by word, and a packed matrix holds word k of a column where value k would lie.

template <class V>
struct Singles {
  using T = typename V::T;
  static constexpr int64_t words(int64_t values) { return values; }
  FASTRNN_INLINE V multiply_add(V x, V y, V sum) { return fma(x, y, sum); }

  // n stored values as words, and back.
  static void read(const Storage<V>& storage, const void* from, T* to, int64_t n) { storage.widen(from, to, n); }
  static void write(const Storage<V>& storage, const T* from, void* to, int64_t n) { storage.narrow(from, to, n); }
  // Whether stored rows of n values, the first at `from`, are words already.
  static bool readable(const Storage<V>& storage, const void*, int64_t) { return !storage.rounds; }

  // The values from `unit` on of a row of words, as a vector; n of them, or more than a vector, are values of the row.
  FASTRNN_INLINE V load(const T* row, int64_t unit) { return V::load(row + unit); }
  FASTRNN_INLINE void store(V x, T* row, int64_t unit, int64_t) { x.store(row + unit); }
};

#if defined(FASTRNN_ISA_AVX512)
// For bfloat16 storage, whose values a row of words holds as they are stored; an odd one out is paired with zero.
struct Pairs {
  using T = float;
  static constexpr int64_t words(int64_t values) { return (values + 1) / 2; }
  FASTRNN_INLINE f32 multiply_add(f32 x, f32 y, f32 sum) { return dot_pairs(x, y, sum); }

  static void read(const Storage<f32>&, const void* from, T* to, int64_t n) {
    if (n % 2) to[n / 2] = 0;
    __builtin_memcpy(to, from, size_t(n) * 2);
  }
  static void write(const Storage<f32>&, const T* from, void* to, int64_t n) {
    __builtin_memcpy(to, from, size_t(n) * 2);
  }
  static bool readable(const Storage<f32>&, const void* from, int64_t n) {
    return n % 2 == 0 && reinterpret_cast<uintptr_t>(from) % sizeof(T) == 0;
  }

  FASTRNN_INLINE f32 load(const T* row, int64_t unit) {
    return load_bf16(reinterpret_cast<const uint16_t*>(row) + unit);
  }
  FASTRNN_INLINE void store(f32 x, T* row, int64_t unit, int64_t n) {
    uint16_t* halves = reinterpret_cast<uint16_t*>(row) + unit;
    store_bf16(halves, x);
    if (n < f32::lanes && n % 2) halves[n] = 0;  // lanes past the row may hold NaN, which times zero is not zero
  }
};
#endif
