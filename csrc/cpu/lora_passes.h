// The passes over rows: a linear layer with low-rank terms, its gradient and the derivative of
// that. While a panel of rows is in the cache, the few columns of its low-rank term are computed
// and their product written, to which BLAS adds the product with the shared weight; sums over rows
// are taken from the same panel. S: the type of rows and weights, A: that of computation.
#pragma once

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

// What all passes are given.
template <typename S>
struct Layer {
  using A = acc_t<S>;
  int64_t K, N, r;
  Matrix<S> x;
  Weight<S> weight;
  Tensor a, b;
  A scale;

  int64_t width() const { return K + N; }
  bool packed() const { return weight.packed(); }
};

template <typename S>
struct LoraForward : Layer<S> {
  using A = acc_t<S>;
  Optional bias;
  Matrix<S> y;
  A* s;

  struct Work {
    std::vector<A> x, y, a;
    Coefficients<A> c;
    explicit Work(const LoraForward& p) : a(size_t(p.K * padded<A>(p.r))) {}
  };
  void segment(Work& w, int64_t task, int64_t begin, int64_t end) const {
    const int64_t rows = end - begin, K = this->K, N = this->N, r = this->r;
    const Matrix<A> x = widened(from_row(this->x, begin), rows, K, w.x);
    pack(matrix<S>(this->a, task).transposed(), K, r, w.a.data(), padded<A>(r));
    w.c.start(rows, r + 1, N);
    shrink(rows, K, r, x, w.a.data(), this->scale, false, w.c.column(), w.c.width);
    for (int64_t i = 0; i < rows; ++i) {
      std::copy_n(w.c.left.data() + i * w.c.width, r, s + (begin + i) * r);
    }
    pack(matrix<S>(this->b, task).transposed(), r, N, w.c.row(), N);
    w.c.rank = r;
    if (bias) {
      const Matrix<S> own = from_row(matrix<S>(bias), bias->size(0) > 1 ? task : 0);
      pack(own, 1, N, w.c.row(), N);
      w.c.ones(rows);
    }
    w.c.product(rows, writable(y[begin]), w.y);
  }
  void dense(int64_t first, int64_t last) const {
    this->weight.forward(last - first, from_row(this->x, first), from_row(y, first));
  }
  void keep(Work&, int64_t) const {}
  void keep_part(Work&, int64_t) const {}
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

  struct Work {
    std::vector<A> x, dy, dx, b, sums;
    Coefficients<A> p, q;
    explicit Work(const LoraBackward& p)
        : b(size_t(p.N * padded<A>(p.r))), sums(size_t(p.sums.size())) {}
  };
  void segment(Work& w, int64_t task, int64_t begin, int64_t end) const {
    const int64_t rows = end - begin, K = this->K, N = this->N, r = this->r;
    const Matrix<A> dy = widened(from_row(this->dy, begin), rows, N, w.dy);
    if (needs & (kX | kA)) {
      pack(matrix<S>(this->b, task), N, r, w.b.data(), padded<A>(r));
      w.p.start(rows, r, K);
      shrink(rows, N, r, dy, w.b.data(), this->scale, false, w.p.column(), w.p.width);
    }
    if (needs & kX) {
      pack(matrix<S>(this->a, task), r, K, w.p.row(), K);
      w.p.rank = r;
      w.p.product(rows, writable(dx[begin]), w.dx);
    }
    if (needs & kA) {
      const Matrix<A> x = widened(from_row(this->x, begin), rows, K, w.x);
      add_outer(rows, r, K, w.p.left.data(), w.p.width, x, w.sums.data());
    }
    if (needs & (kB | kBias)) {
      w.q.start(rows, r + 1, 0);
      pack(Matrix<A>{s + begin * r, r, 1}, rows, r, w.q.column(), w.q.width);
      w.q.rank = r;
      w.q.ones(rows);
      add_outer(rows, r + 1, N, w.q.left.data(), w.q.width, dy, sums.of_b(w.sums));
    }
  }
  void dense(int64_t first, int64_t last) const {
    if (needs & kX) {
      this->weight.backward(last - first, from_row(dy, first), from_row(dx, first));
    }
  }
  void keep(Work& w, int64_t task) const { sums.keep(w.sums, task); }
  void keep_part(Work& w, int64_t slot) { sums.keep_part(w.sums, slot); }
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

