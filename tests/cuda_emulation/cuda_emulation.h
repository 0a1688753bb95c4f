// Runs CUDA kernels on the CPU, unmodified: every thread of a block is a fiber, __syncthreads() and
// warp shuffles switch between fibers, blocks run one after another. It proves indexing, barriers
// and arithmetic without a GPU; it does not model speed, memory order or races between blocks.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <stdexcept>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static  // blocks run in turn, so one copy per kernel is one copy per block

#define FASTMETA_LIBRARY fastmeta_emulated
#define FASTMETA_KEY CPU

struct uint2 {
  unsigned x, y;
};
struct uint4 {
  unsigned x, y, z, w;
};

template <typename T>
void __stcg(T* to, T x) {
  *to = x;
}

struct EmulatedIndex {
  unsigned x = 0;
};
inline EmulatedIndex threadIdx, blockIdx, blockDim, gridDim;

namespace cuda_emulation {

constexpr unsigned kMaxThreads = 1024, kWarp = 32;
constexpr size_t kStack = 64 * 1024;

// The threads of one block. Fibers are started once and kept from block to block; after the start
// they are switched by _setjmp and _longjmp, which make no system call.
class Block {
 public:
  static Block& the() {
    static Block block;
    return block;
  }

  // Runs all threads from __syncthreads() to __syncthreads(), one warp after another. Lanes and
  // warps take turns in rising and falling order, so a missing barrier shows as a wrong result.
  void run(unsigned threads, std::function<void()> body) {
    body_ = std::move(body);
    for (unsigned i = 0; i < threads; ++i) fibers_[i].state = State::kReady;
    unsigned finished = 0;
    for (bool ascending = true; finished < threads; ascending = !ascending) {
      finished = 0;
      for (unsigned i = 0; i < threads; i += kWarp) {
        finished += run_warp(ascending ? i : threads - kWarp - i, ascending);
      }
      if (finished != 0 && finished != threads) {
        throw std::runtime_error("some threads of a block left while others wait at a barrier");
      }
    }
  }

  // Called by a fiber: lets the others of its warp, or of its block, come to the same point.
  void warp_barrier() { leave(State::kAtWarp); }
  void block_barrier() { leave(State::kAtBlock); }

  double& exchange(unsigned thread) { return fibers_[thread].exchange; }

 private:
  enum class State { kReady, kAtWarp, kAtBlock, kDone };

  struct Fiber {
    jmp_buf context;
    std::unique_ptr<char[]> stack;
    double exchange = 0;
    State state = State::kReady;
  };

  // Runs the lanes of a warp until all wait for the block or are done; returns how many are done.
  unsigned run_warp(unsigned first, bool ascending) {
    for (;;) {
      unsigned at_warp = 0, done = 0;
      for (unsigned i = 0; i < kWarp; ++i) {
        const unsigned thread = first + (ascending ? i : kWarp - 1 - i);
        Fiber& fiber = fibers_[thread];
        threadIdx.x = thread;
        if (fiber.state != State::kDone) resume(fiber);
        at_warp += fiber.state == State::kAtWarp ? 1 : 0;
        done += fiber.state == State::kDone ? 1 : 0;
      }
      if (at_warp == 0) return done;
      if (at_warp != kWarp) throw std::runtime_error("only some lanes of a warp came to a shuffle");
    }
  }

  void leave(State state) {
    running_->state = state;
    if (_setjmp(running_->context) == 0) _longjmp(scheduler_, 1);
  }

  void resume(Fiber& fiber) {
    running_ = &fiber;
    if (_setjmp(scheduler_) != 0) return;
    if (fiber.stack) _longjmp(fiber.context, 1);
    fiber.stack.reset(new char[kStack]);
    ucontext_t start;
    getcontext(&start);
    start.uc_stack.ss_sp = fiber.stack.get();
    start.uc_stack.ss_size = kStack;
    makecontext(&start, &Block::live, 0);
    setcontext(&start);
  }

  static void live() {
    Block& block = the();
    for (;;) {
      block.body_();
      block.leave(State::kDone);
    }
  }

  std::function<void()> body_;
  std::vector<Fiber> fibers_{kMaxThreads};
  jmp_buf scheduler_;
  Fiber* running_ = nullptr;
};

}  // namespace cuda_emulation

inline void __syncthreads() { cuda_emulation::Block::the().block_barrier(); }

template <typename T>
T __shfl_down_sync(unsigned mask, T x, unsigned delta) {
  static_assert(sizeof(T) <= sizeof(double));
  auto& block = cuda_emulation::Block::the();
  const unsigned thread = threadIdx.x;
  if (mask != 0xffffffffu) throw std::runtime_error("only full-warp shuffles are emulated");
  block.exchange(thread) = static_cast<double>(x);
  block.warp_barrier();
  const bool inside = thread % 32 + delta < 32;
  const T result = static_cast<T>(block.exchange(inside ? thread + delta : thread));
  block.warp_barrier();
  return result;
}

namespace torch::stable {
class Tensor;
}

namespace fastmeta {

class OnDevice {
 public:
  explicit OnDevice(const torch::stable::Tensor&) {}

  template <typename... Parameters, typename... Arguments>
  void launch(void (*kernel)(Parameters...), int64_t blocks, const Arguments&... arguments) const {
    constexpr int64_t kFewBlocks = 3;  // so that every block strides over the grid
    gridDim.x = static_cast<unsigned>(blocks < kFewBlocks ? blocks : kFewBlocks);
    blockDim.x = 256;
    for (unsigned block = 0; block < gridDim.x; ++block) {
      blockIdx.x = block;
      cuda_emulation::Block::the().run(blockDim.x, [&] { kernel(arguments...); });
    }
  }
};

}  // namespace fastmeta
