// Products of a few rows of one task with its matrices of low rank, and how rows are divided.
#pragma once

#include <vector>

#include "cpu/dense.h"

namespace fastmeta {

// Rows [first, last) that are worked on together: whole tasks [task, end_task), or a part of one,
// whose sums over rows then go to a slot of their own.
struct Unit {
  int64_t task, end_task, first, last, slot;
};

// How the rows of T tasks are divided, by their number and the width of a row alone.
struct Plan {
  const int64_t* offsets;  // null: all tasks have `rows`
  int64_t tasks, rows, panel;
  std::vector<Unit> units;
  int64_t slots = 0, wanted = 0;

  Plan(int64_t all_rows, int64_t tasks, int64_t width, const std::optional<Tensor>& given)
      : offsets(pointer_or_null<int64_t>(given)),
        tasks(tasks),
        rows(all_rows / most(tasks, 1)),
        panel(most(64, least(256, kPanel / most(width, 1) / 16 * 16))) {
    if (offsets != nullptr) check(all_rows);
    // as many units of equal height as make no more than a panel, a multiple of 4 for the threads
    wanted = ceil_div(ceil_div(all_rows, panel), 4) * 4;
    Unit open{0, 0, 0, 0, -1};
    int64_t full = 1;  // units that the rows so far would fill
    const auto close = [&](int64_t task, int64_t row) {
      if (open.end_task > open.task) units.push_back(open);
      open = {task, task, row, row, -1};
    };
    for (int64_t t = 0; t < tasks; ++t) {
      const int64_t begin = start(t), end = start(t + 1), count = end - begin;
      if (count > panel) close(t, begin);
      const int64_t parts = ceil_div(count, kParts * panel);
      for (int64_t p = 0; parts > 1 && p < parts; ++p) {
        units.push_back(
            {t, t + 1, begin + count * p / parts, begin + count * (p + 1) / parts, slots++});
      }
      if (parts > 1) {
        open = {t + 1, t + 1, end, end, -1};
        continue;
      }
      open.end_task = t + 1;
      open.last = end;
      if (end * wanted >= full * all_rows) close(t + 1, end);
      while (full * all_rows <= end * wanted && full <= wanted) ++full;
    }
    close(tasks, all_rows);
  }

  int64_t start(int64_t task) const { return offsets == nullptr ? task * rows : offsets[task]; }

  int64_t total() const { return start(tasks); }

  // Runs a pass: for every unit, panel by panel, pass.segment(work, task, begin, end) for the rows
  // of each task in it and then pass.dense(work, first, last). An unpacked weight serves a whole
  // unit. The last segment of a task that is not divided is followed by pass.keep(work, task), each
  // part of one that is by pass.keep_part(work, slot).
  template <typename Pass>
  void run(Pass& pass) const {
    parallel_ranges(int64_t(units.size()), ceil_div(total(), most(wanted, 1)) * pass.width(),
                    [&](int64_t from, int64_t to) {
                      auto work = pass.work();
                      for (int64_t u = from; u < to; ++u) {
                        const Unit& unit = units[u];
                        const int64_t count = unit.last - unit.first;
                        const int64_t panels =
                            unit.end_task - unit.task > 1 ? 1 : most(1, ceil_div(count, panel));
                        for (int64_t p = 0; p < panels; ++p) {
                          const int64_t first = unit.first + count * p / panels;
                          const int64_t last = unit.first + count * (p + 1) / panels;
                          for (int64_t t = unit.task; t < unit.end_task; ++t) {
                            const int64_t end = least(last, start(t + 1));
                            pass.segment(work, t, most(first, start(t)), end);
                            if (unit.slot < 0 && end == start(t + 1)) pass.keep(work, t);
                          }
                          if (!pass.packed()) pass.dense(work, first, last);
                        }
                        if (pass.packed()) pass.dense(work, unit.first, unit.last);
                        if (unit.slot >= 0) pass.keep_part(work, unit.slot);
                      }
                    });
  }

 private:
  static constexpr int64_t kPanel = 196608;  // numbers in the rows of a panel: they stay in L2
  static constexpr int64_t kParts = 4;       // panels in a unit

