// Back-propagation through time of what recorded() has computed: for direct.cpp alone, and in its manner. It reads all
// tensors anew: what autograd has kept may have been replaced meanwhile (torch.autograd.graph.saved_tensors_hooks).
#pragma once

namespace fastrnn {
namespace {

// A gradient that came in, as rows of contiguous values if `rows`, else contiguous as a whole; not there is zero.
bool read_gradient(PyObject* object, const View& model, std::initializer_list<int64_t> shape, bool rows, View& view,
                   References& kept) {
  if (object == Py_None) return true;
  if (!is_cpu(object) || !read(object, view, kept) || !same_type(view, model) || !view.is(shape)) return false;
  const int last = view.ndim - 1;
  if (rows ? view.size(last) == 1 || view.stride(last) == 1 : view.contiguous()) return true;
  const SerialInForkedChild serial;
  const Owned copy(PyObject_CallMethodNoArgs(object, names.contiguous));
  return copy && read(copy.get(), view, kept) && same_type(view, model) && view.is(shape) && view.contiguous();
}

// A backward pass that is to be computed.
struct BackwardCall {
  const CellTraits* cell = nullptr;
  bool layered = false, batch_first = false;
  int64_t layers = 1;
  Backward common;  // of all layers: states and the gradients of states are the first layer's, I and x too
  View x;
  Weights weights[most_layers][2];
  View tape, between, dy, dh, dc;
  References kept;

