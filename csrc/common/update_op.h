// The raw operators of one update rule (fastmeta/ops/inner_update.py), written once for all
// devices: outputs, dtypes, pointers. Of a device, Kernels<Pass> has run(args, on), which does the
// work; run_list(args, items, on), the same in place for tensors of any sizes; check(args, on),
// which only sets `finite`; and all_true(rows, count, on). `on` is a tensor of the device at work.
#pragma once

#include <string>
#include <tuple>
#include <vector>

#include "common/tensor.h"

namespace fastmeta {

using Optional = std::optional<Tensor>;

// What every pass is told about the rates: the tail of each operator's arguments.
struct Settings {
  const Optional &lr, &offsets, &active, &hypers;
  double lr_value;
  const std::vector<double>& values;  // hyperparameters where `hypers` is none
  int64_t flags;
};

// Bits of `needs`: the cotangents of p, g, s1, s2, then of p', s1', s2', then these two.
enum Needs : int64_t { kNeedFirstOutput = 4, kNeedRate = 7, kNeedHypers = 8 };

template <template <typename> class Rule, template <typename> class Kernels>
struct UpdateOp {
  // Gathers the streams of a pass; owns what had to be copied or made.
  template <typename Pass>
  struct Call {
    PassArgs<Pass> args;
    std::vector<Tensor> keep;

    Call(const Settings& settings, int64_t tasks, int64_t columns) {
      using A = typename Pass::A;
      args.tasks = tasks;
      args.columns = columns;
      args.flags = static_cast<int>(settings.flags);
      args.active = pointer_or_null<bool>(settings.active);
      Optional dense;
      args.rate[0] = rate_of<A>(settings.lr, settings.offsets, settings.lr_value, dense);
      if (dense) keep.push_back(*dense);
      STD_TORCH_CHECK(settings.values.size() <= size_t(kMaxHypers),
                      "fastmeta: too many hyperparameters");
      for (size_t i = 0; i < settings.values.size(); ++i) {
        args.hypers[0].value[i] = settings.values[i];
      }
      set_hypers(args.hypers[0], settings.hypers);
    }

    // [1 or T, kMaxHypers]
    void set_hypers(Hypers& hypers, const Optional& given) {
      if (!given) return;
      keep.push_back(dense_columns(*given));
      hypers.data = static_cast<const double*>(keep.back().const_data_ptr());
      hypers.row_stride = given->size(0) == 1 ? 0 : keep.back().stride(0);
    }

    void read(int slot, const Optional& t) {
      if (!t) return;
      keep.push_back(dense_columns(*t));
      args.in[slot] = stream_of(keep.back());
    }
    void write(int slot, const Tensor& t) { args.out[slot] = mutable_stream_of(t); }

    void watch(const Tensor& finite) {
      args.finite = static_cast<bool*>(finite.mutable_data_ptr());
      if (args.tasks > 0) Kernels<Pass>::all_true(args.finite, args.tasks, finite);
    }

    void run(const Tensor& on, bool sums = false) {
      // an empty batch still has gradients of zeros
      if ((args.tasks > 0 && args.columns > 0) || sums) Kernels<Pass>::run(args, on);
    }
  };

  template <typename F>
  static void with_accumulation(const Tensor& params, const F& f) {
    if (params.scalar_type() == ScalarType::Double) return f(double{});
    f(float{});
  }

  static Tensor flags_of_rows(bool wanted, const Tensor& on) {
    return empty_rows({wanted ? on.size(0) : 0}, ScalarType::Bool, on);
  }

  static std::tuple<Tensor, Tensor, Tensor, Tensor> update(Tensor params, Tensor grads, Optional s1,
                                                           Optional s2, Optional lr,
                                                           Optional offsets, Optional active,
                                                           Optional hypers, double lr_value,
                                                           std::vector<double> values,
                                                           int64_t flags, bool check_finite) {
    constexpr int states = Rule<float>::kStates;
    const auto result = [&](bool there) {
      return there ? empty_rows({params.size(0), params.size(1)}, params.scalar_type(), params)
                   : empty_rows({0}, params.scalar_type(), params);
    };
    const Tensor out[] = {result(true), result(states > 0), result(states > 1)};
    const Tensor finite = flags_of_rows(check_finite, params);
    with_accumulation(params, [&](auto zero) {
      using Pass = ForwardPass<Rule<decltype(zero)>>;
      Call<Pass> call({lr, offsets, active, hypers, lr_value, values, flags}, params.size(0),
                      params.size(1));
      const Optional in[] = {params, grads, s1, s2};
      for (int i = 0; i < Pass::kIn; ++i) call.read(i, in[i]);
      for (int i = 0; i < Pass::kOut; ++i) call.write(i, out[i]);
      if (check_finite) call.watch(finite);
      call.run(params);
    });
    return {out[0], out[1], out[2], finite};
  }

