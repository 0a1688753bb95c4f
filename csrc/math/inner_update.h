// The maths of the inner updates, one struct per rule, shared by csrc/cpu and csrc/cuda.
//
// A rule works on one coordinate: x = {p, g, s...} (parameter, gradient, state), its learning rate,
// and the row's hyperparameters. `forward` gives {p', s'...}; `backward` takes the cotangents v of
// these and gives those of x, lr and the hyperparameters. S is A, or Dual<A> for derivatives of the
// derivatives (math/passes.h). A hyperparameter is a number per row: h[0] weight decay, h[1] factor
// of the gradient, then the rule's own; those past kHypers have no derivative (step counts).
//
// The order of operations is torch.optim's, except that sqrt(v) is multiplied by the inverse of the
// bias correction's root where torch divides.
#pragma once

#include "math/dual.h"

namespace fastmeta {

constexpr int kMaxHypers = 6;
constexpr int kMaxStates = 2;

// A gradient from here on counts as not finite: its square, which most rules form, is Inf.
template <typename A>
constexpr A kSquareable = sizeof(A) == 8 ? A(0x1p512) : A(0x1p64);

enum Flags : int { kMaximize = 1, kNesterov = 2, kFirst = 4 };

// g' = +- scale g + decay p: what every rule but AdamW does first. Flags become factors, so that a
// loop over coordinates has no branches.
template <typename S>
struct Gradient {
  S decay, scale, sign;  // scale includes the sign, its derivative in scale

  template <typename H>
  FM_HD static Gradient of(const H* h, int flags) {
    const H sign = H((flags & kMaximize) != 0 ? -1.0 : 1.0);
    return {as<S>(h[0]), as<S>(sign * h[1]), as<S>(sign)};
  }
  FM_HD S operator()(S p, S g) const { return scale * g + decay * p; }
  // cotangent d of g': returns that of g, and those of decay and scale in dh[0], dh[1]
  FM_HD S backward(S p, S g, S d, S* dh) const {
    dh[0] = p * d;
    dh[1] = sign * g * d;
    return scale * d;
  }
  FM_HD S to_params(S d) const { return decay * d; }
};

// p' = p - lr g'
template <typename Acc>
struct SgdRule {
  using A = Acc;
  static constexpr int kStates = 0, kHypers = 2;

  template <typename S>
  struct Row {
    Gradient<S> gradient;
    template <typename H>
    FM_HD static Row of(const H* h, int flags) {
      return {Gradient<S>::of(h, flags)};
    }
  };

  template <typename S>
  FM_HD static void forward(const S* x, S lr, const Row<S>& row, S* out) {
    out[0] = x[0] - lr * row.gradient(x[0], x[1]);
  }
  template <typename S>
  FM_HD static void backward(const S* x, S lr, const Row<S>& row, const S* v, S* dx, S* dlr,
                             S* dh) {
    const S d = -(lr * v[0]);
    dx[1] = row.gradient.backward(x[0], x[1], d, dh);
    dx[0] = v[0] + row.gradient.to_params(d);
    *dlr = -(v[0] * row.gradient(x[0], x[1]));
  }
};

// b' = momentum b + (1 - dampening) g' (first step: b' = g'); p' = p - lr b', or with Nesterov
// p - lr (g' + momentum b').
template <typename Acc>
struct MomentumRule {
  using A = Acc;
  static constexpr int kStates = 1, kHypers = 4;  // momentum, dampening

  template <typename S>
  struct Row {
    Gradient<S> gradient;
    S keep, gain;     // b' = keep b + gain g'
    S along, beside;  // the step: along b' + beside g'
    S ahead, known;   // derivatives of along and keep in the momentum
    S damped;         // derivative of gain in the dampening
    template <typename H>
    FM_HD static Row of(const H* h, int flags) {
      const bool first = (flags & kFirst) != 0, nesterov = (flags & kNesterov) != 0;
      const H zero(0.0), one(1.0);
      return {Gradient<S>::of(h, flags),       as<S>(first ? zero : h[2]),
              as<S>(first ? one : one - h[3]), as<S>(nesterov ? h[2] : one),
              as<S>(nesterov ? one : zero),    as<S>(nesterov ? one : zero),
              as<S>(first ? zero : one),       as<S>(first ? zero : -one)};
    }
  };

