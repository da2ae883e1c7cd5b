// Scratch memory of the kernels, and the order in which rows are worked on. Baseline code: no vector instructions here.
#pragma once

#include <cstddef>

#include "../problem.h"

namespace fastrnn {

// At least `bytes` bytes, 64-byte aligned, kept by the calling thread for its next call; throws std::bad_alloc.
// The contents are whatever the last call left.
void* workspace(size_t bytes);
// Gives memory above a fixed bound back to the system; call when a kernel is done.
void trim_workspace();

// Cuts the rows of a layer into slices that are worked on independently, about as many per direction as keep the team
// busy: order[first[s]] to order[first[s + 1] - 1] are the rows of slice s, longest first, so that the rows still
// active at any step are a prefix. Every row is in exactly one slice. Results do not depend on the cut.
struct Slices {
  int count;
  int64_t longest;  // rows of the largest slice
  int64_t* first;   // [count + 1]
  int64_t* order;   // [B]
};

int slice_count(const Layer& layer, const CellTraits& cell, int team_size);
// memory: slices_size(layer, count) bytes.
size_t slices_size(const Layer& layer, int count);
Slices cut_slices(const Layer& layer, int count, void* memory);

}  // namespace fastrnn