  static Tensor update_(Tensor params, Tensor grads, Optional s1, Optional s2, Optional lr,
                        Optional offsets, Optional active, Optional hypers, double lr_value,
                        std::vector<double> values, int64_t flags, bool check_finite) {
    const Tensor finite = flags_of_rows(check_finite, params);
    with_accumulation(params, [&](auto zero) {
      using Pass = ForwardPass<Rule<decltype(zero)>>;
      Call<Pass> call({lr, offsets, active, hypers, lr_value, values, flags}, params.size(0),
                      params.size(1));
      const Optional in[] = {params, grads, s1, s2};
      std::vector<std::pair<Tensor, Tensor>> back;  // (dense copy, the tensor to fill)
      for (int i = 0; i < Pass::kIn; ++i) {
        call.read(i, in[i]);
        if (i == 1) continue;
        const Tensor& dense = call.keep.back();
        call.write(i == 0 ? 0 : i - 1, dense);
        if (dense.get() != in[i]->get()) back.emplace_back(dense, *in[i]);
      }
      if (check_finite) {
        call.watch(finite);
        call.args.checked = true;
        if (params.size(0) > 0) Kernels<Pass>::check(call.args, params);
      }
      call.run(params);
      for (auto& [from, to] : back) torch::stable::copy_(to, from);
    });
    return finite;
  }

  // Contiguous tensors of any shapes and of one dtype (grads of another), each updated in place
  // with the same numbers. Nothing is written unless all of them fit.
  static void update_list_(std::vector<Tensor> params, std::vector<Tensor> grads,
                           std::vector<Tensor> s1, std::vector<Tensor> s2, double lr,
                           std::vector<double> values, int64_t flags) {
    constexpr int states = Rule<float>::kStates;
    const std::vector<Tensor>* lists[] = {&params, &grads, &s1, &s2};
    for (int i = 0; i < 4; ++i) {
      const size_t expected = i < 2 + states ? params.size() : 0;
      STD_TORCH_CHECK(lists[i]->size() == expected, "fastmeta: lists of different lengths");
    }
    if (params.empty()) return;
    with_accumulation(params[0], [&](auto zero) {
      using Pass = ForwardPass<Rule<decltype(zero)>>;
      const Optional none;
      Call<Pass> call({none, none, none, none, lr, values, flags}, 1, 0);
      for (int i = 0; i < Pass::kIn; ++i) call.args.in[i] = stream_of((*lists[i])[0]);
      for (int i = 0; i < Pass::kOut; ++i) call.args.out[i] = call.args.in[i == 0 ? 0 : i + 1];
      std::vector<ListItem<Pass>> items(params.size());
      for (size_t t = 0; t < items.size(); ++t) {
        items[t].columns = params[t].numel();
        for (int i = 0; i < Pass::kIn; ++i) {
          const Tensor& tensor = (*lists[i])[t];
          const bool fits = same_sizes(tensor, params[t]) && tensor.is_contiguous() &&
                            type_of(tensor.scalar_type()) == call.args.in[i].type &&
                            tensor.get_device_index() == params[0].get_device_index();
          STD_TORCH_CHECK(fits, "fastmeta: tensor ", t, " of list ", i, " does not fit");
          items[t].data[i] = const_cast<void*>(tensor.const_data_ptr());
        }
      }
      Kernels<Pass>::run_list(call.args, items, params[0]);
    });
  }

  // The outputs of a derivative pass, in the order of `needs`.
  struct Gradients {
    std::vector<Tensor> rows;  // p, g, s1, s2 (, p', s1', s2')
    Tensor lr, hypers;

    Gradients(int count, int64_t needs, const Tensor& like, ScalarType grads_dtype,
              const Optional& rate, const Optional& hyper)
        : lr(small(needs >> kNeedRate & 1, rate, like)),
          hypers(small(needs >> kNeedHypers & 1, hyper, like)) {
      const ScalarType dtype = like.scalar_type();
      for (int i = 0; i < count; ++i) {
        const bool needed = needs >> i & 1;
        rows.push_back(
            needed ? empty_rows({like.size(0), like.size(1)}, i == 1 ? grads_dtype : dtype, like)
                   : empty_rows({0}, dtype, like));
      }
    }
    static Tensor small(bool needed, const Optional& shape, const Tensor& like) {
      if (!needed) return empty_rows({0}, like.scalar_type(), like);
      return empty_rows({shape->size(0), shape->size(1)}, shape->scalar_type(), like);
    }

