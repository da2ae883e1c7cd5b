// The forward pass of one layer: a slice of rows runs through all steps of one direction without waiting for anyone.
//
// For a tile of steps (or of rows, when the batch is large) the input projection goes to `gates_x` by one product; then
// step by step the recurrent product of a group of hidden units is summed in registers, the cell is applied to it
// there, and the new state written. In 16-bit storage h is rounded once per step; everything else stays float.

template <class Cell, class V>
struct ForwardPass {
  using T = typename V::T;
  static constexpr int W = V::lanes, G = Cell::gates, S = Cell::slots, X = Cell::x_first;

  const Forward& p;
  const Storage<T> storage;
  const int64_t blocks = ceil_div(p.H, W), Hp = blocks * W, Pp = round_up(p.P, W), Ip = p.I;
  const bool projected = p.weights[0].w_hr != nullptr;
  const int64_t tape_width = Cell::tape * p.H + (projected ? p.P : 0);
  const bool dot = p.T == 1 && p.B <= dot_rows;  // by the whole batch, so that no cut into slices changes bits
  Packed<V, G> w_ih[2], w_hh[2];
  Packed<V, 1> w_hr[2];
  T* bias_x[2];  // [blocks][G][W], in the order of gates_x
  T* bias_h[2];  // [X][Hp], the slots that the input does not reach
  Slices slices;
  int64_t tile;  // rows of one input projection
  bool once;     // one step of few rows: every group of the weights is used once, and packed there and then
  char* work;    // one piece per slice and direction
  int64_t work_size;

  ForwardPass(const Forward& forward) : p(forward), storage(storage_of<T>(forward.dtype)) {}

  struct Work {
    T *h, *h_new, *h_raw, *c, *x, *gates_x, *panel, *scratch;
    int64_t* count;  // [tile] active rows of each step of a tile
    explicit Work(const ForwardPass& f, Carve& carve) {
      const int64_t n = f.slices.longest;
      h = carve.take<T>(n * f.Pp);
      h_new = carve.take<T>(n * f.Pp);
      h_raw = f.projected ? carve.take<T>(n * f.Hp) : h_new;
      c = carve.take<T>(Cell::has_c ? n * f.Hp : 0);
      x = carve.take<T>(f.tile * f.Ip);
      gates_x = carve.take<T>(f.tile * f.blocks * G * W);
      count = carve.take<int64_t>(f.tile);
      const int64_t deepest = f.once ? larger(f.p.I, larger(f.p.P, f.p.H)) : 0;
      panel = carve.take<T>(deepest * group_vectors * W);
      scratch = carve.take<T>(f.storage.rounds ? deepest * W : 0);
    }
  };

  void run(const Team& team) {
    const int count = slice_count(p, traits_of<Cell>(), team.size);
    plan(count, nullptr);
    char* memory = static_cast<char*>(workspace(size_t(layout_size)));
    plan(count, memory);
    pack_weights(team);
    run_team(team, int64_t(p.D) * count, [&](int64_t begin, int64_t end) {
      for (int64_t job = begin; job < end; ++job) run_slice(int(job / slices.count), int(job % slices.count));
    });
    trim_workspace();
  }

 private:
  int64_t layout_size = 0;
  T* pack_scratch = nullptr;  // [groups packed at once][W * K]
  int64_t pack_scratch_size = 0;

  // Lays the memory out; without memory, only sizes it.
  void plan(int count, char* memory) {
    Carve carve{memory};
    void* cut = carve.take<char>(int64_t(slices_size(p, count)));
    if (memory)
      slices = cut_slices(p, count, cut);
    else
      slices.count = count, slices.longest = ceil_div(p.B, count);
    // Enough rows for the projection's weights to be worth loading, few enough for its result to stay in the cache.
    constexpr int64_t few = 24, many = 96, cache = 512 * 1024;
    tile = cache / (blocks * G * W * int64_t(sizeof(T)));
    tile = tile < few ? few : tile > many ? many : tile;
    tile = smaller(tile, larger(slices.longest, 1) * larger(p.T, 1));
    once = p.T == 1 && slices.longest <= tile;
    const auto matrix = [&](int64_t values) { return once ? nullptr : carve.take<T>(values); };
    for (int d = 0; d < p.D; ++d) {
      w_ih[d] = {matrix(Packed<V, G>::count(p.I, p.H)), p.I, blocks};
      w_hh[d] = {matrix(Packed<V, G>::count(p.P, p.H)), p.P, blocks};
      if (projected) w_hr[d] = {matrix(Packed<V, 1>::count(p.H, p.P)), p.H, ceil_div(p.P, W)};
      bias_x[d] = carve.take<T>(blocks * G * W);
      bias_h[d] = carve.take<T>(X * Hp);
    }
    pack_scratch_size = once ? 0 : W * larger(p.I, larger(p.P, p.H));
    pack_scratch = carve.take<T>(pack_scratch_size * count * p.D);
    Carve one{nullptr};
    Work sized(*this, one);
    work_size = one.used;
    work = carve.take<char>(work_size * p.D * count);
    layout_size = carve.used;
  }

