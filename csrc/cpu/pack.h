// Weights as the micro-kernel reads them: how a matrix is cut into groups, packing, and products without packing.

// How one packed matrix is cut: `blocks` blocks of G vectors (the gates of one vector of hidden units, or single
// columns when G is 1), U blocks to a group. The groups follow each other, so block j starts at j * G * lanes * K.
// data is null when groups are packed where they are used (group_at).
template <class V, int G>
struct Packed {
  using T = typename V::T;
  static constexpr int W = V::lanes;
  static constexpr int U = group_vectors / G > 0 ? group_vectors / G : 1;

  T* data = nullptr;
  int64_t K = 0;
  int64_t blocks = 0;

  static int64_t count(int64_t K, int64_t units) { return ceil_div(units, W) * G * W * K; }
};

// Where column c, depth k of a packed matrix comes from. Gate v of unit i reads row block gate[v] of a torch weight.
//   transposed: element (gate[v] * H + i) * ld + k, a weight row of ld values becomes a column (input projection,
//   recurrence)
//   else: element k_row(k) * ld + i, rows stay rows (the dh chain, dx): G is 1, k = s * H + r reads row gate[s] * H + r
struct Source {
  const void* data;
  int64_t ld;
  int64_t units;  // H for a transposed source, the number of columns for the other
  int64_t H;
  bool transposed;
  int gate[4];
};

// Transposes lanes x lanes values: zipping row i with row i + lanes / 2, log2(lanes) times over.
template <class V>
FASTRNN_INLINE void transpose(V (&rows)[V::lanes]) {
  constexpr int W = V::lanes;
#pragma GCC unroll 4
  for (int stage = 1; stage < W; stage *= 2) {
    V next[W];
#pragma GCC unroll 16
    for (int i = 0; i < W / 2; ++i) {
      next[2 * i] = zip_low(rows[i], rows[i + W / 2]);
      next[2 * i + 1] = zip_high(rows[i], rows[i + W / 2]);
    }
#pragma GCC unroll 16
    for (int i = 0; i < W; ++i) rows[i] = next[i];
  }
}

// Weight rows rows[0, n) of K values become lanes: out[k * ld + lane], lanes past n zero.
template <class V>
static void pack_columns(const typename V::T* const* rows, int64_t n, int64_t K, typename V::T* out, int64_t ld) {
  constexpr int W = V::lanes;
  int64_t k = 0;
  for (; k + W <= K; k += W) {
    V square[W];
#pragma GCC unroll 16
    for (int lane = 0; lane < W; ++lane) square[lane] = lane < n ? V::load(rows[lane] + k) : V::set(0);
    transpose(square);
#pragma GCC unroll 16
    for (int i = 0; i < W; ++i) square[i].store(out + (k + i) * ld);
  }
  for (; k < K; ++k)
    for (int64_t lane = 0; lane < W; ++lane) out[k * ld + lane] = lane < n ? rows[lane][k] : 0;
}

// Columns that stay rows (G is 1): blocks [first, last), group after group, to `to`. A few rows at a time: what is read
// lies far apart down a column, what is written along a row. The K words of a column are those of each gate's H rows.
template <class O, class V>
static void pack_rows(const Source& from, const Storage<V>& storage, int64_t K, int64_t first, int64_t last,
                      typename V::T* to) {
  using T = typename V::T;
  constexpr int64_t W = V::lanes, few = 4, together = O::words(2) == 1 ? 2 : 1;  // rows that make a word
  const int64_t words = O::words(from.H);
  const char *rows[few], *odd_rows[few];
  for (int64_t begin = 0; begin < K; begin += few) {
    const int64_t count = smaller(few, K - begin);
    for (int64_t r = 0; r < count; ++r) {
      const int64_t gate = (begin + r) / words, unit = (begin + r) % words * together;
      rows[r] = static_cast<const char*>(from.data) + (from.gate[gate] * from.H + unit) * from.ld * storage.size;
      odd_rows[r] = unit + 1 < from.H ? rows[r] + from.ld * storage.size : nullptr;
    }
    over_groups<Packed<V, 1>::U>(first, last, [&](auto u, int64_t block) {
      constexpr int N = decltype(u)::value;
      T* group = to + (block - first) * W * K;
      for (int v = 0; v < N; ++v) {
        const int64_t column = (block + v) * W, offset = column * storage.size;
        for (int64_t r = 0; r < count; ++r)
          O::zip(storage, rows[r] + offset, odd_rows[r] ? odd_rows[r] + offset : nullptr, from.units - column)
              .store(group + place_in_group<N, V>(K, begin + r, v));
      }
    });
  }
}

