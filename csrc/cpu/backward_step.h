// One step of back-propagation: what comes through the recurrence, on through the cell, and what is watched of it.

// dh of step t: the recurrent product of the dgates of the step before, and on through the cell, unless a projection
// comes between. With t before the first or past the last step: only what goes to h0.
template <class Cell, class V, class O>
void BackwardPass<Cell, V, O>::carry(Worker& w, int d, int64_t k, int64_t t) {
  const Step s = step_at(w, d, k, t);
  const int64_t from = d ? t - 1 : t + 1;
  const bool any = from >= 0 && from < p.T;
  const int64_t carried = any ? w.slice.active(p, from) : 0;
  find_rows(w, s, k, from, carried);
  if constexpr (O::tiled)
    tiled_carry(w, s, from, carried);
  else
    vector_carry(w, s, carried);
  if (w.watch && !projected && k < chunks) end_watched_step(w, s, k);
}

template <class Cell, class V, class O>
void BackwardPass<Cell, V, O>::vector_carry(Worker& w, const Step& s, int64_t carried) {
  const int d = s.d;
  const bool back = split.alternate && (s.t & 1) && carried == 1;
  over_groups<Packed<V, 1>::U>(w.first_out, w.last_out, back, [&](auto u, int64_t block) {
    constexpr int U = decltype(u)::value;
    const T* group = nullptr;
    if (carried && (!in_place || (block + U) * W > p.P))
      group = group_at<O>(w_hh[d], source_hh(d), storage, block, U, w.panel, static_cast<T*>(nullptr));
    over_even_rows<tile_rows<U>>(0, carried, [&](auto m, int64_t i) {
      constexpr int M = decltype(m)::value;
      V sum[M][U];
      const T* dgates[M];
      for (int r = 0; r < M; ++r) dgates[r] = w.rows[i + r].dgates;
      multiply_dgates(sum, dgates, group, source_hh(d), block);
      for (int r = 0; r < M; ++r)
        for (int v = 0; v < U; ++v) arrive(w, s, i + r, block + v, sum[r][v]);
    });
    begin_rows(w, s, carried, block, U);
  });
}

// What came through the recurrence to a vector of row i.
template <class Cell, class V, class O>
FASTRNN_MEMBER void BackwardPass<Cell, V, O>::arrive(const Worker& w, const Step& s, int64_t i, int64_t block,
                                                     V dh) const {
  const int64_t unit = block * W;
  if (Cell::bypass) dh = dh + V::load(s.state.bypass + i * Hp + unit);
  if (w.rows[i].was_cut) {
    if (s.state.dh_reset) add_to(s.state.dh_reset + i * Pp + unit, dh);
    dh = V::set(0);
  }
  if (i < s.now)
    receive(w, s, i, block, dh);
  else if (p.dh0)
    put_first(dh, p.dh0, (s.d * p.B + row_of(p, w.slice.rank(i))) * p.P + unit, p.P - unit);
}

// Rows whose last step this is.
template <class Cell, class V, class O>
FASTRNN_MEMBER void BackwardPass<Cell, V, O>::begin_rows(const Worker& w, const Step& s, int64_t carried, int64_t block,
                                                         int count) const {
  for (int64_t i = carried; i < s.now; ++i)
    for (int v = 0; v < count; ++v) receive(w, s, i, block + v, V::load(s.state.dh_n + i * Pp + (block + v) * W));
}

template <class Cell, class V, class O>
FASTRNN_MEMBER void BackwardPass<Cell, V, O>::put_first(V x, void* to, int64_t at, int64_t n) const {
  Storage<V>::store(state_storage, x, bytes(to) + at * state_storage.size, n);
}

// dgates times the group of weights at `block`; null: times the source, as it lies.
template <class Cell, class V, class O>
template <int M, int U>
FASTRNN_MEMBER void BackwardPass<Cell, V, O>::multiply_dgates(V (&sum)[M][U], const T* const (&dgates)[M],
                                                              const T* group, const Source& source,
                                                              int64_t block) const {
  if constexpr (M <= few_rows && !twice)
    if (group == nullptr) return product_of_rows(sum, dgates, R * W, source, G, block * W);
  product_of_blocks<O>(sum, dgates, R * Ww, group, G, Hw);
}

