// Cross-entropy of the logits W x + b of many words, which are never all there: a block of rows of
// x meets one block of words after the other, as attention meets its keys, and what the gradient
// takes of the words is summed meanwhile. Rows that do not count are not computed.
#include <cmath>
#include <limits>
#include <tuple>

#include "common/tensor.h"
#include "cpu/batched_mm_bf16.h"
#include "math/exponential.h"

namespace fastmeta {
namespace {

using Optional = std::optional<Tensor>;

constexpr int64_t kRows = 192;          // at most, of x, that meet a block of words
constexpr int64_t kRowBytes = 3 << 20;  // at most of those, but for kFewRows
constexpr int64_t kFewRows = 48;
// Parts of the words that are summed by themselves: also few rows keep several threads busy. Fixed,
// so that results depend neither on threads nor on how many rows there are.
constexpr int64_t kParts = 8;
constexpr int64_t kBlockBytes = 1 << 20;  // of a block of words, of 32 to 512
constexpr int64_t kSumBytes = 64 << 20;   // at most of sums at a time, but for one block of rows

template <typename A>
constexpr A kNone = -std::numeric_limits<A>::infinity();

// The rows that count and the words, D numbers each.
template <typename A>
struct Problem {
  static constexpr int64_t kLanes = Lanes<A, 64>::kCount;
  int64_t width, words;
  const A *x, *weight, *bias;
  const int64_t* labels;
  bool bf16;           // factors of products are rounded to it
  int64_t height = 0;  // rows at a time, at most
  int64_t block = 0, blocks = 0, parts = 0;
  std::vector<int64_t> rows{};

  Problem(const Tensor& x, const Tensor& weight, const Optional& bias, const Tensor& labels,
          bool bf16)
      : width(x.size(1)),
        words(weight.size(0)),
        x(data_of<const A>(x)),
        weight(data_of<const A>(weight)),
        bias(pointer_or_null<A>(bias)),
        labels(data_of<const int64_t>(labels)),
        bf16(bf16) {
    const int64_t bytes = most(width, 1) * int64_t(sizeof(A));
    height = least(most(kRowBytes / bytes, kFewRows), kRows);
    block = least(most(kBlockBytes / bytes / 32, 1), 16) * 32;
    blocks = ceil_div(words, block);
    parts = least(kParts, blocks);
  }

  int64_t first_of_part(int64_t part) const { return blocks * part / parts * block; }
  // A number of the label's row, as products read it.
  A own(A x) const { return bf16 ? A(float(BFloat16(float(x)))) : x; }
  // Sixteen multiplications count as one element.
  int64_t work(int64_t height) const { return height * width * words / parts / 16; }
};

// What a thread works on: rows [height, D] of one or two tensors, their products with a block of
// words, and repacked factors.
template <typename A>
struct Scratch {
  std::vector<A> rows[2], products[2];
  batched::Memory<A> memory;
};

// Sums over the words of each part for a group of rows.
template <typename A>
struct Sums {
  int64_t rows = 0, width = 0;
  std::vector<A> top, total, right;  // [parts, rows]
  std::vector<A> vectors;            // [parts, rows, D]

