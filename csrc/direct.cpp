// Calls of modules and cells without torch's dispatcher, whose ways cost more than the kernel does for few steps: for
// fastrnn/direct.py and autograd.py alone.
//
//   forward()    the results in new tensors
//   recorded()   the same where gradients are wanted, with what backward() needs
//   backward()   its back-propagation through time: direct_backward.h
//   step_onto()  one step, onto states that the caller owns
//
// Tensors are read by DLPack's C exchange API; new ones are made by Tensor.new_empty, or of kept memory. Whatever is
// not plainly right is declined (None, False), before anything is written: the operators have the words for it. So is
// every call that something traces, transforms, intercepts, casts or profiles. Letters for sizes are problem.h's.
#define PY_SSIZE_T_CLEAN
#include "direct.h"

#include <algorithm>
#include <cstring>
#include <exception>
#include <initializer_list>
#include <utility>

#include "cells.h"
#include "cpu/dispatch.h"
#include "packed.h"
#include "threads.h"
#include "views.h"

namespace fastrnn {
namespace {

constexpr int64_t most_rows = int64_t(1) << 31;
// In multiplications, some microseconds: for less the interpreter's lock is kept, since to have it back from another
// thread takes longer.
constexpr double worth_releasing = 1e5;
// What use_torch() was given, beside what views.h has.
PyObject* silent;          // functions: none of them may return anything but None, False or 0
PyObject* forward_ad;      // torch.autograd.forward_ad's dictionary
PyObject* fp32_precision;  // what torch's switch says of a backend and an operation

// ------------------------------------------------------------------------------------------------------------- torch

// Whether nothing traces, transforms, intercepts, casts or profiles calls. Runs no Python: the exception of a signal
// that came meanwhile is somebody else's.
bool quiet() {
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(silent); ++i) {
    const Owned found(PyObject_CallNoArgs(PyTuple_GET_ITEM(silent, i)));
    PyObject* const value = found.get();
    if (value == Py_None || value == Py_False) continue;
    if (!value || !PyLong_CheckExact(value) || PyLong_AsLong(value) != 0) return false;
  }
  PyObject* const level = PyDict_GetItemWithError(forward_ad, names.current_level);
  return level && PyLong_CheckExact(level) && PyLong_AsLong(level) < 0;
}

// The precision of float32's products.
bool read_precision(Precision& precision) {
  PyObject* const of[] = {names.mkldnn, names.rnn};
  const Owned asked(PyObject_Vectorcall(fp32_precision, of, 2, nullptr));
  const char* const text = asked && PyUnicode_Check(asked.get()) ? PyUnicode_AsUTF8(asked.get()) : nullptr;
  if (text) precision = allowed_precision(text);
  return text;
}

// -------------------------------------------------------------------------------------------------------------- call

// A call that is to be computed.
struct Call {
  const Kernels& kernels = current();
  const CellTraits* cell = nullptr;
  bool layered = false;  // a module, whose states have a dimension of layers; else a cell
  bool batched = true;
  bool batch_first = false;
  Layer layer;  // of the first layer; the others differ in their input and their weights
  int64_t layers = 1;
  Weights weights[most_layers][2];      // of each layer and direction
  PyObject* tensors[10 * most_layers];  // what they were read from, unless they are packed
  int64_t count = 0;
  View x, h, c;
  References kept;
};

const CellTraits* find_cell(PyObject* name) {
  const char* const text = PyUnicode_CheckExact(name) ? PyUnicode_AsUTF8(name) : nullptr;
  const CellTraits* found = nullptr;
  if (text)
    for_each_cell([&](auto cell) {
      if (!std::strcmp(text, cell.name)) found = &traits(cell.kind);
    });
  return found;
}

enum class Found { there, stale, odd };

// Weights that are kept packed (frozen.py): stale unless their sources are the module's parameters still, unchanged,
// and the precision is the one that they were packed for.
Found read_packed(Call& call, PyObject* parameters, PyObject* frozen) {
  const Owned packed(PyObject_GetAttr(frozen, names.packed)), sources(PyObject_GetAttr(frozen, names.sources));
  if (!packed || !sources || Py_TYPE(packed.get()) != tensor_type || !PyList_CheckExact(sources.get()))
    return Found::odd;
  call.kept.add(packed.get());
  for (Py_ssize_t i = 0; i < PyList_GET_SIZE(sources.get()); ++i) {
    PyObject* const source = PyList_GET_ITEM(sources.get(), i);  // (name, tensor, version or None, address)
    if (!PyTuple_CheckExact(source) || PyTuple_GET_SIZE(source) != 4) return Found::odd;
    PyObject *const weight = PyTuple_GET_ITEM(source, 1), *const version = PyTuple_GET_ITEM(source, 2);
    View view;
    if (PyDict_GetItemWithError(parameters, PyTuple_GET_ITEM(source, 0)) != weight) return Found::stale;
    if (exchange->tensor_from_py_object(weight, &view)) return Found::odd;
    if (reinterpret_cast<uintptr_t>(view.begin()) != PyLong_AsUnsignedLongLong(PyTuple_GET_ITEM(source, 3)))
      return Found::stale;
    if (version == Py_None) continue;
    const Owned now(PyObject_GetAttr(weight, names.version));
    if (!now) return Found::odd;
    if (PyLong_AsLongLong(now.get()) != PyLong_AsLongLong(version)) return Found::stale;
  }
  View bytes;
  if (exchange->tensor_from_py_object(packed.get(), &bytes) || bytes.ndim != 1 || !bytes.contiguous())
    return Found::odd;
  const PackedHeader* const header = header_at(bytes.begin(), bytes.size(0));
  const Layer& l = call.layer;
  if (!header || std::strcmp(header->isa, call.kernels.isa)) return Found::odd;
  if (header->cell != l.cell || header->dtype != l.dtype || header->precision != l.precision) return Found::stale;
  if (header->D != l.D || header->layers != call.layers || header->I != l.I || header->H != l.H || header->P != l.P ||
      header->projected != l.projected)
    return Found::odd;
  for (int64_t k = 0; k < call.layers; ++k)
    for (int d = 0; d < l.D; ++d)
      call.weights[k][d].packed = reinterpret_cast<const char*>(header) + header->place(k, d);
  return Found::there;
}

// The weights as they are now.
bool read_weights(Call& call, PyObject* module, PyObject* parameters) {
  PyObject* const flat = call.layered ? PyDict_GetItemWithError(module, names.flat_weights_names) : nullptr;
  Py_ssize_t n = 4;
  if (call.layered) {
    if (!flat || !PyList_CheckExact(flat)) return false;
    call.kept.add(flat);
    n = PyList_GET_SIZE(flat);
  } else if (PyDict_GetItemWithError(parameters, names.of_cell[2]) == Py_None) {
    n = 2;
    if (PyDict_GetItemWithError(parameters, names.of_cell[3]) != Py_None) return false;
  }
  const Layer& l = call.layer;
  const int64_t all = call.layers * l.D, each = n / all, GH = call.cell->gates * l.H;
  if (n % all || each != 2 + 2 * (each > 3) + l.projected) return false;
  Py_ssize_t next = 0;
  for (int64_t k = 0; k < all; ++k) {
    Weights& w = call.weights[k / l.D][k % l.D];
    const auto take = [&](const void*& to, std::initializer_list<int64_t> shape) {
      PyObject* const name = call.layered ? PyList_GetItem(flat, next) : names.of_cell[next];
      PyObject* const weight = name && PyUnicode_CheckExact(name) ? PyDict_GetItemWithError(parameters, name) : nullptr;
      View view;
      if (!weight || !read(weight, view, call.kept) || !same_type(view, call.x) || !view.is(shape) ||
          !view.contiguous())
        return false;
      to = view.begin();
      call.tensors[call.count++] = weight;
      ++next;
      return true;
    };
    if (!take(w.w_ih, {GH, k < l.D ? l.I : l.D * l.P}) || !take(w.w_hh, {GH, l.P})) return false;
    if (each > 3 && (!take(w.b_ih, {GH}) || !take(w.b_hh, {GH}))) return false;
    if (l.projected && !take(w.w_hr, {l.P, l.H})) return false;
  }
  return true;
}

// The state of all layers, of so many rows and units.
bool is_state(const Call& call, const View& t, int64_t rows, int64_t width) {
  if (!same_type(t, call.x) || !t.contiguous()) return false;
  const int64_t states = call.layers * call.layer.D;
  if (call.layered) return call.batched ? t.is({states, rows, width}) : rows == 1 && t.is({states, width});
  return call.batched ? t.is({rows, width}) : rows == 1 && t.is({width});
}

bool read_state(Call& call, PyObject* hx) {
  const Layer& l = call.layer;
  if (!call.cell->has_c) return read(hx, call.h, call.kept) && is_state(call, call.h, l.B, l.P);
  const bool tuple = PyTuple_CheckExact(hx);
  if (!(tuple ? PyTuple_GET_SIZE(hx) == 2 : PyList_CheckExact(hx) && PyList_GET_SIZE(hx) == 2)) return false;
  PyObject* const h = tuple ? PyTuple_GET_ITEM(hx, 0) : PyList_GET_ITEM(hx, 0);
  PyObject* const c = tuple ? PyTuple_GET_ITEM(hx, 1) : PyList_GET_ITEM(hx, 1);
  call.kept.add(c);  // of a list, from which it may be gone when h has been read
  return read(h, call.h, call.kept) && read(c, call.c, call.kept) && is_state(call, call.h, l.B, l.P) &&
         is_state(call, call.c, l.B, l.H);
}

// What a module with layers says of itself that decides how it is run; false where that is not for here.
bool read_layers(Call& call, PyObject* module) {
  PyObject* const dropout = PyDict_GetItemWithError(module, names.dropout);
  if (!dropout || !(PyFloat_CheckExact(dropout) || PyLong_CheckExact(dropout))) return false;
  const double share = PyFloat_AsDouble(dropout);
  if (!(share >= 0 && share <= 1)) return false;
  call.layers = number(module, names.num_layers);
  call.batch_first = flag_is(module, names.batch_first, true);
  call.layer.D = flag_is(module, names.bidirectional, true) ? 2 : 1;
  return call.layers >= 1 && call.layers <= most_layers &&
         (call.batch_first || flag_is(module, names.batch_first, false)) &&
         (call.layer.D == 2 || flag_is(module, names.bidirectional, false)) &&
         PyDict_GetItemWithError(module, names.bias) &&
         (flag_is(module, names.training, false) || (flag_is(module, names.training, true) && share == 0));
}

// forward: a module's input has a dimension of steps.
bool read_call(Call& call, PyObject* cell, PyObject* module, bool layered, PyObject* input, PyObject* hx,
               bool forward) {
  call.cell = find_cell(cell);
  call.layered = layered;
  if (!exchange || !call.cell || !PyDict_CheckExact(module) || Py_TYPE(input) != tensor_type ||
      (layered && !read_layers(call, module)) || !quiet() || !is_cpu(input) || !read(input, call.x, call.kept))
    return false;
  Layer& l = call.layer;
  const View& x = call.x;
  const int with_time = forward && layered;
  call.batched = x.ndim - with_time == 2;
  if ((!call.batched && x.ndim - with_time != 1) || (!forward && l.D == 2)) return false;
  if (!call.batched || !with_time) call.batch_first = false;
  const int time = call.batch_first ? 1 : 0, row = with_time && !call.batch_first ? 1 : 0, last = x.ndim - 1;
  l.cell = call.cell->kind;
  if (!dtype_of(x, l.dtype)) return false;
  l.state = l.dtype;
  l.T = with_time ? x.size(time) : 1;
  l.B = call.batched ? x.size(row) : 1;
  l.I = x.size(last);
  l.H = number(module, names.hidden_size);
  const int64_t P = layered ? number(module, names.proj_size) : 0;
  l.projected = P > 0;
  if (l.projected && !call.cell->has_c) return false;
  l.P = l.projected ? P : l.H;
  if (l.T < 1 || l.T > most_rows || l.B < 1 || l.B > most_rows || l.I < 1 || l.H < 1 || P < 0 ||
      l.I != number(module, names.input_size))
    return false;
  if (l.I > 1 && x.stride(last) != 1) return false;
  l.x = {x.begin(), with_time ? x.stride(time) : 0, call.batched ? x.stride(row) : 0};
  if (!(forward && hx == Py_None) && !read_state(call, hx)) return false;
  if (l.dtype == Dtype::f32 && !read_precision(l.precision)) return false;
  PyObject* const parameters = PyDict_GetItemWithError(module, names.parameters);
  if (!parameters || !PyDict_CheckExact(parameters)) return false;
  call.kept.add(parameters);
  PyObject* const frozen = PyDict_GetItemWithError(module, names.frozen);
  if (frozen && frozen != Py_None) {
    call.kept.add(frozen);
    const Found found = read_packed(call, parameters, frozen);
    if (found != Found::stale) return found == Found::there;
  }
  return read_weights(call, module, parameters);
}

// ----------------------------------------------------------------------------------------------------------- running

char* of_layer(const View& all, int64_t k, int64_t rows, int64_t width) {
  return all.object ? all.begin() + k * rows * width * all.bytes() : nullptr;
}

// Where the results go, and what a reset starts from.
struct Results {
  View y, h, c;               // y: of a module; where there is none the state stands for it
  View between[most_layers];  // the outputs of the layers below the last: of one step and direction the states
  View tape;                  // of all layers, one after the other
  const bool* reset = nullptr;
  int64_t reset_row = 0;
  View h_reset, c_reset;
  bool one_reset = false;
};

// Layer k of a call.
Forward layer_of(const Call& call, const Results& to, int64_t k) {
  Forward f;
  static_cast<Layer&>(f) = call.layer;
  const int64_t T = f.T, B = f.B, D = f.D, width = D * f.P, starts = to.one_reset ? 1 : B;
  std::copy_n(call.weights[k], 2, f.weights);
  f.h0 = of_layer(call.h, k * D, B, f.P);
  f.c0 = of_layer(call.c, k * D, B, f.H);
  f.h_n = of_layer(to.h, k * D, B, f.P);
  f.c_n = of_layer(to.c, k * D, B, f.H);
  if (to.tape.object) f.tape = to.tape.begin() + k * D * to.tape.stride(0) * to.tape.bytes();
  const auto output = [&](int64_t layer) {
    const View& own = layer == call.layers - 1 ? to.y : to.between[layer];
    if (!own.object) return Rows{of_layer(to.h, layer * D, B, f.P), 0, f.P};
    if (call.batch_first && layer == call.layers - 1) return Rows{own.begin(), width, T * width};
    return Rows{own.begin(), B * width, width};
  };
  f.y = output(k);
  if (k) {
    const Rows below = output(k - 1);
    f.I = width;
    f.x = {below.data, below.step, below.row};
  }
  f.reset = to.reset, f.reset_row = to.reset_row, f.one_reset = to.one_reset;
  f.h_reset = of_layer(to.h_reset, k, starts, f.P);
  f.c_reset = of_layer(to.c_reset, k, starts, f.H);
  return f;
}

// In multiplications, about.
double work_of(const Layer& l, const CellTraits& cell) {
  const double units = double(cell.gates) * double(l.H), step = 50, unit = 20 + double(l.P + l.I);
  return double(l.D) * double(l.T) * double(l.B) * (step + units * unit);
}

template <class F>
void without_lock_if(bool release, const F& f) {
  PyThreadState* const state = release ? PyEval_SaveThread() : nullptr;
  f();
  if (release) PyEval_RestoreThread(state);
}

// Runs the layers from the call's states to the results' (which may be the same). Returns how many it has run: fewer
// than there are when there is no memory for the next one, which has then written nothing.
int64_t run(const Call& call, const Results& to, const Wavefront& wave) {
  const Layer& l = call.layer;
  int64_t done = 0;
  const auto all = [&]() noexcept {
    try {
      if (wave.groups > 1) {
        Forward layers[most_layers];
        for (int64_t k = 0; k < call.layers; ++k) layers[k] = layer_of(call, to, k);
        call.kernels.forward_wavefront(layers, static_cast<int>(call.layers), wave, team());
        done = call.layers;
      }
      for (; done < call.layers; ++done) call.kernels.forward(layer_of(call, to, done), team());
    } catch (const std::exception&) {
    }
  };
  without_lock_if(double(call.layers) * work_of(l, *call.cell) >= worth_releasing, all);
  return done;
}

PyObject* decline(PyObject* with) {
  PyErr_Clear();
  Py_INCREF(with);
  return with;
}

bool expect_arguments(const char* function, Py_ssize_t n, Py_ssize_t expected) {
  if (n == expected) return true;
  PyErr_Format(PyExc_TypeError, "%s: expected %zd arguments, got %zd", function, expected, n);
  return false;
}

// What owns the results of a call.
struct Made {
  Owned y, h, c, tape, between[most_layers];
};

// Makes the results, and computes them; false where there is no memory. Where the call is recorded, with the tape and
// (in between[0]) the outputs of the layers below the last, all of them.
bool compute(const Call& call, Results& to, Made& made, bool is_recorded) {
  const View& x = call.x;
  const Layer& l = call.layer;
  const int64_t L = call.layers, states = L * l.D, width = l.D * l.P;
  const auto make_state = [&](int64_t units, View& view, Owned& owner) {
    if (!call.batched) return call.layered ? make(x, {states, units}, view, owner) : make(x, {units}, view, owner);
    return call.layered ? make(x, {states, l.B, units}, view, owner) : make(x, {l.B, units}, view, owner);
  };
  Wavefront wave;
  if (call.layered) {
    if (!(call.batched ? make(x, {x.size(0), x.size(1), width}, to.y, made.y) : make(x, {l.T, width}, to.y, made.y)))
      return false;
    if (L > 1 && l.T > 1) {
      Layer first = l;
      first.weights[0] = call.weights[0][0];  // packed or not
      Layer upper = first;
      upper.I = width;
      wave = plan_wavefront(first, upper, static_cast<int>(L), false, team().size);
    }
    if (is_recorded && L > 1) {
      View& all = to.between[0];
      if (!make(x, {L - 1, l.T, l.B, width}, all, made.between[0])) return false;
      for (int64_t k = 1; k < L - 1; ++k) {
        to.between[k] = all;
        to.between[k].byte_offset += uint64_t(k * l.T * l.B * width * all.bytes());
      }
    }
    // Where not all run at once, two take turns, the last output's memory and one more.
    for (int64_t k = L - 2; k >= 0 && !is_recorded && (l.T > 1 || l.D == 2); --k) {
      const bool last = k == L - 2;
      if (!last && wave.groups == 1)
        to.between[k] = k == L - 3 ? to.y : to.between[k + 2];
      else if (!make(x, {l.T, l.B, width}, to.between[k], made.between[k]))
        return false;
    }
  }
  if (is_recorded &&
      !make_block(x, {states, l.T * l.B, tape_width(*call.cell, l.H, l.P, l.projected)}, to.tape, made.tape))
    return false;
  return make_state(l.P, to.h, made.h) && (!call.cell->has_c || make_state(l.H, to.c, made.c)) &&
         run(call, to, wave) == L;
}

PyObject* forward(PyObject*, PyObject* const* a, Py_ssize_t n) {
  if (!expect_arguments("forward", n, 5)) return nullptr;
  Call call;
  Results to;
  Made made;
  if (!read_call(call, a[0], a[1], a[2] == Py_True, a[3], a[4], true) || !compute(call, to, made, false))
    return decline(Py_None);
  Owned state(call.cell->has_c ? PyTuple_Pack(2, made.h.get(), made.c.get()) : made.h.release());
  if (!state || !call.layered) return state.release();
  return PyTuple_Pack(2, made.y.get(), state.get());
}

// Null with a Python exception; None for what is null.
PyObject* tuple_of(PyObject* const* objects, Py_ssize_t n) {
  PyObject* const tuple = PyTuple_New(n);
  for (Py_ssize_t i = 0; tuple && i < n; ++i) {
    PyObject* const object = objects[i] ? objects[i] : Py_None;
    Py_INCREF(object);
    PyTuple_SET_ITEM(tuple, i, object);
  }
  return tuple;
}

PyObject* recorded(PyObject*, PyObject* const* a, Py_ssize_t n) {
  if (!expect_arguments("recorded", n, 5)) return nullptr;
  Call call;
  if (!read_call(call, a[0], a[1], a[2] == Py_True, a[3], a[4], true)) return decline(Py_None);
  const Layer& l = call.layer;
  const bool own_compute = l.dtype == Dtype::f32 || l.dtype == Dtype::f64;
  if (!call.batched || !call.count || !own_compute) return decline(Py_None);
  PyObject* tensors[3 + 10 * most_layers] = {call.x.object, call.h.object, call.c.object};
  std::copy_n(call.tensors, call.count, tensors + 3);
  const Py_ssize_t count = 3 + call.count;
  const auto wanted = [&](Py_ssize_t end) {
    return std::any_of(tensors, tensors + end,
                       [](PyObject* t) { return t && !is_false(t, names.requires_grad, false); });
  };
  if (!wanted(3 + call.count / call.layers)) return decline(wanted(count) ? Py_None : Py_False);
  Results to;
  Made made;
  if (!compute(call, to, made, true)) return decline(Py_None);
  PyObject* outputs[3] = {};
  Py_ssize_t results = 0;
  for (const Owned* o : {&made.y, &made.h, &made.c})
    if (*o) outputs[results++] = o->get();
  const Owned all(tuple_of(outputs, results)), given(tuple_of(tensors, count));
  const Owned precision(PyLong_FromLong(static_cast<long>(l.precision)));
  if (!all || !given || !precision) return nullptr;
  PyObject* const found[] = {all.get(), made.tape.get(), made.between[0].get(), precision.get(), given.get()};
  return tuple_of(found, 5);
}

PyObject* step_onto(PyObject*, PyObject* const* a, Py_ssize_t n) {
  if (!expect_arguments("step_onto", n, 7)) return nullptr;
  Call call;
  if (!read_call(call, a[0], a[1], a[2] == Py_True, a[3], a[4], false)) return decline(Py_False);
  const View &h = call.h, &c = call.c;
  const bool has_c = call.cell->has_c;
  const auto apart = [&](const View& t) { return !t.overlaps(h) && !(has_c && t.overlaps(c)); };
  if (!is_false(h.object, names.requires_grad, false) || !apart(call.x)) return decline(Py_False);
  if (has_c && (!is_false(c.object, names.requires_grad, false) || c.overlaps(h))) return decline(Py_False);
  Results to;
  to.h = h, to.c = c;
  PyObject *const reset = a[5], *const start = a[6];
  const int64_t B = call.layer.B;
  if (reset != Py_None) {
    View mask;
    if (!read(reset, mask, call.kept) || mask.dtype.code != dlpack::boolean || mask.dtype.bits != 8 ||
        !(call.batched ? mask.is({B}) : mask.is({})))
      return decline(Py_False);
    to.reset = reinterpret_cast<const bool*>(mask.begin());
    to.reset_row = call.batched ? mask.stride(0) : 0;
  }
  if (reset != Py_None && start != Py_None) {
    PyObject* const* const pair = &start;
    const bool tuple = PyTuple_CheckExact(start) && PyTuple_GET_SIZE(start) == 2;
    if (has_c && !tuple) return decline(Py_False);
    if (!read(has_c ? PyTuple_GET_ITEM(start, 0) : *pair, to.h_reset, call.kept) ||
        (has_c && !read(PyTuple_GET_ITEM(start, 1), to.c_reset, call.kept)))
      return decline(Py_False);
    const auto rows = [&](int64_t count) {
      return is_state(call, to.h_reset, count, call.layer.P) &&
             (!has_c || is_state(call, to.c_reset, count, call.layer.H));
    };
    to.one_reset = B != 1 && call.batched && rows(1);
    if ((!to.one_reset && !rows(B)) || !apart(to.h_reset) || (has_c && !apart(to.c_reset))) return decline(Py_False);
  }
  const int64_t done = run(call, to, Wavefront{});
  if (done == 0) return decline(Py_False);
  if (done == call.layers) Py_RETURN_TRUE;
  PyErr_Format(PyExc_MemoryError, "hx: no memory for layer %lld, after the layers below it have been written",
               (long long)done);
  return nullptr;
}

}  // namespace
}  // namespace fastrnn

