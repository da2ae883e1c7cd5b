// What happens to one unit of one row at one step, forward and backward: the gate mathematics of cells.h between the
// loads and stores that every path has in common. Which thread does it, and how the products reach it, is the path's
// own.
//
// Forward, for each active (t, b): forward_cell() for each of H units, then forward_state() for each of P values of the
// state; without a projection one thread may do both. Backward: backward_state() for each of P, then backward_cell()
// for each of H. The carries that they take and return are the product's part and the bypass together.
#pragma once

#include "recurrence.h"
#include "value.cuh"

namespace fastrnn {
namespace cuda {

#define FASTRNN_UNIT FASTRNN_MEMBER_FN

// Of an array of both directions. A variable index would put a kernel's copy of the whole struct into local memory.
template <class X>
FASTRNN_UNIT X of(const X (&both)[2], int d) {
  return d ? both[1] : both[0];
}
FASTRNN_UNIT int64_t length_of(const Recurrence& r, int b) { return r.lengths ? r.lengths[b] : r.T; }
FASTRNN_UNIT int64_t step_at(const Recurrence& r, int d, int64_t q) { return d ? r.T - 1 - q : q; }
FASTRNN_UNIT int64_t row_at(const Recurrence& r, int64_t t, int b) {
  return (r.first_row ? r.first_row[t - r.first_row_from] : t * r.B) + b;
}
// Element offset of row b at step t of y or dy.
template <class R>
FASTRNN_UNIT int64_t element_at(const Recurrence& r, const R& rows, int64_t t, int b) {
  return r.packed ? row_at(r, t, b) * rows.row : t * rows.step + b * rows.row;
}
// Whether the state that enters step t of row b, which is active there, is cut and starts anew.
FASTRNN_UNIT bool is_cut(const Recurrence& r, int d, int64_t t, int b, int64_t length) {
  if (!r.reset || (d && t + 1 >= length)) return false;
  return r.reset[(t + d - r.reset_from) * r.reset_step + (b - r.reset_row_from) * r.reset_row];
}

// Element i of a tensor of the states' dtype.
template <class Storage>
FASTRNN_UNIT Compute<Storage> load_state(const Recurrence& r, const void* from, int64_t i) {
  if (!from) return 0;
  if (r.state_is_f32) return Compute<Storage>(static_cast<const float*>(from)[i]);
  return widen(static_cast<const Storage*>(from)[i]);
}
template <class Storage>
FASTRNN_UNIT void store_state(const Recurrence& r, void* to, int64_t i, Compute<Storage> x) {
  if (r.state_is_f32)
    static_cast<float*>(to)[i] = float(x);
  else
    static_cast<Storage*>(to)[i] = narrow<Storage>(x);
}
// What a state of `width` values starts from after a cut.
template <class Storage>
FASTRNN_UNIT Compute<Storage> start_of(const Recurrence& r, const void* reset, int d, int b, int j, int width) {
  return load_state<Storage>(r, reset, (r.one_reset ? int64_t(d) : int64_t(d) * r.B + b) * width + j);
}
// State index of (d, b, j).
FASTRNN_UNIT int64_t state_at(const Recurrence& r, int d, int b, int j, int width) {
  return (int64_t(d) * r.B + b) * width + j;
}
// Where the stored row (d, t, b) begins on the tape.
FASTRNN_UNIT int64_t tape_at(const Recurrence& r, int d, int64_t t, int b) {
  return (int64_t(d) * r.N + row_at(r, t, b)) * r.tape_width;
}

// ---------------------------------------------------------------------------------------------------------- forward

// The state that enters the first step of direction d, cut if it is to be: of h, rounded to storage.
template <class Storage>
FASTRNN_UNIT Compute<Storage> first_h(const Recurrence& r, int d, int b, int j) {
  const int64_t length = length_of(r, b), t = d ? length - 1 : 0;
  const bool cut = length > 0 && is_cut(r, d, t, b, length);
  return rounded<Storage>(cut ? start_of<Storage>(r, r.h_reset, d, b, j, r.P)
                              : load_state<Storage>(r, r.h0, state_at(r, d, b, j, r.P)));
}
template <class Storage>
FASTRNN_UNIT Compute<Storage> first_c(const Recurrence& r, int d, int b, int j) {
  const int64_t length = length_of(r, b), t = d ? length - 1 : 0;
  const bool cut = length > 0 && is_cut(r, d, t, b, length);
  return cut ? start_of<Storage>(r, r.c_reset, d, b, j, r.H) : load_state<Storage>(r, r.c0, state_at(r, d, b, j, r.H));
}

// The cell at (t, b), unit j. product[g]: h W_hh^T of gate g, torch's order, without bias. x[g]: x W_ih^T likewise. h
// is the state before (of a cell that reads it) and the new one, unrounded; c likewise, cut where the next step is.
template <class Cell, class Storage>
FASTRNN_UNIT void forward_cell(const Recurrence& r, int d, int64_t t, int b, int j, int64_t length,
                               const Compute<Storage>* product, const Compute<Storage>* x, Compute<Storage>& h,
                               Compute<Storage>& c) {
  using T = Compute<Storage>;
  using V = Value<T>;
  V pre[Cell::slots], kept[Cell::tape], new_h{h}, new_c{c};
#pragma unroll
  for (int s = 0; s < Cell::slots; ++s) pre[s] = V{0};
#pragma unroll
  for (int s = 0; s < Cell::gates; ++s) {
    const int g = hidden_gate<Cell>(s);
    T sum = product[g];
    if (of(r.b_hh, d)) sum += widen(static_cast<const Storage*>(of(r.b_hh, d))[g * r.H + j]);
    pre[s] = V{sum};
  }
#pragma unroll
  for (int g = 0; g < Cell::gates; ++g) {
    T sum = x[g];
    if (of(r.b_ih, d)) sum += widen(static_cast<const Storage*>(of(r.b_ih, d))[g * r.H + j]);
    pre[Cell::x_first + g] = pre[Cell::x_first + g] + V{sum};
  }
  Cell::forward(pre, new_h, new_c, kept);
  h = new_h.v;
  if (r.tape) {
    T* to = static_cast<T*>(r.tape) + tape_at(r, d, t, b) + j;
    // The last block of a cell without c is h' itself, which is rounded.
#pragma unroll
    for (int k = 0; k < Cell::tape; ++k)
      to[k * r.tape_h] = !Cell::has_c && k == Cell::tape - 1 ? rounded<Storage>(kept[k].v) : kept[k].v;
  }
  if (Cell::has_c) {
    c = new_c.v;
    if (r.c_all) static_cast<Storage*>(r.c_all)[((int64_t(d) * r.T + t) * r.B + b) * r.H + j] = narrow<Storage>(c);
    if (t == (d ? 0 : length - 1)) {
      store_state<Storage>(r, r.c_n, state_at(r, d, b, j, r.H), c);
    } else if (is_cut(r, d, d ? t - 1 : t + 1, b, length)) {
      c = start_of<Storage>(r, r.c_reset, d, b, j, r.H);
    }
  }
}

// Value j of the new state h at (t, b): rounded, stored wherever it is wanted; returns what enters the next step.
template <class Storage>
FASTRNN_UNIT Compute<Storage> forward_state(const Recurrence& r, int d, int64_t t, int b, int j, int64_t length,
                                            Compute<Storage> h) {
  using T = Compute<Storage>;
  const Storage stored = narrow<Storage>(h);
  h = widen(stored);
  static_cast<Storage*>(r.y.data)[element_at(r, r.y, t, b) + int64_t(d) * r.P + j] = stored;
  if (r.h_all) static_cast<Storage*>(r.h_all)[((int64_t(d) * r.T + t) * r.B + b) * r.P + j] = stored;
  if (r.projected && r.tape) static_cast<T*>(r.tape)[tape_at(r, d, t, b) + r.tape_state + j] = h;
  if (t == (d ? 0 : length - 1)) {
    store_state<Storage>(r, r.h_n, state_at(r, d, b, j, r.P), h);
  } else if (is_cut(r, d, d ? t - 1 : t + 1, b, length)) {
    h = rounded<Storage>(start_of<Storage>(r, r.h_reset, d, b, j, r.P));
  }
  return h;
}

// Zeros where a row that is past its length has results all the same.
template <class Storage>
FASTRNN_UNIT void forward_padding(const Recurrence& r, int d, int64_t t, int b, int j, int width) {
  const Storage zero = narrow<Storage>(0);
  const int64_t at = ((int64_t(d) * r.T + t) * r.B + b);
  if (!r.packed && j < r.P) static_cast<Storage*>(r.y.data)[element_at(r, r.y, t, b) + int64_t(d) * r.P + j] = zero;
  if (r.h_all && j < r.P) static_cast<Storage*>(r.h_all)[at * r.P + j] = zero;
  if (r.c_all && j < width) static_cast<Storage*>(r.c_all)[at * r.H + j] = zero;
}

// ---------------------------------------------------------------------------------------------------------- backward

// Value j of what the caller gives as gradient of the state that left step t of row b, which is active there; as it
// lies in memory, so that nobody waits for it before it is used.
template <class Storage>
struct Incoming {
  Storage y, all;
};
template <class Storage>
FASTRNN_UNIT Incoming<Storage> load_incoming(const Recurrence& r, int d, int64_t t, int b, int j) {
  Incoming<Storage> found = {};
  if (r.dy.data) found.y = static_cast<const Storage*>(r.dy.data)[element_at(r, r.dy, t, b) + int64_t(d) * r.P + j];
  if (r.dh_all) found.all = static_cast<const Storage*>(r.dh_all)[((int64_t(d) * r.T + t) * r.B + b) * r.P + j];
  return found;
}

// Value j of the whole gradient of that state. carry: gradient of the state that entered the step after it; given back
// to a reset state where that was cut.
template <class Storage>
FASTRNN_UNIT Compute<Storage> backward_state(const Recurrence& r, int d, int64_t t, int b, int j, int64_t length,
                                             Compute<Storage> carry, const Incoming<Storage>& incoming) {
  using T = Compute<Storage>;
  const int64_t at = state_at(r, d, b, j, r.P);
  if (t == (d ? 0 : length - 1)) {
    carry = load_state<Storage>(r, r.dh_n, at);
  } else if (is_cut(r, d, d ? t - 1 : t + 1, b, length)) {
    if (r.dh_reset) static_cast<T*>(r.dh_reset)[at] += carry;
    carry = 0;
  }
  return carry + (widen(incoming.y) + widen(incoming.all));
}

// Value j of the state that entered step t of row b; `block` of the tape holds it.
template <class Storage>
FASTRNN_UNIT Compute<Storage> entered_h(const Recurrence& r, int d, int64_t t, int b, int j, int64_t length,
                                        int64_t block) {
  using T = Compute<Storage>;
  if (is_cut(r, d, t, b, length)) return rounded<Storage>(start_of<Storage>(r, r.h_reset, d, b, j, r.P));
  if (t == (d ? length - 1 : 0)) return rounded<Storage>(load_state<Storage>(r, r.h0, state_at(r, d, b, j, r.P)));
  return static_cast<const T*>(r.saved)[tape_at(r, d, d ? t + 1 : t - 1, b) + block + j];
}

// What the tape says of unit j at (t, b), and of the step that entered it: c and o of a cell that has them, else h'.
// The latter means nothing in the row's first step, nor after a cut.
template <class Cell, class T>
struct Taped {
  T kept[Cell::tape];
  T before[2];
};
template <class Cell, class T>
FASTRNN_UNIT Taped<Cell, T> load_tape(const Recurrence& r, int d, int64_t t, int b, int j, int64_t length) {
  Taped<Cell, T> found = {};
  const T* const tape = static_cast<const T*>(r.saved) + tape_at(r, d, t, b) + j;
#pragma unroll
  for (int k = 0; k < Cell::tape; ++k) found.kept[k] = tape[k * r.tape_h];
  if (t == (d ? length - 1 : 0)) return found;
  const T* const before = static_cast<const T*>(r.saved) + tape_at(r, d, d ? t + 1 : t - 1, b) + j;
  found.before[0] = before[(Cell::tape - 1) * r.tape_h];
  if (Cell::has_c) found.before[1] = before[(Cell::tape - 2) * r.tape_h];
  return found;
}

// The cell at (t, b), unit j: dh the gradient of h' (of what a projection is given), dc the carry of c, in: of the step
// after, out: of the step before. da[k]: gradients of the pre-activations, block k (recurrence.h). Returns the part of
// the gradient of h that does not pass through the product.
template <class Cell, class Storage>
FASTRNN_UNIT Compute<Storage> backward_cell(const Recurrence& r, int d, int64_t t, int b, int j, int64_t length,
                                            const Taped<Cell, Compute<Storage>>& taped, Compute<Storage> dh,
                                            Compute<Storage>& dc, Compute<Storage>* da) {
  using T = Compute<Storage>;
  using V = Value<T>;
  V kept[Cell::tape], slots[Cell::slots];
#pragma unroll
  for (int k = 0; k < Cell::tape; ++k) kept[k] = V{taped.kept[k]};
  const bool cut = is_cut(r, d, t, b, length), first = t == (d ? length - 1 : 0);
  const int64_t row = row_at(r, t, b) - of(r.g_row, d);
  T h_prev = 0, c_prev = 0;
  if (Cell::has_c) {
    c_prev = cut     ? start_of<Storage>(r, r.c_reset, d, b, j, r.H)
             : first ? load_state<Storage>(r, r.c0, state_at(r, d, b, j, r.H))
                     : taped.before[0];
    if (t == (d ? 0 : length - 1)) {
      dc = load_state<Storage>(r, r.dc_n, state_at(r, d, b, j, r.H));
    } else if (is_cut(r, d, d ? t - 1 : t + 1, b, length)) {
      if (r.dc_reset) static_cast<T*>(r.dc_reset)[state_at(r, d, b, j, r.H)] += dc;
      dc = 0;
    }
    if (r.dc_all) dc += widen(static_cast<const Storage*>(r.dc_all)[((int64_t(d) * r.T + t) * r.B + b) * r.H + j]);
  }
  if (!r.projected) {
    if (cut || first) {
      h_prev = entered_h<Storage>(r, d, t, b, j, length, 0);
    } else if constexpr (Cell::has_c) {  // LSTM keeps c and o
      h_prev = rounded<Storage>(Cell::hidden(V{taped.before[1]}, V{c_prev}).v);
    } else {
      h_prev = taped.before[0];
    }
    static_cast<Storage*>(of(r.h_prev, d))[row * r.P + j] = narrow<Storage>(h_prev);
  } else if constexpr (Cell::has_c) {
    static_cast<Storage*>(of(r.h_raw, d))[row * r.H + j] =
        narrow<Storage>(Cell::hidden(kept[Cell::tape - 2], kept[Cell::tape - 1]).v);
  }
  V v_dh{dh}, v_dc{dc};
  Cell::backward(kept, V{h_prev}, V{c_prev}, v_dh, v_dc, slots);
  dc = v_dc.v;
  Storage* const to = static_cast<Storage*>(of(r.dgates, d)) + row * Cell::slots * r.H + j;
#pragma unroll
  for (int s = 0; s < Cell::slots; ++s) {
    const int block = s < Cell::gates ? hidden_gate<Cell>(s) : s;
    da[block] = slots[s].v;
    to[int64_t(block) * r.H] = narrow<Storage>(slots[s].v);
  }
  return Cell::bypass ? v_dh.v : T(0);
}

// A row past its length: nothing comes from it. j runs over H and, with a projection, P.
template <class Cell, class Storage>
FASTRNN_UNIT void backward_padding(const Recurrence& r, int d, int64_t t, int b, int j) {
  if (r.packed) return;
  const int64_t row = row_at(r, t, b) - of(r.g_row, d);
  const Storage zero = narrow<Storage>(0);
  if (j < r.H) {
#pragma unroll
    for (int s = 0; s < Cell::slots; ++s)
      static_cast<Storage*>(of(r.dgates, d))[row * Cell::slots * r.H + int64_t(s) * r.H + j] = zero;
    if (r.projected) static_cast<Storage*>(of(r.h_raw, d))[row * r.H + j] = zero;
  }
  if (j >= r.P) return;
  static_cast<Storage*>(of(r.h_prev, d))[row * r.P + j] = zero;
  if (r.projected) static_cast<Storage*>(of(r.dh_out, d))[row * r.P + j] = zero;
}

// The gradient of the state that entered the row's first step: to dh0, or where reset cut it to dh_reset.
template <class Storage>
FASTRNN_UNIT void finish_h(const Recurrence& r, int d, int b, int j, int64_t length, Compute<Storage> carry) {
  using T = Compute<Storage>;
  const int64_t at = state_at(r, d, b, j, r.P);
  if (length == 0) carry = load_state<Storage>(r, r.dh_n, at);
  if (length > 0 && is_cut(r, d, d ? length - 1 : 0, b, length)) {
    if (r.dh_reset) static_cast<T*>(r.dh_reset)[at] += carry;
    carry = 0;
  }
  if (r.dh0) store_state<Storage>(r, r.dh0, at, carry);
}
template <class Storage>
FASTRNN_UNIT void finish_c(const Recurrence& r, int d, int b, int j, int64_t length, Compute<Storage> carry) {
  using T = Compute<Storage>;
  const int64_t at = state_at(r, d, b, j, r.H);
  if (length == 0) carry = load_state<Storage>(r, r.dc_n, at);
  if (length > 0 && is_cut(r, d, d ? length - 1 : 0, b, length)) {
    if (r.dc_reset) static_cast<T*>(r.dc_reset)[at] += carry;
    carry = 0;
  }
  if (r.dc0) store_state<Storage>(r, r.dc0, at, carry);
}

}  // namespace cuda
}  // namespace fastrnn
