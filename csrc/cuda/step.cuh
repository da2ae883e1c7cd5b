// The kernels around the recurrence that every path shares (begin, finish_back), and those of the path "step", which
// knows everything: after one product for a step (layer.cpp), one thread for each unit of each row does the rest.
//
// Forward of step q: product h W_hh^T, step; with a projection then product h_raw W_hr^T, finish_step. Backward: with a
// projection enter_back, product dh_out W_hr; step_back; product dgates W_hh, which is the carry of the step before.
//
// In the backward direction (d = 1) rows begin at their last step, so back-propagation leaves a row at t = length,
// while others go on: there its carry is handed out. In the forward direction, and of rows of full length, finish_back
// does it.
#pragma once

#include "device.cuh"
#include "kernels.h"
#include "unit.cuh"

namespace fastrnn {
namespace cuda {

constexpr int step_threads = 128;

// One of `width` values of one of `rows` rows; the last block has threads to spare, whose row is -1.
struct Place {
  int row, j;
};
FASTRNN_DEVICE Place place_of_thread(int64_t rows, int width) {
  const int64_t i = int64_t(block_x()) * step_threads + thread_index();
  if (i >= rows * width) return {-1, 0};
  if (i >> 32) return {int(i / width), int(i % width)};
  return {int(uint32_t(i) / uint32_t(width)), int(uint32_t(i) % uint32_t(width))};
}
inline LaunchShape shape_for(int64_t rows, int width) {
  LaunchShape shape;
  shape.x = int((rows * width + step_threads - 1) / step_threads);
  shape.threads = step_threads;
  return shape;
}

// Threads of a row: units and values of its state.
FASTRNN_UNIT int width_of(const Recurrence& r) { return r.H > r.P ? r.H : r.P; }

// ---------------------------------------------------------------------------------------------------------- forward

template <class Cell, class Storage>
FASTRNN_KERNEL(step_threads)
begin_kernel(Recurrence r) {
  const Place at = place_of_thread(int64_t(r.D) * r.B, width_of(r));
  if (at.row < 0) return;
  const int d = at.row / r.B, b = at.row % r.B, j = at.j;
  const bool ended = length_of(r, b) == 0;
  if (j < r.P) {
    const int64_t i = state_at(r, d, b, j, r.P);
    static_cast<Storage*>(r.h)[i] = narrow<Storage>(first_h<Storage>(r, d, b, j));
    if (ended) store_state<Storage>(r, r.h_n, i, load_state<Storage>(r, r.h0, i));
  }
  if (Cell::has_c && j < r.H) {
    const int64_t i = state_at(r, d, b, j, r.H);
    static_cast<Compute<Storage>*>(r.c)[i] = first_c<Storage>(r, d, b, j);
    if (ended) store_state<Storage>(r, r.c_n, i, load_state<Storage>(r, r.c0, i));
  }
}

template <class Cell, class Storage>
FASTRNN_KERNEL(step_threads)
step_kernel(Recurrence r, int d, int64_t t, const void* product, void* h_raw) {
  using T = Compute<Storage>;
  const Place at = place_of_thread(r.B, width_of(r));
  if (at.row < 0) return;
  const int b = at.row, j = at.j;
  const int64_t length = length_of(r, b);
  if (t >= length) return forward_padding<Storage>(r, d, t, b, j, r.H);
  if (j >= r.H) return;
  const T* const from_h = static_cast<const T*>(product) + int64_t(b) * Cell::gates * r.H + j;
  const T* const from_x =
      static_cast<const T*>(of(r.gates_x, d)) + (row_at(r, t, b) - of(r.x_row, d)) * Cell::gates * r.H + j;
  T sums[Cell::gates], x[Cell::gates], h = 0, c = 0;
#pragma unroll
  for (int g = 0; g < Cell::gates; ++g) {
    sums[g] = from_h[int64_t(g) * r.H];
    x[g] = from_x[int64_t(g) * r.H];
  }
  Storage* const state = static_cast<Storage*>(r.h) + state_at(r, d, b, j, r.P);
  T* const cell_state = static_cast<T*>(r.c) + (Cell::has_c ? state_at(r, d, b, j, r.H) : 0);
  if (Cell::reads_h) h = widen(*state);
  if (Cell::has_c) c = *cell_state;
  forward_cell<Cell, Storage>(r, d, t, b, j, length, sums, x, h, c);
  if (Cell::has_c) *cell_state = c;
  if (r.projected)
    static_cast<Storage*>(h_raw)[int64_t(b) * r.H + j] = narrow<Storage>(h);
  else
    *state = narrow<Storage>(forward_state<Storage>(r, d, t, b, j, length, h));
}

template <class Storage>
FASTRNN_KERNEL(step_threads)
finish_step_kernel(Recurrence r, int d, int64_t t, const void* projected) {
  const Place at = place_of_thread(r.B, r.P);
  if (at.row < 0) return;
  const int64_t length = length_of(r, at.row);
  if (t >= length) return;
  const Compute<Storage> h = static_cast<const Compute<Storage>*>(projected)[int64_t(at.row) * r.P + at.j];
  static_cast<Storage*>(r.h)[state_at(r, d, at.row, at.j, r.P)] =
      narrow<Storage>(forward_state<Storage>(r, d, t, at.row, at.j, length, h));
}

// --------------------------------------------------------------------------------------------------------- backward

// Whether back-propagation has just left row b, in the backward direction.
FASTRNN_UNIT bool just_left(int d, int64_t t, int64_t length) { return d == 1 && t == length; }

template <class Storage>
FASTRNN_KERNEL(step_threads)
enter_back_kernel(Recurrence r, int d, int64_t t, const void* carry) {
  using T = Compute<Storage>;
  const Place at = place_of_thread(r.B, r.P);
  if (at.row < 0) return;
  const int b = at.row, j = at.j;
  const int64_t length = length_of(r, b);
  T dh = carry ? static_cast<const T*>(carry)[int64_t(b) * r.P + j] : T(0);
  if (t >= length) {
    if (just_left(d, t, length)) finish_h<Storage>(r, d, b, j, length, dh);
    return;
  }
  dh = backward_state<Storage>(r, d, t, b, j, length, dh, load_incoming<Storage>(r, d, t, b, j));
  const int64_t to = (row_at(r, t, b) - of(r.g_row, d)) * r.P + j;
  static_cast<Storage*>(of(r.dh_out, d))[to] = narrow<Storage>(dh);
  static_cast<Storage*>(of(r.h_prev, d))[to] = narrow<Storage>(entered_h<Storage>(r, d, t, b, j, length, r.tape_state));
}

template <class Cell, class Storage>
FASTRNN_KERNEL(step_threads)
step_back_kernel(Recurrence r, int d, int64_t t, const void* carry, void* bypass, const void* projected) {
  using T = Compute<Storage>;
  const Place at = place_of_thread(r.B, width_of(r));
  if (at.row < 0) return;
  const int b = at.row, j = at.j;
  const int64_t length = length_of(r, b), i = int64_t(b) * r.P + j;
  T dh = 0, dc = 0, da[Cell::slots];
  if (!r.projected && carry) {
    dh = static_cast<const T*>(carry)[i];
    if (Cell::bypass) dh += static_cast<const T*>(bypass)[i];
  }
  T* const cell_carry = static_cast<T*>(r.dc) + (Cell::has_c ? state_at(r, d, b, j, r.H) : 0);
  if (Cell::has_c && carry && j < r.H) dc = *cell_carry;
  if (t >= length) {
    if (just_left(d, t, length)) {
      if (!r.projected) finish_h<Storage>(r, d, b, j, length, dh);
      if (Cell::has_c && j < r.H) finish_c<Storage>(r, d, b, j, length, dc);
    }
    return backward_padding<Cell, Storage>(r, d, t, b, j);
  }
  if (j >= r.H) return;
  if (r.projected)
    dh = static_cast<const T*>(projected)[int64_t(b) * r.H + j];
  else
    dh = backward_state<Storage>(r, d, t, b, j, length, dh, load_incoming<Storage>(r, d, t, b, j));
  const auto taped = load_tape<Cell, T>(r, d, t, b, j, length);
  const T rest = backward_cell<Cell, Storage>(r, d, t, b, j, length, taped, dh, dc, da);
  if (Cell::has_c) *cell_carry = dc;
  if (Cell::bypass) static_cast<T*>(bypass)[i] = rest;
}

template <class Cell, class Storage>
FASTRNN_KERNEL(step_threads)
finish_back_kernel(Recurrence r, const void* carry, const void* bypass) {
  using T = Compute<Storage>;
  const Place at = place_of_thread(int64_t(r.D) * r.B, width_of(r));
  if (at.row < 0) return;
  const int d = at.row / r.B, b = at.row % r.B, j = at.j;
  const int64_t length = length_of(r, b);
  if (d == 1 && length < r.T) return;
  if (j < r.P) {
    const int64_t i = state_at(r, d, b, j, r.P);
    T dh = static_cast<const T*>(carry)[i];
    if (Cell::bypass && bypass) dh += static_cast<const T*>(bypass)[i];
    finish_h<Storage>(r, d, b, j, length, dh);
  }
  if (Cell::has_c && j < r.H)
    finish_c<Storage>(r, d, b, j, length, static_cast<const T*>(r.dc)[state_at(r, d, b, j, r.H)]);
}

// ---------------------------------------------------------------------------------------------------------- launches

// CellKernels of a cell in a storage dtype (kernels.h says what each does).
template <class Cell, class Storage>
struct StepPath {
  static void begin(const Recurrence& r, Stream stream) {
    launch(begin_kernel<Cell, Storage>, shape_for(int64_t(r.D) * r.B, width_of(r)), stream, r);
  }
  static void step(const Recurrence& r, int d, int64_t q, const void* product, void* h_raw, Stream stream) {
    launch(step_kernel<Cell, Storage>, shape_for(r.B, width_of(r)), stream, r, d, step_at(r, d, q), product, h_raw);
  }
  static void finish_step(const Recurrence& r, int d, int64_t q, const void* projected, Stream stream) {
    launch(finish_step_kernel<Storage>, shape_for(r.B, r.P), stream, r, d, step_at(r, d, q), projected);
  }
  static void enter_back(const Recurrence& r, int d, int64_t q, const void* carry, Stream stream) {
    launch(enter_back_kernel<Storage>, shape_for(r.B, r.P), stream, r, d, step_at(r, d, q), carry);
  }
  static void step_back(const Recurrence& r, int d, int64_t q, const void* carry, void* bypass, const void* dh,
                        Stream stream) {
    launch(step_back_kernel<Cell, Storage>, shape_for(r.B, width_of(r)), stream, r, d, step_at(r, d, q), carry, bypass,
           dh);
  }
  static void finish_back(const Recurrence& r, const void* carry, const void* bypass, Stream stream) {
    launch(finish_back_kernel<Cell, Storage>, shape_for(int64_t(r.D) * r.B, width_of(r)), stream, r, carry, bypass);
  }
};

}  // namespace cuda
}  // namespace fastrnn