// product_of_blocks by a source whose columns stay rows, as it lies there: N vectors of columns from `column` on, all
// within it. For one step of few rows, which reads the weights once, and would wait for their packing. The same sums.
template <int M, int N, class V>
static void product_of_rows(V (&sum)[M][N], const typename V::T* const (&a)[M], int64_t a_block, const Source& from,
                            int gates, int64_t column) {
  using T = typename V::T;
  constexpr int64_t W = V::lanes;
  const int64_t blocks = ceil_div(from.H, W), run = run_length(from.H);
  clear(sum);
  for (int g = 0; g < gates; ++g) {
    const T* rows = static_cast<const T*>(from.data) + from.gate[g] * from.H * from.ld + column;
    for (int64_t k = 0; k < from.H; k += run) {
      V part[M][N];
      clear(part);
      const int64_t end = smaller(k + run, from.H);
      for (int64_t i = k; i < end; ++i) {
        const int64_t at = (g * blocks + i / W) * a_block + i % W;
        multiply_add<Singles<V>>(
            part, [&](int m) { return V::set(a[m][at]); }, [&](int v) { return V::load(rows + i * from.ld + v * W); });
      }
      add(sum, part);
    }
  }
}

// The n rows of a transposed source that are the columns of gate g from `unit` on, as words; by way of scratch (lanes
// rows) where they are stored otherwise.
template <class O, class V>
static void weight_rows(const Source& from, const Storage<V>& storage, int g, int64_t unit, int64_t n,
                        const typename V::T** rows, typename V::T* scratch) {
  using T = typename V::T;
  const char* data = static_cast<const char*>(from.data);
  for (int64_t lane = 0; lane < n; ++lane) {
    const char* row = data + (from.gate[g] * from.H + unit + lane) * from.ld * storage.size;
    rows[lane] = reinterpret_cast<const T*>(row);
    if (O::readable(storage, data, from.ld)) continue;
    T* const copy = scratch + lane * O::words(from.ld);
    O::read(storage, row, copy, from.ld);
    rows[lane] = copy;
  }
}

// Packs the group of `blocks` blocks that begins at block `first` into `group`. scratch: lanes * K words, when the
// source is transposed and not readable.
template <class O, class V, int G>
static void pack_group(const Source& from, const Storage<V>& storage, int64_t K, int64_t first, int64_t blocks,
                       typename V::T* group, typename V::T* scratch) {
  using T = typename V::T;
  constexpr int W = V::lanes;
  if (!from.transposed) return pack_rows<O>(from, storage, K, first, first + blocks, group);
  const int P = panel_of(int(blocks * G));
  for (int64_t u = 0; u < blocks; ++u)
    for (int g = 0; g < G; ++g) {
      const int64_t unit = (first + u) * W;
      const int64_t n = smaller(W, from.units - unit);
      const int v = int(u * G + g);
      T* out = group + (v / P * K * P + v % P) * W;
      const T* rows[W];
      weight_rows<O>(from, storage, g, unit, n, rows, scratch);
      pack_columns<V>(rows, n, K, out, P * W);
    }
}

// Packs groups [begin, end) of a matrix, cut as over_groups cuts it.
template <class O, class V, int G>
static void pack(const Packed<V, G>& to, const Source& from, const Storage<V>& storage, int64_t begin, int64_t end,
                 typename V::T* scratch) {
  constexpr int U = Packed<V, G>::U;
  const int64_t first = smaller(begin * U, to.blocks), last = smaller(end * U, to.blocks);
  const auto at = [&](int64_t block) { return to.data + block * G * V::lanes * to.K; };
  if (!from.transposed) return pack_rows<O>(from, storage, to.K, first, last, at(first));
  over_groups<U>(first, last, [&](auto blocks, int64_t block) {
    pack_group<O, V, G>(from, storage, to.K, block, decltype(blocks)::value, at(block), scratch);
  });
}

