// What the .cu files offer to host code: launches of their kernels, for a cell and a storage dtype.
//
// step.cuh is the path that knows everything, one product and these kernels for each step; resident.cuh the paths that
// keep w_hh on the chip.
#pragma once

#include "plan.h"
#include "recurrence.h"
#include "runtime.h"

namespace fastrnn {
namespace cuda {

// One cell's kernels in one storage dtype; find_kernels() gives them. All put work on `stream` and return.
struct CellKernels {
  // r.h and r.c from the initial states, cut where a reset says so; h_n and c_n of rows of length 0.
  void (*begin)(const Recurrence& r, Stream stream);
  // Step q forward of direction d. product: [rows, G*H] compute, h W_hh^T in torch's gate order. With a projection,
  // h_raw [rows, H] storage is what it is given, and finish_step does the rest from its result [rows, P] compute.
  void (*step)(const Recurrence& r, int d, int64_t q, const void* product, void* h_raw, Stream stream);
  void (*finish_step)(const Recurrence& r, int d, int64_t q, const void* projected, Stream stream);
  // Step q backward of direction d. carry: [B, P] compute, the product's part of the gradient of the state, taken from
  // the dgates of the step q + 1 for the rows active there; null at the first. bypass: [B, P] compute, the rest of it,
  // in and out. With a projection first enter_back, which fills dh_out, then step_back with dh [rows, H] compute: what
  // the projection makes of that.
  void (*enter_back)(const Recurrence& r, int d, int64_t q, const void* carry, Stream stream);
  void (*step_back)(const Recurrence& r, int d, int64_t q, const void* carry, void* bypass, const void* dh,
                    Stream stream);
  // After the last step backward: dh0, dc0 and what reset states get from first steps.
  void (*finish_back)(const Recurrence& r, const void* carry, const void* bypass, Stream stream);

  // All steps of a chunk by one launch (resident.cuh), after `begin` and before finish_back, which are the same:
  // forward on r.h and r.c, backward on r.dh (product and bypass together) and r.dc. First, once for a call, pack; then
  // with what it wrote, and exchange_bytes() that are zero. Null where no resident kernel serves the dtype.
  void (*pack)(const Choice& choice, const Recurrence& r, void* packed, Stream stream);
  void (*resident_forward)(const Choice& choice, const Recurrence& r, const void* packed, void* exchange,
                           Stream stream);
  void (*resident_backward)(const Choice& choice, const Recurrence& r, const void* packed, void* exchange,
                            Stream stream);
  // Whether this card runs the choice: all blocks of a grid at the same time, a cluster at least.
  bool (*fits)(const Choice& choice);
};

const CellKernels& find_kernels(CellKind cell, Dtype storage);

// choose() for the current card, which is asked whether it holds what the plan would put on it; `step`, and why, if
// not. Answers are kept: choosing takes longer than launching.
Choice choose_for_card(const Layer& layer, bool tf32, bool backward, const std::string& forced);

}  // namespace cuda
}  // namespace fastrnn
