// Instantiates the passes for every cell and compute type into one table for the ISA of the including file.
//
// Included with FASTRNN_NAMESPACE (and FASTRNN_ISA_AVX2 or FASTRNN_ISA_AVX512) set. Everything but the table lies in an
// anonymous namespace: no symbol built with wide instructions can be picked by the linker for another tier, and no
// standard header that defines inline functions is included.
#include <cstdint>
#if defined(FASTRNN_ISA_AVX2) || defined(FASTRNN_ISA_AVX512)
#include <immintrin.h>
#define FASTRNN_ISA_WIDE
#endif

#include "../cells.h"
#include "dispatch.h"
#include "plan.h"
#include "workspace.h"

namespace fastrnn::FASTRNN_NAMESPACE {
namespace {

// A register tile: so many sums leave registers for the operands. Tall tiles load the weights seldom; how tall is best,
// was measured, for panels of three vectors (GRU) and for the others.
#if defined(FASTRNN_ISA_AVX512)
constexpr int accumulators = 24, tall_rows = 8, tall_rows_of_three = 6;
#elif defined(FASTRNN_ISA_AVX2)
constexpr int accumulators = 12, tall_rows = 6, tall_rows_of_three = 4;
#else
constexpr int accumulators = 8, tall_rows = 2, tall_rows_of_three = 2;
#endif

// clang-format off: each builds on the one before
#include "vec.h"
#include "team.h"
#include "storage.h"
#include "operand.h"
#include "gemm.h"
#include "pack.h"
#include "layer.h"
#include "forward.h"
#include "gradients.h"
#include "watch.h"
#include "backward.h"
#include "stack.h"
#include "roofline.h"
// clang-format on

// Calls f(cell, value) with the types that a layer is computed by.
template <class F>
void with_types(const Layer& layer, const F& f) {
  for_each_cell([&](auto cell) {
    if (cell.kind != layer.cell) return;
    if (layer.dtype == Dtype::f64)
      f(cell, f64{});
    else
      f(cell, f32{});
  });
}

// Calls f(cell, value, operand) with the types of a pass: where `pairs`, bfloat16 is multiplied by pairs, and so is
// float32 where it may be rounded to that.
template <bool pairs, class F>
void with_operand(const Layer& layer, const F& f) {
  with_types(layer, [&](auto cell, auto v) {
    using V = decltype(v);
#if defined(FASTRNN_ISA_AVX512)
    if constexpr (pairs && sizeof(typename V::T) == 4)
      if (layer.dtype == Dtype::bf16 || (layer.dtype == Dtype::f32 && layer.precision == Precision::bf16))
        return f(cell, v, Pairs{});
#endif
    f(cell, v, Singles<V>{});
  });
}

template <bool pairs>
void run_forward(const Forward& problem, const Team& team) {
  with_operand<pairs>(problem, [&](auto cell, auto v, auto o) {
    ForwardPass<decltype(cell), decltype(v), decltype(o)>(problem).run(team);
  });
}

template <bool pairs>
void run_backward(const Backward& problem, const Team& team) {
  const auto run = [&](auto cell, auto v, auto o) {
    BackwardPass<decltype(cell), decltype(v), decltype(o)>(problem).run(team);
  };
  // What is handed out are single values.
  problem.operands.dgates ? with_operand<false>(problem, run) : with_operand<pairs>(problem, run);
}

template <bool pairs>
void run_forward_wavefront(const Forward* layers, int count, const Wavefront& wave, const Team& team) {
  with_operand<pairs>(layers[0], [&](auto cell, auto v, auto o) {
    StackPass<ForwardPass<decltype(cell), decltype(v), decltype(o)>, Forward>{layers, count, wave}.run(team);
  });
}

template <bool pairs>
void run_backward_wavefront(const Backward* layers, int count, const Wavefront& wave, const Team& team) {
  with_operand<pairs>(layers[0], [&](auto cell, auto v, auto o) {
    StackPass<BackwardPass<decltype(cell), decltype(v), decltype(o)>, Backward>{layers, count, wave}.run(team);
  });
}

// A pass over no steps, for what depends on the sizes of the weights alone.
template <bool pairs, class F>
void with_weights(const Layer& layer, const F& f) {
  Forward problem;
  static_cast<Layer&>(problem) = layer;
  with_operand<pairs>(layer, [&](auto cell, auto v, auto o) {
    ForwardPass<decltype(cell), decltype(v), decltype(o)> pass(problem);
    f(pass);
  });
}

template <bool pairs>
int64_t run_packed_size(const Layer& layer) {
  int64_t size = 0;
  with_weights<pairs>(layer, [&](auto& pass) { size = pass.packed_size(); });
  return size;
}

template <bool pairs>
void run_pack(const Layer& layer, int direction, void* to) {
  with_weights<pairs>(layer, [&](auto& pass) { pass.pack_direction(direction, static_cast<char*>(to)); });
}

template <class V>
void activate(int function, const void* from, void* to, int64_t n) {
  using T = typename V::T;
  for (int64_t i = 0; i < n; i += V::lanes) {
    const int lanes = int(smaller(V::lanes, n - i));
    const V x = V::load(static_cast<const T*>(from) + i, lanes);
    (function == 0 ? sigmoid(x) : tanh(x)).store(static_cast<T*>(to) + i, lanes);
  }
}

void run_activation(int function, Dtype dtype, const void* x, void* y, int64_t n) {
  if (dtype == Dtype::f64)
    activate<f64>(function, x, y, n);
  else
    activate<f32>(function, x, y, n);
}

template <bool pairs>
constexpr Kernels make_table(const char* isa) {
  return {isa,
          f32::lanes,
          fma_chains,
          run_forward<pairs>,
          run_backward<pairs>,
          run_forward_wavefront<pairs>,
          run_backward_wavefront<pairs>,
          run_packed_size<pairs>,
          run_pack<pairs>,
          run_activation,
          run_limit};
}

}  // namespace

#define FASTRNN_STRING(x) #x
#define FASTRNN_NAME(x) FASTRNN_STRING(x)
const Kernels table = make_table<false>(FASTRNN_NAME(FASTRNN_NAMESPACE));
#if defined(FASTRNN_ISA_AVX512)
const Kernels table_bf16 = make_table<true>(FASTRNN_NAME(FASTRNN_NAMESPACE) "_bf16");
#endif

}  // namespace fastrnn::FASTRNN_NAMESPACE
