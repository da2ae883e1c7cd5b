// A CUDA device made of host memory, for a torch without CUDA: tensors that say they are on "cuda:0", on which torch's
// own operators are those of the CPU, and fastrnn's run by the emulator. To be loaded before torch, with RTLD_GLOBAL.
#include <ATen/EmptyTensor.h>
#include <ATen/core/stack.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <ATen/native/TensorFactories.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/empty_strided.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/view_native.h>
#include <ATen/ops/zeros.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>

namespace at {

// What torch asks of a machine with CUDA; the registry finds it by this name.
struct CUDAHooks : CUDAHooksInterface {
  explicit CUDAHooks(CUDAHooksArgs) {}
  void init() const override {}
  bool hasCUDA() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  DeviceIndex deviceCount() const override { return 1; }
  DeviceIndex getCurrentDevice() const override { return 0; }
  int getNumGPUs() const override { return 1; }
  bool isPinnedPtr(const void*) const override { return false; }
};

REGISTER_CUDA_HOOKS(CUDAHooks)

}  // namespace at

namespace c10::impl {

struct Guard : NoOpDeviceGuardImpl<DeviceType::CUDA> {
  Device exchangeDevice(Device) const override { return one(); }
  Device getDevice() const override { return one(); }
  Stream getStream(Device) const noexcept override { return stream(); }
  Stream getNewStream(Device, int) const override { return stream(); }
  Stream exchangeStream(Stream) const noexcept override { return stream(); }
  void record(void**, const Stream&, const DeviceIndex, const EventFlag) const override {}
  void block(void*, const Stream&) const override {}
  bool queryEvent(void*) const override { return true; }

 private:
  static Device one() { return Device(DeviceType::CUDA, 0); }
  static Stream stream() { return Stream(Stream::DEFAULT, one()); }
};

C10_REGISTER_GUARD_IMPL(CUDA, Guard)

}  // namespace c10::impl

// The stream is nobody's.
extern "C" __attribute__((visibility("default"))) int32_t aoti_torch_get_current_cuda_stream(int32_t, void** stream) {
  *stream = nullptr;
  return 0;
}

