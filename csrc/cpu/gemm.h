// The one micro-kernel every product goes through: input projection, recurrence, the dh chain, dx, weight gradients.
//
// A tile is M rows of the left matrix by N vectors of columns of the right one; its accumulators stay in registers.
// The right matrix lies in packed groups of N vectors, panel after panel, [N / panel][K][panel][lanes] (pack.h), or is
// Blocked: [vector][K][lanes]. A panel is what a tall tile sums at once, so that it reads one stream of memory.
//
// Summation order, which fixes the bits: for every output, k goes upwards in runs, each run summed from zero by fma,
// the run sums added in order. It depends on K alone: not on the rows around, the tile, or the threads. Short runs also
// keep the error of long sums near that of pairwise summation: runs of 32 would cost long sums 5% of their speed, and
// runs of 64 would take from short ones what makes them more accurate than a plain sum. (The one exception is dot_group
// in pack.h.)

FASTRNN_INLINE int64_t run_length(int64_t K) { return K <= 128 ? 32 : 64; }
constexpr int group_vectors = 4;

template <int N>
struct Int {
  static constexpr int value = N;
};

FASTRNN_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
FASTRNN_INLINE int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
static constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

template <int M, int N, class V>
FASTRNN_INLINE void clear(V (&sum)[M][N]) {
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 8
    for (int v = 0; v < N; ++v) sum[m][v] = V::set(0);
}

template <int M, int N, class V>
FASTRNN_INLINE void add(V (&sum)[M][N], const V (&part)[M][N]) {
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 8
    for (int v = 0; v < N; ++v) sum[m][v] = sum[m][v] + part[m][v];
}

// sum[m][first + c] = columns[m][c].
template <int M, int N, int C, class V>
FASTRNN_INLINE void put(V (&sum)[M][N], int first, const V (&columns)[M][C]) {
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c) sum[m][first + c] = columns[m][c];
}

// part[m][v] += left(m) * right(v). What there is less of is loaded first, so that sums and operands fit the registers.
template <class O, int M, int N, class V, class Left, class Right>
FASTRNN_INLINE void multiply_add(V (&part)[M][N], const Left& left, const Right& right) {
  if constexpr (M < N) {
    V x[M];
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m) x[m] = left(m);
#pragma GCC unroll 8
    for (int v = 0; v < N; ++v) {
      const V y = right(v);
#pragma GCC unroll 8
      for (int m = 0; m < M; ++m) part[m][v] = O::multiply_add(x[m], y, part[m][v]);
    }
  } else {
    V y[N];
#pragma GCC unroll 8
    for (int v = 0; v < N; ++v) y[v] = right(v);
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m) {
      const V x = left(m);
#pragma GCC unroll 8
      for (int v = 0; v < N; ++v) part[m][v] = O::multiply_add(x, y[v], part[m][v]);
    }
  }
}

// part[m][v] += a[m * a_row + k * a_k] * b[k * b_k + v * b_vector], k upwards.
template <class O, int M, int N, class V>
FASTRNN_INLINE void accumulate(V (&part)[M][N], const typename V::T* a, int64_t a_row, int64_t a_k,
                               const typename V::T* b, int64_t b_k, int64_t b_vector, int64_t K) {
  for (int64_t k = 0; k < K; ++k)
    multiply_add<O>(
        part, [&](int m) { return V::set(a[m * a_row + k * a_k]); },
        [&](int v) { return V::load(b + k * b_k + v * b_vector); });
}

// How many vectors of a group of n make a panel.
constexpr int panel_of(int n) { return n % 2 ? n : 2; }
template <int N>
constexpr int panel = panel_of(N);

// Where depth k of vector v of a packed group lies.
template <int N, class V>
FASTRNN_INLINE int64_t place_in_group(int64_t K, int64_t k, int v) {
  constexpr int P = panel<N>;
  return ((v / P * K + k) * P + v % P) * V::lanes;
}

// Rows of a tile of N vectors: summed panel by panel, if need be.
template <int N>
constexpr int tile_rows = N == 3 ? tall_rows_of_three : tall_rows;

// How many of the N vectors a tile of M rows sums at once.
template <int M, int N>
constexpr int columns_at_once = M * N <= accumulators ? N : panel<N>;

// sum[m][v] = sum over k of a[m * lda + k] * b[k][v], b a packed group; of K words, as O has them.
template <class O, int M, int N, class V>
FASTRNN_INLINE void product(V (&sum)[M][N], const typename V::T* a, int64_t lda, const typename V::T* b, int64_t K) {
  constexpr int C = columns_at_once<M, N>;
  const int64_t run = run_length(K);
  for (int first = 0; first < N; first += C) {
    V columns[M][C];
    clear(columns);
    for (int64_t begin = 0; begin < K; begin += run) {
      V part[M][C];
      clear(part);
      const int64_t end = smaller(begin + run, K);
      const typename V::T* right = b + place_in_group<N, V>(K, 0, first);
      for (int64_t k = begin; k < end; ++k)
        multiply_add<O>(
            part, [&](int m) { return V::set(a[m * lda + k]); },
            [&](int v) { return V::load(right + place_in_group<N, V>(K, k, v)); });
      add(columns, part);
    }
    put(sum, first, columns);
  }
}

