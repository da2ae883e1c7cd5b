// csrc/cuda/runtime.cpp against a CUDA and a cuBLAS that are made up here: what is asked of them, in which order, and
// that products come out right from a library that thinks in columns. Every number is a small integer, so that all
// dtypes are exact and results are compared bit for bit. No card, no driver.
#include "../../csrc/cuda/runtime.h"

#include <cuda_runtime_api.h>
#include <library_types.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>
#include <thread>
#include <tuple>
#include <vector>

using namespace fastrnn;
using namespace fastrnn::cuda;

#define CHECK(condition)                                                   \
  do {                                                                     \
    if (!(condition)) {                                                    \
      std::fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, #condition); \
      std::exit(1);                                                        \
    }                                                                      \
  } while (0)

// ------------------------------------------------------------------------------------------------------ what is made
// up

namespace {

thread_local int device = 0;
thread_local cudaStreamCaptureMode capture_mode = cudaStreamCaptureModeGlobal;
int devices = 2, arch_of[2] = {90, 80};
cudaError_t device_error = cudaSuccess, count_error = cudaSuccess, launch_error = cudaSuccess,
            cluster_error = cudaSuccess;
int errors_left = 0;  // what cudaGetLastError would tell
int loaded = 0;
std::vector<std::tuple<const void*, int, int, int>> asked;  // kernel, device, attribute, value

struct Launch {
  const void* kernel;
  dim3 grid, block;
  size_t shared;
  void* stream;
  int cluster = 0;
  bool cooperative = false;
  int first = 0;  // the first argument
};
std::vector<Launch> launches;

Launch read(const cudaLaunchConfig_t& c) {
  Launch l{nullptr, c.gridDim, c.blockDim, c.dynamicSmemBytes, c.stream};
  for (unsigned i = 0; i < c.numAttrs; ++i) {
    if (c.attrs[i].id == cudaLaunchAttributeClusterDimension) {
      CHECK(c.attrs[i].val.clusterDim.y == 1 && c.attrs[i].val.clusterDim.z == 1);
      l.cluster = int(c.attrs[i].val.clusterDim.x);
    } else {
      CHECK(c.attrs[i].id == cudaLaunchAttributeCooperative);
      l.cooperative = c.attrs[i].val.cooperative;
    }
  }
  return l;
}

double value_at(const void* data, cudaDataType type, int64_t i) {
  if (type == CUDA_R_64F) return static_cast<const double*>(data)[i];
  if (type == CUDA_R_32F) return static_cast<const float*>(data)[i];
  const uint32_t bits = static_cast<const uint16_t*>(data)[i];
  if (type == CUDA_R_16BF) {
    const uint32_t wide = bits << 16;
    float value;
    std::memcpy(&value, &wide, 4);
    return value;
  }
  CHECK(type == CUDA_R_16F);
  const int exponent = bits >> 10 & 31;
  const double value = exponent ? std::ldexp(1024 + (bits & 1023), exponent - 25) : 0;
  return bits >> 15 ? -value : value;
}

// Of an integer that the dtype holds exactly.
void put(void* data, cudaDataType type, int64_t i, double value) {
  if (type == CUDA_R_64F) {
    static_cast<double*>(data)[i] = value;
  } else if (type == CUDA_R_32F) {
    static_cast<float*>(data)[i] = float(value);
  } else if (type == CUDA_R_16BF) {
    const float narrow = float(value);
    uint32_t bits;
    std::memcpy(&bits, &narrow, 4);
    static_cast<uint16_t*>(data)[i] = uint16_t(bits >> 16);
  } else {
    int exponent = 0;
    const int mantissa = int(std::frexp(std::fabs(value), &exponent) * 2048);
    const int bits = value == 0 ? 0 : (exponent + 14) << 10 | (mantissa & 1023);
    static_cast<uint16_t*>(data)[i] = uint16_t(bits | (value < 0 ? 0x8000 : 0));
  }
  CHECK(value_at(data, type, i) == value);
}

}  // namespace

struct cublasContext {
  int device, mode;
  void *stream = nullptr, *workspace = nullptr;
};