namespace {

using at::IntArrayRef;
using at::Tensor;
using c10::Device;
using c10::DeviceType;
using c10::IValue;

const Device gpu(DeviceType::CUDA, 0);

// The same memory, said to be elsewhere; it lives as long as `t`.
Tensor elsewhere(const Tensor& t, Device device) {
  if (!t.defined() || t.device() == device) return t;
  return at::for_blob(t.data_ptr(), t.sizes())
      .strides(t.strides())
      .deleter([t](void*) {})
      .options(t.options().device(device))
      .target_device(device)
      .make_tensor();
}
Tensor on_host(const Tensor& t) { return elsewhere(t, Device(DeviceType::CPU)); }

Tensor empty_strided(IntArrayRef sizes, IntArrayRef strides, std::optional<at::ScalarType> dtype,
                     std::optional<at::Layout>, std::optional<Device>, std::optional<bool>) {
  const auto options = at::TensorOptions().dtype(dtype.value_or(at::kFloat));
  return elsewhere(at::empty_strided(sizes, strides, options), gpu);
}
Tensor empty(IntArrayRef sizes, std::optional<at::ScalarType> dtype, std::optional<at::Layout>, std::optional<Device>,
             std::optional<bool>, std::optional<at::MemoryFormat> format) {
  const auto options = at::TensorOptions().dtype(dtype.value_or(at::kFloat));
  return elsewhere(at::empty(sizes, options.memory_format(format)), gpu);
}
Tensor& copy_(Tensor& self, const Tensor& from, bool) {
  on_host(self).copy_(on_host(from));
  return self;
}
Tensor view(const Tensor& self, IntArrayRef sizes) { return at::native::view(self, sizes); }
Tensor as_strided(const Tensor& self, IntArrayRef sizes, IntArrayRef strides, std::optional<int64_t> offset) {
  return at::native::as_strided_tensorimpl(self, sizes, strides, offset);
}

// A result without memory yet, which gets its size from the operator.
bool grows(const c10::Argument& argument, const Tensor& t) {
  const auto* alias = argument.alias_info();
  return alias && alias->isWrite() && t.defined() && t.is_cuda() && t.numel() == 0;
}

// Zeros that the derivatives have where there is nothing; torch's have no memory.
Tensor zeros(IntArrayRef sizes, std::optional<at::ScalarType> dtype, std::optional<at::Layout>, std::optional<Device>,
             std::optional<bool>) {
  return elsewhere(at::zeros(sizes, at::TensorOptions().dtype(dtype.value_or(at::kFloat))), gpu);
}

// Any other operator of torch: the CPU's, on the same memory. What it returns is an argument that it has written to, or
// new. What fastrnn has not for CUDA stays missing.
void by_host(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const auto& schema = op.schema();
  TORCH_CHECK_NOT_IMPLEMENTED(schema.name().rfind("fastrnn::", 0) != 0, "no CUDA kernel of ", schema.name());
  const size_t count = schema.arguments().size(), begin = stack->size() - count;
  const std::vector<IValue> given(stack->begin() + begin, stack->end());
  for (size_t i = begin; i < stack->size(); ++i) {
    IValue& value = (*stack)[i];
    if (value.isTensor()) {
      const Tensor t = value.toTensor();
      value =
          grows(schema.arguments()[i - begin], t) ? at::empty({0}, t.options().device(DeviceType::CPU)) : on_host(t);
    } else if (value.isTensorList()) {
      std::vector<Tensor> list;
      for (const Tensor& t : value.toTensorVector()) list.push_back(on_host(t));
      value = list;
    } else if (value.isList() || value.isOptionalTensorList()) {
      c10::impl::GenericList list = value.toList().copy();
      for (size_t k = 0; k < list.size(); ++k) {
        const IValue element = list.get(k);
        if (element.isTensor()) list.set(k, on_host(element.toTensor()));
      }
      value = list;
    } else if (value.isDevice()) {
      value = Device(DeviceType::CPU);
    }
  }
  op.redispatchBoxed(c10::DispatchKeySet(c10::DispatchKey::CPU), stack);
  const size_t results = schema.returns().size(), first = stack->size() - results;
  for (size_t i = 0; i < results; ++i) {
    IValue& value = (*stack)[first + i];
    const auto* alias = schema.returns()[i].alias_info();
    if (alias && alias->isWrite()) {
      for (size_t k = 0; k < count; ++k) {
        const auto* of_argument = schema.arguments()[k].alias_info();
        if (!of_argument || !(*of_argument == *alias)) continue;
        if (grows(schema.arguments()[k], given[k].toTensor())) {
          const Tensor grown = elsewhere(value.toTensor(), gpu);
          auto* impl = given[k].toTensor().unsafeGetTensorImpl();
          impl->set_storage_keep_dtype(grown.storage());
          impl->set_sizes_and_strides(grown.sizes(), grown.strides());
        }
        value = given[k];
      }
    } else if (value.isTensor()) {
      value = elsewhere(value.toTensor(), gpu);
    } else if (value.isTensorList()) {
      std::vector<Tensor> list;
      for (const Tensor& t : value.toTensorVector()) list.push_back(elsewhere(t, gpu));
      value = list;
    }
  }
}

TORCH_LIBRARY_IMPL(_, CUDA, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&by_host>()); }

TORCH_LIBRARY_IMPL(aten, CUDA, m) {
  m.impl("empty.memory_format", empty);
  m.impl("empty_strided", empty_strided);
  m.impl("_efficientzerotensor", zeros);
  m.impl("copy_", copy_);
  m.impl("view", view);
  m.impl("as_strided", as_strided);
}

}  // namespace