// The group that begins at `block`: of the packed matrix, or, when it was not packed because every group is used once,
// packed now into `panel` (room for a group). Either way the same numbers.
template <class O, class V, int G>
static const typename V::T* group_at(const Packed<V, G>& m, const Source& from, const Storage<V>& storage,
                                     int64_t block, int64_t blocks, typename V::T* panel, typename V::T* scratch) {
  if (m.data) return m.data + block * G * V::lanes * m.K;
  pack_group<O, V, G>(from, storage, m.K, block, blocks, panel, scratch);
  return panel;
}

// Whether T steps of B rows are so few that they are multiplied by dot products with the weights' own rows, which then
// are not packed: of few units, one step of few rows; of many, where reading and writing them is what packing costs,
// more rows, or as many rows times steps. copied: rows of weights are not read as they lie.
inline bool few_enough_for_dots(int64_t T, int64_t B, int64_t H, bool copied) {
  constexpr int64_t few = 4, some = 8, many_units = 96;
  if (f32::lanes == 1) return false;
  return H < many_units || copied ? T == 1 && B <= few : T * B <= some;
}

// The sums of `lanes` vectors: lane i of the result is that of vector i, whose lanes are added as a tree, i to
// i + lanes / 2 first.
template <class V>
FASTRNN_INLINE V sums(V (&part)[V::lanes]) {
#pragma GCC unroll 4
  for (int half = V::lanes / 2; half > 0; half /= 2)
#pragma GCC unroll 8
    for (int i = 0; i < half; ++i) part[i] = zip_low(part[i], part[i + half]) + zip_high(part[i], part[i + half]);
  return part[0];
}

// How many weight rows M rows are multiplied with at a time: so many sums stay in registers, and each vector of weights
// is used M times.
template <class V, int M>
constexpr int dot_strip() {
  int strip = V::lanes < 8 ? V::lanes : 8;
  while (strip > 1 && strip * M > accumulators) strip /= 2;
  return strip;
}

// sum[m][v] = dot product of row m of a with the weight rows that are vector v of the group at block `first`. Lane i of
// a dot product takes every lanes-th k from i on; the lanes are added as a tree. scratch as for pack_group.
template <class O, int G, int M, int N, class V>
static void dot_group(V (&sum)[M][N], const typename V::T* a, int64_t lda, const Source& from,
                      const Storage<V>& storage, int64_t first, typename V::T* scratch) {
  using T = typename V::T;
  const int64_t K = O::words(from.ld);
  constexpr int W = V::lanes, R = dot_strip<V, M>();
  for (int v = 0; v < N; ++v) {
    const int64_t unit = (first + v / G) * W, n = smaller(W, from.units - unit);
    const T* rows[W];
    weight_rows<O>(from, storage, v % G, unit, n, rows, scratch);
    for (int64_t lane = n; lane < W; ++lane) rows[lane] = rows[0];  // padding: any finite number will do
    alignas(64) T dots[M][W][W];
    for (int strip = 0; strip < W; strip += R) {
      V part[M][R];
      clear(part);
      int64_t k = 0;
      for (; k + W <= K; k += W)
        multiply_add<O>(
            part, [&](int m) { return V::load(a + m * lda + k); }, [&](int r) { return V::load(rows[strip + r] + k); });
      if (k < K) {
        const int rest = int(K - k);
        multiply_add<O>(
            part, [&](int m) { return V::load(a + m * lda + k, rest); },
            [&](int r) { return V::load(rows[strip + r] + k, rest); });
      }
#pragma GCC unroll 8
      for (int m = 0; m < M; ++m)
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) part[m][r].store(dots[m][strip + r]);
    }
    for (int m = 0; m < M; ++m) {
      V part[W];
#pragma GCC unroll 16
      for (int i = 0; i < W; ++i) part[i] = V::load(dots[m][i]);
      sum[m][v] = sums(part);
    }
  }
}
