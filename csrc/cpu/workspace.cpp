// The arenas, the blocks, and the lists of them all, so that their size can be asked for and their memory given back.
#include "workspace.h"

#ifdef __linux__
#include <sys/mman.h>
#endif

#include <pthread.h>

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <new>
#include <utility>
#include <vector>

#define FASTRNN_EXPORT __attribute__((visibility("default")))

namespace fastrnn {

namespace {

constexpr size_t kept_bytes = size_t(64) << 20;         // of one arena
constexpr size_t kept_block_bytes = size_t(256) << 20;  // of all blocks

// Large pieces begin at a huge page and ask for more of them.
void* allocate(size_t bytes) {
  constexpr size_t huge = size_t(2) << 20;
  const size_t alignment = bytes >= 2 * huge ? huge : 64;
  void* data = std::aligned_alloc(alignment, (bytes + alignment - 1) / alignment * alignment);
  if (data == nullptr) throw std::bad_alloc();
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  if (alignment == huge) madvise(data, bytes / huge * huge, MADV_HUGEPAGE);
#endif
  return data;
}

}  // namespace

struct Arena {
  std::mutex busy;  // held while a kernel runs
  void* data = nullptr;
  size_t size = 0;

  void resize(size_t bytes) {
    std::free(data);
    data = nullptr;
    size = 0;
    if (bytes == 0) return;
    data = allocate(bytes);
    size = bytes;
  }
  ~Arena() { std::free(data); }
};

namespace {

// Arenas of the living threads. Never destroyed: threads may end after the library's statics.
struct Registry {
  std::mutex mutex;
  std::vector<Arena*> arenas;
};
Registry& registry() {
  static Registry* all = new Registry;
  return *all;
}

struct Owner {
  std::unique_ptr<Arena> arena{new Arena};
  Owner() {
    std::lock_guard<std::mutex> lock(registry().mutex);
    registry().arenas.push_back(arena.get());
  }
  ~Owner() {
    std::lock_guard<std::mutex> lock(registry().mutex);
    auto& all = registry().arenas;
    all.erase(std::remove(all.begin(), all.end(), arena.get()), all.end());
  }
};

// Blocks that nobody uses, the one given back last at the end. A block knows its size: it lies before the data.
struct Blocks {
  std::mutex mutex;
  std::vector<char*> idle;
  size_t bytes = 0;
};
Blocks& blocks() {
  static Blocks* all = new Blocks;
  return *all;
}
// A child forked while another thread was in one of the lists would find it locked for ever: fork waits for them.
[[maybe_unused]] const int fork_handlers = pthread_atfork(
    [] {
      registry().mutex.lock();
      blocks().mutex.lock();
    },
    [] {
      blocks().mutex.unlock();
      registry().mutex.unlock();
    },
    [] {
      blocks().mutex.unlock();
      registry().mutex.unlock();
    });

constexpr size_t block_header = 64;
size_t& block_size(char* block) { return *reinterpret_cast<size_t*>(block); }

}  // namespace

FASTRNN_EXPORT void* take_block(size_t bytes) {
  bytes += block_header;
  {
    Blocks& all = blocks();
    std::lock_guard<std::mutex> mine(all.mutex);
    // The smallest that fits, if not much of it is wasted.
    auto best = all.idle.end();
    for (auto at = all.idle.begin(); at != all.idle.end(); ++at)
      if (block_size(*at) >= bytes && block_size(*at) <= bytes + bytes / 4 &&
          (best == all.idle.end() || block_size(*at) <= block_size(*best)))
        best = at;
    if (best != all.idle.end()) {
      char* block = *best;
      all.idle.erase(best);
      all.bytes -= block_size(block);
      return block + block_header;
    }
  }
  char* block = static_cast<char*>(allocate(bytes));
  block_size(block) = bytes;
  return block + block_header;
}

FASTRNN_EXPORT void give_block(void* data) {
  char* block = static_cast<char*>(data) - block_header;
  if (block_size(block) > kept_block_bytes) return std::free(block);  // it would drive all others out
  std::vector<char*> freed;  // outside the lock: giving memory back to the system takes its time
  {
    Blocks& all = blocks();
    std::lock_guard<std::mutex> mine(all.mutex);
    all.idle.push_back(block);
    all.bytes += block_size(block);
    while (all.bytes > kept_block_bytes) {  // the oldest go
      freed.push_back(all.idle.front());
      all.bytes -= block_size(all.idle.front());
      all.idle.erase(all.idle.begin());
    }
  }
  for (char* old : freed) std::free(old);
}

Workspace::Workspace() {
  static thread_local Owner owner;
  arena_ = owner.arena.get();
  arena_->busy.lock();
}

Workspace::~Workspace() {
  if (block_) give_block(block_);
  arena_->busy.unlock();
}

void* Workspace::reserve(size_t bytes) {
  if (bytes > kept_bytes) return block_ = take_block(bytes);
  if (arena_->size < bytes) arena_->resize(std::max(bytes, std::min(2 * arena_->size, kept_bytes)));
  return arena_->data;
}

FASTRNN_EXPORT size_t workspace_bytes() {
  std::lock_guard<std::mutex> lock(registry().mutex);
  size_t bytes = 0;
  for (Arena* arena : registry().arenas) {
    std::unique_lock<std::mutex> idle(arena->busy, std::try_to_lock);
    if (idle) bytes += arena->size;
  }
  std::lock_guard<std::mutex> mine(blocks().mutex);
  return bytes + blocks().bytes;
}

FASTRNN_EXPORT size_t release_workspace() {
  std::lock_guard<std::mutex> lock(registry().mutex);
  size_t bytes = 0;
  for (Arena* arena : registry().arenas) {
    std::unique_lock<std::mutex> idle(arena->busy, std::try_to_lock);
    if (!idle) continue;
    bytes += arena->size;
    arena->resize(0);
  }
  std::vector<char*> freed;
  {
    std::lock_guard<std::mutex> mine(blocks().mutex);
    freed.swap(blocks().idle);
    bytes += std::exchange(blocks().bytes, 0);
  }
  for (char* block : freed) std::free(block);
  return bytes;
}

}  // namespace fastrnn
