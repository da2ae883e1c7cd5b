// The forward pass of one layer.
//
// For a tile of steps (or of rows, when the batch is large) the input projection goes to `gates_x` by one product; then
// step by step the recurrent product of a group of hidden units is summed in registers, the cell is applied to it
// there, and the new state goes from there to wherever it is wanted. A slice of rows runs through all steps without
// waiting for the others; the parts of the hidden units of a slice meet after each step. The state is double-buffered,
// so a step needs no second barrier. Where a thread is left over (Split::ahead), it projects one tile while the other
// goes through the steps of the tile before. In 16-bit storage h is rounded once per step; everything else stays float.
// Few units in many rows go another way: forward_lanes.h.

// O says what the products of the input and of the state with the weights multiply (operand.h); a projection multiplies
// single values.
template <class Cell, class V, class O = Singles<V>>
struct ForwardPass {
  using T = typename V::T;
  static constexpr int W = V::lanes, G = Cell::gates, S = Cell::slots, X = Cell::x_first;

  const Forward& p;
  const Storage<V> storage{p.dtype}, state_storage{p.state};
  const int64_t blocks = ceil_div(p.H, W), Hp = blocks * W, Pp = round_up(p.P, W), N = stored_rows(p);
  // A folded input is multiplied value by value, whatever O is. Words of a column of weights, and of a row.
  using Folded = typename O::Left;
  const bool folds_values = O::tiled && p.I <= folded_input;
  const int64_t Iw = folds_values ? p.I : O::words(p.I), Pw = O::words(p.P);
  const int64_t row_x = folds_values ? Iw : O::stride(Iw), row_w = O::stride(O::words(Pp));
  const int64_t tape_h = padded_to_tape_block(p.H);
  const bool projected = p.projected, prepacked = p.weights[0].packed != nullptr;
  static constexpr bool paired = O::words(2) != 2;
  const bool as_words = !storage.rounds && !paired;  // every row is stored as the products read it
  const bool keeps_h = (Cell::reads_h && !O::exact(storage)) || O::keeps_small;
  const int64_t own_w = O::tiled ? round_up(larger(Hp, Pp), 2 * W) : Hp;
  const int64_t tape_row = tape_width(traits_of<Cell>(), p.H, p.P, projected);
  // Where a product has its weights from: a packed copy; a panel, into which each group is packed when its turn comes,
  // as it is used once; or their own rows, by dot products, or turned if in_lanes.
  enum class From { copy, panel, rows };
  From from_ih = From::copy, from_hh = From::copy;  // W_hr comes as W_hh does
  Split split;
  Packed<V, G> w_ih[2], w_hh[2];
  Packed<V, 1> w_hr[2];
  T* bias_x[2];        // [blocks][G][W], in the order of gates_x
  T* bias_h[2];        // [X][Hp], the slots that the input does not reach
  int64_t longest;     // rows of the largest slice
  int64_t tile;        // rows of one input projection
  int64_t tile_steps;  // as many as fit into it, of all rows
  bool folded;
  bool in_pieces = false;  // whether the steps come piece by piece (stack.h)
  bool in_lanes = false;   // whether a vector holds a unit of many rows (forward_lanes.h)

  // Of one slice in one direction, shared by its parts.
  struct State {
    T* h[2];      // [rows, and row_beyond][row_w] as words: the state that enters even, odd steps
    T* h_raw;     // [rows][Hp] before a projection
    T* h_own[2];  // [rows][own_w] h itself, where the cell or a small row's product reads it and words do not hold it
    T* c;         // [rows][Hp]
    T* h_reset;   // [rows][Pp] what h starts from after a cut; null: zero
    T* c_reset;   // [rows][Hp]
  };

  // Where a vector holds a unit of W rows (forward_lanes.h).
  struct Lanes {
    static constexpr int units = 8 / G;  // so many at once: eight sums or so keep the multipliers busy
    T* weights;                          // [groups of units][I + H][units][G]
    T* x;                                // [I][W]
    T* h[2];                             // [rows / W][H][W], the states that enter even, odd steps
    T* c;                                // [rows / W][H][W]
    T* tape;                             // [tape][H][W], of a step of W rows
  };

