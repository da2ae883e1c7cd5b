// Back-propagation through time for one layer.
//
// Step by step, in reverse: the gradient of h that enters a step is dy plus the recurrent product of the dgates of the
// step before (in processing order); the product of a group of hidden units is summed in registers, the cell's backward
// applied to it there, and the new dgates written once, in blocks. States are read back from the tape; the LSTM's h is
// o tanh(c) again. Where a reset cut the state, no gradient crosses.
//
// The dgates of a chunk of steps, with the operands they are to be multiplied by, lie in a bounded buffer. When the
// recurrence has run through a chunk, all workers add the chunk's share to the weight gradients and compute its dx
// (gradients.h), and hand out those operands where they are wanted. Two buffers take turns: one chunk's recurrence
// needs the last dgates of the chunk before, and may begin while others still read that.
//
// Few hidden units in many rows go band by band of their rows (bands.h): a pass may have some of the ranks only.

// O says what the products multiply (operand.h). A projection multiplies single values, but not for the gradient of its
// weights.
template <class Cell, class Vector, class O = Singles<Vector>>
struct BackwardPass {
  using V = Vector;
  using T = typename V::T;
  static constexpr int W = V::lanes, G = Cell::gates, S = Cell::slots, X = Cell::x_first;
  // The tape's last block holds c for the LSTM, h for the others.
  static constexpr int state_block = Cell::tape - 1;
  static constexpr int64_t few_rows = 4;
  static constexpr int watched_columns = Watch<Cell, V>::columns;

  const Backward& p;
  const Storage<V> storage{p.dtype}, state_storage{p.state};
  const int64_t blocks = ceil_div(p.H, W), Hp = blocks * W, out_blocks = ceil_div(p.P, W), Pp = out_blocks * W;
  const int64_t in_blocks = ceil_div(p.I, W), N = stored_rows(p), tape_h = padded_to_tape_block(p.H);
  // Of gates that are multiplied unit by unit: the words of a block in a buffer, and of a gate.
  static constexpr int64_t Ww = O::tiled ? W : O::words(W);
  const int64_t Hw = O::words(p.H);
  // Whether a buffer has the dgates twice: their words by units (chain, dx), and by rows (weight gradients).
  static constexpr bool twice = Ww != W;
  // By tiles, the chain multiplies words of its own (State::chain), and a buffer has values: words of a row of them.
  const int64_t chain_w = O::tiled ? O::stride(G * Hw) : 0;
  const int64_t loose_w = G * round_up(p.H, 2 * W);
  const bool projected = p.projected;
  const int64_t tape_row = tape_width(traits_of<Cell>(), p.H, p.P, projected);
  const int64_t first_rank = 0, end_rank = p.B;      // that this pass has
  const BackwardPass* const weights_from = nullptr;  // who packs the weights; null: this pass
  Split split;
  Packed<V, 1> w_hh[2];  // [G*Hw, P] for the dh chain
  Packed<V, 1> w_ih[2];  // [G*Hw, I] for dx
  Packed<V, 1> w_hr[2];  // [P, H]
  T* none;               // [larger(Hp, Pp)] zeros: the state before the first step, or after a cut
  // What few rows multiply only once, each group of it by one worker, is packed there and then: the weights of one
  // step, the input's of one chunk.
  bool once = false;
  bool by_columns = false;  // whether workers share dx out by its columns, not its rows
  bool in_place = false;    // one step of so few rows that the weights are not even packed where they need not be
  int64_t chunks;
  int64_t* chunk_begin;  // [chunks + 1] first step of each
  int64_t* chunk_row;    // [chunks + 1] rows of all before each
  int64_t R, Rl, Rw;     // rows that a buffer has room for; as words of left and right operands of weight gradients
  int64_t longest;       // rows of the largest slice
  int64_t most_steps;    // of a chunk

