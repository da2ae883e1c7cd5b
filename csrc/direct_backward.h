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

// What recorded() was given: a layer, and its weights. saved: the tape, and the tensors.
bool read_layer(Backward& b, const CellTraits& cell, bool layered, bool batch_first, PyObject* saved, View& x,
                References& kept) {
  const auto tensor = [&](Py_ssize_t i) { return PyTuple_GET_ITEM(saved, 1 + i); };
  const Py_ssize_t weights = PyTuple_GET_SIZE(saved) - 4, each = weights / b.D;
  if (weights % b.D || each < 2 || each > 5 || (b.D == 2 && !layered)) return false;
  b.cell = cell.kind;
  b.projected = each % 2;
  if (b.projected && !cell.has_c) return false;
  if (!is_cpu(tensor(0)) || !read(tensor(0), x, kept) || x.ndim != (layered ? 3 : 2) || !dtype_of(x, b.dtype) ||
      (b.dtype != Dtype::f32 && b.dtype != Dtype::f64))
    return false;
  b.state = b.dtype;
  const int time = batch_first ? 1 : 0, row = layered && !batch_first ? 1 : 0, last = x.ndim - 1;
  b.T = layered ? x.size(time) : 1;
  b.B = x.size(row);
  b.I = x.size(last);
  View hh;
  if (!read(tensor(4), hh, kept) || hh.ndim != 2) return false;
  b.H = hh.size(0) / cell.gates;
  b.P = b.projected ? hh.size(1) : b.H;
  if (b.T < 1 || b.B < 1 || b.I < 1 || b.H < 1 || b.P < 1 || (b.I > 1 && x.stride(last) != 1)) return false;
  b.x = {x.begin(), layered ? x.stride(time) : 0, x.stride(row)};
  const int64_t GH = cell.gates * b.H;
  for (int d = 0; d < b.D; ++d) {
    Py_ssize_t next = 3 + d * each;
    const auto take = [&](const void*& to, std::initializer_list<int64_t> shape) {
      View view;
      if (!read(tensor(next++), view, kept) || !same_type(view, x) || !view.is(shape) || !view.contiguous())
        return false;
      to = view.begin();
      return true;
    };
    Weights& w = b.weights[d];
    if (!take(w.w_ih, {GH, b.I}) || !take(w.w_hh, {GH, b.P}) ||
        (each > 3 && (!take(w.b_ih, {GH}) || !take(w.b_hh, {GH}))) || (b.projected && !take(w.w_hr, {b.P, b.H})))
      return false;
  }
  const auto state = [&](PyObject* object, int64_t units, const void*& to) {
    View view;
    if (object == Py_None) return true;
    if (!read(object, view, kept) || !same_type(view, x) || !view.contiguous() ||
        !(layered ? view.is({b.D, b.B, units}) : view.is({b.B, units})))
      return false;
    to = view.begin();
    return true;
  };
  return state(tensor(1), b.P, b.h0) && (cell.has_c ? state(tensor(2), b.H, b.c0) : tensor(2) == Py_None);
}

