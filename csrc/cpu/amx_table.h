// The table of the AMX tier: which layers go by tiles, and how those that do not reach avx512's kernels.

// Fewer rows than this are bound by reading the weights, of which tiles read more; of fewer hidden units most of a tile
// is padding. From the published rates of the instructions, to be measured. The number of steps has no say: a sequence
// in pieces is to give the same bits as the whole.
constexpr int64_t least_rows = 8, least_units = 32;

// Whether a matrix of weights has a value that is large enough for the small ones beside it not to matter. Trained
// weights have one among the first few.
static bool is_ordinary(const void* weights, Dtype dtype, int64_t n) {
  const Storage<f32> storage(dtype);
  for (int64_t i = 0; i < n; i += f32::lanes) {
    const f32 x = absolute(Storage<f32>::load(storage, bytes(weights) + i * storage.size, n - i));
    if (_mm512_cmp_ps_mask(x.v, _mm512_set1_ps(least_weight), _CMP_GE_OQ)) return true;
  }
  return n == 0;
}
static bool has_ordinary_weights(const Layer& p, int d) {
  const int64_t rows = traits(p.cell).gates * p.H;
  return is_ordinary(p.weights[d].w_ih, p.dtype, rows * p.I) && is_ordinary(p.weights[d].w_hh, p.dtype, rows * p.P);
}

// Kept weights: this, then what avx512's kernels read, then tiles.
struct alignas(64) Kept {
  int64_t tiles;  // where they begin, from here on; 0: they do not serve
};

static bool multiplies_floats(const Layer& p) { return p.dtype == Dtype::f32 || p.dtype == Dtype::bf16; }

static bool suits_tiles(const Layer& p) { return multiplies_floats(p) && p.B >= least_rows && p.H >= least_units; }

static bool tiles_serve(const Layer& p) {
  if (!suits_tiles(p)) return false;
  for (int d = 0; d < p.D; ++d) {
    const void* packed = p.weights[d].packed;
    if (packed ? static_cast<const Kept*>(packed)->tiles == 0 : !has_ordinary_weights(p, d)) return false;
  }
  return true;
}
static bool tiles_serve(const Backward& p) {
  return tiles_serve(static_cast<const Layer&>(p)) && p.operands.dgates == nullptr && p.operands.h_prev == nullptr;
}

// The problem with its kept weights where the kernels that are to run look for them.
template <class Problem>
static Problem located(const Problem& problem, bool tiled) {
  Problem moved = problem;
  for (int d = 0; d < moved.D; ++d)
    if (const void*& packed = moved.weights[d].packed)
      packed = bytes(packed) + (tiled ? static_cast<const Kept*>(packed)->tiles : int64_t(sizeof(Kept)));
  return moved;
}

static const Kernels& vectors() { return avx512::table_bf16; }

static Units units(const Layer& layer) {
  return suits_tiles(layer) ? plan_units<Products::tiles>(layer) : vectors().units(layer);
}

static void forward(const Forward& problem, const Team& team) {
  const bool tiled = tiles_serve(problem);
  const Forward here = located(problem, tiled);
  tiled ? run_forward<Products::tiles>(here, team) : vectors().forward(here, team);
}

static void backward(const Backward& problem, const Team& team) {
  tiles_serve(problem) ? run_backward<Products::tiles>(problem, team) : vectors().backward(problem, team);
}

// How many of the layers tiles serve: 0, some, all.
template <class Problem>
static int count_served(const Problem* layers, int count) {
  int served = 0;
  for (int i = 0; i < count; ++i) served += tiles_serve(layers[i]);
  return served;
}

static void forward_wavefront(const Forward* layers, int count, const Wavefront& wave, const Team& team) {
  const int served = count_served(layers, count);
  if (served > 0 && served < count) {  // a wavefront is of one kind
    for (int i = 0; i < count; ++i) forward(layers[i], team);
    return;
  }
  auto* here = static_cast<Forward*>(__builtin_alloca(size_t(count) * sizeof(Forward)));
  for (int i = 0; i < count; ++i) here[i] = located(layers[i], served > 0);
  served ? run_forward_wavefront<Products::tiles>(here, count, wave, team)
         : vectors().forward_wavefront(here, count, wave, team);
}

static void backward_wavefront(const Backward* layers, int count, const Wavefront& wave, const Team& team) {
  const int served = count_served(layers, count);
  if (served > 0 && served < count)
    for (int i = 0; i < count; ++i) backward(layers[i], team);
  else if (served)
    run_backward_wavefront<Products::tiles>(layers, count, wave, team);
  else
    vectors().backward_wavefront(layers, count, wave, team);
}

static int64_t tiles_begin(const Layer& layer) {
  return round_up(int64_t(sizeof(Kept)) + vectors().packed_size(layer), 64);
}

static int64_t packed_size(const Layer& layer) {
  return tiles_begin(layer) + (multiplies_floats(layer) ? run_packed_size<Products::tiles>(layer) : 0);
}

static void pack(const Layer& layer, int direction, void* to) {
  const bool served = multiplies_floats(layer) && has_ordinary_weights(layer, direction);
  const int64_t begin = tiles_begin(layer);
  static_cast<Kept*>(to)->tiles = served ? begin : 0;
  vectors().pack(layer, direction, bytes(to) + sizeof(Kept));
  if (served) run_pack<Products::tiles>(layer, direction, bytes(to) + begin);
}

static void activation(int function, Dtype dtype, const void* x, void* y, int64_t n) {
  vectors().activation(function, dtype, x, y, n);
}

// Multiplies tiles that stay where they are, four sums in turn.
static double tile_work(int64_t rounds) {
  [[maybe_unused]] const TileSession session;
  configure_tiles<2>(tile_height);
  alignas(64) float words[tile_floats] = {};
  times<8>([&](auto i) { tile_load<decltype(i)::value>(words, 64); });
  for (int64_t round = 0; round < rounds; ++round) {
    tile_multiply<0, 4, 6>();
    tile_multiply<1, 4, 7>();
    tile_multiply<2, 5, 6>();
    tile_multiply<3, 5, 7>();
  }
  tile_store<0>(words, 64);
  return double(words[0]);
}

static double limit(int what, const float* data, int64_t n, int64_t repeats) {
  return what == 2 ? tile_work(repeats) : vectors().limit(what, data, n, repeats);
}

// A constant: nothing of this library may run where a machine loads it that lacks its instructions.
static constexpr Kernels make_table() {
  return {"amx",       false, f32::lanes, accumulators, units, forward, backward, forward_wavefront, backward_wavefront,
          packed_size, pack,  activation, limit};
}
