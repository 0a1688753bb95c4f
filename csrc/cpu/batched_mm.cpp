// Products of batches of matrices, for the layers that every task has weights of its own of.
#include "cpu/batched_mm_bf16.h"

#include <numeric>

#include "common/tensor.h"

namespace fastmeta {
namespace {

// Columns of a product that one unit of work takes, at most.
constexpr int64_t kColumns = 512;
// In `which` of batched_mms_: nothing is added to a product, or what lies where it is written.
constexpr int64_t kNothing = -2, kItself = -1;

// A product of all tasks, as the kernel reads it: [T, M, K] by [T, K, N] onto [T, M, N], or onto
// [1, M, N], the sum over tasks; base has the axes of the result, 1 where it is shared.
template <typename A>
struct Batch {
  Batch(const Tensor& a, const Tensor& b, const std::optional<Tensor>& base, const Tensor& to,
        bool bf16)
      : tasks(a.size(0)),
        m(a.size(1)),
        k(a.size(2)),
        n(b.size(2)),
        a_task(a.stride(0)),
        b_task(b.stride(0)),
        base_task(base ? stride(*base, 0) : 0),
        to_task(stride(to, 0)),
        sums(to.size(0) < tasks),
        group(sums ? grouped(a, b) : 1),
        width(sums ? share(n) : divided(tasks, n)),
        parts(ceil_div(n, width)),
        bf16(bf16),
        a_dense(a_task == m * k),
        b_dense(parts == 1 ? b_task == k * n : b.stride(1) == 1),
        first{m,
              n,
              k,
              static_cast<const A*>(a.const_data_ptr()),
              a.stride(1),
              a.stride(2),
              static_cast<const A*>(b.const_data_ptr()),
              b.stride(1),
              n == 1 ? 1 : b.stride(2),
              pointer_or_null<A>(base),
              base ? stride(*base, 1) : 0,
              static_cast<A*>(to.mutable_data_ptr()),
              to.stride(1)} {}

  static int64_t stride(const Tensor& t, int64_t axis) {
    return t.size(axis) == 1 ? 0 : t.stride(axis);
  }

  // Columns of a unit of work that has one task: few tasks keep all threads busy, and equally.
  static int64_t divided(int64_t tasks, int64_t n) {
    const int64_t threads = torch::stable::get_num_threads();
    const int64_t parts = ceil_div(n, kColumns), most_units = 4 * threads;
    if (n == 0 || tasks * parts >= most_units) return kColumns;
    const int64_t unit = threads / std::gcd(tasks, threads);  // parts that threads share equally
    return ceil_div(ceil_div(n, ceil_div(parts, unit) * unit), 32) * 32;
  }

  // Columns of a unit of work that has all tasks: as many units for every thread.
  static int64_t share(int64_t n) {
    if (n == 0) return kColumns;
    const int64_t threads = torch::stable::get_num_threads();
    const int64_t units = threads * ceil_div(n, threads * kColumns);
    return ceil_div(ceil_div(n, units), 32) * 32;
  }

  // Tasks of a sum that count as one, whose rows lie one after the other: more would not stay in a
  // cache. Where a task has one row, what is then the step between rows is none between its
  // numbers.
  static int64_t grouped(const Tensor& a, const Tensor& b) {
    const int64_t k = a.size(2);
    const bool adjacent = a.stride(0) == k * a.stride(2) && b.stride(0) == k * b.stride(1);
    const bool together = k > 1 || (b.stride(2) == 1 && (a.size(1) == 1 || a.stride(1) == 1));
    return adjacent && together ? most(1, batched::kDepth<A> / most(k, 1)) : 1;
  }

  bool empty() const { return tasks == 0 || m == 0 || n == 0; }

  // Sixteen multiplications count as one element.
  int64_t work() const { return m * k * n / 16; }

  batched::Product<A> of_task(int64_t t) const {
    batched::Product<A> p = first;
    p.a += t * a_task;
    p.b += t * b_task;
    if (p.base != nullptr) p.base += t * base_task;
    p.to += t * to_task;
    return p;
  }

  // What the part of a task's product reads, where its numbers lie together.
  batched::Ahead operands(int64_t t, int64_t part) const {
    batched::Ahead ahead;
    const int64_t from = part * width, rows = k * least(group, tasks - t);
    if (part == 0 && a_dense) {
      ahead.at = reinterpret_cast<const char*>(first.a + t * a_task);
      ahead.lines = ceil_div(m * rows * sizeof(A), 64);
    }
    if (b_dense) {
      const int64_t offset = parts == 1 ? 0 : from * first.b_column;
      ahead.then = reinterpret_cast<const char*>(first.b + t * b_task + offset);
      ahead.then_lines = ceil_div(rows * least(n - from, width) * sizeof(A), 64);
    }
    return ahead;
  }