namespace {

int handles = 0, multiplied = 0, multiplied_wide = 0, gemm_status = 0;
int compute_asked = 0;
bool only_look = false;
cublasContext* last = nullptr;

template <class Size>
int gemm(cublasContext* h, int transa, int transb, Size m, Size n, Size k, const void* alpha, const void* a,
         cudaDataType a_type, Size lda, const void* b, cudaDataType b_type, Size ldb, const void* beta, void* c,
         cudaDataType c_type, Size ldc, int compute, int algorithm) {
  (sizeof(Size) == 8 ? multiplied_wide : multiplied)++;
  last = h, compute_asked = compute;
  CHECK(h->device == device && h->mode == 16 && h->workspace && algorithm == -1);
  CHECK(m > 0 && n > 0 && k > 0 && lda >= (transa ? k : m) && ldb >= (transb ? n : k) && ldc >= m);
  if (gemm_status || only_look) return gemm_status;
  const cudaDataType scalar = compute == 70 ? CUDA_R_64F : CUDA_R_32F;
  CHECK(value_at(alpha, scalar, 0) == 1);
  const double factor = value_at(beta, scalar, 0);
  for (Size j = 0; j < n; ++j)
    for (Size i = 0; i < m; ++i) {
      double sum = factor == 0 ? 0 : factor * value_at(c, c_type, i + j * int64_t(ldc));
      for (Size l = 0; l < k; ++l)
        sum += value_at(a, a_type, transa ? l + i * int64_t(lda) : i + l * int64_t(lda)) *
               value_at(b, b_type, transb ? j + l * int64_t(ldb) : l + j * int64_t(ldb));
      put(c, c_type, i + j * int64_t(ldc), sum);
    }
  return 0;
}

}  // namespace

extern "C" {
cudaError_t cudaGetDeviceCount(int* count) { return *count = devices, count_error; }
cudaError_t cudaGetDevice(int* d) { return *d = device, device_error; }
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int d) {
  CHECK(d == device);
  switch (attribute) {
    case cudaDevAttrComputeCapabilityMajor:
      return *value = arch_of[d] / 10, cudaSuccess;
    case cudaDevAttrComputeCapabilityMinor:
      return *value = arch_of[d] % 10, cudaSuccess;
    case cudaDevAttrMultiProcessorCount:
      return *value = 132 - 24 * d, cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      return *value = d ? 166912 : 232448, cudaSuccess;
    default:
      return cudaErrorInvalidValue;
  }
}
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* facts, const void*) {
  CHECK(capture_mode == cudaStreamCaptureModeRelaxed);
  ++loaded;
  *facts = {};
  facts->sharedSizeBytes = 1024;
  return cudaSuccess;
}
cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute attribute, int value) {
  CHECK(capture_mode == cudaStreamCaptureModeRelaxed);
  asked.emplace_back(kernel, device, int(attribute), value);
  return cudaSuccess;
}
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* kernel, void** arguments) {
  CHECK(capture_mode == cudaStreamCaptureModeGlobal);
  launches.push_back(read(*config));
  launches.back().kernel = kernel;
  launches.back().first = *static_cast<int*>(arguments[0]);
  errors_left += launch_error != cudaSuccess;
  return launch_error;
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* n, const void*, int threads, size_t) {
  return *n = 2048 / threads, cudaSuccess;
}
cudaError_t cudaOccupancyMaxActiveClusters(int* n, const void*, const cudaLaunchConfig_t* config) {
  errors_left += cluster_error != cudaSuccess;
  return *n = 132 / read(*config).cluster, cluster_error;
}
cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t) {
  return std::memset(to, value, bytes), cudaSuccess;
}
cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned flags) {
  if (flags != cudaStreamNonBlocking || capture_mode != cudaStreamCaptureModeRelaxed) return cudaErrorInvalidValue;
  static char places[8];
  static int made = 0;
  return *stream = reinterpret_cast<cudaStream_t>(places + made++), cudaSuccess;
}
cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned flags) {
  if (flags != cudaEventDisableTiming || capture_mode != cudaStreamCaptureModeRelaxed) return cudaErrorInvalidValue;
  static char place;
  return *event = reinterpret_cast<cudaEvent_t>(&place), cudaSuccess;
}
// What the streams were told: the one that an event was recorded on, and pairs of who waits for whom.
cudaStream_t recorded_on = nullptr;
std::vector<std::pair<cudaStream_t, cudaStream_t>> followed;
cudaError_t cudaEventRecord(cudaEvent_t, cudaStream_t stream) { return recorded_on = stream, cudaSuccess; }
cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t, unsigned) {
  return followed.emplace_back(stream, recorded_on), cudaSuccess;
}
cudaError_t cudaMemset2DAsync(void* to, size_t pitch, int value, size_t width, size_t height, cudaStream_t) {
  for (size_t i = 0; i < height; ++i) std::memset(static_cast<char*>(to) + i * pitch, value, width);
  return cudaSuccess;
}
cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* mode) {
  return std::swap(*mode, capture_mode), cudaSuccess;
}
cudaError_t cudaGetLastError() { return errors_left ? --errors_left, cudaErrorUnknown : cudaSuccess; }
const char* cudaGetErrorString(cudaError_t) { return "in CUDA's own words"; }
const char* cudaGetErrorName(cudaError_t) { return "cudaErrorOfTheTest"; }

