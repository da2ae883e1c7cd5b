// How the work of a layer is shared out among threads. Results do not depend on it: every number is computed whole, in
// one order, by whoever gets it.
#pragma once

#include "../problem.h"

namespace fastrnn {

// The recurrence is cut three ways: directions (side by side, or one after the other by the same workers), slices of
// the batch's rows (which never wait for each other) and parts of the hidden units (which meet at a barrier each step).
struct Split {
  int workers = 1;     // all of them: for what is not recurrent
  int directions = 1;  // run side by side
  int slices = 1;      // of the rows, in each direction
  int parts = 1;       // of the hidden units, in each slice
  // Forward: whether each worker of the recurrence, of one part, has another worker that projects its input, ahead of
  // it.
  bool ahead = false;
  // Whether every other step of a single row goes through the hidden units from the last to the first: the
  // weights read last, which the cache still holds, are read first. The price is that the step after such a one begins
  // with the units finished last.
  bool alternate = false;
  // Back: into how many bands of rows the batch is cut (bands.h). If more than one, workers have whole bands, or bands
  // so many workers, and slices are as many as all of these.
  int bands = 1;
  const char* limit = "";  // what bounds a step, by the model
  double us = 0;           // how long the layer takes, by the model

  int recurrent() const { return directions * slices * parts; }  // workers of the recurrence
};

// What the choice wants to know of the kernel that is to run.
struct Units {
  int lanes;         // of a vector
  int group;         // vectors of hidden units that are worked on together: parts begin at such groups
  int weight_bytes;  // of a packed weight
  double speed;      // of its products, beside float32's by fma
  bool tiled;        // whether they are products of tiles
};

// The choice for a layer, which is to be computed forward or back, and `threads` at hand.
Split choose_split(const Layer& layer, bool backward, const CellTraits& cell, int threads, const Units& units);

constexpr int64_t folded_input = 4;  // inputs this narrow are multiplied in the step itself
// Rows whose input is projected at a time by a worker that runs ahead: whole steps.
constexpr int64_t ahead_rows = 16;
// Back-propagation works on so many rows at a time: whole steps, as many as fit.
constexpr int64_t chunk_rows = 256;

// The same for every number of threads, for it decides in which order the gradients of weights are summed.
int bands_of(const Layer& layer, const CellTraits& cell, const Units& units);

// Layers on top of each other, as a wavefront over time (stack.h): groups of layers side by side, which pass on the
// sequence piece by piece: forward `steps` steps at a time, back `steps` chunks. One group: no wavefront.
struct Wavefront {
  int groups = 1;
  int64_t steps = 0;
};

// For `count` layers, forward or back: the first, and those above, which are all alike. The other arguments are
// choose_split's.
Wavefront choose_wavefront(const Layer& first, const Layer& upper, int count, bool backward, const CellTraits& cell,
                           int threads, const Units& units);

// For tests and measurements: "serial", "batch", "hidden", "wavefront", "ahead", or "" for the model's choice. False
// for another name.
bool force_split(const char* name);

// What the process may use at once by its control group; a large number without a quota. Spinning beyond it is waste.
int cpu_quota();

// Lets another thread run; for a barrier that has waited for long.
void yield_thread();

}  // namespace fastrnn
