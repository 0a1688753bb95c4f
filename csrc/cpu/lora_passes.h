// The passes over rows: a linear layer with low-rank terms, its gradient and the derivative of
// that. While a panel of rows is in the cache, the few columns of its low-rank term are computed;
// their product and the one with the shared weight are summed in registers. Where S, the type of
// rows and weights, is not A, that of computation, the weight has few bits, or its product rounds
// its factors to bfloat16, the first product is written and the second added. Sums over rows are
// taken from the same panel.
#pragma once

#include <deque>

#include "cpu/low_rank.h"

namespace fastmeta {

using Optional = std::optional<Tensor>;

constexpr int64_t kX = 1, kBias = 4, kDy = 4, kA = 8, kB = 16;  // bits of `needs`

// A contiguous matrix, or that of one task; no data where it is missing.
template <typename S>
Matrix<S> matrix(const Tensor& t, int64_t task = 0) {
  const auto* data = static_cast<const S*>(t.const_data_ptr());
  if (t.dim() < 3) return {data, t.dim() < 2 ? 0 : t.stride(0), 1};
  return {data + task * t.stride(0), t.stride(1), 1};
}
template <typename S>
Matrix<S> matrix(const Optional& t, int64_t task = 0) {
  return t ? matrix<S>(*t, task) : Matrix<S>{nullptr, 0, 1};
}
template <typename S>
Matrix<S> from_row(const Matrix<S>& x, int64_t row) {
  return {x[row], x.row, x.column};
}
template <typename S>
S* writable(const S* data) {
  return const_cast<S*>(data);
}

// What a thread works with.
template <typename A>
struct Work {
  std::vector<A> x, dy, gx, out;    // rows in the type of computation
  std::vector<A> a, b, sums;        // factors of a task, and sums over its rows
  Coefficients<A> alone;            // of rows that are not multiplied by the weight
  std::deque<Coefficients<A>> own;  // of those that are, task by task of a panel; `used` of them
  size_t used = 0;
  std::vector<batched::Product<A>> products;  // of a panel
  batched::Memory<A> memory;

  Work(int64_t K, int64_t N, int64_t r, int64_t of_sums)
      : a(size_t(K * padded<A>(r))), b(size_t(N * padded<A>(r))), sums(size_t(of_sums)) {}

  Coefficients<A>& next() {
    if (used == own.size()) own.emplace_back();
    return own[used];
  }
};

// What all passes are given.
template <typename S>
struct Layer {
  using A = acc_t<S>;
  int64_t K, N, r;
  Matrix<S> x;
  Weight<S> weight;
  Tensor a, b;
  A scale;
  bool transposed = false;         // the weight maps inputs to outputs
  bool alone = false;              // one unit has all rows: its columns are shared by the threads
  batched::Product<A> shared{};    // by the weight, of no rows yet
  Tensor panels{};                 // of the weight
  const int32_t* pairs = nullptr;  // the same in bfloat16

  // Before the pass multiplies by the weight. Several units read it repacked, unless it is larger
  // than caches.
  void prepare(bool to_outputs, const Plan& plan) {
    transposed = to_outputs;
    alone = plan.units.size() == 1;
    if constexpr (std::is_same_v<S, A>) {
      if (packed()) return;
      const Matrix<S>& b = transposed ? weight.full.transposed() : weight.full;
      shared.n = transposed ? N : K;
      shared.k = transposed ? K : N;
      shared.a_column = 1;
      shared.b = b.data;
      shared.b_row = b.row;
      shared.b_column = b.column;
      const int64_t rows = plan.total();
      if (rows == 0 || plan.units.size() < 2) return;
      if constexpr (sizeof(A) == 4) {
        if (weight.bf16 && batched::has_pairs()) {
          if (auto* to = room<int32_t>(batched::pair_panels_size(shared.n, shared.k))) {
            batched::repack_pairs(shared, to);
            pairs = to;
          }
          return;
        }
      }
      if (!weight.bf16 && batched::in_place(shared, rows)) return;
      if (auto* to = room<A>(batched::panels_size<A>(shared.n, shared.k))) {
        batched::repack(shared, to);
        if (weight.bf16) batched::round(shared, to);
      }
    }
  }
  int64_t width() const { return K + N; }
  bool packed() const { return weight.packed(); }

  // A task's rows in a panel that are worth a product of their own, in which its terms are summed
  // with the rest; fewer get their terms first, and are multiplied by the weight together. A result
  // may depend on its task's number of rows, but on no register's width.
  static constexpr int64_t kFewRows = 12;

