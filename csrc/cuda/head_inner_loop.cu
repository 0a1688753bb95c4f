// The head's inner loop on CUDA devices: one block per task, the algorithm of math/. The
// coefficients of a task stay in shared memory where they fit. No atomics: sums are taken in an
// order that the shapes alone decide.

#include "common/cuda.h"
#include "common/head_op.h"

#if defined(__CUDACC__)
// The algorithm is __host__ __device__, because the host runs it as far as the sizes of its
// buffers; with a BlockTeam it runs on the device alone.
#pragma nv_diag_suppress 20011, 20013, 20014, 20015
#endif
#include "math/head_direct.h"

namespace fastmeta {
namespace {

constexpr int64_t kShared = 40 * 1024;  // bytes of coefficients kept in shared memory
constexpr int64_t kBlocks = 528;        // at once: each has scratch of its own
constexpr int kHeight = 4;              // rows of a product that one thread computes

// Nobody: for the sizes of buffers, which are known before the first loop.
template <typename A>
struct NoTeam {
  static constexpr int kLanes = 1;
  template <typename F>
  FM_HD void each(int64_t, const F&) const {}
  template <typename F>
  FM_HD void grid(int64_t, int64_t, const F&) const {}
  template <typename F>
  FM_HD void rows(int64_t, const F&) const {}
  template <typename F>
  FM_HD void once(const F&) const {}
  template <typename F>
  FM_HD A sum(int64_t, const F&) const {
    return A(0);
  }
  FM_HD void gemm(int64_t, int64_t, int64_t, Operand<A>, Operand<A>, A*, int64_t, A,
                  const A* = nullptr, A = A(0)) const {}
};

// One block; see math/head_task.h.
template <typename A>
struct BlockTeam {
  static constexpr int kLanes = 1;

  template <typename F>
  __device__ void each(int64_t n, const F& f) const {
    for (int64_t i = threadIdx.x; i < n; i += kThreads) f(i);
    __syncthreads();
  }
  template <typename F>
  __device__ void grid(int64_t m, int64_t n, const F& f) const {
    const int64_t size = m * n;
    for (int64_t i = threadIdx.x; i < size; i += kThreads) f(i / n, i % n);
    __syncthreads();
  }
  template <typename F>
  __device__ void rows(int64_t n, const F& f) const {
    each(n, f);
  }
  template <typename F>
  __device__ void once(const F& f) const {
    if (threadIdx.x == 0) f();
    __syncthreads();
  }
  template <typename F>
  __device__ A sum(int64_t n, const F& f) const {
    __shared__ A total;
    A own = A(0);
    for (int64_t i = threadIdx.x; i < n; i += kThreads) own += f(i);
    own = block_sum(own);
    if (threadIdx.x == 0) total = own;
    __syncthreads();
    own = total;
    __syncthreads();  // read by all before the next sum writes it
    return own;
  }
  // Threads beside each other take columns beside each other, kHeight rows each.
  __device__ void gemm(int64_t m, int64_t n, int64_t k, Operand<A> a, Operand<A> b, A* to,
                       int64_t ldto, A scale, const A* c = nullptr, A beta = A(0)) const {
    const int64_t size = ceil_div(m, kHeight) * n;
    for (int64_t i = threadIdx.x; i < size; i += kThreads) {
      const int64_t row = i / n * kHeight, column = i % n;
      const int64_t height = least(m - row, kHeight);
      A sums[kHeight];
#pragma unroll
      for (int r = 0; r < kHeight; ++r) sums[r] = A(0);
      const A* left = a.data + row * a.row;
      const A* right = b.data + column * b.column;
      for (int64_t q = 0; q < k; ++q) {
        const A y = *right;
#pragma unroll
        for (int r = 0; r < kHeight; ++r) {
          if (r < height) sums[r] += left[r * a.row] * y;
        }
        left += a.column;
        right += b.row;
      }
#pragma unroll
      for (int r = 0; r < kHeight; ++r) {
        if (r >= height) continue;
        const int64_t at = (row + r) * ldto + column;
        to[at] = c == nullptr ? scale * sums[r] : scale * sums[r] + beta * c[at];
      }
    }
    __syncthreads();
  }
};

enum Pass : int { kForward = 1, kGram = 2 };

template <int kPass, typename Team, typename A>
FM_HD void run_form(const Team& team, const HeadArgs<A>& args, int64_t t, Arena<A>& arena,
                    Arena<A>& large) {
  if constexpr (kPass == (kForward | kGram)) gram_forward(team, args, t, arena, large);
  if constexpr (kPass == kForward) direct_forward(team, args, t, arena, large);
  if constexpr (kPass == kGram) gram_backward(team, args, t, arena, large);
  if constexpr (kPass == 0) direct_backward(team, args, t, arena, large);
}

// What a block needs besides shared memory: `small` elements of coefficients where they do not fit
// there (else 0), then `large` ones, at scratch + block * (small + large).
template <typename A>
struct Scratch {
  A* data = nullptr;
  int64_t small = 0, large = 0;
};

template <typename A, int kPass>
__global__ void __launch_bounds__(kThreads, 1) head_kernel(HeadArgs<A> args, Scratch<A> scratch) {
  alignas(16) __shared__ A shared[kShared / sizeof(A)];
  const BlockTeam<A> team;
  A* const own = scratch.data + int64_t(blockIdx.x) * (scratch.small + scratch.large);
  for (int64_t t = blockIdx.x; t < args.shape.tasks; t += gridDim.x) {
    if ((kPass & kForward) != 0 && args.active != nullptr && !args.active[t]) {
      skip_task(team, args, t);
      continue;
    }
    Arena<A> arena{scratch.small > 0 ? own : shared}, large{own + scratch.small};
    run_form<kPass>(team, args, t, arena, large);
    __syncthreads();
  }
}

template <typename A>
struct CudaHead {
  static void forward(const HeadArgs<A>& args, const Tensor& on) {
    args.shape.gram ? run<kForward | kGram>(args, on) : run<kForward>(args, on);
  }
  static void backward(const HeadArgs<A>& args, const Tensor& on) {
    args.shape.gram ? run<kGram>(args, on) : run<0>(args, on);
  }

  template <int kPass>
  static void run(const HeadArgs<A>& args, const Tensor& on) {
    Arena<A> small, large;
    run_form<kPass>(NoTeam<A>(), args, 0, small, large);
    const OnDevice device(on);
    const int64_t blocks = least(args.shape.tasks, kBlocks);
    Scratch<A> scratch;
    scratch.small = small.used * int64_t(sizeof(A)) > kShared ? small.used : 0;
    scratch.large = large.used;
    constexpr auto dtype = sizeof(A) == 8 ? ScalarType::Double : ScalarType::Float;
    const Tensor memory = empty_rows({blocks * (scratch.small + scratch.large)}, dtype, on);
    scratch.data = static_cast<A*>(memory.mutable_data_ptr());
    device.launch(head_kernel<A, kPass>, blocks, args, scratch);
  }
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(FASTMETA_LIBRARY, FASTMETA_KEY, m) { HeadOp<CudaHead>::add_to(m); }

}  // namespace fastmeta
