// The door of the CUDA side: what ops.cpp calls for tensors on a GPU. A problem.h Forward or Backward whose pointers
// are device pointers, but for first_row, which is of the host (packed input alone); lengths, steps_above and order are
// null. x is contiguous [T, B, I], or [N, I] packed; so are dx and its like.
//
// Everything goes on the caller's stream, nobody waits, nothing is allocated: scratch memory comes from the caller, and
// a call can be captured into a CUDA graph.
#pragma once

#include "plan.h"

namespace fastrnn {
namespace cuda {

struct Call {
  Stream stream = nullptr;
  const void* lengths = nullptr;  // [B] on the device, int64 if `wide` else int32, any value (clamped to 0..T); or null
  bool wide = false;
  int64_t lengths_stride = 1;
  bool tf32 = false;        // float32 products may round their factors
  const char* forced = "";  // plan.h: choose
  // What the buffers of a chunk of steps may take; one step, if that is more. And how many steps it may have.
  int64_t chunk_bytes = int64_t(256) << 20;
  int64_t chunk_steps = INT64_MAX;
};

// Bytes of scratch memory, 256-byte aligned, that the call needs.
int64_t forward_scratch(const Forward& f, const Call& call);
void forward(const Forward& f, const Call& call, void* scratch);
int64_t backward_scratch(const Backward& b, const Call& call);
void backward(const Backward& b, const Call& call, void* scratch);

// Layers on top of each other, in the order in which they are worked through: forward x of layers[k + 1] is y of
// layers[k], backward dy of layers[k + 1] is dx of layers[k]. A wavefront goes through them, each on a stream of its
// own: layer k is at one chunk of steps while the one before it is at the next. Whether that is worth while: where the
// weights of several fit on the chip side by side, by the first two.
bool side_by_side(const Forward* layers, int n, const Call& call);
int64_t forward_scratch(const Forward* layers, int n, const Call& call);
void forward(const Forward* layers, int n, const Call& call, void* scratch);
bool side_by_side(const Backward* layers, int n, const Call& call);
int64_t backward_scratch(const Backward* layers, int n, const Call& call);
void backward(const Backward* layers, int n, const Call& call, void* scratch);

}  // namespace cuda
}  // namespace fastrnn
