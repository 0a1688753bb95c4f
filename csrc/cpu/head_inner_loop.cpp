// The head's inner loop on the CPU: one task per unit of parallel work, the algorithm of math/.

#include <memory>

#include "common/head_op.h"
#include "cpu/gemm.h"
#include "math/head_direct.h"

namespace fastmeta {
namespace {

// One thread; see math/head_task.h.
template <typename A>
struct CpuTeam {
  static constexpr int kLanes = Lanes<A, 16>::kCount;

  template <typename F>
  FM_HD void each(int64_t n, const F& f) const {
    FM_IVDEP
    for (int64_t i = 0; i < n; ++i) f(i);
  }
  template <typename F>
  FM_HD void grid(int64_t m, int64_t n, const F& f) const {
    for (int64_t i = 0; i < m; ++i) {
      FM_IVDEP
      for (int64_t j = 0; j < n; ++j) f(i, j);
    }
  }
  template <typename F>
  FM_HD void rows(int64_t n, const F& f) const {
    for (int64_t j = 0; j < n; j += kLanes) f(j);
  }
  template <typename F>
  FM_HD void once(const F& f) const {
    f();
  }
  template <typename F>
  FM_HD A sum(int64_t n, const F& f) const {
    A lanes[kLanes] = {};
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes) {
      for (int l = 0; l < kLanes; ++l) lanes[l] += f(i + l);
    }
    for (int l = 0; i < n; ++i, ++l) lanes[l] += f(i);
    A sum = 0;
    for (A lane : lanes) sum += lane;
    return sum;
  }
  FM_HD void gemm(int64_t m, int64_t n, int64_t k, Operand<A> a, Operand<A> b, A* to, int64_t ldto,
                  A scale, const A* c = nullptr, A beta = 0) const {
    fastmeta::gemm(
        Gemm<A>{m, n, k, a.data, a.row, a.column, b.data, b.row, to, ldto, scale, c, beta});
  }
  // x [n, D] -> [D, ld], zeros in the padding; in squares that stay in the L1 cache
  void transpose(Operand<A> x, int64_t n, int64_t width, A* to, int64_t ld) const {
    for (int64_t j = 0; j < ld; j += kLanes) {
      const int64_t lanes = least(most(n - j, 0), kLanes);
      for (int64_t d = 0; d < width; ++d) {
        A* run = to + d * ld + j;
        for (int64_t l = 0; l < lanes; ++l) run[l] = x.data[(j + l) * x.row + d];
        for (int64_t l = lanes; l < kLanes; ++l) run[l] = A(0);
      }
    }
  }
};

template <typename A>
using Form = void (*)(const CpuTeam<A>&, const HeadArgs<A>&, int64_t, Arena<A>&, Arena<A>&);

template <typename A>
struct CpuHead {
  static void forward(const HeadArgs<A>& args, const Tensor&) {
    const int64_t per_row =
        args.shape.gram ? args.shape.rows : args.shape.classes * args.shape.steps;
    run(args, args.shape.gram ? &gram_forward<CpuTeam<A>, A> : &direct_forward<CpuTeam<A>, A>,
        per_row, [&](const CpuTeam<A>& team, int64_t t) {
          if (args.active == nullptr || args.active[t]) return false;
          skip_task(team, args, t);
          return true;
        });
  }
  static void backward(const HeadArgs<A>& args, const Tensor&) {
    const int64_t per_row =
        args.shape.gram ? args.shape.rows : args.shape.classes * args.shape.steps;
    run(args, args.shape.gram ? &gram_backward<CpuTeam<A>, A> : &direct_backward<CpuTeam<A>, A>,
        3 * per_row, [](const CpuTeam<A>&, int64_t) { return false; });
  }

  template <typename Skip>
  static void run(const HeadArgs<A>& args, Form<A> form, int64_t per_row, const Skip& skip) {
    const CpuTeam<A> team;
    Arena<A> sizes, large_sizes;
    form(team, args, 0, sizes, large_sizes);
    const int64_t work = args.shape.rows * args.shape.width * per_row / 16;
    const int64_t grain = most(1, kGrain / most(1, work));
    const auto range = [&](int64_t begin, int64_t end) {
      constexpr int64_t kLine = 64 / sizeof(A);
      const std::unique_ptr<A[]> memory(new A[size_t(sizes.used + large_sizes.used + kLine)]);
      A* base = memory.get();
      base += (kLine - reinterpret_cast<uintptr_t>(base) / sizeof(A) % kLine) % kLine;
      for (int64_t t = begin; t < end; ++t) {
        if (skip(team, t)) continue;
        Arena<A> arena{base}, large{base + sizes.used};
        form(team, args, t, arena, large);
      }
    };
    if (args.shape.tasks <= grain) return range(0, args.shape.tasks);
    torch::stable::parallel_for(0, args.shape.tasks, grain, range);
  }
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastmeta, CPU, m) { HeadOp<CpuHead>::add_to(m); }

}  // namespace fastmeta
