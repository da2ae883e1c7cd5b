// Runs an exported model without Python: an example of what a program has to do, and what tests/test_export.py runs.
//
//   run_exported _ops.so model.pt2 [inputs outputs]...
//
// model.pt2 is what torch._inductor.aoti_compile_and_package wrote, inputs a list of tensors that torch.save wrote; the
// tuple of results goes to `outputs`, for torch.load. At the end come the libraries that the process has mapped.

#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/csrc/jit/serialization/pickle.h>

#include <exception>
#include <fstream>
#include <iostream>
#include <iterator>
#include <set>
#include <string>
#include <vector>

namespace {

std::vector<at::Tensor> load(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  const std::vector<char> bytes{std::istreambuf_iterator<char>(file), {}};
  const at::IValue list = torch::jit::pickle_load(bytes);
  std::vector<at::Tensor> tensors;
  for (const at::IValue& value : list.toListRef()) tensors.push_back(value.toTensor());
  return tensors;
}

void save(const std::string& path, const std::vector<at::Tensor>& tensors) {
  // A tuple, because a C++ list of tensors is pickled as something that torch.load does not trust.
  const std::vector<at::IValue> values(tensors.begin(), tensors.end());
  const std::vector<char> bytes = torch::jit::pickle_save(c10::ivalue::Tuple::create(values));
  std::ofstream(path, std::ios::binary).write(bytes.data(), static_cast<std::streamsize>(bytes.size()));
}

std::set<std::string> mapped_libraries() {
  std::set<std::string> paths;
  std::ifstream maps("/proc/self/maps");
  for (std::string line; std::getline(maps, line);) {
    const size_t path = line.find('/');
    if (path != std::string::npos && line.find(".so", path) != std::string::npos) paths.insert(line.substr(path));
  }
  return paths;
}

}  // namespace

int main(int argc, char** argv) try {
  if (argc < 3 || argc % 2 == 0) {
    std::cerr << "usage: " << argv[0] << " _ops.so model.pt2 [inputs outputs]...\n";
    return 2;
  }
  // Loading it registers torch.ops.fastrnn.*, before a model is loaded that calls them. It is never unloaded.
  if (!dlopen(argv[1], RTLD_NOW)) throw std::runtime_error(dlerror());
  torch::inductor::AOTIModelPackageLoader model(argv[2]);
  for (int i = 3; i < argc; i += 2) save(argv[i + 1], model.run(load(argv[i])));
  for (const std::string& path : mapped_libraries()) std::cout << path << "\n";
  return 0;
} catch (const c10::Error& error) {
  std::cerr << error.what_without_backtrace() << "\n";
  return 1;
} catch (const std::exception& error) {
  std::cerr << error.what() << "\n";
  return 1;
}
