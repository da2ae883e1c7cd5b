// One step of the forward pass: the input projection of a tile, the recurrent product, the cell, and where the new
// state goes.

// Steps [begin, end) by a worker that has whole slices; of their input, projected ahead, in which of its tiles it is.
template <class Cell, class V, class O>
void ForwardPass<Cell, V, O>::advance_through(Worker& w, int d, int64_t begin, int64_t end, int64_t turn) {
  if (in_lanes) return advance_in_lanes(w, d, begin, end);
  for (int64_t q = begin; q < end; ++q) {
    advance(w, d, q, begin, end, turn);
    if (projected) project_state(w, d, q);
  }
}

// Step q of [begin, end), whose input is there.
template <class Cell, class V, class O>
void ForwardPass<Cell, V, O>::advance(Worker& w, int d, int64_t q, int64_t begin, int64_t end, int64_t turn) {
  const Step s = step_at(w, d, q);
  const int64_t n = w.slice.count, now = w.slice.active(p, s.t);
  if (s.cut)
    for (int64_t i = 0; i < now; ++i)
      w.cut[i] = i < s.final && is_cut(p, d, s.t + (d ? -1 : 1), row_of(p, w.slice.rank(i)));
  if (folded) {
    gather_x(w, s.t, 0, now, 0);
    step(w, s, 0, now, nullptr);
  } else if (n <= tile) {
    const int64_t in_tile = (q - begin) % tile_steps;
    const Tile& input = w.tiles[turn];
    if (in_tile == 0 && !split.ahead) project_tile(w, d, q, smaller(q + tile_steps, end), input);
    step(w, s, 0, now, input.gates_x + input.offset[in_tile] * (w.last - w.first) * G * W);
  } else {
    for (int64_t i = 0; i < now; i += tile) {
      const int64_t next = smaller(i + tile, now);
      project_input(w, d, gather_x(w, s.t, i, next, 0), w.tiles[0].gates_x);
      step(w, s, i, next, w.tiles[0].gates_x);
    }
  }
  for (int64_t i = now; i < n; ++i)
    if (i % split.parts == w.part) clear_padding(d, s.t, row_of(p, w.slice.rank(i)));
}

// The input of steps [begin, end), at most a tile of them.
template <class Cell, class V, class O>
void ForwardPass<Cell, V, O>::project_tile(const Worker& w, int d, int64_t begin, int64_t end, const Tile& to) {
  int64_t rows = 0;
  for (int64_t q = begin; q < end; ++q) {
    const int64_t t = d ? p.T - 1 - q : q;
    to.offset[q - begin] = rows;
    rows = gather_x(w, t, 0, w.slice.active(p, t), rows);
  }
  project_input(w, d, rows, to.gates_x);
}

// Copies input rows [begin, end) of step t behind the `rows` already there; returns how many there are now.
template <class Cell, class V, class O>
int64_t ForwardPass<Cell, V, O>::gather_x(const Worker& w, int64_t t, int64_t begin, int64_t end, int64_t rows) {
  for (int64_t i = begin; i < end; ++i) {
    const char* from = bytes(p.x.data) + row_offset(p, p.x, t, row_of(p, w.slice.rank(i))) * storage.size;
    T* to = w.x + rows * row_x;
    if (folded && as_words)
      for (int64_t k = 0; k < p.I; ++k) to[k] = reinterpret_cast<const T*>(from)[k];
    else if (folds_values)
      Folded::read(storage, from, to, p.I);
    else
      O::read(storage, from, to, p.I);
    if constexpr (O::keeps_small) {
      if (!folded) {
        w.small_x[rows] = is_small(largest_of(reinterpret_cast<const T*>(from), p.I));
        w.from_x[rows] = from;
      }
    }
    ++rows;
  }
  return rows;
}

// gates_x[row] = bias + x[row] W_ih, unit block by unit block, the gates of a block side by side.
template <class Cell, class V, class O>
void ForwardPass<Cell, V, O>::project_input(const Worker& w, int d, int64_t rows, T* gates_x) const {
  if constexpr (O::tiled)
    tiled_project_input(w, d, rows, gates_x);
  else
    vector_project_input(w, d, rows, gates_x);
}