// What this step's rows read, and what became of the gradient they get.
template <class Cell, class V, class O>
void BackwardPass<Cell, V, O>::find_rows(Worker& w, const Step& s, int64_t k, int64_t from, int64_t carried) {
  const int d = s.d;
  const int64_t c = k < chunks ? chunk(d, k) : -1;
  const int64_t before = c >= 0 && from >= chunk_begin[c] && from < chunk_begin[c + 1] ? k : k - 1;
  const int64_t c_before = carried ? chunk(d, before) : -1;
  for (int64_t i = 0; i < larger(s.now, carried); ++i) {
    Row& row = w.rows[i];
    const int64_t rank = w.slice.rank(i), b = row_of(p, rank), t = s.t;
    if (i < carried) {
      row.dgates =
          buffers[2 * d + (before & 1)].dgates + (buffer_row(c_before, rank) + from - chunk_begin[c_before]) * Ww;
      row.was_cut = is_cut(p, d, from, b);
    }
    row.carried = i < carried ? !row.was_cut : p.watched_goes_on && t == (d ? 0 : p.T - 1);
    if (i >= s.now) continue;
    row.at = buffer_row(c, rank) + t - chunk_begin[c];
    row.cut = is_cut(p, d, t, b);
    row.last = d ? t + 1 == length_of(p, b) : t == 0;
    row.tape = tape_at(d, t, rank);
    row.before = row.cut || row.last ? nullptr : tape_at(d, d ? t + 1 : t - 1, rank);
    const T *h_cut = s.state.h_reset ? s.state.h_reset + i * Pp : none,
            *c_cut = s.state.c_reset ? s.state.c_reset + i * Hp : none;
    row.h_first = row.cut ? h_cut : s.state.h0 + i * Pp;
    row.c_first = row.cut || !Cell::has_c ? c_cut : s.state.c0 + i * Hp;
    if constexpr (O::keeps_small) {
      T back = 1;
      row.h_by = s.buffer.h_prev ? scale_state(row, back) : 1;
      if (s.buffer.h_prev && w.part == 0) s.buffer.h_back[row.at] = back;
      row.raw_by = s.buffer.h_raw ? scale_raw(row, back) : 1;
      if (s.buffer.h_raw && w.part == 0) s.buffer.raw_back[row.at] = back;
    }
    row.dy = p.dy.data ? bytes(p.dy.data) + (row_offset(p, p.dy, t, b) + d * p.P) * storage.size : nullptr;
  }
}

// Adds what came from outside to the gradient of h; then through the cell, or into the buffer before the projection.
template <class Cell, class V, class O>
FASTRNN_MEMBER void BackwardPass<Cell, V, O>::receive(const Worker& w, const Step& s, int64_t i, int64_t block,
                                                      V dh) const {
  const Row& row = w.rows[i];
  const int64_t unit = block * W, n = p.P - unit;
  if (w.watch) w.watch->arrives(row.carried ? dh : V::set(0), n);
  if (row.dy) dh = dh + Storage<V>::load(storage, row.dy + unit * storage.size, n);
  if (p.dh_all) dh = dh + load_state_gradient(p.dh_all, w, s, i, p.P, unit);
  if (w.watch) w.watch->add(watched::dh, dh, n);
  if (!projected) {
    through_cell(w, s, i, block, dh);
    return;
  }
  const int64_t at = row.at;
  if (w.watch) w.watch->add(watched::h, V::load(row.tape + Cell::tape * tape_h + unit), n);
  dh.store(s.state.dh + i * Pp + unit);
  if (s.buffer.dh_out) O::Left::put(dh, s.buffer.dh_out + block * Rl * W, at);
  if (s.buffer.h_prev)
    put_h_prev(s, row, block, V::load((row.before ? row.before + Cell::tape * tape_h : row.h_first) + unit));
}