  // A projected tile.
  struct Tile {
    T* gates_x;       // [tile][blocks of the worker][G][W]
    int64_t* offset;  // [tile] row of gates_x where each step begins
  };

  // How many tiles a worker has had made, and its recurrence has used up; of all directions together.
  struct Progress {
    alignas(64) int64_t made;
    alignas(64) int64_t used;
  };

  struct Worker {
    Slice slice;
    State* states = nullptr;  // [D]
    int part = 0;
    int64_t first = 0, last = 0;          // its blocks of hidden units
    int64_t first_out = 0, last_out = 0;  // its blocks of a projection
    T *x = nullptr, *panel = nullptr, *scratch = nullptr;
    Tile tiles[2] = {};            // in turn, if its input is projected ahead; else the first alone
    Progress* progress = nullptr;  // if so
    bool* cut = nullptr;           // [rows] whether what enters the next step is zero
    Lanes lanes = {};              // if in_lanes
    // Rows too small for tiles (O::keeps_small): of the state, and of the input that is gathered, with where they lie.
    bool *small_h = nullptr, *small_x = nullptr;
    const char** from_x = nullptr;
  };

  explicit ForwardPass(const Forward& forward) : p(forward) {}

  void run(const Team& team) {
    split = choose_split(p, false, traits_of<Cell>(), team.size, units_of<V, O>(Packed<V, G>::U));
    split.workers = split.recurrent() * (split.ahead ? 2 : 1);
    Workspace workspace;
    lay_out(nullptr);
    lay_out(static_cast<char*>(workspace.reserve(size_t(layout_size))));
    run_team(team, split.workers, [&](int64_t begin, int64_t end) { work(begin, end); });
  }

  // For a wavefront (stack.h), where one worker has the whole layer: the bytes it needs, taking them, the steps there
  // are, and some of them.
  int64_t size() {
    in_pieces = true;
    lay_out(nullptr);
    return layout_size;
  }
  void prepare(char* memory) {
    in_pieces = true;
    lay_out(memory);
    prepare(int64_t(0));
  }
  int64_t extent() const { return p.T; }
  void advance(int64_t begin, int64_t end) {
    [[maybe_unused]] const typename O::Session session;
    advance_through(workers[0], 0, begin, end, 0);
  }
  void finish() {}

  // For weights that are kept packed: the bytes of one direction, and packing it into `memory`.
  int64_t packed_size() {
    Carve carve{nullptr};
    take_weights(carve, 0);
    return carve.used;
  }
  void pack_direction(int d, char* memory) {
    Carve carve{memory};
    take_weights(carve, d);
    Workspace workspace;
    const int64_t deepest = larger(p.I, larger(p.P, p.H));
    auto* const scratch = static_cast<T*>(workspace.reserve(size_t(W * deepest * int64_t(sizeof(T)))));
    pack_input_weights(d, Place(split, 0), scratch);
    pack_state_weights(d, Place(split, 0), scratch);
  }
  static void* operator new(size_t, void* at) { return at; }

 private:
  int64_t layout_size = 0;
  T* pack_scratch = nullptr;  // [workers][W * K]
  int64_t pack_scratch_size = 0;
  State* states = nullptr;  // [slices][D]
  Worker* workers = nullptr;
  Barrier* barriers = nullptr;

