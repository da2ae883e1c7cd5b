// The gate mathematics of RNN, LSTM and GRU, forward and backward, once, for one hidden unit (or one vector of them).
//
// The equations are torch.nn's, from the docstrings of torch.nn.RNN, LSTM and GRU:
//   RNN   h' = f(x W_ih + b_ih + h W_hh + b_hh), f = tanh or relu
//   LSTM  i, f, o = sigmoid, g = tanh of the same sum per gate;  c' = f c + i g;  h' = o tanh(c')
//   GRU   r, z = sigmoid of the sum;  n = tanh(x W_in + b_in + r (h W_hn + b_hn));  h' = (1 - z) n + z h
//
// A pre-activation is one slot. The recurrent product feeds the first `gates` slots, the input projection the slots
// from x_first on; for RNN and LSTM they are the same slots, for GRU the two parts of n must stay apart, so it has
// four: n_h, r, z, n_x. hidden_gate[s] is the row block of weight_hh (torch's gate order) that feeds slot s.
//
// forward(a, h, c, tape): a[slots] pre-activations; h, c the previous state in, the new state out; tape[] is what
// backward needs. backward(tape, h_prev, c_prev, dh, dc, da): dh the gradient of h' in, and out the part of the
// gradient of h that does not pass through the recurrent product; dc the gradient of c' in, of c out; da[slots] the
// gradient of the pre-activations.
//
// watched: the gates as the tape keeps them, for who looks at them (problem.h: watched).
//
// `bypass`: part of h reaches h' beside the recurrent product (so backward leaves a dh). reads_h: forward and backward
// read the previous h itself. hidden(o, c) is h' of the LSTM, which keeps c on the tape (the others' last block is h').
#pragma once

#include "math.h"
#include "problem.h"

namespace fastrnn {

// A gate's name, its block on the tape, and what it went through.
enum class Squash { sigmoid, tanh, relu };
struct WatchedGate {
  const char* name;
  int block;
  Squash squash;
};

struct RnnTanh {
  static constexpr const char* name = "rnn_tanh";
  static constexpr CellKind kind = CellKind::rnn_tanh;
  static constexpr int gates = 1, slots = 1, x_first = 0, tape = 1;
  static constexpr int hidden_gate[4] = {0, 0, 0, 0};
  static constexpr bool has_c = false, bypass = false, reads_h = false;
  enum { H };  // tape
  static constexpr WatchedGate watched[] = {{"h", H, Squash::tanh}};

  template <class V>
  FASTRNN_FN void forward(const V* a, V& h, V&, V* tape) {
    h = tanh(a[0]);
    tape[H] = h;
  }
  template <class V>
  FASTRNN_FN void backward(const V* tape, V, V, V& dh, V&, V* da) {
    da[0] = dh * (V::set(1) - tape[H] * tape[H]);
    dh = V::set(0);
  }
};

struct RnnRelu {
  static constexpr const char* name = "rnn_relu";
  static constexpr CellKind kind = CellKind::rnn_relu;
  static constexpr int gates = 1, slots = 1, x_first = 0, tape = 1;
  static constexpr int hidden_gate[4] = {0, 0, 0, 0};
  static constexpr bool has_c = false, bypass = false, reads_h = false;
  enum { H };
  static constexpr WatchedGate watched[] = {{"h", H, Squash::relu}};

  template <class V>
  FASTRNN_FN void forward(const V* a, V& h, V&, V* tape) {
    h = less_equal(a[0], V::set(0), V::set(0), a[0]);  // NaN stays NaN
    tape[H] = h;
  }
  template <class V>
  FASTRNN_FN void backward(const V* tape, V, V, V& dh, V&, V* da) {
    da[0] = less_equal(tape[H], V::set(0), V::set(0), dh);
    dh = V::set(0);
  }
};

struct Lstm {
  static constexpr const char* name = "lstm";
  static constexpr CellKind kind = CellKind::lstm;
  static constexpr int gates = 4, slots = 4, x_first = 0, tape = 5;
  static constexpr int hidden_gate[4] = {0, 1, 2, 3};
  static constexpr bool has_c = true, bypass = false, reads_h = false;
  enum { I, F, G, O, C };  // slots and tape
  static constexpr WatchedGate watched[] = {
      {"i", I, Squash::sigmoid}, {"f", F, Squash::sigmoid}, {"g", G, Squash::tanh}, {"o", O, Squash::sigmoid}};

