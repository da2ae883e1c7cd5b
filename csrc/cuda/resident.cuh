// The kernels that keep w_hh on the chip for a whole chunk of steps: one block, a cluster or the whole grid, forward
// and back-propagation through time. layout.h says who has what, exchange.cuh how blocks hear of each other, unit.cuh
// what happens to a unit.
//
//   forward   for each step: receive h of all units; multiply; each unit's cell; publish h of the own ones
//   backward  for each step: each unit's cell backward; publish da of the own ones; receive all; multiply
//
// Registers are the weights'; so the kernels take care to compute other things anew rather than keep them (forget).
#pragma once

#include "exchange.cuh"

namespace fastrnn {
namespace cuda {

template <class Cell, class Storage, Factors factors>
FASTRNN_KERNEL(max_threads)
resident_forward(const Recurrence given, const Residence at) {
  using Chip = Block<factors, false>;
  constexpr int G = Cell::gates;
  const Sharing& s = at.s;
  Chip b(at, given.D);
  int row0, rows, j0, units;  // the first of the block's rows and units, and how many there are
  const auto place = [&] {
    row0 = b.group * s.rows;
    rows = given.B - row0 < s.rows ? given.B - row0 : s.rows;
    j0 = b.rank * s.units;
    units = given.H - j0 < s.units ? given.H - j0 : s.units;
  };
  place();
  const int padded = s.rows * s.units;
  const Pair first(b.tid, b.threads, s.units);
  Chip::start(b);

  const auto states_c = [&] { return reinterpret_cast<float*>(b.memory + s.states_at()); };
  const auto states_h = [&] { return states_c() + padded; };
  const auto bias = [&] { return reinterpret_cast<float*>(b.memory + s.bias_at()); };  // [b_ih, b_hh][G][units]
  const auto lengths = [&] { return reinterpret_cast<int*>(b.memory + s.lengths_at()); };
#pragma unroll 1
  for (int i = b.tid; i < G * units; i += b.threads) {
    const int g = i / units, u = i % units;
    const auto* const b_ih = static_cast<const Storage*>(of(given.b_ih, b.d));
    const auto* const b_hh = static_cast<const Storage*>(of(given.b_hh, b.d));
    if (b_ih) bias()[g * s.units + u] = widen(b_ih[g * given.H + j0 + u]);
    if (b_hh) bias()[(G + g) * s.units + u] = widen(b_hh[g * given.H + j0 + u]);
  }
#pragma unroll 1
  for (int n = b.tid; n < rows; n += b.threads) lengths()[n] = int(length_of(given, row0 + n));
#pragma unroll 1
  for (Pair p = first.again(); p.n < rows; p.next()) {
    if (p.u >= units) continue;
    const int64_t state = state_at(given, b.d, row0 + p.n, j0 + p.u, given.H);
    const float h = widen(static_cast<const Storage*>(given.h)[state]);
    states_h()[p.n * s.units + p.u] = h;
    if (Cell::has_c) states_c()[p.n * s.units + p.u] = static_cast<const float*>(given.c)[state];
    b.slice()[p.n * s.units + p.u] = Chip::E::from(h);
  }
  sync_block();
  Chip::publish(b, 0);

  float ahead[G] = {};  // x of the first pair, fetched before it is needed
#pragma unroll 1
  for (int e = 0; e < int(given.end - given.begin); ++e) {
    b.forget_all();
    place();
    const int64_t q = given.begin + e;
    const int64_t t = step_at(given, b.d, q);
    const int64_t from = q - e % window_steps;
    const Window window(given, b.d, from, given.end - from < window_steps ? given.end : from + window_steps);
    if (e % window_steps == 0 && (s.resets || s.packed)) {
      if (e) sync_block();  // the window before has been read
      window.fetch(given, s, b.memory, row0, rows, b.tid, b.threads);
      sync_block();
    }
    Recurrence r = given;
    r.b_ih[0] = r.b_ih[1] = r.b_hh[0] = r.b_hh[1] = nullptr;  // added here
    window.use(r, s, b.memory, row0);
    // Where x W_ih^T of unit u, row n at a step lies.
    const auto x_at = [&](int64_t step, int n, int u) {
      return static_cast<const float*>(of(given.gates_x, b.d)) +
             (row_at(r, step, row0 + n) - of(given.x_row, b.d)) * G * given.H + j0 + u;
    };
    // The first pair's of the next step, whose way from memory is then covered by the exchange and the product.
    const auto fetch_next = [&] {
      const Pair own = first.again();
      const int64_t next = b.d ? t - 1 : t + 1;
      if (q + 1 == given.end || own.n >= rows || own.u >= units || next >= lengths()[own.n]) return;
      const float* const x = x_at(next, own.n, own.u);
#pragma unroll
      for (int g = 0; g < G; ++g) ahead[g] = x[g * given.H];
    };
    Chip::receive(b, e);
    bool is_first = true;
#pragma unroll 1
    for (int pass = 0; pass < rows; pass += s.pass_rows()) {
      if (pass) sync_block();  // the sums of the pass before have been read
      Chip::multiply(b, e, pass);
      sync_block();
      const int last = rows - pass < s.pass_rows() ? rows : pass + s.pass_rows();
#pragma unroll 1
      for (Pair p = first.again(pass); p.n < last; p.next(), is_first = false) {
        if (p.u >= units) continue;
        const int n = p.n, row = row0 + n, j = j0 + p.u, i = n * s.units + p.u;
        const int length = lengths()[n];
        if (t >= length) {
          forward_padding<Storage>(r, b.d, t, row, j, r.H);
          continue;
        }
        float product[G], x[G];
        if (is_first && e > 0) {
#pragma unroll
          for (int g = 0; g < G; ++g) x[g] = ahead[g];
        } else {
          const float* const from = x_at(t, n, p.u);
#pragma unroll
          for (int g = 0; g < G; ++g) x[g] = from[g * given.H];
        }
#pragma unroll
        for (int g = 0; g < G; ++g) {
          product[g] = b.total(g * s.units + p.u, n - pass) + bias()[(G + g) * s.units + p.u];
          x[g] += bias()[g * s.units + p.u];
        }
        float h = states_h()[i], c = Cell::has_c ? states_c()[i] : 0;
        forward_cell<Cell, Storage>(r, b.d, t, row, j, length, product, x, h, c);
        h = forward_state<Storage>(r, b.d, t, row, j, length, h);
        states_h()[i] = h;
        if (Cell::has_c) states_c()[i] = c;
        b.slice()[i] = Chip::E::from(h);
      }
      is_first = false;
    }
    // On the grid what is on its way would hold the flag back.
    if (at.path != on_grid) fetch_next();
    sync_block();
    if (q + 1 < given.end) Chip::publish(b, e + 1);
    if (at.path == on_grid) fetch_next();
  }

#pragma unroll 1
  for (Pair p = first.again(); p.n < rows; p.next()) {
    if (p.u >= units) continue;
    const int64_t state = state_at(given, b.d, row0 + p.n, j0 + p.u, given.H);
    static_cast<Storage*>(given.h)[state] = narrow<Storage>(states_h()[p.n * s.units + p.u]);
    if (Cell::has_c) static_cast<float*>(given.c)[state] = states_c()[p.n * s.units + p.u];
  }
  Chip::finish(b);
}

template <class Cell, class Storage, Factors factors>
FASTRNN_KERNEL(max_threads)
resident_backward(const Recurrence given, const Residence at) {
  using Chip = Block<factors, true>;
  constexpr int G = Cell::gates;
  const Sharing& s = at.s;
  Chip b(at, given.D);
  int row0, rows, j0, units;  // the first of the block's rows and units, and how many there are
  const auto place = [&] {
    row0 = b.group * s.rows;
    rows = given.B - row0 < s.rows ? given.B - row0 : s.rows;
    j0 = b.rank * s.units;
    units = given.H - j0 < s.units ? given.H - j0 : s.units;
  };
  place();
  const int padded = s.rows * s.units;
  const Pair first(b.tid, b.threads, s.units);
  Chip::start(b);

  // Gradients: of c, and the part of h's that does not pass through the product (before the first step all of it).
  const auto states_c = [&] { return reinterpret_cast<float*>(b.memory + s.states_at()); };
  const auto states_h = [&] { return states_c() + padded; };
  const auto lengths = [&] { return reinterpret_cast<int*>(b.memory + s.lengths_at()); };
#pragma unroll 1
  for (int n = b.tid; n < rows; n += b.threads) lengths()[n] = int(length_of(given, row0 + n));
#pragma unroll 1
  for (Pair p = first.again(); p.n < rows; p.next()) {
    if (p.u >= units) continue;
    const int64_t state = state_at(given, b.d, row0 + p.n, j0 + p.u, given.H);
    states_h()[p.n * s.units + p.u] = static_cast<const float*>(given.dh)[state];
    if (Cell::has_c) states_c()[p.n * s.units + p.u] = static_cast<const float*>(given.dc)[state];
  }
  sync_block();

  // Of the thread's first pair, fetched at the step before, since memory is far away.
  Taped<Cell, float> ahead = {};
  Incoming<Storage> incoming = {};
#pragma unroll 1
  for (int e = 0;; ++e) {
    const int64_t q = given.end - 1 - e;
    const bool past = q < given.begin;  // the last product alone is left
    b.forget_all();
    place();
    const int64_t t = step_at(given, b.d, q);
    const int64_t until = q + 1 + e % window_steps;
    const Window window(given, b.d, until - given.begin < window_steps ? given.begin : until - window_steps, until);
    if (!past && e % window_steps == 0 && (s.resets || s.packed)) {
      if (e) sync_block();  // the window before has been read
      window.fetch(given, s, b.memory, row0, rows, b.tid, b.threads);
      sync_block();
    }
    Recurrence r = given;
    window.use(r, s, b.memory, row0);
    if (e) Chip::receive(b, e - 1);
    bool is_first = true;
#pragma unroll 1
    for (int pass = 0; pass < rows; pass += s.pass_rows()) {
      if (pass) sync_block();  // the sums of the pass before have been read
      if (e) Chip::multiply(b, e - 1, pass);
      sync_block();
      const int last = rows - pass < s.pass_rows() ? rows : pass + s.pass_rows();
#pragma unroll 1
      for (Pair p = first.again(pass); p.n < last; p.next(), is_first = false) {
        if (p.u >= units) continue;
        const int n = p.n, row = row0 + n, j = j0 + p.u, i = n * s.units + p.u;
        const int length = lengths()[n];
        float carry = states_h()[i] + (e ? b.total(p.u, n - pass) : 0), dc = Cell::has_c ? states_c()[i] : 0;
        if (past) {
          const int64_t state = state_at(given, b.d, row, j, given.H);
          static_cast<float*>(given.dh)[state] = carry;
          if (Cell::has_c) static_cast<float*>(given.dc)[state] = dc;
          continue;
        }
        float da[Cell::slots] = {}, bypass = 0;
        if (t < length) {
          if (!is_first || e == 0) {
            ahead = load_tape<Cell, float>(r, b.d, t, row, j, length);
            incoming = load_incoming<Storage>(r, b.d, t, row, j);
          }
          carry = backward_state<Storage>(r, b.d, t, row, j, length, carry, incoming);
          bypass = backward_cell<Cell, Storage>(r, b.d, t, row, j, length, ahead, carry, dc, da);
        } else {
          backward_padding<Cell, Storage>(r, b.d, t, row, j);
          if (b.d && t == length) {  // the row's first step is behind us
            finish_h<Storage>(r, b.d, row, j, length, carry);
            if (Cell::has_c) finish_c<Storage>(r, b.d, row, j, length, dc);
          }
        }
        states_h()[i] = bypass;
        if (Cell::has_c) states_c()[i] = dc;
#pragma unroll
        for (int g = 0; g < G; ++g) b.slice()[n * s.width() + g * s.units + p.u] = Chip::E::from(da[g]);
      }
      is_first = false;
    }
    if (past) break;
    sync_block();
    Chip::publish(b, e);
    const Pair own = first.again();
    if (q > given.begin && own.n < rows && own.u < units) {
      const int length = lengths()[own.n], row = row0 + own.n, j = j0 + own.u;
      const int64_t next = b.d ? t + 1 : t - 1;
      if (next < length) {
        ahead = load_tape<Cell, float>(r, b.d, next, row, j, length);
        incoming = load_incoming<Storage>(r, b.d, next, row, j);
      }
    }
  }

  Chip::finish(b);
}

// The weights of one direction as the blocks' fragments: one thread for each quad.
template <class Storage, Factors factors, bool backward>
FASTRNN_KERNEL(256)
pack_weights(const Recurrence r, const Sharing s, Quad* packed_0, Quad* packed_1) {
  constexpr FragmentSizes sizes = sizes_of(factors, backward);
  const int d = block_y();
  const auto* const w = static_cast<const Storage*>(of(r.w_hh, d));
  for (int64_t i = int64_t(block_x()) * thread_count() + thread_index(); i < s.packed_quads();
       i += int64_t(grid_x()) * thread_count()) {
    const int lane = int(i % 32), quad = int(i / 32 % sizes.quads), kk = int(i / 32 / sizes.quads % s.depth);
    const int warp = int(i / 32 / sizes.quads / s.depth % s.warps());
    const int block = int(i / 32 / sizes.quads / s.depth / s.warps());
    const auto weight = [&](int m, int k) {
      int row, column;
      s.weight_at(block, m, k, row, column);
      return row < 0 ? 0.f : widen(w[int64_t(row) * r.H + column]);
    };
    (d ? packed_1 : packed_0)[i] = make_fragment<factors>(weight, warp / s.splits * sizes.rows,
                                                          (kk * s.splits + warp % s.splits) * sizes.depth, quad, lane);
  }
}

}  // namespace cuda
}  // namespace fastrnn