  // What a chunk leaves for the gradients. Absent pieces are not wanted.
  struct Buffer {
    T* dgates;   // [S * blocks][R][Ww]
    T* by_rows;  // [S * blocks][Rl][W] the same for the gradients of weights
    T* h_prev;   // [out_blocks][Rw][W] the state that entered each step
    T* x;        // [in_blocks][Rw][W]
    // [R] Of rows of x, h_prev and h_raw that are too small for tiles, and scaled: what undoes that.
    T *x_back, *h_back, *raw_back;
    T* dh_out;  // [out_blocks][Rl][W] gradient of the projected state
    T* h_raw;   // [blocks][Rw][W] o tanh(c), before the projection
  };

  // Of one slice in one direction, shared by its parts.
  struct State {
    T* dh;        // [rows][Pp] with a projection: gradient of the projected state
    T* bypass;    // [rows][Hp] what went past the recurrent product
    T* dc;        // [rows][Hp]
    T* dh_n;      // [rows][Pp]
    T* h0;        // [rows][Pp]
    T* c0;        // [rows][Hp]
    T* h_reset;   // [rows][Pp] what h starts from after a cut; null: zero
    T* c_reset;   // [rows][Hp]
    T* dh_reset;  // [rows][Pp] sums over the cuts; null: not wanted
    T* dc_reset;  // [rows][Hp]
    // By tiles: the dgates of even, of odd steps, gate after gate; and where small rows are looked for, each part's
    // largest of every row.
    T* chain[2];  // [rows, and row_beyond][chain_w] as words
    T* peaks[2];  // [parts][rows][W]
  };

  // A row at the step being worked on.
  struct Row {
    const T* dgates;  // of the step before, in processing order
    int64_t at;       // its row in the buffer
    const T* tape;
    const T* before;   // tape of the step whose state entered; null: that was h0, or zero
    const T* h_first;  // where `before` is null
    const T* c_first;
    const char* dy;
    bool cut;        // no gradient goes on from this step
    bool was_cut;    // none came from the one before
    bool last;       // none goes on because the row began here
    bool carried;    // one came from the one before
    T h_by, raw_by;  // what h_prev and h_raw are multiplied by where they are too small for tiles
  };

  struct Worker {
    Slice slice;
    State* states = nullptr;  // [D]
    int part = 0;
    int64_t first = 0, last = 0;          // its blocks of hidden units
    int64_t first_out = 0, last_out = 0;  // its blocks of the state h
    Row* rows = nullptr;
    char** dx = nullptr;  // [R]
    T* panel = nullptr;
    bool idle = false;
    Watch<Cell, V>* watch = nullptr;  // null: nobody watches
    double* watched = nullptr;        // [D][2][most_steps][columns] a chunk's steps, those of the chunk before
    // By tiles.
    T* loose = nullptr;  // [loose_w] a row of dgates, as values
    T* split = nullptr;  // [rows, or two tiles of them][chain_w] rows of dgates, as words
    T* back = nullptr;   // [rows] what undoes the scale of each of these
    T* left = nullptr;   // the left operand of a weight gradient
  };

  explicit BackwardPass(const Backward& backward) : p(backward) {}

  void run(const Team& team) {
    split = choose_split(p, true, traits_of<Cell>(), team.size, units_of<V, O>(Packed<V, 1>::U));
    if (split.bands > 1) return Bands<BackwardPass>(*this).run(team);
    Workspace workspace;
    lay_out(nullptr);
    lay_out(static_cast<char*>(workspace.reserve(size_t(layout_size))));
    run_team(team, split.workers, [&](int64_t begin, int64_t end) { work(begin, end); });
  }

  // For a wavefront (stack.h), where one worker has the whole layer: the bytes it needs, taking them, the chunks there
  // are, some of them, and what comes after the last.
  int64_t size() {
    lay_out(nullptr);
    return layout_size;
  }
  void prepare(char* memory) {
    lay_out(memory);
    prepare(int64_t(0));
  }
  int64_t extent() const { return chunks; }
  void advance(int64_t begin, int64_t end) {
    [[maybe_unused]] const typename O::Session session;
    for (int64_t k = begin; k < end; ++k) {
      gather_x(0, 0, k);
      recur(workers[0], 0, k);
      reduce(0, 0, k);
    }
  }
  void finish() {
    [[maybe_unused]] const typename O::Session session;
    finish_states(workers[0], 0);
  }
  static void* operator new(size_t, void* at) { return at; }