  void start(int64_t parts, int64_t rows, int64_t width) {
    this->rows = rows;
    this->width = width;
    for (auto* t : {&top, &total, &right}) t->assign(size_t(parts * rows), A(0));
    vectors.assign(size_t(parts * rows * width), A(0));  // none where no vectors are wanted
  }
  int64_t at(int64_t part, int64_t row) const { return part * rows + row; }
  A* vector(int64_t part, int64_t row) { return vectors.data() + at(part, row) * width; }
};

template <typename A>
void multiply(const Problem<A>& p, const batched::Product<A>& product, batched::Memory<A>& memory) {
  if (p.bf16) {
    if constexpr (sizeof(A) == 4) {
      return batched::run_bf16(product, 0, product.n, memory, batched::Ahead{});
    }
  }
  batched::run(&product, 1, 0, product.n, memory, batched::Ahead{});
}

// Rows [first, first + height) of those that count meet the words of a part, block by block.
// f(first word, words, row, their products with the row of each tensor) makes what is summed, in
// place of the first products; whole vectors, in which -inf and 0 come after the last word.
// vectors [height, D], unless null, += those by the words.
template <typename A, int kTensors, typename F>
void meet(const Problem<A>& p, Scratch<A>& w, const A* const (&tensors)[kTensors], int64_t first,
          int64_t height, int64_t part, A* vectors, const F& f) {
  for (int t = 0; t < kTensors; ++t) {
    w.rows[t].resize(size_t(height * p.width));
    w.products[t].resize(size_t(height * p.block));
    for (int64_t i = 0; i < height; ++i) {
      std::copy_n(tensors[t] + p.rows[first + i] * p.width, p.width,
                  w.rows[t].data() + i * p.width);
    }
  }
  const int64_t last = part + 1 == p.parts ? p.words : p.first_of_part(part + 1);
  for (int64_t j = p.first_of_part(part); j < last; j += p.block) {
    const int64_t count = least(p.block, last - j);
    const A* const words = p.weight + j * p.width;
    batched::Product<A> products[kTensors];
    for (int t = 0; t < kTensors; ++t) {
      const A* const base = t == 0 && p.bias != nullptr ? p.bias + j : nullptr;
      products[t] = {height,  count, p.width, w.rows[t].data(),     p.width, 1, words, 1,
                     p.width, base,  0,       w.products[t].data(), p.block};
    }
    if (p.bf16) {
      for (const auto& product : products) multiply(p, product, w.memory);
    } else {
      batched::run(products, kTensors, 0, count, w.memory, batched::Ahead{});
    }
    const int64_t whole = ceil_div(count, Problem<A>::kLanes) * Problem<A>::kLanes;
    with_registers([&](auto bytes) FM_INLINE_LAMBDA {
      for (int64_t i = 0; i < height; ++i) {
        A* found[kTensors];
        for (int t = 0; t < kTensors; ++t) {
          found[t] = w.products[t].data() + i * p.block;
          std::fill(found[t] + count, found[t] + whole, t == 0 ? kNone<A> : A(0));
        }
        f(static_cast<Lanes<A, bytes()>*>(nullptr), j, whole, i, found);
      }
    });
    if (vectors == nullptr) continue;
    multiply<A>(p,
                {height, p.width, count, w.products[0].data(), p.block, 1, words, p.width, 1,
                 vectors, p.width, vectors, p.width},
                w.memory);
  }
}

// Runs part(scratch, first row, height, part, sums) for all blocks of rows and parts of words, and
// then row(row, its place in sums, sums) for each row, group by group: sums, of vectors of `width`,
// are never of all rows.
template <typename A, typename P, typename R>
void run(const Problem<A>& p, int64_t width, const P& part, const R& row) {
  const int64_t rows = int64_t(p.rows.size()), blocks = ceil_div(rows, p.height);
  const int64_t bytes = p.parts * p.height * most(width, 1) * int64_t(sizeof(A));
  const int64_t busy = ceil_div(4 * torch::stable::get_num_threads(), p.parts);
  const int64_t group = most(least(busy, kSumBytes / bytes), 1);
  Sums<A> sums;
  for (int64_t block = 0; block < blocks; block += group) {
    const int64_t end = least(blocks, block + group), first = rows * block / blocks;
    const int64_t together = rows * end / blocks - first;
    sums.start(p.parts, together, width);
    const int64_t units = (end - block) * p.parts;
    parallel_ranges(units, p.work(p.height), [&](int64_t begin, int64_t stop) {
      Scratch<A> w;
      for (int64_t unit = begin; unit < stop; ++unit) {
        const int64_t own = block + unit / p.parts, from = rows * own / blocks;
        part(w, from, rows * (own + 1) / blocks - from, unit % p.parts, from - first, sums);
      }
    });
    parallel_units(together, p.width * p.parts,
                   [&](int64_t i) { row(p.rows[first + i], i, sums); });
  }
}

void check(const Tensor& x, const Tensor& weight, const Optional& bias, const Tensor& labels) {
  const auto dense = [](const Tensor& t, int64_t axes) {
    return t.dim() == axes && t.is_contiguous();
  };
  STD_TORCH_CHECK(dense(x, 2) && dense(weight, 2) && dense(labels, 1) &&
                      x.size(1) == weight.size(1) && weight.size(0) > 0 &&
                      labels.size(0) == x.size(0) && labels.scalar_type() == ScalarType::Long &&
                      x.scalar_type() == weight.scalar_type() &&
                      (!bias || (dense(*bias, 1) && bias->size(0) == weight.size(0) &&
                                 bias->scalar_type() == x.scalar_type())),
                  "fastmeta: linear_cross_entropy takes contiguous rows [R, D], words [C, D], "
                  "their bias [C] and labels [R]");
}

// Losses [R]; their largest logit m and 1 / sum_j exp(z_j - m), [R, 2]; where wanted the gradient
// to x, sum_j p_j W_j - W_label, [R, D]. All are 0 where a row does not count.
std::tuple<Tensor, Tensor, Tensor> forward(Tensor x, Tensor weight, Optional bias, Tensor labels,
                                           int64_t ignored, bool wanted, bool bf16) {
  check(x, weight, bias, labels);
  const int64_t rows = x.size(0), words = weight.size(0), width = x.size(1);
  const int64_t* const label = data_of<const int64_t>(labels);
  const Tensor losses = empty_rows({rows}, x.scalar_type(), x);
  const Tensor stats = empty_rows({rows, 2}, x.scalar_type(), x);
  const Tensor slopes = if_wanted(wanted, {rows, width}, x);
  with_dtype(x, [&](auto zero) {
    using A = decltype(zero);
    A *const loss = data_of<A>(losses), *const kept = data_of<A>(stats);
    A* const slope = wanted ? data_of<A>(slopes) : nullptr;
    Problem<A> p(x, weight, bias, labels, bf16);
    for (int64_t r = 0; r < rows; ++r) {
      if (label[r] == ignored) {
        loss[r] = kept[2 * r] = kept[2 * r + 1] = 0;
        if (wanted) std::fill_n(slope + r * width, width, A(0));
        continue;
      }
      STD_TORCH_CHECK(label[r] >= 0 && label[r] < words,
                      "linear_cross_entropy: labels must lie in 0 to ", words - 1, " or be ",
                      ignored, ", got ", label[r]);
      p.rows.push_back(r);
    }
    const auto part = [&](Scratch<A>& w, int64_t first, int64_t height, int64_t part, int64_t at,
                          Sums<A>& sums) {
      A *const top = &sums.top[sums.at(part, at)], *const total = &sums.total[sums.at(part, at)];
      A *const right = &sums.right[sums.at(part, at)], *const vectors = sums.vector(part, at);
      std::fill_n(top, height, kNone<A>);
      const A* const tensors[] = {p.x};
      meet(p, w, tensors, first, height, part, wanted ? vectors : nullptr,
           [&](auto* lane, int64_t j, int64_t count, int64_t i, A*(&z)[1]) FM_INLINE_LAMBDA {
             using L = std::remove_pointer_t<decltype(lane)>;
             const int64_t own = p.labels[p.rows[first + i]] - j;
             if (own >= 0 && own < least(count, p.words - j)) right[i] = z[0][own];
             L most_of_all = L::all(top[i]);
             for (int64_t q = 0; q < count; q += L::kCount) {
               most_of_all = above(most_of_all, L::template load<true>(z[0] + q, 0));
             }
             const A most = most_of_all.top();
             if (most > top[i]) {  // what was summed is of exponentials below another one
               const A scale = std::exp(top[i] - most);
               total[i] *= scale;
               for (int64_t q = 0; wanted && q < p.width; ++q) {
                 A& sum = vectors[i * p.width + q];
                 sum = scale == 0 ? A(0) : scale * sum;
               }
               top[i] = most;
             }
             const L shift = L::all(top[i] == kNone<A> ? A(0) : top[i]);
             L sum = L::all(0);
             for (int64_t q = 0; q < count; q += L::kCount) {
               const L e = exponential(L::template load<true>(z[0] + q, 0) - shift);
               e.template store<true>(z[0] + q, 0);
               sum = sum + e;
             }
             total[i] += sum.sum();
           });
    };
    const auto row = [&](int64_t r, int64_t at, Sums<A>& sums) {
      A most = kNone<A>, total = 0, right = 0, scale[kParts];
      for (int64_t i = 0; i < p.parts; ++i) most = std::max(most, sums.top[sums.at(i, at)]);
      for (int64_t i = 0; i < p.parts; ++i) {
        scale[i] = std::exp(sums.top[sums.at(i, at)] - most);
        total += scale[i] * sums.total[sums.at(i, at)];
        right += sums.right[sums.at(i, at)];  // 0 but where the label is
      }
      loss[r] = std::log(total) + (most - right);
      kept[2 * r] = most;
      kept[2 * r + 1] = A(1) / total;
      if (!wanted) return;
      const A *const own = p.weight + p.labels[r] * width, share = A(1) / total;
      A* const to = slope + r * width;
      for (int64_t i = 0; i < p.parts; ++i) {
        const A *const from = sums.vector(i, at), times = scale[i] * share;
        for (int64_t q = 0; q < width; ++q)
          to[q] = (i == 0 ? -p.own(own[q]) : to[q]) + times * from[q];
      }
    };
    run(p, wanted ? width : 0, part, row);
  });
  return {losses, stats, slopes};
}

// v [R, D]: cotangent of the gradient g slopes. Returns v . slopes, that of g, and that of x,
// g (sum_j p_j u_j W_j - mean sum_j p_j W_j) with u = W v and its mean under p.
std::tuple<Tensor, Tensor> double_backward(Tensor v, Tensor g, Tensor x, Tensor weight,
                                           Optional bias, Tensor labels, Tensor stats,
                                           Tensor slopes, bool bf16) {
  check(x, weight, bias, labels);
  const int64_t rows = x.size(0), width = x.size(1);
  const Tensor dg = empty_rows({rows}, x.scalar_type(), x);
  const Tensor dx = empty_rows({rows, width}, x.scalar_type(), x);
  with_dtype(x, [&](auto zero) {
    using A = decltype(zero);
    const A *const kept = data_of<const A>(stats), *const slope = data_of<const A>(slopes);
    const A *const cotangent = data_of<const A>(v), *const given = data_of<const A>(g);
    A *const to_g = data_of<A>(dg), *const to_x = data_of<A>(dx);
    Problem<A> p(x, weight, bias, labels, bf16);
    for (int64_t r = 0; r < rows; ++r) {
      to_g[r] = 0;
      if (kept[2 * r + 1] != 0) {
        p.rows.push_back(r);
      } else {
        std::fill_n(to_x + r * width, width, A(0));
      }
    }
    const auto part = [&](Scratch<A>& w, int64_t first, int64_t height, int64_t part, int64_t at,
                          Sums<A>& sums) {
      A* const mean = &sums.total[sums.at(part, at)];
      const A* const tensors[] = {p.x, cotangent};
      meet(p, w, tensors, first, height, part, sums.vector(part, at),
           [&](auto* lane, int64_t, int64_t count, int64_t i, A*(&z)[2]) FM_INLINE_LAMBDA {
             using L = std::remove_pointer_t<decltype(lane)>;
             const int64_t r = p.rows[first + i];
             const L top = L::all(kept[2 * r]), share = L::all(kept[2 * r + 1]);
             L sum = L::all(0);
             for (int64_t q = 0; q < count; q += L::kCount) {
               const L weight = exponential(L::template load<true>(z[0] + q, 0) - top);
               const L times = (share * weight) * L::template load<true>(z[1] + q, 0);
               times.template store<true>(z[0] + q, 0);
               sum = sum + times;
             }
             mean[i] += sum.sum();
           });
    };
    const auto row = [&](int64_t r, int64_t at, Sums<A>& sums) {
      A mean = 0;
      for (int64_t i = 0; i < p.parts; ++i) mean += sums.total[sums.at(i, at)];
      const A *const own = p.weight + p.labels[r] * width, *const mine = slope + r * width;
      const A* const v = cotangent + r * width;
      A* const to = to_x + r * width;
      A dot = 0;
      for (int64_t q = 0; q < width; ++q) {
        A sum = -mean * (mine[q] + p.own(own[q]));
        for (int64_t i = 0; i < p.parts; ++i) sum += sums.vector(i, at)[q];
        to[q] = given[r] * sum;
        dot += v[q] * mine[q];
      }
      to_g[r] = dot;
    };
    run(p, width, part, row);
  });
  return {dg, dx};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastmeta, CPU, m) {
  m.impl("linear_cross_entropy", TORCH_BOX(&forward));
  m.impl("linear_cross_entropy_double_backward", TORCH_BOX(&double_backward));
}

}  // namespace fastmeta
