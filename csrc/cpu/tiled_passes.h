// What the passes of a layer do by tiles (tiles.h) instead of vectors: the products of the recurrence and of the input,
// forward and back, and the gradients of the weights.

// -------------------------------------------------------------------------------------------------- ForwardPass

template <class Cell, class V, class O>
void ForwardPass<Cell, V, O>::tiled_project_input(const Worker& w, int d, int64_t rows, T* gates_x) const {
  const int64_t ld = (w.last - w.first) * G * W, depth = O::chunks(p.I);
  over_groups<Packed<V, G>::U>(w.first, w.last, [&](auto u, int64_t block) {
    constexpr int N = decltype(u)::value * G;
    const T *bias = bias_x[d] + block * G * W, *tiles = w_ih[d].data + block * G * W * Iw;
    over_tiled_rows<O::pieces, N>(0, rows, w.x, row_x, tiles, depth, [&](int64_t i, V(&sum)[N]) {
      if (O::keeps_small && (w.small_x[i] || any_nan(sum))) {
        load_row<Singles<V>>(storage, w.from_x[i], 0, p.I, round_up(p.I, 2 * W), w.scratch);
        single_row<O::pieces>(sum, w.scratch, tiles, depth);
      }
      for (int v = 0; v < N; ++v)
        (sum[v] + V::load(bias + v * W)).store(gates_x + i * ld + ((block - w.first) * G + v) * W);
    });
  });
}

template <class Cell, class V, class O>
void ForwardPass<Cell, V, O>::tiled_step(const Worker& w, const Step& s, int64_t begin, int64_t end,
                                         const T* gates_x) const {
  if constexpr (O::keeps_small)
    for (int64_t i = begin; i < end; ++i) w.small_h[i] = is_small(largest_of(s.own + i * own_w, p.P));
  over_groups<Packed<V, G>::U>(w.first, w.last, [&](auto u, int64_t block) {
    constexpr int blocks = decltype(u)::value, N = blocks * G;
    const T* tiles = w_hh[s.d].data + block * G * W * Pw;
    over_tiled_rows<O::pieces, N>(begin, end, s.h, row_w, tiles, O::chunks(p.P), [&](int64_t i, V(&sum)[N]) {
      if (O::keeps_small && (w.small_h[i] || any_nan(sum)))
        single_row<O::pieces>(sum, s.own + i * own_w, tiles, O::chunks(p.P));
      apply<blocks>(w, s, begin, i, block, sum, gates_x);
    });
  });
}

// ------------------------------------------------------------------------------------------------- BackwardPass

// carry() by tiles: of the chain's words instead of the buffer's values. Where rows are too small for them, of words
// cut anew from these values, scaled.
template <class Cell, class V, class O>
void BackwardPass<Cell, V, O>::tiled_carry(Worker& w, const Step& s, int64_t from, int64_t carried) {
  const T* words = s.state.chain[from & 1];
  if constexpr (O::keeps_small) {
    zero(s.state.peaks[s.t & 1] + w.part * longest * W, s.now * W);
    bool scaled = false;
    for (int64_t i = 0; i < carried; ++i) {
      V most = V::set(0);
      for (int part = 0; part < split.parts; ++part)
        most = max(most, V::load(s.state.peaks[from & 1] + (part * longest + i) * W));
      w.back[i] = is_small(most) ? 0 : 1;
      scaled = scaled || is_small(most);
    }
    for (int64_t i = 0; scaled && i < carried; ++i) {
      if (w.back[i] == 0)
        w.back[i] = cut_dgates(w, w.rows[i].dgates, i);
      else
        __builtin_memcpy(w.split + i * chain_w, words + i * chain_w, size_t(chain_w) * sizeof(T));
    }
    if (scaled) words = w.split;
  }
  const int64_t depth = G * O::chunks(p.H);
  over_groups<Packed<V, 1>::U>(w.first_out, w.last_out, [&](auto u, int64_t block) {
    constexpr int U = decltype(u)::value;
    const T* tiles = w_hh[s.d].data + block * W * G * Hw;
    over_tiled_rows<O::pieces, U>(0, carried, words, chain_w, tiles, depth, [&](int64_t i, V(&sum)[U]) {
      if constexpr (O::keeps_small) {
        for (int v = 0; v < U; ++v) sum[v] = sum[v] * V::set(w.back[i]);
        if (any_nan(sum)) {
          load_dgates(w.rows[i].dgates, w.loose);
          single_row<O::pieces>(sum, w.loose, tiles, depth);
        }
      }
      for (int v = 0; v < U; ++v) arrive(w, s, i, block + v, sum[v]);
    });
    begin_rows(w, s, carried, block, U);
  });
}

