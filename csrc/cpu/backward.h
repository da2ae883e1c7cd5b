// Back-propagation through time for one layer: a slice of rows runs through all steps of one direction in reverse
// order, carrying dh and dc; then dx for all stored rows at once. The weight gradients are sums over all steps
// (row_sums.h): this pass leaves their operands (Backward::dgates, h_prev, dh_out, h_raw).
//
// Per step: dh += dy; through the projection, if any; through the cell, which gives the gradient of its
// pre-activations; and dh = what bypasses the recurrent product + dgates W_hh. States are read back from the tape; the
// LSTM's h is o tanh(c) again. Where a reset cut the state, the carries become zero.

template <class Cell, class V>
struct BackwardPass {
  using T = typename V::T;
  static constexpr int W = V::lanes, G = Cell::gates, S = Cell::slots, X = Cell::x_first;
  // The tape's last block holds c for the LSTM, h for the others.
  static constexpr int state_block = Cell::tape - 1;

  const Backward& p;
  const Storage<T> storage;
  const int64_t blocks = ceil_div(p.H, W), Hp = blocks * W, Pp = round_up(p.P, W);
  const bool projected = p.weights[0].w_hr != nullptr;
  const int64_t tape_width = Cell::tape * p.H + (projected ? p.P : 0);
  const int64_t N = stored_rows(p);
  Packed<V, 1> w_hh[2];  // [G*H, P] for the dh chain
  Packed<V, 1> w_ih[2];  // [G*H, I] for dx
  Packed<V, 1> w_hr[2];  // [P, H]
  T* none;               // [larger(Hp, Pp)] zeros: the state before the first step, or after a cut
  bool once;             // one step of few rows: every group of the weights is used once, and packed there and then
  Slices slices;
  char* work;
  int64_t work_size;

  BackwardPass(const Backward& backward) : p(backward), storage(storage_of<T>(backward.dtype)) {}

  static constexpr int64_t dx_rows = 48;  // rows of dx per piece of work

  struct Work {
    T *dh, *dh_cell, *dc, *dgates, *h0, *c0, *row, *panel;
    const T **h_prev, **c_prev;
    explicit Work(const BackwardPass& f, Carve& carve) {
      const int64_t n = f.slices.longest;
      dh = carve.take<T>(n * f.Pp);
      dh_cell = f.projected ? carve.take<T>(n * f.Hp) : dh;
      dc = carve.take<T>(Cell::has_c ? n * f.Hp : 0);
      dgates = carve.take<T>(n * S * f.p.H);
      h0 = carve.take<T>(n * f.Pp);
      c0 = carve.take<T>(Cell::has_c ? n * f.Hp : 0);
      row = carve.take<T>(larger(f.Hp, f.Pp));
      panel = carve.take<T>(f.panel_size);
      h_prev = carve.take<const T*>(n);
      c_prev = carve.take<const T*>(n);
    }
  };

  void run(const Team& team) {
    const int count = slice_count(p, traits_of<Cell>(), team.size);
    const int64_t dx_pieces = p.dx.data ? ceil_div(N, dx_rows) : 0;
    plan(count, team.size, nullptr);
    char* memory = static_cast<char*>(workspace(size_t(layout_size)));
    plan(count, team.size, memory);
    zero(none, larger(Hp, Pp));
    Team used = team;
    if (int64_t(p.D) * count == 1) used.size = 1;  // too little work to share
    pack_weights(used);
    run_team(used, int64_t(p.D) * count, [&](int64_t begin, int64_t end) {
      for (int64_t job = begin; job < end; ++job) run_slice(int(job / slices.count), int(job % slices.count));
    });
    const int64_t shares = smaller(used.size, dx_pieces);
    run_team(used, shares, [&](int64_t begin, int64_t end) {
      for (int64_t share = begin; share < end; ++share)
        for (int64_t piece = dx_pieces * share / shares; piece < dx_pieces * (share + 1) / shares; ++piece)
          input_gradient(piece * dx_rows, smaller((piece + 1) * dx_rows, N), dx_work + share * dx_rows * Ip,
                         dx_panel + share * panel_size);
    });
    trim_workspace();
  }

 private:
  const int64_t Ip = round_up(p.I, W);
  int64_t layout_size = 0;
  T* dx_work = nullptr;   // [team][dx_rows][Ip]
  T* dx_panel = nullptr;  // [team][panel_size]
  int64_t panel_size = 0;