    template <typename Call>
    void attach(Call& call, int states, int64_t needs, const Settings& settings) const {
      int slot = 0;
      for (int i = 0; i < static_cast<int>(rows.size()); ++i) {
        const int state = i < kNeedFirstOutput ? i - 1 : i - kNeedFirstOutput;
        if (state > states) continue;
        if (needs >> i & 1) call.write(slot, rows[i]);
        ++slot;
      }
      using A = std::remove_pointer_t<decltype(call.args.d_lr)>;
      if (needs >> kNeedRate & 1) {
        call.args.d_lr = static_cast<A*>(lr.mutable_data_ptr());
        call.args.rate_rows = settings.lr->size(0);
      }
      if (needs >> kNeedHypers & 1) {
        call.args.d_hypers = static_cast<double*>(hypers.mutable_data_ptr());
        call.args.hyper_rows = settings.hypers->size(0);
      }
    }
    bool sums(int64_t needs) const { return (needs >> kNeedRate & 3) != 0; }
  };

  static std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> backward(
      Tensor v0, Optional v1, Optional v2, Optional params, Optional grads, Optional s1,
      Optional s2, Optional lr, Optional offsets, Optional active, Optional hypers, double lr_value,
      std::vector<double> values, int64_t flags, ScalarType grads_dtype, int64_t needs) {
    const Settings settings{lr, offsets, active, hypers, lr_value, values, flags};
    const Gradients out(4, needs, v0, grads_dtype, lr, hypers);
    with_accumulation(v0, [&](auto zero) {
      using Pass = BackwardPass<Rule<decltype(zero)>>;
      Call<Pass> call(settings, v0.size(0), v0.size(1));
      const Optional x[] = {params, grads, s1, s2}, v[] = {v0, v1, v2};
      for (int i = 0; i < Pass::kX; ++i) call.read(i, x[i]);
      for (int i = 0; i < Pass::kV; ++i) call.read(Pass::kX + i, v[i]);
      out.attach(call, Pass::R::kStates, needs, settings);
      call.run(v0, out.sums(needs));
    });
    return {out.rows[0], out.rows[1], out.rows[2], out.rows[3], out.lr, out.hypers};
  }

  static std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>
  double_backward(Tensor v0, Optional v1, Optional v2, Optional params, Optional grads, Optional s1,
                  Optional s2, Optional c0, Optional c1, Optional c2, Optional c3, Optional c_lr,
                  Optional c_hypers, Optional lr, Optional offsets, Optional active,
                  Optional hypers, double lr_value, std::vector<double> values, int64_t flags,
                  ScalarType grads_dtype, int64_t needs) {
    const Settings settings{lr, offsets, active, hypers, lr_value, values, flags};
    const Gradients out(7, needs, v0, grads_dtype, lr, hypers);
    with_accumulation(v0, [&](auto zero) {
      using A = decltype(zero);
      using Pass = DoubleBackwardPass<Rule<A>>;
      Call<Pass> call(settings, v0.size(0), v0.size(1));
      const Optional x[] = {params, grads, s1, s2}, v[] = {v0, v1, v2}, c[] = {c0, c1, c2, c3};
      for (int i = 0; i < Pass::kX; ++i) call.read(i, x[i]);
      for (int i = 0; i < Pass::kV; ++i) call.read(Pass::kX + i, v[i]);
      for (int i = 0; i < Pass::kX; ++i) call.read(Pass::kX + Pass::kV + i, c[i]);
      Optional dense;
      call.args.rate[1] = rate_of<A>(c_lr, c_lr ? offsets : Optional(), 0.0, dense);
      if (dense) call.keep.push_back(*dense);
      call.set_hypers(call.args.hypers[1], c_hypers);
      out.attach(call, Pass::R::kStates, needs, settings);
      call.run(v0, out.sums(needs));
    });
    const auto& r = out.rows;
    return {r[0], r[1], r[2], r[3], r[4], r[5], r[6], out.lr, out.hypers};
  }

  static void add_to(torch::stable::detail::StableLibrary& library, const std::string& name) {
    library.impl((name + "_update").c_str(), TORCH_BOX(&update));
    library.impl((name + "_update_").c_str(), TORCH_BOX(&update_));
    library.impl((name + "_update_list_").c_str(), TORCH_BOX(&update_list_));
    library.impl((name + "_update_backward").c_str(), TORCH_BOX(&backward));
    library.impl((name + "_update_double_backward").c_str(), TORCH_BOX(&double_backward));
  }
};

// Every rule of the family. Kernels is the device's driver.
template <template <typename> class Kernels>
void add_updates(torch::stable::detail::StableLibrary& library) {
  UpdateOp<SgdRule, Kernels>::add_to(library, "sgd");
  UpdateOp<MomentumRule, Kernels>::add_to(library, "momentum");
  UpdateOp<AdamRule, Kernels>::add_to(library, "adam");
  UpdateOp<AdamWRule, Kernels>::add_to(library, "adamw");
  UpdateOp<RMSpropRule, Kernels>::add_to(library, "rmsprop");
  UpdateOp<AdagradRule, Kernels>::add_to(library, "adagrad");
}

}  // namespace fastmeta
