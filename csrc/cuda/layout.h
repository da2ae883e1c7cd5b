// How a resident path (plan.h) shares the weights out, and where everything lies: index, slot and flag arithmetic as
// plain functions of sizes, the same for the host that plans, the kernels, and the tests.
//
// A group of `blocks` blocks works on `rows` rows of the batch, for one direction. Block k owns units [k U, (k + 1) U)
// and keeps the weights that its own results need. Each step multiplies those, an M x K matrix, with a vector of K
// values for each row, of which every block contributes a slice of `width` values:
//   forward   M = G U  rows g U + u      K = blocks * U      the state h        slice: h of its units
//   backward  M = U    rows u            K = blocks * G U    gradients da       slice: da of its gates, at g U + u
// (gates in torch's order). The depth K is cut into tiles, which go to the `splits` shares of a block's warps in turn;
// a warp has the tiles kk * splits + share of a tile of rows, for kk < depth, as fragments: the first ones in
// registers, the rest in shared memory.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define FASTRNN_SHARED_FN __host__ __device__ __forceinline__
#else
#define FASTRNN_SHARED_FN inline
#endif

namespace fastrnn {
namespace cuda {

// What a product multiplies: values of 16 bits, float32 rounded to TF32, or float32 as it is (on the ordinary units).
enum class Factors : int { bf16, f16, tf32, f32 };

// Sizes of the fragments of one warp and one kk. More rows to a warp read the vector less often; backward has only as
// many rows as units.
struct FragmentSizes {
  int element;       // bytes of a value of the vector
  int depth;         // values of K
  int rows;          // of M
  int columns;       // rows of the batch that are multiplied at a time
  int quads;         // 16-byte pieces of each lane
  int in_registers;  // so many kk have their fragments in registers: up to 112 of them
};

FASTRNN_SHARED_FN constexpr FragmentSizes sizes_of(Factors f, bool backward) {
  return f == Factors::f32 ? FragmentSizes{4, 32, 16, 2, 4, backward ? 6 : 7}
                           : FragmentSizes{f == Factors::tf32 ? 4 : 2, f == Factors::tf32 ? 8 : 16,
                                           backward ? 32 : 64,         16,
                                           backward ? 2 : 4,           backward ? 11 : 7};
}

// A vector that does not fit is multiplied piece by piece, of a multiple of so many kk; 0: such factors cannot be.
FASTRNN_SHARED_FN constexpr int piece_unit(Factors f) { return f == Factors::f32 ? 0 : 7; }

constexpr int max_warps = 8;
// Steps whose resets (and first rows) are fetched at a time.
constexpr int window_steps = 32;

// Quotients by a number that only the host knows, without a division: exact for n * by < 2^32.
struct Divisor {
  int by = 1;
  uint32_t inverse = 0;
  FASTRNN_SHARED_FN Divisor(int by = 1) : by(by), inverse(by > 1 ? 0xffffffffu / uint32_t(by) + 1 : 0) {}
  FASTRNN_SHARED_FN int quotient(int n) const { return by == 1 ? n : int(uint64_t(uint32_t(n)) * inverse >> 32); }
};

struct Sharing {
  Factors factors = Factors::bf16;
  bool backward = false;
  bool resets = false, packed = false;  // such windows are kept
  int H = 0, G = 0, slots = 0;
  int blocks = 0, units = 0, rows = 0;
  int row_tiles = 0, splits = 0, depth = 0;  // warps = row_tiles * splits
  int piece = 0;    // kk that a piece of the vector serves, a multiple of piece_unit(); 0: the whole vector is there
  int buffers = 1;  // of the vector
  // 16-byte pieces of a row of a slice, and of a whole row; blocks.
  Divisor slice_quads, row_quads, by_blocks;

  FASTRNN_SHARED_FN FragmentSizes sizes() const { return sizes_of(factors, backward); }
  FASTRNN_SHARED_FN int warps() const { return row_tiles * splits; }
  FASTRNN_SHARED_FN int threads() const { return 32 * warps(); }
  FASTRNN_SHARED_FN int width() const { return backward ? G * units : units; }
  FASTRNN_SHARED_FN int M() const { return backward ? units : G * units; }
  FASTRNN_SHARED_FN int K() const { return blocks * width(); }
  FASTRNN_SHARED_FN int padded_K() const { return depth * splits * sizes().depth; }
  FASTRNN_SHARED_FN int padded_M() const { return row_tiles * sizes().rows; }