  // to = the terms `c` of a task + from [rows, k] times the weight as [k, n]. Of the second nothing
  // yet: `finish` comes when all rows of a panel are here.
  void add(Work<A>& w, const Coefficients<A>& c, int64_t rows, const Matrix<S>& from,
           const Matrix<S>& to) const {
    if constexpr (std::is_same_v<S, A>) {
      if (!packed()) {
        auto& all = w.products;
        batched::Product<A> p = shared;
        p.m = rows;
        p.a = from.data;
        p.a_row = from.row;
        p.to = writable(to.data);
        p.to_row = to.row;
        if (rows >= kFewRows && !weight.bf16) {
          p.rank = c.rank;
          p.low = c.left.data();
          p.low_row = c.width;
          p.wide = c.right.data();
          p.wide_row = c.columns;
          ++w.used;
          return all.push_back(p);
        }
        fastmeta::multiply(c, rows, p.to, w.out, w.memory);
        p.base = p.to;
        p.base_row = p.to_row;
        // rows come one after another
        if (all.empty() || all.back().base == nullptr) return all.push_back(p);
        all.back().m += rows;
        return;
      }
    }
    fastmeta::multiply(c, rows, writable(to.data), w.out, w.memory);
  }
  // Adds the product with the weight of a panel's rows, which `add` has seen all.
  void finish(Work<A>& w, int64_t rows, const Matrix<S>& from, const Matrix<S>& to) const {
    if constexpr (std::is_same_v<S, A>) {
      if (!packed()) return finish(w, rows, from);
    }
    if (transposed) return weight.forward(rows, from, to, w.memory, alone);
    weight.backward(rows, from, to, w.memory, alone);
  }

 private:
  static constexpr int64_t kMostPanels = 32 << 20;  // bytes

  // For so many numbers of a repacked weight; null if they are too many.
  template <typename F>
  F* room(int64_t size) {
    if (size * int64_t(sizeof(F)) > kMostPanels) return nullptr;
    panels = empty_rows({size}, sizeof(F) == 4 ? ScalarType::Int : a.scalar_type(), a);
    return static_cast<F*>(panels.mutable_data_ptr());
  }

  // Columns [first, last) of the products of a panel's rows.
  void multiply(const std::vector<batched::Product<A>>& all, int64_t first, int64_t last,
                batched::Memory<A>& memory, batched::Ahead ahead) const {
    if (!weight.bf16)
      return batched::run(all.data(), int64_t(all.size()), first, last, memory, ahead);
    for (const auto& p : all) batched::run_bf16(p, first, last, memory, ahead, pairs);
  }

  void finish(Work<A>& w, int64_t rows, const Matrix<A>& from) const {
    const auto& all = w.products;
    const int64_t n = shared.n;
    if (alone && n > 0) {
      const int64_t threads = torch::stable::get_num_threads();
      const int64_t width = ceil_div(ceil_div(n, threads), 32) * 32;
      parallel_units(ceil_div(n, width), rows * shared.k * width / 16, [&](int64_t part) {
        batched::Memory<A> own;
        const int64_t end = least(n, (part + 1) * width);
        multiply(all, part * width, end, own, batched::Ahead{});
      });
    } else {
      batched::Ahead ahead;  // the next panel's rows
      ahead.at = reinterpret_cast<const char*>(from[rows]);
      ahead.lines = rows * from.row * int64_t(sizeof(A)) / 64;
      multiply(all, 0, n, w.memory, ahead);
    }
    w.products.clear();
    w.used = 0;
  }
};

template <typename S>
struct LoraForward : Layer<S> {
  using A = acc_t<S>;
  Optional bias;
  Matrix<S> y;
  A* s;

  Work<A> work() const { return {this->K, this->N, this->r, 0}; }

  void segment(Work<A>& w, int64_t task, int64_t begin, int64_t end) const {
    const int64_t rows = end - begin, K = this->K, N = this->N, r = this->r;
    const Matrix<A> x = widened(from_row(this->x, begin), rows, K, w.x);
    pack(matrix<S>(this->a, task).transposed(), K, r, w.a.data(), padded<A>(r), this->scale);
    auto& c = w.next();
    c.start(rows, r + 1, N);
    shrink(rows, K, r, x, w.a.data(), false, c.column(), c.width, w.memory);
    for (int64_t i = 0; i < rows; ++i) {
      std::copy_n(c.left.data() + i * c.width, r, s + (begin + i) * r);
    }
    pack(matrix<S>(this->b, task).transposed(), r, N, c.row(), N);
    c.rank = r;
    if (bias) {
      const Matrix<S> own = from_row(matrix<S>(bias), bias->size(0) > 1 ? task : 0);
      pack(own, 1, N, c.row(), N);
      c.ones(rows);
    }
    this->add(w, c, rows, from_row(this->x, begin), from_row(y, begin));
  }
  void dense(Work<A>& w, int64_t first, int64_t last) const {
    this->finish(w, last - first, from_row(this->x, first), from_row(y, first));
  }
  void keep(Work<A>&, int64_t) const {}
  void keep_part(Work<A>&, int64_t) const {}
};

// Sums over the rows of every task: dA [r, K], dB^T and dbias [r + 1, N], where they are wanted.
template <typename S>
struct Sums {
  using A = acc_t<S>;
  int64_t r, K, N;
  Tensor d_a, d_b, d_bias;
  std::vector<A> parts{};

