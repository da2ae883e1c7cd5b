// How the caller's dtype is read and written: runs of values widened to float or double, and narrowed again.

// One dtype's way, a run of n values at a time.
template <class T>
struct Storage {
  int64_t size;
  bool rounds;  // narrower than T: what was stored is not what was computed
  void (*widen)(const void* from, T* to, int64_t n);
  void (*narrow)(const T* from, void* to, int64_t n);
};

template <class T>
static void copy_values(const void* from, T* to, int64_t n) {
  __builtin_memcpy(to, from, size_t(n) * sizeof(T));
}
template <class T>
static void store_values(const T* from, void* to, int64_t n) {
  __builtin_memcpy(to, from, size_t(n) * sizeof(T));
}
static void widen_bf16(const void* from, float* to, int64_t n) {
  const uint16_t* p = static_cast<const uint16_t*>(from);
  int64_t i = 0;
#ifdef FASTRNN_ISA_WIDE
  for (; i + f32::lanes <= n; i += f32::lanes) load_bf16(p + i).store(to + i);
#endif
  for (; i < n; ++i) to[i] = from_bf16(p[i]);
}
static void narrow_bf16(const float* from, void* to, int64_t n) {
  uint16_t* p = static_cast<uint16_t*>(to);
  int64_t i = 0;
#ifdef FASTRNN_ISA_WIDE
  for (; i + f32::lanes <= n; i += f32::lanes) store_bf16(p + i, f32::load(from + i));
#endif
  for (; i < n; ++i) p[i] = to_bf16(from[i]);
}
static void widen_f16(const void* from, float* to, int64_t n) {
  const uint16_t* p = static_cast<const uint16_t*>(from);
  int64_t i = 0;
#ifdef FASTRNN_ISA_WIDE
  for (; i + f32::lanes <= n; i += f32::lanes) load_f16(p + i).store(to + i);
#endif
  for (; i < n; ++i) to[i] = from_f16(p[i]);
}
static void narrow_f16(const float* from, void* to, int64_t n) {
  uint16_t* p = static_cast<uint16_t*>(to);
  int64_t i = 0;
#ifdef FASTRNN_ISA_WIDE
  for (; i + f32::lanes <= n; i += f32::lanes) store_f16(p + i, f32::load(from + i));
#endif
  for (; i < n; ++i) p[i] = to_f16(from[i]);
}

template <class T>
static Storage<T> storage_of(Dtype dtype) {
  if constexpr (sizeof(T) == 4) {
    if (dtype == Dtype::bf16) return {2, true, widen_bf16, narrow_bf16};
    if (dtype == Dtype::f16) return {2, true, widen_f16, narrow_f16};
  }
  return {int64_t(sizeof(T)), false, copy_values<T>, store_values<T>};
}
