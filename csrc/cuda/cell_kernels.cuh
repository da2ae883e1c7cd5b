// A cell's kernels of both kinds as one table (kernels.h), for the .cu file of the cell.
#pragma once

#include "kernels.h"
#include "resident_host.cuh"
#include "step.cuh"

namespace fastrnn {
namespace cuda {

template <class Cell, class Storage>
constexpr CellKernels cell_kernels() {
  using Step = StepPath<Cell, Storage>;
  CellKernels all{Step::begin,       Step::step, Step::finish_step, Step::enter_back, Step::step_back,
                  Step::finish_back, nullptr,    nullptr,           nullptr,          nullptr};
  if constexpr (sizeof(Storage) <= 4) {
    using Chip = Resident<Cell, Storage>;
    all.pack = Chip::pack;
    all.resident_forward = Chip::forward;
    all.resident_backward = Chip::backward;
    all.fits = Chip::fits;
  }
  return all;
}

// Of all storage dtypes, in the order of Dtype.
template <class Cell>
struct CellTable {
  static constexpr CellKernels of[] = {cell_kernels<Cell, float>(), cell_kernels<Cell, double>(),
                                       cell_kernels<Cell, Bf16>(), cell_kernels<Cell, F16>()};
};

}  // namespace cuda
}  // namespace fastrnn
