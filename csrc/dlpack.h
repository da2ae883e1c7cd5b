// DLPack's C exchange API, as much of it as is used here: structures that tensor libraries have agreed on, and
// functions that read a Python tensor into them without a call of Python (https://dmlc.github.io/dlpack).
#pragma once

#include <cstdint>

namespace dlpack {

enum DeviceType : int32_t { cpu = 1 };
enum TypeCode : uint8_t { floating = 2, brain = 4, boolean = 6 };

struct Device {
  int32_t type, index;
};

struct DataType {
  uint8_t code, bits;
  uint16_t lanes;
};

struct Tensor {
  void* data;
  Device device;
  int32_t ndim;
  DataType dtype;
  int64_t* shape;    // [ndim]
  int64_t* strides;  // [ndim] in elements; null: contiguous
  uint64_t byte_offset;
};

// A tensor that owns its memory: whoever has it calls the deleter, which also frees the structure.
struct ManagedTensor {
  struct Version {
    uint32_t major, minor;
  } version;
  void* context;
  void (*deleter)(ManagedTensor* self);
  uint64_t flags;
  Tensor tensor;
};

// What a type of tensors has as `__dlpack_c_exchange_api__`, in a capsule of the name below.
struct ExchangeApi {
  static constexpr const char* capsule = "dlpack_exchange_api";
  static constexpr uint32_t supported_major = 1;

  uint32_t major, minor;
  void* previous;
  void* managed_tensor_allocator;
  void* managed_tensor_from_py_object;
  // Makes a Python tensor of what it is given, which it then owns; 0, or -1 with a Python exception. May be null.
  int (*managed_tensor_to_py_object)(ManagedTensor* tensor, void** py_object);
  // Fills in what describes a tensor, whose memory stays the owner's; 0, or -1 with a Python exception. May be null.
  int (*tensor_from_py_object)(void* py_object, Tensor* out);
  void* current_work_stream;
};

}  // namespace dlpack
