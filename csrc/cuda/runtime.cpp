// runtime.h by the CUDA runtime, which is linked statically, and by the cuBLAS that torch has brought into the process.
//
// One build serves torch with and without CUDA: no library of CUDA is needed to load it. cuBLAS is declared here and
// looked up weakly (its headers are not needed either); without a card or a driver card() is all zero.
#include "runtime.h"

#include <cuda_runtime_api.h>
#include <library_types.h>

#include <algorithm>
#include <climits>
#include <map>
#include <mutex>
#include <sstream>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

struct cublasContext;

// cublas_api.h, its enumerations as int. The ones with _64 came with cuBLAS 12.
extern "C" {
#define FASTRNN_WEAK __attribute__((weak, visibility("default")))
FASTRNN_WEAK int cublasCreate_v2(cublasContext** handle);
FASTRNN_WEAK int cublasDestroy_v2(cublasContext* handle);
FASTRNN_WEAK int cublasSetMathMode(cublasContext* handle, int mode);
FASTRNN_WEAK int cublasSetStream_v2(cublasContext* handle, cudaStream_t stream);
FASTRNN_WEAK int cublasSetWorkspace_v2(cublasContext* handle, void* workspace, size_t bytes);
FASTRNN_WEAK int cublasGemmEx(cublasContext* handle, int transa, int transb, int m, int n, int k, const void* alpha,
                              const void* a, cudaDataType a_type, int lda, const void* b, cudaDataType b_type, int ldb,
                              const void* beta, void* c, cudaDataType c_type, int ldc, int compute, int algorithm);
FASTRNN_WEAK int cublasGemmEx_64(cublasContext* handle, int transa, int transb, int64_t m, int64_t n, int64_t k,
                                 const void* alpha, const void* a, cudaDataType a_type, int64_t lda, const void* b,
                                 cudaDataType b_type, int64_t ldb, const void* beta, void* c, cudaDataType c_type,
                                 int64_t ldc, int compute, int algorithm);
FASTRNN_WEAK const char* cublasGetStatusString(int status);
#undef FASTRNN_WEAK
}

namespace fastrnn {
namespace cuda {
namespace {

constexpr int cublas_n = 0, cublas_t = 1;                                                 // cublasOperation_t
constexpr int cublas_default_math = 0, cublas_disallow_reduced_precision_reduction = 16;  // cublasMath_t
constexpr int cublas_32f = 68, cublas_32f_fast_tf32 = 77, cublas_64f = 70;                // cublasComputeType_t
constexpr int cublas_default_algorithm = -1;                                              // cublasGemmAlgo_t

template <class... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream text;
  (text << "fastrnn: " << ... << parts);
  throw std::runtime_error(text.str());
}

template <class... Doing>
void succeed(cudaError_t error, const Doing&... doing) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // told here, so that nobody finds it later
  fail(doing..., ": ", cudaGetErrorString(error), " (", cudaGetErrorName(error), ")");
}

template <class... Doing>
void succeed_cublas(int status, const Doing&... doing) {
  if (status == 0) return;
  if (cublasGetStatusString) fail(doing..., ": ", cublasGetStatusString(status));
  fail(doing..., ": cuBLAS status ", status);
}

cudaStream_t native(Stream stream) { return static_cast<cudaStream_t>(stream); }

int current_device() {
  int device;
  succeed(cudaGetDevice(&device), "asking for the current CUDA device");
  return device;
}

// What loads code or makes handles may allocate, which a capture into a graph forbids its thread, or all threads,
// unless they say that it has nothing to do with the graph.
class BesidesCapture {
 public:
  BesidesCapture() { cudaThreadExchangeStreamCaptureMode(&mode_); }
  ~BesidesCapture() { cudaThreadExchangeStreamCaptureMode(&mode_); }
  BesidesCapture(const BesidesCapture&) = delete;
  BesidesCapture& operator=(const BesidesCapture&) = delete;

 private:
  cudaStreamCaptureMode mode_ = cudaStreamCaptureModeRelaxed;
};

// ----------------------------------------------------------------------------------------------------------- kernels

std::string text_of(const LaunchShape& s) {
  std::ostringstream text;
  text << s.x << " x " << s.y << " x " << s.z << " blocks of " << s.threads << " threads and " << s.shared_bytes
       << " bytes of shared memory";
  if (s.cluster > 1) text << ", clusters of " << s.cluster;
  if (s.cooperative) text << ", all at the same time";
  return text.str();
}

// A launch's configuration and the attributes that it points to.
struct Configuration {
  cudaLaunchAttribute attributes[2];
  cudaLaunchConfig_t config = {};