  // Lays the memory out; without memory, only sizes it.
  void lay_out(char* memory) {
    Carve carve{memory};
    longest = ceil_div(p.B, split.slices);
    // Enough rows for the projection's weights to be worth loading, few enough for its result to stay in the cache.
    constexpr int64_t few = 24, many = 96, cache = 512 * 1024;
    tile = cache / (blocks * G * W * int64_t(sizeof(T)));
    tile = tile < few ? few : tile > many ? many : tile;
    // More, where all rows then are one tile (choose_weights), which spares more memory than its result takes.
    if (can_be_panels() && longest * p.T <= many && 2 * longest * p.T <= p.I) tile = many;
    tile = smaller(split.ahead ? ahead_rows : tile, longest * p.T);
    tile_steps = larger(tile / larger(longest, 1), 1);
    in_lanes = suits_lanes();
    choose_weights();
    folded = p.I <= folded_input && from_ih == From::copy;
    for (int d = 0; d < p.D; ++d) {
      if (prepacked) {
        Carve kept{const_cast<char*>(bytes(p.weights[d].packed))};  // read only
        take_weights(kept, d);
      } else {
        take_weights(carve, d);
      }
    }
    pack_scratch_size = from_hh != From::copy || prepacked || as_words ? 0 : W * larger(p.I, larger(p.P, p.H));
    pack_scratch = carve.take<T>(pack_scratch_size * split.workers);
    carve.gap();
    barriers = carve.take<Barrier>(1 + split.directions * split.slices);
    if (memory) zero(barriers, 1 + split.directions * split.slices);
    states = carve.take<State>(int64_t(split.slices) * p.D);
    for (int i = 0; i < split.slices * p.D; ++i) {
      State s;
      carve.gap();
      for (T*& h : s.h) h = carve.take<T>((longest + O::row_beyond) * row_w);
      s.h_raw = projected ? carve.take<T>(longest * Hp) : nullptr;
      s.h_own[0] = carve.take<T>(keeps_h ? longest * own_w : 0);
      // Where only the cell reads them, each unit's is read before it is written.
      s.h_own[1] = O::keeps_small ? carve.take<T>(longest * own_w) : s.h_own[0];
      s.c = carve.take<T>(Cell::has_c ? longest * Hp : 0);
      s.h_reset = p.h_reset ? carve.take<T>(longest * Pp) : nullptr;
      s.c_reset = p.c_reset ? carve.take<T>(longest * Hp) : nullptr;
      if (memory) states[i] = s;
    }
    workers = carve.take<Worker>(split.recurrent());
    for (int i = 0; i < split.recurrent(); ++i) {
      const Place place(split, i);
      carve.gap();
      Worker w{Slice(p, split.slices, place.slice, 0, p.B)};
      w.part = place.part;
      w.first = first_block(w_hh[0], place.part, split.parts);
      w.last = first_block(w_hh[0], place.part + 1, split.parts);
      w.first_out = first_block(w_hr[0], place.part, split.parts);
      w.last_out = first_block(w_hr[0], place.part + 1, split.parts);
      if (in_lanes) take_lanes(carve, w.lanes);
      w.x = carve.take<T>((in_lanes ? 0 : folded ? longest : tile + O::row_beyond) * row_x);
      for (int k = 0; k < (split.ahead ? 2 : 1); ++k) {
        carve.gap();
        w.tiles[k].gates_x = carve.take<T>(folded || in_lanes ? 0 : tile * (w.last - w.first) * G * W);
        w.tiles[k].offset = carve.take<int64_t>(tile_steps);
      }
      carve.gap();
      w.progress = carve.take<Progress>(split.ahead);
      if (memory) zero(w.progress, split.ahead);
      const int64_t deepest = from_ih == From::copy || in_lanes ? 0
                              : from_hh == From::copy           ? p.I
                                                                : larger(p.I, larger(p.P, p.H));
      w.panel = carve.take<T>(deepest * group_vectors * W);
      w.scratch = carve.take<T>(as_words ? 0 : deepest * W);
      if (O::keeps_small) {
        w.small_h = carve.take<bool>(longest);
        w.small_x = carve.take<bool>(folded ? 0 : tile);
        w.from_x = carve.take<const char*>(folded ? 0 : tile);
        w.scratch = carve.take<T>(round_up(p.I, 2 * W));
      }
      w.cut = carve.take<bool>(p.reset ? longest : 0);
      if (!memory) continue;
      w.states = states + place.slice * p.D;
      workers[i] = w;
    }
    layout_size = carve.used;
  }

  // Whether weights may be packed when their turn comes: not where others want them too, or could have packed them
  // meanwhile.
  bool can_be_panels() const { return !prepacked && !O::tiled && split.slices == 1 && !split.ahead && !in_pieces; }

