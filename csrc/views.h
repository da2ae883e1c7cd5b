// Python's tensors and objects, as direct.cpp, alone, reads and makes them: by DLPack's C exchange API and the methods
// of torch.Tensor. Nothing here calls a function written in Python.
#pragma once

#include <Python.h>

#include <algorithm>
#include <cstdint>
#include <initializer_list>
#include <new>
#include <utility>

#include "cpu/workspace.h"
#include "dlpack.h"
#include "problem.h"
#include "threads.h"

namespace fastrnn {
namespace {

constexpr int most_layers = 8;  // more are declined
// What use_torch() was given.
const dlpack::ExchangeApi* exchange;  // null: everything is declined
PyTypeObject *tensor_type, *parameter_type;

// Names of attributes and keys, made once.
struct Names {
  PyObject *parameters, *flat_weights_names, *input_size, *hidden_size, *proj_size, *num_layers, *bidirectional,
      *batch_first, *training, *dropout, *bias, *frozen, *packed, *sources, *version, *is_cpu, *is_neg, *is_zerotensor,
      *storage_offset, *requires_grad, *contiguous, *new_empty, *current_level, *mkldnn, *rnn;
  PyObject* of_cell[4];
} names;

void make_names() {
  const auto name = [](const char* text) { return PyUnicode_InternFromString(text); };
  names.parameters = name("_parameters");
  names.flat_weights_names = name("_flat_weights_names");
  names.input_size = name("input_size");
  names.hidden_size = name("hidden_size");
  names.proj_size = name("proj_size");
  names.num_layers = name("num_layers");
  names.bidirectional = name("bidirectional");
  names.batch_first = name("batch_first");
  names.training = name("training");
  names.dropout = name("dropout");
  names.bias = name("bias");
  names.frozen = name("_frozen");
  names.packed = name("packed");
  names.sources = name("sources");
  names.version = name("_version");
  names.is_cpu = name("is_cpu");
  names.is_neg = name("is_neg");
  names.is_zerotensor = name("_is_zerotensor");
  names.storage_offset = name("storage_offset");
  names.requires_grad = name("requires_grad");
  names.contiguous = name("contiguous");
  names.new_empty = name("new_empty");
  names.current_level = name("_current_level");
  names.mkldnn = name("mkldnn");
  names.rnn = name("rnn");
  const char* const of_cell[] = {"weight_ih", "weight_hh", "bias_ih", "bias_hh"};
  std::transform(of_cell, of_cell + 4, names.of_cell, name);
}

// An owned reference.
class Owned {
 public:
  explicit Owned(PyObject* object = nullptr) : object_(object) {}
  Owned(Owned&& other) noexcept : object_(std::exchange(other.object_, nullptr)) {}
  Owned& operator=(Owned&& other) noexcept {
    std::swap(object_, other.object_);
    return *this;
  }
  ~Owned() { Py_XDECREF(object_); }
  PyObject* get() const { return object_; }
  PyObject* release() { return std::exchange(object_, nullptr); }
  explicit operator bool() const { return object_; }

 private:
  PyObject* object_;
};

// What a call uses: torch's methods and the kernels run without the interpreter's lock, and others may then drop
// theirs.
class References {
 public:
  void add(PyObject* object) {
    Py_INCREF(object);
    objects_[n_++] = object;
  }
  ~References() {
    while (n_) Py_DECREF(objects_[--n_]);
  }
  References() = default;
  References(const References&) = delete;

 private:
  PyObject* objects_[10 * most_layers + 16];
  int n_ = 0;
};

// ------------------------------------------------------------------------------------------------------------ values

// An int of a module's dictionary; -1 where there is none, or anything else. What a class computes is not there.
int64_t number(PyObject* dict, PyObject* name) {
  constexpr int64_t most = int64_t(1) << 31;
  PyObject* const value = PyDict_GetItemWithError(dict, name);
  const int64_t found = value && PyLong_CheckExact(value) ? PyLong_AsLongLong(value) : -1;
  return found > most ? -1 : found;
}

// Whether it has a flag there that is so.
bool flag_is(PyObject* dict, PyObject* name, bool expected) {
  return PyDict_GetItemWithError(dict, name) == (expected ? Py_True : Py_False);
}

// Whether object.name, or object.name() for a method, is False.
bool is_false(PyObject* object, PyObject* name, bool method) {
  const Owned value(method ? PyObject_CallMethodNoArgs(object, name) : PyObject_GetAttr(object, name));
  return value.get() == Py_False;
}

// Asked before DLPack is, which takes a millisecond to say no.
bool is_cpu(PyObject* object) {
  const Owned value(PyObject_GetAttr(object, names.is_cpu));
  return value.get() == Py_True;
}

// What a tensor is and where it lies.
struct View : dlpack::Tensor {
  PyObject* object = nullptr;

