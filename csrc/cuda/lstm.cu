// The kernels of LSTM.
#include "cell_kernels.cuh"

namespace fastrnn {
namespace cuda {

const CellKernels& lstm_kernels(Dtype storage) { return CellTable<Lstm>::of[int(storage)]; }

}  // namespace cuda
}  // namespace fastrnn
