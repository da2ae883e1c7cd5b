// What the forward and the backward pass of a layer share: where rows lie, which are active, where resets cut.

// Hands out pieces of one block of memory, 64-byte aligned. The first round only counts (memory null).
struct Carve {
  char* memory;
  int64_t used = 0;
  template <class T>
  T* take(int64_t n) {
    T* piece = memory ? reinterpret_cast<T*>(memory + used) : nullptr;
    used += (n * int64_t(sizeof(T)) + 63) / 64 * 64;
    return piece;
  }
};

FASTRNN_INLINE int64_t round_up(int64_t n, int64_t to) { return ceil_div(n, to) * to; }

// Stored row of (t, b) in the tape and the gradient operands.
FASTRNN_INLINE int64_t stored_row(const Layer& p, int64_t t, int64_t b) {
  return (p.first_row ? p.first_row[t] : t * p.B) + b;
}
FASTRNN_INLINE int64_t stored_rows(const Layer& p) { return p.first_row ? p.first_row[p.T] : p.T * p.B; }

// Element offset of row (t, b) of a [T, B, features] tensor.
template <class R>
FASTRNN_INLINE int64_t row_offset(const Layer& p, const R& rows, int64_t t, int64_t b) {
  return (p.first_row ? p.first_row[t] * rows.row : t * rows.step) + b * rows.row;
}

FASTRNN_INLINE int64_t length_of(const Layer& p, int64_t b) { return p.lengths ? p.lengths[b] : p.T; }

FASTRNN_INLINE bool reset_at(const Layer& p, int64_t t, int64_t b) {
  return p.reset[t * p.reset_step + b * p.reset_row];
}

// Whether the state that enters step t of row b in direction d starts from zero. Only asked of active steps.
FASTRNN_INLINE bool is_cut(const Layer& p, int d, int64_t t, int64_t b) {
  if (p.reset == nullptr) return false;
  if (d == 0) return reset_at(p, t, b);
  return t + 1 < length_of(p, b) && reset_at(p, t + 1, b);
}

// The rows of one slice in one direction, and how many of them are active at a step: rows are sorted longest first, so
// the active ones are the first `active` of them. Steps are visited in order, up or down.
struct Active {
  const Layer& p;
  const int64_t* order;
  int64_t n;
  int64_t active;

  Active(const Layer& layer, const int64_t* rows, int64_t count) : p(layer), order(rows), n(count), active(count) {}
  int64_t at(int64_t t) {
    if (p.lengths == nullptr) return n;
    while (active > 0 && p.lengths[order[active - 1]] <= t) --active;
    while (active < n && p.lengths[order[active]] > t) ++active;
    return active;
  }
};

// Packing is shared out by groups.
template <class V, int G>
static int64_t group_count(const Packed<V, G>& m) {
  return ceil_div(m.blocks, Packed<V, G>::U);
}

template <class F>
static void run_team(const Team& team, int64_t n, const F& f) {
  if (team.size <= 1 || n <= 1) {
    f(int64_t(0), n);
    return;
  }
  team.run(
      team.context, n,
      [](void* argument, int64_t begin, int64_t end) { (*static_cast<const F*>(argument))(begin, end); },
      const_cast<void*>(static_cast<const void*>(&f)));
}

FASTRNN_INLINE const char* bytes(const void* p) { return static_cast<const char*>(p); }
FASTRNN_INLINE char* bytes(void* p) { return static_cast<char*>(p); }

template <class T>
FASTRNN_INLINE void zero(T* p, int64_t n) {
  __builtin_memset(p, 0, size_t(n) * sizeof(T));
}

// Rows order[0, n) of direction d of a [D, B, width] tensor, `padded` values apart; zero where there is no tensor.
template <class T>
static void load_state(const Layer& p, const Storage<T>& storage, const void* from, int d, const int64_t* order,
                       int64_t n, int64_t width, int64_t padded, T* to) {
  zero(to, n * padded);
  if (from == nullptr) return;
  for (int64_t i = 0; i < n; ++i)
    storage.widen(bytes(from) + (d * p.B + order[i]) * width * storage.size, to + i * padded, width);
}
