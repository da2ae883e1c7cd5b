// The forward pass of few hidden units in many rows: a vector holds one unit of `lanes` rows here, where it holds
// `lanes` units of one row elsewhere. Units that fill no vectors waste nothing then. The same operations in the same
// order on every number: the same bits.
//
// Rows are worked on `lanes` at a time, from the first step to the last; their input and state lie turned, [unit][row],
// and the weights are broadcast value by value.

// Where that is possible, and pays. Measured: as fast or faster where no more numbers are computed than elsewhere,
// those of empty lanes among them; where broadcasts cost instructions, or a tape's rows have to be turned back, a
// seventh fewer. Turning the weights costs two steps of as many rows as there are lanes, which packing would cost too.
template <class Cell, class V, class O>
bool ForwardPass<Cell, V, O>::suits_lanes() const {
  constexpr int64_t few_steps = 4, weights_kept_near = 512 * 1024;
  if (W == 1 || !as_words || O::tiled || projected || p.first_row || p.reset) return false;
  if (split.parts > 1 || split.ahead || p.T < few_steps || 2 * longest < W) return false;
  if (G * p.H * (p.I + p.H) * int64_t(sizeof(T)) > weights_kept_near) return false;
  const int64_t turning = prepacked ? 2 : 0;
  const int64_t here = (p.T * ceil_div(longest, W) + turning) * W * p.H, elsewhere = p.T * longest * Hp;
  return p.tape || !broadcasts_in_fma ? 23 * here <= 20 * elsewhere : 20 * here <= 21 * elsewhere;
}

template <class Cell, class V, class O>
void ForwardPass<Cell, V, O>::take_lanes(Carve& carve, Lanes& lanes) const {
  const int64_t rows = round_up(longest, W);
  lanes.weights = carve.take<T>(round_up(p.H, Lanes::units) * G * (p.I + p.H));
  lanes.x = carve.take<T>(p.I * W);
  for (T*& h : lanes.h) h = carve.take<T>(rows * p.H);
  lanes.c = carve.take<T>(Cell::has_c ? rows * p.H : 0);
  lanes.tape = carve.take<T>(p.tape ? Cell::tape * p.H * W : 0);
}

// The weights of direction d, [groups of units][input, then state][units][gates], and the first states of its rows.
template <class Cell, class V, class O>
void ForwardPass<Cell, V, O>::turn_in(const Worker& w, int d) {
  constexpr int units = Lanes::units, N = units * G;
  const Lanes& lanes = w.lanes;
  const int64_t K = p.I + p.H;
  const auto put = [&](const Packed<V, G>& packed, const Source& source, int64_t from, int64_t depth) {
    const auto to = [&](int64_t unit, int g) {
      return lanes.weights + (unit / units * K + from) * N + unit % units * G + g;
    };
    if (!prepacked) {
      for (int g = 0; g < G; ++g)
        for (int64_t unit = 0; unit < p.H; ++unit) {
          const T* row = static_cast<const T*>(source.data) + (source.gate[g] * p.H + unit) * source.ld;
          for (int64_t k = 0; k < depth; ++k) to(unit, g)[k * N] = row[k];
        }
      return;
    }
    over_groups<Packed<V, G>::U>(0, blocks, [&](auto u, int64_t block) {
      constexpr int vectors = decltype(u)::value * G;
      const T* group = packed.data + block * G * W * depth;
      for (int v = 0; v < vectors; ++v)
        for (int64_t unit = (block + v / G) * W, lane = 0; lane < W && unit + lane < p.H; ++lane)
          for (int64_t k = 0; k < depth; ++k)
            to(unit + lane, v % G)[k * N] = group[place_in_group<vectors, V>(depth, k, v) + lane];
    });
  };
  zero(lanes.weights, round_up(p.H, units) * G * K);
  put(w_ih[d], source_ih(d), 0, p.I);
  put(w_hh[d], source_hh(d), p.I, p.H);
  const State& s = w.states[d];
  for (int64_t first = 0; first < w.slice.count; first += W) {
    const int64_t rows = smaller(W, w.slice.count - first);
    const T *h[W], *c[W];
    for (int64_t r = 0; r < rows; ++r) {
      h[r] = s.h[0] + (first + r) * row_w;
      c[r] = s.c + (first + r) * Hp;
    }
    pack_columns<V>(h, rows, p.H, lanes.h[0] + first * p.H, W);
    if (Cell::has_c) pack_columns<V>(c, rows, p.H, lanes.c + first * p.H, W);
  }
}