  template <typename S>
  FM_HD static void forward(const S* x, S lr, const Row<S>& row, S* out) {
    const S g = row.gradient(x[0], x[1]);
    const S b = row.keep * x[2] + row.gain * g;
    out[0] = x[0] - lr * (row.along * b + row.beside * g);
    out[1] = b;
  }
  template <typename S>
  FM_HD static void backward(const S* x, S lr, const Row<S>& row, const S* v, S* dx, S* dlr,
                             S* dh) {
    const S g = row.gradient(x[0], x[1]);
    const S b = row.keep * x[2] + row.gain * g;
    const S d = -(lr * v[0]);  // of the step
    const S db = v[1] + row.along * d;
    const S dg = row.gain * db + row.beside * d;
    dx[1] = row.gradient.backward(x[0], x[1], dg, dh);
    dx[0] = v[0] + row.gradient.to_params(dg);
    dx[2] = row.keep * db;
    *dlr = -(v[0] * (row.along * b + row.beside * g));
    dh[2] = row.known * x[2] * db + row.ahead * b * d;
    dh[3] = row.damped * g * db;
  }
};

// m' = beta1 m + (1 - beta1) g', v' = beta2 v + (1 - beta2) g'^2,
// p' = p - lr / (1 - beta1^k) m' / (sqrt(v') / sqrt(1 - beta2^k) + eps).
// AdamW: g' without decay, and p (1 - lr decay) in place of p.
template <typename Acc, bool kDecoupled>
struct AdamFamily {
  using A = Acc;
  static constexpr int kStates = 2, kHypers = 5;  // beta1, beta2, eps; then the step, from 1

  template <typename S>
  struct Row {
    Gradient<S> gradient;
    S decay, beta1, beta2, rest1, rest2, eps;
    S c1, c2;    // 1 / (1 - beta1^k), 1 / sqrt(1 - beta2^k)
    S dc1, dc2;  // their derivatives in beta1 and beta2
    template <typename H>
    FM_HD static Row of(const H* h, int flags) {
      H own[2] = {kDecoupled ? H(0) : h[0], h[1]};
      const double k = value_of(h[5]);
      const H gap1 = H(1) - power(h[2], k), gap2 = H(1) - power(h[3], k);
      const H c1 = H(1) / gap1, c2 = H(1) / root(gap2);
      const H slope1 = H(k) * power(h[2], k - 1), slope2 = H(0.5 * k) * power(h[3], k - 1);
      return {Gradient<S>::of(own, flags),
              as<S>(h[0]),
              as<S>(h[2]),
              as<S>(h[3]),
              as<S>(H(1) - h[2]),
              as<S>(H(1) - h[3]),
              as<S>(h[4]),
              as<S>(c1),
              as<S>(c2),
              as<S>(slope1 * c1 * c1),
              as<S>(slope2 * c2 / gap2)};
    }
  };