  Configuration(const LaunchShape& s, Stream stream) {
    config.gridDim = dim3(s.x, s.y, s.z);
    config.blockDim = dim3(s.threads);
    config.dynamicSmemBytes = s.shared_bytes;
    config.stream = native(stream);
    config.attrs = attributes;
    if (s.cluster > 1) {
      cudaLaunchAttribute& cluster = attributes[config.numAttrs++];
      cluster.id = cudaLaunchAttributeClusterDimension;
      cluster.val.clusterDim.x = s.cluster, cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
    }
    if (s.cooperative) {
      cudaLaunchAttribute& cooperative = attributes[config.numAttrs++];
      cooperative.id = cudaLaunchAttributeCooperative;
      cooperative.val.cooperative = 1;
    }
  }
  Configuration(const Configuration&) = delete;
  Configuration& operator=(const Configuration&) = delete;
};

constexpr int shared_bytes_unasked = 48 << 10, cluster_unasked = 8;  // what every kernel has without asking

// Loads the kernel and asks for what launches of this shape need: once for each kernel and device.
void prepare(const void* kernel, const LaunchShape& shape) {
  struct Done {
    bool loaded = false, shared = false, cluster = false;
  };
  static std::mutex mutex;
  static auto& kernels = *new std::map<std::pair<const void*, int>, Done>;

  const std::lock_guard<std::mutex> lock(mutex);
  Done& done = kernels[{kernel, current_device()}];
  const bool shared = shape.shared_bytes > shared_bytes_unasked, cluster = shape.cluster > cluster_unasked;
  if (done.loaded && (done.shared || !shared) && (done.cluster || !cluster)) return;

  const BesidesCapture guard;
  cudaFuncAttributes facts;
  succeed(cudaFuncGetAttributes(&facts, kernel), "loading a kernel");
  done.loaded = true;
  if (shared && !done.shared) {
    const int most = card().shared_bytes - static_cast<int>(facts.sharedSizeBytes);
    succeed(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most), "asking for ", most,
            " bytes of shared memory");
    done.shared = true;
  }
  if (cluster && !done.cluster) {
    succeed(cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1), "asking for clusters of ",
            shape.cluster, " blocks");
    done.cluster = true;
  }
}

// ------------------------------------------------------------------------------------------------------------ cuBLAS

// Handles of a thread, by device and number. A thread that ends leaves them to the next one; none is ever destroyed,
// since the driver may be gone before us.
template <class Handle>
class PerThread {
 public:
  template <class Create>
  Handle get(int device, int number, const Create& create) {
    Handle& handle = own_[{device, number}];
    if (!handle) handle = take_idle(device);
    if (!handle) {
      const BesidesCapture guard;
      handle = create();
    }
    return handle;
  }
  PerThread() = default;
  ~PerThread() {
    const std::lock_guard<std::mutex> lock(idle().mutex);
    for (auto [key, handle] : own_)
      if (handle) idle().of_device[key.first].push_back(handle);
  }
  PerThread(const PerThread&) = delete;
  PerThread& operator=(const PerThread&) = delete;

 private:
  struct Idle {
    std::mutex mutex;
    std::map<int, std::vector<Handle>> of_device;
  };
  static Idle& idle() {
    static Idle& all = *new Idle;
    return all;
  }
  static Handle take_idle(int device) {
    const std::lock_guard<std::mutex> lock(idle().mutex);
    std::vector<Handle>& handles = idle().of_device[device];
    if (handles.empty()) return nullptr;
    Handle handle = handles.back();
    handles.pop_back();
    return handle;
  }

  std::map<std::pair<int, int>, Handle> own_;
};

cublasContext* cublas_handle() {
  static thread_local PerThread<cublasContext*> handles;
  return handles.get(current_device(), 0, [] {
    cublasContext* handle = nullptr;
    succeed_cublas(cublasCreate_v2(&handle), "making a cuBLAS handle");
    // Sums stay in float32 where the result is of 16 bits, also between the parts of a split sum.
    const int status = cublasSetMathMode(handle, cublas_default_math | cublas_disallow_reduced_precision_reduction);
    if (status) cublasDestroy_v2(handle);
    succeed_cublas(status, "setting cuBLAS's mathematics");
    return handle;
  });
}

