// What the kernels of one layer's recurrence on a GPU are given: plain sizes and device pointers, by value. The same
// for every path (step by step, one block, a cluster, the whole grid); letters for sizes are problem.h's.
//
// A chunk is a range [begin, end) of steps in the order in which they are worked through: step q is t = q in the
// forward direction (d = 0) and t = T - 1 - q in the backward direction (d = 1); back-propagation goes through q
// downwards. "row(t, b)" is t * B + b, or first_row[t] + b for packed input. A chunk's own buffers begin at its lowest
// row.
//
// Blocks of gradients of pre-activations ("dgates") lie in torch's gate order, as the rows of w_hh: slot s < G in block
// hidden_gate[s], any further slot s (GRU's n_x) in block s. So the first G blocks are what w_hh is multiplied with.
#pragma once

#include "../problem.h"

namespace fastrnn {
namespace cuda {

struct Recurrence {
  int64_t T = 0;
  int B = 0, H = 0, P = 0, D = 1;
  int64_t begin = 0, end = 0;  // steps of this chunk
  bool projected = false;
  bool packed = false;        // x, y, dy hold active rows only
  bool state_is_f32 = false;  // of 16-bit storage: states that come in and go out are float32
  bool one_reset = false;     // h_reset, c_reset are [D, 1, ...]

  const int64_t* first_row = nullptr;  // [T + 1] on the device; packed alone
  const int* lengths = nullptr;        // [B] on the device, 0..T; null: T everywhere
  const bool* reset = nullptr;         // element (t, b) at reset[t * reset_step + b * reset_row]; null: none
  int64_t reset_step = 0, reset_row = 0;
  // A kernel that keeps a part of first_row and reset on the chip has it begin at this step and this row.
  int64_t first_row_from = 0, reset_from = 0;
  int reset_row_from = 0;

  // Of each direction.
  const void* w_hh[2] = {};       // [G*H, P] storage
  const void* w_hr[2] = {};       // [P, H] storage
  const void* b_ih[2] = {};       // [G*H] storage, or null
  const void* b_hh[2] = {};       // [G*H] storage, or null
  const void* h0 = nullptr;       // [D, B, P] state; null: zero
  const void* c0 = nullptr;       // [D, B, H] state; null: zero
  const void* h_reset = nullptr;  // [D, B or 1, P] state; null: zero
  const void* c_reset = nullptr;  // [D, B or 1, H] state; null: zero

  int64_t tape_width = 0;  // values of a stored row; blocks of tape_h, then with a projection one of P more
  int tape_h = 0;          // padded_to_tape_block(H)
  int64_t tape_state = 0;  // with a projection: where in a stored row the projected state begins
  int64_t N = 0;           // stored rows of a direction of the tape

  // ----- forward
  int64_t x_row[2] = {};        // row(t, 0) of the first row of gates_x, for each direction
  const void* gates_x[2] = {};  // [rows of the chunk, G*H] compute: x W_ih^T without biases, torch's gate order
  void* h = nullptr;            // [D, B, P] storage: the state that enters the chunk, cut; then that enters the next
  void* c = nullptr;            // [D, B, H] compute: likewise
  Rows y;                       // [T, B, D*P] storage; zero past a row's length
  void* h_n = nullptr;          // [D, B, P] state
  void* c_n = nullptr;          // [D, B, H] state; LSTM
  void* h_all = nullptr;        // [D, T, B, P] storage, or null
  void* c_all = nullptr;        // [D, T, B, H] storage, or null
  void* tape = nullptr;         // [D, N, tape_width] compute, or null

  // ----- backward
  const void* saved = nullptr;   // [D, N, tape_width] compute: the tape
  ConstRows dy;                  // [T, B, D*P] storage; data null: zero
  const void* dh_n = nullptr;    // [D, B, P] state; null: zero
  const void* dc_n = nullptr;    // [D, B, H] state; null: zero
  const void* dh_all = nullptr;  // [D, T, B, P] storage; null: zero
  const void* dc_all = nullptr;  // [D, T, B, H] storage; null: zero
  void* dh = nullptr;            // [D, B, P] compute: gradient of the state that entered the chunk worked through last
  void* dc = nullptr;            // [D, B, H] compute: likewise
  void* dh0 = nullptr;           // [D, B, P] state; null: not wanted
  void* dc0 = nullptr;           // [D, B, H] state; null: not wanted
  void* dh_reset = nullptr;      // [D, B, P] compute, zero before the first chunk; null: not wanted
  void* dc_reset = nullptr;      // [D, B, H] compute, likewise
  int64_t g_row[2] = {};         // row(t, 0) of the first row of the buffers that follow, for each direction
  void* dgates[2] = {};          // [rows of the chunk, slots*H] storage; zero where a row is past its length
  void* h_prev[2] = {};          // [rows of the chunk, P] storage: the state that entered the step; zero likewise
  void* dh_out[2] = {};          // [rows of the chunk, P] storage, with a projection: gradient of what it gives
  void* h_raw[2] = {};           // [rows of the chunk, H] storage, with a projection: what it is given
};

}  // namespace cuda
}  // namespace fastrnn
