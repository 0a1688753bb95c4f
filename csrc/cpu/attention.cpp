// Attention, its gradient and the derivative of that, on the CPU. One unit of parallel work is a
// head of keys with the heads of queries that share it; the weights of a block of queries are
// rebuilt in cache, with all keys at once, and never leave it.

#include <cmath>
#include <tuple>

#include "cpu/attention_units.h"
#include "cpu/pairwise.h"

namespace fastmeta {
namespace {

using Optional = std::optional<Tensor>;

// The scores of a block into p.
template <typename A>
void scores(const Problem<A>& s, const Buffers<A>& w, const Block& at) {
  pack(s.q, at.b, at.h, at.first, at.rows, w.q);
  multiply(at.rows, at.columns, s.q.width, w.q, w.d, w.k_t + at.column, w.whole, w.p + at.column,
           w.whole, s.scale, false);
}

// to (+)= x keys^T for a block of rows: [rows, width] and the transposed keys.
template <typename A>
void by_keys(const Buffers<A>& w, const Block& at, int64_t width, int64_t padded_width, const A* x,
             const A* keys_t, A* to, A scale, bool add) {
  multiply(at.rows, at.columns, width, x, padded_width, keys_t + at.column, w.whole, to + at.column,
           w.whole, scale, add);
}

// to (+)= scale x keys: [rows, columns] by [columns, width].
template <typename A>
void over_keys(const Buffers<A>& w, const Block& at, const A* x, const A* keys, int64_t width,
               A* to, A scale, bool add) {
  multiply(at.rows, width, at.columns, x + at.column, w.whole, keys + at.column * width, width, to,
           width, scale, add);
}

// to += scale x^T rows: [rows, columns]^T by [rows, width], to the keys.
template <typename A>
void to_keys(const Buffers<A>& w, const Block& at, const A* x, const A* rows, int64_t width, A* to,
             A scale) {
  multiply_transposed(at.columns, width, at.rows, x + at.column, w.whole, rows, width,
                      to + at.column * width, width, scale, true);
}

// Scores of a row to weights, dropped ones 0. Its stats are two numbers: where a mask adds a large
// negative number to all scores, the logarithm of their sum is less than a digit of their largest.
template <typename L, typename A>
FM_HD void softmax_row(A* p, A* stats, const A* bias, const A* keep, int64_t from, int64_t to) {
  constexpr A kInfinity = std::numeric_limits<A>::infinity();
  const auto load = [](const A* x) FM_INLINE_LAMBDA { return L::template load<true>(x, 0); };
  L top = L::all(-kInfinity);
  for (int64_t j = from; j < to; j += L::kCount) {
    const L x = load(p + j) + load(bias + j);
    x.template store<true>(p + j, 0);
    top = above(top, x);
  }
  const A most_of_all = top.top();
  if (most_of_all == -kInfinity) {  // no key, or nothing but NaN
    A sum = 0;
    for (int64_t j = from; j < to; ++j) {
      p[j] = p[j] != p[j] ? p[j] : A(0);
      sum += p[j];
    }
    stats[0] = 0, stats[1] = sum;
    return;
  }
  L sums = L::all(0);
  const L shift = L::all(most_of_all);
  for (int64_t j = from; j < to; j += L::kCount) {
    const L x = exponential(load(p + j) - shift);
    x.template store<true>(p + j, 0);
    sums = sums + x;
  }
  const A share = 1 / sums.sum();
  for (int64_t j = from; j < to; j += L::kCount) {
    ((share * load(p + j)) * load(keep + j)).template store<true>(p + j, 0);
  }
  stats[0] = most_of_all, stats[1] = share;
}

template <typename A>
void forward_unit(const Problem<A>& s, const Buffers<A>& w, RowTerms<A>& terms, int64_t b,
                  int64_t group) {
  read_keys(s.k, b, group, s.keys, w, w.k, w.k_t);
  read_keys<A>(s.v, b, group, s.keys, w, w.v, nullptr);
  for_blocks(s, w, terms, b, group, [&](const Block& at) {
    scores(s, w, at);
    A* const stats = s.stats_of(at);
    with_registers([&](auto bytes) FM_INLINE_LAMBDA {
      for (int64_t i = 0; i < at.rows; ++i) {
        softmax_row<Lanes<A, bytes()>>(w.p + i * w.whole, stats + 2 * i,
                                       terms.bias_of(at.first + i), terms.keep_of(at.first + i),
                                       at.column, at.column + at.columns);
      }
    });
    over_keys(w, at, w.p, w.v, w.e, w.out, A(1), false);
    unpack(w.out, s.out, at.b, at.h, at.first, at.rows);
  });
}

// Scores p and dp = d_out v^T of a row to dropped weights and the gradient of the scores.
template <typename L, typename A>
FM_HD void gradient_row(A* p, A* dp, const A* stats, const A* bias, const A* keep, int64_t from,
                        int64_t to) {
  const auto load = [](const A* x) FM_INLINE_LAMBDA { return L::template load<true>(x, 0); };
  const L top = L::all(stats[0]), share = L::all(stats[1]);
  L sums = L::all(0);
  for (int64_t j = from; j < to; j += L::kCount) {
    const L weight = share * exponential((load(p + j) + load(bias + j)) - top);
    const L slope = load(dp + j) * load(keep + j);
    weight.template store<true>(p + j, 0);
    slope.template store<true>(dp + j, 0);
    sums = sums + weight * slope;
  }
  const L mean = L::all(sums.sum());
  for (int64_t j = from; j < to; j += L::kCount) {
    const L weight = load(p + j);
    (weight * (load(dp + j) - mean)).template store<true>(dp + j, 0);
    (weight * load(keep + j)).template store<true>(p + j, 0);
  }
}

template <typename A>
void gradient_unit(const Problem<A>& s, const Buffers<A>& w, RowTerms<A>& terms, int64_t b,
                   int64_t group) {
  read_keys(s.k, b, group, s.keys, w, w.k, w.k_t);
  read_keys(s.v, b, group, s.keys, w, w.v, w.v_t);
  std::fill_n(w.to_k, w.whole * w.d, A(0));
  std::fill_n(w.to_v, w.whole * w.e, A(0));
  for_blocks(s, w, terms, b, group, [&](const Block& at) {
    scores(s, w, at);
    pack(s.d_out, at.b, at.h, at.first, at.rows, w.d_out);
    by_keys(w, at, s.v.width, w.e, w.d_out, w.v_t, w.dp, A(1), false);
    const A* const stats = s.stats_of(at);
    with_registers([&](auto bytes) FM_INLINE_LAMBDA {
      for (int64_t i = 0; i < at.rows; ++i) {
        gradient_row<Lanes<A, bytes()>>(w.p + i * w.whole, w.dp + i * w.whole, stats + 2 * i,
                                        terms.bias_of(at.first + i), terms.keep_of(at.first + i),
                                        at.column, at.column + at.columns);
      }
    });
    if (s.to_q) {
      over_keys(w, at, w.dp, w.k, w.d, w.out, s.scale, false);
      unpack(w.out, s.to_q, at.b, at.h, at.first, at.rows);
    }
    if (s.to_k) to_keys(w, at, w.dp, w.q, w.d, w.to_k, s.scale);
    if (s.to_v) to_keys(w, at, w.p, w.d_out, w.e, w.to_v, A(1));
  });
  if (s.to_k) unpack(w.to_k, s.to_k, b, group, 0, s.keys);
  if (s.to_v) unpack(w.to_v, s.to_v, b, group, 0, s.keys);
}

// A row's scores p, dp, cotangents g of the scores' gradient and r of the weights to what the
// products need: dropped weights p, the scores' gradient dp, and the cotangents of dp (in g,
// dropped too) and of the scores (in r).
template <typename L, typename A>
FM_HD void second_row(A* p, A* dp, A* g, A* r, const A* stats, const A* bias, const A* keep,
                      int64_t from, int64_t to) {
  const auto load = [](const A* x) FM_INLINE_LAMBDA { return L::template load<true>(x, 0); };
  const L top = L::all(stats[0]), share = L::all(stats[1]);
  L dp_sums = L::all(0), g_sums = L::all(0), u_sums = L::all(0);
  for (int64_t j = from; j < to; j += L::kCount) {
    const L weight = share * exponential((load(p + j) + load(bias + j)) - top);
    const L slope = load(dp + j) * load(keep + j);
    weight.template store<true>(p + j, 0);
    slope.template store<true>(dp + j, 0);
    dp_sums = dp_sums + weight * slope;
    g_sums = g_sums + weight * load(g + j);
  }
  const L dp_mean = L::all(dp_sums.sum()), g_mean = L::all(g_sums.sum());
  for (int64_t j = from; j < to; j += L::kCount) {
    const L weight = load(p + j), slope = load(dp + j), given = load(g + j), kept = load(keep + j);
    const L centred = given - g_mean;
    const L u = (slope * centred - dp_mean * given) + load(r + j) * kept;
    u_sums = u_sums + weight * u;
    u.template store<true>(r + j, 0);
    (weight * (slope - dp_mean)).template store<true>(dp + j, 0);
    (weight * centred * kept).template store<true>(g + j, 0);
  }
  const L u_mean = L::all(u_sums.sum());
  for (int64_t j = from; j < to; j += L::kCount) {
    const L weight = load(p + j);
    (weight * (load(r + j) - u_mean)).template store<true>(r + j, 0);
    (weight * load(keep + j)).template store<true>(p + j, 0);
  }
}

template <typename A>
void second_unit(const Problem<A>& s, const Buffers<A>& w, RowTerms<A>& terms, int64_t b,
                 int64_t group) {
  read_keys(s.k, b, group, s.keys, w, w.k, w.k_t);
  read_keys(s.v, b, group, s.keys, w, w.v, w.v_t);
  if (s.b) read_keys(s.b, b, group, s.keys, w, w.b, w.b_t);
  if (s.c) read_keys(s.c, b, group, s.keys, w, w.c, w.c_t);
  std::fill_n(w.to_k, w.whole * w.d, A(0));
  std::fill_n(w.to_v, w.whole * w.e, A(0));
  for_blocks(s, w, terms, b, group, [&](const Block& at) {
    const int64_t width = s.q.width;
    scores(s, w, at);
    pack(s.d_out, at.b, at.h, at.first, at.rows, w.d_out);
    by_keys(w, at, s.v.width, w.e, w.d_out, w.v_t, w.dp, A(1), false);
    if (s.a) {
      pack(s.a, at.b, at.h, at.first, at.rows, w.a);
      by_keys(w, at, width, w.d, w.a, w.k_t, w.g, s.scale, false);
    }
    if (s.b) by_keys(w, at, width, w.d, w.q, w.b_t, w.g, s.scale, bool(s.a));
    if (!s.a && !s.b) std::fill_n(w.g, at.rows * w.whole, A(0));
    if (s.c) {
      by_keys(w, at, s.v.width, w.e, w.d_out, w.c_t, w.r, A(1), false);
    } else {
      std::fill_n(w.r, at.rows * w.whole, A(0));
    }
    const A* const stats = s.stats_of(at);
    with_registers([&](auto bytes) FM_INLINE_LAMBDA {
      for (int64_t i = 0; i < at.rows; ++i) {
        const int64_t row = i * w.whole;
        second_row<Lanes<A, bytes()>>(w.p + row, w.dp + row, w.g + row, w.r + row, stats + 2 * i,
                                      terms.bias_of(at.first + i), terms.keep_of(at.first + i),
                                      at.column, at.column + at.columns);
      }
    });
    if (s.to_d_out) {
      over_keys(w, at, w.g, w.v, w.e, w.out, A(1), false);
      if (s.c) over_keys(w, at, w.p, w.c, w.e, w.out, A(1), true);
      unpack(w.out, s.to_d_out, at.b, at.h, at.first, at.rows);
    }
    if (s.to_q) {
      over_keys(w, at, w.r, w.k, w.d, w.out, s.scale, false);
      if (s.b) over_keys(w, at, w.dp, w.b, w.d, w.out, s.scale, true);
      unpack(w.out, s.to_q, at.b, at.h, at.first, at.rows);
    }
    if (s.to_k) {
      to_keys(w, at, w.r, w.q, w.d, w.to_k, s.scale);
      if (s.a) to_keys(w, at, w.dp, w.a, w.d, w.to_k, s.scale);
    }
    if (s.to_v) to_keys(w, at, w.g, w.d_out, w.e, w.to_v, A(1));
  });
  if (s.to_k) unpack(w.to_k, s.to_k, b, group, 0, s.keys);
  if (s.to_v) unpack(w.to_v, s.to_v, b, group, 0, s.keys);
}

struct Setting {
  double scale;
  int64_t lower, upper;
  double dropout_p;
  int64_t period;
};

std::optional<Texts> texts_of(const Optional& places, const Tensor& q, const Tensor& k) {
  if (!places) return {};
  STD_TORCH_CHECK(q.size(0) == k.size(0) && q.size(2) == k.size(2) && places->dim() == 2 &&
                      places->is_contiguous(),
                  "attention: texts need queries and keys of the same rows [T, H, M, D]");
  return Texts(static_cast<const int64_t*>(places->const_data_ptr()), places->size(0),
               places->size(1), q.size(2), q.size(0) * q.size(2));
}

// Zeros in rows of no text.
template <typename A>
void clear_others(const Problem<A>& s) {
  if (s.texts == nullptr) return;
  const auto clear = [&](const Heads& to, int64_t heads) {
    if (!to) return;
    for (const int64_t row : s.texts->others) {
      for (int64_t h = 0; h < heads; ++h) {
        std::memset(to.at(row / s.texts->each, h, row % s.texts->each), 0,
                    size_t(to.width * to.size()));
      }
    }
  };
  for (const Heads* to : {&s.out, &s.to_d_out, &s.to_q}) clear(*to, s.heads);
  for (const Heads* to : {&s.to_k, &s.to_v}) clear(*to, s.groups);
}

template <typename A>
Problem<A> problem(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& stats,
                   const Optional& mask, const Optional& seed, const std::optional<Texts>& texts,
                   const Setting& setting) {
  Problem<A> s{};
  s.batch = q.size(0), s.heads = q.size(1), s.queries = q.size(2);
  s.groups = k.size(1), s.keys = k.size(2);
  s.stats = data_of<A>(stats), s.stats_head = 2 * s.queries, s.stats_batch = s.heads * s.stats_head;
  if (texts) {
    s.texts = &*texts;
    s.batch = int64_t(texts->first.size()), s.queries = s.keys = texts->longest;
    s.stats_batch = 0;
  }
  s.q = heads_of(q), s.k = heads_of(k), s.v = heads_of(v);
  s.scale = A(setting.scale);
  RowTerms<A>& t = s.terms;
  t.keys = s.keys, t.whole = s.whole();
  t.lower = setting.lower, t.upper = setting.upper;
  t.banded = t.lower > 1 - s.queries || t.upper < s.keys - 1;
  if (mask && mask->numel() > 0) {
    t.mask = mask->const_data_ptr();
    t.boolean = mask->scalar_type() == ScalarType::Bool;
    for (int i = 0; i < 4; ++i) t.strides[i] = mask->size(i) == 1 ? 0 : mask->stride(i);
  }
  if (setting.dropout_p > 0) {
    const Seed key(*static_cast<const int64_t*>(seed->const_data_ptr()));
    t.dropout = {setting.dropout_p, key, dropped_words(setting.dropout_p), most(setting.period, 1)};
  }
  return s;
}

template <typename F>
void with_accumulation(const Tensor& t, const F& f) {
  if (t.scalar_type() == ScalarType::Double) return f(double{});
  f(float{});
}

// A new [B, H, L, width]; its heads lie within rows exactly if those of `like` do.
Tensor empty_like(const Tensor& like, int64_t width) {
  const int64_t b = like.size(0), h = like.size(1), l = like.size(2);
  if (h > 1 && l > 1 && like.stride(1) < like.stride(2)) {
    return torch::stable::transpose(empty_rows({b, l, h, width}, like.scalar_type(), like), 1, 2);
  }
  return empty_rows({b, h, l, width}, like.scalar_type(), like);
}
Tensor if_wanted(bool wanted, const Tensor& like) {
  return wanted ? empty_like(like, like.size(3)) : empty_rows({0}, like.scalar_type(), like);
}

std::tuple<Tensor, Tensor> forward(Tensor q, Tensor k, Tensor v, Optional mask, Optional seed,
                                   Optional places, double scale, int64_t lower, int64_t upper,
                                   double dropout_p, int64_t period) {
  const auto texts = texts_of(places, q, k);
  const Tensor out = empty_like(q, v.size(3));
  const bool wide = q.scalar_type() == ScalarType::Double;
  const Tensor stats = empty_rows({q.size(0), q.size(1), q.size(2), 2},
                                  wide ? ScalarType::Double : ScalarType::Float, q);
  with_accumulation(q, [&](auto zero) {
    using A = decltype(zero);
    auto s =
        problem<A>(q, k, v, stats, mask, seed, texts, {scale, lower, upper, dropout_p, period});
    s.out = heads_of(out);
    if (texts) std::fill_n(s.stats, stats.numel(), A(0));
    clear_others(s);
    for_units(s, 0,
              [](const Problem<A>& s, const Buffers<A>& w, RowTerms<A>& terms, int64_t b,
                 int64_t group) { forward_unit(s, w, terms, b, group); });
  });
  return {out, stats};
}

std::tuple<Tensor, Tensor, Tensor> backward(Tensor d_out, Tensor q, Tensor k, Tensor v,
                                            Tensor stats, Optional mask, Optional seed,
                                            Optional places, double scale, int64_t lower,
                                            int64_t upper, double dropout_p, int64_t period,
                                            int64_t needs) {
  const auto texts = texts_of(places, q, k);
  const Tensor dq = if_wanted(needs & 1, q), dk = if_wanted(needs & 2, k),
               dv = if_wanted(needs & 4, v);
  with_accumulation(q, [&](auto zero) {
    using A = decltype(zero);
    auto s =
        problem<A>(q, k, v, stats, mask, seed, texts, {scale, lower, upper, dropout_p, period});
    s.d_out = heads_of(d_out);
    s.to_q = heads_of(dq), s.to_k = heads_of(dk), s.to_v = heads_of(dv);
    clear_others(s);
    for_units(s, 1,
              [](const Problem<A>& s, const Buffers<A>& w, RowTerms<A>& terms, int64_t b,
                 int64_t group) { gradient_unit(s, w, terms, b, group); });
  });
  return {dq, dk, dv};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> double_backward(
    Optional a, Optional b, Optional c, Tensor d_out, Tensor q, Tensor k, Tensor v, Tensor stats,
    Optional mask, Optional seed, Optional places, double scale, int64_t lower, int64_t upper,
    double dropout_p, int64_t period, int64_t needs) {
  const auto texts = texts_of(places, q, k);
  const Tensor dd = if_wanted(needs & 1, d_out), dq = if_wanted(needs & 2, q),
               dk = if_wanted(needs & 4, k), dv = if_wanted(needs & 8, v);
  with_accumulation(q, [&](auto zero) {
    using A = decltype(zero);
    auto s =
        problem<A>(q, k, v, stats, mask, seed, texts, {scale, lower, upper, dropout_p, period});
    s.d_out = heads_of(d_out);
    s.a = heads_of(a), s.b = heads_of(b), s.c = heads_of(c);
    s.to_d_out = heads_of(dd), s.to_q = heads_of(dq), s.to_k = heads_of(dk), s.to_v = heads_of(dv);
    clear_others(s);
    for_units(s, 2,
              [](const Problem<A>& s, const Buffers<A>& w, RowTerms<A>& terms, int64_t b,
                 int64_t group) { second_unit(s, w, terms, b, group); });
  });
  return {dd, dq, dk, dv};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastmeta, CPU, m) {
  m.impl("attention", TORCH_BOX(&forward));
  m.impl("attention_backward", TORCH_BOX(&backward));
  m.impl("attention_double_backward", TORCH_BOX(&double_backward));
}

}  // namespace fastmeta
