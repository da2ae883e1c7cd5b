// The one micro-kernel every product goes through: input projection, recurrence, the dh chain, dx, weight gradients.
//
// A tile is M rows of the left matrix by N vectors of columns of the right one; its accumulators stay in registers.
// The right matrix lies in packed groups, [K][vectors][lanes] (pack.h), or is Blocked: [vector][K][lanes].
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
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 8
    for (int v = 0; v < N; ++v) sum[m][v] = V::set(0);
}

template <int M, int N, class V>
FASTRNN_INLINE void add(V (&sum)[M][N], const V (&part)[M][N]) {
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 8
    for (int v = 0; v < N; ++v) sum[m][v] = sum[m][v] + part[m][v];
}

// part[m][v] += left(m) * right(v). What there is less of is loaded first, so that sums and operands fit the registers.
template <int M, int N, class V, class Left, class Right>
FASTRNN_INLINE void multiply_add(V (&part)[M][N], const Left& left, const Right& right) {
  if constexpr (M < N) {
    V x[M];
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) x[m] = left(m);
#pragma GCC unroll 8
    for (int v = 0; v < N; ++v) {
      const V y = right(v);
#pragma GCC unroll 8
      for (int m = 0; m < M; ++m) part[m][v] = fma(x[m], y, part[m][v]);
    }
  } else {
    V y[N];
#pragma GCC unroll 8
    for (int v = 0; v < N; ++v) y[v] = right(v);
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
      const V x = left(m);
#pragma GCC unroll 8
      for (int v = 0; v < N; ++v) part[m][v] = fma(x, y[v], part[m][v]);
    }
  }
}

// part[m][v] += a[m * a_row + k * a_k] * b[k * b_k + v * b_vector], k upwards.
template <int M, int N, class V>
FASTRNN_INLINE void accumulate(V (&part)[M][N], const typename V::T* a, int64_t a_row, int64_t a_k,
                               const typename V::T* b, int64_t b_k, int64_t b_vector, int64_t K) {
  for (int64_t k = 0; k < K; ++k)
    multiply_add(
        part, [&](int m) { return V::set(a[m * a_row + k * a_k]); },
        [&](int v) { return V::load(b + k * b_k + v * b_vector); });
}

// sum[m][v] = sum over k of a[m * lda + k] * b[k][v], b a packed group.
template <int M, int N, class V>
FASTRNN_INLINE void product(V (&sum)[M][N], const typename V::T* a, int64_t lda, const typename V::T* b, int64_t K) {
  constexpr int64_t b_k = N * V::lanes;
  const int64_t run = run_length(K);
  clear(sum);
  for (int64_t k = 0; k < K; k += run) {
    V part[M][N];
    clear(part);
    accumulate(part, a + k, lda, 1, b + k * b_k, b_k, V::lanes, smaller(run, K - k));
    add(sum, part);
  }
}

// The same for one row and two neighbouring groups at once: one group alone has too few independent sums to keep the
// multipliers busy.
template <int N, class V>
FASTRNN_INLINE void product_of_pair(V (&sum)[2][N], const typename V::T* a, const typename V::T* b, int64_t next,
                                    int64_t K) {
  constexpr int64_t b_k = N * V::lanes;
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
        for (int v = 0; v < N; ++v) part[g][v] = fma(left, V::load(b + g * next + i * b_k + v * V::lanes), part[g][v]);
    }
    add(sum, part);
  }
}

// sum[m][v] = sum over gates g and k < H of a(m, g, k) * b[g * H + k][v]. Row m begins at a[m], in a Blocked matrix
// whose blocks lie a_block values apart, gate g at block g * ceil(H / lanes); b is a packed group.
template <int M, int N, class V>
FASTRNN_INLINE void product_of_blocks(V (&sum)[M][N], const typename V::T* const (&a)[M], int64_t a_block,
                                      const typename V::T* b, int gates, int64_t H) {
  constexpr int64_t W = V::lanes;
  clear(sum);
  const int64_t blocks = ceil_div(H, W), run = run_length(H);
  for (int g = 0; g < gates; ++g)
    for (int64_t k = 0; k < H; k += run) {
      V part[M][N];
      clear(part);
      const int64_t end = smaller(k + run, H);
      for (int64_t i = k; i < end; i += W) {
        const int64_t at = (g * blocks + i / W) * a_block, n = smaller(W, end - i);
        const typename V::T* right = b + (g * H + i) * N * W;
        for (int64_t j = 0; j < n; ++j, right += N * W)
          multiply_add(
              part, [&](int m) { return V::set(a[m][at + j]); }, [&](int v) { return V::load(right + v * W); });
      }
      add(sum, part);
    }
}

// Calls f(Int<M>, i) for tiles of M = Most rows, then of ever fewer, until n rows are covered.
template <int Most, class F>
FASTRNN_INLINE void over_rows(int64_t i, int64_t n, const F& f) {
  for (; i + Most <= n; i += Most) f(Int<Most>{}, i);
  if constexpr (Most > 1) over_rows<(Most > 4 ? 4 : Most > 2 ? 2 : 1)>(i, n, f);
}

// The same in the fewest tiles, of nearly equal height: a lone row costs as much as several.
template <int Most, class F>
FASTRNN_INLINE void over_even_rows(int64_t begin, int64_t n, const F& f) {
  for (int64_t i = begin, tiles = ceil_div(n - begin, Most); tiles > 0; --tiles) {
    const int64_t rows = ceil_div(n - i, tiles);
    if constexpr (Most >= 6) {
      if (rows == 6) f(Int<6>{}, i);
      if (rows == 5) f(Int<5>{}, i);
      if (rows == 4) f(Int<4>{}, i);
    }
    if constexpr (Most >= 3)
      if (rows == 3) f(Int<3>{}, i);
    if (rows == 2) f(Int<2>{}, i);
    if (rows == 1) f(Int<1>{}, i);
    i += rows;
  }
}

// Calls f(Int<N>, block) for each group of N <= U blocks: whole groups of U, then the rest, in [block, end).
template <int U, class F>
FASTRNN_INLINE void over_groups(int64_t block, int64_t end, const F& f) {
  for (; block + U <= end; block += U) f(Int<U>{}, block);
  if constexpr (U > 1) over_groups<(U > 2 ? 2 : 1)>(block, end, f);
}
