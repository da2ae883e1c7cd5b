// Launches of the resident kernels, for kernels.h.
#pragma once

#include <type_traits>

#include "resident.cuh"

namespace fastrnn {
namespace cuda {

template <class Cell, class Storage>
struct Resident {
  static_assert(sizeof(Storage) <= 4, "float64 goes step by step");
  static constexpr Factors exact = sizeof(Storage) == 4            ? Factors::f32
                                   : std::is_same_v<Storage, Bf16> ? Factors::bf16
                                                                   : Factors::f16;

  // Calls f with the factors as a constant.
  template <class F>
  static auto with_factors(const Choice& choice, F&& f) {
    if constexpr (exact == Factors::f32)
      if (choice.sharing.factors == Factors::tf32) return f(std::integral_constant<Factors, Factors::tf32>{});
    return f(std::integral_constant<Factors, exact>{});
  }
  static Residence residence(const Choice& choice, const void* packed, void* exchange) {
    const auto* const weights = static_cast<const Quad*>(packed);
    Residence at;
    at.s = choice.sharing;
    at.path = int(choice.path);
    at.groups = choice.groups;
    at.packed[0] = weights;
    at.packed[1] = weights + choice.sharing.packed_quads();
    at.exchange = static_cast<char*>(exchange);
    return at;
  }

  static void pack(const Choice& choice, const Recurrence& r, void* packed, Stream stream) {
    const Residence at = residence(choice, packed, nullptr);
    LaunchShape shape;
    shape.threads = 256;
    shape.x = int((choice.sharing.packed_quads() + shape.threads - 1) / shape.threads);
    shape.y = r.D;
    with_factors(choice, [&](auto factors) {
      const auto kernel = choice.sharing.backward ? &pack_weights<Storage, factors.value, true>
                                                  : &pack_weights<Storage, factors.value, false>;
      launch(kernel, shape, stream, r, choice.sharing, const_cast<Quad*>(at.packed[0]),
             const_cast<Quad*>(at.packed[1]));
    });
  }
  static void forward(const Choice& choice, const Recurrence& r, const void* packed, void* exchange, Stream stream) {
    with_factors(choice, [&](auto factors) {
      launch(&resident_forward<Cell, Storage, factors.value>, choice.shape(), stream, r,
             residence(choice, packed, exchange));
    });
  }
  static void backward(const Choice& choice, const Recurrence& r, const void* packed, void* exchange, Stream stream) {
    with_factors(choice, [&](auto factors) {
      launch(&resident_backward<Cell, Storage, factors.value>, choice.shape(), stream, r,
             residence(choice, packed, exchange));
    });
  }
  static bool fits(const Choice& choice) {
    const LaunchShape shape = choice.shape();
    const int at_once = with_factors(choice, [&](auto factors) {
      const void* const kernel = choice.sharing.backward
                                     ? reinterpret_cast<const void*>(&resident_backward<Cell, Storage, factors.value>)
                                     : reinterpret_cast<const void*>(&resident_forward<Cell, Storage, factors.value>);
      return resident(kernel, shape);
    });
    return at_once >= (choice.path == Path::grid ? shape.x * shape.y : 1);
  }
};

}  // namespace cuda
}  // namespace fastrnn