  // The vector in shared memory: [rows][pitch]; a piece of it, of the rows that are multiplied at a time. The 16 bytes
  // more keep the lanes that read one column of a tile on different banks.
  FASTRNN_SHARED_FN int vector_values() const { return piece ? piece * splits * sizes().depth : padded_K(); }
  FASTRNN_SHARED_FN int pitch() const { return vector_values() * sizes().element + 16; }
  FASTRNN_SHARED_FN int vector_rows() const {
    const int columns = sizes().columns;
    return piece && rows > columns ? columns : (rows + 7) / 8 * 8;
  }
  // The rows of the batch whose sums are kept at a time: a step takes as many passes as there are such in `rows`.
  FASTRNN_SHARED_FN int pass_rows() const {
    const int most = factors == Factors::f32 ? 8 : 16, all = (rows + 7) / 8 * 8;
    return all < most ? all : most;
  }
  // Sums: [splits][pass_rows][pitch], so that lanes that write columns of a tile find different banks; those that read
  // a unit each do so where 32 units are one row's, else two meet.
  FASTRNN_SHARED_FN int sums_pitch() const { return padded_M() + 4; }

  // Bytes of the block's shared memory, piece by piece. Offsets are multiples of 16.
  FASTRNN_SHARED_FN int barriers_at() const { return 0; }
  FASTRNN_SHARED_FN int vector_at(int buffer) const { return 16 + buffer * vector_rows() * pitch(); }
  FASTRNN_SHARED_FN int sums_at() const { return vector_at(buffers); }
  // float [2][rows][units]: c and h forward; dc, and the gradient of h, backward.
  FASTRNN_SHARED_FN int states_at() const { return sums_at() + splits * pass_rows() * sums_pitch() * 4; }
  // float [2][G][units]: b_ih, b_hh.
  FASTRNN_SHARED_FN int bias_at() const { return states_at() + 2 * rows * units * 4; }
  FASTRNN_SHARED_FN int lengths_at() const { return bias_at() + (backward ? 0 : 2 * G * units * 4); }
  FASTRNN_SHARED_FN int first_rows_at() const { return lengths_at() + (rows * 4 + 15) / 16 * 16; }
  FASTRNN_SHARED_FN int resets_at() const { return first_rows_at() + (packed ? (window_steps + 4) * 8 : 0); }
  FASTRNN_SHARED_FN int slice_at() const {
    return resets_at() + (resets ? ((window_steps + 1) * rows + 15) / 16 * 16 : 0);
  }
  // The block's own slice, [rows][width], on its way to the others.
  FASTRNN_SHARED_FN int weights_at() const { return slice_at() + rows * width() * sizes().element; }
  FASTRNN_SHARED_FN int in_shared() const {
    const int kept = sizes().in_registers;
    return depth > kept ? depth - kept : 0;
  }
  FASTRNN_SHARED_FN int shared_bytes() const { return weights_at() + warps() * in_shared() * sizes().quads * 512; }

  // Packed weights, in quads: of one direction [blocks][warps][depth][quads][32 lanes].
  FASTRNN_SHARED_FN int64_t packed_quads() const { return int64_t(blocks) * warps() * depth * sizes().quads * 32; }
  FASTRNN_SHARED_FN int64_t packed_at(int block, int warp, int kk, int quad, int lane) const {
    return (((int64_t(block) * warps() + warp) * depth + kk) * sizes().quads + quad) * 32 + lane;
  }

  // Which weight is at (m, k) of the matrix of `block`: row of w_hh, and its column; -1 for none (padding).
  FASTRNN_SHARED_FN void weight_at(int block, int m, int k, int& row, int& column) const {
    row = column = -1;
    if (m >= M() || k >= K()) return;
    if (backward) {
      const int from = k / width(), rest = k % width(), j = from * units + rest % units;
      if (j >= H || block * units + m >= H) return;
      row = rest / units * H + j;
      column = block * units + m;
    } else {
      const int j = block * units + m % units;
      if (j >= H || k >= H) return;
      row = m / units * H + j;
      column = k;
    }
  }

  // Exchange through global memory: two slots in turn, each [D][groups][rows][K] values, then a flag for each block,
  // 128 bytes apart. Bytes.
  FASTRNN_SHARED_FN int64_t slot_bytes(int groups, int D) const {
    return int64_t(D) * groups * rows * K() * sizes().element;
  }
  FASTRNN_SHARED_FN int64_t exchanged_at(int slot, int groups, int D, int d, int group, int row) const {
    return slot * slot_bytes(groups, D) + ((int64_t(d) * groups + group) * rows + row) * K() * sizes().element;
  }
  FASTRNN_SHARED_FN int64_t flag_at(int groups, int D, int d, int group, int block) const {
    return 2 * slot_bytes(groups, D) + ((int64_t(d) * groups + group) * blocks + block) * 128;
  }
  FASTRNN_SHARED_FN int64_t exchange_bytes(int groups, int D) const {
    return flag_at(groups, D, D - 1, groups - 1, blocks - 1) + 128;
  }
};

}  // namespace cuda
}  // namespace fastrnn