  // The part of a task's product; where they are summed, of a group of tasks from this one on.
  void run_part(int64_t t, int64_t part, batched::Memory<A>& memory, batched::Ahead ahead) const {
    auto own = of_task(t);
    own.k *= least(group, tasks - t);
    if (sums && t > 0) {
      own.base = own.to;
      own.base_row = own.to_row;
    }
    const int64_t from = part * width, to = least(n, from + width);
    if (bf16) return batched::run_bf16(own, from, to, memory, ahead);
    batched::run(&own, 1, from, to, memory, ahead);
  }

  // Notes which operands another product of the task has in a cache already.
  void knows(const Batch& other) {
    for (const A* known : {other.first.a, other.first.b, const_cast<const A*>(other.first.to)}) {
      a_dense = a_dense && first.a != known;
      b_dense = b_dense && first.b != known;
    }
  }

  bool reads_more() const { return a_dense || b_dense; }

  int64_t tasks, m, k, n, a_task, b_task, base_task, to_task;
  bool sums;             // over tasks
  int64_t group;         // of tasks whose rows are summed at once
  int64_t width, parts;  // of the columns that one unit of work takes, in as many units
  bool bf16;             // factors are rounded to it
  // what can be fetched, all of a task's numbers lying together: A, and the part of B whose columns
  // a unit takes
  bool a_dense, b_dense;
  batched::Product<A> first;
};

template <typename A>
void multiply(const Batch<A>& batch) {
  if (batch.empty()) return;
  const int64_t tasks = batch.tasks, parts = batch.parts;
  if (batch.sums) {
    return parallel_ranges(parts, batch.work() * tasks / parts, [&](int64_t begin, int64_t end) {
      batched::Memory<A> memory;
      for (int64_t part = begin; part < end; ++part) {
        for (int64_t t = 0; t < tasks; t += batch.group) {
          const int64_t next = t + batch.group;
          const auto ahead = next < tasks ? batch.operands(next, part) : batched::Ahead{};
          batch.run_part(t, part, memory, ahead);
        }
      }
    });
  }
  if (tasks > 1 && batch.b_task == 0 && !batch.bf16) {
    const auto tasks_range = [&](int64_t begin, int64_t end) {
      batched::Memory<A> memory;
      std::vector<batched::Product<A>> products;
      for (int64_t t = begin; t < end; ++t) products.push_back(batch.of_task(t));
      batched::run(products.data(), end - begin, 0, batch.n, memory, batched::Ahead{});
    };
    return parallel_ranges(tasks, batch.work(), tasks_range);
  }
  const auto range = [&](int64_t begin, int64_t end) {
    batched::Memory<A> memory;
    for (int64_t unit = begin; unit < end; ++unit) {
      batched::Ahead ahead;
      if (unit + 1 < end) ahead = batch.operands((unit + 1) / parts, (unit + 1) % parts);
      batch.run_part(unit / parts, unit % parts, memory, ahead);
    }
  };
  parallel_ranges(tasks * parts, batch.work() / parts, range);
}

// Products of the same tasks: all of one task before the next one's, so that what they share is
// still in a cache. One product after the other where there are too few tasks for the threads.
template <typename A>
void multiply(std::vector<Batch<A>>& batches) {
  const size_t count = batches.size();
  const int64_t tasks = batches[0].tasks, threads = torch::stable::get_num_threads();
  bool alone = count == 1;
  for (const auto& batch : batches) alone = alone || batch.sums || batch.tasks != tasks;
  if (alone || (tasks % threads != 0 && tasks < 4 * threads)) {
    for (const auto& batch : batches) multiply(batch);
    return;
  }
  int64_t work = 0;
  for (size_t i = 0; i < count; ++i) {
    work += batches[i].work();
    for (size_t j = 0; j < i; ++j) batches[i].knows(batches[j]);
  }
  const auto range = [&](int64_t begin, int64_t end) {
    batched::Memory<A> memory;
    for (int64_t t = begin; t < end; ++t) {
      for (size_t i = 0; i < count; ++i) {
        const Batch<A>& batch = batches[i];
        if (batch.empty()) continue;
        size_t next = i + 1;
        while (next < count && !batches[next].reads_more()) ++next;
        batched::Ahead ahead;
        if (next < count) {
          ahead = batches[next].operands(t, 0);
        } else if (t + 1 < end) {
          ahead = batches[0].operands(t + 1, 0);
        }
        for (int64_t part = 0; part < batch.parts; ++part) {
          const bool more = part + 1 < batch.parts;
          batch.run_part(t, part, memory, more ? batch.operands(t, part + 1) : ahead);
        }
      }
    }
  };
  parallel_ranges(tasks, work, range);
}

// The tensor, or a copy of it where neither its rows nor its columns are adjacent.
Tensor readable(const Tensor& t, bool columns) {
  const bool fits =
      t.size(2) <= 1 || t.stride(2) == 1 || (!columns && (t.size(1) <= 1 || t.stride(1) == 1));
  return fits ? t : torch::stable::contiguous(t);
}

void check(const Tensor& a, const Tensor& b, const Tensor& to) {
  const bool fits = a.dim() == 3 && b.dim() == 3 && to.dim() == 3 && a.size(0) == b.size(0) &&
                    a.size(2) == b.size(1) &&
                    (to.size(0) == a.size(0) || (to.size(0) == 1 && a.size(0) > 1)) &&
                    to.size(1) == a.size(1) && to.size(2) == b.size(2) &&
                    a.scalar_type() == b.scalar_type() && a.scalar_type() == to.scalar_type();
  STD_TORCH_CHECK(fits, "fastmeta: batched_mm expects [T, M, K] by [T, K, N] of one dtype");
}

void check_dtype(const Tensor& t) {
  const Type type = type_of(t.scalar_type());
  STD_TORCH_CHECK(type == Type::kFloat || type == Type::kDouble,
                  "fastmeta: batched_mm takes float32 and float64");
}

void check_written(const Tensor& to) {
  STD_TORCH_CHECK(to.size(2) <= 1 || to.stride(2) == 1,
                  "fastmeta: batched_mms_ writes adjacent columns");
}

std::optional<Tensor> checked_base(const Tensor& base, const Tensor& to) {
  for (int64_t axis = 0; axis < 3; ++axis) {
    const int64_t size = base.size(axis);
    STD_TORCH_CHECK(size == to.size(axis) || (size == 1 && axis < 2),
                    "fastmeta: the base of batched_mm does not fit its result");
  }
  return readable(base, true);
}

void dispatch(const Tensor& a, const Tensor& b, const std::optional<Tensor>& base, const Tensor& to,
              bool bf16) {
  const Tensor left = readable(a, false), right = readable(b, false);
  if (type_of(a.scalar_type()) == Type::kDouble) {
    multiply(Batch<double>(left, right, base, to, bf16));
  } else {
    check_dtype(a);
    multiply(Batch<float>(left, right, base, to, bf16));
  }
}

Tensor batched_mm(Tensor a, Tensor b, std::optional<Tensor> base, bool bf16) {
  const Tensor to = empty_rows({a.size(0), a.size(1), b.size(2)}, a.scalar_type(), a);
  check(a, b, to);
  if (base) base = checked_base(*base, to);
  dispatch(a, b, base, to, bf16);
  return to;
}

template <typename A>
void run_together(const std::vector<Tensor>& to, const std::vector<Tensor>& a,
                  const std::vector<Tensor>& b, const std::vector<std::optional<Tensor>>& base,
                  const std::vector<int64_t>& bf16) {
  std::vector<Batch<A>> batches;
  for (size_t i = 0; i < to.size(); ++i) batches.emplace_back(a[i], b[i], base[i], to[i], bf16[i]);
  multiply(batches);
}

void batched_mms_(std::vector<Tensor> to, std::vector<Tensor> a, std::vector<Tensor> b,
                  std::vector<Tensor> bases, std::vector<int64_t> which,
                  std::vector<int64_t> bf16) {
  const size_t count = to.size();
  STD_TORCH_CHECK(count > 0 && a.size() == count && b.size() == count && which.size() == count &&
                      bf16.size() == count,
                  "fastmeta: batched_mms_ expects as many results as factors");
  check_dtype(to[0]);
  std::vector<std::optional<Tensor>> base(count);
  for (size_t i = 0; i < count; ++i) {
    check(a[i], b[i], to[i]);
    check_written(to[i]);
    STD_TORCH_CHECK(to[i].scalar_type() == to[0].scalar_type(),
                    "fastmeta: batched_mms_ expects products of one dtype");
    STD_TORCH_CHECK(which[i] >= kNothing && which[i] < static_cast<int64_t>(bases.size()),
                    "fastmeta: batched_mms_ has no such base");
    // A product may read what one before it wrote: that has adjacent columns and is not copied.
    a[i] = readable(a[i], false);
    b[i] = readable(b[i], false);
    if (which[i] == kItself) base[i] = to[i];
    if (which[i] >= 0) base[i] = checked_base(bases[which[i]], to[i]);
  }
  if (type_of(to[0].scalar_type()) == Type::kDouble) {
    run_together<double>(to, a, b, base, bf16);
  } else {
    run_together<float>(to, a, b, base, bf16);
  }
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastmeta, CPU, m) {
  m.impl("batched_mm", TORCH_BOX(&batched_mm));
  m.impl("batched_mms_", TORCH_BOX(&batched_mms_));
}

}  // namespace fastmeta
