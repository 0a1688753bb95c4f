// K steps of gradient descent on a linear head under softmax cross-entropy, and their derivative,
// for one task. With X the rows of features (and a column of ones where there is a bias), W the
// weights (and the bias as their last column), P the probabilities and Y the labels:
//
//   R_k = (P_k - Y) / n,   U_k = momentum U_{k-1} + R_k^T X + decay W_k,   W_{k+1} = W_k - lr_k U_k
//
// Gram form (few rows). Every W_k and U_k is W_0 times a number plus a combination of the rows,
// W_k = alpha_k W_0 - A_k^T X and U_k = beta_k W_0 + B_k^T X, so that the steps need nothing but
// the products of rows G = X X^T: logits Z_{k+1} = Z_k - lr_k X U_k^T. The cotangents of W_k and
// U_k are lambda V + L^T X and nu V + Q^T X in the same way, V being that of W_K; walking back,
//
//   nu <- momentum nu - lr_k lambda,  Q <- momentum Q - lr_k L,    dlr_k = -<dW_{k+1}, U_k>
//   dR_k = nu X V^T + G Q,            dZ_k from dR_k through the softmax
//   lambda <- lambda + decay nu,      L <- L + decay Q + dZ_k
//   dX = sum_k nu_k R_k V + alpha_k dZ_k W_0 + (R_k Q_k^T - dZ_k A_k^T) X
//
// Direct form (many rows): the same with the weights themselves, two products with X per step.
#pragma once

#include "math/head_task.h"

