// What back-propagation does with a chunk of steps once the recurrence has run through it: the gradients of the weights
// and of the input, and what is handed out of it. Every worker has a share.

template <class Cell, class V, class O>
void BackwardPass<Cell, V, O>::gather_x(int64_t worker, int round, int64_t k) {
  for (int d = first_direction(round); d < end_direction(round); ++d) {
    if (worker == 0) clear_padding_rows(d, k);
    T* to = buffers[2 * d + (k & 1)].x;
    if (to == nullptr) continue;
    over_chunk_rows(worker, chunk(d, k), [&](int64_t row, int64_t t, int64_t b) {
      const char* from = bytes(p.x.data) + row_offset(p, p.x, t, b) * storage.size;
      const auto vector = [&](int64_t j) {
        return Storage<V>::load(storage, from + j * W * storage.size, p.I - j * W);
      };
      T scale = 1;
      if constexpr (O::keeps_small) scale = scale_input(vector, buffers[2 * d + (k & 1)].x_back[row]);
      for (int64_t j = 0; j < in_blocks; ++j) put(O::keeps_small ? vector(j) * V::set(scale) : vector(j), to, j, row);
    });
  }
}

// The rows of right operands that pair the last ones, or fill up a tile, are zero; so are pairs of left ones.
template <class Cell, class V, class O>
void BackwardPass<Cell, V, O>::clear_padding_rows(int d, int64_t k) const {
  const Buffer& b = buffers[2 * d + (k & 1)];
  const int64_t rows = rows_of(chunk(d, k));
  const auto clear_rows = [&](T* piece, int64_t columns) {
    for (int64_t row = rows; piece && row < round_up(rows, O::row_multiple); ++row)
      for (int64_t j = 0; j < columns; ++j) put(V::set(0), piece, j, row);
  };
  if (twice) {
    clear_rows(b.by_rows, S * blocks);
    clear_rows(b.dh_out, out_blocks);
  }
  clear_rows(b.h_prev, out_blocks);
  clear_rows(b.x, in_blocks);
  clear_rows(b.h_raw, blocks);
}

// Calls f(sum) for every sum that the chunk in `b` contributes to; rows in words.
template <class Cell, class V, class O>
template <class F>
void BackwardPass<Cell, V, O>::over_sums(int d, const Buffer& b, int64_t rows, const F& f) const {
  using Sum = typename GradientTasks<V, O>::Sum;
  const auto& to = p.gradients[d];
  const auto at = [](void* result, int64_t values) { return result ? static_cast<T*>(result) + values : nullptr; };
  for (int g = 0; g < G; ++g)
    f(Sum{b.by_rows + (X + g) * blocks * Rl * W, p.H, Rl, b.x, p.I, Rw, rows, at(to.w_ih, g * p.H * p.I),
          at(to.b_ih, g * p.H), b.x_back});
  for (int s = 0; s < G; ++s) {
    const int g = Cell::hidden_gate[s];
    f(Sum{b.by_rows + s * blocks * Rl * W, p.H, Rl, b.h_prev, p.P, Rw, rows, at(to.w_hh, g * p.H * p.P),
          at(to.b_hh, g * p.H), b.h_back});
  }
  f(Sum{b.dh_out, p.P, Rl, b.h_raw, p.H, Rw, rows, at(to.w_hr, 0), nullptr, b.raw_back});
}

template <class Cell, class V, class O>
void BackwardPass<Cell, V, O>::reduce(int64_t worker, int round, int64_t k) {
  for (int d = first_direction(round); d < end_direction(round); ++d) {
    const Buffer& b = buffers[2 * d + (k & 1)];
    const int64_t c = chunk(d, k), rows = O::Left::row_words(rows_of(c));
    // A worker gets the tasks that begin in its part of the whole cost.
    int64_t all = 0, done = 0;
    over_sums(d, b, rows, [&](const auto& sum) { all += sum.cost(); });
    const int64_t begin = share_of(all, worker, split.workers), end = share_of(all, worker + 1, split.workers);
    over_sums(d, b, rows, [&](const auto& sum) {
      for (int64_t i = 0, n = sum.tasks(); i < n; done += sum.cost_of(i++))
        if (done >= begin && done < end) GradientTasks<V, O>::run(sum, i, k == 0, workers[worker].left);
    });
    if (p.dx.data) input_gradient(worker, d, k, c, b);
    hand_out(worker, d, c, b);
    if (p.watched && !alone()) sum_watched(worker, round, d, k);
  }
}