  // For bands (bands.h): ranks [first, end) by so many workers, with the weights that `packer` has packed.
  BackwardPass(const Backward& backward, int64_t first, int64_t end, int count, const BackwardPass* packer)
      : p(backward), first_rank(first), end_rank(end), weights_from(packer) {
    split.workers = split.slices = count;
  }
  // backward_memory.h
  void take_weights(Carve& carve);
  void pack(int64_t worker) const;

 private:
  friend struct Bands<BackwardPass>;
  int64_t layout_size = 0;
  Buffer* buffers = nullptr;  // [D][2]
  State* states = nullptr;    // [slices][D]
  Worker* workers = nullptr;
  Barrier* barriers = nullptr;

  void lay_out(char* memory);  // backward_memory.h; without memory, only sizes it

  Source source_hh(int d) const {
    const int* gate = Cell::hidden_gate;
    return {p.weights[d].w_hh, p.P, p.P, p.H, false, {gate[0], gate[1], gate[2], gate[3]}};
  }
  Source source_ih(int d) const { return {p.weights[d].w_ih, p.I, p.I, p.H, false, {0, 1, 2, 3}}; }
  Source source_hr(int d) const { return {p.weights[d].w_hr, p.H, p.H, p.P, false, {0, 0, 0, 0}}; }

  // ------------------------------------------------------------------------------------------------- order of events

  int direction(int64_t w, int round) const { return split.directions == 2 ? Place(split, w).direction : round; }
  // The chunk that direction d works on k-th, and its steps in order of processing.
  int64_t chunk(int d, int64_t k) const { return d ? k : chunks - 1 - k; }
  int64_t steps(int d, int64_t k) const { return chunk_begin[chunk(d, k) + 1] - chunk_begin[chunk(d, k)]; }
  int64_t step(int d, int64_t k, int64_t i) const {
    return d ? chunk_begin[chunk(d, k)] + i : chunk_begin[chunk(d, k) + 1] - 1 - i;
  }

  void work(int64_t begin, int64_t end) {
    [[maybe_unused]] const typename O::Session session;
    const Meeting meet{barriers, split};
    for (int64_t w = begin; w < end; ++w) prepare(w);
    meet.everyone(begin, end);
    const int64_t recurrent = smaller(end, split.recurrent());
    for (int round = 0; round < p.D / split.directions; ++round) {
      for (int64_t k = 0; k < chunks; ++k) {
        for (int64_t w = begin; w < end; ++w) gather_x(w, round, k);
        if (split.parts == 1)
          for (int64_t w = begin; w < recurrent; ++w) recur(workers[w], direction(w, round), k);
        else
          in_step(begin, end, round, k, meet);
        meet.everyone(begin, end);
        for (int64_t w = begin; w < end; ++w) reduce(w, round, k);
      }
      for (int64_t w = begin; w < recurrent; ++w) finish_states(workers[w], direction(w, round));
    }
  }

  // One chunk of a slice that no other worker has a part of.
  void recur(Worker& w, int d, int64_t k) {
    for (int64_t i = 0; i < steps(d, k); ++i) {
      carry(w, d, k, step(d, k, i));
      if (projected) through_projection(w, d, k, step(d, k, i));
    }
  }

