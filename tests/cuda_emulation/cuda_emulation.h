// Runs CUDA kernels on the CPU, unmodified: every thread of a block is a fiber, __syncthreads() and
// warp shuffles switch between fibers, blocks run one after another. It proves indexing, barriers
// and arithmetic without a GPU; it does not model speed, memory order or races between blocks.
#pragma once

#include <ucontext.h>

#include <cstdint>
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

struct EmulatedIndex {
  unsigned x = 0;
};
inline EmulatedIndex threadIdx, blockIdx, blockDim, gridDim;

namespace cuda_emulation {

constexpr size_t kStack = 64 * 1024;

// The stacks of a block's fibers, kept from block to block.
inline char* stack_of(size_t thread) {
  static std::vector<std::unique_ptr<char[]>> stacks;
  while (stacks.size() <= thread) stacks.emplace_back(new char[kStack]);
  return stacks[thread].get();
}

class Block {
 public:
  static Block*& current() {
    static Block* block = nullptr;
    return block;
  }

  Block(unsigned threads, std::function<void()> body) : body_(std::move(body)), fibers_(threads) {
    for (size_t thread = 0; thread < threads; ++thread) {
      Fiber& fiber = fibers_[thread];
      getcontext(&fiber.context);
      fiber.context.uc_stack.ss_sp = stack_of(thread);
      fiber.context.uc_stack.ss_size = kStack;
      fiber.context.uc_link = &scheduler_;
      makecontext(&fiber.context, &Block::start, 0);
    }
  }

  // Runs all threads from barrier to barrier; the order changes every time, which shows a missing
  // barrier as a wrong result.
  void run() {
    current() = this;
    size_t waiting = fibers_.size();
    for (bool ascending = true; waiting > 0; ascending = !ascending) {
      size_t finished = 0;
      for (size_t i = 0; i < fibers_.size(); ++i) {
        const size_t thread = ascending ? i : fibers_.size() - 1 - i;
        threadIdx.x = static_cast<unsigned>(thread);
        running_ = &fibers_[thread];
        if (!running_->done) swapcontext(&scheduler_, &running_->context);
        finished += running_->done ? 1 : 0;
      }
      if (finished != 0 && finished != fibers_.size()) {
        throw std::runtime_error("some threads of a block left while others wait at a barrier");
      }
      waiting = fibers_.size() - finished;
    }
  }

  void barrier() { swapcontext(&running_->context, &scheduler_); }

  double& exchange(size_t thread) { return fibers_[thread].exchange; }
  size_t size() const { return fibers_.size(); }

 private:
  struct Fiber {
    ucontext_t context;
    double exchange = 0;
    bool done = false;
  };

  static void start() {
    Block* block = current();
    Fiber* self = block->running_;
    block->body_();
    self->done = true;
  }

  std::function<void()> body_;
  std::vector<Fiber> fibers_;
  ucontext_t scheduler_;
  Fiber* running_ = nullptr;
};

}  // namespace cuda_emulation

inline void __syncthreads() { cuda_emulation::Block::current()->barrier(); }

template <typename T>
T __shfl_down_sync(unsigned mask, T x, unsigned delta) {
  static_assert(sizeof(T) <= sizeof(double));
  auto* block = cuda_emulation::Block::current();
  const unsigned thread = threadIdx.x;
  if (mask != 0xffffffffu) throw std::runtime_error("only full-warp shuffles are emulated");
  block->exchange(thread) = static_cast<double>(x);
  block->barrier();
  const bool inside = thread % 32 + delta < 32;
  const T result = static_cast<T>(block->exchange(inside ? thread + delta : thread));
  block->barrier();
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
      cuda_emulation::Block(blockDim.x, [&] { kernel(arguments...); }).run();
    }
  }
};

}  // namespace fastmeta
