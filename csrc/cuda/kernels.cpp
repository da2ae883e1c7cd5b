// Finds a cell's kernels, each cell's in a .cu file of its own, and what the plan makes of the current card.
#include "kernels.h"

#include <array>
#include <map>
#include <mutex>
#include <string>
#include <utility>

namespace fastrnn {
namespace cuda {

const CellKernels& rnn_tanh_kernels(Dtype storage);
const CellKernels& rnn_relu_kernels(Dtype storage);
const CellKernels& lstm_kernels(Dtype storage);
const CellKernels& gru_kernels(Dtype storage);

const CellKernels& find_kernels(CellKind cell, Dtype storage) {
  switch (cell) {
    case CellKind::rnn_tanh:
      return rnn_tanh_kernels(storage);
    case CellKind::rnn_relu:
      return rnn_relu_kernels(storage);
    case CellKind::gru:
      return gru_kernels(storage);
    case CellKind::lstm:
      break;
  }
  return lstm_kernels(storage);
}

Choice choose_for_card(const Layer& layer, bool tf32, bool backward, const std::string& forced) {
  const Card& here = card();
  using Key = std::array<int64_t, 14>;
  static std::mutex mutex;
  static auto& known = *new std::map<std::pair<Key, std::string>, Choice>;
  const Key key{
      int64_t(layer.cell), int64_t(layer.dtype),   layer.B, layer.H,  layer.P,   layer.D,         layer.projected,
      layer.packed,        layer.reset != nullptr, tf32,    backward, here.arch, here.processors, here.shared_bytes};
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = known.find({key, forced});
  if (found != known.end()) return found->second;
  Choice choice = choose(layer, tf32, backward, here, forced);
  const auto fits = find_kernels(layer.cell, layer.dtype).fits;
  if (choice.path != Path::step && !(fits && fits(choice))) {
    const std::string wanted = path_names[int(choice.path)];
    choice = Choice();
    choice.D = layer.D;
    choice.why = wanted + ": this card does not hold its blocks at the same time";
  }
  constexpr size_t most = 4096;
  if (known.size() >= most) known.clear();
  return known[{key, forced}] = choice;
}

}  // namespace cuda
}  // namespace fastrnn
