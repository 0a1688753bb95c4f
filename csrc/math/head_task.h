// One task of the head's inner loop: its arguments, its rows, softmax cross-entropy. Written once
// for a CPU thread and a CUDA block by means of a Team (cpu/head_team.h, cuda/head_inner_loop.cu):
//
//   kLanes                        rows that rows() hands out at a time
//   each(n, f), grid(m, n, f)     f(i) or f(i, j) for all, in any order, then a barrier
//   rows(n, f)                    f(j) for j = 0, kLanes, 2 kLanes... below n, then a barrier
//   once(f)                       f() by one thread, then a barrier
//   sum(n, f)                     the sum of f(i), known to all threads, in a fixed order
//   gemm(m, n, k, a, b, to, ...)  to = scale A B + beta C, then a barrier
//
// Coefficients of rows are stored transposed, [C, ld], one adjacent run of rows per class; the rows
// beyond n, up to a multiple of kLanes, are padding.
#pragma once

#include <cmath>
#include <cstring>
#include <type_traits>

#include "common/streams.h"

#if defined(__CUDACC__) || defined(FASTMETA_EMULATE_CUDA)
#define FM_TEAM __host__ __device__
#define FM_BODY
#else
#include "common/cpu.h"
#define FM_TEAM FM_CLONES
#if defined(__GNUC__)
#define FM_BODY __attribute__((always_inline))  // of a lambda, so that loops over it vectorise
#else
#define FM_BODY
#endif
#endif

namespace fastmeta {

// T tasks of N rows of D features, C classes, K steps.
struct HeadShape {
  int64_t tasks = 0, rows = 0, width = 0, classes = 0, steps = 0;
  bool bias = false, gram = false;
};

// A matrix per task: element (i, j) of task t at data[t * task + i * row + j].
template <typename T>
struct PerTask {
  T* data = nullptr;
  int64_t task = 0, row = 0;
  FM_HD explicit operator bool() const { return data != nullptr; }
  FM_HD T* of(int64_t t) const { return data + t * task; }
};

template <typename Acc>
struct HeadArgs {
  using A = Acc;
  HeadShape shape;
  const void* features = nullptr;  // [T, N, D]
  int64_t features_task = 0, features_row = 0;
  Type type = Type::kFloat;         // of the features
  const int64_t* labels = nullptr;  // [T, N]; outside [0, C): ignored
  PerTask<const A> weight, bias;    // [T, C, D], [T, C]
  const A* lr = nullptr;            // [T, K], or null for lr_value
  A lr_value = 0, momentum = 0, decay = 0;

  // forward
  const int64_t* ways = nullptr;  // [T], or null
  const bool* active = nullptr;   // [T], or null
  bool freeze = false;            // a task that diverges keeps its weights; else it is NaN
  A *new_weight = nullptr, *new_bias = nullptr;
  A* losses = nullptr;         // [T, K]
  int64_t* taken = nullptr;    // [T]: steps taken; -1 for a task that is NaN
  A* probabilities = nullptr;  // [T, K, C, N]; null: not kept
  A* products = nullptr;       // [T, N, N], of rows with each other; null: not kept

  // backward: also reads taken, probabilities and products
  PerTask<const A> v_weight, v_bias;  // cotangents
  int64_t exact = 0;                  // the last this many gradients are differentiated
  void* d_features = nullptr;         // [T, N, D]; null, as those below: not wanted
  A *d_weight = nullptr, *d_bias = nullptr, *d_lr = nullptr;

