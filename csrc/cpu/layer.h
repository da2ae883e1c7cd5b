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
  // Between what different threads write: a prefetcher that runs past the end of one's lines takes the other's away.
  void gap() { used += 1024; }
};

FASTRNN_INLINE int64_t round_up(int64_t n, int64_t to) { return ceil_div(n, to) * to; }

// Active rows of all steps before t.
FASTRNN_INLINE int64_t rows_before(const Layer& p, int64_t t) { return p.first_row ? p.first_row[t] : t * p.B; }
// The ranks below this are active at step t.
FASTRNN_INLINE int64_t active_rows(const Layer& p, int64_t t) { return rows_before(p, t + 1) - rows_before(p, t); }
FASTRNN_INLINE int64_t stored_rows(const Layer& p) { return rows_before(p, p.T); }
FASTRNN_INLINE int64_t stored_row(const Layer& p, int64_t t, int64_t rank) {
  return (p.steps_above ? p.steps_above[rank] : rank * p.T) + t;
}
FASTRNN_INLINE int64_t row_of(const Layer& p, int64_t rank) { return p.order ? p.order[rank] : rank; }
FASTRNN_INLINE int64_t length_of(const Layer& p, int64_t b) { return p.lengths ? p.lengths[b] : p.T; }

// Element offset of row b at step t of a [T, B, features] tensor.
template <class R>
FASTRNN_INLINE int64_t row_offset(const Layer& p, const R& rows, int64_t t, int64_t b) {
  return p.packed ? (p.first_row[t] + b) * rows.row : t * rows.step + b * rows.row;
}

// Whether the state that enters step t of row b in direction d is cut, and starts anew. Only asked of active steps.
FASTRNN_INLINE bool is_cut(const Layer& p, int d, int64_t t, int64_t b) {
  if (p.reset == nullptr) return false;
  if (d == 0) return p.reset[t * p.reset_step + b * p.reset_row];
  return t + 1 < length_of(p, b) && p.reset[(t + 1) * p.reset_step + b * p.reset_row];
}

// The rows of one slice of ranks [first, end). Neighbours where all rows are equally long; else dealt out in turn,
// there and back (0 1 1 0 0 1 ...), so that every slice has its share of long rows.
struct Slice {
  int64_t begin, count;
  int64_t index, slices;  // slices is 0 where rows are neighbours

  Slice(const Layer& p, int of, int s, int64_t first, int64_t end)
      : begin(first), index(s), slices(p.first_row ? of : 0) {
    if (slices) {
      count = dealt(end - first);
    } else {
      begin += share_of(end - first, s, of);
      count = share_of(end - first, s + 1, of) - (begin - first);
    }
  }
  int64_t rank(int64_t i) const { return begin + (slices ? i * slices + turn(i) : i); }
  // How many rows, the first ones, are active at step t.
  int64_t active(const Layer& p, int64_t t) const {
    return slices ? smaller(dealt(larger(active_rows(p, t) - begin, int64_t(0))), count) : count;
  }

 private:
  int64_t turn(int64_t round) const { return round % 2 ? slices - 1 - index : index; }
  // How many of the first n ranks this slice has.
  int64_t dealt(int64_t n) const { return n / slices + (n % slices > turn(n / slices)); }
};

// What the plan wants to know of a pass.
template <class V, class O>
constexpr Units units_of(int group) {
  return {V::lanes, group, O::weight_bytes, O::speed, O::tiled};
}

// Packing is shared out by groups.
template <class V, int G>
static int64_t group_count(const Packed<V, G>& m) {
  return ceil_div(m.blocks, Packed<V, G>::U);
}

// The blocks of part `i` of n: whole groups.
template <class V, int G>
static int64_t first_block(const Packed<V, G>& m, int64_t i, int64_t n) {
  return smaller(share_of(group_count(m), i, n) * Packed<V, G>::U, m.blocks);
}

// Packs groups [begin, end) as O's products read them.
template <class O, class V, int G>
static void pack_groups(const Packed<V, G>& m, const Source& source, const Storage<V>& storage, int64_t begin,
                        int64_t end, typename V::T* scratch) {
  if constexpr (O::tiled)
    O::pack(m, source, storage, begin, end);
  else
    pack<O>(m, source, storage, begin, end, scratch);
}

// Packs what the worker at `place` has to: the weights of its own part, divided among the slices.
template <class O, class V, int G>
static void pack_share(const Packed<V, G>& m, const Source& source, const Storage<V>& storage, const Split& split,
                       const Place& place, typename V::T* scratch) {
  const int64_t groups = group_count(m);
  const int64_t begin = share_of(groups, place.part, split.parts);
  const int64_t all = share_of(groups, place.part + 1, split.parts) - begin;
  pack_groups<O>(m, source, storage, begin + share_of(all, place.slice, split.slices),
                 begin + share_of(all, place.slice + 1, split.slices), scratch);
}

template <class T>
FASTRNN_INLINE void zero(T* p, int64_t n) {
  __builtin_memset(p, 0, size_t(n) * sizeof(T));
}

// A row of a [rows, width] tensor as words of `padded` values; zero where there is no tensor.
template <class O, class V>
static void load_row(const Storage<V>& storage, const void* from, int64_t row, int64_t width, int64_t padded,
                     typename V::T* to) {
  zero(to, O::words(padded));
  if (from) O::read(storage, bytes(from) + row * width * storage.size, to, width);
}

// The row of h_reset and c_reset for row b of direction d.
FASTRNN_INLINE int64_t reset_row(const Layer& p, int d, int64_t b) { return p.one_reset ? d : d * p.B + b; }

// A vector from `at` on of what a state starts from after a cut; zero where that is nowhere.
template <class V>
FASTRNN_INLINE V start_of(const typename V::T* reset, int64_t at) {
  return reset ? V::load(reset + at) : V::set(0);
}

// One thread carries out f(worker) for its workers [begin, end) and lets everyone catch up.
struct Meeting {
  Barrier* barriers;  // one for all workers, then one for each slice of each direction
  const Split& split;

  void everyone(int64_t begin, int64_t end) const {
    if (split.workers > 1) wait(barriers[0], arrive(barriers[0], int(end - begin), split.workers));
  }
  // The parts of each slice; workers [begin, end) of them.
  void parts(int64_t begin, int64_t end) const {
    const int64_t last = smaller(end, split.recurrent());
    const auto end_of_slice = [&](int64_t w) { return smaller(last, (w / split.parts + 1) * split.parts); };
    // Arrive everywhere before waiting anywhere. A slice that a thread has whole needs no barrier.
    int epoch[2] = {};
    Barrier* unfinished[2];
    int n = 0;
    for (int64_t w = begin; w < last; w = end_of_slice(w)) {
      const int here = int(end_of_slice(w) - w);
      if (here == split.parts) continue;
      unfinished[n] = &barriers[1 + w / split.parts];  // only the first and the last slice of a thread can be shared
      epoch[n] = arrive(*unfinished[n], here, split.parts);
      ++n;
    }
    for (int i = 0; i < n; ++i) wait(*unfinished[i], epoch[i]);
  }
};
