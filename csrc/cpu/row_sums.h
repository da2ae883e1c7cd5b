// The gradients of weights and biases: products and column sums over all stored rows, in a fixed order.
//
// Own, not a library's: a library's sums change bits with the number of threads, its precision follows
// torch.set_float32_matmul_precision, which torch's RNNs do not read, and its threads are lost in a forked child.
//
// A piece of work is `panel` rows of one result, for all its columns. For each `depth` stored rows its part of `a` is
// copied so that a register tile reads it in a row, and the part of `b` that a group of columns needs into a packed
// group: both then stream from the cache, whatever the strides. The result is read and written once per `depth` rows.

template <class V>
struct RowSums {
  using T = typename V::T;
  static constexpr int W = V::lanes;
  static constexpr int64_t panel = 16 * tile_rows;
  static constexpr int64_t depth = 512;
  static constexpr int64_t group = group_vectors * W;
  static constexpr int64_t tile_depth = depth + 8;  // not a power of two, or all tiles would share the same cache sets

  const RowSum* sums;
  const int count;
  const int64_t N;

  void run(const Team& team) {
    int64_t pieces = 0;
    double operations = 0;
    for (int i = 0; i < count; ++i) {
      pieces += ceil_div(sums[i].rows, panel);
      operations += 2.0 * double(sums[i].rows) * double(sums[i].weight ? sums[i].columns : 1) * double(N);
    }
    const int64_t shares = operations < 4e5 ? 1 : smaller(team.size, pieces);
    const int64_t scratch = round_up(tile_depth * panel + depth * group, 64 / int64_t(sizeof(T)));
    T* memory = static_cast<T*>(workspace(size_t(shares * scratch) * sizeof(T)));
    run_team(team, shares, [&](int64_t begin, int64_t end) {
      for (int64_t share = begin; share < end; ++share) {
        int64_t k = 0;
        do {  // block by block of rows, so that all pieces find it in the cache; once even if there are none
          for (int64_t piece = pieces * share / shares; piece < pieces * (share + 1) / shares; ++piece)
            run_piece(piece, k, memory + share * scratch);
          k += depth;
        } while (k < N);
      }
    });
  }

 private:
  // Stored rows from k on, at most `depth` of them.
  void run_piece(int64_t piece, int64_t k, T* scratch) {
    const RowSum* s = sums;
    for (; piece >= ceil_div(s->rows, panel); ++s) piece -= ceil_div(s->rows, panel);
    const int64_t first = piece * panel, rows = smaller(panel, s->rows - first);
    T* weight = s->weight ? static_cast<T*>(s->weight) + first * s->columns : nullptr;
    T* bias = s->bias ? static_cast<T*>(s->bias) + first : nullptr;
    if (N == 0) {
      if (weight) zero(weight, rows * s->columns);
      if (bias) zero(bias, rows);
    }
    const int64_t K = smaller(depth, N - k);
    if (K <= 0) return;
    const T* a = static_cast<const T*>(s->a) + k * s->ld_a + first;
    if (weight) multiply(*s, a, k, K, rows, weight, scratch, scratch + tile_depth * panel);
    if (bias) add_up(a, s->ld_a, K, rows, k == 0, bias);
  }

  FASTRNN_INLINE V load(const T* from, int64_t n) { return n >= W ? V::load(from) : V::load(from, int(n)); }
  FASTRNN_INLINE void store(V x, T* to, int64_t n) {
    if (n >= W)
      x.store(to);
    else if (n > 0)
      x.store(to, int(n));
  }

  void multiply(const RowSum& s, const T* a, int64_t k, int64_t K, int64_t rows, T* weight, T* left, T* right) {
    constexpr int64_t ahead = 8;  // rows lie in different pages: no hardware prefetcher follows them
    for (int64_t n = 0; n < K; ++n) {
      if (n + ahead < K)
        for (int64_t i = 0; i < rows; i += 64 / int64_t(sizeof(T))) __builtin_prefetch(a + (n + ahead) * s.ld_a + i);
      over_rows<tile_rows>(0, rows, [&](auto m, int64_t i) {
        constexpr int M = decltype(m)::value;
        __builtin_memcpy(left + i * tile_depth + n * M, a + n * s.ld_a + i, M * sizeof(T));
      });
    }
    over_groups<group_vectors, 1>(0, ceil_div(s.columns, W), [&](auto u, int64_t vector) {
      constexpr int U = decltype(u)::value;
      const int64_t columns = s.columns - vector * W;
      const T* b = static_cast<const T*>(s.b) + k * s.ld_b + vector * W;
      for (int64_t n = 0; n < K; ++n)
        for (int v = 0; v < U; ++v) load(b + n * s.ld_b + v * W, columns - v * W).store(right + (n * U + v) * W);
      over_rows<tile_rows>(0, rows, [&](auto m, int64_t i) {
        constexpr int M = decltype(m)::value;
        V sum[M][U];
        product(sum, left + i * tile_depth, 1, M, right, K);
        for (int r = 0; r < M; ++r)
          for (int v = 0; v < U; ++v) {
            T* to = weight + (i + r) * s.columns + (vector + v) * W;
            const int64_t n = columns - v * W;
            store(k == 0 ? sum[r][v] : load(to, n) + sum[r][v], to, n);
          }
      });
    });
  }

  // Sums of sums of 16 rows, then of 16 of those: the error of a long sum stays small. All columns at once, because the
  // rows of `a` lie far apart.
  void add_up(const T* a, int64_t ld, int64_t K, int64_t rows, bool first, T* bias) {
    constexpr int64_t vectors = ceil_div(panel, W);
    const int64_t used = ceil_div(rows, W);
    V total[vectors], middle[vectors], few[vectors];
    for (int64_t v = 0; v < used; ++v) total[v] = first ? V::set(0) : load(bias + v * W, rows - v * W);
    for (int64_t outer = 0; outer < K; outer += 256) {
      for (int64_t v = 0; v < used; ++v) middle[v] = V::set(0);
      for (int64_t inner = outer; inner < smaller(outer + 256, K); inner += 16) {
        for (int64_t v = 0; v < used; ++v) few[v] = V::set(0);
        for (int64_t i = inner; i < smaller(inner + 16, K); ++i)
          for (int64_t v = 0; v < used; ++v) few[v] = few[v] + load(a + i * ld + v * W, rows - v * W);
        for (int64_t v = 0; v < used; ++v) middle[v] = middle[v] + few[v];
      }
      for (int64_t v = 0; v < used; ++v) total[v] = total[v] + middle[v];
    }
    for (int64_t v = 0; v < used; ++v) store(total[v], bias + v * W, rows - v * W);
  }
};
