// Where a backward pass keeps what, and the packing of its weights.

// The packed weights, but those that are packed as they are used.
template <class Cell, class V, class O>
void BackwardPass<Cell, V, O>::take_weights(Carve& carve) {
  const auto matrix = [&](bool is_kept, int64_t values) { return is_kept ? carve.take<T>(values) : nullptr; };
  const int64_t K = G * Hw;
  for (int d = 0; d < p.D; ++d) {
    w_hh[d] = {matrix(!once, Packed<V, 1>::count(K, p.P)), K, out_blocks};
    w_ih[d] = {matrix(p.dx.data && !once && !by_columns, Packed<V, 1>::count(K, p.I)), K, in_blocks};
    w_hr[d] = {matrix(projected && !once, Packed<V, 1>::count(p.P, p.H)), p.P, blocks};
  }
}

// This worker's share of the weights.
template <class Cell, class V, class O>
void BackwardPass<Cell, V, O>::pack(int64_t worker) const {
  const Place place(split, worker);
  T* const unused = nullptr;  // scratch is for sources that are transposed
  for (int d = 0; d < p.D; ++d) {
    if (w_ih[d].data) {
      const int64_t groups = group_count(w_ih[d]);
      pack_groups<O>(w_ih[d], source_ih(d), storage, share_of(groups, worker, split.workers),
                     share_of(groups, worker + 1, split.workers), unused);
    }
    if (once || place.idle || (split.directions == 2 && d != place.direction)) continue;
    pack_share<O>(w_hh[d], source_hh(d), storage, split, place, unused);
    if (projected) pack_share<Singles<V>>(w_hr[d], source_hr(d), storage, split, place, unused);
  }
}

