// The door to torch, for arguments.h and the operators: dtypes, devices, tensors and boxed arguments over the stable
// ABI, so that what is built here runs under every torch from 2.11 on.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <initializer_list>
#include <optional>
#include <sstream>
#include <string>
#include <vector>

#include "cpu/plan.h"
#include "cpu/workspace.h"
#include "errors.h"
#include "problem.h"
#include "threads.h"

namespace fastrnn {
namespace {

namespace stable = torch::stable;
using stable::Tensor;

// ---------------------------------------------------------------------------------------------------------- shapes

// A shape without an allocation: every call makes and checks a dozen.
struct Shape {
  int64_t sizes[4];
  int64_t dim;
  Shape(std::initializer_list<int64_t> list) : dim(static_cast<int64_t>(list.size())) {
    std::copy(list.begin(), list.end(), sizes);
  }
  explicit Shape(const Tensor& checked) : dim(checked.dim()) { std::copy_n(checked.sizes().data(), dim, sizes); }
  bool operator==(const Tensor& t) const { return t.dim() == dim && std::equal(sizes, sizes + dim, t.sizes().data()); }
};

std::string text_of(const int64_t* sizes, int64_t n) {
  std::ostringstream text;
  text << "(";
  for (int64_t i = 0; i < n; ++i) text << (i ? ", " : "") << sizes[i];
  text << (n == 1 ? ",)" : ")");
  return text.str();
}

std::string shape_of(const Tensor& t) { return text_of(t.sizes().data(), t.dim()); }

// ---------------------------------------------------------------------------------------------------------- dtypes

struct DtypeInfo {
  int32_t code;  // torch's number, as the shim tells it at run time
  const char* name;
};

const DtypeInfo* dtypes() {
  static const DtypeInfo all[] = {{aoti_torch_dtype_float32(), "float32"},
                                  {aoti_torch_dtype_float64(), "float64"},
                                  {aoti_torch_dtype_bfloat16(), "bfloat16"},
                                  {aoti_torch_dtype_float16(), "float16"},
                                  {aoti_torch_dtype_int64(), "int64"},
                                  {aoti_torch_dtype_int32(), "int32"},
                                  {aoti_torch_dtype_int16(), "int16"},
                                  {aoti_torch_dtype_int8(), "int8"},
                                  {aoti_torch_dtype_uint8(), "uint8"},
                                  {aoti_torch_dtype_bool(), "bool"},
                                  {aoti_torch_dtype_complex64(), "complex64"},
                                  {aoti_torch_dtype_complex128(), "complex128"},
                                  {-1, "another dtype"}};
  return all;
}

int32_t dtype_of(const Tensor& t) {
  int32_t code;
  succeed(aoti_torch_get_dtype(t.get(), &code), "reading a dtype");
  return code;
}

const char* dtype_name(int32_t code) {
  const DtypeInfo* info = dtypes();
  while (info->code != code && info->code != -1) ++info;
  return info->name;
}

// --------------------------------------------------------------------------------------------------------- devices

// Where a tensor lies: torch's numbers of a kind of device, as the shim tells them at run time, and of one of that
// kind.
struct Place {
  int32_t kind = aoti_torch_device_type_cpu();
  int32_t index = 0;