  // from_ih and from_hh, once the split and the tile are known.
  void choose_weights() {
    if (prepacked || O::tiled) return;
    if (in_lanes) {
      from_ih = from_hh = From::rows;
      return;
    }
    // By the whole batch: no cut into slices changes bits.
    const bool dots = few_enough_for_dots(p.T, p.B, p.H, !as_words);
    const bool one_tile = can_be_panels() && longest * p.T <= tile, one_step = p.T == 1;
    if (p.I > folded_input || one_step) from_ih = dots ? From::rows : one_tile ? From::panel : From::copy;
    from_hh = dots ? From::rows : one_tile && one_step ? From::panel : From::copy;
  }

  // The packed weights of direction d, and its biases. Their places depend on the layer's sizes alone.
  void take_weights(Carve& carve, int d) {
    const auto matrix = [&](From from, int64_t values) { return from == From::copy ? carve.take<T>(values) : nullptr; };
    w_ih[d] = {matrix(from_ih, Packed<V, G>::count(Iw, p.H)), Iw, blocks};
    w_hh[d] = {matrix(from_hh, Packed<V, G>::count(Pw, p.H)), Pw, blocks};
    w_hr[d] = {nullptr, p.H, ceil_div(p.P, W)};
    if (projected) w_hr[d].data = matrix(from_hh, Packed<V, 1>::count(p.H, p.P));
    bias_x[d] = carve.take<T>(blocks * G * W);
    bias_h[d] = carve.take<T>(X * Hp);
  }

  Source source_ih(int d) const { return {p.weights[d].w_ih, p.I, p.H, p.H, true, {0, 1, 2, 3}}; }
  Source source_hh(int d) const {
    const int* gate = Cell::hidden_gate;
    return {p.weights[d].w_hh, p.P, p.H, p.H, true, {gate[0], gate[1], gate[2], gate[3]}};
  }
  Source source_hr(int d) const { return {p.weights[d].w_hr, p.H, p.P, p.H, true, {}}; }

  void work(int64_t begin, int64_t end) {
    [[maybe_unused]] const typename O::Session session;
    const Meeting meet{barriers, split};
    for (int64_t w = begin; w < end; ++w) prepare(w);
    meet.everyone(begin, end);
    const int rounds = p.D / split.directions;  // directions one after the other, or this worker's own
    for (int round = 0; round < rounds; ++round) {
      if (split.ahead) {
        in_tiles(begin, end, round);
        continue;
      }
      if (split.parts == 1) {
        for (int64_t w = begin; w < end; ++w) advance_through(workers[w], direction(w, round), 0, p.T, 0);
        continue;
      }
      for (int64_t q = 0; q < p.T; ++q) {
        for (int64_t w = begin; w < end; ++w) advance(workers[w], direction(w, round), q, 0, p.T, 0);
        meet.parts(begin, end);
        if (!projected) continue;
        for (int64_t w = begin; w < end; ++w) project_state(workers[w], direction(w, round), q);
        meet.parts(begin, end);
      }
    }
  }

  // Workers [begin, end) of the recurrence, and of those that project for them and come after them. A thread that has
  // both ends takes them in turn, so that nobody waits for himself.
  void in_tiles(int64_t begin, int64_t end, int round) {
    const int64_t recurrent = split.recurrent(), tiles = ceil_div(p.T, tile_steps);
    for (int64_t k = 0; k < tiles; ++k) {
      const int64_t from = k * tile_steps, until = smaller(from + tile_steps, p.T), done = round * tiles + k;
      for (int64_t i = larger(begin, recurrent); i < end; ++i) {
        Worker& w = workers[i - recurrent];
        wait_for(w.progress->used, done - 1);
        project_tile(w, direction(i - recurrent, round), from, until, w.tiles[done & 1]);
        __atomic_store_n(&w.progress->made, done + 1, __ATOMIC_RELEASE);
      }
      for (int64_t i = begin; i < smaller(end, recurrent); ++i) {
        Worker& w = workers[i];
        wait_for(w.progress->made, done + 1);
        advance_through(w, direction(i, round), from, until, done & 1);
        __atomic_store_n(&w.progress->used, done + 1, __ATOMIC_RELEASE);
      }
    }
  }

  int direction(int64_t w, int round) const { return split.directions == 2 ? Place(split, w).direction : round; }