int cublasCreate_v2(cublasContext** handle) {
  CHECK(capture_mode == cudaStreamCaptureModeRelaxed);
  *handle = new cublasContext{device, 0};
  ++handles;
  return 0;
}
int cublasDestroy_v2(cublasContext* handle) { return delete handle, 0; }
int cublasSetMathMode(cublasContext* handle, int mode) { return handle->mode = mode, 0; }
int cublasSetStream_v2(cublasContext* handle, cudaStream_t stream) {
  handle->stream = stream, handle->workspace = nullptr;  // as the real one does
  return 0;
}
int cublasSetWorkspace_v2(cublasContext* handle, void* workspace, size_t bytes) {
  CHECK(bytes == scratch_bytes && reinterpret_cast<uintptr_t>(workspace) % 256 == 0);
  return handle->workspace = workspace, 0;
}
int cublasGemmEx(cublasContext* h, int ta, int tb, int m, int n, int k, const void* alpha, const void* a,
                 cudaDataType at, int lda, const void* b, cudaDataType bt, int ldb, const void* beta, void* c,
                 cudaDataType ct, int ldc, int compute, int algorithm) {
  return gemm<int>(h, ta, tb, m, n, k, alpha, a, at, lda, b, bt, ldb, beta, c, ct, ldc, compute, algorithm);
}
int cublasGemmEx_64(cublasContext* h, int ta, int tb, int64_t m, int64_t n, int64_t k, const void* alpha, const void* a,
                    cudaDataType at, int64_t lda, const void* b, cudaDataType bt, int64_t ldb, const void* beta,
                    void* c, cudaDataType ct, int64_t ldc, int compute, int algorithm) {
  return gemm<int64_t>(h, ta, tb, m, n, k, alpha, a, at, lda, b, bt, ldb, beta, c, ct, ldc, compute, algorithm);
}
const char* cublasGetStatusString(int) { return "in cuBLAS's own words"; }
}

// ---------------------------------------------------------------------------------------------------------- the checks

