// Products by AMX: registers of 16 rows by 64 bytes, and one instruction that multiplies two of them as pairs of
// bfloat16 and adds up in float32. Included for the tier that has it alone.
//
// A float32 is the sum of three bfloat16, its pieces: a = a1 + a2 + a3, each the rounding of what is left. Of the nine
// products of the pieces of a and b, the six largest give a float32 product with less error than float32's own sums
// have; three ("tf32") or one ("bf16") give less for less (Henry, Tang, Heinecke 2019, "Leveraging the bfloat16
// Artificial Intelligence Datatype For Higher-Precision Computations").
//
// The left matrix lies in rows, [chunk][piece][32 bfloat16], a chunk being 32 of depth. The right one lies in tiles,
// [chunk][piece][vector][16 pairs of depth][16 columns][2]. Both are zero beyond their depth. Summation order, which
// fixes the bits: chunk after chunk, in each the products of `Order`; within one, the instruction's own. Runs of chunks
// are summed from zero and the run sums added in order, or long sums would lose what six products gain.
//
// Infinity and NaN: the first pieces are held at the largest bfloat16, the last is what is left, so it alone is
// infinite or NaN, and it is multiplied by the other side's first piece alone: what comes out is what float32 gives.
// Numbers next to the largest float32 are exact for the same reason; a product within a hundredth of it may be
// infinite. One far beyond it has pieces of both signs that are, and gives NaN: where sums are to be float32's, NaN is
// computed again by fma (single_row).
//
// Small ones: the instruction takes what is below 2^-126 for zero, of pieces and of products. Weights are therefore
// held against `least_weight` before tiles are chosen (tiles_serve), and rows of the left matrix against `least_row`: a
// row whose largest value is smaller is multiplied by fma as well, forward, where that is seldom. Back, where gradients
// vanish, it is scaled by a power of two before it is cut into pieces (Scale).

constexpr float least_weight = 0x1p-10f, least_row = 0x1p-80f;
constexpr float least_scaled = 0x1p-40f;  // inputs and states below are scaled where they are multiplied by gradients
constexpr int64_t chunk_depth = 32, tile_height = 16, tile_floats = 256;  // a tile is 1 KiB
constexpr int64_t run_chunks = 8;

// The instructions, as text: the compiler is not told of the extension. Registers are numbers known to the compiler.
template <int R>
FASTRNN_INLINE void tile_zero() {
  __asm__ volatile("tilezero %%tmm%c0" : : "n"(R));
}
template <int R>
FASTRNN_INLINE void tile_load(const void* from, int64_t stride) {
  __asm__ volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(from), "r"(stride), "n"(R) : "memory");
}
template <int R>
FASTRNN_INLINE void tile_store(void* to, int64_t stride) {
  __asm__ volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(to), "r"(stride), "n"(R) : "memory");
}
// C += A B
template <int C, int A, int B>
FASTRNN_INLINE void tile_multiply() {
  __asm__ volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "n"(C), "n"(A), "n"(B));
}

// The tile registers of a thread are shaped anew when a pass begins, for others use them as well, and given back at its
// end: a thread that holds them is slower to switch.
static thread_local int configured_height;  // rows of sums and of the left matrix; 0: none

struct TileSession {
  TileSession() { configured_height = 0; }
  ~TileSession() {
    if (configured_height) __asm__ volatile("tilerelease");
  }
  TileSession(const TileSession&) = delete;
  TileSession& operator=(const TileSession&) = delete;
};

// Which registers are what: four of sums from 0, then those of the left matrix, then those of the right.
template <int Lefts>
static void configure_tiles(int height) {
  constexpr int first_left = 4, first_right = first_left + Lefts;
  const int wanted = height * 4 + Lefts;
  if (configured_height == wanted) return;
  struct alignas(64) {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {};
    uint8_t rows[16] = {};
  } shape;
  for (int i = 0; i < 8; ++i) {
    shape.row_bytes[i] = 64;
    shape.rows[i] = uint8_t(i < first_right ? height : tile_height);
  }
  __asm__ volatile("ldtilecfg %0" : : "m"(shape));
  configured_height = wanted;
}

