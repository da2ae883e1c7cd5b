// What one thread of this machine can do at most, by this ISA's vectors: the work that _C.limit() times.
//
// No clock and no memory of its own: the caller brings both. What is returned depends on every operation, so nothing
// can be left out by the compiler.

// `rounds` fma in each of as many independent chains as the micro-kernel has accumulators: enough to hide their
// latency. Every chain tends to 1 from another start; no value overflows or becomes a denormal.
constexpr int fma_chains = accumulators;

double fma_work(int64_t rounds) {
  f32 chain[fma_chains];
#pragma GCC unroll 32
  for (int i = 0; i < fma_chains; ++i) chain[i] = f32::set(float(i + 2));
  const f32 factor = f32::set(0.75f), step = f32::set(0.25f);
  for (int64_t round = 0; round < rounds; ++round) {
#pragma GCC unroll 32
    for (int i = 0; i < fma_chains; ++i) chain[i] = fma(chain[i], factor, step);
  }
  f32 sum = f32::set(0);
#pragma GCC unroll 32
  for (int i = 0; i < fma_chains; ++i) sum = sum + chain[i];
  float lanes[f32::lanes];
  sum.store(lanes);
  return double(lanes[0]);
}

// Sums the n floats at `data` `passes` times over, in eight chains; n is a multiple of 8 * lanes.
double load_work(const float* data, int64_t n, int64_t passes) {
  constexpr int chains = 8;
  f32 chain[chains];
#pragma GCC unroll 8
  for (int i = 0; i < chains; ++i) chain[i] = f32::set(0);
  for (int64_t pass = 0; pass < passes; ++pass) {
    asm volatile("" : : "r"(data) : "memory");  // every pass reads again
    for (int64_t k = 0; k < n; k += chains * f32::lanes) {
#pragma GCC unroll 8
      for (int i = 0; i < chains; ++i) chain[i] = chain[i] + f32::load(data + k + i * f32::lanes);
    }
  }
  float lanes[f32::lanes];
  float total = 0;
  for (int i = 0; i < chains; ++i) {
    chain[i].store(lanes);
    total += lanes[0];
  }
  return double(total);
}

// See Kernels::limit in dispatch.h.
double run_limit(int what, const float* data, int64_t n, int64_t repeats) {
  return what == 0 ? fma_work(repeats) : load_work(data, n, repeats);
}
