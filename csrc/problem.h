// What a kernel sees: plain sizes and pointers, no torch. Every pointer is listed with its shape.
//
// T steps, B rows (batch), I input features, H hidden units, P width of the state h (proj_size, or H without a
// projection), D directions, G gates, N stored rows: the steps that really run, T*B unless rows end early.
// "storage" is the dtype of the caller's tensors; "compute" is double for double and float for everything else; "state"
// is one of the two.
//
// Ragged rows are ranked longest first, so that the rows active at step t are the ranks below a count that never grows
// with t. The tape holds stored rows: all steps of rank 0, then of rank 1, ...; padding has none. Rank by rank, because
// threads work on neighbouring ranks and must stay away from each other's cache lines.
#pragma once

#include <cstdint>

namespace fastrnn {

enum class CellKind : int { rnn_tanh, rnn_relu, lstm, gru };
enum class Dtype : int { f32, f64, bf16, f16 };
// How much of float32 the products may keep, where an instruction set is the faster for it: torch's "ieee" (all),
// "tf32" and "bf16". Sums, gates and states are float32 whatever it is.
enum class Precision : int { exact, tf32, bf16 };

// A [T, B, features] tensor: element (t, b, i) lies at data[offset(t) + b * row + i], strides in elements.
// Dense: offset(t) = t * step. Packed: offset(t) = first_row[t] * row.
struct ConstRows {
  const void* data = nullptr;
  int64_t step = 0;
  int64_t row = 0;
};

struct Rows {
  void* data = nullptr;
  int64_t step = 0;
  int64_t row = 0;
};

// The weights of one direction, contiguous, in torch's gate order. Absent biases and projections are null; all five are
// where there is `packed`, which serves forward alone.
struct Weights {
  const void* w_ih = nullptr;    // [G*H, I]
  const void* w_hh = nullptr;    // [G*H, P]
  const void* b_ih = nullptr;    // [G*H]
  const void* b_hh = nullptr;    // [G*H]
  const void* w_hr = nullptr;    // [P, H]
  const void* packed = nullptr;  // what Kernels::pack has made of them, 64-byte aligned
};

// One layer with all its directions: what forward and backward have in common.
struct Layer {
  CellKind cell = CellKind::lstm;
  Dtype dtype = Dtype::f32;
  Dtype state = Dtype::f32;  // of states that come in and go out; compute where a sequence is worked through in pieces
  Precision precision = Precision::exact;
  int64_t T = 0, B = 0, I = 0, H = 0, P = 0;
  int D = 1;
  bool projected = false;              // there is a w_hr
  bool packed = false;                 // x, y, dy and dx hold active rows only: row b of step t is row first_row[t] + b
  const int64_t* first_row = nullptr;  // [T + 1] active rows of all steps before t; [T] is N. Null: t * B
  const int64_t* steps_above = nullptr;  // [B + 1] steps of all ranks below r: its first stored row. Null: r * T
  const int64_t* order = nullptr;        // [B] row of each rank; null: rank = row
  const int64_t* lengths = nullptr;      // [B] steps of each row, 0..T; null: T everywhere. Set when first_row is
  const bool* reset = nullptr;           // element (t, b) at reset[t * reset_step + b * reset_row]; null: none
  int64_t reset_step = 0, reset_row = 0;
  ConstRows x;               // [T, B, I] storage
  Weights weights[2];        // storage
  const void* h0 = nullptr;  // [D, B, P] state; null: zero
  const void* c0 = nullptr;  // [D, B, H] state; null: zero
  // What a state starts from where reset has cut it.
  const void* h_reset = nullptr;  // [D, B, P] state; null: zero
  const void* c_reset = nullptr;  // [D, B, H] state; null: zero
  bool one_reset = false;         // they are [D, 1, ...], the same for every row
};

struct Forward : Layer {
  Rows y;                 // [T, B, D*P] storage; zero past a row's length
  void* h_n = nullptr;    // [D, B, P] state; may be h0
  void* c_n = nullptr;    // [D, B, H] state; LSTM only; may be c0
  void* h_all = nullptr;  // [D, T, B, P] storage, or null
  void* c_all = nullptr;  // [D, T, B, H] storage, or null
  void* tape = nullptr;   // [D, N, tape_width] compute, or null: what backward needs (cells.h says what)
};

// Blocks of the tape begin at multiples of this many values, whatever the instruction set, so that no vector is cut.
constexpr int64_t tape_block = 16;
constexpr int64_t padded_to_tape_block(int64_t n) { return (n + tape_block - 1) / tape_block * tape_block; }

// What is told of a step (Backward::watched): sums over its rows and units, of squares but for gates. Then, for each
// gate that the cell names (cells.h): its values, how many of them are low (sigmoid <= 0.1, tanh <= -0.9, relu <= 0)
// and how many are high (sigmoid >= 0.9, tanh >= 0.9).
namespace watched {
enum Column : int {
  rows,        // that run at this step
  dh,          // the gradient of h', all of it
  dh_arrived,  // the part of it that came through the recurrence from the next step (in the order of the direction)
  h,           // h'
  dc,          // of a cell with c: the gradient of c', with what comes through h'
  dc_arrived,  // the part of it that came from the next step, through c' and (without a projection) h'
  c,           // c'
};
constexpr int per_gate = 3;
constexpr int first_gate(bool has_c) { return has_c ? c + 1 : h + 1; }
constexpr int columns(bool has_c, int gates) { return first_gate(has_c) + per_gate * gates; }
}  // namespace watched

struct Backward : Layer {
  const void* tape = nullptr;    // [D, N, tape_width] compute
  ConstRows dy;                  // [T, B, D*P] storage; data null: zero
  const void* dh_n = nullptr;    // [D, B, P] state; null: zero
  const void* dc_n = nullptr;    // [D, B, H] state; null: zero
  const void* dh_all = nullptr;  // [D, T, B, P] storage; null: zero
  const void* dc_all = nullptr;  // [D, T, B, H] storage; null: zero
  Rows dx;                       // [T, B, I] storage; data null: not wanted
  bool dx_is_compute = false;    // dx is of the compute dtype: two directions add up in it, or the caller's pieces
  void* dh0 = nullptr;           // [D, B, P] state; null: not wanted
  void* dc0 = nullptr;           // [D, B, H] state; null: not wanted
  void* dh_reset = nullptr;      // [D, B, P] state; null: not wanted
  void* dc_reset = nullptr;      // [D, B, H] state; null: not wanted
  // Compute dtype, contiguous, torch's gate order; null: not wanted.
  struct {
    void* w_ih = nullptr;  // [G*H, I]
    void* w_hh = nullptr;  // [G*H, P]
    void* b_ih = nullptr;  // [G*H]
    void* b_hh = nullptr;  // [G*H]
    void* w_hr = nullptr;  // [P, H]
  } gradients[2];
  // What the gradients of the weights are products of, for a caller who sums other rows than all (every sample's of a
  // batch by themselves). Compute dtype, zero past a row's length; packed, [D, N, ...]. Null: not wanted.
  struct {
    void* dgates = nullptr;  // [D, T, B, S*H] gradients of the pre-activations, S slots
    void* h_prev = nullptr;  // [D, T, B, P] the state that entered the step
    void* dh_out = nullptr;  // [D, T, B, P] gradient of the projected state; with a projection
    void* h_raw = nullptr;   // [D, T, B, H] the state before its projection; with a projection
  } operands;
  double* watched = nullptr;     // [D, T, watched::columns()]; null: not wanted
  bool watched_goes_on = false;  // dh_n and dc_n came back from steps that follow: they count as arrived
};

// How a cell's pre-activations are laid out (cells.h): `slots` blocks of H columns. The recurrent product feeds the
// first G of them, gate w_hh row block `hidden_gate[s]` into slot s; the input projection feeds slots x_first to
// x_first + G - 1 in torch's gate order.
struct CellTraits {
  const char* name;
  CellKind kind;
  int gates;
  int slots;
  int x_first;
  int hidden_gate[4];
  int tape;  // blocks of H columns on the tape; with a projection, a block of P more holds the projected state
  bool has_c;
  int watched_gates;
};

const CellTraits& traits(CellKind kind);

inline int64_t tape_width(const CellTraits& cell, int64_t H, int64_t P, bool projected) {
  return cell.tape * padded_to_tape_block(H) + (projected ? padded_to_tape_block(P) : 0);
}

// Who does the work: size threads, and a way to run body(argument, begin, end) over [0, n). One call may be handed
// several items, or all of them; the calls for different items run at the same time, so that items may wait for each
// other (a call that was handed several advances them together).
struct Team {
  int size = 1;
  void (*run)(void* context, int64_t n, void (*body)(void*, int64_t, int64_t), void* argument) = nullptr;
  void* context = nullptr;
};

}  // namespace fastrnn
