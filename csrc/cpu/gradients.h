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
    int64_t rows;         // to add up, in words of left
    T* weight;            // [units][columns]
    T* bias;              // [units]
    const T* right_back;  // [rows] what makes up for the scale of each of right's rows; null: they have none

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
