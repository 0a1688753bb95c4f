// The operators of a linear layer with low-rank terms of every task, on the CPU.

#include <tuple>

#include "cpu/lora_passes.h"

namespace fastmeta {
namespace {

template <typename S>
Layer<S> layer(const Tensor& x, const Tensor& weight, const Optional& weight_scale, const Tensor& a,
               const Tensor& b, double scale, bool bf16) {
  const int64_t K = x.size(1);
  return {K, weight.size(0), a.size(1), matrix<S>(x), Weight<S>(weight, weight_scale, K, bf16), a,
          b, acc_t<S>(scale)};
}

// The weight, or a copy of it where neither its rows nor its columns are adjacent.
Tensor readable(const Tensor& weight) {
  return weight.stride(0) == 1 || weight.stride(1) == 1 ? weight
                                                        : torch::stable::contiguous(weight);
}

std::tuple<Tensor, Tensor> forward(Tensor x, Tensor weight, Optional weight_scale, Optional bias,
                                   Tensor a, Tensor b, Optional offsets, double scale, bool bf16) {
  const int64_t M = x.size(0), K = x.size(1), N = weight.size(0), r = a.size(1);
  const bool wide = x.scalar_type() == ScalarType::Double;
  const Tensor y = empty_rows({M, N}, x.scalar_type(), x);
  const Tensor s = empty_rows({M, r}, wide ? ScalarType::Double : ScalarType::Float, x);
  const Plan plan(M, a.size(0), K + N, offsets);
  weight = readable(weight);
  with_any_dtype(x, [&](auto zero) {
    using S = decltype(zero);
    LoraForward<S> pass{layer<S>(x, weight, weight_scale, a, b, scale, bf16), bias, matrix<S>(y),
                        static_cast<acc_t<S>*>(s.mutable_data_ptr())};
    pass.prepare(true, plan);
    plan.run(pass);
  });
  return {y, s};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> backward(Tensor dy, Tensor x, Tensor weight,
                                                    Optional weight_scale, Tensor a, Tensor b,
                                                    Tensor s, Optional offsets, double scale,
                                                    int64_t needs, bool bf16) {
  const int64_t M = x.size(0), K = x.size(1), N = dy.size(1), T = a.size(0), r = a.size(1);
  const Tensor dx = if_wanted(needs & kX, {M, K}, x);
  const Tensor d_bias = if_wanted(needs & kBias, {T, N}, x);
  const Tensor d_a = if_wanted(needs & kA, {T, r, K}, x);
  const Tensor d_b = if_wanted(needs & kB, {T, N, r}, x);
  const Plan plan(M, T, K + N, offsets);
  weight = readable(weight);
  with_any_dtype(x, [&](auto zero) {
    using S = decltype(zero);
    LoraBackward<S> pass{layer<S>(x, weight, weight_scale, a, b, scale, bf16),
                         needs,
                         matrix<S>(dy),
                         matrix<S>(dx),
                         static_cast<const acc_t<S>*>(s.const_data_ptr()),
                         {r, K, N, d_a, d_b, d_bias}};
    pass.sums.parts.resize(size_t(plan.slots * pass.sums.size()));
    if (needs & kX) pass.prepare(false, plan);
    plan.run(pass);
    pass.sums.finish(plan);
  });
  return {dx, d_bias, d_a, d_b};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> double_backward(Optional gx, Optional gbias, Optional ga,
                                                           Optional gb, Tensor dy, Tensor x,
                                                           Tensor weight, Optional weight_scale,
                                                           Tensor a, Tensor b, Tensor s,
                                                           Optional offsets, double scale,
                                                           int64_t needs, bool bf16) {
  const int64_t M = x.size(0), K = x.size(1), N = dy.size(1), T = a.size(0), r = a.size(1);
  const Tensor d_dy = if_wanted(needs & kDy, {M, N}, x);
  const Tensor d_x = if_wanted(needs & kX, {M, K}, x);
  const Tensor d_a = if_wanted(needs & kA, {T, r, K}, x);
  const Tensor d_b = if_wanted(needs & kB, {T, N, r}, x);
  const Tensor none = if_wanted(false, {0}, x);
  const Plan plan(M, T, K + N, offsets);
  weight = readable(weight);
  with_any_dtype(x, [&](auto zero) {
    using S = decltype(zero);
    LoraSecond<S> pass{layer<S>(x, weight, weight_scale, a, b, scale, bf16),
                       needs,
                       gx,
                       gbias,
                       ga,
                       gb,
                       matrix<S>(dy),
                       matrix<S>(d_dy),
                       matrix<S>(d_x),
                       static_cast<const acc_t<S>*>(s.const_data_ptr()),
                       {r, K, N, d_a, d_b, none}};
    pass.sums.parts.resize(size_t(plan.slots * pass.sums.size()));
    if (gx && (needs & kDy)) pass.prepare(true, plan);
    plan.run(pass);
    pass.sums.finish(plan);
  });
  return {d_dy, d_x, d_a, d_b};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastmeta, CPU, m) {
  m.impl("lora_linear", TORCH_BOX(&forward));
  m.impl("lora_linear_backward", TORCH_BOX(&backward));
  m.impl("lora_linear_double_backward", TORCH_BOX(&double_backward));
}

}  // namespace fastmeta