// 16 of float32 as bfloat16 (denormal numbers as zero), and back.
FASTRNN_INLINE __m256i to_bf16(__m512 x) {
  __m256i y;
  __asm__("vcvtneps2bf16 %1, %0" : "=v"(y) : "v"(x));
  return y;
}
FASTRNN_INLINE __m512 from_bf16(__m256i x) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16));
}

// x as P pieces.
template <int P>
FASTRNN_INLINE void split(f32 x, __m256i (&piece)[P]) {
  __m512 rest = x.v;
#pragma GCC unroll 3
  for (int q = 0; q < P; ++q) {
    // The smaller absolute value, with the sign of the rest; of a NaN, the other.
    const __m512 held = q + 1 < P ? _mm512_range_ps(rest, _mm512_set1_ps(0x1.fep127f), 2) : rest;
    piece[q] = to_bf16(held);
    if (q + 1 < P) rest = _mm512_sub_ps(rest, from_bf16(piece[q]));
  }
}

FASTRNN_INLINE f32 first_lanes(f32 x, int64_t n) {
  return n >= f32::lanes ? x : f32{_mm512_maskz_mov_ps(__mmask16((1u << n) - 1), x.v)};
}

template <int P>
struct Tiles {
  using T = float;
  using Left = Singles<f32>;
  using Session = TileSession;
  static constexpr bool tiled = true;
  static constexpr int weight_bytes = 2 * P;
  // Measured with one core of a Xeon: 1,600, 670 and 320 GF/s, where this plan counts 100 for fma (plan.cpp).
  static constexpr double speed = P == 1 ? 16 : P == 2 ? 6.7 : 3.2;
  static constexpr int pieces = P;
  static constexpr bool keeps_small = P == 3;  // float32 is to stay float32
  static constexpr int64_t row_beyond = tile_height, row_multiple = chunk_depth;

  static constexpr int64_t chunks(int64_t values) { return ceil_div(values, chunk_depth); }
  static constexpr int64_t words(int64_t values) { return chunks(values) * P * 16; }
  // From row to row: an odd number of cache lines, or the rows of a tile would fall into the same few sets.
  static constexpr int64_t stride(int64_t words) { return words / 16 % 2 ? words : words + 16; }
  // Words of a column of so many rows, in blocks that weight gradients are summed from.
  static constexpr int64_t row_words(int64_t rows) { return words(rows); }

  // Whether words say all of the values that are stored.
  static bool exact(const Storage<f32>& storage) { return P == 1 && storage.dtype == Dtype::bf16; }
  static void read(const Storage<f32>& storage, const void* from, T* to, int64_t n) {
    const char* values = static_cast<const char*>(from);
    for (int64_t i = 0; i < n; i += f32::lanes)
      store(Storage<f32>::load(storage, values + i * storage.size, n - i), to, i, n - i);
    if (n % chunk_depth > 0 && n % chunk_depth <= 16) store(f32::set(0), to, round_up_to_vector(n), f32::lanes);
  }

  FASTRNN_INLINE f32 load(const T* row, int64_t unit) {  // of what is exact
    return load_bf16(reinterpret_cast<const uint16_t*>(row) + unit);
  }
  FASTRNN_INLINE void store(f32 x, T* row, int64_t unit, int64_t n) {
    __m256i piece[P];
    split<P>(first_lanes(x, n), piece);
    T* to = row + unit / chunk_depth * P * 16 + unit % chunk_depth / 2;
    for (int q = 0; q < P; ++q) _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + q * 16), piece[q]);
  }

  // Makes x row `row` of a block of columns.
  FASTRNN_INLINE void put(f32 x, T* block, int64_t row) {
    __m256i piece[P];
    split<P>(x, piece);
    T* to = block + row / chunk_depth * P * tile_floats + row % chunk_depth / 2 * 16;
    for (int q = 0; q < P; ++q) {
      const __m512i halves = _mm512_cvtepu16_epi32(piece[q]);
      if (row % 2)
        _mm512_mask_storeu_epi16(to + q * tile_floats, 0xaaaaaaaa, _mm512_slli_epi32(halves, 16));
      else
        _mm512_mask_storeu_epi16(to + q * tile_floats, 0x55555555, halves);
    }
  }

  // Packs groups [begin, end) of a matrix, cut as over_groups cuts it, as tiles.
  template <int G>
  static void pack(const Packed<f32, G>& to, const Source& from, const Storage<f32>& storage, int64_t begin,
                   int64_t end);

 private:
  static constexpr int64_t round_up_to_vector(int64_t n) { return ceil_div(n, f32::lanes) * f32::lanes; }
};