  FM_HD A rate(int64_t t, int64_t k) const {
    return lr == nullptr ? lr_value : lr[t * shape.steps + k];
  }
};

// Hands out the parts of one buffer; without a buffer it only adds up their sizes.
template <typename A>
struct Arena {
  A* base = nullptr;
  int64_t used = 0;
  FM_HD A* take(int64_t count) {
    A* const part = base == nullptr ? nullptr : base + used;
    used += ceil_div(count, 16) * 16;
    return part;
  }
  FM_HD int32_t* take_ints(int64_t count) { return reinterpret_cast<int32_t*>(take(count)); }
};

// A matrix operand: element (i, j) at data[i * row + j * column].
template <typename A>
struct Operand {
  const A* data;
  int64_t row, column;
  FM_HD Operand transposed() const { return {data, column, row}; }
};

template <typename A>
FM_HD bool is_finite(A x) {
  return x - x == A(0);
}

// e^x for x <= 0: 2^n times a polynomial on [-ln 2 / 2, ln 2 / 2]; branch-free, so that it
// vectorises. Error about one rounding.
FM_HD float exp_below(float x) {
#if defined(__CUDA_ARCH__)
  return expf(x);
#else
  const float bounded = x < -87.0f ? -87.0f : x;
  const float shifted = bounded * 1.44269504f + 12582912.0f;  // rounds to an integer n
  const float n = shifted - 12582912.0f;
  const float r = (bounded - n * 0.693359375f) + n * 2.12194440e-4f;
  float p = 1.0f / 5040;
  p = p * r + 1.0f / 720;
  p = p * r + 1.0f / 120;
  p = p * r + 1.0f / 24;
  p = p * r + 1.0f / 6;
  p = p * r + 0.5f;
  p = (p * r) * r + r + 1.0f;
  int32_t bits;
  std::memcpy(&bits, &shifted, sizeof bits);
  bits = (bits + 127) << 23;
  float scale;
  std::memcpy(&scale, &bits, sizeof bits);
  return x < -87.0f ? 0.0f : p * scale;
#endif
}
FM_HD double exp_below(double x) {
#if defined(__CUDA_ARCH__)
  return exp(x);
#else
  return std::exp(x);
#endif
}
template <typename A>
FM_HD A log_of(A x) {
#if defined(__CUDA_ARCH__)
  return log(x);
#else
  return std::log(x);
#endif
}

// The rows of a task that have a label, gathered.
template <typename A>
struct Rows {
  int64_t count = 0;         // n
  int64_t ld = 0;            // n rounded up to whole lanes
  int32_t* index = nullptr;  // [n]: where they are among the N; index[N] holds n
  int32_t* label = nullptr;  // [ld]; padding: -1
  A* scale = nullptr;        // [ld]: 1 / n; padding: 0
  Operand<A> x{}, xt{};      // [n, D] and [D, ld]

  template <typename Team>
  FM_HD static Rows of(const Team& team, const HeadArgs<A>& args, int64_t t, Arena<A>& arena,
                       Arena<A>& large) {
    const HeadShape& s = args.shape;
    const int64_t N = s.rows, D = s.width,
                  padded = ceil_div(most(N, 1), Team::kLanes) * Team::kLanes;
    Rows r;
    r.index = arena.take_ints(N + 1);
    r.label = arena.take_ints(padded);
    r.scale = arena.take(padded);
    A* const copy = large.take(N * D);
    A* const transposed = Team::kLanes > 1 ? large.take(padded * D) : nullptr;
    if (arena.base == nullptr) {  // sizes only
      r.ld = padded;
      return r;
    }
    const int64_t* labels = args.labels + t * N;
    team.once([&]() FM_BODY {
      int32_t n = 0;
      for (int64_t i = 0; i < N; ++i) {
        if (labels[i] < 0 || labels[i] >= s.classes) continue;
        r.index[n] = static_cast<int32_t>(i);
        r.label[n++] = static_cast<int32_t>(labels[i]);
      }
      r.index[N] = n;
    });
    const int64_t n = r.count = r.index[N];
    r.ld = ceil_div(most(n, 1), Team::kLanes) * Team::kLanes;
    const A scale = A(1) / A(most(n, 1));
    team.each(r.ld, [&](int64_t j) FM_BODY {
      r.scale[j] = j < n ? scale : A(0);
      if (j >= n) r.label[j] = -1;
    });
    with_type<A>(args.type, [&](auto zero) {
      using T = decltype(zero);
      const T* from = static_cast<const T*>(args.features) + t * args.features_task;
      if constexpr (std::is_same_v<T, A>) {
        if (n == N) {
          r.x = {from, args.features_row, 1};
          return;
        }
      }
      const int64_t stride = args.features_row;
      const int32_t* index = r.index;
      team.grid(n, D, [&](int64_t i, int64_t d) FM_BODY {
        copy[i * D + d] = A(from[index[i] * stride + d]);
      });
      r.x = {copy, D, 1};
    });
    r.xt = r.x.transposed();
    if constexpr (Team::kLanes > 1) {
      team.transpose(r.x, n, D, transposed, r.ld);
      r.xt = {transposed, r.ld, 1};
    }
    return r;
  }

