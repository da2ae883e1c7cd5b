// What a product multiplies: single values of the compute type, or pairs of bfloat16, which one instruction multiplies
// and sums two by two. Either way as words of the size of a compute value: a row of the left matrix is broadcast word
// by word, and a packed matrix holds word k of a column where value k would lie. The blocks that a weight gradient is
// summed from (gradients.h) hold words as well, there of a column's values in neighbouring rows.

struct NoSession {};

template <class V>
struct Singles {
  using T = typename V::T;
  using Left = Singles;                                      // what the left matrix of a weight gradient lies in
  using Session = NoSession;                                 // what a thread has about it while it works on a pass
  static constexpr bool tiled = false;                       // whether products go through tiles (tiles.h)
  static constexpr int weight_bytes = int(sizeof(T));        // of a packed weight
  static constexpr double speed = sizeof(T) == 8 ? 0.5 : 1;  // of products, beside float32's by fma
  static constexpr bool keeps_small = false;                 // whether rows too small for tiles have to be looked for
  static constexpr int64_t row_beyond = 0;                   // rows of the left matrix that are read past its end
  static constexpr int64_t row_multiple = 1;                 // rows of a weight gradient are padded to
  static constexpr int64_t words(int64_t values) { return values; }
  static constexpr int64_t stride(int64_t words) { return words; }  // from row to row of the left matrix
  // Of a column of so many rows, in the blocks that a weight gradient is summed from.
  static constexpr int64_t row_words(int64_t rows) { return rows; }
  FASTRNN_INLINE V multiply_add(V x, V y, V sum) { return fma(x, y, sum); }

  // Whether words say all of the values that are stored.
  static constexpr bool exact(const Storage<V>&) { return true; }
  // n stored values as words.
  static void read(const Storage<V>& storage, const void* from, T* to, int64_t n) { storage.widen(from, to, n); }
  // Whether stored rows of n values, the first at `from`, are words already.
  static bool readable(const Storage<V>& storage, const void*, int64_t) { return !storage.rounds; }

  // The values from `unit` on of a row of words, as a vector; n of them, or more than a vector, are values of the row.
  FASTRNN_INLINE V load(const T* row, int64_t unit) { return V::load(row + unit); }
  FASTRNN_INLINE void store(V x, T* row, int64_t unit, int64_t) { x.store(row + unit); }

  // The words of the first n columns of stored rows: `even`, and where values are paired `odd`; null: zeros.
  FASTRNN_INLINE V zip(const Storage<V>& storage, const void* even, const void*, int64_t n) {
    return Storage<V>::load(storage, even, n);
  }
  // Makes x row `row` of a block of such words. sum plus the values of the words.
  FASTRNN_INLINE void put(V x, T* block, int64_t row) { x.store(block + row * V::lanes); }
  FASTRNN_INLINE V add(V words, V sum) { return sum + words; }
};

#if defined(FASTRNN_ISA_AVX512)
// Of bfloat16 storage a row of words holds the values as they are stored, of float32 it holds them rounded; an odd one
// out is paired with zero.
struct Pairs {
  using T = float;
  using Left = Pairs;
  using Session = NoSession;
  static constexpr bool tiled = false, keeps_small = false;
  static constexpr int weight_bytes = 4;  // planned as float32 is
  static constexpr double speed = 1;
  static constexpr int64_t row_beyond = 0, row_multiple = 2;
  static constexpr int64_t words(int64_t values) { return (values + 1) / 2; }
  static constexpr int64_t stride(int64_t words) { return words; }
  static constexpr int64_t row_words(int64_t rows) { return words(rows); }
  FASTRNN_INLINE f32 multiply_add(f32 x, f32 y, f32 sum) { return dot_pairs(x, y, sum); }

  static bool exact(const Storage<f32>& storage) { return storage.dtype == Dtype::bf16; }
  static void read(const Storage<f32>& storage, const void* from, T* to, int64_t n) {
    if (n % 2) to[n / 2] = 0;
    if (storage.dtype == Dtype::bf16)
      __builtin_memcpy(to, from, size_t(n) * 2);
    else
      Storage<f32>(Dtype::bf16).narrow(static_cast<const T*>(from), to, n);
  }
  static bool readable(const Storage<f32>& storage, const void* from, int64_t n) {
    return storage.dtype == Dtype::bf16 && n % 2 == 0 && reinterpret_cast<uintptr_t>(from) % sizeof(T) == 0;
  }

  FASTRNN_INLINE f32 load(const T* row, int64_t unit) {
    return load_bf16(reinterpret_cast<const uint16_t*>(row) + unit);
  }
  FASTRNN_INLINE void store(f32 x, T* row, int64_t unit, int64_t n) {
    uint16_t* halves = reinterpret_cast<uint16_t*>(row) + unit;
    store_bf16(halves, x);
    if (n < f32::lanes && n % 2)
      __builtin_memset(halves + n, 0, 2);  // lanes past the row may hold NaN, which times zero is not zero
  }

  FASTRNN_INLINE f32 zip(const Storage<f32>& storage, const void* even, const void* odd, int64_t n) {
    const f32 lower = Storage<f32>::load(storage, even, n);
    return zip_bf16(lower, odd ? Storage<f32>::load(storage, odd, n) : f32::set(0));
  }
  FASTRNN_INLINE void put(f32 x, T* block, int64_t row) { store_bf16_half(block + row / 2 * f32::lanes, x, row % 2); }
  FASTRNN_INLINE f32 add(f32 words, f32 sum) { return dot_pairs(words, one_bf16(), sum); }
};
#endif