  int64_t size() const { return r * K + (r + 1) * N; }
  A* of_b(std::vector<A>& sums) const { return sums.data() + r * K; }

  void write(int64_t task, const A* sums) const {
    const A* const b = sums + r * K;
    if (d_a.numel() > 0) narrow(sums, r * K, writable(matrix<S>(d_a, task).data));
    if (d_bias.numel() > 0) narrow(b + r * N, N, writable(matrix<S>(d_bias)[task]));
    if (d_b.numel() == 0) return;
    S* const to = writable(matrix<S>(d_b, task).data);
    for (int64_t j = 0; j < N; ++j) {
      for (int64_t q = 0; q < r; ++q) to[j * r + q] = S(b[q * N + j]);
    }
  }
  void keep(std::vector<A>& sums, int64_t task) const {
    write(task, sums.data());
    std::fill(sums.begin(), sums.end(), A(0));
  }
  void keep_part(std::vector<A>& sums, int64_t slot) {
    std::copy(sums.begin(), sums.end(), parts.begin() + slot * size());
    std::fill(sums.begin(), sums.end(), A(0));
  }
  // Adds up the parts of divided tasks, in their order.
  void finish(const Plan& plan) {
    int64_t task = -1;
    A* total = nullptr;
    for (const Unit& unit : plan.units) {
      if (unit.slot < 0) continue;
      A* const part = parts.data() + unit.slot * size();
      if (unit.task != task) {
        if (total != nullptr) write(task, total);
        task = unit.task;
        total = part;
      } else {
        for (int64_t i = 0; i < size(); ++i) total[i] += part[i];
      }
    }
    if (total != nullptr) write(task, total);
  }
};

template <typename S>
struct LoraBackward : Layer<S> {
  using A = acc_t<S>;
  int64_t needs;
  Matrix<S> dy, dx;
  const A* s;
  Sums<S> sums;

  Work<A> work() const { return {this->K, this->N, this->r, sums.size()}; }

  void segment(Work<A>& w, int64_t task, int64_t begin, int64_t end) const {
    const int64_t rows = end - begin, K = this->K, N = this->N, r = this->r;
    const Matrix<A> dy = widened(from_row(this->dy, begin), rows, N, w.dy);
    if (needs & (kX | kA)) {
      auto& p = w.next();
      pack(matrix<S>(this->b, task), N, r, w.b.data(), padded<A>(r), this->scale);
      p.start(rows, r, K);
      shrink(rows, N, r, dy, w.b.data(), false, p.column(), p.width, w.memory);
      if (needs & kA) {
        const Matrix<A> x = widened(from_row(this->x, begin), rows, K, w.x);
        add_outer(rows, r, K, p.left.data(), p.width, x, w.sums.data(), w.memory);
      }
      if (needs & kX) {
        pack(matrix<S>(this->a, task), r, K, p.row(), K);
        p.rank = r;
        this->add(w, p, rows, from_row(this->dy, begin), from_row(dx, begin));
      }
    }
    if (needs & (kB | kBias)) {
      auto& q = w.alone;
      q.start(rows, r + 1, 0);
      pack(Matrix<A>{s + begin * r, r, 1}, rows, r, q.column(), q.width);
      q.rank = r;
      q.ones(rows);
      add_outer(rows, r + 1, N, q.left.data(), q.width, dy, sums.of_b(w.sums), w.memory);
    }
  }
  void dense(Work<A>& w, int64_t first, int64_t last) const {
    if (needs & kX) {
      this->finish(w, last - first, from_row(dy, first), from_row(dx, first));
    }
  }
  void keep(Work<A>& w, int64_t task) const { sums.keep(w.sums, task); }
  void keep_part(Work<A>& w, int64_t slot) { sums.keep_part(w.sums, slot); }
};

// Of gx dx + gbias dbias + ga da + gb db, whose terms without cotangents are missing.
template <typename S>
struct LoraSecond : Layer<S> {
  using A = acc_t<S>;
  int64_t needs;
  Optional gx, gbias, ga, gb;
  Matrix<S> dy, d_dy, d_x;
  const A* s;
  Sums<S> sums;