template <class Cell, class V, class O>
V BackwardPass<Cell, V, O>::load_state_gradient(const void* from, const Worker& w, const Step& s, int64_t i,
                                                int64_t width, int64_t unit) const {
  const int64_t b = row_of(p, w.slice.rank(i));
  return Storage<V>::load(storage, bytes(from) + (((s.d * p.T + s.t) * p.B + b) * width + unit) * storage.size,
                          width - unit);
}

template <class Cell, class V, class O>
void BackwardPass<Cell, V, O>::through_projection(Worker& w, int d, int64_t k, int64_t t) {
  const Step s = step_at(w, d, k, t);
  over_groups<Packed<V, 1>::U>(w.first, w.last, [&](auto u, int64_t block) {
    constexpr int U = decltype(u)::value;
    const T* group = group_at<Singles<V>>(w_hr[d], source_hr(d), storage, block, U, w.panel, static_cast<T*>(nullptr));
    over_rows<tile_rows<U>>(0, s.now, [&](auto m, int64_t i) {
      constexpr int M = decltype(m)::value;
      V sum[M][U];
      product<Singles<V>>(sum, s.state.dh + i * Pp, Pp, group, p.P);
      for (int r = 0; r < M; ++r)
        for (int v = 0; v < U; ++v) through_cell(w, s, i + r, block + v, sum[r][v]);
    });
  });
  if (w.watch) end_watched_step(w, s, k);
}

// x as row `at` of a block of the right operands of weight gradients.
template <class Cell, class V, class O>
FASTRNN_MEMBER void BackwardPass<Cell, V, O>::put(V x, T* blocks_of_rows, int64_t block, int64_t at) const {
  O::put(x, blocks_of_rows + block * Rw * W, at);
}

template <class Cell, class V, class O>
FASTRNN_MEMBER void BackwardPass<Cell, V, O>::put_h_prev(const Step& s, const Row& row, int64_t block, V h) const {
  put(O::keeps_small ? h * V::set(row.h_by) : h, s.buffer.h_prev, block, row.at);
}

// h of an LSTM step from its tape, as it was stored.
template <class Cell, class V, class O>
FASTRNN_MEMBER V BackwardPass<Cell, V, O>::hidden(const T* tape, int64_t unit) const {
  if constexpr (Cell::has_c) {
    const V h = Cell::hidden(V::load(tape + Cell::O * tape_h + unit), V::load(tape + Cell::C * tape_h + unit));
    if (!storage.rounds || projected) return h;
    T stored[W];
    return Storage<V>::store(storage, h, stored, W);
  }
  return V::load(tape + state_block * tape_h + unit);
}

template <class Cell, class V, class O>
FASTRNN_MEMBER void BackwardPass<Cell, V, O>::through_cell(const Worker& w, const Step& s, int64_t i, int64_t block,
                                                           V dh) const {
  const Row& row = w.rows[i];
  const int64_t unit = block * W, at = row.at;
  V tape[Cell::tape], da[S], h_prev = V::set(0), c_prev = V::set(0), dc = V::set(0);
  const T* soon = row.tape + (s.d ? 2 : -2) * tape_row + unit;
  for (int k = 0; k < Cell::tape; ++k) __builtin_prefetch(soon + k * tape_h);
  for (int k = 0; k < Cell::tape; ++k) tape[k] = V::load(row.tape + k * tape_h + unit);
  if (Cell::reads_h || (s.buffer.h_prev && !projected))
    h_prev = row.before ? hidden(row.before, unit) : V::load(row.h_first + unit);
  if constexpr (Cell::has_c) {
    c_prev = V::load(row.before ? row.before + state_block * tape_h + unit : row.c_first + unit);
    dc = V::load(s.state.dc + i * Hp + unit);
    if (p.dc_all) dc = dc + load_state_gradient(p.dc_all, w, s, i, p.H, unit);
    if (s.buffer.h_raw) {
      const V h = hidden(row.tape, unit);
      put(O::keeps_small ? h * V::set(row.raw_by) : h, s.buffer.h_raw, block, at);
    }
  }
  if (Cell::has_c && w.watch) watch_cell(w, s, i, unit, dh, dc);
  Cell::backward(tape, h_prev, c_prev, dh, dc, da);
  if (s.buffer.h_prev && !projected) put_h_prev(s, row, block, h_prev);
  for (int k = 0; k < S; ++k) {
    O::Left::store(da[k], s.buffer.dgates + ((k * blocks + block) * R + at) * Ww, 0, p.H - unit);
    if (twice && s.buffer.by_rows) put(da[k], s.buffer.by_rows, k * blocks + block, at);
  }
  if constexpr (O::tiled) put_in_chain(w, s, i, unit, da);
  if (Cell::bypass) dh.store(s.state.bypass + i * Hp + unit);
  if (!Cell::has_c) return;
  if (row.cut) {
    if (s.state.dc_reset) add_to(s.state.dc_reset + i * Hp + unit, dc);
    dc = V::set(0);
  }
  if (row.last && p.dc0) put_first(dc, p.dc0, (s.d * p.B + row_of(p, w.slice.rank(i))) * p.H + unit, p.H - unit);
  dc.store(s.state.dc + i * Hp + unit);
}

