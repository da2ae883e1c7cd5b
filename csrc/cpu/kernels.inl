// Instantiates the passes for every cell and compute type into one table for the ISA of the including file.
//
// Included with FASTRNN_NAMESPACE (and FASTRNN_ISA_AVX2 or FASTRNN_ISA_AVX512, or with the latter FASTRNN_ISA_AMX) set.
// With AMX, a table whose kernels go by tiles, and hand what those do not serve to avx512's. Everything but the table
// lies in an anonymous namespace: no symbol built with wide instructions can be picked by the linker for another tier,
// and no standard header that defines inline functions is included.
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
// was measured, for panels of three vectors (GRU) and for the others. broadcasts_in_fma: one instruction reads a value,
// broadcasts and multiplies it.
#if defined(FASTRNN_ISA_AVX512)
constexpr bool broadcasts_in_fma = true;
constexpr int accumulators = 24, tall_rows = 8, tall_rows_of_three = 6;
#elif defined(FASTRNN_ISA_AVX2)
constexpr bool broadcasts_in_fma = false;
constexpr int accumulators = 12, tall_rows = 6, tall_rows_of_three = 4;
#else
constexpr bool broadcasts_in_fma = false;
constexpr int accumulators = 8, tall_rows = 2, tall_rows_of_three = 2;
#endif

// clang-format off: each builds on the one before
#include "vec.h"
#include "team.h"
#include "storage.h"
#include "operand.h"
#include "gemm.h"
#include "pack.h"
#ifdef FASTRNN_ISA_AMX
#include "tiles.h"
#endif
#include "layer.h"
#include "forward.h"
#include "forward_step.h"
#include "forward_lanes.h"
#include "gradients.h"
#include "watch.h"
#include "bands.h"
#include "backward.h"
#include "backward_memory.h"
#include "backward_step.h"
#include "backward_chunk.h"
#ifdef FASTRNN_ISA_AMX
#include "tiled_passes.h"
#endif
#include "stack.h"
#ifndef FASTRNN_ISA_AMX
#include "roofline.h"
#endif
// clang-format on

// What float32 and bfloat16 are multiplied as (operand.h).
enum class Products { singles, pairs, tiles };

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

FASTRNN_INLINE bool rounds_to_bf16(const Layer& layer) {
  return layer.dtype == Dtype::bf16 || (layer.dtype == Dtype::f32 && layer.precision == Precision::bf16);
}

// Calls f(cell, value, operand) with the types of a pass: by pairs go bfloat16, and float32 where it may be rounded to
// that; by tiles those as well, and float32 in as many pieces as its precision wants.
template <Products products, class F>
void with_operand(const Layer& layer, const F& f) {
#if defined(FASTRNN_ISA_AMX)
  static_assert(products == Products::tiles);
  for_each_cell([&](auto cell) {
    if (cell.kind != layer.cell) return;
    if (rounds_to_bf16(layer))
      f(cell, f32{}, Tiles<1>{});
    else if (layer.precision == Precision::tf32)
      f(cell, f32{}, Tiles<2>{});
    else
      f(cell, f32{}, Tiles<3>{});
  });
#else
  with_types(layer, [&](auto cell, auto v) {
    using V = decltype(v);
#if defined(FASTRNN_ISA_AVX512)
    if constexpr (products == Products::pairs && sizeof(typename V::T) == 4)
      if (rounds_to_bf16(layer)) return f(cell, v, Pairs{});
#endif
    f(cell, v, Singles<V>{});
  });
#endif
}

template <Products products>
Units plan_units(const Layer& layer) {
  Units units{};
  with_operand<products>(layer, [&](auto cell, auto v, auto o) {
    units = units_of<decltype(v), decltype(o)>(Packed<decltype(v), decltype(cell)::gates>::U);
  });
  return units;
}

template <Products products>
void run_forward(const Forward& problem, const Team& team) {
  with_operand<products>(problem, [&](auto cell, auto v, auto o) {
    ForwardPass<decltype(cell), decltype(v), decltype(o)>(problem).run(team);
  });
}

template <Products products>
void run_backward(const Backward& problem, const Team& team) {
  const auto run = [&](auto cell, auto v, auto o) {
    BackwardPass<decltype(cell), decltype(v), decltype(o)>(problem).run(team);
  };
  if constexpr (products == Products::pairs)
    if (problem.operands.dgates) return with_operand<Products::singles>(problem, run);
  with_operand<products>(problem, run);
}

template <Products products>
void run_forward_wavefront(const Forward* layers, int count, const Wavefront& wave, const Team& team) {
  with_operand<products>(layers[0], [&](auto cell, auto v, auto o) {
    StackPass<ForwardPass<decltype(cell), decltype(v), decltype(o)>, Forward>{layers, count, wave}.run(team);
  });
}

template <Products products>
void run_backward_wavefront(const Backward* layers, int count, const Wavefront& wave, const Team& team) {
  with_operand<products>(layers[0], [&](auto cell, auto v, auto o) {
    StackPass<BackwardPass<decltype(cell), decltype(v), decltype(o)>, Backward>{layers, count, wave}.run(team);
  });
}

// A pass over no steps, for what depends on the sizes of the weights alone.
template <Products products, class F>
void with_weights(const Layer& layer, const F& f) {
  Forward problem;
  static_cast<Layer&>(problem) = layer;
  with_operand<products>(layer, [&](auto cell, auto v, auto o) {
    ForwardPass<decltype(cell), decltype(v), decltype(o)> pass(problem);
    f(pass);
  });
}

template <Products products>
int64_t run_packed_size(const Layer& layer) {
  int64_t size = 0;
  with_weights<products>(layer, [&](auto& pass) { size = pass.packed_size(); });
  return size;
}

template <Products products>
void run_pack(const Layer& layer, int direction, void* to) {
  with_weights<products>(layer, [&](auto& pass) { pass.pack_direction(direction, static_cast<char*>(to)); });
}

#if !defined(FASTRNN_ISA_AMX)

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

template <Products products>
constexpr Kernels make_table(const char* isa) {
  return {isa,
          true,
          f32::lanes,
          fma_chains,
          plan_units<products>,
          run_forward<products>,
          run_backward<products>,
          run_forward_wavefront<products>,
          run_backward_wavefront<products>,
          run_packed_size<products>,
          run_pack<products>,
          run_activation,
          run_limit};
}

#else
#include "amx_table.h"
#endif

}  // namespace

#define FASTRNN_STRING(x) #x
#define FASTRNN_NAME(x) FASTRNN_STRING(x)
#if defined(FASTRNN_ISA_AMX)
const Kernels table = make_table();
#else
const Kernels table = make_table<Products::singles>(FASTRNN_NAME(FASTRNN_NAMESPACE));
#endif
#if defined(FASTRNN_ISA_AVX512) && !defined(FASTRNN_ISA_AMX)
const Kernels table_bf16 = make_table<Products::pairs>(FASTRNN_NAME(FASTRNN_NAMESPACE) "_bf16");
#endif

}  // namespace fastrnn::FASTRNN_NAMESPACE
