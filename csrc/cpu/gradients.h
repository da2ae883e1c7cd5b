// The gradients of weights, biases and input from a chunk of stored rows, in a fixed order.
//
// Own products, not a library's: a library's sums change bits with the number of threads, its precision follows
// torch.set_float32_matmul_precision, which torch's RNNs do not read, and its threads are lost in a forked child.
//
// Both operands lie in blocks (gemm.h): the rows of a block follow each other, so a register tile of a weight gradient
// streams through them without any packing. Chunks are added in the order in which the recurrence runs backward.
// O says what is multiplied (operand.h): of pairs, those of neighbouring rows. The gradients of biases add up the same
// words, so that of pairs they are float32 sums of rounded numbers.

// bias[i] (+)= sum over rows of left(row, i). Sums of sums of 16 rows: the error of a long sum stays small.
template <class O, class V>
static void add_up(const typename V::T* left, int64_t rows, int64_t units, bool first, typename V::T* bias) {
  constexpr int W = V::lanes;
  V total = V::set(0);
  for (int64_t outer = 0; outer < rows; outer += 16) {
    V few = V::set(0);
    for (int64_t i = outer; i < smaller(outer + 16, rows); ++i) few = O::add(V::load(left + i * W), few);
    total = total + few;
  }
  if (!first) total = V::load(bias, int(units)) + total;
  total.store(bias, int(units));
}

template <class V, class O>
struct GradientTasks {
  using T = typename V::T;
  static constexpr int W = V::lanes;
  static constexpr int tile_columns = 3;  // vectors; with half a block of rows, as many sums as the registers hold
  static constexpr int half_block = W > 1 ? W / 2 : 1;
  static constexpr int tile_units = half_block > 8 ? 8 : half_block;

  // weight[i][j] += sum over rows of left(row, i) * right(row, j), bias[i] += sum of left(row, i); null: not wanted.
  struct Sum {
    const T* left;    // blocks of W columns, each [left_ld][W] words
    int64_t units;    // columns of left: rows of the gradient
    int64_t left_ld;  // rows that a block has room for, in words
    const T* right;   // blocks as well, each [right_ld][W]
    int64_t columns;
    int64_t right_ld;
    int64_t rows;  // to add up, in words of left
    T* weight;     // [units][columns]
    T* bias;       // [units]

    // A task is one block of units by one group of columns.
    int64_t blocks() const { return ceil_div(units, W); }
    int64_t vectors() const { return weight ? ceil_div(columns, W) : 0; }
    int64_t groups() const { return larger(1, ceil_div(vectors(), tile_columns)); }
    int64_t tasks() const { return weight || bias ? blocks() * groups() : 0; }
    // Of many rows, a group of columns stays in the cache for all blocks. Of few, writing the result is all the work:
    // its rows are written whole.
    bool by_block() const { return rows < 32; }
    int64_t block_of(int64_t task) const { return by_block() ? task / groups() : task % blocks(); }
    int64_t group_of(int64_t task) const { return by_block() ? task % groups() : task / blocks(); }
    // In columns, and one for reading the left block.
    int64_t cost_of(int64_t task) const { return 1 + smaller(tile_columns, vectors() - group_of(task) * tile_columns); }
    int64_t cost() const { return tasks() + (weight || bias ? blocks() * vectors() : 0); }
  };

  // first: nothing is there yet.
  static void run(const Sum& s, int64_t task, bool first, T*) {
    const int64_t block = s.block_of(task), group = s.group_of(task);
    const int64_t units = smaller(W, s.units - block * W);
    const T* left = s.left + block * s.left_ld * W;
    if (s.bias && group == 0) add_up<O, V>(left, s.rows, units, first, s.bias + block * W);
    if (s.weight == nullptr) return;
    const int64_t vector = group * tile_columns, vectors = smaller(tile_columns, s.vectors() - vector);
    over_groups<tile_columns>(vector, vector + vectors, [&](auto n, int64_t v) {
      constexpr int columns = decltype(n)::value;
      over_rows<tile_units>(0, units, [&](auto m, int64_t i) {
        multiply<decltype(m)::value, columns>(s, left + i, block * W + i, v, first);
      });
    });
  }