// dh, dc: what enters the backward of a cell with c. Beside the step, not in it: few calls are watched.
template <class Cell, class V, class O>
__attribute__((noinline)) void BackwardPass<Cell, V, O>::watch_cell(const Worker& w, const Step& s, int64_t i,
                                                                    int64_t unit, V dh, V dc) const {
  if constexpr (Cell::has_c) {
    const Row& row = w.rows[i];
    const int64_t n = p.H - unit;
    Watch<Cell, V>& watch = *w.watch;
    const V o = V::load(row.tape + Cell::O * tape_h + unit), t = tanh(V::load(row.tape + Cell::C * tape_h + unit));
    watch.add(watched::dc, Cell::cell_gradient(o, t, dh, dc), n);
    const V arrived = projected ? V::set(0) : watch.arrived;
    const V dc_arrived = row.carried ? V::load(s.state.dc + i * Hp + unit) : V::set(0);
    watch.add(watched::dc_arrived, Cell::cell_gradient(o, t, arrived, dc_arrived), n);
    if (!projected) watch.add(watched::h, o * t, n);
  }
}

template <class Cell, class V, class O>
double* BackwardPass<Cell, V, O>::watched_step(const Worker& w, int d, int64_t k, int64_t step) const {
  return w.watched + ((2 * d + (k & 1)) * most_steps + step) * Watch<Cell, V>::columns;
}

template <class Cell, class V, class O>
void BackwardPass<Cell, V, O>::end_watched_step(const Worker& w, const Step& s, int64_t k) const {
  for (int64_t i = 0; i < s.now; ++i) w.watch->add_row(w.rows[i].tape, tape_h, w.first, w.last, p.H);
  double* to = alone() ? p.watched + (s.d * p.T + s.t) * Watch<Cell, V>::columns
                       : watched_step(w, s.d, k, s.t - chunk_begin[chunk(s.d, k)]);
  w.watch->write(w.part == 0 ? s.now : 0, to);
}

// This worker's share of a chunk's steps, summed over all workers.
template <class Cell, class V, class O>
void BackwardPass<Cell, V, O>::sum_watched(int64_t worker, int round, int d, int64_t k) const {
  const int64_t n = steps(d, k), end = share_of(n, worker + 1, split.workers);
  for (int64_t i = share_of(n, worker, split.workers); i < end; ++i) {
    double* to = p.watched + (d * p.T + chunk_begin[chunk(d, k)] + i) * Watch<Cell, V>::columns;
    zero(to, Watch<Cell, V>::columns);
    for (int64_t other = 0; other < split.recurrent(); ++other) {
      if (direction(other, round) != d) continue;
      const double* from = watched_step(workers[other], d, k, i);
      for (int j = 0; j < Watch<Cell, V>::columns; ++j) to[j] += from[j];
    }
  }
}
