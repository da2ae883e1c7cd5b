// Which instruction set runs: one table of kernels per tier, chosen by CPUID once, or forced.
#pragma once

#include "../problem.h"

namespace fastrnn {

struct Kernels {
  const char* isa;  // "scalar", "avx2", "avx512"
  int float_lanes;  // floats per vector
  void (*forward)(const Forward&, const Team&);
  void (*backward)(const Backward&, const Team&);
  // y[i] = function(x[i]): 0 sigmoid, 1 tanh; float or double. For the accuracy tests.
  void (*activation)(int function, Dtype dtype, const void* x, void* y, int64_t n);
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
}
#endif

// The tables this machine can run, narrowest first; returns how many (out holds up to 8).
int available(const Kernels** out);
// The table in use: the widest available, unless FASTRNN_ISA or force() says otherwise.
const Kernels& current();
// Selects a tier by name ("" goes back to the default); false when this machine cannot run it.
bool force(const char* isa);
// The value of FASTRNN_ISA when it names no tier this machine can run, else null: reported, never fatal.
const char* rejected_environment();

}  // namespace fastrnn
