// LayerNorm and RMSNorm over rows [R, D] with gains and biases [T, D] of R / T adjacent rows each,
// or [1, D]: forward, backward, and the derivative of that, one pass over memory each.
#include "math/layer_norm.h"

#include <algorithm>

#include "common/tensor.h"

namespace fastmeta {
namespace {

constexpr int64_t kRows = 32;  // rows of one unit of work: sums over rows do not depend on threads

// How rows are cut into units: the blocks of one task's rows.
struct Cut {
  int64_t width, tasks, rows, blocks;
  Cut(const Tensor& x, const Tensor& weight)
      : width(x.size(1)),
        tasks(weight.size(0)),
        rows(tasks == 0 ? 0 : x.size(0) / tasks),
        blocks(ceil_div(rows, kRows)) {
    STD_TORCH_CHECK(x.dim() == 2 && weight.dim() == 2 && weight.size(1) == width &&
                        tasks * rows == x.size(0) &&
                        (width <= 1 || tasks == 0 || weight.stride(1) == 1) && x.is_contiguous() &&
                        x.scalar_type() == weight.scalar_type(),
                    "fastmeta: layer_norm takes contiguous rows [R, D] and gains [T, D]");
  }
  int64_t units() const { return tasks * blocks; }
};

// Runs f(type of vectors, unit, task, first row, last row) over all units, compiled for the CPU's
// registers.
template <typename A, typename F>
void each_block(const Cut& cut, const F& f) {
  parallel_units(cut.units(), cut.width * least(kRows, cut.rows) * 2, [&](int64_t unit) {
    const int64_t task = unit / cut.blocks, first = unit % cut.blocks * kRows;
    const int64_t begin = task * cut.rows + first;
    const int64_t end = begin + least(kRows, cut.rows - first);
    with_registers([&](auto bytes) FM_INLINE_LAMBDA {
      f(static_cast<Lanes<A, bytes()>*>(nullptr), unit, task, begin, end);
    });
  });
}

std::tuple<Tensor, Tensor> forward(Tensor x, Tensor weight, std::optional<Tensor> bias, double eps,
                                   bool rms) {
  const Cut cut(x, weight);
  const Tensor y = torch::stable::empty_like(x);
  const Tensor stats = empty_rows({x.size(0), 2}, x.scalar_type(), x);
  with_dtype(x, [&](auto zero) {
    using A = decltype(zero);
    const A *const from = data_of<const A>(x), *const gain = data_of<const A>(weight);
    const A* const shift = pointer_or_null<A>(bias);
    const int64_t gain_row = weight.stride(0), shift_row = bias ? bias->stride(0) : 0;
    A *const to = data_of<A>(y), *const kept = data_of<A>(stats);
    const int64_t width = cut.width;
    each_block<A>(
        cut, [&](auto* lane, int64_t, int64_t t, int64_t begin, int64_t end) FM_INLINE_LAMBDA {
          using L = std::remove_pointer_t<decltype(lane)>;
          const A *const w = gain + t * gain_row, *const b = shift + t * shift_row;
          for (int64_t i = begin; i < end; ++i) {
            const A* const row = from + i * width;
            A mean = 0;
            if (!rms) {
              L sum = L::all(0);
              each_vector<L>(width, [&](auto whole, int64_t j, int64_t count) FM_INLINE_LAMBDA {
                sum = sum + L::template load<whole()>(row + j, count);
              });
              mean = sum.sum() / A(width);
            }
            L squares = L::all(0);
            each_vector<L>(width, [&](auto whole, int64_t j, int64_t count) FM_INLINE_LAMBDA {
              L at = L::template load<whole()>(row + j, count) - L::all(mean);
              if constexpr (!whole()) {  // what is not there counts nothing
                A there[L::kCount] = {};
                at.template store<false>(there, count);
                at = L::template load<true>(there, 0);
              }
              squares = squares + at * at;
            });
            const A s = A(1) / std::sqrt(squares.sum() / A(width) + A(eps));
            kept[2 * i] = mean;
            kept[2 * i + 1] = s;
            each_vector<L>(width, [&](auto whole, int64_t j, int64_t count) FM_INLINE_LAMBDA {
              const L h = s * (L::template load<whole()>(row + j, count) - L::all(mean));
              L out = h * L::template load<whole()>(w + j, count);
              if (shift != nullptr) out = out + L::template load<whole()>(b + j, count);
              out.template store<whole()>(to + i * width + j, count);
            });
          }
        });
  });
  return {y, stats};
}

// Sums [T, D] over blocks of rows, in their order: parts [T, blocks, D].
template <typename A>
void add_up(const Cut& cut, const A* parts, A* to) {
  for (int64_t t = 0; t < cut.tasks; ++t) {
    A* const row = to + t * cut.width;
    std::fill(row, row + cut.width, A(0));
    for (int64_t block = 0; block < cut.blocks; ++block) {
      const A* const part = parts + (t * cut.blocks + block) * cut.width;
      for (int64_t j = 0; j < cut.width; ++j) row[j] += part[j];
    }
  }
}

// dx [R, D], and dw and db [T, D].
std::tuple<Tensor, Tensor, Tensor> backward(Tensor dy, Tensor x, Tensor weight, Tensor stats,
                                            bool rms) {
  const Cut cut(x, weight);
  STD_TORCH_CHECK(dy.is_contiguous() && same_sizes(dy, x), "fastmeta: layer_norm: dy is like x");
  const Tensor dx = torch::stable::empty_like(x);
  const Tensor dw = empty_rows({cut.tasks, cut.width}, x.scalar_type(), x);
  const Tensor db = empty_rows({cut.tasks, cut.width}, x.scalar_type(), x);
  with_dtype(x, [&](auto zero) {
    using A = decltype(zero);
    const A *const from = data_of<const A>(x), *const given = data_of<const A>(dy),
                   *const gain = data_of<const A>(weight);
    const A* const kept = data_of<const A>(stats);
    const int64_t gain_row = weight.stride(0), width = cut.width;
    A* const to = data_of<A>(dx);
    std::vector<A> parts(2 * cut.units() * width, A(0));
    A *const w_parts = parts.data(), *const b_parts = w_parts + cut.units() * width;
    each_block<A>(
        cut, [&](auto* lane, int64_t unit, int64_t t, int64_t begin, int64_t end) FM_INLINE_LAMBDA {
          using L = std::remove_pointer_t<decltype(lane)>;
          const A* const w = gain + t * gain_row;
          A *const sum_w = w_parts + unit * width, *const sum_b = b_parts + unit * width;
          for (int64_t i = begin; i < end; ++i) {
            const A *const row = from + i * width, *const d = given + i * width;
            const A mean = kept[2 * i], s = kept[2 * i + 1];
            L sa = L::all(0), sah = L::all(0);
            each_vector<L>(width, [&](auto whole, int64_t j, int64_t count) FM_INLINE_LAMBDA {
              const L h = s * (L::template load<whole()>(row + j, count) - L::all(mean));
              const L at = L::template load<whole()>(d + j, count);
              const L a = at * L::template load<whole()>(w + j, count), dh = at * h;
              sa = sa + a;
              sah = sah + a * h;
              (L::template load<whole()>(sum_w + j, count) + dh)
                  .template store<whole()>(sum_w + j, count);
              (L::template load<whole()>(sum_b + j, count) + at)
                  .template store<whole()>(sum_b + j, count);
            });
            const A ma = rms ? A(0) : sa.sum() / A(width), mah = sah.sum() / A(width);
            each_vector<L>(width, [&](auto whole, int64_t j, int64_t count) FM_INLINE_LAMBDA {
              const L h = s * (L::template load<whole()>(row + j, count) - L::all(mean));
              const L a =
                  L::template load<whole()>(d + j, count) * L::template load<whole()>(w + j, count);
              projected(a, h, s, ma, mah).template store<whole()>(to + i * width + j, count);
            });
          }
        });
    add_up(cut, w_parts, data_of<A>(dw));
    add_up(cut, b_parts, data_of<A>(db));
  });
  return {dx, dw, db};
}

// u [R, D], gw and gb [T, D]: cotangents of dx, dw and db. The derivatives to dy, x and w.
std::tuple<Tensor, Tensor, Tensor> double_backward(std::optional<Tensor> u,
                                                   std::optional<Tensor> gw,
                                                   std::optional<Tensor> gb, Tensor dy, Tensor x,
                                                   Tensor weight, Tensor stats, bool rms) {
  const Cut cut(x, weight);
  STD_TORCH_CHECK(
      dy.is_contiguous() && same_sizes(dy, x) && (!u || (u->is_contiguous() && same_sizes(*u, x))),
      "fastmeta: layer_norm: cotangents are like x");
  const Tensor d_dy = torch::stable::empty_like(x), d_x = torch::stable::empty_like(x);
  const Tensor d_w = empty_rows({cut.tasks, cut.width}, x.scalar_type(), x);
  with_dtype(x, [&](auto zero) {
    using A = decltype(zero);
    const A *const from = data_of<const A>(x), *const given = data_of<const A>(dy),
                   *const gain = data_of<const A>(weight);
    const A* const kept = data_of<const A>(stats);
    const A *const to_dx = pointer_or_null<A>(u), *const to_dw = pointer_or_null<A>(gw),
                   *const to_db = pointer_or_null<A>(gb);
    const int64_t gain_row = weight.stride(0), width = cut.width;
    const int64_t gw_row = gw ? gw->stride(0) : 0, gb_row = gb ? gb->stride(0) : 0;
    A *const out_d = data_of<A>(d_dy), *const out_x = data_of<A>(d_x);
    std::vector<A> parts(cut.units() * width, A(0));
    each_block<A>(cut, [&](auto* lane, int64_t unit, int64_t t, int64_t begin,
                           int64_t end) FM_INLINE_LAMBDA {
      using L = std::remove_pointer_t<decltype(lane)>;
      const A* const w = gain + t * gain_row;
      A* const sum_w = parts.data() + unit * width;
      for (int64_t i = begin; i < end; ++i) {
        const A *const row = from + i * width, *const d = given + i * width;
        const A mean = kept[2 * i], s = kept[2 * i + 1];
        const auto optional = [&](const A* at, int64_t j, auto whole,
                                  int64_t count) FM_INLINE_LAMBDA {
          return at == nullptr ? L::all(0) : L::template load<whole()>(at + j, count);
        };
        const A* const cotangent = to_dx == nullptr ? nullptr : to_dx + i * width;
        const A* const of_w = to_dw == nullptr ? nullptr : to_dw + t * gw_row;
        const A* const of_b = to_db == nullptr ? nullptr : to_db + t * gb_row;
        const L none = L::all(0);
        NormSums<L> sums{none, none, none, none, none, none, none};
        each_vector<L>(width, [&](auto whole, int64_t j, int64_t count) FM_INLINE_LAMBDA {
          const L h = s * (L::template load<whole()>(row + j, count) - L::all(mean));
          const L at = L::template load<whole()>(d + j, count);
          const L a = at * L::template load<whole()>(w + j, count);
          const L v = optional(cotangent, j, whole, count);
          const L c = optional(of_w, j, whole, count) * at;
          sums.u = sums.u + v;
          sums.uh = sums.uh + v * h;
          sums.a = sums.a + a;
          sums.ah = sums.ah + a * h;
          sums.ua = sums.ua + v * a;
          sums.c = sums.c + c;
          sums.ch = sums.ch + c * h;
        });
        const NormSums<A> sum{sums.u.sum(),  sums.uh.sum(), sums.a.sum(), sums.ah.sum(),
                              sums.ua.sum(), sums.c.sum(),  sums.ch.sum()};
        const NormSecond<A> second(sum, s, A(width), rms);
        each_vector<L>(width, [&](auto whole, int64_t j, int64_t count) FM_INLINE_LAMBDA {
          const L h = s * (L::template load<whole()>(row + j, count) - L::all(mean));
          const L at = L::template load<whole()>(d + j, count);
          const L gain_at = L::template load<whole()>(w + j, count), a = at * gain_at;
          const L v = optional(cotangent, j, whole, count);
          const L of_gain = optional(of_w, j, whole, count);
          const L p = projected(v, h, s, second.mu, second.muh);
          (gain_at * p + of_gain * h + optional(of_b, j, whole, count))
              .template store<whole()>(out_d + i * width + j, count);
          second.of_x(v, a, of_gain * at, h).template store<whole()>(out_x + i * width + j, count);
          (L::template load<whole()>(sum_w + j, count) + at * p)
              .template store<whole()>(sum_w + j, count);
        });
      }
    });
    add_up(cut, parts.data(), data_of<A>(d_w));
  });
  return {d_dy, d_x, d_w};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastmeta, CPU, m) {
  m.impl("layer_norm", TORCH_BOX(&forward));
  m.impl("layer_norm_backward", TORCH_BOX(&backward));
  m.impl("layer_norm_double_backward", TORCH_BOX(&double_backward));
}

}  // namespace fastmeta