  void plan(int count, int team_size, char* memory) {
    Carve carve{memory};
    void* cut = carve.take<char>(int64_t(slices_size(p, count)));
    if (memory)
      slices = cut_slices(p, count, cut);
    else
      slices.count = count, slices.longest = ceil_div(p.B, count);
    const int64_t K = G * p.H;
    once = p.T == 1 && N <= dx_rows;
    panel_size = once ? K * group_vectors * W : 0;
    const auto matrix = [&](int64_t values) { return once ? nullptr : carve.take<T>(values); };
    for (int d = 0; d < p.D; ++d) {
      w_hh[d] = {matrix(Packed<V, 1>::count(K, p.P)), K, ceil_div(p.P, W)};
      if (p.dx.data) w_ih[d] = {matrix(Packed<V, 1>::count(K, p.I)), K, ceil_div(p.I, W)};
      if (projected) w_hr[d] = {matrix(Packed<V, 1>::count(p.P, p.H)), p.P, ceil_div(p.H, W)};
    }
    dx_panel = carve.take<T>(p.dx.data ? larger(team_size, 1) * panel_size : 0);
    none = carve.take<T>(larger(Hp, Pp));
    dx_work = carve.take<T>(p.dx.data ? larger(team_size, 1) * dx_rows * Ip : 0);
    Carve one{nullptr};
    Work sized(*this, one);
    work_size = one.used;
    work = carve.take<char>(work_size * p.D * count);
    layout_size = carve.used;
  }

  Source source_hh(int d) const {
    const int* gate = Cell::hidden_gate;
    return {p.weights[d].w_hh, p.P, p.P, p.H, false, {gate[0], gate[1], gate[2], gate[3]}};
  }
  Source source_ih(int d) const { return {p.weights[d].w_ih, p.I, p.I, p.H, false, {0, 1, 2, 3}}; }
  Source source_hr(int d) const { return {p.weights[d].w_hr, p.H, p.H, p.P, false, {0, 0, 0, 0}}; }