// Memory for the gradients that are needed, in the order of the tensors; needs: what autograd says, of other arguments
// before them.
bool make_gradients(Backward& b, bool layered, bool batch_first, PyObject* needs, Py_ssize_t before, const View& x,
                    Owned* made) {
  const auto wanted = [&](Py_ssize_t i) { return PyTuple_GET_ITEM(needs, before + i) == Py_True; };
  View view;
  if (wanted(0)) {
    if (!(layered ? make(x, {x.size(0), x.size(1), b.I}, view, made[0]) : make(x, {b.B, b.I}, view, made[0])))
      return false;
    b.dx = {view.begin(), batch_first ? b.I : b.B * b.I, batch_first ? b.T * b.I : b.I};
  }
  const auto state = [&](Py_ssize_t i, int64_t units, void*& to) {
    if (!wanted(i)) return true;
    if (!(layered ? make(x, {b.D, b.B, units}, view, made[i]) : make(x, {b.B, units}, view, made[i]))) return false;
    to = view.begin();
    return true;
  };
  if (!state(1, b.P, b.dh0) || !state(2, b.H, b.dc0)) return false;
  const int64_t GH = traits(b.cell).gates * b.H;
  Py_ssize_t next = 3;
  const auto weight = [&](const void* there, std::initializer_list<int64_t> shape, void*& to) {
    if (!there) return true;
    const Py_ssize_t i = next++;
    if (!wanted(i)) return true;
    if (!make_block(x, shape, view, made[i])) return false;
    to = view.begin();
    return true;
  };
  for (int d = 0; d < b.D; ++d) {
    const Weights& w = b.weights[d];
    auto& to = b.gradients[d];
    if (!weight(w.w_ih, {GH, b.I}, to.w_ih) || !weight(w.w_hh, {GH, b.P}, to.w_hh) || !weight(w.b_ih, {GH}, to.b_ih) ||
        !weight(w.b_hh, {GH}, to.b_hh) || !weight(w.w_hr, {b.P, b.H}, to.w_hr))
      return false;
  }
  return true;
}

PyObject* backward(PyObject*, PyObject* const* a, Py_ssize_t n) {
  if (!expect_arguments("backward", n, 8)) return nullptr;
  const CellTraits* const cell = find_cell(a[0]);
  const bool layered = a[1] == Py_True, batch_first = a[3] == Py_True;
  const long precision = PyLong_AsLong(a[4]);
  PyObject *const saved = a[5], *const needs = a[6], *const gradients = a[7];
  if (!exchange || !cell || precision < 0 || precision > 2 || !PyTuple_CheckExact(saved) ||
      !PyTuple_CheckExact(needs) || !PyTuple_CheckExact(gradients))
    return decline(Py_None);
  const Py_ssize_t count = PyTuple_GET_SIZE(saved) - 1, before = PyTuple_GET_SIZE(needs) - count;
  constexpr Py_ssize_t most = 3 + 10;
  if (count > most || before < 0 || PyTuple_GET_SIZE(gradients) != (layered ? 2 : 1) + cell->has_c || !quiet())
    return decline(Py_None);

  Backward b;
  b.D = a[2] == Py_True ? 2 : 1;
  b.precision = static_cast<Precision>(precision);
  References kept;
  View x, tape, dy, dh, dc;
  if (!read_layer(b, *cell, layered, batch_first, saved, x, kept) || !read(PyTuple_GET_ITEM(saved, 0), tape, kept) ||
      !same_type(tape, x) || !tape.is({b.D, b.T * b.B, tape_width(*cell, b.H, b.P, b.projected)}) || !tape.contiguous())
    return decline(Py_None);
  b.tape = tape.begin();
  Py_ssize_t next = 0;
  const auto gradient = [&] { return PyTuple_GET_ITEM(gradients, next++); };
  if (layered) {
    if (!read_gradient(gradient(), x, {x.size(0), x.size(1), b.D * b.P}, true, dy, kept)) return decline(Py_None);
    if (dy.object) b.dy = {dy.begin(), dy.stride(batch_first ? 1 : 0), dy.stride(batch_first ? 0 : 1)};
  }
  const auto state = [&](int64_t units, View& view, const void*& to) {
    PyObject* const object = gradient();
    if (!(layered ? read_gradient(object, x, {b.D, b.B, units}, false, view, kept)
                  : read_gradient(object, x, {b.B, units}, false, view, kept)))
      return false;
    if (view.object) to = view.begin();
    return true;
  };
  if (!state(b.P, dh, b.dh_n) || (cell->has_c && !state(b.H, dc, b.dc_n))) return decline(Py_None);

  Owned made[most];
  if (!make_gradients(b, layered, batch_first, needs, before, x, made)) return decline(Py_None);
  bool done = false;
  without_lock_if(3 * work_of(b, *cell) >= worth_releasing, [&]() noexcept {
    try {
      current().backward(b, team());
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