  Source source_ih(int d) const { return {p.weights[d].w_ih, p.I, p.H, p.H, true, {0, 1, 2, 3}}; }
  Source source_hh(int d) const {
    const int* gate = Cell::hidden_gate;
    return {p.weights[d].w_hh, p.P, p.H, p.H, true, {gate[0], gate[1], gate[2], gate[3]}};
  }
  Source source_hr(int d) const { return {p.weights[d].w_hr, p.H, p.P, p.H, true, {}}; }

  void pack_weights(const Team& team) {
    for (int d = 0; d < p.D; ++d) pack_bias(p.weights[d], bias_x[d], bias_h[d]);
    if (once) return;
    const int64_t gate_groups = group_count(w_ih[0]), hr_groups = projected ? group_count(w_hr[0]) : 0;
    const int64_t per_direction = 2 * gate_groups + hr_groups;
    const int64_t pieces = int64_t(slices.count) * p.D;  // as many as there is scratch for
    run_team(team, pieces, [&](int64_t begin, int64_t end) {
      for (int64_t piece = begin; piece < end; ++piece) {
        T* scratch = pack_scratch + piece * pack_scratch_size;
        const int64_t all = per_direction * p.D;
        for (int64_t i = all * piece / pieces; i < all * (piece + 1) / pieces; ++i) {
          const int d = int(i / per_direction);
          const int64_t g = i % per_direction;
          if (g < gate_groups)
            pack(w_ih[d], source_ih(d), storage, g, scratch);
          else if (g < 2 * gate_groups)
            pack(w_hh[d], source_hh(d), storage, g - gate_groups, scratch);
          else
            pack(w_hr[d], source_hr(d), storage, g - 2 * gate_groups, scratch);
        }
      }
    });
  }

  void pack_bias(const Weights& w, T* to_x, T* to_h) {
    zero(to_x, blocks * G * W);
    zero(to_h, X * Hp);
    if (w.b_ih == nullptr) return;
    for (int s = 0; s < S; ++s) {
      const int x_gate = s - X, h_gate = s < G ? Cell::hidden_gate[s] : -1;
      for (int64_t i = 0; i < p.H; ++i) {
        T from_x = 0, from_h = 0;
        if (x_gate >= 0) storage.widen(bytes(w.b_ih) + (x_gate * p.H + i) * storage.size, &from_x, 1);
        if (h_gate >= 0) storage.widen(bytes(w.b_hh) + (h_gate * p.H + i) * storage.size, &from_h, 1);
        if (x_gate >= 0)
          to_x[((i / W) * G + x_gate) * W + i % W] = from_x + from_h;
        else
          to_h[s * Hp + i] = from_h;
      }
    }
  }