namespace {

alignas(256) char scratch[256];
int stream_here;

template <class Action>
std::string error_of(Action action) {
  try {
    action();
  } catch (const std::runtime_error& error) {
    return error.what();
  }
  return "";
}

bool contains(const std::string& text, const char* part) { return text.find(part) != std::string::npos; }

void kernel_a(int, const float*) {}
void kernel_b(int, const float*) {}

void check_card() {
  CHECK(card().arch == 90 && card().processors == 132 && card().shared_bytes == 232448);
  device = 1;
  CHECK(card().arch == 80 && card().processors == 108 && card().shared_bytes == 166912);
  device = 0;
  CHECK(card().arch == 90 && &card() == &card());
  for (const cudaError_t none : {cudaErrorNoDevice, cudaErrorInsufficientDriver, cudaErrorStubLibrary}) {
    device_error = none;
    CHECK(card().arch == 0 && card().processors == 0 && card().shared_bytes == 0);
  }
  device_error = cudaErrorInitializationError;
  CHECK(contains(error_of([] { card(); }), "in CUDA's own words (cudaErrorOfTheTest)"));
  device_error = cudaSuccess;
}

// Where the current device is device 0 even though there is none. Before a device is known.
void check_no_card() {
  count_error = cudaErrorNoDevice;
  CHECK(card().arch == 0 && card().processors == 0);
  count_error = cudaSuccess, devices = 0;
  CHECK(card().arch == 0 && card().processors == 0);
  devices = 2;
}

void check_launches() {
  float x = 0;
  LaunchShape shape;
  shape.x = 7, shape.y = 2, shape.z = 3, shape.threads = 96, shape.shared_bytes = 48 << 10;
  launch(kernel_a, shape, &stream_here, 5, &x);
  const Launch& l = launches.back();
  CHECK(l.kernel == reinterpret_cast<const void*>(kernel_a) && l.first == 5 && l.stream == &stream_here);
  CHECK(l.grid.x == 7 && l.grid.y == 2 && l.grid.z == 3 && l.block.x == 96 && l.block.y == 1 && l.shared == 48 << 10);
  CHECK(l.cluster == 0 && !l.cooperative && loaded == 1 && asked.empty());

  // Once for each kernel and device.
  shape.shared_bytes += 1;
  for (int i = 0; i < 3; ++i) launch(kernel_a, shape, &stream_here, 5, &x);
  CHECK(asked.size() == 1 && asked[0] == std::make_tuple(reinterpret_cast<const void*>(kernel_a), 0,
                                                         int(cudaFuncAttributeMaxDynamicSharedMemorySize), 231424));
  device = 1;
  for (int i = 0; i < 3; ++i) launch(kernel_a, shape, &stream_here, 5, &x);
  CHECK(asked.size() == 2 && std::get<1>(asked[1]) == 1 && std::get<3>(asked[1]) == 165888);
  device = 0;

  shape.x = 16, shape.cluster = 8;
  launch(kernel_b, shape, &stream_here, 6, &x);
  CHECK(launches.back().cluster == 8 && asked.size() == 3);
  shape.cluster = 16, shape.cooperative = true;
  for (int i = 0; i < 2; ++i) launch(kernel_b, shape, &stream_here, 6, &x);
  CHECK(launches.back().cluster == 16 && launches.back().cooperative && asked.size() == 4);
  CHECK(std::get<2>(asked[3]) == cudaFuncAttributeNonPortableClusterSizeAllowed && std::get<3>(asked[3]) == 1);

  launch_error = cudaErrorLaunchOutOfResources;
  const std::string error = error_of([&] { launch(kernel_b, shape, &stream_here, 6, &x); });
  CHECK(contains(error, "16 x 2 x 3 blocks of 96 threads and 49153 bytes of shared memory, clusters of 16"));
  CHECK(contains(error, "in CUDA's own words") && errors_left == 0);
  launch_error = cudaSuccess;
}

void check_resident() {
  const void* kernel = reinterpret_cast<const void*>(kernel_b);
  LaunchShape shape;
  shape.threads = 512, shape.shared_bytes = 1000;
  CHECK(resident(kernel, shape) == 4 * 132);
  shape.shared_bytes = 232449;
  CHECK(resident(kernel, shape) == 0);
  shape.shared_bytes = 232000, shape.x = shape.cluster = 16;
  CHECK(resident(kernel, shape) == 132 / 16);
  cluster_error = cudaErrorInvalidClusterSize;
  CHECK(resident(kernel, shape) == 0 && errors_left == 0);
  cluster_error = cudaErrorInvalidValue;
  CHECK(contains(error_of([&] { resident(kernel, shape); }), "clusters of 16: in CUDA's own words"));
  cluster_error = cudaSuccess;
  device = 1;
  shape.shared_bytes = 0;
  CHECK(resident(kernel, shape) == 0);  // no clusters before 9.0
  device = 0, device_error = cudaErrorNoDevice, shape.cluster = 1;
  CHECK(resident(kernel, shape) == 0);
  device_error = cudaSuccess;
}

cudaDataType type_of(Dtype dtype) {
  return dtype == Dtype::f64    ? CUDA_R_64F
         : dtype == Dtype::f32  ? CUDA_R_32F
         : dtype == Dtype::bf16 ? CUDA_R_16BF
                                : CUDA_R_16F;
}
int small(unsigned i) { return int(i * 2654435761u >> 16) % 4 - 1; }

// A product of any layout against its definition; what lies between rows must stay.
void check_product(int64_t m, int64_t n, int64_t k, Dtype dtype, Dtype c_dtype, bool ta, bool tb, int64_t gap, bool add,
                   bool tf32) {
  const int64_t a_rows = ta ? k : m, a_columns = ta ? m : k, b_rows = tb ? n : k, b_columns = tb ? k : n;
  const int64_t sa = a_columns + gap, sb = b_columns + 2 * gap, sc = n + gap;
  std::vector<double> a(a_rows * sa + 1), b(b_rows * sb + 1), c(m * sc + 1);  // of any dtype
  for (int64_t i = 0; i < a_rows * sa; ++i) put(a.data(), type_of(dtype), i, small(unsigned(i)));
  for (int64_t i = 0; i < b_rows * sb; ++i) put(b.data(), type_of(dtype), i, small(unsigned(i + 999)));
  for (int64_t i = 0; i < m * sc; ++i) put(c.data(), type_of(c_dtype), i, small(unsigned(i + 77)));
  std::vector<double> expected(m * sc);
  for (int64_t i = 0; i < m * sc; ++i) expected[i] = value_at(c.data(), type_of(c_dtype), i);
  for (int64_t i = 0; i < m; ++i)
    for (int64_t j = 0; j < n; ++j) {
      double sum = add ? expected[i * sc + j] : 0;
      for (int64_t l = 0; l < k; ++l)
        sum += value_at(a.data(), type_of(dtype), ta ? l * sa + i : i * sa + l) *
               value_at(b.data(), type_of(dtype), tb ? j * sb + l : l * sb + j);
      expected[i * sc + j] = sum;
    }
  Product p{m, n, k, {a.data(), dtype, a_rows > 1 ? sa : 0, ta}, {b.data(), dtype, sb, tb}, c.data(), c_dtype, sc};
  p.add = add, p.tf32 = tf32;
  multiply(p, scratch, &stream_here);
  for (int64_t i = 0; i < m * sc; ++i) CHECK(value_at(c.data(), type_of(c_dtype), i) == expected[i]);
  if (!m || !n || !k) return;
  CHECK(last->stream == &stream_here && last->workspace == scratch);
  CHECK(compute_asked == (dtype == Dtype::f64 ? 70 : tf32 && dtype == Dtype::f32 ? 77 : 68));
}

void check_products() {
  const std::pair<Dtype, Dtype> dtypes[] = {{Dtype::f32, Dtype::f32},   {Dtype::f64, Dtype::f64},
                                            {Dtype::bf16, Dtype::bf16}, {Dtype::bf16, Dtype::f32},
                                            {Dtype::f16, Dtype::f16},   {Dtype::f16, Dtype::f32}};
  const int64_t sizes[][3] = {{3, 5, 4}, {1, 5, 4}, {3, 1, 4}, {3, 5, 1}, {1, 1, 1},
                              {3, 5, 0}, {1, 5, 0}, {0, 5, 4}, {3, 0, 4}, {17, 2, 33}};
  for (const auto& [dtype, c_dtype] : dtypes)
    for (const auto& [m, n, k] : sizes)
      for (int bits = 0; bits < 32; ++bits)
        check_product(m, n, k, dtype, c_dtype, bits & 1, bits & 2, bits & 4 ? 3 : 0, bits & 8, bits & 16);
  CHECK(multiplied > 0 && multiplied_wide == 0 && handles == 1);
}

void check_wide_products() {
  only_look = true;
  float x = 0;
  const int64_t big = int64_t(1) << 31;
  Product p{4, 4, 4, {&x, Dtype::f32, 4}, {&x, Dtype::f32, 4}, &x, Dtype::f32, 4};
  const auto is_wide = [&](Product q) {
    const int before = multiplied_wide;
    multiply(q, scratch, nullptr);
    return multiplied_wide == before + 1;
  };
  CHECK(!is_wide(p));
  for (int64_t* size : {&p.m, &p.a.stride, &p.b.stride, &p.c_stride}) {
    const int64_t before = *size;
    *size = big - 1;
    CHECK(!is_wide(p));
    *size = big;
    CHECK(is_wide(p));
    *size = before;
  }
  p.m = 1, p.a.stride = p.c_stride = big;  // of a single row, so it says nothing
  CHECK(!is_wide(p));
  only_look = false;
}

void check_handles() {
  const auto one = [] { check_product(2, 3, 4, Dtype::f32, Dtype::f32, false, true, 1, false, false); };
  cublasContext *first = nullptr, *second = nullptr;
  std::thread([&] { one(), first = last; }).join();
  CHECK(handles == 2);
  std::thread([&] { one(), second = last; }).join();
  CHECK(handles == 2 && first == second);  // left by the first thread
  std::thread([&] { device = 1, one(), device = 0, one(); }).join();
  CHECK(handles == 3 && last == first);
  gemm_status = 14;
  CHECK(error_of(one) == "fastrnn: a product of [2, 4] and [4, 3]: in cuBLAS's own words");
  gemm_status = 0;
}

}  // namespace

void check_streams() {
  const Stream one = side_stream(0), other = side_stream(1);
  CHECK(one && other && one != other && side_stream(0) == one && side_stream(1) == other);
  followed.clear();
  follow(one, nullptr);
  follow(other, one);
  CHECK(followed.size() == 2 && followed[0] == std::make_pair(cudaStream_t(one), cudaStream_t(nullptr)));
  CHECK(followed[1] == std::make_pair(cudaStream_t(other), cudaStream_t(one)));
  CHECK(capture_mode == cudaStreamCaptureModeGlobal);
}

int main() {
  check_no_card();
  check_card();
  check_launches();
  check_resident();
  check_products();
  check_wide_products();
  check_handles();
  check_streams();
  std::printf("%d products, %zu launches\n", multiplied + multiplied_wide, launches.size());
}
