// The prototypical loss and class sums on the CPU.

#include <memory>
#include <tuple>

#include "cpu/class_rows.h"
#include "cpu/pairwise.h"

namespace fastmeta {
namespace {

using Optional = std::optional<Tensor>;

bool counts(int64_t label, int64_t classes) { return label >= 0 && label < classes; }

// One over the number of rows that count.
template <typename A>
A share_of(const int64_t* labels, int64_t rows, int64_t classes) {
  int64_t count = 0;
  for (int64_t i = 0; i < rows; ++i) count += counts(labels[i], classes);
  return A(1) / A(most(count, 1));
}

// Rows [tasks * rows] of distances to classes and what is wanted of them; null: not wanted.
template <typename A>
struct Batch {
  A* sums;  // [tasks * rows, classes]; they become logits, or derivatives by the sums
  int64_t tasks, rows, classes;
  const int64_t* labels;  // [tasks * rows]
  const bool* present;    // [tasks, classes], null: all
  const A* scale;         // [tasks]
  const A* v;             // derivatives are those of v [tasks] times the losses; null: 1
  Logits<A> logits;
  bool derivatives, are_logits;  // are_logits: what is given are logits already
  A *loss, *right, *d_scale;     // [tasks * rows], 0 where a row does not count

  FM_HD bool counted(int64_t i) const { return labels[i] >= 0 && labels[i] < classes; }
  FM_HD A v_of(int64_t task) const { return v == nullptr ? A(1) : v[task]; }
};

template <typename A>
FM_HD void few_classes(const Batch<A>& g, int64_t begin, int64_t end) {
  using Few = FewClasses<A>;
  alignas(64) Few few;
  few.n = int(g.classes), few.logits = g.logits;
  int64_t t = begin / g.rows, left = (t + 1) * g.rows - begin;  // of task t
  for (int64_t i = begin; i < end; i += Few::kRows) {
    const int64_t count = least(Few::kRows, end - i);
    int64_t task[Few::kRows];
    for (int64_t l = 0; l < count; ++l, --left) {
      if (left == 0) ++t, left = g.rows;
      task[l] = t;
      few.label[l] = g.counted(i + l) ? A(g.labels[i + l]) : A(0);
      few.scale[l] = g.scale[t], few.v[l] = g.v_of(t);
    }
    few.read(g.sums + i * g.classes, count);
    if (!g.are_logits) {
      few.to_logits();
      for (int64_t l = 0; g.present != nullptr && l < count; ++l) {
        few.leave_out(int(l), g.present + task[l] * g.classes);
      }
    }
    if (!g.derivatives) few.write(g.sums + i * g.classes, count);
    few.exponentials();
    alignas(64) A loss[Few::kRows], right[Few::kRows], d_scale[Few::kRows];
    if (g.loss != nullptr) few.losses(loss, right);
    if (g.derivatives) few.to_derivatives(d_scale);
    if (g.derivatives) few.write(g.sums + i * g.classes, count);
    for (int64_t l = 0; l < count; ++l) {
      const bool counted = g.counted(i + l);
      if (g.loss != nullptr) g.loss[i + l] = counted ? loss[l] : A(0);
      if (g.right != nullptr) g.right[i + l] = counted ? right[l] : A(0);
      if (!g.derivatives) continue;
      g.d_scale[i + l] = counted ? d_scale[l] : A(0);
      if (!counted) std::fill_n(g.sums + (i + l) * g.classes, g.classes, A(0));
    }
  }
}

template <typename L, typename A>
FM_HD void many_classes(const Batch<A>& g, int64_t begin, int64_t end, A* buffer) {
  for (int64_t i = begin; i < end; ++i) {
    const int64_t t = i / g.rows;
    A* const x = g.sums + i * g.classes;
    ManyClasses<L, A> many{x, buffer, g.classes, g.labels[i], g.scale[t], g.v_of(t), g.logits};
    const bool counted = g.counted(i);
    if (g.loss != nullptr) g.loss[i] = g.right[i] = 0;
    if (g.derivatives) g.d_scale[i] = 0;
    if (g.derivatives && !counted) {
      std::fill_n(x, g.classes, A(0));
      continue;
    }
    if (!g.are_logits) {
      many.to_logits();
      if (g.present != nullptr) many.leave_out(g.present + t * g.classes);
    }
    if (!counted) continue;
    many.exponentials();
    if (g.loss != nullptr) many.losses(g.loss + i, g.right + i);
    if (g.derivatives) many.to_derivatives(g.d_scale + i);
  }
}

template <typename A>
void for_rows(const Batch<A>& g) {
  const int64_t all = g.tasks * g.rows;
  const int64_t together = most(1, 4096 / most(g.classes, 1));
  parallel_units(ceil_div(all, together), together * g.classes * 16, [&](int64_t unit) {
    const int64_t begin = unit * together, end = least(begin + together, all);
    const bool few = g.classes <= FewClasses<A>::kMost;
    const std::unique_ptr<A[]> buffer(few ? nullptr : new A[size_t(g.classes)]);
    with_registers([&](auto bytes) FM_INLINE_LAMBDA {
      if (few) return few_classes(g, begin, end);
      many_classes<Lanes<A, bytes()>>(g, begin, end, buffer.get());
    });
  });
}

template <typename A>
Batch<A> batch_of(const Tensor& sums, const Tensor& labels, const Optional& present,
                  const Tensor& scale, Kind kind, double root) {
  Batch<A> g = {};
  g.sums = data_of<A>(sums);
  g.tasks = sums.size(0), g.rows = sums.size(1), g.classes = sums.size(2);
  g.labels = data_of<const int64_t>(labels), g.present = pointer_or_null<bool>(present);
  g.scale = data_of<const A>(scale);
  g.logits = {A(root), kind == Kind::kProduct};
  return g;
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
    Batch<A> g = batch_of<A>(logits, labels, present, scale, Kind(kind), root);
    g.loss = rows.get(), g.right = g.loss + T * Q;
    for_rows(g);
    for (int64_t t = 0; t < T; ++t) {
      const double share = share_of<double>(g.labels + t * Q, Q, C);
      double sum = 0, hits = 0;
      for (int64_t i = t * Q; i < (t + 1) * Q; ++i) sum += g.loss[i], hits += g.right[i];
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
    if (T * Q * C > 0) {  // an empty tensor has no address
      std::memcpy(data_of<A>(weights), data_of<A>(logits), size_t(T * Q * C) * sizeof(A));
    }
    const std::unique_ptr<A[]> numbers(new A[size_t(T * Q + T)]);
    const std::unique_ptr<bool[]> skip(new bool[size_t(T * Q)]);
    Batch<A> g = batch_of<A>(weights, labels, present, scale, Kind(kind), root);
    A* const v = numbers.get() + T * Q;
    for (int64_t t = 0; t < T; ++t) {
      v[t] = data_of<const A>(v_loss)[t] * share_of<A>(g.labels + t * Q, Q, C);
    }
    for (int64_t i = 0; i < T * Q; ++i) skip[i] = !g.counted(i);
    g.derivatives = g.are_logits = true;
    g.d_scale = numbers.get(), g.v = v;
    for_rows(g);
    for (int64_t t = 0; needs & 4 && t < T; ++t) {
      double sum = 0;
      for (int64_t i = t * Q; i < (t + 1) * Q; ++i) sum += g.d_scale[i];
      data_of<A>(d_scale)[t] = A(sum);
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
    Batch<A> g = batch_of<A>(sums, labels, present, scale, Kind(kind), root);
    g.loss = data_of<A>(loss), g.right = data_of<A>(right), g.d_scale = data_of<A>(d_scale);
    g.derivatives = gradient;
    for_rows(g);
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
      if (D > 0 && counts(label, C)) {  // an empty tensor has no address
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