  void check(int64_t all_rows) const {
    bool rises = offsets[0] == 0 && offsets[tasks] == all_rows;
    for (int64_t t = 0; t < tasks; ++t) rises = rises && offsets[t] <= offsets[t + 1];
    STD_TORCH_CHECK(rises, "lora_linear: offsets must rise from 0 to the number of rows");
  }
};

// Columns that whole lanes cover.
template <typename A>
int64_t padded(int64_t columns) {
  return ceil_div(columns, 64 / int64_t(sizeof(A))) * (64 / int64_t(sizeof(A)));
}

// Rows in the type of computation: themselves, or a copy.
template <typename S, typename A>
Matrix<A> widened(const Matrix<S>& x, int64_t rows, int64_t columns, std::vector<A>& buffer) {
  if constexpr (std::is_same_v<S, A>) {
    return x;
  } else {
    buffer.resize(size_t(rows * columns));
    for (int64_t i = 0; i < rows; ++i) {
      const S* const from = x[i];
      A* const to = buffer.data() + i * columns;
      for (int64_t j = 0; j < columns; ++j) to[j] = A(from[j]);
    }
    return {buffer.data(), columns, 1};
  }
}

template <typename S, typename A>
void narrow(const A* from, int64_t count, S* to) {
  for (int64_t i = 0; i < count; ++i) to[i] = S(from[i]);
}

// A matrix [rows, columns], times a number, to `to`, whose rows are `width` apart.
template <typename S, typename A>
void pack(const Matrix<S>& from, int64_t rows, int64_t columns, A* to, int64_t width,
          A scale = A(1)) {
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = 0; j < columns; ++j)
      to[i * width + j] = scale * A(from.data[i * from.row + j * from.column]);
  }
}

// A few columns for each row of a task, and the matrix that they are coefficients of.
template <typename A>
struct Coefficients {
  std::vector<A> left, right;  // [rows, width], [rank, columns]
  int64_t width = 0, rank = 0, columns = 0;

  void start(int64_t rows, int64_t most_rank, int64_t to_columns) {
    width = padded<A>(most_rank) + padded<A>(1);
    rank = 0;
    columns = to_columns;
    left.resize(size_t(rows * width));
    right.resize(size_t(most_rank * columns) + padded<A>(1));  // whole vectors are read
  }
  A* column() { return left.data() + rank; }
  A* row() { return right.data() + rank * columns; }
  // A column of ones, for a vector that every row gets.
  void ones(int64_t rows) {
    for (int64_t i = 0; i < rows; ++i) left[size_t(i * width + rank)] = A(1);
    ++rank;
  }
};

// to [rows, columns] = left right, by way of a buffer where `to` is narrow.
template <typename S, typename A>
void multiply(const Coefficients<A>& c, int64_t rows, S* to, std::vector<A>& buffer,
              batched::Memory<A>& memory) {
  if constexpr (!std::is_same_v<S, A>) {
    buffer.resize(size_t(rows * c.columns));
    multiply(c, rows, buffer.data(), buffer, memory);
    narrow(buffer.data(), rows * c.columns, to);
  } else {
    batched::run({rows, c.columns, c.rank, c.left.data(), c.width, 1, c.right.data(), c.columns, 1,
                  nullptr, 0, to, c.columns},
                 memory);
  }
}

// to [rows, r] = x m (+ to), where m [columns, padded r] is packed.
template <typename A>
void shrink(int64_t rows, int64_t columns, int64_t rank, const Matrix<A>& x, const A* m, bool add,
            A* to, int64_t ldto, batched::Memory<A>& memory) {
  batched::Product<A> p{
      rows, rank, columns, x.data, x.row, 1, m, padded<A>(rank), 1, add ? to : nullptr,
      ldto, to,   ldto};
  p.panel_step = batched::kPanel<A>;  // its columns lie in panels, side by side
  batched::run(p, memory);
}

// to [rank, columns] += left^T x over rows.
template <typename A>
void add_outer(int64_t rows, int64_t rank, int64_t columns, const A* left, int64_t ldleft,
               const Matrix<A>& x, A* to, batched::Memory<A>& memory) {
  batched::run({rank, columns, rows, left, 1, ldleft, x.data, x.row, 1, to, columns, to, columns},
               memory);
}

}  // namespace fastmeta
