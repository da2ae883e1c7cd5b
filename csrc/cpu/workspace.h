// Memory of the kernels that outlives a call: one scratch arena per calling thread, and blocks for the tapes that wait
// for backward, for the gradients of weights, and for scratch too large for an arena. Both are kept for the next call,
// up to a bound: fresh memory costs a page fault for every 4 KiB, which is more than the arithmetic of a small layer.
#pragma once

#include <cstddef>
#include <cstdint>

namespace fastrnn {

// The calling thread's arena for the length of one kernel. Throws std::bad_alloc.
class Workspace {
 public:
  Workspace();
  ~Workspace();
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;

  // At least `bytes` bytes, 64-byte aligned; the contents are whatever the last call left. Once per kernel.
  void* reserve(size_t bytes);

 private:
  struct Arena* arena_;
  void* block_ = nullptr;  // instead of the arena's memory
};

// A block of at least `bytes` bytes, 64-byte aligned, contents undefined; throws std::bad_alloc. Give it back to
// give_block, from any thread.
void* take_block(size_t bytes);
void give_block(void* block);
// Bytes: of less, fresh memory is as good as a block.
constexpr int64_t worth_keeping = 64 * 1024;

// Bytes kept for later calls, all threads together. What a running kernel, a living tape or gradient uses is not
// counted.
size_t workspace_bytes();
// Gives them back to the system; returns how many.
size_t release_workspace();

}  // namespace fastrnn
