// Several layers of one direction as a wavefront over time: each thread has a group of neighbouring layers, and works
// on a piece of the sequence while the next thread works on the piece before. For small layers, whose steps are too
// short for threads to meet at each of them. Forward from the first layer to the last, and back from the last to the
// first.
//
// Every layer computes what it would compute alone, in the same order: the same bits. Layers so small lie in a cache
// whole, so that they do without Split::alternate.

template <class Pass, class Problem>
struct StackPass {
  const Problem* layers;  // in the order of work: the first waits for nobody
  int count;
  Wavefront wave;

  struct alignas(64) Progress {
    int64_t done;  // of its extent: what the group's last layer has finished
  };
  Pass* passes = nullptr;  // [count]
  char** memory = nullptr;
  Progress* progress = nullptr;  // [groups]

  void run(const Team& team) {
    Workspace workspace;
    const int64_t size = lay_out(nullptr);
    lay_out(static_cast<char*>(workspace.reserve(size_t(size))));
    run_team(team, wave.groups, [&](int64_t begin, int64_t end) { work(begin, end); });
  }

 private:
  int64_t lay_out(char* block) {
    Carve carve{block};
    passes = carve.take<Pass>(count);
    memory = carve.take<char*>(count);
    progress = carve.take<Progress>(wave.groups);
    if (block) zero(progress, wave.groups);
    for (int i = 0; i < count; ++i) {
      carve.gap();
      char* piece = carve.take<char>(Pass(layers[i]).size());
      if (block == nullptr) continue;
      new (&passes[i]) Pass(layers[i]);
      memory[i] = piece;
    }
    return carve.used;
  }

  int first_layer(int64_t group) const { return int(share_of(count, group, wave.groups)); }

  template <class F>
  void over_layers(int64_t begin, int64_t end, const F& f) {
    for (int i = first_layer(begin); i < first_layer(end); ++i) f(i);
  }

  void work(int64_t begin, int64_t end) {
    over_layers(begin, end, [&](int i) { passes[i].prepare(memory[i]); });
    const int64_t extent = passes[first_layer(begin)].extent();  // the same for all layers
    for (int64_t from = 0; from < extent; from += wave.steps)
      for (int64_t group = begin; group < end; ++group) {
        const int64_t until = smaller(from + wave.steps, extent);
        if (group > 0) wait_for(progress[group - 1].done, until);
        over_layers(group, group + 1, [&](int i) { passes[i].advance(from, until); });
        __atomic_store_n(&progress[group].done, until, __ATOMIC_RELEASE);
      }
    over_layers(begin, end, [&](int i) { passes[i].finish(); });
  }
};