  int64_t width() const { return common.D * common.P; }
  int64_t rows() const { return common.T * common.B; }
};

// What recorded() was given. saved: the tape, the outputs between layers, and the tensors.
bool read_layers(BackwardCall& call, PyObject* saved) {
  Backward& b = call.common;
  const CellTraits& cell = *call.cell;
  const auto tensor = [&](Py_ssize_t i) { return PyTuple_GET_ITEM(saved, 2 + i); };
  const int64_t weights = PyTuple_GET_SIZE(saved) - 5, all = call.layers * b.D, each = weights / all;
  if (weights % all || each < 2 || each > 5 || (all > 1 && !call.layered)) return false;
  b.cell = cell.kind;
  b.projected = each % 2;
  if (b.projected && !cell.has_c) return false;
  View& x = call.x;
  if (!is_cpu(tensor(0)) || !read(tensor(0), x, call.kept) || x.ndim != (call.layered ? 3 : 2) ||
      !dtype_of(x, b.dtype) || (b.dtype != Dtype::f32 && b.dtype != Dtype::f64))
    return false;
  b.state = b.dtype;
  const int time = call.batch_first ? 1 : 0, row = call.layered && !call.batch_first ? 1 : 0, last = x.ndim - 1;
  b.T = call.layered ? x.size(time) : 1;
  b.B = x.size(row);
  b.I = x.size(last);
  const auto take = [&](PyObject* object, View& view) {
    return read(object, view, call.kept) && same_type(view, x) && view.contiguous();
  };
  View hh;
  if (!take(tensor(4), hh) || hh.ndim != 2) return false;
  b.H = hh.size(0) / cell.gates;
  b.P = b.projected ? hh.size(1) : b.H;
  if (b.T < 1 || b.B < 1 || b.I < 1 || b.H < 1 || b.P < 1 || (b.I > 1 && x.stride(last) != 1)) return false;
  b.x = {x.begin(), call.layered ? x.stride(time) : 0, x.stride(row)};
  const int64_t GH = cell.gates * b.H;
  Py_ssize_t next = 3;
  for (int64_t k = 0; k < all; ++k) {
    const auto weight = [&](const void*& to, std::initializer_list<int64_t> shape) {
      View view;
      if (!take(tensor(next++), view) || !view.is(shape)) return false;
      to = view.begin();
      return true;
    };
    Weights& w = call.weights[k / b.D][k % b.D];
    if (!weight(w.w_ih, {GH, k < b.D ? b.I : call.width()}) || !weight(w.w_hh, {GH, b.P}) ||
        (each > 3 && (!weight(w.b_ih, {GH}) || !weight(w.b_hh, {GH}))) || (b.projected && !weight(w.w_hr, {b.P, b.H})))
      return false;
  }
  const auto state = [&](PyObject* object, int64_t units, const void*& to) {
    View view;
    if (object == Py_None) return true;
    if (!take(object, view) || !(call.layered ? view.is({all, b.B, units}) : view.is({b.B, units}))) return false;
    to = view.begin();
    return true;
  };
  if (!state(tensor(1), b.P, b.h0) || !(cell.has_c ? state(tensor(2), b.H, b.c0) : tensor(2) == Py_None)) return false;
  return take(PyTuple_GET_ITEM(saved, 0), call.tape) &&
         call.tape.is({all, call.rows(), tape_width(cell, b.H, b.P, b.projected)}) &&
         (call.layers == 1 || (take(PyTuple_GET_ITEM(saved, 1), call.between) &&
                               call.between.is({call.layers - 1, b.T, b.B, call.width()})));
}

// The gradients of the results.
bool read_gradients(BackwardCall& call, PyObject* gradients) {
  Backward& b = call.common;
  const View& x = call.x;
  Py_ssize_t next = 0;
  const auto gradient = [&] { return PyTuple_GET_ITEM(gradients, next++); };
  if (call.layered && !read_gradient(gradient(), x, {x.size(0), x.size(1), call.width()}, true, call.dy, call.kept))
    return false;
  const auto state = [&](int64_t units, View& view, const void*& to) {
    PyObject* const object = gradient();
    if (!(call.layered ? read_gradient(object, x, {call.layers * b.D, b.B, units}, false, view, call.kept)
                       : read_gradient(object, x, {b.B, units}, false, view, call.kept)))
      return false;
    if (view.object) to = view.begin();
    return true;
  };
  return state(b.P, call.dh, b.dh_n) && (!call.cell->has_c || state(b.H, call.dc, b.dc_n));
}

const void* beyond(const void* all, int64_t bytes) { return all ? static_cast<const char*>(all) + bytes : nullptr; }
void* beyond(void* all, int64_t bytes) { return all ? static_cast<char*>(all) + bytes : nullptr; }

// What autograd asks for: `before` says how many arguments stand before the tensors.
struct Needs {
  PyObject* all;
  Py_ssize_t before;
  bool operator[](Py_ssize_t i) const { return PyTuple_GET_ITEM(all, before + i) == Py_True; }
};

// Memory for the gradients that are needed, in the order of the tensors, and the passes of the layers, the last one
// first, down to the lowest of which anything is needed. Returns how many these are; 0 where there is no memory.
int64_t make_passes(BackwardCall& call, const Needs& needs, Owned* made, Wavefront& wave, Owned& scratch,
                    Backward* passes) {
  Backward& b = call.common;
  const View& x = call.x;
  View view;
  if (needs[0]) {
    if (!(call.layered ? make(x, {x.size(0), x.size(1), b.I}, view, made[0]) : make(x, {b.B, b.I}, view, made[0])))
      return 0;
    b.dx = {view.begin(), call.batch_first ? b.I : b.B * b.I, call.batch_first ? b.T * b.I : b.I};
  }
  const auto state = [&](Py_ssize_t i, int64_t units, void*& to) {
    if (!needs[i]) return true;
    if (!(call.layered ? make(x, {call.layers * b.D, b.B, units}, view, made[i])
                       : make(x, {b.B, units}, view, made[i])))
      return false;
    to = view.begin();
    return true;
  };
  if (!state(1, b.P, b.dh0) || !state(2, b.H, b.dc0)) return 0;
  const Py_ssize_t each = (b.projected ? 3 : 2) + (call.weights[0][0].b_ih ? 2 : 0), per_layer = each * b.D;
  int64_t lowest = 0;
  const auto any = [&](int64_t k) {
    for (Py_ssize_t i = 0; i < per_layer; ++i)
      if (needs[3 + k * per_layer + i]) return true;
    return false;
  };
  if (!needs[0] && !needs[1] && !needs[2])
    while (lowest + 1 < call.layers && !any(lowest)) ++lowest;
  const int64_t count = call.layers - lowest, bytes = x.bytes(), width = call.width(), GH = call.cell->gates * b.H;

  Layer top = b, first = b;
  top.weights[0] = call.weights[call.layers - 1][0];
  if (call.layers > 1) top.I = width;
  if (lowest > 0) first.I = width;
  first.weights[0] = top.weights[0];
  if (count > 1) wave = plan_wavefront(first, top, static_cast<int>(count), true, team().size);
  // Gradients of what lies between layers: two take turns where not all are worked on at once.
  View between;
  const int64_t kept = wave.groups > 1 ? count - 1 : std::min<int64_t>(count - 1, 2);
  if (kept && !make_block(x, {kept, call.rows(), width}, between, scratch)) return 0;
  const auto gradient_of = [&](int64_t k) { return between.begin() + (k % kept) * call.rows() * width * bytes; };

  for (int64_t k = call.layers - 1; k >= lowest; --k) {
    Backward& p = passes[call.layers - 1 - k];
    p = b;
    std::copy_n(call.weights[k], 2, p.weights);
    p.tape = call.tape.begin() + k * b.D * call.tape.stride(0) * bytes;
    const int64_t of_h = k * b.D * b.B * b.P * bytes, of_c = k * b.D * b.B * b.H * bytes;
    p.h0 = beyond(b.h0, of_h), p.dh_n = beyond(b.dh_n, of_h), p.dh0 = beyond(b.dh0, of_h);
    p.c0 = beyond(b.c0, of_c), p.dc_n = beyond(b.dc_n, of_c), p.dc0 = beyond(b.dc0, of_c);
    if (k) {
      p.I = width;
      p.x = {call.between.begin() + (k - 1) * call.rows() * width * bytes, b.B * width, width};
      p.dx = {};
      if (k > lowest) p.dx = {gradient_of(k - 1), b.B * width, width};
    }
    if (k < call.layers - 1)
      p.dy = {gradient_of(k), b.B * width, width};
    else if (call.dy.object)
      p.dy = {call.dy.begin(), call.dy.stride(call.batch_first ? 1 : 0), call.dy.stride(call.batch_first ? 0 : 1)};
    Py_ssize_t next = 3 + k * per_layer;
    const auto weight = [&](const void* there, std::initializer_list<int64_t> shape, void*& to) {
      if (!there) return true;
      const Py_ssize_t i = next++;
      if (!needs[i]) return true;
      if (!make_block(x, shape, view, made[i])) return false;
      to = view.begin();
      return true;
    };
    for (int d = 0; d < b.D; ++d) {
      const Weights& w = p.weights[d];
      auto& to = p.gradients[d];
      if (!weight(w.w_ih, {GH, p.I}, to.w_ih) || !weight(w.w_hh, {GH, b.P}, to.w_hh) ||
          !weight(w.b_ih, {GH}, to.b_ih) || !weight(w.b_hh, {GH}, to.b_hh) || !weight(w.w_hr, {b.P, b.H}, to.w_hr))
        return 0;
    }
  }
  return count;
}

PyObject* backward(PyObject*, PyObject* const* a, Py_ssize_t n) {
  if (!expect_arguments("backward", n, 9)) return nullptr;
  BackwardCall call;
  call.cell = find_cell(a[0]);
  call.layers = PyLong_AsLongLong(a[1]);
  call.layered = a[2] == Py_True, call.batch_first = a[4] == Py_True;
  call.common.D = a[3] == Py_True ? 2 : 1;
  const long precision = PyLong_AsLong(a[5]);
  PyObject *const saved = a[6], *const gradients = a[8];
  if (!exchange || !call.cell || call.layers < 1 || call.layers > most_layers || precision < 0 || precision > 2 ||
      !PyTuple_CheckExact(saved) || !PyTuple_CheckExact(a[7]) || !PyTuple_CheckExact(gradients))
    return decline(Py_None);
  call.common.precision = static_cast<Precision>(precision);
  constexpr Py_ssize_t most = 3 + 10 * most_layers;
  const Py_ssize_t count = PyTuple_GET_SIZE(saved) - 2, before = PyTuple_GET_SIZE(a[7]) - count;
  if (count > most || before < 0 || PyTuple_GET_SIZE(gradients) != (call.layered ? 2 : 1) + call.cell->has_c ||
      !quiet() || !read_layers(call, saved) || !read_gradients(call, gradients))
    return decline(Py_None);
  Owned made[most], scratch;
  Backward passes[most_layers];
  Wavefront wave;
  const int64_t layers = make_passes(call, {a[7], before}, made, wave, scratch, passes);
  if (!layers) return decline(Py_None);
  bool done = false;
  without_lock_if(3 * double(layers) * work_of(passes[0], *call.cell) >= worth_releasing, [&]() noexcept {
    try {
      if (wave.groups > 1)
        current().backward_wavefront(passes, static_cast<int>(layers), wave, team());
      else
        for (int64_t i = 0; i < layers; ++i) current().backward(passes[i], team());
      done = true;
    } catch (const std::exception&) {
    }
  });
  if (!done) return decline(Py_None);
  Owned results(PyTuple_New(before + count));
  for (Py_ssize_t i = 0; results && i < before + count; ++i) {
    PyObject* result = i < before ? nullptr : made[i - before].release();
    if (!result) Py_INCREF(result = Py_None);
    PyTuple_SET_ITEM(results.get(), i, result);
  }
  return results.release();
}

}  // namespace
}  // namespace fastrnn
