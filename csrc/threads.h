// The threads that a call may use: torch's, and none but the caller's in a forked child.
#pragma once

#include "problem.h"

namespace fastrnn {

// torch's pool; one worker inside somebody's parallel region and in a forked child, where the pool's threads are gone.
Team team();

// torch's copies and products would wait for ever for the pool that a forked child lost. No active level of parallelism
// serves them one thread, whatever number of threads the product library was told to use.
class __attribute__((visibility("default"))) SerialInForkedChild {
 public:
  SerialInForkedChild();
  ~SerialInForkedChild();

 private:
  int levels_ = -1;
};

}  // namespace fastrnn