  void run_slice(int d, int s) {
    Carve carve{work + (int64_t(d) * slices.count + s) * work_size};
    const Work w(*this, carve);
    const int64_t* order = slices.order + slices.first[s];
    const int64_t n = slices.first[s + 1] - slices.first[s];
    if (n == 0) return;

    load_state(p, storage, p.h0, d, order, n, p.P, Pp, w.h);
    if (Cell::has_c) load_state(p, storage, p.c0, d, order, n, p.H, Hp, w.c);

    Active active(p, order, n);
    const int64_t steps = n >= tile ? 1 : tile / n;  // steps per tile
    for (int64_t begin = 0; begin < p.T; begin += steps) {
      const int64_t end = smaller(begin + steps, p.T);
      int64_t rows = 0;
      for (int64_t q = begin; q < end; ++q) {
        const int64_t t = d ? p.T - 1 - q : q;
        w.count[q - begin] = active.at(t);
        if (n < tile) rows = gather_x(w, order, t, 0, w.count[q - begin], rows);
      }
      project_input(w, d, rows);
      T* gates_x = w.gates_x;
      for (int64_t q = begin; q < end; ++q) {
        const int64_t t = d ? p.T - 1 - q : q, now = w.count[q - begin];
        cut_states(w, d, t, order, now);
        if (n < tile) {
          step(w, d, t, order, 0, now, gates_x);
          gates_x += now * blocks * G * W;
        } else {
          for (int64_t i = 0; i < now; i += tile) {
            const int64_t next = smaller(i + tile, now);
            project_input(w, d, gather_x(w, order, t, i, next, 0));
            step(w, d, t, order, i, next, w.gates_x);
          }
        }
        publish(w, d, t, order, now, n);
      }
    }

    for (int64_t i = 0; i < n; ++i) {
      storage.narrow(w.h + i * Pp, bytes(p.h_n) + (d * p.B + order[i]) * p.P * storage.size, p.P);
      if (Cell::has_c) storage.narrow(w.c + i * Hp, bytes(p.c_n) + (d * p.B + order[i]) * p.H * storage.size, p.H);
    }
  }

  // Copies input rows [begin, end) of step t behind the `rows` already there; returns how many there are now.
  int64_t gather_x(const Work& w, const int64_t* order, int64_t t, int64_t begin, int64_t end, int64_t rows) {
    for (int64_t i = begin; i < end; ++i)
      storage.widen(bytes(p.x.data) + row_offset(p, p.x, t, order[i]) * storage.size, w.x + (rows++) * Ip, p.I);
    return rows;
  }

  // gates_x[row] = bias + x[row] W_ih, unit block by unit block, the gates of a block side by side.
  void project_input(const Work& w, int d, int64_t rows) {
    const int64_t ld = blocks * G * W;
    over_groups<Packed<V, G>::U, G>(0, blocks, [&](auto u, int64_t block) {
      constexpr int N = decltype(u)::value * G;
      const T* bias = bias_x[d] + block * G * W;
      const Source source = source_ih(d);
      const T* group = dot ? nullptr : group_at(w_ih[d], source, storage, block, N / G, w.panel, w.scratch);
      over_rows<tile_rows>(0, rows, [&](auto m, int64_t i) {
        constexpr int M = decltype(m)::value;
        V sum[M][N];
        if (dot)
          dot_group<G>(sum, w.x + i * Ip, Ip, source, storage, p.I, block, w.scratch);
        else
          product(sum, w.x + i * Ip, Ip, group, p.I);
        for (int r = 0; r < M; ++r)
          for (int v = 0; v < N; ++v)
            (sum[r][v] + V::load(bias + v * W)).store(w.gates_x + (i + r) * ld + block * G * W + v * W);
      });
    });
  }

  void cut_states(const Work& w, int d, int64_t t, const int64_t* order, int64_t n) {
    if (p.reset == nullptr) return;
    for (int64_t i = 0; i < n; ++i)
      if (is_cut(p, d, t, order[i])) {
        // The forward directions' hx and every later state: what enters this step is zero.
        zero(w.h + i * Pp, Pp);
        if (Cell::has_c) zero(w.c + i * Hp, Hp);
      }
  }

  // One time step of rows [begin, end): the new states go to h_new (h_raw before a projection) and, in place, to c.
  void step(const Work& w, int d, int64_t t, const int64_t* order, int64_t begin, int64_t end, const T* gates_x) {
    const int64_t ld_h = projected ? Hp : Pp;
    over_groups<Packed<V, G>::U, G>(0, blocks, [&](auto u, int64_t block) {
      constexpr int U = decltype(u)::value;
      const Source source = source_hh(d);
      const T* group = dot ? nullptr : group_at(w_hh[d], source, storage, block, U, w.panel, w.scratch);
      over_rows<tile_rows>(begin, end, [&](auto m, int64_t i) {
        constexpr int M = decltype(m)::value;
        V sum[M][U * G];
        if (dot)
          dot_group<G>(sum, w.h + i * Pp, Pp, source, storage, p.P, block, w.scratch);
        else
          product(sum, w.h + i * Pp, Pp, group, p.P);
        for (int r = 0; r < M; ++r)
          for (int b = 0; b < U; ++b) {
            const int64_t unit = (block + b) * W, row = i + r;
            const T* x = gates_x + (row - begin) * blocks * G * W + (block + b) * G * W;
            V a[S], tape[Cell::tape], c = V::set(0);
            for (int s = 0; s < S; ++s) {
              if (s < X)
                a[s] = sum[r][b * G + s] + V::load(bias_h[d] + s * Hp + unit);
              else if (s < G)
                a[s] = sum[r][b * G + s] + V::load(x + (s - X) * W);
              else
                a[s] = V::load(x + (s - X) * W);
            }
            V h = V::load(w.h + row * Pp + (projected ? 0 : unit));  // RNN and LSTM do not read it
            if (Cell::has_c) c = V::load(w.c + row * Hp + unit);
            Cell::forward(a, h, c, tape);
            h.store(w.h_raw + row * ld_h + unit);
            if (Cell::has_c) c.store(w.c + row * Hp + unit);
            if (p.tape) save(tape, static_cast<T*>(p.tape) + tape_row(d, t, order[row]) + unit, unit);
          }
      });
    });
    if (projected) project_state(w, d, begin, end);
  }

