// How the caller's dtype is read and written: runs of values, or a vector, widened to float or double and narrowed.

FASTRNN_INLINE const char* bytes(const void* p) { return static_cast<const char*>(p); }
FASTRNN_INLINE char* bytes(void* p) { return static_cast<char*>(p); }

template <class V>
struct Storage {
  using T = typename V::T;
  static constexpr int W = V::lanes;
  Dtype dtype;
  int64_t size;
  bool rounds;  // narrower than T: what was stored is not what was computed

  explicit Storage(Dtype d)
      : dtype(d),
        size(d == Dtype::f64   ? 8
             : d == Dtype::f32 ? 4
                               : 2),
        rounds(size < int64_t(sizeof(T))) {}

  // n <= W values at p as a vector, zero beyond.
  FASTRNN_INLINE V load(const Storage& s, const void* p, int64_t n) {
    const T* values = static_cast<const T*>(p);
    if (!s.rounds) return n >= W ? V::load(values) : V::load(values, int(n));
    if constexpr (sizeof(T) == 4) {
      const uint16_t* halves = static_cast<const uint16_t*>(p);
      uint16_t whole[W];
      if (n < W) {
        __builtin_memset(whole, 0, sizeof whole);
        __builtin_memcpy(whole, p, size_t(n) * 2);
        halves = whole;
      }
      return s.dtype == Dtype::bf16 ? load_bf16(halves) : load_f16(halves);
    }
    return V::set(0);
  }

  // Stores the first n <= W lanes; returns x as it was stored.
  FASTRNN_INLINE V store(const Storage& s, V x, void* p, int64_t n) {
    T* values = static_cast<T*>(p);
    if (!s.rounds) {
      if (n >= W)
        x.store(values);
      else
        x.store(values, int(n));
      return x;
    }
    if constexpr (sizeof(T) == 4) {
      uint16_t halves[W];
      if (s.dtype == Dtype::bf16) {
        store_bf16(halves, x);
        x = load_bf16(halves);
      } else {
        store_f16(halves, x);
        x = load_f16(halves);
      }
      if (n >= W)
        __builtin_memcpy(p, halves, sizeof halves);
      else
        __builtin_memcpy(p, halves, size_t(n) * 2);
    }
    return x;
  }

  void widen(const void* from, T* to, int64_t n) const {
    if (n == 0) return;  // of no features there may be no memory
    if (!rounds) {
      __builtin_memcpy(to, from, size_t(n) * sizeof(T));
      return;
    }
    const char* p = static_cast<const char*>(from);
    for (int64_t i = 0; i < n; i += W) {
      const V x = load(*this, p + i * size, n - i);
      if (n - i >= W)
        x.store(to + i);
      else
        x.store(to + i, int(n - i));
    }
  }
  void narrow(const T* from, void* to, int64_t n) const {
    if (!rounds) {
      __builtin_memcpy(to, from, size_t(n) * sizeof(T));
      return;
    }
    char* p = static_cast<char*>(to);
    for (int64_t i = 0; i < n; i += W)
      store(*this, n - i >= W ? V::load(from + i) : V::load(from + i, int(n - i)), p + i * size, n - i);
  }
};
