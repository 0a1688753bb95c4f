// The raw sgd operators (fastmeta/ops/inner_update.py), written once for all devices: outputs,
// dtypes and pointers. Kernels<P, G> supplies update(UpdateArgs, on) and backward(BackwardArgs, on)
// for parameters P and gradients G, `on` being a tensor of the device at work.
#pragma once

#include <tuple>

#include "common/tensor.h"
#include "math/inner_update.h"

namespace fastmeta {

template <typename P, typename G>
struct UpdateArgs {
  using A = acc_t<P>;
  int64_t tasks, columns;
  Rows<P> out;
  Rows<const P> p;
  Rows<const G> g;
  Rate<A> rate;
  const bool* active;  // null: all
  Sgd<A> rule;
};

template <typename P, typename G>
struct BackwardArgs {
  using A = acc_t<P>;
  int64_t tasks, columns;
  Rows<const P> v;  // cotangent of the output
  Rows<const P> p;  // null without weight decay
  Rows<const G> g;  // null unless d_lr is wanted
  Rate<A> rate;
  const bool* active;
  Sgd<A> rule;
  // results; null: not wanted
  Rows<P> d_params;
  Rows<G> d_grads;
  A* d_lr;  // [rate_rows, rate.columns], rate_rows being 1 or tasks
  int64_t rate_rows;

  FM_HD bool frozen(int64_t t) const { return active != nullptr && !active[t]; }
};

// The part of a row that entry s of the rate covers, and the rows that share the rate row r.
struct Span {
  int64_t begin, end;
};
template <typename A>
FM_HD Span columns_of(const Rate<A>& rate, int64_t s, int64_t columns) {
  if (rate.kind != RateKind::kSegment) return {0, columns};
  return {rate.offsets[s], rate.offsets[s + 1]};
}
FM_HD Span rows_sharing(int64_t rate_rows, int64_t r, int64_t tasks) {
  if (rate_rows == 1) return {0, tasks};
  return {r, r + 1};
}

template <template <typename, typename> class Kernels>
struct SgdOp {
  using Optional = std::optional<Tensor>;

  static void run_update(const Tensor& out, const Tensor& params, const Tensor& grads,
                         const Optional& lr, const Optional& offsets, const Optional& active,
                         double lr_value, double weight_decay, bool maximize) {
    const Tensor p = dense_columns(params), g = dense_columns(grads);
    dispatch_params_grads(p.scalar_type(), g.scalar_type(), [&](auto p_zero, auto g_zero) {
      using P = decltype(p_zero);
      using G = decltype(g_zero);
      using A = acc_t<P>;
      Optional keep;
      UpdateArgs<P, G> args{};
      args.tasks = p.size(0);
      args.columns = p.size(1);
      args.out = mutable_rows_of<P>(out);
      args.p = rows_of<P>(p);
      args.g = rows_of<G>(g);
      args.rate = rate_of<A>(lr, offsets, lr_value, keep);
      args.active = pointer_or_null<bool>(active);
      args.rule = {A(maximize ? -1 : 1), A(weight_decay)};
      if (args.tasks > 0 && args.columns > 0) Kernels<P, G>::update(args, p);
    });
  }

  static Tensor update(Tensor params, Tensor grads, Optional lr, Optional offsets, Optional active,
                       double lr_value, double weight_decay, bool maximize) {
    Tensor out = empty_rows({params.size(0), params.size(1)}, params.scalar_type(), params);
    run_update(out, params, grads, lr, offsets, active, lr_value, weight_decay, maximize);
    return out;
  }

  static void update_(Tensor params, Tensor grads, Optional lr, Optional offsets, Optional active,
                      double lr_value, double weight_decay, bool maximize) {
    const Tensor out = dense_columns(params);
    run_update(out, out, grads, lr, offsets, active, lr_value, weight_decay, maximize);
    if (out.get() != params.get()) torch::stable::copy_(params, out);
  }

  static std::tuple<Tensor, Tensor, Tensor> backward(Tensor d_out, Optional params, Optional grads,
                                                     Optional lr, Optional offsets, Optional active,
                                                     double lr_value, double weight_decay,
                                                     bool maximize, ScalarType grads_dtype,
                                                     bool need_params, bool need_grads,
                                                     bool need_lr) {
    const int64_t tasks = d_out.size(0), columns = d_out.size(1);
    const ScalarType dtype = d_out.scalar_type();
    const auto result = [&](bool needed, ScalarType type) {
      return needed ? empty_rows({tasks, columns}, type, d_out) : empty_rows({0}, dtype, d_out);
    };
    const Tensor d_params = result(need_params, dtype);
    const Tensor d_grads = result(need_grads, grads_dtype);
    const Tensor d_lr = need_lr ? empty_rows({lr->size(0), lr->size(1)}, lr->scalar_type(), d_out)
                                : empty_rows({0}, dtype, d_out);
    const Tensor v = dense_columns(d_out);
    dispatch_params_grads(dtype, grads_dtype, [&](auto p_zero, auto g_zero) {
      using P = decltype(p_zero);
      using G = decltype(g_zero);
      using A = acc_t<P>;
      Optional keep, p, g;
      BackwardArgs<P, G> args{};
      args.tasks = tasks;
      args.columns = columns;
      args.v = rows_of<P>(v);
      args.rate = rate_of<A>(lr, offsets, lr_value, keep);
      args.active = pointer_or_null<bool>(active);
      args.rule = {A(maximize ? -1 : 1), A(weight_decay)};
      if (need_params) args.d_params = mutable_rows_of<P>(d_params);
      if (need_grads) args.d_grads = mutable_rows_of<G>(d_grads);
      if (need_lr) {
        g = dense_columns(*grads);
        args.g = rows_of<G>(*g);
        if (params) {
          p = dense_columns(*params);
          args.p = rows_of<P>(*p);
        }
        args.d_lr = static_cast<A*>(d_lr.mutable_data_ptr());
        args.rate_rows = lr->size(0);
      }
      // an empty batch still has a gradient of zeros for a shared rate
      if ((tasks > 0 && columns > 0) || need_lr) Kernels<P, G>::backward(args, v);
    });
    return {d_params, d_grads, d_lr};
  }

  static void add_to(torch::stable::detail::StableLibrary& library) {
    library.impl("sgd_update", TORCH_BOX(&update));
    library.impl("sgd_update_", TORCH_BOX(&update_));
    library.impl("sgd_update_backward", TORCH_BOX(&backward));
  }
};

}  // namespace fastmeta