  bool on_cpu() const { return kind == aoti_torch_device_type_cpu(); }
  bool holds(const Tensor& t) const;
};

Place place_of(const Tensor& t) {
  Place place;
  succeed(aoti_torch_get_device_type(t.get(), &place.kind), "reading a device");
  if (!place.on_cpu()) succeed(aoti_torch_get_device_index(t.get(), &place.index), "reading a device");
  return place;
}

bool Place::holds(const Tensor& t) const {
  const Place found = place_of(t);
  return found.kind == kind && found.index == index;
}

std::string place_name(const Place& place) {
  if (place.on_cpu()) return "cpu";
  if (place.kind == aoti_torch_device_type_meta()) return "meta";
  const char* kind = place.kind == aoti_torch_device_type_cuda()  ? "cuda"
                     : place.kind == aoti_torch_device_type_xpu() ? "xpu"
                     : place.kind == aoti_torch_device_type_mps() ? "mps"
                                                                  : "another device";
  return std::string(kind) + ":" + std::to_string(place.index);
}

std::string place_name(const Tensor& t) { return t.defined() ? place_name(place_of(t)) : "none"; }

// --------------------------------------------------------------------------------------------------------- tensors

// The strides of a contiguous tensor, and how many values it has (a size of 0 counts as 1).
Shape dense_strides(const Shape& shape, int64_t& values) {
  Shape strides = shape;
  values = 1;
  for (int64_t i = shape.dim; i-- > 0; values *= std::max<int64_t>(shape.sizes[i], 1)) strides.sizes[i] = values;
  return strides;
}

Tensor empty_strided(const Shape& shape, const Shape& strides, int32_t dtype, const Place& place) {
  AtenTensorHandle handle;
  succeed(aoti_torch_empty_strided(shape.dim, shape.sizes, strides.sizes, dtype, place.kind, place.index, &handle),
          "allocating memory for a result");
  return Tensor(handle);
}

Tensor empty(const Shape& shape, int32_t dtype, const Place& place) {
  int64_t values;
  return empty_strided(shape, dense_strides(shape, values), dtype, place);
}

// The same, on the CPU in memory that is used again (torch keeps that of other devices itself): for tapes and
// gradients, which are large and new at every training step.
Tensor empty_block(const Shape& shape, int32_t dtype, int64_t element_size, const Place& place) {
  int64_t values;
  const Shape strides = dense_strides(shape, values);
  if (!place.on_cpu() || values * element_size < worth_keeping) return empty_strided(shape, strides, dtype, place);
  void* block;
  try {
    block = take_block(static_cast<size_t>(values * element_size));
  } catch (const std::bad_alloc&) {
    return empty_strided(shape, strides, dtype, place);  // torch's own words
  }
  AtenTensorHandle handle;
  const AOTITorchError code = torch_from_blob(
      block, shape.dim, shape.sizes, strides.sizes, 0, dtype, aoti_torch_device_type_cpu(), -1, &handle,
      aoti_torch_layout_strided(), nullptr, 0, [](void* data, void*) { give_block(data); }, nullptr);
  if (code != TORCH_SUCCESS) give_block(block);
  succeed(code, "making a tensor of kept memory");
  return Tensor(handle);
}

// [T, B, C], laid out as [B, T, C] when batch_major.
Tensor empty_rows(int64_t T, int64_t B, int64_t C, bool batch_major, int32_t dtype, const Place& place) {
  if (!batch_major) return empty({T, B, C}, dtype, place);
  const int64_t row = std::max<int64_t>(C, 1);
  return empty_strided({T, B, C}, {row, std::max<int64_t>(T, 1) * row, 1}, dtype, place);
}

Tensor dense(const Tensor& t) { return t.is_contiguous() ? t : stable::contiguous(t); }

// ----------------------------------------------------------------------------------------------------------- arguments

// Reads a boxed call's arguments one after another. By hand, because TORCH_BOX leaks every string argument.
class Reader {
 public:
  explicit Reader(StableIValue* stack) : next_(stack) {}

  template <class T>
  T take() {
    return stable::detail::to<T>(*next_++);
  }
  std::string take_string() {
    const auto handle = take<StringHandle>();
    const char* data = nullptr;
    size_t length = 0;
    torch_string_length(handle, &length);
    torch_string_c_str(handle, &data);
    const std::string value(data, length);
    torch_delete_string(handle);
    return value;
  }
  std::optional<Tensor> take_optional() { return take<std::optional<Tensor>>(); }

 private:
  StableIValue* next_;
};

}  // namespace
}  // namespace fastrnn
