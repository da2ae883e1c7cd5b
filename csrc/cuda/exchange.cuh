// A block of a resident kernel (resident.cuh): its fragments of the weights, its shared memory, its products, and how
// it publishes its slice of the vector and receives everybody's (layout.h).
//
// Publishing and receiving, number e of the launch:
//   block     the slice goes to where the product reads it
//   cluster   every block pushes its slice into every block's vector, of two in turn, which counts the bytes. A block
//             publishes e + 1 after its product has read e, and nobody publishes e + 2 before he has everybody's e + 1:
//             so two vectors are enough.
//   grid      the slice goes to global memory, of two slots in turn, then the block's flag says e + 1; for the same
//             reason two slots are enough. Flags and slots are zero before the launch.
#pragma once

#include "plan.h"
#include "product.cuh"
#include "unit.cuh"

namespace fastrnn {
namespace cuda {

// What a launch is given beside the Recurrence.
struct Residence {
  Sharing s;
  int path = 0;                // Path, which is of the host
  int groups = 1;              // of each direction
  const Quad* packed[2] = {};  // Sharing::packed_quads of each direction
  char* exchange = nullptr;    // grid: Sharing::exchange_bytes, zero
};
constexpr int on_cluster = int(Path::cluster), on_grid = int(Path::grid);

constexpr int max_threads = 32 * max_warps;

// One block's view of a launch.
template <Factors factors, bool backward>
struct Block {
  using E = Element<factors>;
  using Value = typename E::Type;
  static constexpr FragmentSizes sizes = sizes_of(factors, backward);

  const Sharing& s;
  const Residence& at;
  char* memory = shared_memory();
  int tid = thread_index();
  const int threads = thread_count();
  const int directions;
  int rank, group, d;

  FASTRNN_METHOD Block(const Residence& at, int directions)
      : s(at.s),
        at(at),
        directions(directions),
        rank(block_x() % at.s.blocks),
        group(block_x() / at.s.blocks),
        d(block_y()) {}
  Quad kept[sizes.in_registers][sizes.quads];  // the warp's first fragments

  FASTRNN_METHOD float* sums() const { return reinterpret_cast<float*>(memory + s.sums_at()); }
  FASTRNN_METHOD Value* slice() const { return reinterpret_cast<Value*>(memory + s.slice_at()); }
  FASTRNN_METHOD uint64_t* barrier(int e) const {
    return reinterpret_cast<uint64_t*>(memory + s.barriers_at()) + (e & 1);
  }
  FASTRNN_METHOD char* vector(int e) const { return memory + s.vector_at(s.buffers == 2 ? e & 1 : 0); }
  FASTRNN_DEVICE void fill(char* from, char* to, int tid, int threads) {
    for (Quad* q = reinterpret_cast<Quad*>(from) + tid; q < reinterpret_cast<Quad*>(to); q += threads) *q = Quad{};
  }

  FASTRNN_DEVICE void start(Block& b) {
    fill(b.memory + b.s.barriers_at(), b.memory + b.s.weights_at(), b.tid, b.threads);
    const int warp = b.tid / 32, lane = b.tid % 32;
    const Quad* const packed = of(b.at.packed, b.d);
#pragma unroll
    for (int kk = 0; kk < sizes.in_registers; ++kk)
#pragma unroll
      for (int q = 0; q < sizes.quads; ++q)
        b.kept[kk][q] = kk < b.s.depth ? packed[b.s.packed_at(b.rank, warp, kk, q, lane)] : Quad{};
    Quad* const more = b.more();
    for (int kk = sizes.in_registers; kk < b.s.depth; ++kk)
      for (int q = 0; q < sizes.quads; ++q)
        more[((kk - sizes.in_registers) * sizes.quads + q) * 32 + lane] =
            packed[b.s.packed_at(b.rank, warp, kk, q, lane)];
    sync_block();
    if (b.at.path == on_cluster) {
      if (b.tid == 0) {
        make_barrier(b.barrier(0));
        make_barrier(b.barrier(1));
      }
      sync_cluster();
    }
  }
  // Nobody may leave while others still push to him.
  FASTRNN_DEVICE void finish(const Block& b) {
    if (b.at.path == on_cluster) sync_cluster();
  }
  // At every step (device.cuh: forget).
  FASTRNN_METHOD void forget_all() {
    int zero = 0;
    forget(zero);
    memory = shared_memory() + zero;
    forget(tid);
    forget(d);
    forget(rank);
    forget(group);
  }
  // The warp's fragments that registers do not hold.
  FASTRNN_METHOD Quad* more() const {
    return reinterpret_cast<Quad*>(memory + s.weights_at()) + (tid / 32) * s.in_shared() * sizes.quads * 32;
  }