  // What comes after the last step: the gradients of the states that the sequence began with, and began again with.
  void finish_states(Worker& w, int d) {
    if (p.dh0 || p.dh_reset) carry(w, d, chunks, d ? p.T : -1);
    const auto put_sums = [&](const T* sums, void* to, int64_t width, int64_t padded, int64_t first, int64_t last) {
      const int64_t n = smaller(last * W, width) - first * W;
      for (int64_t i = 0; sums && n > 0 && i < w.slice.count; ++i)
        state_storage.narrow(
            sums + i * padded + first * W,
            bytes(to) + ((d * p.B + row_of(p, w.slice.rank(i))) * width + first * W) * state_storage.size, n);
    };
    put_sums(w.states[d].dh_reset, p.dh_reset, p.P, Pp, w.first_out, w.last_out);
    put_sums(w.states[d].dc_reset, p.dc_reset, p.H, Hp, w.first, w.last);
  }

  // One chunk, where the parts of a slice meet after each step. All threads count the same steps, also for a direction
  // whose chunk has fewer.
  void in_step(int64_t begin, int64_t end, int round, int64_t k, const Meeting& meet) {
    const int64_t recurrent = smaller(end, split.recurrent());
    int64_t most = steps(round, k);
    for (int d = 0; d < split.directions; ++d) most = larger(most, steps(d, k));
    for (int64_t i = 0; i < most; ++i)
      for (int phase = 0; phase < (projected ? 2 : 1); ++phase) {
        for (int64_t w = begin; w < recurrent; ++w) {
          const int d = direction(w, round);
          if (i >= steps(d, k)) continue;
          if (phase == 0)
            carry(workers[w], d, k, step(d, k, i));
          else
            through_projection(workers[w], d, k, step(d, k, i));
        }
        meet.parts(begin, end);
      }
  }

  // Packs this worker's share of the weights, loads its share of the states, clears its share of the padding.
  void prepare(int64_t worker) {
    const Place place(split, worker);
    const Worker& w = workers[worker];
    if (weights_from == nullptr) pack(worker);
    for (int d = 0; d < p.D; ++d) {
      if (w.idle || (split.directions == 2 && d != place.direction)) continue;
      for (int64_t i = place.part; i < w.slice.count; i += split.parts) load_states(w, d, i);
    }
    if (p.lengths == nullptr || p.packed) return;
    const int64_t ranks = end_rank - first_rank, end = share_of(ranks, worker + 1, split.workers);
    for (int64_t i = share_of(ranks, worker, split.workers); i < end; ++i)
      for (int64_t b = row_of(p, first_rank + i), t = p.lengths[b]; t < p.T; ++t) {
        if (p.dx.data) __builtin_memset(dx_row(t, b), 0, size_t(p.I) * dx_size());
        for (int d = 0; d < p.D; ++d)
          over_operands([&](const Operand& o) { zero(operand_row(o, d, t, b), o.slots * o.units); });
      }
  }

  void load_states(const Worker& w, int d, int64_t i) {
    const State& s = w.states[d];
    const int64_t b = row_of(p, w.slice.rank(i));
    const int64_t own = d * p.B + b, again = reset_row(p, d, b);
    const auto load = [&](const void* from, int64_t row, int64_t width, int64_t padded, T* to) {
      load_row<Singles<V>>(state_storage, from, row, width, padded, to + i * padded);
    };
    if (O::tiled)
      for (T* words : s.chain) zero(words + i * chain_w, chain_w);  // what no unit writes stays zero
    load(p.dh_n, own, p.P, Pp, s.dh_n);
    load(p.h0, own, p.P, Pp, s.h0);
    if (p.h_reset) load(p.h_reset, again, p.P, Pp, s.h_reset);
    if (p.dh_reset) zero(s.dh_reset + i * Pp, Pp);
    if (Cell::has_c) {
      load(p.dc_n, own, p.H, Hp, s.dc);
      load(p.c0, own, p.H, Hp, s.c0);
      if (p.c_reset) load(p.c_reset, again, p.H, Hp, s.c_reset);
      if (p.dc_reset) zero(s.dc_reset + i * Hp, Hp);
    }
    if (length_of(p, b)) return;  // no step will write their gradients
    const auto put = [&](const T* from, void* to, int64_t width) {
      if (to) state_storage.narrow(from, bytes(to) + own * width * state_storage.size, width);
    };
    put(s.dh_n + i * Pp, p.dh0, p.P);
    if (Cell::has_c) put(s.dc + i * Hp, p.dc0, p.H);
  }