  // Packs this worker's share of the weights (those of its own part, which it will read, divided among the slices) and
  // loads its share of the initial states.
  void prepare(int64_t worker) {
    const int64_t recurrent = split.recurrent();
    const Place place(split, worker % recurrent);
    const bool recurs = worker < recurrent, projects = recurs != split.ahead;
    const Worker& w = workers[worker % recurrent];
    T* scratch = pack_scratch + worker * pack_scratch_size;
    for (int d = 0; d < p.D; ++d) {
      if (split.directions == 2 && d != place.direction) continue;
      if (!prepacked && projects) pack_input_weights(d, place, scratch);
      if (!recurs) continue;
      if (!prepacked) pack_state_weights(d, place, scratch);
      for (int64_t i = place.part; i < w.slice.count; i += split.parts) load_states(w, d, i);
    }
  }

  void pack_input_weights(int d, const Place& place, T* scratch) {
    if (from_ih != From::copy) return;
    if (folds_values)
      pack_share<Folded>(w_ih[d], source_ih(d), storage, split, place, scratch);
    else
      pack_share<O>(w_ih[d], source_ih(d), storage, split, place, scratch);
  }

  void pack_state_weights(int d, const Place& place, T* scratch) {
    if (place.part == 0 && place.slice == 0) pack_bias(p.weights[d], bias_x[d], bias_h[d]);
    if (from_hh != From::copy) return;
    pack_share<O>(w_hh[d], source_hh(d), storage, split, place, scratch);
    if (projected) pack_share<Singles<V>>(w_hr[d], source_hr(d), storage, split, place, scratch);
  }

  void pack_bias(const Weights& w, T* to_x, T* to_h) {
    zero(to_x, blocks * G * W);
    zero(to_h, X * Hp);
    if (w.b_ih == nullptr) return;
    for (int s = 0; s < S; ++s) {
      const int x_gate = s - X, h_gate = s < G ? Cell::hidden_gate[s] : -1;
      for (int64_t i = 0; i < p.H; i += W) {
        const int64_t n = p.H - i;
        const auto bias = [&](const void* b, int gate) {
          return Storage<V>::load(storage, bytes(b) + (gate * p.H + i) * storage.size, n);
        };
        const V from_x = x_gate >= 0 ? bias(w.b_ih, x_gate) : V::set(0);
        const V from_h = h_gate >= 0 ? bias(w.b_hh, h_gate) : V::set(0);
        if (x_gate >= 0)
          (from_x + from_h).store(to_x + (i / W * G + x_gate) * W);
        else
          from_h.store(to_h + s * Hp + i);
      }
    }
  }

  // Row i of the slice: into both buffers, since a reverse direction's short rows start at a later step.
  void load_states(const Worker& w, int d, int64_t i) {
    const State& s = w.states[d];
    const int64_t b = row_of(p, w.slice.rank(i));
    T* h = s.h[0] + i * row_w;
    const bool empty = length_of(p, b) == 0, cut = !empty && d == 0 && is_cut(p, 0, 0, b);
    const void *h_first = cut ? p.h_reset : p.h0, *c_first = cut ? p.c_reset : p.c0;
    const int64_t again = reset_row(p, d, b), row = cut ? again : d * p.B + b;
    load_row<O>(state_storage, h_first, row, p.P, Pp, h);
    if (keeps_h) {
      load_row<Singles<V>>(state_storage, h_first, row, p.P, own_w, s.h_own[0] + i * own_w);
      if (O::keeps_small) __builtin_memcpy(s.h_own[1] + i * own_w, s.h_own[0] + i * own_w, size_t(own_w) * sizeof(T));
    }
    if (Cell::has_c) load_row<Singles<V>>(state_storage, c_first, row, p.H, Hp, s.c + i * Hp);
    if (p.h_reset) load_row<Singles<V>>(state_storage, p.h_reset, again, p.P, Pp, s.h_reset + i * Pp);
    if (p.c_reset) load_row<Singles<V>>(state_storage, p.c_reset, again, p.H, Hp, s.c_reset + i * Hp);
    if (empty) {  // no step will write them
      copy_state(p.h0, p.h_n, d * p.B + b, p.P);
      if (Cell::has_c) copy_state(p.c0, p.c_n, d * p.B + b, p.H);
    }
    __builtin_memcpy(s.h[1] + i * row_w, h, size_t(row_w) * sizeof(T));
  }