  // After a sync_block() that has seen the slice whole.
  FASTRNN_DEVICE void publish(const Block& b, int e) {
    const Divisor& in_row = b.s.slice_quads;
    const int slice_bytes = in_row.by * 16, all = b.s.rows * in_row.by;
    const Quad* const from = reinterpret_cast<const Quad*>(b.slice());
    // Where quad i of the slice goes, in rows of `pitch` bytes.
    const auto place = [&](int i, int64_t pitch) {
      const int row = in_row.quotient(i);
      return row * pitch + (i - row * in_row.by) * 16;
    };
    if (b.at.path == on_grid) {
      char* const to =
          b.at.exchange + b.s.exchanged_at(e & 1, b.at.groups, b.directions, b.d, b.group, 0) + b.rank * slice_bytes;
      const int64_t pitch = int64_t(b.s.K()) * sizes.element;
#pragma unroll 1
      for (int i = b.tid; i < all; i += b.threads) store_fresh(reinterpret_cast<Quad*>(to + place(i, pitch)), from[i]);
      sync_block();
      if (b.tid == 0) release_word(b.flag(b.rank), uint32_t(e + 1));
      return;
    }
    char* const to = b.vector(e) + b.rank * slice_bytes;
    if (b.at.path == on_cluster) {
      if (b.tid == 0) expect_bytes(b.barrier(e), uint32_t(b.s.blocks * all * 16));
#pragma unroll 1
      for (int i = b.tid; i < b.s.blocks * all; i += b.threads) {
        const int piece = b.s.by_blocks.quotient(i);
        int to_rank = i - piece * b.s.blocks + b.rank;  // not all blocks send to the same one first
        if (to_rank >= b.s.blocks) to_rank -= b.s.blocks;
        push(reinterpret_cast<Quad*>(to + place(piece, b.s.pitch())), from[piece], b.barrier(e), to_rank);
      }
      return;
    }
#pragma unroll 1
    for (int i = b.tid; i < all; i += b.threads) *reinterpret_cast<Quad*>(to + place(i, b.s.pitch())) = from[i];
  }
  FASTRNN_METHOD uint32_t* flag(int block) const {
    return reinterpret_cast<uint32_t*>(at.exchange + s.flag_at(at.groups, directions, d, group, block));
  }

  FASTRNN_DEVICE void receive(const Block& b, int e) {
    if (b.at.path == on_cluster) {
      wait_for_bytes(b.barrier(e), uint32_t(e >> 1) & 1);
      return;
    }
    if (b.at.path == on_grid) {
#pragma unroll 1
      for (int i = b.tid; i < b.s.blocks; i += b.threads)
        while (acquire_word(b.flag(i)) < uint32_t(e + 1)) while_waiting();
      sync_block();
      if (b.s.piece) return;
      copy_range(b, e, 0, b.s.rows, 0, b.s.row_quads);
    }
    sync_block();
  }
  // in_row quads from byte `begin` on of the rows from `first` on, from global memory.
  FASTRNN_DEVICE void copy_range(const Block& b, int e, int first, int rows, int begin, const Divisor& in_row) {
    const char* const from =
        b.at.exchange + b.s.exchanged_at(e & 1, b.at.groups, b.directions, b.d, b.group, first) + begin;
    const int64_t pitch = int64_t(b.s.K()) * sizes.element;
    char* const to = b.vector(e);
#pragma unroll 1
    for (int i = b.tid; i < rows * in_row.by; i += b.threads) {
      const int row = in_row.quotient(i), at = (i - row * in_row.by) * 16;
      copy_fresh(reinterpret_cast<Quad*>(to + row * b.s.pitch() + at),
                 reinterpret_cast<const Quad*>(from + row * pitch + at));
    }
    wait_for_copies();
  }

