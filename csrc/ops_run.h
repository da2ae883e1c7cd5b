// Where the operators meet the kernels: a problem runs on the device that its tensors are on.
#pragma once

#include <string>
#include <type_traits>
#include <vector>

#include "arguments.h"

#ifdef FASTRNN_CUDA
#include <torch/csrc/stable/accelerator.h>

#include "cuda/force.h"
#include "cuda/layer.h"

// Of libtorch_cuda: null under a torch without CUDA.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream);
#endif

namespace fastrnn {
namespace {

#ifdef FASTRNN_CUDA
// How the kernels are called for a problem, on the current stream of its device, which is the current one.
cuda::Call call_of(const Problem& p, const Layer& pass) {
  if (!aoti_torch_get_current_cuda_stream) fail("fastrnn: expected a torch with CUDA, got one without");
  cuda::Call call;
  succeed(aoti_torch_get_current_cuda_stream(p.place.index, &call.stream), "asking for the current stream");
  call.lengths = p.device_lengths.data;
  call.wide = p.device_lengths.wide;
  call.lengths_stride = p.device_lengths.stride;
  call.tf32 = pass.dtype == Dtype::f32 && pass.precision != Precision::exact;
  call.forced = cuda::forced_kernel_path();
  return call;
}

// Scratch memory comes from torch, which gives it to nobody on another stream before the call is through.
template <class Pass>
void run_on_gpu(const Problem& p, const Pass& pass) {
  const stable::accelerator::DeviceGuard guard(p.place.index);
  const cuda::Call call = call_of(p, pass);
  int64_t bytes;
  if constexpr (std::is_same_v<Pass, Forward>)
    bytes = cuda::forward_scratch(pass, call);
  else
    bytes = cuda::backward_scratch(pass, call);
  const Tensor scratch = empty({bytes}, aoti_torch_dtype_uint8(), p.place);
  if constexpr (std::is_same_v<Pass, Forward>)
    cuda::forward(pass, call, scratch.data_ptr());
  else
    cuda::backward(pass, call, scratch.data_ptr());
}
#endif

// Whether a GPU works on layers on top of each other, of which these are the first two (or, backward, the last two),
// side by side; and has it do so.
template <class Pass>
bool side_by_side([[maybe_unused]] const Problem& p, [[maybe_unused]] const Pass& one,
                  [[maybe_unused]] const Pass& other) {
#ifdef FASTRNN_CUDA
  if (p.place.on_cpu() || !one.B) return false;
  const stable::accelerator::DeviceGuard guard(p.place.index);
  const Pass two[] = {one, other};
  return cuda::side_by_side(two, 2, call_of(p, one));
#else
  return false;
#endif
}

template <class Pass>
void run_side_by_side([[maybe_unused]] const Problem& p, [[maybe_unused]] const std::vector<Pass>& layers) {
#ifdef FASTRNN_CUDA
  const stable::accelerator::DeviceGuard guard(p.place.index);
  const cuda::Call call = call_of(p, layers[0]);
  const int n = static_cast<int>(layers.size());
  int64_t bytes;
  if constexpr (std::is_same_v<Pass, Forward>)
    bytes = cuda::forward_scratch(layers.data(), n, call);
  else
    bytes = cuda::backward_scratch(layers.data(), n, call);
  const Tensor scratch = empty({bytes}, aoti_torch_dtype_uint8(), p.place);
  if constexpr (std::is_same_v<Pass, Forward>)
    cuda::forward(layers.data(), n, call, scratch.data_ptr());
  else
    cuda::backward(layers.data(), n, call, scratch.data_ptr());
#endif
}

void run([[maybe_unused]] const Problem& p, const Forward& f) {
  if (!f.B) return;
#ifdef FASTRNN_CUDA
  if (!p.place.on_cpu()) return run_on_gpu(p, f);
#endif
  current().forward(f, team());
}

void run([[maybe_unused]] const Problem& p, const Backward& b) {
  if (!b.B) return;
#ifdef FASTRNN_CUDA
  if (!p.place.on_cpu()) return run_on_gpu(p, b);
#endif
  current().backward(b, team());
}

// A contiguous [T, B, C] laid out as [B, T, C].
Tensor batch_major_copy(const Tensor& t, const Problem& p) {
  Tensor copy = empty_rows(t.size(0), t.size(1), t.size(2), true, dtype_of(t), p.place);
  return stable::copy_(copy, t);
}

}  // namespace
}  // namespace fastrnn