  int64_t size(int i) const { return shape[i]; }
  int64_t stride(int i) const {
    if (strides) return strides[i];
    int64_t values = 1;
    for (int k = i + 1; k < ndim; ++k) values *= shape[k];
    return values;
  }
  char* begin() const { return static_cast<char*>(data) + byte_offset; }
  int64_t bytes() const { return dtype.bits / 8; }
  // One past the last byte, of a tensor that has some.
  char* end() const {
    int64_t values = 1;
    for (int i = 0; i < ndim; ++i) values += (size(i) - 1) * stride(i);
    return begin() + values * bytes();
  }
  bool contiguous() const {
    int64_t values = 1;
    for (int i = ndim; i-- > 0; values *= size(i))
      if (size(i) != 1 && stride(i) != values) return false;
    return true;
  }
  bool is(std::initializer_list<int64_t> sizes) const {
    return ndim == int(sizes.size()) && std::equal(sizes.begin(), sizes.end(), shape);
  }
  bool overlaps(const View& other) const { return begin() < other.end() && other.begin() < end(); }
};

// Whether a tensor's values are not those in its memory, because it is a view that negates them.
bool is_negated(PyObject* object) { return !is_false(object, names.is_neg, true); }

// Whether it stands for zeros without any, or its memory was given back under it: its address is then an offset.
bool has_no_memory(PyObject* object, const View& view) {
  constexpr uintptr_t offsets = uintptr_t(1) << 40;
  const auto address = reinterpret_cast<uintptr_t>(view.data);
  if (address == 0 || address >= offsets) return address == 0;
  const Owned offset(PyObject_CallMethodNoArgs(object, names.storage_offset));
  const int64_t values = offset ? PyLong_AsLongLong(offset.get()) : -1;
  if (PyErr_Occurred()) PyErr_Clear();
  return values < 0 || address == uintptr_t(values) * view.dtype.bits / 8 ||
         !is_false(object, names.is_zerotensor, true);
}

// Reads a tensor with memory on the CPU, and keeps it alive.
bool read(PyObject* object, View& view, References& kept) {
  if (Py_TYPE(object) != tensor_type && Py_TYPE(object) != parameter_type) return false;
  kept.add(object);
  if (is_negated(object) || exchange->tensor_from_py_object(object, &view) || view.device.type != dlpack::cpu ||
      view.dtype.lanes != 1 || has_no_memory(object, view))
    return false;
  view.object = object;
  return true;
}

bool same_type(const View& a, const View& b) { return a.dtype.code == b.dtype.code && a.dtype.bits == b.dtype.bits; }

bool dtype_of(const View& t, Dtype& dtype) {
  const int bits = t.dtype.bits;
  if (t.dtype.code == dlpack::brain && bits == 16)
    dtype = Dtype::bf16;
  else if (t.dtype.code == dlpack::floating && (bits == 16 || bits == 32 || bits == 64))
    dtype = bits == 16 ? Dtype::f16 : bits == 32 ? Dtype::f32 : Dtype::f64;
  else
    return false;
  return true;
}

// A new tensor of such a shape, of `model`'s dtype.
bool make(const View& model, std::initializer_list<int64_t> shape, View& view, Owned& made) {
  PyObject* arguments[5] = {model.object};
  size_t n = 1;
  bool ok = true;
  const SerialInForkedChild serial;  // in deterministic mode torch fills new memory
  for (const int64_t size : shape) ok = (arguments[n++] = PyLong_FromLongLong(size)) && ok;
  if (ok) made = Owned(PyObject_VectorcallMethod(names.new_empty, arguments, n, nullptr));
  while (n > 1) Py_XDECREF(arguments[--n]);
  if (!made || exchange->tensor_from_py_object(made.get(), &view)) return false;
  view.object = made.get();
  return view.data;
}

// The same with memory that is kept for later calls (cpu/workspace.h) where fresh memory would cost its page faults;
// for tapes and for gradients of weights, as stable.h's empty_block.
bool make_block(const View& model, std::initializer_list<int64_t> shape, View& view, Owned& made) {
  constexpr int most_sizes = 3;
  struct Block {
    dlpack::ManagedTensor managed;
    int64_t sizes[most_sizes], strides[most_sizes];
  };
  int64_t bytes = model.bytes();
  for (const int64_t size : shape) bytes *= size;
  if (bytes < worth_keeping || !exchange->managed_tensor_to_py_object || shape.size() > most_sizes)
    return make(model, shape, view, made);
  Block* const block = new (std::nothrow) Block{};
  if (!block) return false;
  dlpack::ManagedTensor& managed = block->managed;
  try {
    managed.tensor.data = take_block(size_t(bytes));
  } catch (const std::bad_alloc&) {
    delete block;
    return false;
  }
  managed.version = {dlpack::ExchangeApi::supported_major, 0};
  managed.context = block;
  managed.deleter = [](dlpack::ManagedTensor* self) {
    give_block(self->tensor.data);
    delete static_cast<Block*>(self->context);
  };
  managed.tensor.device = {dlpack::cpu, 0};
  managed.tensor.ndim = int32_t(shape.size());
  managed.tensor.dtype = model.dtype;
  managed.tensor.shape = block->sizes;
  managed.tensor.strides = block->strides;
  std::copy(shape.begin(), shape.end(), block->sizes);
  int64_t stride = 1;
  for (int i = managed.tensor.ndim; i-- > 0; stride *= block->sizes[i]) block->strides[i] = stride;
  void* object = nullptr;
  if (exchange->managed_tensor_to_py_object(&managed, &object)) return false;
  made = Owned(static_cast<PyObject*>(object));
  if (exchange->tensor_from_py_object(made.get(), &view)) return false;
  view.object = made.get();
  return true;
}

}  // namespace
}  // namespace fastrnn
