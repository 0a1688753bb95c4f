// The raw operators of the head's inner loop (fastmeta/ops/head_inner_loop.py), written once for
// all devices: outputs, dtypes, pointers. Of a device, Head<A> has forward(args, on) and
// backward(args, on), which do the work; `on` is a tensor of the device.
#pragma once

#include <tuple>
#include <vector>

#include "common/tensor.h"
#include "math/head_task.h"

namespace fastmeta {

template <template <typename> class Head>
struct HeadOp {
  using Optional = std::optional<Tensor>;

  // Bits of `needs`.
  enum Needs : int64_t { kFeatures = 1, kWeight = 2, kBias = 4, kRate = 8 };

  // A tensor [T, ..., n] whose tasks are dense (they may all be the same one), kept alive.
  template <typename A>
  static PerTask<const A> tasks_of(const Tensor& given, std::vector<Tensor>& keep) {
    bool dense = true;
    int64_t step = 1;
    for (int64_t i = given.dim() - 1; i > 0; --i) {
      dense = dense && (given.size(i) == 1 || given.stride(i) == step);
      step *= given.size(i);
    }
    keep.push_back(dense ? given : torch::stable::contiguous(given));
    const Tensor& t = keep.back();
    return {static_cast<const A*>(t.const_data_ptr()), t.stride(0), 0};
  }

  // A small tensor whose elements are adjacent, kept alive.
  template <typename T>
  static T* adjacent(const Optional& given, std::vector<Tensor>& keep) {
    if (!given) return nullptr;
    keep.push_back(given->is_contiguous() ? *given : torch::stable::contiguous(*given));
    return static_cast<T*>(const_cast<void*>(keep.back().const_data_ptr()));
  }

  template <typename A>
  static HeadArgs<A> arguments(const Tensor& features, const Tensor& labels, const Tensor& weight,
                               const Optional& bias, const Optional& lr, double lr_value,
                               double momentum, double decay, int64_t steps, bool gram,
                               std::vector<Tensor>& keep) {
    HeadArgs<A> args;
    args.shape = {features.size(0),
                  features.size(1),
                  features.size(2),
                  weight.size(1),
                  steps,
                  bias.has_value(),
                  gram};
    const bool dense = features.size(2) <= 1 || features.stride(2) == 1;
    keep.push_back(dense ? features : torch::stable::contiguous(features));
    const Tensor& x = keep.back();
    args.features = x.const_data_ptr();
    args.features_task = x.stride(0);
    args.features_row = x.stride(1);
    args.type = type_of(x.scalar_type());
    args.labels = adjacent<const int64_t>(labels, keep);
    args.weight = tasks_of<A>(weight, keep);
    if (bias) args.bias = tasks_of<A>(*bias, keep);
    args.lr = adjacent<const A>(lr, keep);
    args.lr_value = static_cast<A>(lr_value);
    args.momentum = static_cast<A>(momentum);
    args.decay = static_cast<A>(decay);
    return args;
  }

  template <typename F>
  static void with_accumulation(const Tensor& weight, const F& f) {
    if (weight.scalar_type() == ScalarType::Double) return f(double{});
    f(float{});
  }

  template <typename A>
  static A* data(const Tensor& t) {
    return static_cast<A*>(t.mutable_data_ptr());
  }

  static std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> forward(
      Tensor features, Tensor labels, Tensor weight, Optional bias, Optional lr, Optional ways,
      Optional active, double lr_value, double momentum, double weight_decay, int64_t steps,
      bool gram, bool freeze, bool keep_steps) {
    const int64_t T = features.size(0), N = features.size(1), D = features.size(2);
    const int64_t C = weight.size(1);
    const ScalarType dtype = weight.scalar_type();
    const auto kept = [&](bool wanted, std::initializer_list<int64_t> sizes) {
      return wanted ? empty_rows(sizes, dtype, weight) : empty_rows({0}, dtype, weight);
    };
    const Tensor new_weight = empty_rows({T, C, D}, dtype, weight);
    const Tensor new_bias = kept(bias.has_value(), {T, C});
    const Tensor losses = empty_rows({T, steps}, dtype, weight);
    const Tensor taken = empty_rows({T}, ScalarType::Long, weight);
    const Tensor probabilities = kept(keep_steps, {T, steps, C, N});
    const Tensor products = kept(keep_steps && gram, {T, N, N});
    with_accumulation(weight, [&](auto zero) {
      using A = decltype(zero);
      std::vector<Tensor> keep;
      HeadArgs<A> args = arguments<A>(features, labels, weight, bias, lr, lr_value, momentum,
                                      weight_decay, steps, gram, keep);
      args.ways = adjacent<const int64_t>(ways, keep);
      args.active = adjacent<const bool>(active, keep);
      args.freeze = freeze;
      args.new_weight = data<A>(new_weight);
      args.new_bias = data<A>(new_bias);
      args.losses = data<A>(losses);
      args.taken = data<int64_t>(taken);
      if (keep_steps) args.probabilities = data<A>(probabilities);
      if (keep_steps && gram) args.products = data<A>(products);
      if (T > 0) Head<A>::forward(args, weight);
    });
    return {new_weight, new_bias, losses, taken, probabilities, products};
  }

  static std::tuple<Tensor, Tensor, Tensor, Tensor> backward(
      Tensor v_weight, Optional v_bias, Tensor features, Tensor labels, Tensor weight,
      Optional bias, Optional lr, Tensor taken, Tensor probabilities, Tensor products,
      double lr_value, double momentum, double weight_decay, int64_t steps, bool gram,
      int64_t exact, int64_t needs) {
    const int64_t T = features.size(0), N = features.size(1), D = features.size(2);
    const int64_t C = weight.size(1);
    const ScalarType dtype = weight.scalar_type();
    const auto wanted = [&](Needs bit, std::initializer_list<int64_t> sizes, ScalarType type) {
      return needs & bit ? empty_rows(sizes, type, weight) : empty_rows({0}, type, weight);
    };
    const Tensor d_features = wanted(kFeatures, {T, N, D}, features.scalar_type());
    const Tensor d_weight = wanted(kWeight, {T, C, D}, dtype);
    const Tensor d_bias = wanted(kBias, {T, C}, dtype);
    const Tensor d_lr = wanted(kRate, {T, steps}, dtype);
    with_accumulation(weight, [&](auto zero) {
      using A = decltype(zero);
      std::vector<Tensor> keep;
      HeadArgs<A> args = arguments<A>(features, labels, weight, bias, lr, lr_value, momentum,
                                      weight_decay, steps, gram, keep);
      args.v_weight = tasks_of<A>(v_weight, keep);
      if (v_bias) args.v_bias = tasks_of<A>(*v_bias, keep);
      args.taken = adjacent<int64_t>(taken, keep);
      args.probabilities = adjacent<A>(probabilities, keep);
      args.products = adjacent<A>(products, keep);
      args.exact = exact;
      if (needs & kFeatures) args.d_features = d_features.mutable_data_ptr();
      if (needs & kWeight) args.d_weight = data<A>(d_weight);
      if (needs & kBias) args.d_bias = data<A>(d_bias);
      if (needs & kRate) args.d_lr = data<A>(d_lr);
      if (T > 0) Head<A>::backward(args, weight);
    });
    return {d_features, d_weight, d_bias, d_lr};
  }

  static void add_to(torch::stable::detail::StableLibrary& library) {
    library.impl("head_inner_loop", TORCH_BOX(&forward));
    library.impl("head_inner_loop_backward", TORCH_BOX(&backward));
  }
};

}  // namespace fastmeta