  template <typename S>
  FM_HD static void forward(const S* x, S lr, const Row<S>& row, S* out) {
    const S g = row.gradient(x[0], x[1]);
    const S m = row.beta1 * x[2] + row.rest1 * g;
    const S v = row.beta2 * x[3] + row.rest2 * g * g;
    const S denominator = root(v) * row.c2 + row.eps;
    const S start = kDecoupled ? x[0] - lr * row.decay * x[0] : x[0];
    out[0] = start - lr * row.c1 * m / denominator;
    out[1] = m;
    out[2] = v;
  }
  template <typename S>
  FM_HD static void backward(const S* x, S lr, const Row<S>& row, const S* v, S* dx, S* dlr,
                             S* dh) {
    const S g = row.gradient(x[0], x[1]);
    const S m = row.beta1 * x[2] + row.rest1 * g;
    const S square = row.beta2 * x[3] + row.rest2 * g * g;
    const S r = root(square);
    const S inverse = S(A(1)) / (r * row.c2 + row.eps);
    const S u = m * inverse;
    const S du = -(lr * row.c1 * v[0]);
    const S dm = v[1] + du * inverse;
    const S d_denominator = -(du * inverse * u);
    const S dv = v[2] + d_denominator * row.c2 * root_slope(r);
    const S dg = row.rest1 * dm + S(A(2)) * row.rest2 * g * dv;
    dx[1] = row.gradient.backward(x[0], x[1], dg, dh);
    if constexpr (kDecoupled) {
      const S pulled = lr * v[0];
      dx[0] = v[0] - row.decay * pulled;
      dh[0] = -(pulled * x[0]);
      *dlr = -(v[0] * (row.c1 * u + row.decay * x[0]));
    } else {
      dx[0] = v[0] + row.gradient.to_params(dg);
      *dlr = -(v[0] * row.c1 * u);
    }
    dx[2] = row.beta1 * dm;
    dx[3] = row.beta2 * dv;
    dh[2] = dm * (x[2] - g) - lr * v[0] * u * row.dc1;
    dh[3] = dv * (x[3] - g * g) + d_denominator * r * row.dc2;
    dh[4] = d_denominator;
  }
};
template <typename A>
using AdamRule = AdamFamily<A, false>;
template <typename A>
using AdamWRule = AdamFamily<A, true>;

// v' = alpha v + (1 - alpha) g'^2, p' = p - lr g' / (sqrt(v') + eps). Adagrad: v' = v + g'^2 and
// lr / (1 + (k - 1) lr_decay) in place of lr.
template <typename Acc, bool kAdagrad>
struct RootFamily {
  using A = Acc;
  static constexpr int kStates = 1, kHypers = 4;  // alpha or lr_decay, eps; Adagrad: then the step

  template <typename S>
  struct Row {
    Gradient<S> gradient;
    S keep, gain, eps;
    S c, dc;  // factor of lr and its derivative in lr_decay
    template <typename H>
    FM_HD static Row of(const H* h, int flags) {
      const H past = H(kAdagrad ? value_of(h[4]) - 1 : 0);
      const H c = H(1) / (H(1) + past * h[2]);
      return {Gradient<S>::of(h, flags),
              as<S>(kAdagrad ? H(1) : h[2]),
              as<S>(kAdagrad ? H(1) : H(1) - h[2]),
              as<S>(h[3]),
              as<S>(c),
              as<S>(-(past * c * c))};
    }
  };

  template <typename S>
  FM_HD static void forward(const S* x, S lr, const Row<S>& row, S* out) {
    const S g = row.gradient(x[0], x[1]);
    const S v = row.keep * x[2] + row.gain * g * g;
    out[0] = x[0] - lr * row.c * g / (root(v) + row.eps);
    out[1] = v;
  }
  template <typename S>
  FM_HD static void backward(const S* x, S lr, const Row<S>& row, const S* v, S* dx, S* dlr,
                             S* dh) {
    const S g = row.gradient(x[0], x[1]);
    const S r = root(row.keep * x[2] + row.gain * g * g);
    const S inverse = S(A(1)) / (r + row.eps);
    const S u = g * inverse;
    const S du = -(lr * row.c * v[0]);
    const S d_denominator = -(du * inverse * u);
    const S dv = v[1] + d_denominator * root_slope(r);
    const S dg = du * inverse + S(A(2)) * row.gain * g * dv;
    dx[1] = row.gradient.backward(x[0], x[1], dg, dh);
    dx[0] = v[0] + row.gradient.to_params(dg);
    dx[2] = row.keep * dv;
    *dlr = -(v[0] * row.c * u);
    dh[2] = kAdagrad ? -(lr * v[0] * u * row.dc) : dv * (x[2] - g * g);
    dh[3] = d_denominator;
  }
};
template <typename A>
using RMSpropRule = RootFamily<A, false>;
template <typename A>
using AdagradRule = RootFamily<A, true>;

}  // namespace fastmeta