#include "direct_backward.h"

namespace fastrnn {
namespace {

PyObject* use_torch(PyObject*, PyObject* const* a, Py_ssize_t n) {
  if (!expect_arguments("use_torch", n, 6)) return nullptr;
  if (!PyType_Check(a[0]) || !PyType_Check(a[1]) || !PyTuple_CheckExact(a[3]) || !PyDict_CheckExact(a[4])) {
    PyErr_SetString(PyExc_TypeError, "use_torch: expected two types, an API, a tuple, a dictionary, a function");
    return nullptr;
  }
  if (!PyCapsule_IsValid(a[2], dlpack::ExchangeApi::capsule)) Py_RETURN_FALSE;
  const auto* const api =
      static_cast<const dlpack::ExchangeApi*>(PyCapsule_GetPointer(a[2], dlpack::ExchangeApi::capsule));
  if (api->major != dlpack::ExchangeApi::supported_major || !api->tensor_from_py_object) Py_RETURN_FALSE;
  for (int i = 0; i < n; ++i) Py_INCREF(a[i]);  // for as long as the process lives
  tensor_type = reinterpret_cast<PyTypeObject*>(a[0]);
  parameter_type = reinterpret_cast<PyTypeObject*>(a[1]);
  silent = a[3], forward_ad = a[4], fp32_precision = a[5];
  exchange = api;
  Py_RETURN_TRUE;
}

PyMethodDef methods[] = {
    {"use_torch", reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(use_torch)), METH_FASTCALL,
     "use_torch(Tensor, Parameter, exchange_api, silent, forward_ad, fp32_precision) -> bool: what the two below work "
     "with. False, and they decline everything, where exchange_api is not a capsule of DLPack's C exchange API, "
     "version 1."},
    {"forward", reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(forward)), METH_FASTCALL,
     "forward(cell, module.__dict__, layered, input, hx): what forward of a module (layered) or cell returns, which is "
     "not recorded; None where the call is not plainly right, or not a simple one."},
    {"recorded", reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(recorded)), METH_FASTCALL,
     "recorded(cell, module.__dict__, layered, input, hx): (results, tape, between, precision, (input, h0, c0, "
     "*weights)), for a call that is to be recorded. results: (h,), (h, c) of a cell, else (output, h_n), "
     "(output, h_n, c_n). tape: (L*D, T*B, ...). between: (L-1, T, B, D*P), the outputs of the layers below the last; "
     "None of one. False where nothing of it requires a gradient; None as for forward, and where nothing of the first "
     "layer does."},
    {"backward", reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(backward)), METH_FASTCALL,
     "backward(cell, num_layers, layered, bidirectional, batch_first, precision, (tape, between, *tensors), "
     "needs_input_grad, gradients): what a Function's backward returns whose last arguments are the tensors of "
     "`recorded`, from the gradients of its results; None where the call is not plainly right, or not a simple one."},
    {"step_onto", reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(step_onto)), METH_FASTCALL,
     "step_onto(cell, module.__dict__, layered, input, hx, reset, reset_state) -> bool: whether it has done the step "
     "onto hx. Else nothing has been written."},
    {nullptr, nullptr, 0, nullptr}};

}  // namespace

bool add_direct(PyObject* module) {
  make_names();
  return !PyErr_Occurred() && !PyModule_AddFunctions(module, methods);
}

}  // namespace fastrnn