namespace fastmeta {

// What the weights and the buffer hold of W_0 (walking back: their cotangents of V).
template <typename A>
struct Share {
  A weights = 1, buffer = 0;
  FM_HD void step(A lr, A momentum, A decay) {
    buffer = momentum * buffer + decay * weights;
    weights -= lr * buffer;
  }
  FM_HD void back(A lr, A momentum) { buffer = momentum * buffer - lr * weights; }
  FM_HD void decayed(A decay) { weights += decay * buffer; }
};

// Classes of task t that take part.
template <typename A>
FM_HD int64_t ways_of(const HeadArgs<A>& args, int64_t t) {
  const int64_t all = args.shape.classes;
  return args.ways == nullptr ? all : most(1, least(args.ways[t], all));
}

// Writes what the steps left behind: losses of steps not taken, `taken`, and NaN where wanted.
// Returns the steps taken, -1 where the task is NaN.
template <typename Team, typename A>
FM_HD int64_t conclude(const Team& team, const HeadArgs<A>& args, int64_t t, int64_t k, A loss) {
  const HeadShape s = args.shape;
  const bool lost = k < s.steps && !args.freeze;
  team.once([&]() FM_BODY {
    for (int64_t i = k; i < s.steps; ++i) args.losses[t * s.steps + i] = loss;
    args.taken[t] = lost ? -1 : k;
  });
  if (args.probabilities != nullptr) {
    const int64_t size = s.classes * s.rows;
    A* const rest = args.probabilities + (t * s.steps + k) * size;
    team.each((s.steps - k) * size, [&](int64_t i) FM_BODY { rest[i] = A(0); });
  }
  return lost ? -1 : k;
}

// The task's weights as they were given, or NaN.
template <typename Team, typename A>
FM_HD void give_back(const Team& team, const HeadArgs<A>& args, int64_t t, bool lost) {
  const HeadShape s = args.shape;
  const A nan = A(0) / A(0);
  const A* w0 = args.weight.of(t);
  A* w = args.new_weight + t * s.classes * s.width;
  team.each(s.classes * s.width, [&](int64_t i) FM_BODY { w[i] = lost ? nan : w0[i]; });
  if (!s.bias) return;
  const A* b0 = args.bias.of(t);
  A* b = args.new_bias + t * s.classes;
  team.each(s.classes, [&](int64_t c) FM_BODY { b[c] = lost ? nan : b0[c]; });
}

// An inactive task: weights as given, nothing else read.
template <typename Team, typename A>
FM_HD void skip_task(const Team& team, const HeadArgs<A>& args, int64_t t) {
  const HeadShape s = args.shape;
  team.once([&]() FM_BODY {
    for (int64_t i = 0; i < s.steps; ++i) args.losses[t * s.steps + i] = A(0);
    args.taken[t] = 0;
  });
  if (args.probabilities != nullptr) {
    A* const p = args.probabilities + t * s.steps * s.classes * s.rows;
    team.each(s.steps * s.classes * s.rows, [&](int64_t i) FM_BODY { p[i] = A(0); });
  }
  if (args.products != nullptr) {
    A* const g = args.products + t * s.rows * s.rows;
    team.each(s.rows * s.rows, [&](int64_t i) FM_BODY { g[i] = A(0); });
  }
  give_back(team, args, t, false);
}

// G = X X^T (+ 1 for the bias), [n, ld].
template <typename Team, typename A>
FM_HD void products_of_rows(const Team& team, const HeadShape& s, const Rows<A>& rows, A* g) {
  team.gemm(rows.count, rows.ld, s.width, rows.x, rows.xt, g, rows.ld, A(1));
  if (s.bias) team.each(rows.count * rows.ld, [&](int64_t i) FM_BODY { g[i] += A(1); });
}

// X W^T (+ bias), transposed: [C, ld].
template <typename Team, typename A>
FM_HD void logits_of(const Team& team, const HeadShape& s, const Rows<A>& rows, const A* w,
                     const A* bias, A* z) {
  team.gemm(s.classes, rows.ld, s.width, Operand<A>{w, s.width, 1}, rows.xt, z, rows.ld, A(1));
  if (bias == nullptr) return;
  const int64_t ld = rows.ld;
  team.grid(s.classes, ld, [&](int64_t c, int64_t j) FM_BODY { z[c * ld + j] += bias[c]; });
}

template <typename A>
FM_HD A sum_of_row(const A* row, int64_t n) {
  A sum = 0;
  for (int64_t j = 0; j < n; ++j) sum += row[j];
  return sum;
}

// ---- Gram form ----

template <typename Team, typename A>
FM_TEAM void gram_forward(const Team& team, const HeadArgs<A>& args, int64_t t, Arena<A>& arena,
                          Arena<A>& large) {
  const HeadShape s = args.shape;
  const Rows<A> rows = Rows<A>::of(team, args, t, arena, large);
  const int64_t C = s.classes, ld = rows.ld, n = rows.count, size = C * ld;
  A *const z = arena.take(size), *const p = arena.take(size), *const r = arena.take(size);
  A *const a = arena.take(size), *const b = arena.take(size), *const u = arena.take(size);
  A *const gr = arena.take(size), *const row_loss = arena.take(ld),
           *const g = arena.take(s.rows * ld);
  if (arena.base == nullptr) return;
  const A* const b0 = s.bias ? args.bias.of(t) : nullptr;
  products_of_rows(team, s, rows, g);
  logits_of(team, s, rows, args.weight.of(t), b0, z);
  team.each(size, [&](int64_t i) FM_BODY { a[i] = b[i] = u[i] = A(0); });
  const A momentum = args.momentum, decay = args.decay;
  Share<A> share;
  int64_t k = 0;
  A loss = 0;
  for (; k < s.steps; ++k) {
    loss = rows.softmax(team, C, ways_of(args, t), z, p, r, row_loss);
    team.gemm(C, ld, n, Operand<A>{r, ld, 1}, Operand<A>{g, ld, 1}, gr, ld, A(1));
    const A square = team.sum(size, [&](int64_t i) FM_BODY { return r[i] * gr[i]; });
    if (!is_finite(loss) || !is_finite(square)) break;
    team.once([&]() FM_BODY { args.losses[t * s.steps + k] = loss; });
    if (args.probabilities != nullptr) {
      rows.scatter(team, C, s.rows, p, args.probabilities + (t * s.steps + k) * C * s.rows);
    }
    const A lr = args.rate(t, k);
    team.each(size, [&](int64_t i) FM_BODY {
      const A step = momentum * b[i] + (r[i] - decay * a[i]);
      const A change = momentum * u[i] + (gr[i] + decay * z[i]);
      b[i] = step;
      u[i] = change;
      a[i] += lr * step;
      z[i] -= lr * change;
    });
    share.step(lr, momentum, decay);
  }
  if (args.products != nullptr) {
    A* const to = args.products + t * s.rows * s.rows;
    if (n < s.rows) team.each(s.rows * s.rows, [&](int64_t i) FM_BODY { to[i] = A(0); });
    team.grid(n, n, [&](int64_t i, int64_t j) FM_BODY {
      to[rows.index[i] * s.rows + rows.index[j]] = g[i * ld + j];
    });
  }
  if (conclude(team, args, t, k, loss) <= 0)
    return give_back(team, args, t, k < s.steps && !args.freeze);
  team.gemm(C, s.width, n, Operand<A>{a, ld, 1}, rows.x, args.new_weight + t * C * s.width, s.width,
            A(-1), args.weight.of(t), share.weights);
  if (!s.bias) return;
  A* const to = args.new_bias + t * C;
  team.each(C,
            [&](int64_t c) FM_BODY { to[c] = share.weights * b0[c] - sum_of_row(a + c * ld, n); });
}

// The parts of the backward passes that both forms share: zeros where nothing is wanted back, and
// the gradients of the features put where they belong.
template <typename Team, typename A>
FM_HD void put_features(const Team& team, const HeadArgs<A>& args, int64_t t, const Rows<A>& rows,
                        const A* dx) {
  const HeadShape s = args.shape;
  with_type<A>(args.type, [&](auto zero) {
    using T = decltype(zero);
    T* const to = static_cast<T*>(args.d_features) + t * s.rows * s.width;
    const int64_t n = dx == nullptr ? 0 : rows.count, D = s.width;
    if (static_cast<const void*>(to) == dx) return;
    if (n < s.rows) team.each(s.rows * D, [&](int64_t i) FM_BODY { to[i] = T(A(0)); });
    const int32_t* index = rows.index;
    team.grid(n, D, [&](int64_t i, int64_t d) FM_BODY { to[index[i] * D + d] = T(dx[i * D + d]); });
  });
}

// Where to gather the gradients of the features: in place, if nothing has to be moved.
template <typename A>
FM_HD A* place_of_features(const HeadArgs<A>& args, int64_t t, const Rows<A>& rows, A* scratch) {
  const HeadShape& s = args.shape;
  const bool same = args.type == (sizeof(A) == 8 ? Type::kDouble : Type::kFloat);
  if (!same || rows.count < s.rows) return scratch;
  return static_cast<A*>(args.d_features) + t * s.rows * s.width;
}

// Tasks without steps: the cotangents pass, or are zeros where the task is NaN.
template <typename Team, typename A>
FM_HD void pass_back(const Team& team, const HeadArgs<A>& args, int64_t t, const Rows<A>& rows,
                     A share) {
  const HeadShape s = args.shape;
  const auto scaled = [&](const A* v, A* to, int64_t size) FM_BODY {
    team.each(size, [&](int64_t i) FM_BODY { to[i] = share == A(0) ? A(0) : share * v[i]; });
  };
  const int64_t weights = s.classes * s.width;
  if (args.d_weight != nullptr) scaled(args.v_weight.of(t), args.d_weight + t * weights, weights);
  if (args.d_bias != nullptr) scaled(args.v_bias.of(t), args.d_bias + t * s.classes, s.classes);
  if (args.d_features != nullptr) put_features(team, args, t, rows, static_cast<const A*>(nullptr));
}

template <typename Team, typename A>
FM_TEAM void gram_backward(const Team& team, const HeadArgs<A>& args, int64_t t, Arena<A>& arena,
                           Arena<A>& large) {
  const HeadShape s = args.shape;
  const Rows<A> rows = Rows<A>::of(team, args, t, arena, large);
  const int64_t C = s.classes, D = s.width, N = s.rows, ld = rows.ld, n = rows.count, size = C * ld;
  const int64_t taken = args.taken != nullptr && arena.base != nullptr ? args.taken[t] : s.steps;
  const int64_t steps = most(taken, 0);
  const int64_t first = most(s.steps - args.exact, 0);  // the first step whose gradient counts
  const int64_t depth = most(steps - first, 0);
  const bool with_rate = args.d_lr != nullptr, with_x = args.d_features != nullptr;
  const A momentum = args.momentum, decay = args.decay;

  // Per step: [R; dZ] and [Q; -A], of which dX takes the products; B and beta for dlr; alpha.
  A *const left = arena.take(2 * depth * size), *const right = arena.take(2 * depth * size);
  A* const all_b = with_rate ? arena.take(steps * size) : nullptr;
  A *const alpha = arena.take(s.steps), *const beta = arena.take(s.steps);
  A *const p = arena.take(size), *const r = arena.take(size), *const a = arena.take(size);
  A *const b = arena.take(size), *const z0 = arena.take(size), *const sv = arena.take(size);
  A *const l = arena.take(size), *const q = arena.take(size), *const j = arena.take(size);
  A *const f = arena.take(size), *const dr = arena.take(size), *const dz = arena.take(size);
  A *const to_v = arena.take(size), *const to_w = arena.take(size);
  A *const g = arena.take(N * ld), *const e = arena.take(with_x ? N * ld : 0);
  A* const scratch = large.take(with_x ? N * D : 0);
  if (arena.base == nullptr) return;
  if (with_rate) {
    team.each(s.steps, [&](int64_t k) FM_BODY { args.d_lr[t * s.steps + k] = A(0); });
  }
  if (steps == 0) return pass_back(team, args, t, rows, taken < 0 ? A(0) : A(1));

  const A *const w0 = args.weight.of(t), *const v = args.v_weight.of(t);
  const A* const b0 = s.bias ? args.bias.of(t) : nullptr;
  const A* const v_b = s.bias ? args.v_bias.of(t) : nullptr;
  const A* const kept = args.probabilities + t * s.steps * C * N;

  // the coefficients of every step, as the forward pass had them
  team.each(size, [&](int64_t i) FM_BODY {
    a[i] = b[i] = l[i] = q[i] = j[i] = f[i] = to_v[i] = to_w[i] = A(0);
  });
  Share<A> share;
  for (int64_t k = 0; k < steps; ++k) {
    rows.gather(team, C, N, kept + k * C * N, p);
    const int64_t slot = k - first;
    A* const here = slot < 0 ? r : left + slot * size;
    rows.residuals(team, C, p, here);
    A* const minus_a = slot < 0 ? nullptr : right + (depth + slot) * size;
    A* const kept_b = with_rate ? all_b + k * size : nullptr;
    const A lr = args.rate(t, k), at = share.weights;
    share.step(lr, momentum, decay);
    team.once([&]() FM_BODY {
      alpha[k] = at;
      beta[k] = share.buffer;
    });
    team.each(size, [&](int64_t i) FM_BODY {
      const A step = momentum * b[i] + (here[i] - decay * a[i]);
      if (minus_a != nullptr) minus_a[i] = -a[i];
      if (kept_b != nullptr) kept_b[i] = step;
      b[i] = step;
      a[i] += lr * step;
    });
  }

  logits_of(team, s, rows, v, v_b, sv);
  A v_w0 = 0;
  const bool decays = with_rate && decay != A(0);
  if (decays) {
    logits_of(team, s, rows, w0, b0, z0);
    v_w0 = team.sum(C * D, [&](int64_t i) FM_BODY { return v[i] * w0[i]; });
    if (s.bias) v_w0 += team.sum(C, [&](int64_t c) FM_BODY { return v_b[c] * b0[c]; });
  }
  if (depth > 0) {
    const A* const given = args.products + t * N * N;
    team.grid(n, ld, [&](int64_t i, int64_t m) FM_BODY {
      g[i * ld + m] = m < n ? given[rows.index[i] * N + rows.index[m]] : A(0);
    });
  }

  Share<A> back;
  for (int64_t k = steps - 1; k >= 0; --k) {
    const A lr = args.rate(t, k);
    if (with_rate) {
      const A* const kb = all_b + k * size;
      const A lambda = back.weights, share_k = beta[k];
      A dot = team.sum(size, [&](int64_t i) FM_BODY { return (lambda * sv[i] + j[i]) * kb[i]; });
      if (decays) {
        dot += lambda * share_k * v_w0;
        dot += share_k * team.sum(size, [&](int64_t i) FM_BODY { return l[i] * z0[i]; });
      }
      team.once([&]() FM_BODY { args.d_lr[t * s.steps + k] = -dot; });
    }
    back.back(lr, momentum);
    const A nu = back.buffer;
    const int64_t slot = k - first;
    if (slot >= 0) {
      A *const kept_q = right + slot * size, *const kept_dz = left + (depth + slot) * size;
      team.each(size, [&](int64_t i) FM_BODY {
        q[i] = kept_q[i] = momentum * q[i] - lr * l[i];
        f[i] = momentum * f[i] - lr * j[i];
        dr[i] = nu * sv[i] + f[i];
      });
      rows.gather(team, C, N, kept + k * C * N, p);
      rows.softmax_backward(team, C, p, dr, kept_dz);
      const A* const kept_r = left + slot * size;
      const A at = alpha[k];
      team.each(size, [&](int64_t i) FM_BODY {
        l[i] += decay * q[i] + kept_dz[i];
        to_v[i] += nu * kept_r[i];
        to_w[i] += at * kept_dz[i];
      });
      if (k > 0) {
        team.gemm(C, ld, n, Operand<A>{kept_dz, ld, 1}, Operand<A>{g, ld, 1}, dz, ld, A(1));
        team.each(size, [&](int64_t i) FM_BODY { j[i] += decay * f[i] + dz[i]; });
      }
    } else {
      team.each(size, [&](int64_t i) FM_BODY {
        q[i] = momentum * q[i] - lr * l[i];
        f[i] = momentum * f[i] - lr * j[i];
        l[i] += decay * q[i];
        j[i] += decay * f[i];
      });
    }
    back.decayed(decay);
  }

  if (depth == 0) return pass_back(team, args, t, rows, back.weights);
  if (args.d_weight != nullptr) {
    team.gemm(C, D, n, Operand<A>{l, ld, 1}, rows.x, args.d_weight + t * C * D, D, A(1), v,
              back.weights);
  }
  if (args.d_bias != nullptr) {
    team.each(C, [&](int64_t c) FM_BODY {
      args.d_bias[t * C + c] = back.weights * v_b[c] + sum_of_row(l + c * ld, n);
    });
  }
  if (!with_x) return;
  const Operand<A> lefts{left, ld, 1}, rights{right, ld, 1};
  team.gemm(n, ld, 2 * depth * C, lefts.transposed(), rights, e, ld, A(1));
  A* const dx = place_of_features(args, t, rows, scratch);
  team.gemm(n, D, n, Operand<A>{e, ld, 1}, rows.x, dx, D, A(1));
  team.gemm(n, D, C, Operand<A>{to_v, 1, ld}, Operand<A>{v, D, 1}, dx, D, A(1), dx, A(1));
  team.gemm(n, D, C, Operand<A>{to_w, 1, ld}, Operand<A>{w0, D, 1}, dx, D, A(1), dx, A(1));
  put_features(team, args, t, rows, dx);
}

}  // namespace fastmeta