 private:
  template <int M, int U>
  static void multiply(const Sum& s, const T* left, int64_t unit, int64_t vector, bool first) {
    V sum[M][U];
    clear(sum);
    const T* right = s.right + vector * s.right_ld * W;
    if (!first)  // the sums so far are far away, and wanted only at the end
      for (int r = 0; r < M; ++r)
        for (int v = 0; v < U; ++v) __builtin_prefetch(s.weight + (unit + r) * s.columns + (vector + v) * W, 1);
    const int64_t run = run_length(s.rows);
    for (int64_t k = 0; k < s.rows; k += run) {
      V part[M][U];
      clear(part);
      accumulate<O>(part, left + k * W, 1, W, right + k * W, W, s.right_ld * W, smaller(run, s.rows - k));
      add(sum, part);
    }
    for (int r = 0; r < M; ++r)
      for (int v = 0; v < U; ++v) {
        const int64_t column = (vector + v) * W, n = s.columns - column;
        T* to = s.weight + (unit + r) * s.columns + column;
        if (n >= W)
          (first ? sum[r][v] : V::load(to) + sum[r][v]).store(to);
        else
          (first ? sum[r][v] : V::load(to, int(n)) + sum[r][v]).store(to, int(n));
      }
  }
};

#ifdef FASTRNN_ISA_AMX
// The same by tiles: the left operand, values of neighbouring units, is turned round so that a unit is a row, and cut
// into pieces; the right one lies in tiles already (Tiles::put). A block of units whose values are all small is scaled.
template <int P>
struct GradientTasks<f32, Tiles<P>> {
  using V = f32;
  using T = float;
  static constexpr int64_t W = V::lanes;

  struct Sum : GradientTasks<V, Singles<V>>::Sum {
    // A task is a whole block of units: the left operand is turned round once.
    int64_t tasks() const { return this->weight || this->bias ? this->blocks() : 0; }
    int64_t cost_of(int64_t) const { return 4 + this->vectors(); }
    int64_t cost() const { return tasks() * cost_of(0); }
  };

  // scratch: room for the left operand's tiles.
  static void run(const Sum& s, int64_t block, bool first, T* scratch) {
    const int64_t units = smaller(W, s.units - block * W), chunks = Tiles<P>::chunks(s.rows);
    const T* left = s.left + block * s.left_ld * W;
    if (s.bias) add_up<Singles<V>, V>(left, s.rows, units, first, s.bias + block * W);
    if (s.weight == nullptr) return;
    V largest = V::set(0);
    for (int64_t i = 0; Tiles<P>::keeps_small && i < s.rows; ++i)
      largest = max(largest, absolute(first_lanes(V::load(left + i * W), units)));
    const Scale scale(largest);
    for (int64_t c = 0; c < chunks; ++c) {
      V rows[2][W];
      for (int64_t i = 0; i < chunk_depth; ++i) {
        const int64_t row = c * chunk_depth + i;
        rows[i / W][i % W] = row < s.rows ? V::load(left + row * W) * V::set(scale.by) : V::set(0);
      }
      transpose(rows[0]);
      transpose(rows[1]);
      for (int64_t unit = 0; unit < W; ++unit) {
        T* to = scratch + c * P * tile_floats + unit * W;
        __m256i low[P], high[P];
        split<P>(rows[0][unit], low);
        split<P>(rows[1][unit], high);
        for (int q = 0; q < P; ++q)
          _mm512_storeu_si512(to + q * tile_floats, _mm512_inserti64x4(_mm512_castsi256_si512(low[q]), high[q], 1));
      }
    }
    over_groups<group_vectors>(0, s.vectors(), [&](auto n, int64_t vector) {
      multiply<decltype(n)::value>(s, scratch, block, units, vector, chunks, first, scale.back);
    });
  }

 private:
  template <int N>
  static void multiply(const Sum& s, const T* left, int64_t block, int64_t units, int64_t vector, int64_t chunks,
                       bool first, T back) {
    constexpr int64_t tile = tile_floats * int64_t(sizeof(T));
    alignas(64) T out[tile_height * N * W];
    const TileStrides by{64, tile, 0, tile, s.right_ld * W * int64_t(sizeof(T))};
    multiply_tiles<P, 1, N>(left, s.right + vector * s.right_ld * W, by, tile_height, chunks, out, N * W);
    for (int64_t r = 0; r < units; ++r)
      for (int v = 0; v < N; ++v) {
        const int64_t column = (vector + v) * W, n = smaller(W, s.columns - column);
        T* to = s.weight + (block * W + r) * s.columns + column;
        const V sum = V::load(out + (r * N + v) * W) * V::set(back);
        (first ? sum : V::load(to, int(n)) + sum).store(to, int(n));
      }
  }
};
#endif
