// The kernels for AVX-512 (F, BW, VL, DQ). Compiled with those flags, and called only where CPUID shows them. A second
// table, avx512_bf16, has forward passes that multiply bfloat16 itself, and is for where CPUID shows that too.
#define FASTRNN_NAMESPACE avx512
#define FASTRNN_ISA_AVX512
#include "kernels.inl"
