// The kernels that multiply by AMX's tiles. Compiled with AVX-512's flags, the instructions beyond them being text
// (tiles.h), and called only where CPUID shows AMX and the operating system grants it (dispatch.cpp).
#define FASTRNN_NAMESPACE amx
#define FASTRNN_ISA_AVX512
#define FASTRNN_ISA_AMX
#include "kernels.inl"