  // Row `row` of a state as it is stored; zero where there is none.
  void copy_state(const void* from, void* to, int64_t row, int64_t width) const {
    const size_t size = size_t(width * state_storage.size);
    char* const at = bytes(to) + row * int64_t(size);
    if (from)
      __builtin_memmove(at, bytes(from) + row * int64_t(size), size);
    else
      __builtin_memset(at, 0, size);
  }

  // ------------------------------------------------------------------------------------------------------- one step

  // What a step of one slice and direction needs to know.
  struct Step {
    int d;
    int64_t t;
    const T* h;    // the state that enters
    T* h_new;      // the state that leaves
    const T* own;  // the same as values (State::h_own)
    T* own_new;
    const State& state;
    int64_t final;    // rows from here on end with this step
    const bool* cut;  // null: no row's next step starts anew
    bool back;        // whether to go through the groups from the last to the first (Split::alternate)
  };

  Step step_at(const Worker& w, int d, int64_t q) const {
    const int64_t t = d ? p.T - 1 - q : q, now = w.slice.active(p, t);
    const State& s = w.states[d];
    // Else nothing changes places.
    const bool two_pairs = w.last - w.first >= 4 * Packed<V, G>::U && from_hh == From::copy;
    const bool last = q + 1 == p.T;
    return {d,
            t,
            s.h[q & 1],
            s.h[~q & 1],
            s.h_own[q & 1],
            s.h_own[~q & 1],
            s,
            last ? 0
            : d  ? now
                 : w.slice.active(p, t + 1),
            p.reset && !last ? w.cut : nullptr,
            split.alternate && (q & 1) && two_pairs};
  }

  // forward_lanes.h
  bool suits_lanes() const;
  void take_lanes(Carve& carve, Lanes& lanes) const;
  void turn_in(const Worker& w, int d);
  void advance_in_lanes(const Worker& w, int d, int64_t begin, int64_t end);
  void step_in_lanes(const Lanes& lanes, int d, const T* h, T* h_new, T* c) const;
  template <class F>
  void over_rows_of(const T* turned, int64_t rows, const F& f) const;

  // forward_step.h
  void advance_through(Worker& w, int d, int64_t begin, int64_t end, int64_t turn);
  void advance(Worker& w, int d, int64_t q, int64_t begin, int64_t end, int64_t turn);
  void project_tile(const Worker& w, int d, int64_t begin, int64_t end, const Tile& to);
  int64_t gather_x(const Worker& w, int64_t t, int64_t begin, int64_t end, int64_t rows);
  void project_input(const Worker& w, int d, int64_t rows, T* gates_x) const;
  void vector_project_input(const Worker& w, int d, int64_t rows, T* gates_x) const;
  void step(const Worker& w, const Step& s, int64_t begin, int64_t end, const T* gates_x) const;
  void vector_step(const Worker& w, const Step& s, int64_t begin, int64_t end, const T* gates_x) const;
  // tiled_passes.h
  void tiled_project_input(const Worker& w, int d, int64_t rows, T* gates_x) const;
  void tiled_step(const Worker& w, const Step& s, int64_t begin, int64_t end, const T* gates_x) const;
  FASTRNN_MEMBER void step_pair(const Worker& w, const Step& s, int64_t row, int64_t block, const T* gates_x) const;
  __attribute__((noinline)) void step_back(const Worker& w, const Step& s, int64_t row, const T* gates_x) const;
  template <int count>
  FASTRNN_MEMBER void apply(const Worker& w, const Step& s, int64_t begin, int64_t i, int64_t block, const V* sum,
                            const T* gates_x) const;
  FASTRNN_MEMBER void put_c(const Step& s, int64_t i, int64_t b, int64_t unit, V c) const;
  FASTRNN_MEMBER V put_h(const Step& s, int64_t i, int64_t b, int64_t unit, V h) const;
  FASTRNN_MEMBER void put_last(V x, void* to, int64_t at, int64_t n) const;
  void project_state(const Worker& w, int d, int64_t q);
  void clear_padding(int d, int64_t t, int64_t b);
};