// Steps [begin, end) of a worker's rows.
template <class Cell, class V, class O>
void ForwardPass<Cell, V, O>::advance_in_lanes(const Worker& w, int d, int64_t begin, int64_t end) {
  const Lanes& lanes = w.lanes;
  if (begin == 0) turn_in(w, d);
  for (int64_t first = 0; first < w.slice.count; first += W) {
    const int64_t rows = smaller(W, w.slice.count - first);
    int64_t b[W];
    for (int64_t r = 0; r < rows; ++r) b[r] = row_of(p, w.slice.rank(first + r));
    T* const c = lanes.c + first * p.H;
    for (int64_t q = begin; q < end; ++q) {
      const int64_t t = d ? p.T - 1 - q : q;
      const T* x[W];
      for (int64_t r = 0; r < rows; ++r) x[r] = static_cast<const T*>(p.x.data) + row_offset(p, p.x, t, b[r]);
      pack_columns<V>(x, rows, p.I, lanes.x, W);
      T* const h = lanes.h[~q & 1] + first * p.H;
      step_in_lanes(lanes, d, lanes.h[q & 1] + first * p.H, h, c);
      const bool last = q + 1 == p.T;
      const auto put = [&](V x, void* to, int64_t at, int64_t unit) {
        Storage<V>::store(storage, x, bytes(to) + (at + unit) * storage.size, p.H - unit);
      };
      over_rows_of(h, rows, [&](int64_t r, int64_t unit, V x) {
        put(x, p.y.data, row_offset(p, p.y, t, b[r]) + d * p.H, unit);
        if (p.h_all) put(x, p.h_all, ((d * p.T + t) * p.B + b[r]) * p.H, unit);
        if (last) put(x, p.h_n, (d * p.B + b[r]) * p.H, unit);
      });
      if (Cell::has_c && (last || p.c_all))
        over_rows_of(c, rows, [&](int64_t r, int64_t unit, V x) {
          if (p.c_all) put(x, p.c_all, ((d * p.T + t) * p.B + b[r]) * p.H, unit);
          if (last) put(x, p.c_n, (d * p.B + b[r]) * p.H, unit);
        });
      for (int v = 0; p.tape && v < Cell::tape; ++v)
        over_rows_of(lanes.tape + v * p.H * W, rows, [&](int64_t r, int64_t unit, V x) {
          const int64_t row = d * N + stored_row(p, t, w.slice.rank(first + r));
          x.store(static_cast<T*>(p.tape) + row * tape_row + v * tape_h + unit);
        });
    }
  }
}

// One step of `lanes` rows: h to h_new, c in place.
template <class Cell, class V, class O>
void ForwardPass<Cell, V, O>::step_in_lanes(const Lanes& lanes, int d, const T* h, T* h_new, T* c) const {
  constexpr int units = Lanes::units, N = units * G;
  for (int64_t first = 0; first < p.H; first += units) {
    const T* weights = lanes.weights + first * G * (p.I + p.H);
    V from_x[1][N], from_h[1][N];
    product_of_lanes(from_x, lanes.x, weights, p.I);
    product_of_lanes(from_h, h, weights + p.I * N, p.H);
    for (int u = 0; u < units && first + u < p.H; ++u) {
      const int64_t unit = first + u, at = unit * W;
      const T* bias = bias_x[d] + unit / W * G * W + unit % W;
      V a[S], tape[Cell::tape], state = Cell::reads_h ? V::load(h + at) : V::set(0);
      V cell = Cell::has_c ? V::load(c + at) : V::set(0);
      for (int slot = 0; slot < S; ++slot) {
        const V x = slot >= X ? from_x[0][u * G + slot - X] + V::set(bias[(slot - X) * W]) : V::set(0);
        if (slot < X)
          a[slot] = from_h[0][u * G + slot] + V::set(bias_h[d][slot * Hp + unit]);
        else
          a[slot] = slot < G ? from_h[0][u * G + slot] + x : x;
      }
      Cell::forward(a, state, cell, tape);
      if (Cell::has_c) cell.store(c + at);
      state.store(h_new + at);
      for (int v = 0; p.tape && v < Cell::tape; ++v) tape[v].store(lanes.tape + v * p.H * W + at);
    }
  }
}

// Calls f(row, unit, vector of units) for the rows of `turned`, [unit][row].
template <class Cell, class V, class O>
template <class F>
void ForwardPass<Cell, V, O>::over_rows_of(const T* turned, int64_t rows, const F& f) const {
  for (int64_t unit = 0; unit < p.H; unit += W) {
    V square[W];
#pragma GCC unroll 16
    for (int i = 0; i < W; ++i) square[i] = unit + i < p.H ? V::load(turned + (unit + i) * W) : V::set(0);
    transpose(square);
    T row[W][W];
#pragma GCC unroll 16
    for (int i = 0; i < W; ++i) square[i].store(row[i]);
    for (int64_t r = 0; r < rows; ++r) f(r, unit, V::load(row[r]));
  }
}