  // Rows of a [C, N] matrix, gathered or put back (where nothing comes from: 0).
  template <typename Team>
  FM_HD void gather(const Team& team, int64_t classes, int64_t N, const A* from, A* to) const {
    const int64_t n = count, width = ld;
    const int32_t* where = index;
    team.grid(classes, width, [&](int64_t c, int64_t j) FM_BODY {
      to[c * width + j] = j < n ? from[c * N + where[j]] : A(0);
    });
  }
  template <typename Team>
  FM_HD void scatter(const Team& team, int64_t height, int64_t N, const A* from, A* to) const {
    const int64_t n = count, width = ld;
    const int32_t* where = index;
    if (n < N) team.each(height * N, [&](int64_t i) FM_BODY { to[i] = A(0); });
    team.grid(height, n,
              [&](int64_t c, int64_t j) FM_BODY { to[c * N + where[j]] = from[c * width + j]; });
  }

  // Probabilities of the first `ways` classes, the residuals (p - [label]) / n, and the loss
  // (row_loss [ld] is scratch).
  template <typename Team>
  FM_HD A softmax(const Team& team, int64_t classes, int64_t ways, const A* z, A* p, A* residual,
                  A* row_loss) const {
    constexpr int L = Team::kLanes;
    const int64_t width = ld;
    const int32_t* const own = label;
    const A* const weight = scale;
    team.rows(width, [&](int64_t j) FM_BODY {
      A top[L], sum[L];
      for (int l = 0; l < L; ++l) top[l] = z[j + l];
      for (int64_t c = 1; c < ways; ++c) {
        const A* at = z + c * width + j;
        for (int l = 0; l < L; ++l) top[l] = at[l] > top[l] ? at[l] : top[l];
      }
      for (int l = 0; l < L; ++l) sum[l] = 0;
      for (int64_t c = 0; c < ways; ++c) {
        const A* at = z + c * width + j;
        A* to = p + c * width + j;
        for (int l = 0; l < L; ++l) {
          const A e = exp_below(at[l] - top[l]);
          to[l] = e;
          sum[l] += e;
        }
      }
      A inverse[L];
      for (int l = 0; l < L; ++l) inverse[l] = A(1) / sum[l];
      for (int64_t c = 0; c < classes; ++c) {
        A* to = p + c * width + j;
        A* r = residual + c * width + j;
        for (int l = 0; l < L; ++l) {
          const A value = c < ways ? to[l] * inverse[l] : A(0);
          to[l] = value;
          r[l] = value * weight[j + l];
        }
      }
      for (int l = 0; l < L; ++l) {
        row_loss[j + l] = 0;
        const int32_t y = own[j + l];
        if (y < 0) continue;
        const int64_t at = y * width + j + l;
        residual[at] = (p[at] - A(1)) * weight[j + l];
        row_loss[j + l] = y < ways ? top[l] - z[at] + log_of(sum[l]) : A(1) / A(0);
      }
    });
    return team.sum(count, [&](int64_t j) FM_BODY { return row_loss[j] * weight[j]; });
  }

  // (p - [label]) / n from kept probabilities.
  template <typename Team>
  FM_HD void residuals(const Team& team, int64_t classes, const A* p, A* residual) const {
    const int64_t width = ld;
    const int32_t* const own = label;
    const A* const weight = scale;
    team.grid(classes, width, [&](int64_t c, int64_t j) FM_BODY {
      residual[c * width + j] = (p[c * width + j] - (own[j] == c ? A(1) : A(0))) * weight[j];
    });
  }

  // The cotangent of the logits from that of the residuals: p (d - <p, d>) / n.
  template <typename Team>
  FM_HD void softmax_backward(const Team& team, int64_t classes, const A* p, const A* d,
                              A* dz) const {
    constexpr int L = Team::kLanes;
    const int64_t width = ld;
    const A* const weight = scale;
    team.rows(width, [&](int64_t j) FM_BODY {
      A mean[L];
      for (int l = 0; l < L; ++l) mean[l] = 0;
      for (int64_t c = 0; c < classes; ++c) {
        const int64_t at = c * width + j;
        for (int l = 0; l < L; ++l) mean[l] += p[at + l] * d[at + l];
      }
      for (int64_t c = 0; c < classes; ++c) {
        const int64_t at = c * width + j;
        for (int l = 0; l < L; ++l) {
          dz[at + l] = p[at + l] * (d[at + l] - mean[l]) * weight[j + l];
        }
      }
    });
  }
};

}  // namespace fastmeta