// A factor as cuBLAS sees it: columns in memory where we have rows, so everything is its own transpose.
struct Factor {
  const void* data;
  cudaDataType type;
  int operation;
  int64_t ld;
};

cudaDataType type_of(Dtype dtype) {
  switch (dtype) {
    case Dtype::f64:
      return CUDA_R_64F;
    case Dtype::bf16:
      return CUDA_R_16BF;
    case Dtype::f16:
      return CUDA_R_16F;
    default:
      return CUDA_R_32F;
  }
}

size_t size_of(Dtype dtype) { return dtype == Dtype::f64 ? 8 : dtype == Dtype::f32 ? 4 : 2; }

// The stride from row to row, which of a single row may be anything.
int64_t leading(int64_t rows, int64_t columns, int64_t stride) {
  return rows > 1 ? stride : std::max<int64_t>(columns, 1);
}

// A factor [rows, columns] of a product.
Factor factor(const Matrix& m, int64_t rows, int64_t columns) {
  if (m.transposed) std::swap(rows, columns);
  return {m.data, type_of(m.dtype), m.transposed ? cublas_t : cublas_n, leading(rows, columns, m.stride)};
}

// C = 0, its rows c_stride apart.
void clear(const Product& p, Stream stream) {
  const size_t size = size_of(p.c_dtype), row = static_cast<size_t>(p.n) * size;
  if (p.m == 1 || p.c_stride == p.n) return set_zero(p.c, static_cast<size_t>(p.m) * row, stream);
  succeed(cudaMemset2DAsync(p.c, static_cast<size_t>(p.c_stride) * size, 0, row, p.m, native(stream)),
          "setting memory to zero");
}

}  // namespace

// --------------------------------------------------------------------------------------------------------- runtime.h

const Card& card() {
  static const Card none;
  static std::mutex mutex;
  static auto& cards = *new std::map<int, Card>;

  // No card, or no driver: nothing is wrong with that.
  const auto absent = [](cudaError_t error, const char* doing) {
    if (error == cudaErrorNoDevice || error == cudaErrorInsufficientDriver || error == cudaErrorStubLibrary) {
      cudaGetLastError();
      return true;
    }
    succeed(error, doing);
    return false;
  };
  int device = 0, count = 0;
  if (absent(cudaGetDevice(&device), "asking for the current CUDA device")) return none;
  const std::lock_guard<std::mutex> lock(mutex);
  const auto known = cards.find(device);
  if (known != cards.end()) return known->second;
  if (absent(cudaGetDeviceCount(&count), "looking for CUDA devices") || count == 0) return none;
  const auto ask = [&](cudaDeviceAttr attribute) {
    int value;
    succeed(cudaDeviceGetAttribute(&value, attribute, device), "asking CUDA device ", device, " for an attribute");
    return value;
  };
  Card c;
  c.arch = 10 * ask(cudaDevAttrComputeCapabilityMajor) + ask(cudaDevAttrComputeCapabilityMinor);
  c.processors = ask(cudaDevAttrMultiProcessorCount);
  c.shared_bytes = ask(cudaDevAttrMaxSharedMemoryPerBlockOptin);
  return cards.emplace(device, c).first->second;
}

void launch(const void* kernel, KernelCall, const LaunchShape& shape, Stream stream, void** arguments) {
  prepare(kernel, shape);
  const Configuration c(shape, stream);
  succeed(cudaLaunchKernelExC(&c.config, kernel, arguments), "launching a kernel of ", text_of(shape));
}

int resident(const void* kernel, const LaunchShape& shape) {
  const Card& here = card();
  if (!here.processors || shape.shared_bytes > here.shared_bytes || (shape.cluster > 1 && here.arch < 90)) return 0;
  prepare(kernel, shape);
  int n = 0;
  if (shape.cluster > 1) {
    const Configuration c(shape, nullptr);
    const cudaError_t error = cudaOccupancyMaxActiveClusters(&n, kernel, &c.config);
    if (error == cudaErrorInvalidClusterSize || error == cudaErrorLaunchOutOfResources) {
      cudaGetLastError();
      return 0;
    }
    succeed(error, "asking how many clusters run at the same time, of ", text_of(shape));
    return n;
  }
  succeed(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&n, kernel, shape.threads, shape.shared_bytes),
          "asking how many blocks run at the same time, of ", text_of(shape));
  return n * here.processors;
}

