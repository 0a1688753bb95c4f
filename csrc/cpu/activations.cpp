// Activations and their first two derivatives, one pass over memory each.
#include "math/activations.h"

#include "common/tensor.h"

namespace fastmeta {
namespace {

constexpr int64_t kBlock = 4096;  // elements of one unit of work
constexpr int64_t kCost = 4;      // an element costs as much as this many moved ones

// Runs f(type of vectors, whole, i, count) for every 64 bytes of n elements, in code for the CPU's
// registers.
template <typename A, typename F>
void each_lane(int64_t n, const F& f) {
  parallel_units(ceil_div(n, kBlock), kBlock * kCost, [&](int64_t unit) {
    const int64_t begin = unit * kBlock, end = least(n, begin + kBlock);
    with_registers([&](auto bytes) FM_INLINE_LAMBDA {
      using L = Lanes<A, bytes()>;
      int64_t i = begin;
      for (; i + L::kCount <= end; i += L::kCount)
        f(static_cast<L*>(nullptr), std::true_type{}, i, L::kCount);
      if (i < end) f(static_cast<L*>(nullptr), std::false_type{}, i, end - i);
    });
  });
}

void check(const Tensor& x, const Tensor& other) {
  STD_TORCH_CHECK(x.is_contiguous() && other.is_contiguous() && x.numel() == other.numel() &&
                      x.scalar_type() == other.scalar_type(),
                  "fastmeta: activations take contiguous tensors of one size and dtype");
}

Tensor like(const Tensor& x) { return torch::stable::empty_like(x); }

Tensor forward(Tensor x, int64_t kind) {
  check(x, x);
  const Tensor y = like(x);
  with_dtype(x, [&](auto zero) {
    using A = decltype(zero);
    const A* const from = data_of<const A>(x);
    A* const to = data_of<A>(y);
    each_lane<A>(x.numel(), [&](auto* lane, auto whole, int64_t i, int64_t count) FM_INLINE_LAMBDA {
      using L = std::remove_pointer_t<decltype(lane)>;
      const L at = L::template load<whole()>(from + i, count);
      activation<0>(Activation(kind), at).f.template store<whole()>(to + i, count);
    });
  });
  return y;
}

Tensor backward(Tensor d, Tensor x, int64_t kind) {
  check(x, d);
  const Tensor y = like(x);
  with_dtype(x, [&](auto zero) {
    using A = decltype(zero);
    const A *const from = data_of<const A>(x), *const dy = data_of<const A>(d);
    A* const to = data_of<A>(y);
    each_lane<A>(x.numel(), [&](auto* lane, auto whole, int64_t i, int64_t count) FM_INLINE_LAMBDA {
      using L = std::remove_pointer_t<decltype(lane)>;
      const L at = L::template load<whole()>(from + i, count);
      const L first = activation<1>(Activation(kind), at).first;
      (L::template load<whole()>(dy + i, count) * first).template store<whole()>(to + i, count);
    });
  });
  return y;
}

// g: cotangent of d f'(x). Returns g f'(x) and g d f''(x).
std::tuple<Tensor, Tensor> double_backward(Tensor g, Tensor d, Tensor x, int64_t kind) {
  check(x, d);
  check(x, g);
  const Tensor d_d = like(x), d_x = like(x);
  with_dtype(x, [&](auto zero) {
    using A = decltype(zero);
    const A *const from = data_of<const A>(x), *const dy = data_of<const A>(d),
                   *const gy = data_of<const A>(g);
    A* const to_d = data_of<A>(d_d);
    A* const to_x = data_of<A>(d_x);
    each_lane<A>(x.numel(), [&](auto* lane, auto whole, int64_t i, int64_t count) FM_INLINE_LAMBDA {
      using L = std::remove_pointer_t<decltype(lane)>;
      const L at = L::template load<whole()>(from + i, count);
      const auto found = activation<2>(Activation(kind), at);
      const L given = L::template load<whole()>(gy + i, count);
      const L times = given * L::template load<whole()>(dy + i, count);
      (given * found.first).template store<whole()>(to_d + i, count);
      (times * found.second).template store<whole()>(to_x + i, count);
    });
  });
  return {d_d, d_x};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastmeta, CPU, m) {
  m.impl("activation", TORCH_BOX(&forward));
  m.impl("activation_backward", TORCH_BOX(&backward));
  m.impl("activation_double_backward", TORCH_BOX(&double_backward));
}

}  // namespace fastmeta
