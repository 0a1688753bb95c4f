// The direct form of the head's inner loop (head_inner_loop.h), for tasks of many rows: the weights
// themselves, two products with the features per step.
#pragma once

#include "math/head_inner_loop.h"

namespace fastmeta {

// U <- momentum U + R^T X + decay W, and the squared norm of R^T X (with the bias').
template <typename Team, typename A>
FM_HD A direct_buffer(const Team& team, const HeadArgs<A>& args, const Rows<A>& rows, const A* r,
                      const A* w, const A* bias, A* g, A* buffer, A* bias_buffer) {
  const HeadShape s = args.shape;
  const int64_t C = s.classes, D = s.width, ld = rows.ld, n = rows.count;
  const A momentum = args.momentum, decay = args.decay;
  team.gemm(C, D, n, Operand<A>{r, ld, 1}, rows.x, g, D, A(1));
  A square = team.sum(C * D, [&](int64_t i) FM_BODY { return g[i] * g[i]; });
  team.each(C * D,
            [&](int64_t i) FM_BODY { buffer[i] = momentum * buffer[i] + (g[i] + decay * w[i]); });
  if (!s.bias) return square;
  square += team.sum(C, [&](int64_t c) FM_BODY {
    const A sum = sum_of_row(r + c * ld, n);
    return sum * sum;
  });
  team.each(C, [&](int64_t c) FM_BODY {
    bias_buffer[c] = momentum * bias_buffer[c] + (sum_of_row(r + c * ld, n) + decay * bias[c]);
  });
  return square;
}

template <typename Team, typename A>
FM_TEAM void direct_forward(const Team& team, const HeadArgs<A>& args, int64_t t, Arena<A>& arena,
                            Arena<A>& large) {
  const HeadShape s = args.shape;
  const Rows<A> rows = Rows<A>::of(team, args, t, arena, large);
  const int64_t C = s.classes, D = s.width, ld = rows.ld, size = C * ld, weights = C * D;
  A *const z = arena.take(size), *const p = arena.take(size), *const r = arena.take(size);
  A *const row_loss = arena.take(ld), *const g = arena.take(weights),
           *const u = arena.take(weights);
  A* const u_b = arena.take(C);
  if (arena.base == nullptr) return;
  give_back(team, args, t, false);  // W_0, updated in place
  A* const w = args.new_weight + t * weights;
  A* const bias = s.bias ? args.new_bias + t * C : nullptr;
  team.each(weights, [&](int64_t i) FM_BODY { u[i] = A(0); });
  team.each(C, [&](int64_t c) FM_BODY { u_b[c] = A(0); });
  int64_t k = 0;
  A loss = 0;
  for (; k < s.steps; ++k) {
    logits_of(team, s, rows, w, bias, z);
    loss = rows.softmax(team, C, ways_of(args, t), z, p, r, row_loss);
    const A square = direct_buffer(team, args, rows, r, w, bias, g, u, u_b);
    if (!is_finite(loss) || !is_finite(square)) break;
    team.once([&]() FM_BODY { args.losses[t * s.steps + k] = loss; });
    if (args.probabilities != nullptr) {
      rows.scatter(team, C, s.rows, p, args.probabilities + (t * s.steps + k) * C * s.rows);
    }
    const A lr = args.rate(t, k);
    team.each(weights, [&](int64_t i) FM_BODY { w[i] -= lr * u[i]; });
    if (s.bias) team.each(C, [&](int64_t c) FM_BODY { bias[c] -= lr * u_b[c]; });
  }
  if (conclude(team, args, t, k, loss) < 0) give_back(team, args, t, true);
}

template <typename Team, typename A>
FM_TEAM void direct_backward(const Team& team, const HeadArgs<A>& args, int64_t t, Arena<A>& arena,
                             Arena<A>& large) {
  const HeadShape s = args.shape;
  const Rows<A> rows = Rows<A>::of(team, args, t, arena, large);
  const int64_t C = s.classes, D = s.width, N = s.rows, ld = rows.ld, n = rows.count;
  const int64_t size = C * ld, weights = C * D;
  const int64_t taken = arena.base != nullptr ? args.taken[t] : s.steps;
  const int64_t steps = most(taken, 0), first = most(s.steps - args.exact, 0);
  const int64_t depth = most(steps - first, 0);
  const bool with_rate = args.d_lr != nullptr, with_x = args.d_features != nullptr;
  const A momentum = args.momentum, decay = args.decay;

  // Per step: [R; dZ] and [M; W], of which dX takes the products, M being the cotangent of U; U for
  // dlr. The bias has rows of its own.
  A* const left = arena.take(2 * depth * size);
  A* const right = large.take(2 * depth * weights);
  A* const all_u = large.take(with_rate ? steps * weights : 0);
  A* const all_u_b = arena.take(with_rate ? steps * C : 0);
  A *const p = arena.take(size), *const r = arena.take(size), *const dr = arena.take(size);
  A *const w = large.take(weights), *const u = large.take(weights), *const g = large.take(weights);
  A *const m = large.take(weights), *const lambda = large.take(weights);
  A *const w_b = arena.take(C), *const u_b = arena.take(C), *const m_b = arena.take(C);
  A* const lambda_b = arena.take(C);
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
  team.each(weights, [&](int64_t i) FM_BODY {
    w[i] = w0[i];
    u[i] = m[i] = A(0);
    lambda[i] = v[i];
  });
  team.each(C, [&](int64_t c) FM_BODY {
    w_b[c] = b0 == nullptr ? A(0) : b0[c];
    lambda_b[c] = v_b == nullptr ? A(0) : v_b[c];
    u_b[c] = m_b[c] = A(0);
  });
  for (int64_t k = 0; k < steps && (depth > 0 || with_rate); ++k) {
    const int64_t slot = k - first;
    A* const here = slot < 0 ? r : left + slot * size;
    rows.gather(team, C, N, kept + k * C * N, p);
    rows.residuals(team, C, p, here);
    direct_buffer(team, args, rows, here, w, w_b, g, u, u_b);
    A* const kept_w = slot < 0 ? nullptr : right + (depth + slot) * weights;
    A* const kept_u = with_rate ? all_u + k * weights : nullptr;
    const A lr = args.rate(t, k);
    team.each(weights, [&](int64_t i) FM_BODY {
      if (kept_w != nullptr) kept_w[i] = w[i];
      if (kept_u != nullptr) kept_u[i] = u[i];
      w[i] -= lr * u[i];
    });
    team.each(C, [&](int64_t c) FM_BODY {
      if (kept_u != nullptr) all_u_b[k * C + c] = u_b[c];
      w_b[c] -= lr * u_b[c];
    });
  }
  for (int64_t k = steps - 1; k >= 0; --k) {
    const A lr = args.rate(t, k);
    const int64_t slot = k - first;
    if (with_rate) {
      const A *const ku = all_u + k * weights, *const ku_b = all_u_b + k * C;
      A dot = team.sum(weights, [&](int64_t i) FM_BODY { return lambda[i] * ku[i]; });
      if (s.bias) dot += team.sum(C, [&](int64_t c) FM_BODY { return lambda_b[c] * ku_b[c]; });
      team.once([&]() FM_BODY { args.d_lr[t * s.steps + k] = -dot; });
    }
    A* const here = slot < 0 ? m : right + slot * weights;  // M of this step
    team.each(weights, [&](int64_t i) FM_BODY {
      m[i] = here[i] = momentum * m[i] - lr * lambda[i];
      lambda[i] += decay * m[i];
    });
    team.each(C, [&](int64_t c) FM_BODY {
      m_b[c] = momentum * m_b[c] - lr * lambda_b[c];
      lambda_b[c] += decay * m_b[c];
    });
    if (slot < 0) continue;
    A* const dz = left + (depth + slot) * size;
    rows.gather(team, C, N, kept + k * C * N, p);
    logits_of(team, s, rows, here, s.bias ? m_b : nullptr, dr);
    rows.softmax_backward(team, C, p, dr, dz);
    team.gemm(C, D, n, Operand<A>{dz, ld, 1}, rows.x, lambda, D, A(1), lambda, A(1));
    team.each(C, [&](int64_t c) FM_BODY { lambda_b[c] += sum_of_row(dz + c * ld, n); });
  }
  if (args.d_weight != nullptr) {
    A* const to = args.d_weight + t * weights;
    team.each(weights, [&](int64_t i) FM_BODY { to[i] = lambda[i]; });
  }
  if (args.d_bias != nullptr) {
    team.each(C, [&](int64_t c) FM_BODY { args.d_bias[t * C + c] = lambda_b[c]; });
  }
  if (!with_x) return;
  if (depth == 0) return put_features(team, args, t, rows, static_cast<const A*>(nullptr));
  A* const dx = place_of_features(args, t, rows, scratch);
  team.gemm(n, D, 2 * depth * C, Operand<A>{left, 1, ld}, Operand<A>{right, D, 1}, dx, D, A(1));
  put_features(team, args, t, rows, dx);
}

}  // namespace fastmeta