// A vector of row i's dgates as the next step's product reads them.
template <class Cell, class V, class O>
void BackwardPass<Cell, V, O>::put_in_chain(const Worker& w, const Step& s, int64_t i, int64_t unit,
                                            const V (&da)[S]) const {
  for (int k = 0; k < G; ++k) O::store(da[k], s.state.chain[s.t & 1] + i * chain_w + k * Hw, unit, p.H - unit);
  if constexpr (O::keeps_small) {
    T* peak = s.state.peaks[s.t & 1] + (w.part * longest + i) * W;
    V most = V::load(peak);
    for (int k = 0; k < G; ++k) most = max(most, absolute(first_lanes(da[k], p.H - unit)));
    most.store(peak);
  }
}

// The dgates of G slots of a buffer's row as one row of values, each slot padded to chunks.
template <class Cell, class V, class O>
void BackwardPass<Cell, V, O>::load_dgates(const T* dgates, T* to) const {
  const int64_t padded = loose_w / G;
  zero(to, loose_w);
  for (int g = 0; g < G; ++g)
    for (int64_t block = 0; block < blocks; ++block)
      first_lanes(V::load(dgates + (g * blocks + block) * R * W), p.H - block * W).store(to + g * padded + block * W);
}

// The same as words, in row `row` of w.split; scaled if they are small. Returns what undoes that.
template <class Cell, class V, class O>
typename V::T BackwardPass<Cell, V, O>::cut_dgates(const Worker& w, const T* dgates, int64_t row) const {
  load_dgates(dgates, w.loose);
  const V largest = O::keeps_small ? largest_of(w.loose, loose_w) : V::set(0);
  const Scale scale(is_small(largest) ? largest : V::set(0), -40);
  for (int64_t unit = 0; unit < loose_w; unit += W)
    O::store(V::load(w.loose + unit) * V::set(scale.by), w.split + row * chain_w, unit, W);
  return scale.back;
}

// By what a row of `count` vectors is to be multiplied before it is cut into pieces; `back` undoes it. Mostly its first
// vector tells that it needs no scale.
template <class F>
static float small_scale(int64_t count, const F& vector, float& back) {
  f32 largest = f32::set(0);
  back = 1;
  for (int64_t j = 0; j < count; ++j) {
    largest = max(largest, absolute(vector(j)));
    if (_mm512_cmp_ps_mask(largest.v, _mm512_set1_ps(least_scaled), _CMP_NLT_UQ)) return 1;
  }
  const Scale scale(largest, 0);
  back = is_small(largest, least_scaled) ? scale.back : 0;  // zeros have no say in how the other operand is scaled
  return scale.by;
}

// Of a row of the input, vector(0), ...
template <class Cell, class V, class O>
template <class F>
typename V::T BackwardPass<Cell, V, O>::scale_input(const F& vector, T& back) const {
  return small_scale(in_blocks, vector, back);
}

// The same for the state that entered a row's step.
template <class Cell, class V, class O>
typename V::T BackwardPass<Cell, V, O>::scale_state(const Row& row, T& back) const {
  const auto vector = [&](int64_t j) {
    if (row.before == nullptr) return first_lanes(V::load(row.h_first + j * W), p.P - j * W);
    if (projected) return first_lanes(V::load(row.before + Cell::tape * tape_h + j * W), p.P - j * W);
    const V state = first_lanes(V::load(row.before + state_block * tape_h + j * W), p.H - j * W);
    if constexpr (Cell::has_c)
      return state * V::load(row.before + Cell::O * tape_h + j * W);  // as small as o tanh(c), where that is small
    else
      return state;
  };
  return small_scale(out_blocks, vector, back);
}

// The same for its state before the projection.
template <class Cell, class V, class O>
typename V::T BackwardPass<Cell, V, O>::scale_raw(const Row& row, T& back) const {
  const auto vector = [&](int64_t j) {
    if constexpr (Cell::has_c) {
      const V c = first_lanes(V::load(row.tape + state_block * tape_h + j * W), p.H - j * W);
      return c * V::load(row.tape + Cell::O * tape_h + j * W);
    }
    return V::set(0);  // only a cell with c is projected
  };
  return small_scale(blocks, vector, back);
}

