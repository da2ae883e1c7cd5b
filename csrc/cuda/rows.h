// What stands around the recurrence: how long rows are and where their steps lie, and copies of rows. Each puts one
// kernel on the stream.
#pragma once

#include "recurrence.h"
#include "runtime.h"

namespace fastrnn {
namespace cuda {

// to[b] = from[b * stride], int64 if `wide` else int32, clamped to 0..T.
void clamp_lengths(const void* from, bool wide, int64_t stride, int64_t T, int B, int* to, Stream stream);

// Packed input: the host's first_row [T + 1] to the device, through kernel parameters (some kernels where rows have
// many lengths), so that nobody waits for a copy from memory that may move; and the rows' lengths from it.
void upload_first_row(const int64_t* first_row, int64_t T, int64_t* to, Stream stream);
void find_lengths(const int64_t* first_row, int64_t T, int B, int* to, Stream stream);

// to[i] = value, n times.
void fill(void* to, Dtype dtype, double value, int64_t n, Stream stream);

// to[i] = from[i] or, with `add`, to[i] + from[i]; from in the compute dtype of `dtype`, rounded once.
void narrow_values(const void* from, void* to, Dtype dtype, bool add, int64_t n, Stream stream);

// to[row] = from[row] for all rows (t, b) of steps [begin, end), `width` values each of `size` bytes; zeros where t is
// not below the row's length. Both contiguous and from row (begin, 0) on.
void copy_rows(const void* from, void* to, int size, const int* lengths, int64_t begin, int64_t end, int B,
               int64_t width, Stream stream);

// A chunk's gradients of pre-activations [rows, slots*H], widened, for problem.h's operands: from the order of
// recurrence.h into that of slots. And values as they lie.
void widen_dgates(const void* from, void* to, Dtype dtype, const CellTraits& cell, int64_t rows, int H, Stream stream);
void widen_values(const void* from, void* to, Dtype dtype, int64_t n, Stream stream);

}  // namespace cuda
}  // namespace fastrnn
