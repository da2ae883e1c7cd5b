// The few things that host code asks of a GPU: memory set, kernels launched, matrices multiplied, facts about the card.
// runtime.cpp does them by the CUDA runtime (linked statically) and by torch's cuBLAS (found at run time);
// tests/csrc/emulator.cpp does them on the CPU. Everything is put on a stream and nobody waits. Errors are
// std::runtime_error with CUDA's own words.
#pragma once

#include <cstddef>
#include <cstdint>
#include <utility>

#include "../problem.h"

namespace fastrnn {
namespace cuda {

using Stream = void*;  // cudaStream_t

struct LaunchShape {
  int x = 1, y = 1, z = 1;   // blocks
  int threads = 1;           // of a block
  int shared_bytes = 0;      // dynamic shared memory of a block
  int cluster = 1;           // blocks of a cluster, along x
  bool cooperative = false;  // all blocks run at the same time, or the launch fails
};

// The current device. All zero where there is none.
struct Card {
  int arch = 0;  // 90 for compute capability 9.0
  int processors = 0;
  int shared_bytes = 0;  // of dynamic shared memory that one block can have
};
const Card& card();

// `kernel` is a function pointer to a __global__ function, `arguments` pointers to its arguments. `call` calls it with
// them as one thread: for the emulator, which has to know its type; a card does not.
using KernelCall = void (*)(const void* kernel, void** arguments);
void launch(const void* kernel, KernelCall call, const LaunchShape& shape, Stream stream, void** arguments);
// How many blocks of that shape, or clusters of them, run at the same time; 0 when none can.
int resident(const void* kernel, const LaunchShape& shape);

template <class... Parameters, size_t... I>
void call_kernel(const void* kernel, void** arguments, std::index_sequence<I...>) {
  reinterpret_cast<void (*)(Parameters...)>(const_cast<void*>(kernel))(*static_cast<Parameters*>(arguments[I])...);
}
template <class... Parameters>
void call_kernel(const void* kernel, void** arguments) {
  call_kernel<Parameters...>(kernel, arguments, std::index_sequence_for<Parameters...>());
}

template <class... Parameters, class... Given>
void launch(void (*kernel)(Parameters...), const LaunchShape& shape, Stream stream, const Given&... given) {
  const auto call = [&](Parameters... values) {
    void* arguments[] = {static_cast<void*>(&values)...};
    launch(reinterpret_cast<const void*>(kernel), call_kernel<Parameters...>, shape, stream, arguments);
  };
  call(given...);
}

void set_zero(void* data, size_t bytes, Stream stream);

// Streams beside the caller's: number i of the calling thread's, on the current device. They too can be captured, once
// they follow one that is.
Stream side_stream(int i);
// What is put on `later` from now on comes after what is on `earlier` now.
void follow(Stream later, Stream earlier);

// A row-major matrix of `rows` rows, each `stride` elements after the one before; or its transpose.
struct Matrix {
  const void* data;
  Dtype dtype;
  int64_t stride;
  bool transposed = false;
};

// C [m, n] = A [m, k] B [k, n], or with `add` C += A B, as cublasGemmEx does it: 16-bit values with sums in float32
// (and C of either), float32 exactly or, if `tf32`, of rounded values, float64. A fixed order of summation: `scratch`
// is memory of scratch_bytes for cuBLAS, which must not be used by anybody else on another stream.
struct Product {
  int64_t m, n, k;
  Matrix a, b;
  void* c;
  Dtype c_dtype;
  int64_t c_stride;
  bool add = false;
  bool tf32 = false;
};
constexpr size_t scratch_bytes = size_t(32) << 20;
void multiply(const Product& product, void* scratch, Stream stream);

}  // namespace cuda
}  // namespace fastrnn