template <class Cell, class V, class O>
void BackwardPass<Cell, V, O>::lay_out(char* memory) {
  Carve carve{memory};
  longest = ceil_div(end_rank - first_rank, split.slices);
  chunk_begin = carve.take<int64_t>(p.T + 1);
  chunk_row = carve.take<int64_t>(p.T + 1);
  const auto begin_chunk = [&](int64_t t, int64_t row) {
    if (!memory) return;
    chunk_begin[chunks] = t;
    chunk_row[chunks] = row;
  };
  chunks = 0;
  R = most_steps = 0;
  int64_t rows_before_chunk = 0;
  for (int64_t begin = 0, rows = 0, t = 0; t < p.T; ++t) {  // whole steps, as many as fit, at least one
    if (t == begin) begin_chunk(begin, rows_before_chunk);
    rows += active(t);
    if (t + 1 < p.T && rows + active(t + 1) <= chunk_rows) continue;
    R = larger(R, rows);
    most_steps = larger(most_steps, t + 1 - begin);
    rows_before_chunk += rows;
    begin = t + 1;
    rows = 0;
    ++chunks;
  }
  begin_chunk(p.T, rows_before_chunk);
  R += R % 2 == 0;  // or all blocks would fall into the same few sets of the cache
  Rl = O::Left::row_words(R);
  Rl += Rl % 2 == 0;
  Rw = O::row_words(R);
  Rw += !O::tiled && Rw % 2 == 0;
  const int64_t K = G * Hw;
  in_place = p.T == 1 && N <= few_rows && !storage.rounds && !twice && !O::tiled;
  const bool few = !O::tiled && !weights_from && chunks == 1 && rows_before_chunk <= chunk_rows;
  by_columns = few && ceil_div(in_blocks, Packed<V, 1>::U) >= split.workers;
  once = in_place || (few && p.T == 1 && split.slices == 1 && (by_columns || !p.dx.data));
  if (weights_from == nullptr) take_weights(carve);
  for (int d = 0; weights_from && d < p.D; ++d) {
    w_hh[d] = weights_from->w_hh[d];
    w_ih[d] = weights_from->w_ih[d];
    w_hr[d] = weights_from->w_hr[d];
  }
  none = carve.take<T>(larger(Hp, Pp));
  if (memory) zero(none, larger(Hp, Pp));
  buffers = carve.take<Buffer>(2 * p.D);
  for (int i = 0; i < 2 * p.D; ++i) {
    const auto& wanted = p.gradients[i / 2];
    const bool used = i % 2 == 0 || chunks > 1;
    const auto piece = [&](bool is_wanted, int64_t columns, int64_t rows) {
      return is_wanted && used ? carve.take<T>(columns * rows * W) : nullptr;
    };
    Buffer b;
    b.dgates = used ? carve.take<T>(S * blocks * R * Ww) : nullptr;
    b.by_rows = twice ? piece(wanted.w_ih || wanted.w_hh || wanted.b_ih || wanted.b_hh, S * blocks, Rl) : b.dgates;
    b.h_prev = piece(wanted.w_hh || p.operands.h_prev, out_blocks, Rw);
    b.x = piece(wanted.w_ih, in_blocks, Rw);
    const auto undoing = [&](bool is_wanted) {
      return O::keeps_small && is_wanted && used ? carve.take<T>(R) : nullptr;
    };
    b.x_back = undoing(wanted.w_ih);
    b.h_back = undoing(wanted.w_hh);
    b.raw_back = undoing(wanted.w_hr);
    b.dh_out = piece(wanted.w_hr || p.operands.dh_out, out_blocks, Rl);
    b.h_raw = piece(wanted.w_hr || p.operands.h_raw, blocks, Rw);
    if (memory) buffers[i] = b;
  }
  carve.gap();
  barriers = carve.take<Barrier>(1 + split.directions * split.slices);
  if (memory) zero(barriers, 1 + split.directions * split.slices);
  states = carve.take<State>(int64_t(split.slices) * p.D);
  for (int i = 0; i < split.slices * p.D; ++i) {
    State s;
    carve.gap();
    s.dh = carve.take<T>(projected ? longest * Pp : 0);
    s.bypass = carve.take<T>(Cell::bypass ? longest * Hp : 0);
    s.dc = carve.take<T>(Cell::has_c ? longest * Hp : 0);
    s.dh_n = carve.take<T>(longest * Pp);
    s.h0 = carve.take<T>(longest * Pp);
    s.c0 = carve.take<T>(Cell::has_c ? longest * Hp : 0);
    const auto piece = [&](bool wanted, int64_t width) { return wanted ? carve.take<T>(longest * width) : nullptr; };
    s.h_reset = piece(p.h_reset, Pp);
    s.c_reset = piece(p.c_reset, Hp);
    s.dh_reset = piece(p.dh_reset, Pp);
    s.dc_reset = piece(p.dc_reset, Hp);
    for (T*& words : s.chain) words = carve.take<T>(O::tiled ? (longest + O::row_beyond) * chain_w : 0);
    for (T*& peaks : s.peaks) peaks = piece(O::keeps_small, split.parts * W);
    if (memory) states[i] = s;
  }
  workers = carve.take<Worker>(split.workers);
  for (int i = 0; i < split.workers; ++i) {
    const Place place(split, i);
    carve.gap();
    Worker w{Slice(p, split.slices, place.slice, first_rank, end_rank)};
    w.part = place.part;
    w.idle = place.idle;
    w.first_out = first_block(w_hh[0], place.part, split.parts);
    w.last_out = first_block(w_hh[0], place.part + 1, split.parts);
    w.first = projected ? first_block(w_hr[0], place.part, split.parts) : w.first_out;
    w.last = projected ? first_block(w_hr[0], place.part + 1, split.parts) : w.last_out;
    w.rows = carve.take<Row>(longest);
    w.dx = carve.take<char*>(p.dx.data ? R : 0);
    w.panel = carve.take<T>(once || by_columns ? larger(K, p.P) * group_vectors * W : 0);
    if (O::tiled) {
      w.loose = carve.take<T>(loose_w);
      const int64_t of_step = O::keeps_small ? longest + O::row_beyond : 0;
      w.split = carve.take<T>(larger(of_step, p.dx.data ? 2 * O::row_beyond : 0) * chain_w);
      w.left = carve.take<T>(O::words(R) * W);
      w.back = carve.take<T>(longest);
    }
    if (p.watched) {
      w.watch = carve.take<Watch<Cell, V>>(1);
      w.watched = carve.take<double>(2 * p.D * most_steps * Watch<Cell, V>::columns);
      if (memory) w.watch->clear();
    }
    if (!memory) continue;
    w.states = states + place.slice * p.D;
    workers[i] = w;
  }
  layout_size = carve.used;
}