// The same for one row and two neighbouring groups at once: one group alone has too few independent sums to keep the
// multipliers busy.
template <class O, int N, class V>
FASTRNN_INLINE void product_of_pair(V (&sum)[2][N], const typename V::T* a, const typename V::T* b, int64_t next,
                                    int64_t K) {
  const int64_t run = run_length(K);
  clear(sum);
  for (int64_t k = 0; k < K; k += run) {
    V part[2][N];
    clear(part);
    const int64_t end = smaller(k + run, K);
    for (int64_t i = k; i < end; ++i) {
      const V left = V::set(a[i]);
#pragma GCC unroll 2
      for (int g = 0; g < 2; ++g)
#pragma GCC unroll 8
        for (int v = 0; v < N; ++v)
          part[g][v] = O::multiply_add(left, V::load(b + g * next + place_in_group<N, V>(K, i, v)), part[g][v]);
    }
    add(sum, part);
  }
}

// sum[0][v] = sum over k of a[k] * b[k][v], a vectors of rows, b values: what forward_lanes.h multiplies.
template <int N, class V>
FASTRNN_INLINE void product_of_lanes(V (&sum)[1][N], const typename V::T* a, const typename V::T* b, int64_t K) {
  const int64_t run = run_length(K);
  clear(sum);
  for (int64_t begin = 0; begin < K; begin += run) {
    V part[1][N];
    clear(part);
    const int64_t end = smaller(begin + run, K);
    for (int64_t k = begin; k < end; ++k)
      multiply_add<Singles<V>>(
          part, [&](int) { return V::load(a + k * V::lanes); }, [&](int v) { return V::set(b[k * N + v]); });
    add(sum, part);
  }
}

// sum[m][v] = sum over gates g and k < H of a(m, g, k) * b[g * H + k][v]. Row m begins at a[m], in a Blocked matrix
// whose blocks lie a_block words apart, gate g at block g * ceil(H / lanes); b is a packed group. H counts words.
template <class O, int M, int N, class V>
FASTRNN_INLINE void product_of_blocks(V (&sum)[M][N], const typename V::T* const (&a)[M], int64_t a_block,
                                      const typename V::T* b, int gates, int64_t H) {
  constexpr int64_t W = O::words(V::lanes);
  constexpr int C = columns_at_once<M, N>;
  const int64_t blocks = ceil_div(H, W), run = run_length(H);
  for (int first = 0; first < N; first += C) {
    V columns[M][C];
    clear(columns);
    for (int g = 0; g < gates; ++g)
      for (int64_t k = 0; k < H; k += run) {
        V part[M][C];
        clear(part);
        const int64_t end = smaller(k + run, H);
        for (int64_t i = k; i < end; i += W) {
          const int64_t at = (g * blocks + i / W) * a_block, n = smaller(W, end - i);
          const typename V::T* right = b + place_in_group<N, V>(gates * H, g * H + i, first);
          for (int64_t j = 0; j < n; ++j)
            multiply_add<O>(
                part, [&](int m) { return V::set(a[m][at + j]); },
                [&](int v) { return V::load(right + place_in_group<N, V>(gates * H, j, v)); });
        }
        add(columns, part);
      }
    put(sum, first, columns);
  }
}

// Calls f(Int<M>, i) for tiles of M = Most rows, then of ever fewer, until n rows are covered.
template <int Most, class F>
FASTRNN_INLINE void over_rows(int64_t i, int64_t n, const F& f) {
  for (; i + Most <= n; i += Most) f(Int<Most>{}, i);
  if constexpr (Most > 1) over_rows<(Most > 4 ? 4 : Most > 2 ? 2 : 1)>(i, n, f);
}

// Calls f(Int<n>, i) for a number n <= Most.
template <int Most, class F>
FASTRNN_INLINE void with_rows(int64_t n, int64_t i, const F& f) {
  if (n == Most) return f(Int<Most>{}, i);
  if constexpr (Most > 1) with_rows<Most - 1>(n, i, f);
}

// The same in the fewest tiles, of nearly equal height: a lone row costs as much as several.
template <int Most, class F>
FASTRNN_INLINE void over_even_rows(int64_t begin, int64_t n, const F& f) {
  for (int64_t i = begin, tiles = ceil_div(n - begin, Most); tiles > 0; --tiles) {
    int64_t rows = ceil_div(n - i, tiles);
    // Seven rows are slower than eight: the compiler runs out of registers for their addresses.
    if (rows == 7) rows = n - i >= 8 ? 8 : (++tiles, 4);
    with_rows<Most>(rows, i, f);
    i += rows;
  }
}

// Calls f(Int<N>, block) for each group of N <= U blocks: whole groups of U, then the rest, in [block, end).
// back: the whole groups from the last to the first.
template <int U, class F>
FASTRNN_INLINE void over_groups(int64_t block, int64_t end, bool back, const F& f) {
  const int64_t whole = (end - block) / U;
  for (int64_t i = 0; i < whole; ++i) f(Int<U>{}, block + (back ? whole - 1 - i : i) * U);
  if constexpr (U > 1) over_groups<(U > 2 ? 2 : 1)>(block + whole * U, end, false, f);
}

template <int U, class F>
FASTRNN_INLINE void over_groups(int64_t block, int64_t end, const F& f) {
  over_groups<U>(block, end, false, f);
}
