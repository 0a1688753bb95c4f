// Products of batches of matrices, for the layers that every task has weights of its own of.
#include "cpu/batched_mm.h"

#include "common/tensor.h"

namespace fastmeta {
namespace {

// Columns of a product that one unit of work takes: one task alone keeps several threads busy.
constexpr int64_t kColumns = 512;

// [T, M, K] by [T, K, N] onto [T, M, N]; base has the same axes, 1 where it is shared.
template <typename A>
void multiply(const Tensor& a, const Tensor& b, const std::optional<Tensor>& base,
              const Tensor& to) {
  const int64_t tasks = a.size(0), m = a.size(1), k = a.size(2), n = b.size(2);
  const A* const a_data = static_cast<const A*>(a.const_data_ptr());
  const A* const b_data = static_cast<const A*>(b.const_data_ptr());
  const A* const base_data = pointer_or_null<A>(base);
  A* const to_data = static_cast<A*>(to.mutable_data_ptr());
  const auto stride = [](const Tensor& t, int64_t axis) {
    return t.size(axis) == 1 ? 0 : t.stride(axis);
  };
  const int64_t base_task = base ? stride(*base, 0) : 0, base_row = base ? stride(*base, 1) : 0;
  if (tasks == 0 || m == 0 || n == 0) return;
  const int64_t parts = ceil_div(n, kColumns);
  // where all of a task's numbers lie together: A, and the part of B whose columns a unit takes
  const bool a_dense = a.stride(0) == m * k,
             b_dense = parts == 1 ? b.stride(0) == k * n : b.stride(1) == 1;
  const auto after = [&](int64_t unit, int64_t end) {
    batched::Ahead ahead;
    if (++unit >= end) return ahead;
    const int64_t t = unit / parts, first = unit % parts * kColumns;
    if (first == 0 && a_dense) {
      ahead.at = reinterpret_cast<const char*>(a_data + t * a.stride(0));
      ahead.lines = ceil_div(m * k * sizeof(A), 64);
    }
    if (b_dense) {
      const int64_t from = parts == 1 ? 0 : first * b.stride(2);
      ahead.then = reinterpret_cast<const char*>(b_data + t * b.stride(0) + from);
      ahead.then_lines = ceil_div(k * least(n - first, kColumns) * sizeof(A), 64);
    }
    return ahead;
  };
  const auto product = [&](int64_t t) {
    return batched::Product<A>{m,
                               n,
                               k,
                               a_data + t * a.stride(0),
                               a.stride(1),
                               a.stride(2),
                               b_data + t * b.stride(0),
                               b.stride(1),
                               n == 1 ? 1 : b.stride(2),
                               base_data == nullptr ? nullptr : base_data + t * base_task,
                               base_row,
                               to_data + t * to.stride(0),
                               to.stride(1)};
  };
  if (tasks > 1 && b.stride(0) == 0) {
    const auto tasks_range = [&](int64_t begin, int64_t end) {
      std::vector<A> panel;
      std::vector<batched::Product<A>> products;
      for (int64_t t = begin; t < end; ++t) products.push_back(product(t));
      batched::run(products.data(), end - begin, 0, n, panel, batched::Ahead{});
    };
    return parallel_ranges(tasks, m * k * n / 16, tasks_range);
  }
  const auto range = [&](int64_t begin, int64_t end) {
    std::vector<A> panel;
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t first = unit % parts * kColumns;
      const auto own = product(unit / parts);
      batched::run(&own, 1, first, least(n, first + kColumns), panel, after(unit, end));
    }
  };
  // sixteen multiplications count as one element
  parallel_ranges(tasks * parts, m * k * least(n, kColumns) / 16, range);
}

// The tensor, or a copy of it where neither its rows nor its columns are adjacent.
Tensor readable(const Tensor& t, bool columns) {
  const bool fits =
      t.size(2) <= 1 || t.stride(2) == 1 || (!columns && (t.size(1) <= 1 || t.stride(1) == 1));
  return fits ? t : torch::stable::contiguous(t);
}

void check(const Tensor& a, const Tensor& b, const Tensor& to) {
  const bool fits = a.dim() == 3 && b.dim() == 3 && to.dim() == 3 && a.size(0) == b.size(0) &&
                    a.size(2) == b.size(1) && to.size(0) == a.size(0) && to.size(1) == a.size(1) &&
                    to.size(2) == b.size(2) && a.scalar_type() == b.scalar_type() &&
                    a.scalar_type() == to.scalar_type();
  STD_TORCH_CHECK(fits, "fastmeta: batched_mm expects [T, M, K] by [T, K, N] of one dtype");
}

void dispatch(const Tensor& a, const Tensor& b, const std::optional<Tensor>& base,
              const Tensor& to) {
  const Tensor left = readable(a, false), right = readable(b, false);
  if (type_of(a.scalar_type()) == Type::kDouble) {
    multiply<double>(left, right, base, to);
  } else {
    STD_TORCH_CHECK(type_of(a.scalar_type()) == Type::kFloat,
                    "fastmeta: batched_mm takes float32 and float64");
    multiply<float>(left, right, base, to);
  }
}

Tensor batched_mm(Tensor a, Tensor b, std::optional<Tensor> base) {
  const Tensor to = empty_rows({a.size(0), a.size(1), b.size(2)}, a.scalar_type(), a);
  check(a, b, to);
  if (base) {
    for (int64_t axis = 0; axis < 3; ++axis) {
      const int64_t size = base->size(axis);
      STD_TORCH_CHECK(size == to.size(axis) || (size == 1 && axis < 2),
                      "fastmeta: the base of batched_mm does not fit its result");
    }
    base = readable(*base, true);
  }
  dispatch(a, b, base, to);
  return to;
}

void batched_mm_(Tensor to, Tensor a, Tensor b, bool accumulate) {
  check(a, b, to);
  STD_TORCH_CHECK(to.size(2) <= 1 || to.stride(2) == 1,
                  "fastmeta: batched_mm_ writes adjacent columns");
  dispatch(a, b, accumulate ? std::optional<Tensor>(to) : std::nullopt, to);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastmeta, CPU, m) {
  m.impl("batched_mm", TORCH_BOX(&batched_mm));
  m.impl("batched_mm_", TORCH_BOX(&batched_mm_));
}

}  // namespace fastmeta