// The products of a chunk, as pieces of the left and of the right matrix: neighbours share one.
template <int P>
struct Order;
template <>
struct Order<1> {
  static constexpr int n = 1, left[] = {0}, right[] = {0};
};
template <>
struct Order<2> {
  static constexpr int n = 3, left[] = {0, 1, 0}, right[] = {1, 0, 0};
};
template <>
struct Order<3> {
  static constexpr int n = 6, left[] = {0, 0, 1, 1, 2, 0}, right[] = {2, 1, 1, 0, 0, 0};
};

// Calls f(Int<0>), ... f(Int<n - 1>), each with a number the compiler knows.
template <int n, class F>
FASTRNN_INLINE void times(const F& f) {
  if constexpr (n > 0) {
    times<n - 1>(f);
    f(Int<n - 1>{});
  }
}

// Where operands lie, in bytes: from row to row of the left matrix, from tile to tile (chunk and piece), from a tile of
// rows to the next; and of the right one from tile to tile, and from vector to vector.
struct TileStrides {
  int64_t row, left, rows, right, vector;
};

// out[row][ld] = left right: M tiles of rows by N vectors, at most four sums, over `chunks` chunks. With four vectors
// there is no register for each: they take turns.
template <int P, int M, int N>
static void multiply_tiles(const float* left, const float* right, const TileStrides& by, int height, int64_t chunks,
                           float* out, int64_t ld) {
  static_assert(M * N <= 4);
  using Pairs = Order<P>;
  constexpr int A = 4, B = A + M, held = 8 - B;
  configure_tiles<M>(height);
  const char *a = bytes(left), *b = bytes(right);
  alignas(64) float run_sums[M * tile_height * N * 16];
  for (int64_t begin = 0; begin == 0 || begin < chunks; begin += run_chunks) {
    times<M * N>([](auto i) { tile_zero<decltype(i)::value>(); });
    for (int64_t c = begin; c < smaller(begin + run_chunks, chunks); ++c, a += P * by.left, b += P * by.right)
      times<Pairs::n>([&](auto pair) {
        constexpr int p = decltype(pair)::value, before = p > 0 ? p - 1 : 0;
        constexpr bool same_left = p > 0 && Pairs::left[p] == Pairs::left[before];
        constexpr bool same_right = p > 0 && N <= held && Pairs::right[p] == Pairs::right[before];
        if constexpr (!same_left)
          times<M>([&](auto m) {
            tile_load<A + decltype(m)::value>(a + Pairs::left[p] * by.left + decltype(m)::value * by.rows, by.row);
          });
        times<N>([&](auto v) {
          constexpr int column = decltype(v)::value, R = B + column % held;
          if constexpr (!same_right) tile_load<R>(b + Pairs::right[p] * by.right + column * by.vector, 64);
          times<M>([&](auto m) { tile_multiply<decltype(m)::value * N + column, A + decltype(m)::value, R>(); });
        });
      });
    float* const to = begin == 0 ? out : run_sums;
    const int64_t to_ld = begin == 0 ? ld : N * 16;
    times<M * N>([&](auto i) {
      constexpr int tile = decltype(i)::value;
      tile_store<tile>(to + tile / N * height * to_ld + tile % N * 16, to_ld * int64_t(sizeof(float)));
    });
    if (begin == 0) continue;
    for (int r = 0; r < M * height; ++r)
#pragma GCC unroll 4
      for (int v = 0; v < N; ++v) {
        float* const sum = out + r * ld + v * 16;
        (f32::load(sum) + f32::load(run_sums + (r * N + v) * 16)).store(sum);
      }
  }
}

