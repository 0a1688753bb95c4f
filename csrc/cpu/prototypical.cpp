// The prototypical loss and class sums on the CPU.

#include <limits>
#include <memory>
#include <tuple>

#include "cpu/pairwise.h"

namespace fastmeta {
namespace {

using Optional = std::optional<Tensor>;

// exp(x) for x <= 0, without branches so that loops of it take vectors: 2^n times a polynomial
// (Cephes' expf; one unit in the last place). 0 below the smallest normal number; NaN stays.
FM_HD float exp_of(float x) {
  const float kMagic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  const float least_x = x < -87.0f ? -87.0f : x;
  const float shifted = least_x * 1.44269504088896341f + kMagic;
  const float n = shifted - kMagic;
  const float r = least_x - n * 0.693359375f - n * -2.12194440e-4f;
  float y = 1.9875691500e-4f;
  y = y * r + 1.3981999507e-3f;
  y = y * r + 8.3334519073e-3f;
  y = y * r + 4.1665795894e-2f;
  y = y * r + 1.6666665459e-1f;
  y = y * r + 5.0000001201e-1f;
  y = y * r * r + r + 1.0f;
  int32_t bits;
  std::memcpy(&bits, &shifted, 4);
  bits = (bits + 127) << 23;
  float power;
  std::memcpy(&power, &bits, 4);
  return x < -87.0f ? 0.0f : y * power;
}
FM_HD double exp_of(double x) { return std::exp(x); }

template <typename L, typename A>
FM_HD A sum_row(const A* x, int64_t n) {
  L sum = L::all(0);
  int64_t j = 0;
  for (; j + L::kCount <= n; j += L::kCount) sum = sum + L::template load<true>(x + j, 0);
  if (j < n) sum = sum + L::template load<false>(x + j, n - j);
  return sum.sum();
}
template <typename A>
FM_HD A largest_of(const A* x, int64_t n) {
  constexpr int kSome = 16;
  if (n < kSome) {
    A out = x[0];
    for (int64_t j = 1; j < n; ++j) out = x[j] > out ? x[j] : out;
    return out;
  }
  A m[kSome];
  for (A& v : m) v = -std::numeric_limits<A>::infinity();
  int64_t j = 0;
  for (; j + kSome <= n; j += kSome) {
    for (int l = 0; l < kSome; ++l) m[l] = x[j + l] > m[l] ? x[j + l] : m[l];
  }
  for (int l = 0; j < n; ++j, ++l) m[l] = x[j] > m[l] ? x[j] : m[l];
  A out = m[0];
  for (A v : m) out = v > out ? v : out;
  return out;
}

// One row of distances to all classes.
template <typename L, typename A>
struct Row {
  A* x;  // sums, then logits, then derivatives, [n]
  A* e;  // exponentials, [n]
  int64_t n;
  A scale, root;
  bool product;

  // Sums to logits; classes that are not present get -inf.
  FM_HD void to_logits(const bool* present) const {
    if (product || root == A(1)) {
      const A factor = product ? scale : -scale;
      FM_IVDEP
      for (int64_t j = 0; j < n; ++j) x[j] = factor * x[j];
    } else if (root == A(2)) {
      FM_IVDEP
      for (int64_t j = 0; j < n; ++j) x[j] = -scale * std::sqrt(x[j]);
    } else {
      for (int64_t j = 0; j < n; ++j) x[j] = -scale * std::pow(x[j], A(1) / root);
    }
    if (present == nullptr) return;
    for (int64_t j = 0; j < n; ++j) {
      if (!present[j]) x[j] = -std::numeric_limits<A>::infinity();
    }
  }

  // Exponentials of the logits over the largest, and their sum.
  FM_HD A exponentials(A largest) const {
    FM_IVDEP
    for (int64_t j = 0; j < n; ++j) e[j] = exp_of(x[j] - largest);
    if (n >= L::kCount) return sum_row<L>(e, n);
    A sum = 0;
    for (int64_t j = 0; j < n; ++j) sum += e[j];
    return sum;
  }

  // Whether `label` is the first of the largest logits.
  FM_HD bool right(int64_t label) const {
    const A own = x[label];
    int32_t better = !(own == own);
    FM_IVDEP
    for (int64_t j = 0; j < label; ++j) better |= !(x[j] < own);
    FM_IVDEP
    for (int64_t j = label + 1; j < n; ++j) better |= !(x[j] <= own);
    return better == 0;
  }

