// How CUDA kernels are launched. Tests define FASTMETA_EMULATE_CUDA to run the same kernels on the
// CPU (tests/cuda_emulation/), as a library of its own name.
#pragma once

#if defined(FASTMETA_EMULATE_CUDA)
#include "cuda_emulation.h"
#else
#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/headeronly/util/Exception.h>
#define FASTMETA_LIBRARY fastmeta
#define FASTMETA_KEY CUDA
#endif

#include "common/tensor.h"

namespace fastmeta {

constexpr int kThreads = 256;
constexpr int64_t kMaxBlocks = 2112;  // grid-stride beyond this; never decides how sums are cut

#if !defined(FASTMETA_EMULATE_CUDA)

// The device of a tensor made current, with its current stream.
class OnDevice {
 public:
  explicit OnDevice(const Tensor& t) : guard_(t.get_device_index()) {
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &stream));
    stream_ = static_cast<cudaStream_t>(stream);
  }

  template <typename... Parameters, typename... Arguments>
  void launch(void (*kernel)(Parameters...), int64_t blocks, const Arguments&... arguments) const {
    const auto grid = static_cast<unsigned>(least(blocks, kMaxBlocks));
    kernel<<<grid, kThreads, 0, stream_>>>(arguments...);
    const cudaError_t error = cudaGetLastError();
    STD_TORCH_CHECK(error == cudaSuccess,
                    "fastmeta: CUDA launch failed: ", cudaGetErrorString(error));
  }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_;
};

#endif

// V adjacent elements moved by one instruction. Stored as one word by an intrinsic, as the compiler
// would take an assignment apart again.
template <typename T, int V>
struct alignas(sizeof(T) * V) Pack {
  T v[V];
};
template <size_t kBytes>
struct Word;
template <>
struct Word<16> {
  using type = uint4;
};
template <>
struct Word<8> {
  using type = uint2;
};
template <>
struct Word<4> {
  using type = unsigned int;
};
template <>
struct Word<2> {
  using type = unsigned short;
};
template <typename T, int V>
__device__ __forceinline__ Pack<T, V> load(const T* from) {
  return *reinterpret_cast<const Pack<T, V>*>(from);
}
template <typename T, int V>
__device__ __forceinline__ void store(T* to, const Pack<T, V>& x) {
  using W = typename Word<sizeof(T) * V>::type;
  W word;
  memcpy(&word, &x, sizeof(W));
  __stcg(reinterpret_cast<W*>(to), word);
}

// The sum over a block's threads, in an order fixed by the thread numbers; all threads call it.
// The result is valid in thread 0.
template <typename A>
__device__ A block_sum(A x) {
  __shared__ A warps[kThreads / 32];
#pragma unroll
  for (int step = 16; step > 0; step /= 2) x += __shfl_down_sync(0xffffffffu, x, step);
  __syncthreads();  // the previous call's sums have been read
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = x;
  __syncthreads();
  x = A(0);
  if (threadIdx.x == 0) {
    for (int i = 0; i < kThreads / 32; ++i) x += warps[i];
  }
  return x;
}

}  // namespace fastmeta
