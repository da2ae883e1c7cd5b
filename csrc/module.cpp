// fastrnn._C: what was built, what runs here, and the switch that forces an instruction set. Tensors pass in direct.cpp
// alone.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <chrono>
#include <cmath>
#include <cstring>
#include <iterator>
#include <optional>
#include <string>
#include <vector>

#include "cells.h"
#include "cpu/dispatch.h"
#include "cpu/plan.h"
#include "cpu/workspace.h"
#include "cuda/force.h"
#include "direct.h"

#ifndef FASTRNN_CUDA
#define FASTRNN_CUDA_ARCHITECTURES ""
#endif

namespace py = pybind11;
using namespace fastrnn;

namespace {

std::vector<std::string> split(const std::string& text) {
  std::vector<std::string> parts;
  if (text.empty()) return parts;
  for (size_t begin = 0; begin <= text.size();) {
    const size_t end = std::min(text.find(',', begin), text.size());
    parts.push_back(text.substr(begin, end - begin));
    begin = end + 1;
  }
  return parts;
}

std::vector<std::string> isas() {
  const Kernels* tables[8];
  const int n = available(tables);
  std::vector<std::string> names;
  for (int i = 0; i < n; ++i) names.push_back(tables[i]->isa);
  return names;
}

void set_isa(const std::string& name) {
  if (force(name.c_str())) return;
  std::string expected;
  for (const std::string& isa : isas()) expected += "'" + isa + "', ";
  throw py::value_error("isa: expected one of " + expected + "or '' for the default, got '" + name + "'");
}

std::vector<std::string> gpu_paths() {
  std::vector<std::string> names;
  cuda::for_each_gpu_path([&](const char* name) { names.push_back(name); });
  return names;
}

void set_gpu_path(const std::string& name) {
  if (cuda::force_gpu_path(name.c_str())) return;
  std::string expected;
  for (const std::string& path : gpu_paths()) expected += "'" + path + "', ";
  throw py::value_error("path: expected one of " + expected + "or '' for the default, got '" + name + "'");
}

py::dict build_info() {
  py::dict info;
  info["version"] = FASTRNN_VERSION;
  info["torch"] = FASTRNN_TORCH;
#if defined(__clang__)
  info["compiler"] = "clang " __clang_version__;
#else
  info["compiler"] = "gcc " __VERSION__;
#endif
  info["cuda_architectures"] = split(FASTRNN_CUDA_ARCHITECTURES);
  info["isas"] = split(FASTRNN_ISAS);
  info["available"] = isas();
  info["isa"] = current().isa;
  const char* rejected = rejected_environment();
  info["rejected_environment"] = rejected ? py::object(py::str(rejected)) : py::none();
  info["gpu_path"] = cuda::gpu_path();
  const char* rejected_path = cuda::rejected_gpu_path();
  info["rejected_gpu_path"] = rejected_path ? py::object(py::str(rejected_path)) : py::none();
  return info;
}

py::list cells() {
  py::list list;
  for_each_cell([&](auto cell) {
    const CellTraits& t = traits(cell.kind);
    py::dict entry;
    entry["name"] = t.name;
    entry["gates"] = t.gates;
    entry["slots"] = t.slots;
    entry["x_first"] = t.x_first;
    entry["hidden_gate"] = std::vector<int>(t.hidden_gate, t.hidden_gate + t.gates);
    entry["tape"] = t.tape;
    entry["has_c"] = t.has_c;
    std::vector<std::string> watched;
    for (const WatchedGate& gate : decltype(cell)::watched) watched.push_back(gate.name);
    entry["watched"] = watched;
    list.append(entry);
  });
  return list;
}

void set_split(const std::string& name) {
  if (!force_split(name.c_str()))
    throw py::value_error(
        "split: expected 'serial', 'batch', 'hidden', 'wavefront', 'ahead', or '' for the model's choice, got '" +
        name + "'");
}

const CellTraits& find_cell(const std::string& name) {
  const CellTraits* found = nullptr;
  for_each_cell([&](auto c) {
    if (name == c.name) found = &traits(c.kind);
  });
  if (!found) throw py::value_error("cell: expected the name of a cell, got '" + name + "'");
  return *found;
}

// How layers on top of each other, which differ in the width of their input alone, would be shared out among `threads`
// threads: each by itself, and all of them as a wavefront. kept: with weights that are packed already.
py::dict split_of(const std::string& name, bool float64, int64_t T, int64_t B, int64_t I, int64_t H, int64_t P, int D,
                  int threads, int layers, bool kept, bool bfloat16, int precision) {
  Layer layer;
  layer.cell = find_cell(name).kind;
  layer.dtype = float64 ? Dtype::f64 : bfloat16 ? Dtype::bf16 : Dtype::f32;
  layer.precision = static_cast<Precision>(precision);
  layer.T = T, layer.B = B, layer.I = I, layer.H = H, layer.P = P, layer.D = D;
  if (kept) layer.weights[0].packed = &layer;  // that there are some is all the plan asks
  Layer upper = layer;
  upper.I = D * P;
  threads = std::min(threads, cpu_quota());
  const Split s = plan_split(layer, threads);
  const Wavefront wave = plan_wavefront(layer, upper, layers, false, threads);
  py::dict result;
  result["directions"] = s.directions;
  result["slices"] = s.slices;
  result["parts"] = s.parts;
  result["ahead"] = s.ahead;
  result["limit"] = s.limit;
  result["groups"] = wave.groups;
  return result;
}

// Which path a layer on a GPU would take, and how its weights would be shared out. card: compute capability (90 for
// 9.0), processors, bytes of shared memory of a block; None for the one that is there.
py::dict gpu_plan(const std::string& name, const std::string& dtype, bool tf32, bool backward, int64_t T, int64_t B,
                  int64_t I, int64_t H, int64_t P, int D, const std::optional<std::array<int, 3>>& card) {
  const char* const dtypes[] = {"float32", "float64", "bfloat16", "float16"};  // the order of enum Dtype
  const auto known = std::find(std::begin(dtypes), std::end(dtypes), dtype);
  if (known == std::end(dtypes))
    throw py::value_error("dtype: expected 'float32', 'float64', 'bfloat16' or 'float16', got '" + dtype + "'");
  Layer layer;
  layer.cell = find_cell(name).kind, layer.dtype = layer.state = static_cast<Dtype>(known - dtypes);
  layer.T = T, layer.B = B, layer.I = I, layer.H = H, layer.P = P, layer.D = D, layer.projected = P != H;
  cuda::Card numbers;
  if (card) numbers = {(*card)[0], (*card)[1], (*card)[2]};
  const cuda::Choice choice = cuda::choose_here(layer, tf32, backward, card ? &numbers : nullptr);
  py::dict result;
  result["path"] = cuda::path_names[static_cast<int>(choice.path)];
  result["why"] = choice.why;
  result["groups"] = choice.groups;
  result["blocks"] = choice.sharing.blocks;
  result["units"] = choice.sharing.units;
  result["rows"] = choice.sharing.rows;
  return result;
}

// For the accuracy tests: y[i] = function(x[i]) by the tier in use, on n values at the two addresses.
void activation(const std::string& function, const std::string& dtype, uintptr_t x, uintptr_t y, int64_t n) {
  if (function != "sigmoid" && function != "tanh")
    throw py::value_error("function: expected 'sigmoid' or 'tanh', got '" + function + "'");
  if (dtype != "float32" && dtype != "float64")
    throw py::value_error("dtype: expected 'float32' or 'float64', got '" + dtype + "'");
  current().activation(function == "tanh", dtype == "float64" ? Dtype::f64 : Dtype::f32,
                       reinterpret_cast<const void*>(x), reinterpret_cast<void*>(y), n);
}

// What the tier in use reaches on the calling thread, in about 20 ms: "fma" and "tiles" (products of bfloat16) in GF/s,
// "load" in GB/s over `bytes`.
double limit(const std::string& what, int64_t bytes) {
  if (what != "fma" && what != "load" && what != "tiles")
    throw py::value_error("what: expected 'fma', 'load' or 'tiles', got '" + what + "'");
  const bool tiles = what == "tiles";
  if (tiles && std::strcmp(current().isa, "amx"))
    throw py::value_error(std::string("what: 'tiles' are of the tier amx, in use is ") + current().isa);
  if (what == "load" && bytes <= 0)
    throw py::value_error("bytes: expected at least 1 for 'load', got " + std::to_string(bytes));
  const py::gil_scoped_release others_run;  // so that one Python thread for each core measures them all at once
  const Kernels& kernels = current();
  const bool load = what == "load";
  const int64_t line = 8 * kernels.float_lanes, n = load ? std::max<int64_t>(bytes / 4 / line, 1) * line : 0;
  const std::vector<float> memory(n + 16, 1.0f);  // room to begin at a cache line: no load crosses two
  const float* data = memory.data() + (64 - reinterpret_cast<uintptr_t>(memory.data()) % 64) % 64 / 4;
  const double work = load    ? 4.0 * double(n)
                      : tiles ? 4 * 2.0 * 16 * 16 * 32
                              : 2.0 * kernels.float_lanes * kernels.fma_chains;
  volatile double used = 0;
  const auto seconds = [&](int64_t repeats) {
    const auto begin = std::chrono::steady_clock::now();
    used = used + kernels.limit(tiles ? 2 : load, data, n, repeats);
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
  };
  int64_t repeats = 1;
  double taken = seconds(repeats);  // also brings the buffer into the cache
  while (taken < 2e-3) taken = seconds(repeats *= 2);
  repeats = std::max<int64_t>(1, std::llround(double(repeats) * 4e-3 / taken));
  for (int i = 0; i < 5; ++i) taken = i ? std::min(taken, seconds(repeats)) : seconds(repeats);
  return work * double(repeats) / taken * 1e-9;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Introspection of fastrnn's native library; the operators themselves are torch.ops.fastrnn.*";
  m.def("build_info", &build_info, "Versions, compiler, instruction sets built in, available and in use.");
  m.def("isas", &isas, "The instruction sets this machine can run, narrowest first.");
  m.def("isa", [] { return current().isa; }, "The instruction set in use.");
  m.def("set_isa", &set_isa, py::arg("isa"), "Forces an instruction set for the whole process; '' for the default.");
  m.def(
      "allowed_precision", [](const std::string& asked) { return static_cast<int>(allowed_precision(asked.c_str())); },
      py::arg("asked"),
      "How much of float32 the products of the instruction set in use keep where torch's switch says 'none', 'ieee', "
      "'tf32' or 'bf16': 0 all, 1 tf32, 2 bf16.");
  m.def("gpu_paths", &gpu_paths, "What can be forced for tensors on a GPU.");
  m.def("gpu_path", &cuda::gpu_path, "Which of them is forced; '' when none is.");
  m.def("set_gpu_path", &set_gpu_path, py::arg("path"),
        "Forces one of our paths, or 'torch', for the whole process; '' for the default.");
  m.def("set_split", &set_split, py::arg("split"),
        "Forces how layers are shared out among threads ('serial', 'batch', 'hidden', 'wavefront', 'ahead'; '' for the "
        "model's choice).");
  m.def("split", &split_of, py::arg("cell"), py::arg("float64"), py::arg("T"), py::arg("B"), py::arg("I"), py::arg("H"),
        py::arg("P"), py::arg("D"), py::arg("threads"), py::arg("layers") = 1, py::arg("kept") = false,
        py::arg("bfloat16") = false, py::arg("precision") = 0,
        "How a layer would be shared out, forward: directions side by side, slices of rows, parts of hidden units, "
        "whether its input is projected ahead; the limit; and into how many groups so many layers for a wavefront.");
  m.def("gpu_plan", &gpu_plan, py::arg("cell"), py::arg("dtype"), py::arg("tf32"), py::arg("backward"), py::arg("T"),
        py::arg("B"), py::arg("I"), py::arg("H"), py::arg("P"), py::arg("D"), py::arg("card") = py::none(),
        "Which path a layer on a GPU would take, and why; of a path that keeps the weights on the chip: groups of so "
        "many blocks, each block with so many hidden units, each group with so many rows at a time.");
  m.def("workspace_bytes", &workspace_bytes, "Bytes of scratch memory that the kernels keep, all threads together.");
  m.def("release_workspace", &release_workspace, "Gives that memory back; returns how many bytes it was.");
  m.def("activation", &activation, py::arg("function"), py::arg("dtype"), py::arg("x"), py::arg("y"), py::arg("n"),
        "Applies sigmoid or tanh of the tier in use to n values at address x, into address y; for the tests.");
  m.def(
      "limit", &limit, py::arg("what"), py::arg("bytes") = 0,
      "The most one thread reaches here: 'fma' in GF/s, 'load' in GB/s over a buffer of that many bytes, 'tiles' (amx "
      "alone) in GF/s of bfloat16.");
  m.def("cells", &cells, "The cells and how their pre-activations are laid out (csrc/cells.h).");
  if (!add_direct(m.ptr())) throw py::error_already_set();
}
