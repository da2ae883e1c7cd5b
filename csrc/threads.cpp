// The threads of torch: its pool is OpenMP's where torch has that, and a forked child has none of it.
#include "threads.h"

#include <pthread.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>

#include "cpu/plan.h"
#include "errors.h"

// Absent from an OpenMP-less torch: null then.
extern "C" {
__attribute__((weak)) int omp_in_parallel();
__attribute__((weak)) int omp_get_max_active_levels();
__attribute__((weak)) void omp_set_max_active_levels(int);
}

// The library hides its symbols; this is one that the Python module links against.
#define FASTRNN_EXPORT __attribute__((visibility("default")))

namespace fastrnn {
namespace {

std::atomic<bool> forked{false};
[[maybe_unused]] const int fork_handler = pthread_atfork(nullptr, nullptr, [] { forked = true; });

void run_serial(void*, int64_t n, void (*body)(void*, int64_t, int64_t), void* argument) { body(argument, 0, n); }

void run_parallel(void*, int64_t n, void (*body)(void*, int64_t, int64_t), void* argument) {
  struct Job {
    void (*body)(void*, int64_t, int64_t);
    void* argument;
  } job{body, argument};
  succeed(torch_parallel_for(
              0, n, 1,
              [](int64_t begin, int64_t end, void* context) {
                const Job& job = *static_cast<Job*>(context);
                job.body(job.argument, begin, end);
              },
              &job),
          "running a kernel on torch's threads");
}

}  // namespace

FASTRNN_EXPORT Team team() {
  if (forked || (omp_in_parallel && omp_in_parallel())) return {1, run_serial, nullptr};
  // Workers wait for each other: without OpenMP nobody promises that they run at the same time.
  if (!omp_in_parallel) return {1, run_serial, nullptr};
  const int threads = std::min(static_cast<int>(torch::stable::get_num_threads()), cpu_quota());
  return {threads, threads > 1 ? run_parallel : run_serial, nullptr};
}

SerialInForkedChild::SerialInForkedChild() {
  if (!forked || !omp_get_max_active_levels || !omp_set_max_active_levels) return;
  levels_ = omp_get_max_active_levels();
  omp_set_max_active_levels(0);
}

SerialInForkedChild::~SerialInForkedChild() {
  if (levels_ >= 0) omp_set_max_active_levels(levels_);
}

}  // namespace fastrnn