  template <class V>
  FASTRNN_FN void forward(const V* a, V& h, V& c, V* tape) {
    tape[I] = sigmoid(a[I]);
    tape[F] = sigmoid(a[F]);
    tape[G] = tanh(a[G]);
    tape[O] = sigmoid(a[O]);
    c = fma(tape[F], c, tape[I] * tape[G]);
    tape[C] = c;
    h = tape[O] * tanh(c);
  }
  template <class V>
  FASTRNN_FN V hidden(V o, V c) {
    return o * tanh(c);
  }
  // The whole gradient of c', with what comes through h'; t is tanh(c').
  template <class V>
  FASTRNN_FN V cell_gradient(V o, V t, V dh, V dc) {
    return fma(dh * o, V::set(1) - t * t, dc);
  }
  template <class V>
  FASTRNN_FN void backward(const V* tape, V, V c_prev, V& dh, V& dc, V* da) {
    const V one = V::set(1);
    const V i = tape[I], f = tape[F], g = tape[G], o = tape[O];
    const V t = tanh(tape[C]);
    dc = cell_gradient(o, t, dh, dc);
    da[I] = dc * g * i * (one - i);
    da[F] = dc * c_prev * f * (one - f);
    da[G] = dc * i * (one - g * g);
    da[O] = dh * t * o * (one - o);
    dc = dc * f;
    dh = V::set(0);
  }
};

struct Gru {
  static constexpr const char* name = "gru";
  static constexpr CellKind kind = CellKind::gru;
  static constexpr int gates = 3, slots = 4, x_first = 1, tape = 5;
  static constexpr int hidden_gate[4] = {2, 0, 1, 0};
  static constexpr bool has_c = false, bypass = true, reads_h = true;
  enum { NH, R, Z, NX };  // slots: hidden part of n, r, z, input part of n
  enum { TAPE_NH, TAPE_R, TAPE_Z, TAPE_N, TAPE_H };
  static constexpr WatchedGate watched[] = {
      {"r", TAPE_R, Squash::sigmoid}, {"z", TAPE_Z, Squash::sigmoid}, {"n", TAPE_N, Squash::tanh}};

  template <class V>
  FASTRNN_FN void forward(const V* a, V& h, V&, V* tape) {
    const V r = sigmoid(a[R]);
    const V z = sigmoid(a[Z]);
    const V n = tanh(fma(r, a[NH], a[NX]));
    h = fma(z, h - n, n);
    tape[TAPE_NH] = a[NH];
    tape[TAPE_R] = r;
    tape[TAPE_Z] = z;
    tape[TAPE_N] = n;
    tape[TAPE_H] = h;
  }
  template <class V>
  FASTRNN_FN void backward(const V* tape, V h_prev, V, V& dh, V&, V* da) {
    const V one = V::set(1);
    const V r = tape[TAPE_R], z = tape[TAPE_Z], n = tape[TAPE_N];
    da[NX] = dh * (one - z) * (one - n * n);
    da[NH] = da[NX] * r;
    da[R] = da[NX] * tape[TAPE_NH] * r * (one - r);
    da[Z] = dh * (h_prev - n) * z * (one - z);
    dh = dh * z;
  }
};

// Calls f(Cell{}) for every cell: the one list that kernels, traits and tests walk.
template <class F>
inline void for_each_cell(F&& f) {
  f(RnnTanh{});
  f(RnnRelu{});
  f(Lstm{});
  f(Gru{});
}

template <class Cell>
constexpr int watched_gates = sizeof(Cell::watched) / sizeof(WatchedGate);

template <class Cell>
constexpr CellTraits traits_of() {
  return {Cell::name,         Cell::kind,
          Cell::gates,        Cell::slots,
          Cell::x_first,      {Cell::hidden_gate[0], Cell::hidden_gate[1], Cell::hidden_gate[2], Cell::hidden_gate[3]},
          Cell::tape,         Cell::has_c,
          watched_gates<Cell>};
}

}  // namespace fastrnn
