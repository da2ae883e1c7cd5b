// The one micro-kernel every product goes through: input projection, recurrence, the dh chain, dx, weight gradients.
//
// The right-hand matrix lies in packed groups of up to four vectors of columns, [K][vectors][lanes] (pack.h). A tile is
// M rows by one group; its accumulators stay in registers.
//
// Summation order, which fixes the bits: for every output, k runs upwards in blocks of `k_block`, each block summed
// from zero by fma, the block sums added in order. It depends on K alone: not on the rows around, the tile, or the
// threads. Short blocks also keep the error of long sums near that of pairwise summation. (The one exception is
// dot_group in pack.h.)

constexpr int64_t k_block = 32;
constexpr int group_vectors = 4;

template <int N>
struct Int {
  static constexpr int value = N;
};

FASTRNN_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
FASTRNN_INLINE int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
static constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// part[m][v] = sum over k of a[m * a_row + k * a_k] * b[k][v]: one block, k upwards, by fma.
template <int M, int N, class V>
FASTRNN_INLINE void product_of_block(V (&part)[M][N], const typename V::T* a, int64_t a_row, int64_t a_k,
                                     const typename V::T* b, int64_t K) {
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 8
    for (int v = 0; v < N; ++v) part[m][v] = V::set(0);
  for (int64_t k = 0; k < K; ++k) {
    V right[N];
#pragma GCC unroll 8
    for (int v = 0; v < N; ++v) right[v] = V::load(b + (k * N + v) * V::lanes);
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
      const V left = V::set(a[m * a_row + k * a_k]);
#pragma GCC unroll 8
      for (int v = 0; v < N; ++v) part[m][v] = fma(left, right[v], part[m][v]);
    }
  }
}

// sum[m][v] = sum over k of a[m * a_row + k * a_k] * b[k][v], b a packed group.
template <int M, int N, class V>
FASTRNN_INLINE void product(V (&sum)[M][N], const typename V::T* a, int64_t a_row, int64_t a_k, const typename V::T* b,
                            int64_t K) {
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 8
    for (int v = 0; v < N; ++v) sum[m][v] = V::set(0);
  for (int64_t k = 0; k < K; k += k_block) {
    V part[M][N];
    product_of_block(part, a + k * a_k, a_row, a_k, b + k * N * V::lanes, smaller(k_block, K - k));
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 8
      for (int v = 0; v < N; ++v) sum[m][v] = sum[m][v] + part[m][v];
  }
}

// The same for rows of a that lie lda apart.
template <int M, int N, class V>
FASTRNN_INLINE void product(V (&sum)[M][N], const typename V::T* a, int64_t lda, const typename V::T* b, int64_t K) {
  product(sum, a, lda, 1, b, K);
}

// Calls f(Int<M>, i) for tiles of M = tile_rows, then of ever fewer rows, until n rows are covered.
template <int M, class F>
FASTRNN_INLINE void over_rows(int64_t i, int64_t n, const F& f) {
  for (; i + M <= n; i += M) f(Int<M>{}, i);
  if constexpr (M > 1) over_rows<(M > 4 ? 4 : M > 2 ? 2 : 1)>(i, n, f);
}

// Calls f(Int<N>, vector) for each group of N <= U * G vectors: whole groups of U blocks of G vectors, then the rest.
template <int U, int G, class F>
FASTRNN_INLINE void over_groups(int64_t block, int64_t blocks, const F& f) {
  for (; block + U <= blocks; block += U) f(Int<U>{}, block);
  if constexpr (U > 1) over_groups<(U > 2 ? 2 : 1), G>(block, blocks, f);
}
