// What is told of the steps of back-propagation (problem.h: watched): sums of a step, as its rows and units come by,
// and of those that came to one worker alone. Squares are summed in double: those of a gradient that vanishes are too
// small for float.

template <class Cell, class V>
struct Watch {
  using T = typename V::T;
  static constexpr int W = V::lanes, gates = watched_gates<Cell>;
  static constexpr int sums = watched::first_gate(Cell::has_c), columns = watched::columns(Cell::has_c, gates);

  f64 squares_of[sums];
  V gate_sums[gates][watched::per_gate];
  V arrived;  // of the gradient of h that is being received

  void clear() {
    for (int k = 0; k < sums; ++k) squares_of[k] = f64::set(0);
    for (auto& gate : gate_sums)
      for (auto& sum : gate) sum = V::set(0);
  }

  void arrives(V dh, int64_t n) {
    arrived = dh;
    add(watched::dh_arrived, dh, n);
  }

  // Of these n values, or more than a vector: lanes past them hold anything.
  void add(int column, V x, int64_t n) { squares_of[column] = squares_of[column] + squares(within(x, n)); }

  // The gates, and c or of a cell without one h, of blocks of units of a row. tape_h: from one block of its tape to the
  // next; H: units in all.
  void add_row(const T* tape, int64_t tape_h, int64_t first, int64_t last, int64_t H) {
    constexpr int column = Cell::has_c ? watched::c : watched::h;
    f64 state_sum = squares_of[column];
    V sums_here[gates][watched::per_gate];
    for (int g = 0; g < gates; ++g)
      for (int k = 0; k < watched::per_gate; ++k) sums_here[g][k] = gate_sums[g][k];
    const V zero = V::set(0);
    for (int64_t block = first; block < last; ++block) {
      const int64_t unit = block * W, n = H - unit;
      const V one = within(V::set(1), n);
      state_sum = state_sum + squares(within(V::load(tape + (Cell::tape - 1) * tape_h + unit), n));
      for (int g = 0; g < gates; ++g) {
        const V x = within(V::load(tape + Cell::watched[g].block * tape_h + unit), n);
        const Squash squash = Cell::watched[g].squash;
        const T low = squash == Squash::sigmoid ? T(0.1) : squash == Squash::tanh ? T(-0.9) : T(0);
        V* sum = sums_here[g];
        sum[0] = sum[0] + x;
        sum[1] = sum[1] + less_equal(x, V::set(low), one, zero);
        if (squash != Squash::relu) sum[2] = sum[2] + less_equal(V::set(T(0.9)), x, one, zero);
      }
    }
    squares_of[column] = state_sum;
    for (int g = 0; g < gates; ++g)
      for (int k = 0; k < watched::per_gate; ++k) gate_sums[g][k] = sums_here[g][k];
  }

  // The sums of a step, and begins another.
  void write(int64_t rows, double* to) {
    for (int k = 0; k < sums; ++k) to[k] = total(squares_of[k]);
    to[watched::rows] = double(rows);
    for (int g = 0; g < gates; ++g)
      for (int k = 0; k < watched::per_gate; ++k) to[sums + g * watched::per_gate + k] = double(total(gate_sums[g][k]));
    clear();
  }

 private:
  static V within(V x, int64_t n) {
    if (n >= W) return x;
    T lanes[W];
    x.store(lanes);
    return V::load(lanes, int(n));
  }
};