// This worker's share of a chunk's operands.
template <class Cell, class V, class O>
void BackwardPass<Cell, V, O>::hand_out(int64_t worker, int d, int64_t c, const Buffer& buffer) const {
  if constexpr (twice || O::tiled) return;  // single values alone are handed out
  over_operands([&](const Operand& o) {
    const int64_t per_slot = ceil_div(o.units, W);
    over_chunk_rows(worker, c, [&](int64_t row, int64_t t, int64_t b) {
      T* to = operand_row(o, d, t, b);
      for (int64_t j = 0; j < o.slots * per_slot; ++j) {
        const int64_t unit = j % per_slot * W, n = smaller(W, o.units - unit);
        V::load(buffer.*o.from + (j * o.ld + row) * W).store(to + j / per_slot * o.units + unit, int(n));
      }
    });
  });
}

// dx of this worker's share of a chunk's rows, or of its columns: dgates W_ih, added to the other direction's if that
// was here before.
template <class Cell, class V, class O>
void BackwardPass<Cell, V, O>::input_gradient(int64_t worker, int d, int64_t k, int64_t c, const Buffer& b) {
  const Worker& w = workers[worker];
  int64_t first = -1, count = 0;
  const auto take = [&](int64_t row, int64_t t, int64_t at) {
    if (first < 0) first = row;
    w.dx[count++] = dx_row(t, at);
  };
  if (by_columns)
    over_all_rows(c, take);
  else
    over_chunk_rows(worker, c, take);
  // Side by side, the directions come from both ends and meet in the middle, where direction 0 goes first.
  const bool add = p.D == 2 && (split.directions == 1 ? d == 1 : d == 0 ? c < k : chunks - 1 - c <= k);
  const T* dgates = b.dgates + (X * blocks * R + first) * Ww;
  const Storage<V> out(p.dx_is_compute && p.dtype != Dtype::f64 ? Dtype::f32 : p.dtype);
  const auto put_dx = [&](int64_t i, int64_t block, V x) {
    const int64_t column = block * W, n = p.I - column;
    char* to = w.dx[i] + column * out.size;
    if (add) x = Storage<V>::load(out, to, n) + x;
    Storage<V>::store(out, x, to, n);
  };
  if constexpr (O::tiled)
    tiled_input_gradient(w, d, count, dgates, put_dx);
  else if (by_columns)
    vector_input_gradient(w, d, first_block(w_ih[d], worker, split.workers),
                          first_block(w_ih[d], worker + 1, split.workers), count, dgates, put_dx);
  else
    vector_input_gradient(w, d, 0, in_blocks, count, dgates, put_dx);
}

template <class Cell, class V, class O>
template <class F>
void BackwardPass<Cell, V, O>::vector_input_gradient(const Worker& w, int d, int64_t begin, int64_t end, int64_t count,
                                                     const T* dgates, const F& put_dx) const {
  over_groups<Packed<V, 1>::U>(begin, end, [&](auto u, int64_t block) {
    constexpr int U = decltype(u)::value;
    const T* group = nullptr;
    if (!in_place || (block + U) * W > p.I)
      group = group_at<O>(w_ih[d], source_ih(d), storage, block, U, w.panel, static_cast<T*>(nullptr));
    over_even_rows<tile_rows<U>>(0, count, [&](auto m, int64_t i) {
      constexpr int M = decltype(m)::value;
      V sum[M][U];
      const T* left[M];
      for (int r = 0; r < M; ++r) left[r] = dgates + (i + r) * Ww;
      multiply_dgates(sum, left, group, source_ih(d), block);
      for (int r = 0; r < M; ++r)
        for (int v = 0; v < U; ++v) put_dx(i + r, block + v, sum[r][v]);
    });
  });
}