  // ------------------------------------------------------------------------------------------------------- one step

  const T* tape_at(int d, int64_t t, int64_t rank) const {
    return static_cast<const T*>(p.tape) + (d * N + stored_row(p, t, rank)) * tape_row;
  }
  // How many of this pass's ranks, the first ones, are active at step t.
  int64_t active(int64_t t) const { return larger(smaller(active_rows(p, t), end_rank) - first_rank, int64_t(0)); }
  // A buffer's rows, like the tape's, are the steps of the first rank, then of the next, ... This is a rank's first row
  // in chunk c.
  int64_t buffer_row(int64_t c, int64_t rank) const {
    const int64_t begin = chunk_begin[c], n = chunk_begin[c + 1] - begin;
    if (p.first_row == nullptr) return (rank - first_rank) * n;
    const int64_t all = active_rows(p, begin + n - 1);  // ranks that run through all its steps
    const int64_t whole = larger(smaller(rank, all), first_rank);
    return (whole - first_rank) * n + p.steps_above[rank] - p.steps_above[whole] - (rank - whole) * begin;
  }

  struct Step {
    int d;
    int64_t t, now;  // active rows
    const Buffer& buffer;
    const State& state;
  };
  Step step_at(const Worker& w, int d, int64_t k, int64_t t) const {
    return {d, t, k == chunks ? 0 : w.slice.active(p, t), buffers[2 * d + (k & 1)], w.states[d]};
  }

  // The rest is in backward_step.h.
  void carry(Worker& w, int d, int64_t k, int64_t t);
  void vector_carry(Worker& w, const Step& s, int64_t carried);
  FASTRNN_MEMBER void arrive(const Worker& w, const Step& s, int64_t i, int64_t block, V dh) const;
  FASTRNN_MEMBER void begin_rows(const Worker& w, const Step& s, int64_t carried, int64_t block, int count) const;
  // By tiles: tiled_passes.h.
  void tiled_carry(Worker& w, const Step& s, int64_t from, int64_t carried);
  void put_in_chain(const Worker& w, const Step& s, int64_t i, int64_t unit, const V (&da)[S]) const;
  void load_dgates(const T* dgates, T* to) const;
  T cut_dgates(const Worker& w, const T* dgates, int64_t row) const;
  template <class F>
  T scale_input(const F& vector, T& back) const;
  T scale_state(const Row& row, T& back) const;
  T scale_raw(const Row& row, T& back) const;
  template <class F>
  void tiled_input_gradient(const Worker& w, int d, int64_t count, const T* dgates, const F& put_dx) const;
  FASTRNN_MEMBER void put_first(V x, void* to, int64_t at, int64_t n) const;
  FASTRNN_INLINE void add_to(T* sums, V x) { (V::load(sums) + x).store(sums); }
  template <int M, int U>
  FASTRNN_MEMBER void multiply_dgates(V (&sum)[M][U], const T* const (&dgates)[M], const T* group, const Source& source,
                                      int64_t block) const;
  void find_rows(Worker& w, const Step& s, int64_t k, int64_t from, int64_t carried);
  FASTRNN_MEMBER void receive(const Worker& w, const Step& s, int64_t i, int64_t block, V dh) const;
  V load_state_gradient(const void* from, const Worker& w, const Step& s, int64_t i, int64_t width, int64_t unit) const;
  void through_projection(Worker& w, int d, int64_t k, int64_t t);
  FASTRNN_MEMBER void put(V x, T* blocks_of_rows, int64_t block, int64_t at) const;
  FASTRNN_MEMBER void put_h_prev(const Step& s, const Row& row, int64_t block, V h) const;
  FASTRNN_MEMBER V hidden(const T* tape, int64_t unit) const;
  FASTRNN_MEMBER void through_cell(const Worker& w, const Step& s, int64_t i, int64_t block, V dh) const;
  __attribute__((noinline)) void watch_cell(const Worker& w, const Step& s, int64_t i, int64_t unit, V dh, V dc) const;
  double* watched_step(const Worker& w, int d, int64_t k, int64_t step) const;
  void end_watched_step(const Worker& w, const Step& s, int64_t k) const;
  bool alone() const { return split.recurrent() == 1; }
  void sum_watched(int64_t worker, int round, int d, int64_t k) const;

