// Which instruction set runs: one table of kernels per tier, chosen by CPUID once, or forced.
#pragma once

#include "../problem.h"
#include "plan.h"

namespace fastrnn {

struct Kernels {
  const char* isa;  // "scalar", "avx2", "avx512", "avx512_bf16", "amx"
  bool by_default;  // whether it is used unasked
  int float_lanes;  // floats per vector
  int fma_chains;   // vectors that limit(0, ...) works on
  // What a layer's forward pass is planned by; of the weights it asks for nothing.
  Units (*units)(const Layer&);
  void (*forward)(const Forward&, const Team&);
  void (*backward)(const Backward&, const Team&);
  // `count` layers as choose_wavefront said: each with the output of the one before as its input; and from the last to
  // the first, each with the dx of the one before as its dy.
  void (*forward_wavefront)(const Forward* layers, int count, const Wavefront&, const Team&);
  void (*backward_wavefront)(const Backward* layers, int count, const Wavefront&, const Team&);
  // Weights that are kept packed (Weights::packed): the bytes for one direction, and packing them. Of the layer, T, B
  // and x are not asked for.
  int64_t (*packed_size)(const Layer&);
  void (*pack)(const Layer&, int direction, void* to);
  // y[i] = function(x[i]): 0 sigmoid, 1 tanh; float or double. For the accuracy tests.
  void (*activation)(int function, Dtype dtype, const void* x, void* y, int64_t n);
  // The work by which this machine's limits are timed, on one thread: 0 `repeats` fma of each of fma_chains vectors,
  // 1 `repeats` sums of n floats (a multiple of 8 vectors), 2 (amx alone) `repeats` times four products of tiles. What
  // it returns means nothing, but must be used.
  double (*limit)(int what, const float* data, int64_t n, int64_t repeats);
};

namespace scalar {
extern const Kernels table;
}
#ifdef FASTRNN_X86
namespace avx2 {
extern const Kernels table;
}
namespace avx512 {
extern const Kernels table;
extern const Kernels table_bf16;  // with the instruction for pairs of bfloat16
}  // namespace avx512
namespace amx {
extern const Kernels table;
}
#endif

// The tables this machine can run, narrowest first; returns how many (out holds up to 8).
int available(const Kernels** out);
// The table in use: the widest available that has been timed on such a machine (amx has not), unless FASTRNN_ISA or
// force() says otherwise.
const Kernels& current();
// choose_split, forward, and choose_wavefront (plan.h) for the table in use: how a layer, or `count` of them, would be
// shared out.
Split plan_split(const Layer& layer, int threads);
Wavefront plan_wavefront(const Layer& first, const Layer& upper, int count, bool backward, int threads);
// How much of float32 the products of the table in use keep where torch's switch says "none", "ieee", "tf32" or "bf16".
Precision allowed_precision(const char* asked);
// Selects a tier by name ("" goes back to the default); false when this machine cannot run it.
bool force(const char* isa);
// The value of FASTRNN_ISA when it names no tier this machine can run, else null: reported, never fatal.
const char* rejected_environment();

}  // namespace fastrnn