// Calls f(row, sums) for rows [begin, end) of `left` (`stride` words apart; memory, of whatever contents, goes on for
// `tile_height` rows) times a packed group of N vectors.
template <int P, int N, class F>
FASTRNN_INLINE void over_tiled_rows(int64_t begin, int64_t end, const float* left, int64_t stride, const float* group,
                                    int64_t chunks, const F& f) {
  if (begin >= end) return;
  const int64_t tiles = ceil_div(end - begin, tile_height), height = ceil_div(end - begin, tiles);
  constexpr int64_t ld = N * 16;
  const TileStrides by{stride * 4, 64, height * stride * 4, N * tile_floats * 4, tile_floats * 4};
  alignas(64) float out[2 * tile_height * ld];
  for (int64_t i = begin; i < end;) {
    const float* from = left + i * stride;
    const bool two = N != 3 && end - i > height;
    if (!two) {
      multiply_tiles<P, 1, N>(from, group, by, int(height), chunks, out, ld);
    } else if constexpr (N == 4) {
      multiply_tiles<P, 2, 2>(from, group, by, int(height), chunks, out, ld);
      multiply_tiles<P, 2, 2>(from, group + 2 * tile_floats, by, int(height), chunks, out + 32, ld);
    } else if constexpr (N < 3) {
      multiply_tiles<P, 2, N>(from, group, by, int(height), chunks, out, ld);
    }
    for (int64_t r = 0, rows = smaller((two ? 2 : 1) * height, end - i); r < rows; ++r) {
      f32 sum[N];
#pragma GCC unroll 4
      for (int v = 0; v < N; ++v) sum[v] = f32::load(out + r * ld + v * 16);
      f(i + r, sum);
    }
    i += (two ? 2 : 1) * height;
  }
}

// The largest absolute value of a row, as a vector whose lanes have to be looked at together.
FASTRNN_INLINE f32 largest_of(const float* row, int64_t n) {
  f32 most = f32::set(0);
  for (int64_t i = 0; i < n; i += f32::lanes)
    most = max(most, absolute(n - i >= f32::lanes ? f32::load(row + i) : f32::load(row + i, int(n - i))));
  return most;
}
// Whether all of it is below `least`, and some of it not zero.
FASTRNN_INLINE bool is_small(f32 largest, float least = least_row) {
  return !_mm512_cmp_ps_mask(largest.v, _mm512_set1_ps(least), _CMP_NLT_UQ) &&
         _mm512_cmp_ps_mask(largest.v, _mm512_setzero_ps(), _CMP_NEQ_UQ);
}

template <int N>
FASTRNN_INLINE bool any_nan(const f32 (&sum)[N]) {
  f32 x = sum[0];
#pragma GCC unroll 4
  for (int v = 1; v < N; ++v) x = x + sum[v];  // or infinite of both signs, which is seldom
  return _mm512_cmp_ps_mask(x.v, x.v, _CMP_UNORD_Q) != 0;
}

// The power of two that brings what has this largest value next to 2^target, and the one that undoes it; one for what
// is zero, infinite or NaN.
struct Scale {
  float by = 1, back = 1;
  Scale(f32 largest, int target) {
    const float most = _mm512_reduce_max_ps(largest.v);
    int bits;
    __builtin_memcpy(&bits, &most, sizeof bits);
    const int exponent = bits >> 23 & 0xff;
    if (bits == 0 || exponent == 0xff) return;
    int steps = target + 126 - exponent;
    steps = steps > 126 ? 126 : steps < -126 ? -126 : steps;
    by = power(steps);
    back = power(-steps);
  }

 private:
  static float power(int n) {  // of two; -126 <= n <= 126
    const int bits = (n + 127) << 23;
    float x;
    __builtin_memcpy(&x, &bits, sizeof x);
    return x;
  }
};

