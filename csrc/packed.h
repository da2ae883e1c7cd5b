// What fastrnn::pack returns: weights that stay packed as the kernels of one instruction set read them.
#pragma once

#include <cstring>

#include "problem.h"

namespace fastrnn {

// Weights that are kept packed: this, then what Kernels::pack wrote for each layer and direction.
struct alignas(64) PackedHeader {
  char magic[8];
  char isa[16];
  CellKind cell;
  Dtype dtype;
  Precision precision;
  int D, projected, bias;
  int64_t layers, I, H, P;
  int64_t size, first_size;  // bytes of one direction: of a layer, of the first one

  int64_t bytes() const { return int64_t(sizeof(PackedHeader)) + D * (first_size + (layers - 1) * size); }
  // Where layer k, direction d begins.
  int64_t place(int64_t k, int d) const {
    return int64_t(sizeof(PackedHeader)) + (k ? D * (first_size + (k - 1) * size) + d * size : d * first_size);
  }
};
inline constexpr char packed_magic[8] = "fastrnn";

// The header at the beginning of so many bytes; null where they are something else.
inline const PackedHeader* header_at(const void* data, int64_t bytes) {
  if (bytes < int64_t(sizeof(PackedHeader)) || reinterpret_cast<uintptr_t>(data) % 64) return nullptr;
  const auto* const header = static_cast<const PackedHeader*>(data);
  if (std::memcmp(header->magic, packed_magic, sizeof packed_magic) || bytes != header->bytes()) return nullptr;
  return header;
}

}  // namespace fastrnn
