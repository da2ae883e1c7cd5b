// The switch that says who computes tensors on a GPU: the environment variable FASTRNN_GPU_PATH, or a call; and what
// comes of it. There whether or not the build has CUDA, so that the Python side may ask.
#pragma once

#include "plan.h"

namespace fastrnn {
namespace cuda {

// Calls f(name) for everything that can be forced: our paths, "auto" for the one that plan.h would take, and torch's
// own implementation.
template <class F>
void for_each_gpu_path(F&& f) {
  for (const char* name : path_names) f(name);
  f("auto");
  f("torch");
}

// One of those names, or "" for the default.
const char* gpu_path();
// Selects one by name ("" goes back to the environment's); false when there is none of that name.
bool force_gpu_path(const char* name);
// The value of FASTRNN_GPU_PATH when it is no such name, else null: reported, never fatal.
const char* rejected_gpu_path();
// For choose(): the one of our paths that is forced, or "".
const char* forced_kernel_path();
// What choose() says with it, for a card or, null, for the one that is there, if any.
Choice choose_here(const Layer& layer, bool tf32, bool backward, const Card* card);

}  // namespace cuda
}  // namespace fastrnn
