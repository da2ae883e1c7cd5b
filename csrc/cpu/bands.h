// Back-propagation of few hidden units in many rows, band by band of the rows: one worker takes a band through the
// whole sequence, with sums of its own for the gradients of the weights, and waits for nobody. In the end the bands'
// sums are added, in their order.
//
// Else (backward.h) all workers add up all rows of a chunk, each for some of the weights. Small layers are done with a
// chunk in less time than it takes a core to fetch the rows that others have worked on.

template <class Pass>
struct Bands {
  using V = typename Pass::V;
  using T = typename V::T;

  Pass& all;  // its split, and its packed weights
  const Backward& p = all.p;
  const int64_t workers = all.split.workers, bands = all.split.bands;
  const int per_band = int(larger(workers / bands, 1));  // workers
  const int64_t at_once = smaller(workers, bands);       // bands

  explicit Bands(Pass& pass) : all(pass) {}

  void run(const Team& team) {
    for (int64_t band = 0; band < bands; ++band) most = larger(most, pass(band, p).size());
    Workspace workspace;
    lay_out(nullptr);
    lay_out(static_cast<char*>(workspace.reserve(size_t(layout_size))));
    run_team(team, workers, [&](int64_t begin, int64_t end) { work(begin, end); });
  }

 private:
  int64_t layout_size = 0, most = 0;  // bytes, of a band the latter
  Backward* problems = nullptr;       // [bands] p, but for where sums go
  char** memory = nullptr;            // [at_once] for a band
  Pass* shared = nullptr;             // [bands] where a band has several workers
  int* taken = nullptr;               // [bands] else
  Barrier* barrier = nullptr;

  Pass pass(int64_t band, const Backward& problem) const {
    return Pass(problem, share_of(p.B, band, bands), share_of(p.B, band + 1, bands), per_band, &all);
  }

  void lay_out(char* block) {
    Carve carve{block};
    all.take_weights(carve);
    barrier = carve.take<Barrier>(1);
    taken = carve.take<int>(bands);
    problems = carve.take<Backward>(bands);
    memory = carve.take<char*>(at_once);
    shared = carve.take<Pass>(per_band > 1 ? bands : 0);
    if (block) {
      zero(barrier, 1);
      zero(taken, bands);
    }
    for (int64_t band = 0; band < bands; ++band) {
      Backward problem = p;
      carve.gap();
      if (band > 0) {  // the first sums where the result is wanted
        over_sums(problem, [&](void*& sums, int64_t n) { sums = carve.take<T>(n); });
        if (p.watched) problem.watched = carve.take<double>(watched_values());
      }
      if (block) problems[band] = problem;
    }
    for (int64_t i = 0; i < at_once; ++i) {
      carve.gap();
      char* const piece = carve.take<char>(most);
      if (!block) continue;
      memory[i] = piece;
      if (per_band > 1) (new (&shared[i]) Pass(pass(i, problems[i])))->lay_out(piece);
    }
    layout_size = carve.used;
  }

  // Calls f(sums, values) for every wanted gradient of weights.
  template <class F>
  void over_sums(Backward& of, const F& f) const {
    const int64_t units = Pass::G * p.H;
    const auto wanted = [&](void*& sums, int64_t n) {
      if (sums) f(sums, n);
    };
    for (int d = 0; d < p.D; ++d) {
      auto& to = of.gradients[d];
      wanted(to.w_ih, units * p.I);
      wanted(to.w_hh, units * p.P);
      wanted(to.b_ih, units);
      wanted(to.b_hh, units);
      wanted(to.w_hr, p.P * p.H);
    }
  }
  int64_t watched_values() const { return p.D * p.T * Pass::watched_columns; }

  void work(int64_t begin, int64_t end) {
    const auto meet = [&] {
      if (workers > 1) wait(*barrier, arrive(*barrier, int(end - begin), int(workers)));
    };
    for (int64_t w = begin; w < end; ++w) all.pack(w);
    meet();
    if (per_band > 1) {
      for (int64_t w = begin, last; w < end; w = last) {
        const int64_t band = w / per_band, first = band * per_band;
        last = smaller(first + per_band, end);
        shared[band].work(w - first, last - first);
      }
    } else {
      for (int64_t w = begin; w < end; ++w) take_bands(w);
    }
    meet();
    for (int64_t w = begin; w < end; ++w) add_up(w);
  }

  // A worker's own share first, whose rows its core may have in reach, then what others have not come to; of rows of
  // different lengths, the longest first.
  void take_bands(int64_t worker) {
    const int64_t first = p.first_row ? 0 : share_of(bands, worker, workers);
    for (int64_t i = 0; i < bands; ++i) {
      const int64_t band = (first + i) % bands;
      if (__atomic_exchange_n(&taken[band], 1, __ATOMIC_RELAXED)) continue;
      Pass mine = pass(band, problems[band]);
      mine.lay_out(memory[worker]);
      mine.work(0, 1);
    }
  }

  // This worker's share of the sums.
  void add_up(int64_t worker) const {
    constexpr int W = V::lanes;
    const auto share = [&](int64_t n, int64_t i) { return smaller(share_of(ceil_div(n, W), i, workers) * W, n); };
    T* to[10];
    int pieces = 0;
    over_sums(problems[0], [&](void* sums, int64_t) { to[pieces++] = static_cast<T*>(sums); });
    for (int64_t band = 1; band < bands; ++band) {
      int piece = 0;
      over_sums(problems[band], [&](void* sums, int64_t n) {
        const T* const from = static_cast<const T*>(sums);
        T* const sum = to[piece++];
        const int64_t end = share(n, worker + 1);
        int64_t i = share(n, worker);
        for (; i + W <= end; i += W) (V::load(sum + i) + V::load(from + i)).store(sum + i);
        if (i < end) (V::load(sum + i, int(end - i)) + V::load(from + i, int(end - i))).store(sum + i, int(end - i));
      });
      for (int64_t i = share_of(watched_values(), worker, workers);
           p.watched && i < share_of(watched_values(), worker + 1, workers); ++i)
        p.watched[i] += problems[band].watched[i];
    }
  }
};
