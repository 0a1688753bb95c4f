// Cross-entropy of rows of logits [R, C]: forward, backward, and the derivative of that. A row is
// read twice in the first and the last of them, the second time from the cache.
#include <cmath>
#include <limits>

#include "common/tensor.h"
#include "math/exponential.h"

namespace fastmeta {
namespace {

constexpr int64_t kCost = 4;  // a logit costs as much as this many moved numbers

void check(const Tensor& x, const Tensor& labels) {
  STD_TORCH_CHECK(x.dim() == 2 && x.is_contiguous() && x.size(1) > 0 && labels.dim() == 1 &&
                      labels.size(0) == x.size(0) && labels.is_contiguous() &&
                      labels.scalar_type() == ScalarType::Long,
                  "fastmeta: cross_entropy takes contiguous rows [R, C] and their labels [R]");
}

// Runs f(type of vectors, first row, last row) in code for the CPU's registers.
template <typename A, typename F>
void each_rows(const Tensor& x, const F& f) {
  parallel_ranges(x.size(0), x.size(1) * kCost, [&](int64_t begin, int64_t end) {
    with_registers([&](auto bytes) FM_INLINE_LAMBDA {
      f(static_cast<Lanes<A, bytes()>*>(nullptr), begin, end);
    });
  });
}

// The numbers of a row at j; -inf, whose exponential is 0, after its last.
template <typename L, bool kWhole, typename A>
FM_HD L logits_at(const A* from, int64_t count) {
  if constexpr (kWhole) return L::template load<true>(from, count);
  A there[L::kCount];
  for (int i = 0; i < L::kCount; ++i) {
    there[i] = i < count ? from[i] : -std::numeric_limits<A>::infinity();
  }
  return L::template load<true>(there, L::kCount);
}

// Whether a row has a gradient: one that does not count has a share of 0.
template <typename A>
FM_HD bool counts(int64_t label, int64_t classes, A share) {
  return share != 0 && label >= 0 && label < classes;
}

std::tuple<Tensor, Tensor> forward(Tensor x, Tensor labels, int64_t ignored) {
  check(x, labels);
  const int64_t rows = x.size(0), classes = x.size(1);
  const int64_t* const label = data_of<const int64_t>(labels);
  for (int64_t r = 0; r < rows; ++r) {
    STD_TORCH_CHECK(label[r] == ignored || (label[r] >= 0 && label[r] < classes),
                    "cross_entropy: labels must lie in 0 to ", classes - 1, " or be ", ignored,
                    ", got ", label[r]);
  }
  const Tensor losses = empty_rows({rows}, x.scalar_type(), x);
  const Tensor stats = empty_rows({rows, 2}, x.scalar_type(), x);
  with_dtype(x, [&](auto zero) {
    using A = decltype(zero);
    const A* const from = data_of<const A>(x);
    A *const loss = data_of<A>(losses), *const kept = data_of<A>(stats);
    each_rows<A>(x, [&](auto* lane, int64_t begin, int64_t end) FM_INLINE_LAMBDA {
      using L = std::remove_pointer_t<decltype(lane)>;
      for (int64_t r = begin; r < end; ++r) {
        if (label[r] == ignored) {
          loss[r] = kept[2 * r] = kept[2 * r + 1] = 0;
          continue;
        }
        const A* const row = from + r * classes;
        L most = L::all(-std::numeric_limits<A>::infinity());
        each_vector<L>(classes, [&](auto whole, int64_t j, int64_t count) FM_INLINE_LAMBDA {
          most = above(most, logits_at<L, whole()>(row + j, count));
        });
        const A top = most.top();
        L sum = L::all(0);
        each_vector<L>(classes, [&](auto whole, int64_t j, int64_t count) FM_INLINE_LAMBDA {
          sum = sum + exponential(logits_at<L, whole()>(row + j, count) - L::all(top));
        });
        const A total = sum.sum();
        loss[r] = std::log(total) + (top - row[label[r]]);
        kept[2 * r] = top;
        kept[2 * r + 1] = A(1) / total;
      }
    });
  });
  return {losses, stats};
}

// g [R]: cotangent of the losses. Returns g (p - one_hot(labels)), p the softmax of x.
Tensor backward(Tensor g, Tensor x, Tensor labels, Tensor stats) {
  check(x, labels);
  const int64_t classes = x.size(1);
  const int64_t* const label = data_of<const int64_t>(labels);
  const Tensor dx = empty_rows({x.size(0), classes}, x.scalar_type(), x);
  with_dtype(x, [&](auto zero) {
    using A = decltype(zero);
    const A *const from = data_of<const A>(x), *const given = data_of<const A>(g),
                   *const kept = data_of<const A>(stats);
    A* const to = data_of<A>(dx);
    each_rows<A>(x, [&](auto* lane, int64_t begin, int64_t end) FM_INLINE_LAMBDA {
      using L = std::remove_pointer_t<decltype(lane)>;
      for (int64_t r = begin; r < end; ++r) {
        const A* const row = from + r * classes;
        A* const out = to + r * classes;
        if (!counts(label[r], classes, kept[2 * r + 1])) {
          std::fill(out, out + classes, A(0));
          continue;
        }
        const L top = L::all(kept[2 * r]);
        const A scale = given[r] * kept[2 * r + 1];
        each_vector<L>(classes, [&](auto whole, int64_t j, int64_t count) FM_INLINE_LAMBDA {
          const L e = exponential(L::template load<whole()>(row + j, count) - top);
          (scale * e).template store<whole()>(out + j, count);
        });
        out[label[r]] -= given[r];
      }
    });
  });
  return dx;
}

// v [R, C]: cotangent of the gradient. Returns sum_j v (p - one_hot) and g p (v - sum_j p v).
std::tuple<Tensor, Tensor> double_backward(Tensor v, Tensor g, Tensor x, Tensor labels,
                                           Tensor stats) {
  check(x, labels);
  const int64_t classes = x.size(1);
  const int64_t* const label = data_of<const int64_t>(labels);
  const Tensor dg = empty_rows({x.size(0)}, x.scalar_type(), x);
  const Tensor dx = empty_rows({x.size(0), classes}, x.scalar_type(), x);
  with_dtype(x, [&](auto zero) {
    using A = decltype(zero);
    const A *const from = data_of<const A>(x), *const given = data_of<const A>(g),
                   *const kept = data_of<const A>(stats), *const cotangent = data_of<const A>(v);
    A *const to = data_of<A>(dx), *const to_g = data_of<A>(dg);
    each_rows<A>(x, [&](auto* lane, int64_t begin, int64_t end) FM_INLINE_LAMBDA {
      using L = std::remove_pointer_t<decltype(lane)>;
      for (int64_t r = begin; r < end; ++r) {
        const A *const row = from + r * classes, *const u = cotangent + r * classes;
        A* const out = to + r * classes;
        if (!counts(label[r], classes, kept[2 * r + 1])) {
          std::fill(out, out + classes, A(0));
          to_g[r] = 0;
          continue;
        }
        const L top = L::all(kept[2 * r]);
        L sum = L::all(0);
        each_vector<L>(classes, [&](auto whole, int64_t j, int64_t count) FM_INLINE_LAMBDA {
          const L e = exponential(logits_at<L, whole()>(row + j, count) - top);
          sum = sum + e * L::template load<whole()>(u + j, count);
          e.template store<whole()>(out + j, count);
        });
        const A mean = sum.sum() * kept[2 * r + 1];
        to_g[r] = mean - u[label[r]];
        const A scale = given[r] * kept[2 * r + 1];
        each_vector<L>(classes, [&](auto whole, int64_t j, int64_t count) FM_INLINE_LAMBDA {
          const L e = L::template load<whole()>(out + j, count);
          const L centred = L::template load<whole()>(u + j, count) - L::all(mean);
          (scale * (e * centred)).template store<whole()>(out + j, count);
        });
      }
    });
  });
  return {dg, dx};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastmeta, CPU, m) {
  m.impl("cross_entropy", TORCH_BOX(&forward));
  m.impl("cross_entropy_backward", TORCH_BOX(&backward));
  m.impl("cross_entropy_double_backward", TORCH_BOX(&double_backward));
}

}  // namespace fastmeta
