// Which path a layer takes on a GPU, and how a path that keeps the weights on the chip shares them out. Plain
// arithmetic on sizes, for the host, the kernels and the tests alike.
#pragma once

#include <string>

#include "layout.h"
#include "runtime.h"

namespace fastrnn {
namespace cuda {

// step: one product and one kernel for each step; everything, any size. The others keep w_hh in registers and shared
// memory for the whole sequence: block: one block has all of it; cluster: the blocks of one cluster, which push the
// state to each other; grid: any blocks, all running at the same time, through global memory and flags.
enum class Path : int { step, block, cluster, grid };
constexpr const char* path_names[] = {"step", "block", "cluster", "grid"};

struct Choice {
  Path path = Path::step;
  Sharing sharing;  // of the resident paths
  int groups = 1;   // of blocks, each with other rows, for each direction
  int D = 1;
  double cycles = 0;  // of a step of all groups, by the plan's estimate
  std::string why;

  LaunchShape shape() const;
};

// A card that runs the kernels as fast as its processors and shared memory are large, and no other facts: what has run
// right, and how fast, on which card, is this file's table (empty: nothing has). So without `forced` the plan is
// `step`. forced: a path by name, or "auto" for the one that the sizes speak for; where it cannot serve the layer,
// `step`, and why.
Choice choose(const Layer& layer, bool tf32, bool backward, const Card& card, const std::string& forced);

// The units shared out to `blocks` blocks, `rows` rows of the batch to a group of them; false, and why, where a block's
// registers and shared memory do not hold its part.
bool share_out(Sharing& s, Path path, const Layer& layer, bool tf32, bool backward, int blocks, int rows,
               int shared_bytes, std::string& why);

// Memory of a resident launch: packed weights of all directions, which `pack` writes once for a call; and what states
// are exchanged through, zero before each launch (0 for block and cluster).
int64_t packed_bytes(const Choice& choice);
int64_t exchange_bytes(const Choice& choice);

}  // namespace cuda
}  // namespace fastrnn
