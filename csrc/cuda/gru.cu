// The kernels of GRU.
#include "cell_kernels.cuh"

namespace fastrnn {
namespace cuda {

const CellKernels& gru_kernels(Dtype storage) { return CellTable<Gru>::of[int(storage)]; }

}  // namespace cuda
}  // namespace fastrnn