  Work<A> work() const { return {this->K, this->N, this->r, sums.size()}; }

  // p = scale dy B^T and q = scale dy gB^T, of which d_x = p gA + q A, dA = p^T gx + q^T x.
  void of_cotangent(Work<A>& w, int64_t task, int64_t begin, int64_t rows, const Matrix<A>& dy,
                    const Matrix<A>& x, const Matrix<A>& g) const {
    const int64_t K = this->K, N = this->N, r = this->r;
    auto& p = w.alone;
    p.start(rows, 2 * r, K);
    if (gx || ga) {
      pack(matrix<S>(this->b, task), N, r, w.b.data(), padded<A>(r), this->scale);
      shrink(rows, N, r, dy, w.b.data(), false, p.column(), p.width, w.memory);
      if ((needs & kA) && gx) {
        add_outer(rows, r, K, p.column(), p.width, g, w.sums.data(), w.memory);
      }
      if (ga) {
        pack(matrix<S>(ga, task), r, K, p.row(), K);
        p.rank += r;
      }
    }
    if (gb) {
      pack(matrix<S>(gb, task), N, r, w.b.data(), padded<A>(r), this->scale);
      shrink(rows, N, r, dy, w.b.data(), false, p.column(), p.width, w.memory);
      if (needs & kA) add_outer(rows, r, K, p.column(), p.width, x, w.sums.data(), w.memory);
      pack(matrix<S>(this->a, task), r, K, p.row(), K);
      p.rank += r;
    }
    if (needs & kX) multiply(p, rows, writable(d_x[begin]), w.out, w.memory);
  }
  // u = scale (gx A^T + x gA^T), of which d_dy = u B^T + s gB^T + gbias + gx W^T, dB = dy^T u.
  void of_rows(Work<A>& w, int64_t task, int64_t begin, int64_t rows, const Matrix<A>& dy,
               const Matrix<A>& x, const Matrix<A>& g) const {
    const int64_t K = this->K, N = this->N, r = this->r;
    auto& u = w.next();
    u.start(rows, 2 * r + 1, N);
    if (gx || ga) {
      if (gx) {
        pack(matrix<S>(this->a, task).transposed(), K, r, w.a.data(), padded<A>(r), this->scale);
        shrink(rows, K, r, g, w.a.data(), false, u.column(), u.width, w.memory);
      }
      if (ga) {
        pack(matrix<S>(ga, task).transposed(), K, r, w.a.data(), padded<A>(r), this->scale);
        shrink(rows, K, r, x, w.a.data(), bool(gx), u.column(), u.width, w.memory);
      }
      if (needs & kB) {
        add_outer(rows, r, N, u.column(), u.width, dy, sums.of_b(w.sums), w.memory);
      }
      pack(matrix<S>(this->b, task).transposed(), r, N, u.row(), N);
      u.rank += r;
    }
    if (!(needs & kDy)) return;
    if (gb) {
      pack(Matrix<A>{s + begin * r, r, 1}, rows, r, u.column(), u.width);
      pack(matrix<S>(gb, task).transposed(), r, N, u.row(), N);
      u.rank += r;
    }
    if (gbias) {
      pack(from_row(matrix<S>(gbias), gbias->size(0) > 1 ? task : 0), 1, N, u.row(), N);
      u.ones(rows);
    }
    if (!gx) return multiply(u, rows, writable(d_dy[begin]), w.out, w.memory);
    this->add(w, u, rows, from_row(matrix<S>(gx), begin), from_row(d_dy, begin));
  }
  void segment(Work<A>& w, int64_t task, int64_t begin, int64_t end) const {
    const int64_t rows = end - begin;
    const Matrix<A> dy = widened(from_row(this->dy, begin), rows, this->N, w.dy);
    const Matrix<A> x = widened(from_row(this->x, begin), rows, this->K, w.x);
    Matrix<A> g{nullptr, 0, 1};
    if (gx) g = widened(from_row(matrix<S>(gx), begin), rows, this->K, w.gx);
    if (needs & (kX | kA)) of_cotangent(w, task, begin, rows, dy, x, g);
    if (needs & (kDy | kB)) of_rows(w, task, begin, rows, dy, x, g);
  }
  void dense(Work<A>& w, int64_t first, int64_t last) const {
    if (gx && (needs & kDy)) {
      this->finish(w, last - first, from_row(matrix<S>(gx), first), from_row(d_dy, first));
    }
  }
  void keep(Work<A>& w, int64_t task) const { sums.keep(w.sums, task); }
  void keep_part(Work<A>& w, int64_t slot) { sums.keep_part(w.sums, slot); }
};

}  // namespace fastmeta