// The gradient of the input, two tiles of rows at a time. Small rows are scaled before they are cut into pieces.
template <class Cell, class V, class O>
template <class F>
void BackwardPass<Cell, V, O>::tiled_input_gradient(const Worker& w, int d, int64_t count, const T* dgates,
                                                    const F& put_dx) const {
  constexpr int64_t most = 2 * O::row_beyond;
  const int64_t depth = G * O::chunks(p.H);
  for (int64_t first = 0; first < count; first += most) {
    const int64_t n = smaller(most, count - first);
    T back[most];
    for (int64_t r = 0; r < n; ++r) back[r] = cut_dgates(w, dgates + (first + r) * W, r);
    over_groups<Packed<V, 1>::U>(0, in_blocks, [&](auto u, int64_t block) {
      constexpr int U = decltype(u)::value;
      const T* tiles = w_ih[d].data + block * W * G * Hw;
      over_tiled_rows<O::pieces, U>(0, n, w.split, chain_w, tiles, depth, [&](int64_t r, V(&sum)[U]) {
        for (int v = 0; v < U; ++v) sum[v] = sum[v] * V::set(back[r]);
        if (O::keeps_small && any_nan(sum)) {
          load_dgates(dgates + (first + r) * W, w.loose);
          single_row<O::pieces>(sum, w.loose, tiles, depth);
        }
        for (int v = 0; v < U; ++v) put_dx(first + r, block + v, sum[v]);
      });
    });
  }
}

// --------------------------------------------------------------------------------------------- weight gradients

// The gradients of weights: the left operand, values of neighbouring units, is turned round so that a unit is a row,
// and cut into pieces; the right one lies in tiles already (Tiles::put). Where float32 is to stay float32, a block of
// units is scaled, so that nothing of a product is lost.
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
    const int64_t units = smaller(W, s.units - block * W);
    const T* left = s.left + block * s.left_ld * W;
    if (s.bias) add_up<Singles<V>, V>(left, s.rows, units, first, s.bias + block * W);
    if (s.weight == nullptr) return;
    const auto undone = [&](int64_t row) { return s.right_back ? s.right_back[row] : 1; };
    V largest = V::set(0);
    for (int64_t i = 0; Tiles<P>::keeps_small && i < s.rows; ++i)
      largest = max(largest, absolute(first_lanes(V::load(left + i * W), units)) * V::set(undone(i)));
    // High enough for what is small on either side, if the right operand is not too large for that.
    T back = cut_left(s, left, scratch, undone, Scale(largest, 40));
    over_groups<group_vectors>(0, s.vectors(), [&](auto n, int64_t vector) {
      constexpr int N = decltype(n)::value;
      if (multiply<N>(s, scratch, block, units, vector, first, back, Tiles<P>::keeps_small)) return;
      back = cut_left(s, left, scratch, undone, Scale(largest, -40));
      multiply<N>(s, scratch, block, units, vector, first, back, false);
    });
  }

 private:
  // A block of the left operand as tiles, scaled; returns what undoes that.
  template <class F>
  static T cut_left(const Sum& s, const T* left, T* scratch, const F& undone, const Scale& scale) {
    for (int64_t c = 0; c < Tiles<P>::chunks(s.rows); ++c) {
      V rows[2][W];
      for (int64_t i = 0; i < chunk_depth; ++i) {
        const int64_t row = c * chunk_depth + i;
        rows[i / W][i % W] = row < s.rows ? V::load(left + row * W) * V::set(scale.by * undone(row)) : V::set(0);
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
    return scale.back;
  }

  // N vectors of columns; false, and nothing done, if all sums have to be finite and one is not.
  template <int N>
  static bool multiply(const Sum& s, const T* left, int64_t block, int64_t units, int64_t vector, bool first, T back,
                       bool finite) {
    constexpr int64_t tile = tile_floats * int64_t(sizeof(T));
    alignas(64) T out[tile_height * N * W];
    const TileStrides by{64, tile, 0, tile, s.right_ld * W * int64_t(sizeof(T))};
    multiply_tiles<P, 1, N>(left, s.right + vector * s.right_ld * W, by, tile_height, Tiles<P>::chunks(s.rows), out,
                            N * W);
    V check = V::set(0);  // NaN where there is one, or an infinite one
    for (int64_t i = 0; finite && i < units * N; ++i) check = fma(V::load(out + i * W), V::set(0), check);
    if (_mm512_cmp_ps_mask(check.v, check.v, _CMP_UNORD_Q)) return false;
    for (int64_t r = 0; r < units; ++r)
      for (int v = 0; v < N; ++v) {
        const int64_t column = (vector + v) * W, n = smaller(W, s.columns - column);
        T* to = s.weight + (block * W + r) * s.columns + column;
        const V sum = V::load(out + (r * N + v) * W) * V::set(back);
        (first ? sum : V::load(to, int(n)) + sum).store(to, int(n));
      }
    return true;
  }
};