  void pack_weights(const Team& team) {
    if (once) return;
    const int64_t hh = group_count(w_hh[0]);
    const int64_t ih = p.dx.data ? group_count(w_ih[0]) : 0;
    const int64_t hr = projected ? group_count(w_hr[0]) : 0;
    const int64_t all = (hh + ih + hr) * p.D;
    T* const unused = nullptr;
    run_team(team, all, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int d = int(i / (hh + ih + hr));
        const int64_t g = i % (hh + ih + hr);
        if (g < hh)
          pack(w_hh[d], source_hh(d), storage, g, unused);
        else if (g < hh + ih)
          pack(w_ih[d], source_ih(d), storage, g - hh, unused);
        else
          pack(w_hr[d], source_hr(d), storage, g - hh - ih, unused);
      }
    });
  }

  const T* tape_row(int d, int64_t t, int64_t b) const {
    return static_cast<const T*>(p.tape) + (d * N + stored_row(p, t, b)) * tape_width;
  }
  // Row (t, b) of a [D, N, width] operand.
  T* operand(void* data, int d, int64_t t, int64_t b, int64_t width) const {
    return static_cast<T*>(data) + (d * N + stored_row(p, t, b)) * width;
  }

  void run_slice(int d, int s) {
    Carve carve{work + (int64_t(d) * slices.count + s) * work_size};
    const Work w(*this, carve);
    const int64_t* order = slices.order + slices.first[s];
    const int64_t n = slices.first[s + 1] - slices.first[s];
    if (n == 0) return;

    load_state(p, storage, p.dh_n, d, order, n, p.P, Pp, w.dh);
    load_state(p, storage, p.h0, d, order, n, p.P, Pp, w.h0);
    if (Cell::has_c) {
      load_state(p, storage, p.dc_n, d, order, n, p.H, Hp, w.dc);
      load_state(p, storage, p.c0, d, order, n, p.H, Hp, w.c0);
    }
    Active active(p, order, n);
    for (int64_t q = 0; q < p.T; ++q) {
      const int64_t t = d ? q : p.T - 1 - q;
      const int64_t now = active.at(t);
      add_output_gradient(w, d, t, order, now);
      find_previous(w, d, t, order, now);
      if (projected) project_gradient(w, d, now);
      for (int64_t i = 0; i < now; ++i) cell_gradient(w, d, t, order, i);
      if (q + 1 < p.T || p.dh0) carry(w, d, now);
      cut(w, d, t, order, now);
      clear_inactive(d, t, order, now, n);
    }
    for (int64_t i = 0; i < n; ++i) {
      if (p.dh0) storage.narrow(w.dh + i * Pp, bytes(p.dh0) + (d * p.B + order[i]) * p.P * storage.size, p.P);
      if (Cell::has_c && p.dc0)
        storage.narrow(w.dc + i * Hp, bytes(p.dc0) + (d * p.B + order[i]) * p.H * storage.size, p.H);
    }
  }

  // to[0, n) += from[0, n), through the padded scratch row.
  void add(const Work& w, const char* from, T* to, int64_t n) {
    storage.widen(from, w.row, n);
    for (int64_t j = 0; j < n; j += W) (V::load(to + j) + V::load(w.row + j)).store(to + j);
  }

  void add_output_gradient(const Work& w, int d, int64_t t, const int64_t* order, int64_t now) {
    zero(w.row, larger(Hp, Pp));
    for (int64_t i = 0; i < now; ++i) {
      const int64_t b = order[i], padded_row = (d * p.T + t) * p.B + b;
      if (p.dy.data)
        add(w, bytes(p.dy.data) + (row_offset(p, p.dy, t, b) + d * p.P) * storage.size, w.dh + i * Pp, p.P);
      if (p.dh_all) add(w, bytes(p.dh_all) + padded_row * p.P * storage.size, w.dh + i * Pp, p.P);
    }
    if (p.dc_all == nullptr) return;
    zero(w.row, larger(Hp, Pp));
    for (int64_t i = 0; i < now; ++i)
      add(w, bytes(p.dc_all) + ((d * p.T + t) * p.B + order[i]) * p.H * storage.size, w.dc + i * Hp, p.H);
  }

  // The states that entered step t: from the tape of the step before, from hx, or zero after a cut.
  void find_previous(const Work& w, int d, int64_t t, const int64_t* order, int64_t now) {
    for (int64_t i = 0; i < now; ++i) {
      const int64_t b = order[i], before = d ? t + 1 : t - 1;
      const bool zeroed = is_cut(p, d, t, b);
      const bool first = d ? before == length_of(p, b) : before < 0;
      const T* tape = zeroed || first ? nullptr : tape_row(d, before, b);
      if (Cell::has_c) w.c_prev[i] = zeroed ? none : first ? w.c0 + i * Hp : tape + state_block * p.H;
      const bool recomputed = Cell::has_c && !projected;  // h is not on the tape
      w.h_prev[i] = zeroed       ? none
                    : first      ? w.h0 + i * Pp
                    : projected  ? tape + Cell::tape * p.H
                    : recomputed ? nullptr
                                 : tape + state_block * p.H;
      if (p.h_prev == nullptr) continue;
      T* to = operand(p.h_prev, d, t, b, p.P);
      if (w.h_prev[i])
        store_values(w.h_prev[i], to, p.P);
      else
        recompute_h(w, tape, to);
    }
  }

  // h of an LSTM step from its tape, rounded as it was stored.
  void recompute_h(const Work& w, const T* tape, T* to) {
    if constexpr (Cell::has_c) {
      for (int64_t j = 0; j < p.H; j += W) {
        const int n = int(smaller(W, p.H - j));
        const V h = load(tape + Cell::O * p.H + j, n) * tanh(load(tape + Cell::C * p.H + j, n));
        store(h, to + j, n);
      }
      if (storage.rounds) {
        storage.narrow(to, w.row, p.H);
        storage.widen(w.row, to, p.H);
        zero(w.row, larger(Hp, Pp));
      }
    }
  }

  FASTRNN_INLINE V load(const T* from, int n) { return n == W ? V::load(from) : V::load(from, n); }
  FASTRNN_INLINE void store(V x, T* to, int n) {
    if (n == W)
      x.store(to);
    else
      x.store(to, n);
  }

  // dh_cell = dh W_hr.
  void project_gradient(const Work& w, int d, int64_t now) {
    over_groups<Packed<V, 1>::U, 1>(0, w_hr[d].blocks, [&](auto u, int64_t block) {
      constexpr int U = decltype(u)::value;
      const T* group = group_at(w_hr[d], source_hr(d), storage, block, U, w.panel, static_cast<T*>(nullptr));
      over_rows<tile_rows>(0, now, [&](auto m, int64_t i) {
        constexpr int M = decltype(m)::value;
        V sum[M][U];
        product(sum, w.dh + i * Pp, Pp, group, p.P);
        for (int r = 0; r < M; ++r)
          for (int v = 0; v < U; ++v) sum[r][v].store(w.dh_cell + (i + r) * Hp + (block + v) * W);
      });
    });
  }

  void cell_gradient(const Work& w, int d, int64_t t, const int64_t* order, int64_t i) {
    const int64_t b = order[i], ld = projected ? Hp : Pp;
    const T* tape_at = tape_row(d, t, b);
    T* dgates = operand(p.dgates, d, t, b, S * p.H);
    if (projected && p.dh_out) store_values(w.dh + i * Pp, operand(p.dh_out, d, t, b, p.P), p.P);
    T* h_raw = projected && p.h_raw ? operand(p.h_raw, d, t, b, p.H) : nullptr;
    for (int64_t j = 0; j < p.H; j += W) {
      const int n = int(smaller(W, p.H - j));
      V tape[Cell::tape], da[S], h_prev = V::set(0), c_prev = V::set(0), dc = V::set(0);
      for (int k = 0; k < Cell::tape; ++k) tape[k] = load(tape_at + k * p.H + j, n);
      if constexpr (Cell::has_c) {
        c_prev = load(w.c_prev[i] + j, n);
        dc = V::load(w.dc + i * Hp + j);
        if (h_raw) store(tape[Cell::O] * tanh(tape[Cell::C]), h_raw + j, n);
      } else {
        h_prev = load(w.h_prev[i] + j, n);
      }
      V dh = V::load(w.dh_cell + i * ld + j);
      Cell::backward(tape, h_prev, c_prev, dh, dc, da);
      dh.store(w.dh_cell + i * ld + j);
      if (Cell::has_c) dc.store(w.dc + i * Hp + j);
      for (int s = 0; s < S; ++s) {
        store(da[s], dgates + s * p.H + j, n);
        store(da[s], w.dgates + i * S * p.H + s * p.H + j, n);
      }
    }
  }

  // dh = the part that bypassed the recurrent product + dgates W_hh.
  void carry(const Work& w, int d, int64_t now) {
    over_groups<Packed<V, 1>::U, 1>(0, w_hh[d].blocks, [&](auto u, int64_t block) {
      constexpr int U = decltype(u)::value;
      const T* group = group_at(w_hh[d], source_hh(d), storage, block, U, w.panel, static_cast<T*>(nullptr));
      over_rows<tile_rows>(0, now, [&](auto m, int64_t i) {
        constexpr int M = decltype(m)::value;
        V sum[M][U];
        product(sum, w.dgates + i * S * p.H, S * p.H, group, G * p.H);
        for (int r = 0; r < M; ++r)
          for (int v = 0; v < U; ++v) {
            T* dh = w.dh + (i + r) * Pp + (block + v) * W;
            (projected ? sum[r][v] : sum[r][v] + V::load(dh)).store(dh);
          }
      });
    });
  }

  void cut(const Work& w, int d, int64_t t, const int64_t* order, int64_t now) {
    if (p.reset == nullptr) return;
    for (int64_t i = 0; i < now; ++i)
      if (is_cut(p, d, t, order[i])) {
        zero(w.dh + i * Pp, Pp);
        if (Cell::has_c) zero(w.dc + i * Hp, Hp);
      }
  }

  // Operand rows past a row's length are zero, so that the products over all rows may include them.
  void clear_inactive(int d, int64_t t, const int64_t* order, int64_t now, int64_t n) {
    if (p.first_row) return;
    for (int64_t i = now; i < n; ++i) {
      const int64_t b = order[i];
      zero(operand(p.dgates, d, t, b, S * p.H), S * p.H);
      if (p.h_prev) zero(operand(p.h_prev, d, t, b, p.P), p.P);
      if (p.dh_out) zero(operand(p.dh_out, d, t, b, p.P), p.P);
      if (p.h_raw) zero(operand(p.h_raw, d, t, b, p.H), p.H);
    }
  }

  // dx of stored rows [begin, end): the sum over the directions, forward first, of dgates W_ih.
  void input_gradient(int64_t begin, int64_t end, T* out, T* panel) {
    for (int d = 0; d < p.D; ++d) {
      const T* dgates = static_cast<const T*>(p.dgates) + (d * N + begin) * S * p.H + X * p.H;
      over_groups<Packed<V, 1>::U, 1>(0, w_ih[d].blocks, [&](auto u, int64_t block) {
        constexpr int U = decltype(u)::value;
        const T* group = group_at(w_ih[d], source_ih(d), storage, block, U, panel, static_cast<T*>(nullptr));
        over_rows<tile_rows>(0, end - begin, [&](auto m, int64_t i) {
          constexpr int M = decltype(m)::value;
          V sum[M][U];
          product(sum, dgates + i * S * p.H, S * p.H, group, G * p.H);
          for (int r = 0; r < M; ++r)
            for (int v = 0; v < U; ++v) {
              T* to = out + (i + r) * Ip + (block + v) * W;
              (d == 0 ? sum[r][v] : V::load(to) + sum[r][v]).store(to);
            }
        });
      });
    }
    int64_t t = 0;
    for (int64_t row = begin; row < end; ++row) {
      int64_t b;
      if (p.first_row) {
        while (p.first_row[t + 1] <= row) ++t;
        b = row - p.first_row[t];
      } else {
        t = row / p.B;
        b = row % p.B;
      }
      T* from = out + (row - begin) * Ip;
      if (p.first_row == nullptr && t >= length_of(p, b)) zero(from, p.I);  // exactly zero, whatever the weights hold
      storage.narrow(from, bytes(p.dx.data) + row_offset(p, p.dx, t, b) * storage.size, p.I);
    }
  }
};