template <class Cell, class V, class O>
void ForwardPass<Cell, V, O>::vector_project_input(const Worker& w, int d, int64_t rows, T* gates_x) const {
  const int64_t ld = (w.last - w.first) * G * W;
  const Source source = source_ih(d);
  const bool dot = from_ih == From::rows;
  over_groups<Packed<V, G>::U>(w.first, w.last, [&](auto u, int64_t block) {
    constexpr int U = decltype(u)::value, N = U * G;
    const T* bias = bias_x[d] + block * G * W;
    const T* group = dot ? nullptr : group_at<O>(w_ih[d], source, storage, block, U, w.panel, w.scratch);
    over_rows<tile_rows<N>>(0, rows, [&](auto m, int64_t i) {
      constexpr int M = decltype(m)::value;
      V sum[M][N];
      if (dot)
        dot_group<O, G>(sum, w.x + i * row_x, Iw, source, storage, block, w.scratch);
      else
        product<O>(sum, w.x + i * row_x, row_x, group, Iw);
      for (int r = 0; r < M; ++r)
        for (int v = 0; v < N; ++v)
          (sum[r][v] + V::load(bias + v * W)).store(gates_x + (i + r) * ld + ((block - w.first) * G + v) * W);
    });
  });
}

// Rows [begin, end) of one step, this worker's hidden units.
template <class Cell, class V, class O>
void ForwardPass<Cell, V, O>::step(const Worker& w, const Step& s, int64_t begin, int64_t end, const T* gates_x) const {
  if constexpr (O::tiled)
    tiled_step(w, s, begin, end, gates_x);
  else
    vector_step(w, s, begin, end, gates_x);
}

template <class Cell, class V, class O>
void ForwardPass<Cell, V, O>::vector_step(const Worker& w, const Step& s, int64_t begin, int64_t end,
                                          const T* gates_x) const {
  constexpr int U = Packed<V, G>::U;
  if (s.back && end - begin == 1) return step_back(w, s, begin, gates_x);
  int64_t first = w.first;
  if (end - begin == 1 && from_hh == From::copy)
    for (; first + 2 * U <= w.last; first += 2 * U) step_pair(w, s, begin, first, gates_x);
  const Source source = source_hh(s.d);
  const bool dot = from_hh == From::rows;
  over_groups<U>(first, w.last, [&](auto u, int64_t block) {
    constexpr int blocks = decltype(u)::value;
    const T* group = dot ? nullptr : group_at<O>(w_hh[s.d], source, storage, block, blocks, w.panel, w.scratch);
    over_even_rows<tile_rows<blocks * G>>(begin, end, [&](auto m, int64_t i) {
      constexpr int M = decltype(m)::value;
      V sum[M][blocks * G];
      if (dot)
        dot_group<O, G>(sum, s.h + i * row_w, row_w, source, storage, block, w.scratch);
      else
        product<O>(sum, s.h + i * row_w, row_w, group, Pw);
      for (int r = 0; r < M; ++r) apply<blocks>(w, s, begin, i + r, block, sum[r], gates_x);
    });
  });
}

// One row, two neighbouring groups from `block` on.
template <class Cell, class V, class O>
FASTRNN_MEMBER void ForwardPass<Cell, V, O>::step_pair(const Worker& w, const Step& s, int64_t row, int64_t block,
                                                       const T* gates_x) const {
  constexpr int U = Packed<V, G>::U;
  V sum[2][U * G];
  product_of_pair<O>(sum, s.h + row * row_w, w_hh[s.d].data + block * G * W * Pw, U * G * W * Pw, Pw);
  apply<U>(w, s, row, row, block, sum[0], gates_x);
  apply<U>(w, s, row, row, block + U, sum[1], gates_x);
}

