// What forward and backward of a layer on a GPU have in common: scratch memory, chunks of steps, tables of rows, and
// matrices of rows.
//
// A pass is laid out twice: without memory, to count the bytes, and with it. Everything in it is 256-byte aligned.
#pragma once

#include "kernels.h"
#include "layer.h"
#include "rows.h"

namespace fastrnn {
namespace cuda {

inline int64_t size_of(Dtype dtype) { return dtype == Dtype::f64 ? 8 : dtype == Dtype::f32 ? 4 : 2; }

struct Carve {
  char* memory;
  int64_t used = 0;
  void* take(int64_t bytes) {
    void* const at = memory ? memory + used : nullptr;
    used += (bytes + 255) / 256 * 256;
    return at;
  }
};

// Element i of values of `size` bytes.
inline void* element(void* data, int64_t i, int64_t size) { return static_cast<char*>(data) + i * size; }
inline const void* element(const void* data, int64_t i, int64_t size) {
  return static_cast<const char*>(data) + i * size;
}

class Pass {
 public:
  // The steps are worked through in so many chunks, once the pass is laid out.
  int64_t chunks() const { return (p.T + steps - 1) / steps; }
  int64_t chunk_steps() const { return steps; }
  bool is_resident() const { return resident; }
  // Blocks that a resident pass keeps on the card at once.
  int blocks() const { return choice.shape().x * choice.shape().y; }

 protected:
  const Layer& p;
  const Call& call;
  const CellTraits& cell;
  const CellKernels& kernels;
  const Dtype compute;
  const int64_t s, w;  // bytes of a value of storage and of compute
  const int64_t GH;
  Recurrence r;
  int64_t steps = 0;  // of a chunk, the last one's may be fewer
  int64_t rows = 0;   // that a chunk's buffers have room for
  Choice choice;
  bool resident = false;  // the choice keeps the weights on the chip
  void *packed = nullptr, *exchange = nullptr;

  Pass(const Layer& layer, const Call& c, bool backward)
      : p(layer),
        call(c),
        cell(traits(layer.cell)),
        kernels(find_kernels(layer.cell, layer.dtype)),
        compute(layer.dtype == Dtype::f64 ? Dtype::f64 : Dtype::f32),
        s(size_of(layer.dtype)),
        w(size_of(compute)),
        GH(cell.gates * layer.H) {
    r.T = p.T;
    r.B = int(p.B);
    r.H = int(p.H);
    r.P = int(p.P);
    r.D = p.D;
    r.projected = p.projected;
    r.packed = p.packed;
    r.state_is_f32 = p.state == Dtype::f32 && s == 2;
    r.one_reset = p.one_reset;
    r.reset = p.reset;
    r.reset_step = p.reset_step;
    r.reset_row = p.reset_row;
    for (int d = 0; d < p.D; ++d) {
      r.w_hh[d] = p.weights[d].w_hh;
      r.w_hr[d] = p.weights[d].w_hr;
      r.b_ih[d] = p.weights[d].b_ih;
      r.b_hh[d] = p.weights[d].b_hh;
    }
    r.h0 = p.h0;
    r.c0 = p.c0;
    r.h_reset = p.h_reset;
    r.c_reset = p.c_reset;
    r.tape_width = tape_width(cell, p.H, p.P, p.projected);
    r.tape_h = int(padded_to_tape_block(p.H));
    r.tape_state = cell.tape * padded_to_tape_block(p.H);
    r.N = row(p.T);
    choice = choose_for_card(p, call.tf32 && p.dtype == Dtype::f32, backward, call.forced);
    resident = choice.path != Path::step;
  }

  void take_residence(Carve& carve) {
    if (!resident) return;
    packed = carve.take(packed_bytes(choice));
    exchange = carve.take(exchange_bytes(choice));
  }

  // Row of (t, 0); rows of a step; steps of direction d in the chunk.
  int64_t row(int64_t t) const { return p.packed ? p.first_row[t] : t * p.B; }
  int64_t rows_at(int64_t t) const { return row(t + 1) - row(t); }
  int64_t first_step(int d) const { return d ? p.T - r.end : r.begin; }
  int64_t last_step(int d) const { return d ? p.T - r.begin : r.end; }
  int64_t first_row(int d) const { return row(first_step(d)); }
  int64_t chunk_rows(int d) const { return row(last_step(d)) - first_row(d); }

  // As many steps as fit, at least one. No step of a packed input has more rows than the first ones.
  void choose_chunk(int64_t bytes_of_row) {
    int64_t low = p.T < 1 ? p.T : 1, high = p.T;
    while (low < high) {
      const int64_t middle = low + (high - low + 1) / 2;
      if (row(middle) * bytes_of_row <= call.chunk_bytes)
        low = middle;
      else
        high = middle - 1;
    }
    steps = low < call.chunk_steps ? low : call.chunk_steps;
    rows = row(steps);
  }

  void take_tables(Carve& carve) {
    cublas = carve.take(int64_t(scratch_bytes));
    if (p.packed) r.first_row = first_row_ = static_cast<int64_t*>(carve.take((p.T + 1) * 8));
    if (p.packed || call.lengths) r.lengths = lengths_ = static_cast<int*>(carve.take(p.B * 4));
  }
  void fill_tables() {
    if (p.packed) {
      upload_first_row(p.first_row, p.T, first_row_, call.stream);
      find_lengths(first_row_, p.T, r.B, lengths_, call.stream);
    } else if (call.lengths) {
      clamp_lengths(call.lengths, call.wide, call.lengths_stride, p.T, r.B, lengths_, call.stream);
    }
  }

  // A matrix of storage, and its transpose.
  Matrix matrix(const void* data, int64_t stride) const { return {data, p.dtype, stride, false}; }
  Matrix transposed(const void* data, int64_t stride) const { return {data, p.dtype, stride, true}; }

  // c [m, n] = a [m, k] b [k, n], in the compute dtype unless said; without columns left to sum over, zero.
  void product(int64_t m, int64_t n, int64_t k, const Matrix& a, const Matrix& b, void* c, bool add = false) const {
    product(m, n, k, a, b, c, compute, n, add, call.tf32 && p.dtype == Dtype::f32);
  }
  void product(int64_t m, int64_t n, int64_t k, const Matrix& a, const Matrix& b, void* c, Dtype c_dtype,
               int64_t c_stride, bool add, bool tf32) const {
    if (m == 0 || n == 0) return;
    if (k > 0) return multiply({m, n, k, a, b, c, c_dtype, c_stride, add, tf32}, cublas, call.stream);
    if (!add) set_zero(c, size_t(m * n * size_of(c_dtype)), call.stream);
  }
  void clear(void* data, int64_t bytes) const {
    if (data && bytes) set_zero(data, size_t(bytes), call.stream);
  }

 private:
  void* cublas = nullptr;
  int64_t* first_row_ = nullptr;
  int* lengths_ = nullptr;
};

}  // namespace cuda
}  // namespace fastrnn
