// The kernels for AVX2, FMA and F16C. Compiled with those flags, and called only where CPUID shows them.
#define FASTRNN_NAMESPACE avx2
#define FASTRNN_ISA_AVX2
#include "kernels.inl"
