// Workers that advance together: barriers, and a team that runs them.

// Those who arrive wait until everyone has. Counts instead of threads: a thread that advances several workers arrives
// for all of them, and only then waits.
struct alignas(64) Barrier {
  int arrived, epoch;  // zero at first
};

// Says that `count` of `all` workers are here; returns what to wait for.
FASTRNN_INLINE int arrive(Barrier& b, int count, int all) {
  const int epoch = __atomic_load_n(&b.epoch, __ATOMIC_RELAXED);
  if (__atomic_add_fetch(&b.arrived, count, __ATOMIC_ACQ_REL) == all) {
    __atomic_store_n(&b.arrived, 0, __ATOMIC_RELAXED);
    __atomic_store_n(&b.epoch, epoch + 1, __ATOMIC_RELEASE);
  }
  return epoch;
}

// Spins for a while, for the others are at most a step behind, then lets other threads run: there may be fewer cores
// than workers.
template <class F>
FASTRNN_INLINE void spin_until(const F& done) {
  constexpr int patience = 2000;
  for (int spins = 0; !done(); ++spins) {
    if (spins > patience) {
      yield_thread();
      continue;
    }
#ifdef FASTRNN_X86
    __builtin_ia32_pause();
#endif
  }
}

static void wait(const Barrier& b, int epoch) {
  spin_until([&] { return __atomic_load_n(&b.epoch, __ATOMIC_ACQUIRE) != epoch; });
}

// Until a count that another thread raises has come to `least`.
static void wait_for(const int64_t& count, int64_t least) {
  spin_until([&] { return __atomic_load_n(&count, __ATOMIC_ACQUIRE) >= least; });
}

// Runs f(begin, end) over n workers.
template <class F>
static void run_team(const Team& team, int64_t n, const F& f) {
  if (team.size <= 1 || n <= 1) {
    f(int64_t(0), n);
    return;
  }
  team.run(
      team.context, n,
      [](void* argument, int64_t begin, int64_t end) {
        if (begin < end) (*static_cast<const F*>(argument))(begin, end);  // nobody waits for an empty hand
      },
      const_cast<void*>(static_cast<const void*>(&f)));
}

// Which part of a layer's recurrence a worker has. Workers beyond split.recurrent() have none.
struct Place {
  int direction;  // the first of its directions
  int slice, part;
  bool idle;

  Place(const Split& split, int64_t worker) {
    const int group = split.slices * split.parts, within = int(worker % group);
    idle = worker >= split.recurrent();
    direction = split.directions == 2 ? int(worker / group) : 0;
    slice = within / split.parts;
    part = within % split.parts;
  }
};

// Worker `i` of n gets [cut(0), cut(1)) of `all` items: even shares, in order.
FASTRNN_INLINE int64_t share_of(int64_t all, int64_t i, int64_t n) { return all * i / n; }
