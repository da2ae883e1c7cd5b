// torch.ops.fastrnn.*: the operators' schemas, and which device has which. What they do: ops_forward.h, ops_frozen.h,
// ops_backward.h; their arguments and the checks of them: arguments.h.
#include "ops_backward.h"
#include "ops_forward.h"
#include "ops_frozen.h"

STABLE_TORCH_LIBRARY(fastrnn, m) {
  m.def(
      "layer(str cell, Tensor input, Tensor? h0, Tensor? c0, Tensor[] weights, Tensor? batch_sizes, Tensor? lengths, "
      "Tensor? reset, bool bidirectional, bool batch_major, bool all_states, bool save, int precision=0, "
      "Tensor? h_reset=None, Tensor? c_reset=None) -> (Tensor output, Tensor h_n, Tensor c_n, Tensor h_all, Tensor "
      "c_all, Tensor tape)");
  m.def(
      "stack(str cell, Tensor input, Tensor? h0, Tensor? c0, Tensor[] weights, Tensor? batch_sizes, Tensor? lengths, "
      "Tensor? reset, bool bidirectional, bool batch_major, int num_layers, int saved_from, int precision=0, "
      "Tensor? h_reset=None, Tensor? c_reset=None) -> (Tensor output, Tensor h_n, Tensor c_n, Tensor[] saved)");
  m.def("pack(str cell, Tensor[] weights, bool bidirectional, int num_layers, int precision=0) -> Tensor");
  m.def(
      "frozen(Tensor packed, Tensor input, Tensor? h0=None, Tensor? c0=None, bool batch_first=False, Tensor? "
      "batch_sizes=None, Tensor? lengths=None, Tensor? reset=None, Tensor? h_reset=None, Tensor? c_reset=None) "
      "-> (Tensor output, Tensor h_n, Tensor c_n)");
  m.def(
      "step(str cell, Tensor input, Tensor? h0, Tensor? c0, Tensor[] weights, bool save, int precision=0) "
      "-> (Tensor h, Tensor c, Tensor tape)");
  m.def(
      "step_(Tensor(a!) h, Tensor(b!)? c, str cell, Tensor input, Tensor[] weights, Tensor? packed, int num_layers, "
      "Tensor? reset=None, Tensor? h_reset=None, Tensor? c_reset=None, int precision=0) -> ()");
  m.def(
      "layer_backward(str cell, Tensor input, Tensor? h0, Tensor? c0, Tensor[] weights, Tensor? batch_sizes, "
      "Tensor? lengths, Tensor? reset, Tensor tape, Tensor? d_output, Tensor? d_h_n, Tensor? d_c_n, Tensor? d_h_all, "
      "Tensor? d_c_all, bool bidirectional, bool batch_major, bool[] needs, int precision=0, Tensor? h_reset=None, "
      "Tensor? c_reset=None, int watch=0) -> Tensor[]");
  m.def(
      "layer_operands(str cell, Tensor input, Tensor? h0, Tensor? c0, Tensor[] weights, Tensor? batch_sizes, "
      "Tensor? lengths, Tensor? reset, Tensor tape, Tensor? d_output, Tensor? d_h_n, Tensor? d_c_n, Tensor? d_h_all, "
      "Tensor? d_c_all, bool bidirectional, bool batch_major, bool[] needs, Tensor? h_reset=None, "
      "Tensor? c_reset=None) -> Tensor[]");
  m.def(
      "stack_backward(str cell, Tensor input, Tensor? h0, Tensor? c0, Tensor[] weights, Tensor? batch_sizes, "
      "Tensor? lengths, Tensor? reset, Tensor[] saved, Tensor? d_output, Tensor? d_h_n, Tensor? d_c_n, "
      "bool bidirectional, bool batch_major, int num_layers, bool[] needs, int precision=0, Tensor? h_reset=None, "
      "Tensor? c_reset=None, int watch=0) -> Tensor[]");
}

namespace {

// The operators that every device has: they run where their tensors are (ops_run.h).
void implement(torch::stable::detail::StableLibrary& m) {
  m.impl("layer", &fastrnn::layer);
  m.impl("stack", &fastrnn::stack);
  m.impl("step", &fastrnn::step);
  m.impl("layer_backward", &fastrnn::layer_backward);
  m.impl("layer_operands", &fastrnn::layer_operands);
  m.impl("stack_backward", &fastrnn::stack_backward);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastrnn, CPU, m) {
  implement(m);
  m.impl("pack", &fastrnn::pack);
  m.impl("frozen", &fastrnn::frozen);
  m.impl("step_", &fastrnn::step_onto);
}

#ifdef FASTRNN_CUDA
STABLE_TORCH_LIBRARY_IMPL(fastrnn, CUDA, m) { implement(m); }
#endif