// One row, from the last group to the first: the same sums.
template <class Cell, class V, class O>
__attribute__((noinline)) void ForwardPass<Cell, V, O>::step_back(const Worker& w, const Step& s, int64_t row,
                                                                  const T* gates_x) const {
  constexpr int U = Packed<V, G>::U;
  int64_t first = w.first + (w.last - w.first) / (2 * U) * (2 * U);
  over_groups<U>(first, w.last, [&](auto u, int64_t block) {
    constexpr int blocks = decltype(u)::value;
    V sum[1][blocks * G];
    product<O>(sum, s.h + row * row_w, row_w, w_hh[s.d].data + block * G * W * Pw, Pw);
    apply<blocks>(w, s, row, row, block, sum[0], gates_x);
  });
  while ((first -= 2 * U) >= w.first) step_pair(w, s, row, first, gates_x);
}

// The cell for row i and the `count` unit blocks of a group, from the sums of the recurrent product.
template <class Cell, class V, class O>
template <int count>
FASTRNN_MEMBER void ForwardPass<Cell, V, O>::apply(const Worker& w, const Step& s, int64_t begin, int64_t i,
                                                   int64_t block, const V* sum, const T* gates_x) const {
  const int64_t b = row_of(p, w.slice.rank(i));
  V x[count * G];
  if (folded) {
    const T* weights = w_ih[s.d].data + block * G * W * Iw;
    for (int v = 0; v < count * G; ++v) x[v] = V::set(0);
    for (int64_t k = 0; k < Iw; ++k) {
      const V left = V::set(w.x[i * row_x + k]);
      for (int v = 0; v < count * G; ++v)
        x[v] = Folded::multiply_add(left, V::load(weights + place_in_group<count * G, V>(Iw, k, v)), x[v]);
    }
    for (int v = 0; v < count * G; ++v) x[v] = x[v] + V::load(bias_x[s.d] + (block * G + v) * W);
  } else {
    const T* from = gates_x + ((i - begin) * (w.last - w.first) + block - w.first) * G * W;
    for (int v = 0; v < count * G; ++v) x[v] = V::load(from + v * W);
  }
  T* tape_to = nullptr;
  if (p.tape) tape_to = static_cast<T*>(p.tape) + (s.d * N + stored_row(p, s.t, w.slice.rank(i))) * tape_row;
  for (int k = 0; k < count; ++k) {
    const int64_t unit = (block + k) * W;
    V a[S], tape[Cell::tape], c = V::set(0), h = V::set(0);
    for (int slot = 0; slot < S; ++slot) {
      if (slot < X)
        a[slot] = sum[k * G + slot] + V::load(bias_h[s.d] + slot * Hp + unit);
      else if (slot < G)
        a[slot] = sum[k * G + slot] + x[k * G + slot - X];
      else
        a[slot] = x[k * G + slot - X];
    }
    if (Cell::reads_h) h = keeps_h ? V::load(s.own + i * own_w + unit) : O::load(s.h + i * row_w, unit);
    if (Cell::has_c) c = V::load(s.state.c + i * Hp + unit);
    Cell::forward(a, h, c, tape);
    if (Cell::has_c) put_c(s, i, b, unit, c);
    if (projected)
      h.store(s.state.h_raw + i * Hp + unit);
    else
      h = put_h(s, i, b, unit, h);
    if (!tape_to) continue;
    if (!Cell::has_c) tape[Cell::tape - 1] = h;  // as the next step sees it
    for (int v = 0; v < Cell::tape; ++v) tape[v].store(tape_to + v * tape_h + unit);
  }
}

// A vector of the new c of row i: to the tensors that want it, and to the next step.
template <class Cell, class V, class O>
FASTRNN_MEMBER void ForwardPass<Cell, V, O>::put_c(const Step& s, int64_t i, int64_t b, int64_t unit, V c) const {
  const int64_t n = p.H - unit, size = storage.size;
  if (p.c_all) Storage<V>::store(storage, c, bytes(p.c_all) + (((s.d * p.T + s.t) * p.B + b) * p.H + unit) * size, n);
  if (i >= s.final) put_last(c, p.c_n, (s.d * p.B + b) * p.H + unit, n);
  if (s.cut && s.cut[i]) c = start_of<V>(s.state.c_reset, i * Hp + unit);
  c.store(s.state.c + i * Hp + unit);
}

