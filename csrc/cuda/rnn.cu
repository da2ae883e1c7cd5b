// The kernels of RNN, with tanh and with relu.
#include "cell_kernels.cuh"

namespace fastrnn {
namespace cuda {

const CellKernels& rnn_tanh_kernels(Dtype storage) { return CellTable<RnnTanh>::of[int(storage)]; }
const CellKernels& rnn_relu_kernels(Dtype storage) { return CellTable<RnnRelu>::of[int(storage)]; }

}  // namespace cuda
}  // namespace fastrnn
