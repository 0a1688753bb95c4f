// What a kernel computes per coordinate: an update, its vector-Jacobian product, or the
// vector-Jacobian product of that. Each pass maps input streams [T, P] to output streams [T, P] and
// to terms that are summed into the gradients of the learning rate and the hyperparameters.
#pragma once

#include "math/inner_update.h"

namespace fastmeta {

// Inputs p, g, s...; outputs p', s'... . `frozen` says which input an output of a frozen row is a
// copy of (-1: zeros).
template <typename Rule>
struct ForwardPass {
  using A = typename Rule::A;
  using R = Rule;
  static constexpr int kIn = 2 + R::kStates, kOut = 1 + R::kStates, kSets = 1, kTerms = 0;
  using Row = typename R::template Row<A>;

  FM_HD static constexpr int frozen(int output) { return output == 0 ? 0 : output + 1; }
  FM_HD static Row row(const double (&h)[1][kMaxHypers], int flags) { return Row::of(h[0], flags); }
  FM_HD static void run(const A* in, const A* lr, const Row& row, A* out, A*) {
    R::forward(in, lr[0], row, out);
  }
};

// Inputs p, g, s..., and cotangents of p', s'...; outputs cotangents of p, g, s... . Terms: the
// learning rate, then kHypers hyperparameters.
template <typename Rule>
struct BackwardPass {
  using A = typename Rule::A;
  using R = Rule;
  static constexpr int kX = 2 + R::kStates, kV = 1 + R::kStates;
  static constexpr int kIn = kX + kV, kOut = kX, kSets = 1, kTerms = 1 + R::kHypers;
  using Row = typename R::template Row<A>;

  FM_HD static constexpr int frozen(int output) {
    return output == 0 ? kX : output == 1 ? -1 : kX + output - 1;
  }
  FM_HD static Row row(const double (&h)[1][kMaxHypers], int flags) { return Row::of(h[0], flags); }
  FM_HD static void run(const A* in, const A* lr, const Row& row, A* out, A* terms) {
    R::backward(in, lr[0], row, in + kX, out, terms, terms + 1);
  }
};

// The derivative of <c, backward(x, v)>: inputs x, v, and c (of the shapes of x), also c for the
// learning rate and the hyperparameters (the second set of these); outputs cotangents of x, then
// of v; terms as above. In v it is forward's change along c, in x it is backward's.
template <typename Rule>
struct DoubleBackwardPass {
  using A = typename Rule::A;
  using R = Rule;
  static constexpr int kX = 2 + R::kStates, kV = 1 + R::kStates;
  static constexpr int kIn = kX + kV + kX, kOut = kX + kV, kSets = 2, kTerms = 1 + R::kHypers;
  using D = Dual<A>;
  using Row = typename R::template Row<D>;

  FM_HD static constexpr int frozen(int output) {
    return output < kX ? -1 : output == kX ? kX + kV : output + kV + 1;
  }
  FM_HD static Row row(const double (&h)[2][kMaxHypers], int flags) {
    Dual<double> both[kMaxHypers];
    for (int i = 0; i < kMaxHypers; ++i) both[i] = {h[0][i], i < R::kHypers ? h[1][i] : 0.0};
    return Row::of(both, flags);
  }
  FM_HD static void run(const A* in, const A* lr, const Row& row, A* out, A* terms) {
    D x[kX], v[kV], dx[kX], dv[kV], d[kTerms];
    for (int i = 0; i < kX; ++i) x[i] = D(in[i], in[kX + kV + i]);
    for (int i = 0; i < kV; ++i) v[i] = D(in[kX + i]);
    const D rate(lr[0], lr[1]);
    R::backward(x, rate, row, v, dx, d, d + 1);
    R::forward(x, rate, row, dv);
    for (int i = 0; i < kX; ++i) out[i] = dx[i].d;
    for (int i = 0; i < kV; ++i) out[kX + i] = dv[i].d;
    for (int i = 0; i < kTerms; ++i) terms[i] = d[i].d;
  }
};

}  // namespace fastmeta
