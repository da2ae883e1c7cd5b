// The kernels in plain C++, one value at a time: the oracle, and the tier of every machine.
#define FASTRNN_NAMESPACE scalar
#include "kernels.inl"
