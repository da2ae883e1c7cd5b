// rows.h's kernels: one thread for each value.
#include "rows.h"

#include "device.cuh"

namespace fastrnn {
namespace cuda {
namespace {

constexpr int threads = 256;
constexpr int64_t most_blocks = int64_t(1) << 30;

// The grid covers n values or, of more than it can have blocks, strides over them.
FASTRNN_DEVICE int64_t first_index() { return int64_t(block_x()) * threads + thread_index(); }
FASTRNN_DEVICE int64_t stride_of_grid() { return int64_t(grid_x()) * threads; }
LaunchShape shape_for(int64_t n) {
  const int64_t blocks = (n + threads - 1) / threads;
  LaunchShape shape;
  shape.x = int(blocks < most_blocks ? blocks : most_blocks);
  shape.threads = threads;
  return shape;
}

// Calls f(Storage()) for the dtype's type.
template <class F>
void with_storage(Dtype dtype, const F& f) {
  switch (dtype) {
    case Dtype::f32:
      return f(float());
    case Dtype::f64:
      return f(double());
    case Dtype::bf16:
      return f(Bf16());
    case Dtype::f16:
      return f(F16());
  }
}

template <class Integer>
FASTRNN_KERNEL(threads)
clamp_kernel(const void* from, int64_t stride, int64_t T, int B, int* to) {
  for (int64_t b = first_index(); b < B; b += stride_of_grid()) {
    const int64_t length = static_cast<const Integer*>(from)[b * stride];
    to[b] = int(length < 0 ? 0 : length > T ? T : length);
  }
}

// Neighbouring steps with the same number of rows, as rows are ranked by length: as many runs as kernel parameters hold
// (4 KiB).
struct Runs {
  static constexpr int most = 160;
  int count = 0;
  int64_t end = 0;  // of the last run's steps
  int64_t begin[most], first[most];
  int rows[most];
};

FASTRNN_KERNEL(threads)
first_row_kernel(Runs runs, int64_t* to) {
  for (int64_t t = runs.begin[0] + first_index(); t < runs.end; t += stride_of_grid()) {
    int low = 0, high = runs.count;  // the run is in [low, high)
    while (high - low > 1) {
      const int middle = (low + high) / 2;
      if (runs.begin[middle] <= t)
        low = middle;
      else
        high = middle;
    }
    to[t] = runs.first[low] + (t - runs.begin[low]) * runs.rows[low];
  }
}

FASTRNN_KERNEL(threads)
lengths_kernel(const int64_t* first_row, int64_t T, int B, int* to) {
  for (int64_t b = first_index(); b < B; b += stride_of_grid()) {
    int64_t low = 0, high = T;  // row b has step low - 1, and not step high
    while (low < high) {
      const int64_t middle = (low + high) / 2;
      if (first_row[middle + 1] - first_row[middle] > b)
        low = middle + 1;
      else
        high = middle;
    }
    to[b] = int(low);
  }
}

template <class Storage>
FASTRNN_KERNEL(threads)
fill_kernel(void* to, double value, int64_t n) {
  const Storage x = narrow<Storage>(Compute<Storage>(value));
  for (int64_t i = first_index(); i < n; i += stride_of_grid()) static_cast<Storage*>(to)[i] = x;
}

template <class Storage>
FASTRNN_KERNEL(threads)
narrow_kernel(const void* from, void* to, bool add, int64_t n) {
  for (int64_t i = first_index(); i < n; i += stride_of_grid()) {
    Compute<Storage> x = static_cast<const Compute<Storage>*>(from)[i];
    if (add) x += widen(static_cast<Storage*>(to)[i]);
    static_cast<Storage*>(to)[i] = narrow<Storage>(x);
  }
}

template <class Word>
FASTRNN_KERNEL(threads)
copy_kernel(const void* from, void* to, const int* lengths, int64_t begin, int B, int64_t width, int64_t n) {
  for (int64_t i = first_index(); i < n; i += stride_of_grid()) {
    const int64_t row = i / width;
    const bool active = begin + row / B < lengths[row % B];
    static_cast<Word*>(to)[i] = active ? static_cast<const Word*>(from)[i] : Word(0);
  }
}

// The block of each slot (recurrence.h).
struct Blocks {
  int of[4];
};

template <class Storage>
FASTRNN_KERNEL(threads)
dgates_kernel(const void* from, void* to, Blocks blocks, int slots, int H, int64_t n) {
  for (int64_t i = first_index(); i < n; i += stride_of_grid()) {
    const int64_t in_row = i % (int64_t(slots) * H), slot = in_row / H;
    const int block = slot == 0 ? blocks.of[0] : slot == 1 ? blocks.of[1] : slot == 2 ? blocks.of[2] : blocks.of[3];
    static_cast<Compute<Storage>*>(to)[i] = widen(static_cast<const Storage*>(from)[i + (block - slot) * H]);
  }
}

template <class Storage>
FASTRNN_KERNEL(threads)
widen_kernel(const void* from, void* to, int64_t n) {
  for (int64_t i = first_index(); i < n; i += stride_of_grid())
    static_cast<Compute<Storage>*>(to)[i] = widen(static_cast<const Storage*>(from)[i]);
}

}  // namespace

void clamp_lengths(const void* from, bool wide, int64_t stride, int64_t T, int B, int* to, Stream stream) {
  if (wide)
    launch(clamp_kernel<int64_t>, shape_for(B), stream, from, stride, T, B, to);
  else
    launch(clamp_kernel<int32_t>, shape_for(B), stream, from, stride, T, B, to);
}

void upload_first_row(const int64_t* first_row, int64_t T, int64_t* to, Stream stream) {
  Runs runs;
  const auto put = [&](int64_t end) {
    runs.end = end;
    launch(first_row_kernel, shape_for(end - runs.begin[0]), stream, runs, to);
    runs.count = 0;
  };
  for (int64_t t = 0; t <= T; ++t) {
    const int rows = t < T ? int(first_row[t + 1] - first_row[t]) : 0;
    if (runs.count && t < T && runs.rows[runs.count - 1] == rows) continue;
    if (runs.count == Runs::most) put(t);
    runs.begin[runs.count] = t;
    runs.first[runs.count] = first_row[t];
    runs.rows[runs.count++] = rows;
  }
  put(T + 1);
}

void find_lengths(const int64_t* first_row, int64_t T, int B, int* to, Stream stream) {
  launch(lengths_kernel, shape_for(B), stream, first_row, T, B, to);
}

void fill(void* to, Dtype dtype, double value, int64_t n, Stream stream) {
  if (n == 0) return;
  with_storage(dtype,
               [&](auto storage) { launch(fill_kernel<decltype(storage)>, shape_for(n), stream, to, value, n); });
}

void narrow_values(const void* from, void* to, Dtype dtype, bool add, int64_t n, Stream stream) {
  if (n == 0) return;
  with_storage(dtype,
               [&](auto storage) { launch(narrow_kernel<decltype(storage)>, shape_for(n), stream, from, to, add, n); });
}

void copy_rows(const void* from, void* to, int size, const int* lengths, int64_t begin, int64_t end, int B,
               int64_t width, Stream stream) {
  const int64_t n = (end - begin) * B * width;
  if (n == 0) return;
  const auto kernel = size == 8 ? copy_kernel<uint64_t> : size == 4 ? copy_kernel<uint32_t> : copy_kernel<uint16_t>;
  launch(kernel, shape_for(n), stream, from, to, lengths, begin, B, width, n);
}

void widen_dgates(const void* from, void* to, Dtype dtype, const CellTraits& cell, int64_t rows, int H, Stream stream) {
  Blocks blocks;
  for (int s = 0; s < 4; ++s) blocks.of[s] = s < cell.gates ? cell.hidden_gate[s] : s;
  const int64_t n = rows * cell.slots * H;
  if (n == 0) return;
  with_storage(dtype, [&](auto storage) {
    launch(dgates_kernel<decltype(storage)>, shape_for(n), stream, from, to, blocks, cell.slots, H, n);
  });
}

void widen_values(const void* from, void* to, Dtype dtype, int64_t n, Stream stream) {
  if (n == 0) return;
  with_storage(dtype,
               [&](auto storage) { launch(widen_kernel<decltype(storage)>, shape_for(n), stream, from, to, n); });
}

}  // namespace cuda
}  // namespace fastrnn