  int64_t tape_row(int d, int64_t t, int64_t b) const {
    return (d * stored_rows(p) + stored_row(p, t, b)) * tape_width;
  }

  void save(const V* tape, T* to, int64_t unit) {
    const int64_t n = p.H - unit;
    for (int k = 0; k < Cell::tape; ++k) {
      if (n >= W)
        tape[k].store(to + k * p.H);
      else
        tape[k].store(to + k * p.H, int(n));
    }
  }

  void project_state(const Work& w, int d, int64_t begin, int64_t end) {
    over_groups<Packed<V, 1>::U, 1>(0, w_hr[d].blocks, [&](auto u, int64_t block) {
      constexpr int N = decltype(u)::value;
      const Source source = source_hr(d);
      const T* group = dot ? nullptr : group_at(w_hr[d], source, storage, block, N, w.panel, w.scratch);
      over_rows<tile_rows>(begin, end, [&](auto m, int64_t i) {
        constexpr int M = decltype(m)::value;
        V sum[M][N];
        if (dot)
          dot_group<1>(sum, w.h_raw + i * Hp, Hp, source, storage, p.H, block, w.scratch);
        else
          product(sum, w.h_raw + i * Hp, Hp, group, p.H);
        for (int r = 0; r < M; ++r)
          for (int v = 0; v < N; ++v) sum[r][v].store(w.h_new + (i + r) * Pp + (block + v) * W);
      });
    });
  }

  // Writes step t to the caller's tensors and makes the new state the current one, rounded as it was stored.
  void publish(const Work& w, int d, int64_t t, const int64_t* order, int64_t now, int64_t n) {
    const int64_t size = storage.size;
    for (int64_t i = 0; i < now; ++i) {
      const int64_t b = order[i];
      char* y = bytes(p.y.data) + (row_offset(p, p.y, t, b) + d * p.P) * size;
      T* h = w.h + i * Pp;
      storage.narrow(w.h_new + i * Pp, y, p.P);
      storage.widen(y, h, p.P);
      const int64_t padded_row = (d * p.T + t) * p.B + b;
      if (p.h_all) storage.narrow(h, bytes(p.h_all) + padded_row * p.P * size, p.P);
      if (p.c_all) storage.narrow(w.c + i * Hp, bytes(p.c_all) + padded_row * p.H * size, p.H);
      if (p.tape && (projected || storage.rounds)) {
        // Backward must see h as the next step saw it.
        T* tape = static_cast<T*>(p.tape) + tape_row(d, t, b);
        if (projected)
          store_values(h, tape + Cell::tape * p.H, p.P);
        else if (!Cell::has_c)
          store_values(h, tape + (Cell::tape - 1) * p.H, p.H);
      }
    }
    for (int64_t i = now; i < n; ++i) {  // past the row's length
      const int64_t b = order[i], padded_row = (d * p.T + t) * p.B + b;
      if (p.first_row == nullptr)
        __builtin_memset(bytes(p.y.data) + (row_offset(p, p.y, t, b) + d * p.P) * size, 0, size_t(p.P * size));
      if (p.h_all) __builtin_memset(bytes(p.h_all) + padded_row * p.P * size, 0, size_t(p.P * size));
      if (p.c_all) __builtin_memset(bytes(p.c_all) + padded_row * p.H * size, 0, size_t(p.H * size));
    }
  }
};