  // Logits to derivatives by the sums, of `v` times the loss; the derivative by the scale.
  FM_HD A to_derivatives(int64_t label, A largest, A total, A v) const {
    const A own = x[label];
    FM_IVDEP
    for (int64_t j = 0; j < n; ++j) e[j] = e[j] / total;
    A expected = 0;  // of the logit, over the largest
    for (int64_t j = 0; j < n; ++j) {
      if (e[j] != A(0)) expected += e[j] * (x[j] - largest);
    }
    const A d_scale = v * (expected - (own - largest)) / scale;
    e[label] -= A(1);
    if (product || root == A(1)) {
      const A factor = product ? v * scale : -v * scale;
      FM_IVDEP
      for (int64_t j = 0; j < n; ++j) x[j] = factor * e[j];
    } else {
      for (int64_t j = 0; j < n; ++j) {  // distance d = sum^(1/root): d' = d^(1 - root) / root
        const A d = -x[j] / scale;
        const A slope = root == A(2) ? A(1) / d : std::pow(d, A(1) - root);
        x[j] = d == A(0) || e[j] == A(0) ? A(0) : -v * scale * e[j] * slope / root;
      }
    }
    return d_scale;
  }
};

bool counts(int64_t label, int64_t classes) { return label >= 0 && label < classes; }

// One over the number of rows that count.
template <typename A>
A share_of(const int64_t* labels, int64_t rows, int64_t classes) {
  int64_t count = 0;
  for (int64_t i = 0; i < rows; ++i) count += counts(labels[i], classes);
  return A(1) / A(most(count, 1));
}

// f(row, i) for rows i of [tasks * rows]: each unit has a buffer of its own for exponentials.
template <typename A, typename F>
void for_rows(int64_t all, A* sums, int64_t classes, Kind kind, double root, const F& f) {
  const int64_t together = most(1, 4096 / most(classes, 1));
  parallel_units(ceil_div(all, together), together * classes * 16, [&](int64_t unit) {
    const std::unique_ptr<A[]> buffer(new A[size_t(classes)]);
    with_registers([&](auto bytes) FM_INLINE_LAMBDA {
      using L = Lanes<A, bytes()>;
      const int64_t end = least((unit + 1) * together, all);
      for (int64_t i = unit * together; i < end; ++i) {
        f(Row<L, A>{sums + i * classes, buffer.get(), classes, 0, A(root), kind == Kind::kProduct},
          i);
      }
    });
  });
}

// Sums [T, n, C] to logits, and loss and right answer of each row, zeros where it does not count;
// with `gradient` to derivatives, and the derivative by the scale.
template <typename A>
void rows_pass(const Tensor& sums, const Tensor& labels, const Optional& present,
               const Tensor& scale, Kind kind, double root, bool gradient, A* loss, A* right,
               A* d_scale) {
  const int64_t T = sums.size(0), N = sums.size(1), C = sums.size(2);
  const auto* label = data_of<const int64_t>(labels);
  const bool* there = pointer_or_null<bool>(present);
  for_rows(T * N, data_of<A>(sums), C, kind, root, [&](auto row, int64_t i) FM_INLINE_LAMBDA {
    const int64_t t = i / N;
    row.scale = data_of<const A>(scale)[t];
    const bool counted = counts(label[i], C);
    loss[i] = right[i] = 0;
    if (gradient) d_scale[i] = 0;
    if (gradient && !counted) {
      std::fill_n(row.x, C, A(0));
      return;
    }
    row.to_logits(there == nullptr ? nullptr : there + t * C);
    if (!counted) return;
    const A largest = largest_of(row.x, C), total = row.exponentials(largest);
    loss[i] = std::log(total) - (row.x[label[i]] - largest);
    right[i] = row.right(label[i]) ? A(1) : A(0);
    if (gradient) d_scale[i] = row.to_derivatives(label[i], largest, total, A(1));
  });
}

std::tuple<Tensor, Tensor, Tensor> forward(Tensor query, Tensor labels, Tensor prototypes,
                                           Optional present, Tensor scale, int64_t kind, double p,
                                           double root) {
  const int64_t T = query.size(0), Q = query.size(1), C = prototypes.size(1);
  const ScalarType dtype = query.scalar_type();
  const Tensor logits = pair_sums(query, prototypes, kind, p);
  const Tensor loss = empty_rows({T}, dtype, query), right = empty_rows({T}, dtype, query);
  with_dtype(query, [&](auto zero) {
    using A = decltype(zero);
    const std::unique_ptr<A[]> rows(new A[size_t(2 * T * Q)]);
    A *row_loss = rows.get(), *row_right = row_loss + T * Q;
    rows_pass<A>(logits, labels, present, scale, Kind(kind), root, false, row_loss, row_right,
                 nullptr);
    for (int64_t t = 0; t < T; ++t) {
      const double share = share_of<double>(data_of<const int64_t>(labels) + t * Q, Q, C);
      double sum = 0, hits = 0;
      for (int64_t i = t * Q; i < (t + 1) * Q; ++i) sum += row_loss[i], hits += row_right[i];
      data_of<A>(loss)[t] = A(sum * share);
      data_of<A>(right)[t] = A(hits * share);
    }
  });
  return {loss, right, logits};
}

std::tuple<Tensor, Tensor, Tensor> backward(Tensor v_loss, Tensor logits, Tensor query,
                                            Tensor labels, Tensor prototypes, Optional present,
                                            Tensor scale, int64_t kind, double p, double root,
                                            int64_t needs) {
  const int64_t T = query.size(0), Q = query.size(1), D = query.size(2), C = prototypes.size(1);
  const ScalarType dtype = query.scalar_type();
  const auto wanted = [&](int bit, int64_t rows) {
    return needs >> bit & 1 ? empty_rows({T, rows, D}, dtype, query)
                            : empty_rows({0}, dtype, query);
  };
  const Tensor d_query = wanted(0, Q), d_prototypes = wanted(1, C);
  const Tensor d_scale = needs & 4 ? empty_rows({T}, dtype, query) : empty_rows({0}, dtype, query);
  with_dtype(query, [&](auto zero) {
    using A = decltype(zero);
    const Tensor weights = empty_rows({T, Q, C}, dtype, query);
    std::memcpy(data_of<A>(weights), data_of<A>(logits), size_t(T * Q * C) * sizeof(A));
    const std::unique_ptr<A[]> by_scale(new A[size_t(T * Q)]);
    const std::unique_ptr<bool[]> skip(new bool[size_t(T * Q)]);
    const auto* label = data_of<const int64_t>(labels);
    for_rows(T * Q, data_of<A>(weights), C, Kind(kind), root,
             [&](auto row, int64_t i) FM_INLINE_LAMBDA {
               const int64_t t = i / Q;
               row.scale = data_of<const A>(scale)[t];
               skip[i] = !counts(label[i], C);
               by_scale[i] = 0;
               if (skip[i]) return std::fill_n(row.x, C, A(0)), void();
               const A largest = largest_of(row.x, C), total = row.exponentials(largest);
               const A v = data_of<const A>(v_loss)[t] * share_of<A>(label + t * Q, Q, C);
               by_scale[i] = row.to_derivatives(label[i], largest, total, v);
             });
    if (needs & 4) {
      for (int64_t t = 0; t < T; ++t) {
        double sum = 0;
        for (int64_t i = t * Q; i < (t + 1) * Q; ++i) sum += by_scale[i];
        data_of<A>(d_scale)[t] = A(sum);
      }
    }
    if (needs & 3) {
      Optional sums;
      if (Kind(kind) == Kind::kMaximum) sums = pair_sums(query, prototypes, kind, p);
      pair_gradient(weights, query, prototypes, sums, Kind(kind), p, skip.get(), d_query,
                    d_prototypes);
    }
  });
  return {d_query, d_prototypes, d_scale};
}

std::tuple<Tensor, Tensor, Tensor> rows(Tensor sums, Tensor labels, Optional present, Tensor scale,
                                        int64_t kind, double root, bool gradient) {
  const int64_t T = sums.size(0), N = sums.size(1);
  const ScalarType dtype = sums.scalar_type();
  const Tensor loss = empty_rows({T, N}, dtype, sums), right = empty_rows({T, N}, dtype, sums),
               d_scale = empty_rows({T, gradient ? N : 0}, dtype, sums);
  with_dtype(sums, [&](auto zero) {
    using A = decltype(zero);
    rows_pass<A>(sums, labels, present, scale, Kind(kind), root, gradient, data_of<A>(loss),
                 data_of<A>(right), data_of<A>(d_scale));
  });
  return {loss, right, d_scale};
}

Tensor class_sums(Tensor x, Tensor labels, int64_t classes) {
  const int64_t T = x.size(0), N = x.size(1), D = x.size(2);
  const Tensor out = empty_rows({T, classes, D}, x.scalar_type(), x);
  with_dtype(x, [&](auto zero) {
    using A = decltype(zero);
    parallel_units(T, (N + classes) * D, [&](int64_t t) {
      A* const to = data_of<A>(out) + t * classes * D;
      std::fill_n(to, classes * D, A(0));
      for (int64_t i = t * N; i < (t + 1) * N; ++i) {
        const int64_t label = data_of<const int64_t>(labels)[i];
        if (!counts(label, classes)) continue;
        A* const sum = to + label * D;
        const A* const row = data_of<const A>(x) + i * D;
        FM_IVDEP
        for (int64_t k = 0; k < D; ++k) sum[k] += row[k];
      }
    });
  });
  return out;
}

Tensor class_gather(Tensor v, Tensor labels) {
  const int64_t T = v.size(0), N = labels.size(1), C = v.size(1), D = v.size(2);
  const Tensor out = empty_rows({T, N, D}, v.scalar_type(), v);
  with_dtype(v, [&](auto zero) {
    using A = decltype(zero);
    parallel_units(T * N, D, [&](int64_t i) {
      const int64_t label = data_of<const int64_t>(labels)[i];
      A* const to = data_of<A>(out) + i * D;
      if (counts(label, C)) {
        std::memcpy(to, data_of<const A>(v) + (i / N * C + label) * D, size_t(D) * sizeof(A));
      } else {
        std::fill_n(to, D, A(0));
      }
    });
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastmeta, CPU, m) {
  m.impl("prototypical", TORCH_BOX(&forward));
  m.impl("prototypical_backward", TORCH_BOX(&backward));
  m.impl("prototypical_rows_", TORCH_BOX(&rows));
  m.impl("class_sums", TORCH_BOX(&class_sums));
  m.impl("class_gather", TORCH_BOX(&class_gather));
}

}  // namespace fastmeta