  // sums = weights times the vector e, for the rows of the pass that begins at `pass`.
  FASTRNN_DEVICE void multiply(const Block& b, int e, int pass) {
    constexpr int unit = piece_unit(factors);
    const Sharing& s = b.s;
    const int warp = b.tid / 32, lane = b.tid % 32, tile = warp / s.splits, share = warp % s.splits;
    const int pitch = s.pitch(), tile_bytes = sizes.depth * sizes.element, stride = s.splits * tile_bytes;
    const Quad* const more = b.more();
    float* const sums = b.sums() + (share * s.pass_rows() - pass) * s.sums_pitch() + tile * sizes.rows;
    const int last = s.rows - pass < s.pass_rows() ? s.rows : pass + s.pass_rows();
#pragma unroll 1
    for (int first = pass; first < last; first += sizes.columns) {
      const bool two = s.rows - first > sizes.columns / 2;
      Tile<factors, sizes.rows> t = Tile<factors, sizes.rows>::zero();
      const char* const vector = b.vector(e) + share * tile_bytes;
      const char* v = s.piece ? vector : vector + first * pitch;
      int left = 0;
      const auto bring = [&](int kk) {
        if constexpr (unit != 0) {
          if (s.piece == 0 || kk % unit) return;
          left -= unit;
          if (left > 0) return;
          left = s.piece;
          const int begin = kk * stride, end = s.K() * sizes.element, whole = begin + s.piece * stride;
          const int rows = s.rows - first < sizes.columns ? s.rows - first : sizes.columns;
          sync_block();
          copy_range(b, e, first, rows, begin, Divisor(((end < whole ? end : whole) - begin) / 16));
          if (end < whole)
            for (int n = 0; n < rows; ++n)
              fill(b.vector(e) + n * pitch + end - begin, b.vector(e) + n * pitch + whole - begin, b.tid, b.threads);
          sync_block();
          v = vector;
        }
      };
      if (s.depth >= sizes.in_registers && s.piece == 0) {  // no branch between the products
#pragma unroll
        for (int kk = 0; kk < sizes.in_registers; ++kk)
          Tile<factors, sizes.rows>::add(t, b.kept[kk], v + kk * stride, pitch, two, lane);
        v += sizes.in_registers * stride;
      } else {
#pragma unroll
        for (int kk = 0; kk < sizes.in_registers; ++kk) {
          if (kk < s.depth) {
            bring(kk);
            Tile<factors, sizes.rows>::add(t, b.kept[kk], v, pitch, two, lane);
            v += stride;
          }
        }
      }
#pragma unroll 1
      for (int kk = sizes.in_registers; kk < s.depth; ++kk) {
        bring(kk);
        Quad fragment[sizes.quads];
#pragma unroll
        for (int q = 0; q < sizes.quads; ++q)
          fragment[q] = more[((kk - sizes.in_registers) * sizes.quads + q) * 32 + lane];
        Tile<factors, sizes.rows>::add(t, fragment, v, pitch, two, lane);
        v += stride;
      }
      Tile<factors, sizes.rows>::store(t, sums + first * s.sums_pitch(), s.sums_pitch(), two, lane);
    }
  }
  // The sum of all shares: row m of the weights, row n of the pass.
  FASTRNN_METHOD float total(int m, int n) const {
    const float* from = sums() + n * s.sums_pitch() + m;
    const int share = s.pass_rows() * s.sums_pitch();
    float all = from[0];
#pragma unroll
    for (int first = 1; first < max_warps; first += 4) {  // loaded at once, added in turn
      float part[4];
#pragma unroll
      for (int k = 0; k < 4; ++k) part[k] = first + k < s.splits ? from[(first + k) * share] : 0;
#pragma unroll
      for (int k = 0; k < 4; ++k) all = first + k < s.splits ? all + part[k] : all;
    }
    return all;
  }
};

// The pairs of a unit and a row of the batch that are a thread's, one after another: units fastest.
struct Pair {
  int u, n, units, du, dn;
  FASTRNN_METHOD Pair(int tid, int threads, int units)
      : u(tid % units), n(tid / units), units(units), du(threads % units), dn(threads / units) {}
  // Once more from the start, at a step of its own; from a row on.
  FASTRNN_METHOD Pair again(int row = 0) const {
    Pair p = *this;
    p.n += row;
    forget(p.u);
    forget(p.n);
    return p;
  }
  FASTRNN_METHOD void next() {
    u += du;
    n += dn;
    if (u >= units) {
      u -= units;
      ++n;
    }
  }
};

// A stretch of steps whose first_row (of two steps before and after, too, for what is fetched ahead) and reset (of the
// step after, too) are kept on the chip: all steps with t in [low, high].
struct Window {
  int64_t low, high;
  FASTRNN_METHOD Window(const Recurrence& r, int d, int64_t q, int64_t until)
      : low(d ? r.T - until : q), high(d ? r.T - 1 - q : until - 1) {}
  FASTRNN_METHOD int64_t before() const { return low > 2 ? low - 2 : 0; }
  FASTRNN_METHOD int64_t after(const Recurrence& r, int n) const { return high + n < r.T ? high + n : r.T - 1; }

  FASTRNN_METHOD void fetch(const Recurrence& r, const Sharing& s, char* memory, int row0, int rows, int tid,
                            int threads) const {
    if (s.packed) {
      auto* const to = reinterpret_cast<int64_t*>(memory + s.first_rows_at());
#pragma unroll 1
      for (int i = tid; i <= after(r, 2) - before(); i += threads) to[i] = r.first_row[before() + i];
    }
    if (s.resets) {
      auto* const to = reinterpret_cast<bool*>(memory + s.resets_at());
#pragma unroll 1
      for (int i = tid; i < (after(r, 1) - low + 1) * s.rows; i += threads)
        if (i % s.rows < rows) to[i] = r.reset[(low + i / s.rows) * r.reset_step + (row0 + i % s.rows) * r.reset_row];
    }
  }
  // Has r read them there.
  FASTRNN_METHOD void use(Recurrence& r, const Sharing& s, char* memory, int row0) const {
    if (s.packed) {
      r.first_row = reinterpret_cast<int64_t*>(memory + s.first_rows_at());
      r.first_row_from = before();
    }
    if (s.resets) {
      r.reset = reinterpret_cast<bool*>(memory + s.resets_at());
      r.reset_from = low;
      r.reset_row_from = row0;
      r.reset_step = s.rows;
      r.reset_row = 1;
    }
  }
};

}  // namespace cuda
}  // namespace fastrnn
