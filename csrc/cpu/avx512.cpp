// The kernels for AVX-512 (F, BW, VL, DQ). Compiled with those flags, and called only where CPUID shows them.
#define FASTRNN_NAMESPACE avx512
#define FASTRNN_ISA_AVX512
#include "kernels.inl"
