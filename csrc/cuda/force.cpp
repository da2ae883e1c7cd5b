// What FASTRNN_GPU_PATH asks for, what force_gpu_path() demands, and what comes of it.
#include "force.h"

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <string>

#ifdef FASTRNN_CUDA
#include "kernels.h"
#endif

// The library hides its symbols; these are the ones that the Python module links against.
#define FASTRNN_EXPORT __attribute__((visibility("default")))

namespace fastrnn {
namespace cuda {
namespace {

// The name that lives as long as the library; null where there is none of that name.
const char* find(const char* name) {
  const char* found = nullptr;
  for_each_gpu_path([&](const char* known) {
    if (!std::strcmp(known, name)) found = known;
  });
  return found;
}

// The environment is read once, at first use.
struct Default {
  const char* path = "";
  std::string rejected;

  Default() {
    const char* wanted = std::getenv("FASTRNN_GPU_PATH");
    if (!wanted || !*wanted) return;
    const char* found = find(wanted);
    if (found)
      path = found;
    else
      rejected = wanted;
  }
};

const Default& standard() {
  static const Default value;
  return value;
}

std::atomic<const char*> forced{nullptr};

}  // namespace

FASTRNN_EXPORT const char* gpu_path() {
  const char* path = forced.load(std::memory_order_acquire);
  return path ? path : standard().path;
}

FASTRNN_EXPORT bool force_gpu_path(const char* name) {
  const char* path = *name ? find(name) : nullptr;
  if (*name && !path) return false;
  forced.store(path, std::memory_order_release);
  return true;
}

FASTRNN_EXPORT const char* rejected_gpu_path() {
  const std::string& rejected = standard().rejected;
  return rejected.empty() ? nullptr : rejected.c_str();
}

const char* forced_kernel_path() {
  const char* path = gpu_path();
  return std::strcmp(path, "torch") ? path : "";
}

FASTRNN_EXPORT Choice choose_here(const Layer& layer, bool tf32, bool backward, const Card* card) {
#ifdef FASTRNN_CUDA
  if (!card) return choose_for_card(layer, tf32, backward, forced_kernel_path());
  return choose(layer, tf32, backward, *card, forced_kernel_path());
#else
  return choose(layer, tf32, backward, card ? *card : Card{}, forced_kernel_path());
#endif
}

}  // namespace cuda
}  // namespace fastrnn