  // --------------------------------------------------------------------------------------------- a chunk's gradients

  int64_t dx_size() const { return p.dx_is_compute ? int64_t(sizeof(T)) : storage.size; }
  char* dx_row(int64_t t, int64_t b) const { return bytes(p.dx.data) + row_offset(p, p.dx, t, b) * dx_size(); }

  int64_t rows_of(int64_t c) const { return chunk_row[c + 1] - chunk_row[c]; }

  // Calls f(row of the buffer, t, b) for this worker's share of the rows of a chunk; for all of them.
  template <class F>
  void over_chunk_rows(int64_t worker, int64_t c, const F& f) const {
    over_chunk_rows(worker, split.workers, c, f);
  }
  template <class F>
  void over_all_rows(int64_t c, const F& f) const {
    over_chunk_rows(0, 1, c, f);
  }
  template <class F>
  void over_chunk_rows(int64_t share, int64_t shares, int64_t c, const F& f) const {
    const int64_t begin = chunk_begin[c], last_rank = first_rank + active(begin) - 1, all = rows_of(c);
    const int64_t end = share_of(all, share + 1, shares);
    int64_t row = share_of(all, share, shares), rank = first_rank + row / (chunk_begin[c + 1] - begin);
    for (int64_t next = 0; row < end; ++rank) {
      next = rank < last_rank ? buffer_row(c, rank + 1) : all;
      for (const int64_t first = buffer_row(c, rank); row < smaller(next, end); ++row)
        f(row, begin + row - first, row_of(p, rank));
    }
  }

  // The directions whose k-th chunk is being worked on.
  int first_direction(int round) const { return split.directions == 2 ? 0 : round; }
  int end_direction(int round) const { return split.directions == 2 ? 2 : round + 1; }

  void gather_x(int64_t worker, int round, int64_t k);

  void clear_padding_rows(int d, int64_t k) const;

  template <class F>
  void over_sums(int d, const Buffer& b, int64_t rows, const F& f) const;

  void reduce(int64_t worker, int round, int64_t k);

  // What is handed out of a chunk (problem.h: operands).
  struct Operand {
    void* to;
    T* Buffer::* from;  // blocks of units, of each slot
    int64_t units, slots;
    int64_t ld;  // rows that a block has room for
  };
  template <class F>
  void over_operands(const F& f) const {
    const auto& to = p.operands;
    const Operand all[] = {{to.dgates, &Buffer::dgates, p.H, S, R},
                           {to.h_prev, &Buffer::h_prev, p.P, 1, Rw},
                           {to.dh_out, &Buffer::dh_out, p.P, 1, Rw},
                           {to.h_raw, &Buffer::h_raw, p.H, 1, Rw}};
    for (const Operand& o : all)
      if (o.to) f(o);
  }
  T* operand_row(const Operand& o, int d, int64_t t, int64_t b) const {
    const int64_t rows = p.packed ? N : p.T * p.B, row = p.packed ? p.first_row[t] + b : t * p.B + b;
    return static_cast<T*>(o.to) + (d * rows + row) * o.slots * o.units;
  }

  void hand_out(int64_t worker, int d, int64_t c, const Buffer& buffer) const;

  void input_gradient(int64_t worker, int d, int64_t k, int64_t c, const Buffer& b);

  template <class F>
  void vector_input_gradient(const Worker& w, int d, int64_t begin, int64_t end, int64_t count, const T* dgates,
                             const F& put_dx) const;
};