// The same for h, after a projection if there is one. Returns h as it was stored.
template <class Cell, class V, class O>
FASTRNN_MEMBER V ForwardPass<Cell, V, O>::put_h(const Step& s, int64_t i, int64_t b, int64_t unit, V h) const {
  const int64_t n = p.P - unit, size = storage.size;
  h = Storage<V>::store(storage, h, bytes(p.y.data) + (row_offset(p, p.y, s.t, b) + s.d * p.P + unit) * size, n);
  if (p.h_all) Storage<V>::store(storage, h, bytes(p.h_all) + (((s.d * p.T + s.t) * p.B + b) * p.P + unit) * size, n);
  if (i >= s.final) put_last(h, p.h_n, (s.d * p.B + b) * p.P + unit, n);
  const V next = s.cut && s.cut[i] ? start_of<V>(s.state.h_reset, i * Pp + unit) : h;
  O::store(next, s.h_new + i * row_w, unit, n);
  if (keeps_h) {
    if (O::keeps_small && n < W)
      next.store(s.own_new + i * own_w + unit, int(n));  // the rest is to stay zero
    else
      next.store(s.own_new + i * own_w + unit);
  }
  return h;
}

template <class Cell, class V, class O>
FASTRNN_MEMBER void ForwardPass<Cell, V, O>::put_last(V x, void* to, int64_t at, int64_t n) const {
  Storage<V>::store(state_storage, x, bytes(to) + at * state_storage.size, n);
}

// h = h_raw W_hr, this worker's columns.
template <class Cell, class V, class O>
void ForwardPass<Cell, V, O>::project_state(const Worker& w, int d, int64_t q) {
  const Step s = step_at(w, d, q);
  const Source source = source_hr(d);
  const bool dot = from_hh == From::rows;
  over_groups<Packed<V, 1>::U>(w.first_out, w.last_out, [&](auto u, int64_t block) {
    constexpr int U = decltype(u)::value;
    const T* group = dot ? nullptr : group_at<Singles<V>>(w_hr[d], source, storage, block, U, w.panel, w.scratch);
    over_rows<tile_rows<U>>(0, w.slice.active(p, s.t), [&](auto m, int64_t i) {
      constexpr int M = decltype(m)::value;
      V sum[M][U];
      if (dot)
        dot_group<Singles<V>, 1>(sum, s.state.h_raw + i * Hp, Hp, source, storage, block, w.scratch);
      else
        product<Singles<V>>(sum, s.state.h_raw + i * Hp, Hp, group, p.H);
      for (int r = 0; r < M; ++r) {
        const int64_t rank = w.slice.rank(i + r), b = row_of(p, rank);
        for (int v = 0; v < U; ++v) {
          const V h = put_h(s, i + r, b, (block + v) * W, sum[r][v]);
          if (p.tape)
            h.store(static_cast<T*>(p.tape) + (d * N + stored_row(p, s.t, rank)) * tape_row + Cell::tape * tape_h +
                    (block + v) * W);
        }
      }
    });
  });
}

// What lies past a row's length reads as zero.
template <class Cell, class V, class O>
void ForwardPass<Cell, V, O>::clear_padding(int d, int64_t t, int64_t b) {
  const int64_t size = storage.size, row = (d * p.T + t) * p.B + b;
  if (!p.packed) __builtin_memset(bytes(p.y.data) + (row_offset(p, p.y, t, b) + d * p.P) * size, 0, size_t(p.P * size));
  if (p.h_all) __builtin_memset(bytes(p.h_all) + row * p.P * size, 0, size_t(p.P * size));
  if (p.c_all) __builtin_memset(bytes(p.c_all) + row * p.H * size, 0, size_t(p.H * size));
}