  struct Work {
    std::vector<A> x, dy, gx, out, a, b, sums;
    Coefficients<A> u, p;
    explicit Work(const LoraSecond& p)
        : a(size_t(p.K * padded<A>(p.r))),
          b(size_t(p.N * padded<A>(p.r))),
          sums(size_t(p.sums.size())) {}
  };
  // p = scale dy B^T and q = scale dy gB^T, of which d_x = p gA + q A, dA = p^T gx + q^T x.
  void of_cotangent(Work& w, int64_t task, int64_t begin, int64_t rows, const Matrix<A>& dy,
                    const Matrix<A>& x, const Matrix<A>& g) const {
    const int64_t K = this->K, N = this->N, r = this->r;
    w.p.start(rows, 2 * r, K);
    if (gx || ga) {
      pack(matrix<S>(this->b, task), N, r, w.b.data(), padded<A>(r));
      shrink(rows, N, r, dy, w.b.data(), this->scale, false, w.p.column(), w.p.width);
      if ((needs & kA) && gx) {
        add_outer(rows, r, K, w.p.column(), w.p.width, g, w.sums.data());
      }
      if (ga) {
        pack(matrix<S>(ga, task), r, K, w.p.row(), K);
        w.p.rank += r;
      }
    }
    if (gb) {
      pack(matrix<S>(gb, task), N, r, w.b.data(), padded<A>(r));
      shrink(rows, N, r, dy, w.b.data(), this->scale, false, w.p.column(), w.p.width);
      if (needs & kA) add_outer(rows, r, K, w.p.column(), w.p.width, x, w.sums.data());
      pack(matrix<S>(this->a, task), r, K, w.p.row(), K);
      w.p.rank += r;
    }
    if (needs & kX) w.p.product(rows, writable(d_x[begin]), w.out);
  }
  // u = scale (gx A^T + x gA^T), of which d_dy = u B^T + s gB^T + gbias + gx W^T, dB = dy^T u.
  void of_rows(Work& w, int64_t task, int64_t begin, int64_t rows, const Matrix<A>& dy,
               const Matrix<A>& x, const Matrix<A>& g) const {
    const int64_t K = this->K, N = this->N, r = this->r;
    w.u.start(rows, 2 * r + 1, N);
    if (gx || ga) {
      if (gx) {
        pack(matrix<S>(this->a, task).transposed(), K, r, w.a.data(), padded<A>(r));
        shrink(rows, K, r, g, w.a.data(), this->scale, false, w.u.column(), w.u.width);
      }
      if (ga) {
        pack(matrix<S>(ga, task).transposed(), K, r, w.a.data(), padded<A>(r));
        shrink(rows, K, r, x, w.a.data(), this->scale, bool(gx), w.u.column(), w.u.width);
      }
      if (needs & kB) {
        add_outer(rows, r, N, w.u.column(), w.u.width, dy, sums.of_b(w.sums));
      }
      pack(matrix<S>(this->b, task).transposed(), r, N, w.u.row(), N);
      w.u.rank += r;
    }
    if (!(needs & kDy)) return;
    if (gb) {
      pack(Matrix<A>{s + begin * r, r, 1}, rows, r, w.u.column(), w.u.width);
      pack(matrix<S>(gb, task).transposed(), r, N, w.u.row(), N);
      w.u.rank += r;
    }
    if (gbias) {
      pack(from_row(matrix<S>(gbias), gbias->size(0) > 1 ? task : 0), 1, N, w.u.row(), N);
      w.u.ones(rows);
    }
    w.u.product(rows, writable(d_dy[begin]), w.out);
  }
  void segment(Work& w, int64_t task, int64_t begin, int64_t end) const {
    const int64_t rows = end - begin;
    const Matrix<A> dy = widened(from_row(this->dy, begin), rows, this->N, w.dy);
    const Matrix<A> x = widened(from_row(this->x, begin), rows, this->K, w.x);
    Matrix<A> g{nullptr, 0, 1};
    if (gx) g = widened(from_row(matrix<S>(gx), begin), rows, this->K, w.gx);
    if (needs & (kX | kA)) of_cotangent(w, task, begin, rows, dy, x, g);
    if (needs & (kDy | kB)) of_rows(w, task, begin, rows, dy, x, g);
  }
  void dense(int64_t first, int64_t last) const {
    if (gx && (needs & kDy)) {
      this->weight.forward(last - first, from_row(matrix<S>(gx), first), from_row(d_dy, first));
    }
  }
  void keep(Work& w, int64_t task) const { sums.keep(w.sums, task); }
  void keep_part(Work& w, int64_t slot) { sums.keep_part(w.sums, slot); }
};

}  // namespace fastmeta