// A row that tiles do not serve times a packed group, by fma: the pieces of a weight add up to it. row: chunks * 32
// values, zero beyond its depth.
template <int P, int N>
static __attribute__((noinline)) void single_row(f32 (&sum)[N], const float* row, const float* group, int64_t chunks) {
  for (int v = 0; v < N; ++v) sum[v] = f32::set(0);
  for (int64_t c = 0; c < chunks; ++c)
    for (int k = 0; k < 16; ++k)
      for (int v = 0; v < N; ++v) {
        __m512 even = _mm512_setzero_ps(), odd = _mm512_setzero_ps();
        for (int q = 0; q < P; ++q) {
          const __m512i words = _mm512_loadu_si512(group + ((c * P + q) * N + v) * tile_floats + k * 16);
          even = _mm512_add_ps(even, _mm512_castsi512_ps(_mm512_slli_epi32(words, 16)));
          odd = _mm512_add_ps(odd, _mm512_castsi512_ps(_mm512_and_si512(words, _mm512_set1_epi32(int(0xffff0000)))));
        }
        const float* x = row + c * chunk_depth + 2 * k;
        sum[v] = fma(f32::set(x[0]), f32{even}, sum[v]);
        sum[v] = fma(f32::set(x[1]), f32{odd}, sum[v]);
      }
}

template <int P>
template <int G>
void Tiles<P>::pack(const Packed<f32, G>& to, const Source& from, const Storage<f32>& storage, int64_t begin,
                    int64_t end) {
  constexpr int U = Packed<f32, G>::U;
  const int64_t first = smaller(begin * U, to.blocks), last = smaller(end * U, to.blocks);
  const char* data = static_cast<const char*>(from.data);
  const auto value = [&](int64_t row, int64_t column, int64_t n) {
    return n > 0 ? first_lanes(Storage<f32>::load(storage, data + (row * from.ld + column) * storage.size, n), n)
                 : f32::set(0);
  };
  over_groups<U>(first, last, [&](auto u, int64_t block) {
    constexpr int N = decltype(u)::value * G;
    float* group = to.data + block * G * f32::lanes * to.K;
    const auto tile = [&](int64_t c, int q, int v) { return group + ((c * P + q) * N + v) * tile_floats; };
    const int64_t chunks = to.K / (P * 16);
    for (int64_t c = 0; c < chunks; ++c)
      for (int v = 0; v < N; ++v) {
        if (from.transposed) {  // a weight row is a column
          const int64_t unit = (block + v / G) * f32::lanes, depth = c * chunk_depth;
          f32 words[P][f32::lanes];
          for (int lane = 0; lane < f32::lanes; ++lane) {
            const bool here = unit + lane < from.units;
            const int64_t row = from.gate[v % G] * from.H + unit + lane;
            __m256i low[P], high[P];
            split<P>(here ? value(row, depth, from.ld - depth) : f32::set(0), low);
            split<P>(here ? value(row, depth + 16, from.ld - depth - 16) : f32::set(0), high);
            for (int q = 0; q < P; ++q)
              words[q][lane].v = _mm512_castsi512_ps(_mm512_inserti64x4(_mm512_castsi256_si512(low[q]), high[q], 1));
          }
          for (int q = 0; q < P; ++q) {
            transpose(words[q]);
            for (int k = 0; k < 16; ++k) words[q][k].store(tile(c, q, v) + k * 16);
          }
        } else {  // depth is the units of each gate, padded by itself
          const int64_t of_gate = ceil_div(from.H, chunk_depth), gate = c / of_gate;
          const int64_t unit = c % of_gate * chunk_depth, column = (block + v) * f32::lanes;
          for (int k = 0; k < 16; ++k) {
            const int64_t row = unit + 2 * k;
            __m256i even[P], odd[P];
            split<P>(row < from.H ? value(from.gate[gate] * from.H + row, column, from.units - column) : f32::set(0),
                     even);
            split<P>(
                row + 1 < from.H ? value(from.gate[gate] * from.H + row + 1, column, from.units - column) : f32::set(0),
                odd);
            for (int q = 0; q < P; ++q)
              _mm512_storeu_si512(tile(c, q, v) + k * 16,
                                  _mm512_or_si512(_mm512_cvtepu16_epi32(even[q]),
                                                  _mm512_slli_epi32(_mm512_cvtepu16_epi32(odd[q]), 16)));
          }
        }
      }
  });
}