void set_zero(void* data, size_t bytes, Stream stream) {
  if (bytes) succeed(cudaMemsetAsync(data, 0, bytes, native(stream)), "setting ", bytes, " bytes of memory to zero");
}

Stream side_stream(int i) {
  static thread_local PerThread<cudaStream_t> streams;
  return streams.get(current_device(), i, [] {
    cudaStream_t stream = nullptr;
    succeed(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "making a CUDA stream");
    return stream;
  });
}

void follow(Stream later, Stream earlier) {
  // One event serves all: a wait is for what was on the stream when the event was last recorded before it.
  static thread_local PerThread<cudaEvent_t> events;
  const cudaEvent_t event = events.get(current_device(), 0, [] {
    cudaEvent_t event = nullptr;
    succeed(cudaEventCreateWithFlags(&event, cudaEventDisableTiming), "making a CUDA event");
    return event;
  });
  succeed(cudaEventRecord(event, native(earlier)), "recording a CUDA event");
  succeed(cudaStreamWaitEvent(native(later), event, 0), "having a CUDA stream wait for another");
}

void multiply(const Product& p, void* scratch, Stream stream) {
  if (!p.m || !p.n) return;
  if (!p.k) {
    if (!p.add) clear(p, stream);
    return;
  }
  if (!cublasCreate_v2 || !cublasDestroy_v2 || !cublasSetMathMode || !cublasSetStream_v2 || !cublasSetWorkspace_v2 ||
      !cublasGemmEx)
    fail("cuBLAS is not in this process: expected the one that a torch built for CUDA loads");

  // C^T [n, m] = B^T [n, k] A^T [k, m] in columns.
  const Factor left = factor(p.b, p.k, p.n), right = factor(p.a, p.m, p.k);
  const int64_t ldc = leading(p.m, p.n, p.c_stride);
  const bool wide = std::max({p.m, p.n, p.k, left.ld, right.ld, ldc}) > INT_MAX;
  if (wide && !cublasGemmEx_64)
    fail("a product of [", p.m, ", ", p.k, "] and [", p.k, ", ", p.n,
         "]: sizes or strides beyond 2^31 - 1 need cuBLAS 12 or newer");

  // Not the pedantic compute type: strict float32 is what torch's own products use, CUBLAS_COMPUTE_32F under the
  // default mathematics, which has no TF32 in it unless NVIDIA_TF32_OVERRIDE asks the whole process for it.
  const bool f64 = p.a.dtype == Dtype::f64;
  const int compute = f64 ? cublas_64f : p.tf32 && p.a.dtype == Dtype::f32 ? cublas_32f_fast_tf32 : cublas_32f;
  const double one64 = 1, beta64 = p.add;
  const float one32 = 1, beta32 = p.add;
  const void* alpha = f64 ? static_cast<const void*>(&one64) : &one32;
  const void* beta = f64 ? static_cast<const void*>(&beta64) : &beta32;

  cublasContext* const handle = cublas_handle();
  // In this order: a new stream gives cuBLAS its own workspace back, and that is one for all streams.
  succeed_cublas(cublasSetStream_v2(handle, native(stream)), "setting cuBLAS's stream");
  succeed_cublas(cublasSetWorkspace_v2(handle, scratch, scratch_bytes), "giving cuBLAS its workspace");
  const auto run = [&](auto gemm, auto size) {
    using Size = decltype(size);
    return gemm(handle, left.operation, right.operation, Size(p.n), Size(p.m), Size(p.k), alpha, left.data, left.type,
                Size(left.ld), right.data, right.type, Size(right.ld), beta, p.c, type_of(p.c_dtype), Size(ldc),
                compute, cublas_default_algorithm);
  };
  succeed_cublas(wide ? run(cublasGemmEx_64, int64_t()) : run(cublasGemmEx, int()), "a product of [", p.m, ", ", p.k,
                 "] and [", p.k, ", ", p.n, "]");
}

}  // namespace cuda
}  // namespace fastrnn
