// How attention is taken apart on the CPU: one unit of parallel work is a head of keys with the
// heads of queries that share it, of one text; its queries come in blocks.
#pragma once

#include <array>
#include <memory>

#include "cpu/attention.h"
#include "cpu/texts.h"

namespace fastmeta {

// Queries [first, first + rows) of a head, with the range of keys that they attend, in whole
// vectors.
struct Block {
  int64_t b, h, first, rows, column, columns;
};

template <typename A>
struct Problem {
  int64_t batch, heads, groups, queries, keys;
  Heads q, k, v, d_out, a, b, c;          // operands; a, b, c: cotangents of dq, dk, dv
  Heads out, to_d_out, to_q, to_k, to_v;  // results
  // [B, H, Lq, 2]: the largest score of a row, and what exp(score - it) is multiplied with
  A* stats;
  int64_t stats_batch, stats_head;
  const Texts* texts;  // null: padded
  A scale;
  RowTerms<A> terms;
  static constexpr int64_t kCount = 64 / sizeof(A);

  int64_t whole() const { return padded(keys, kCount); }
  A* stats_of(const Block& at) const {
    return stats + at.b * stats_batch + at.h * stats_head + 2 * at.first;
  }
  // That of one text alone.
  Problem text(int64_t b) const {
    Problem own = *this;
    const int64_t first = texts->first[b];
    own.queries = own.keys = texts->count[b];
    for (Heads* h : own.tensors()) *h = h->from(first / texts->each, first % texts->each);
    own.stats += 2 * (first / texts->each * heads * texts->each + first % texts->each);
    return own;
  }
  // Every tensor of [B, H, L, width].
  std::array<Heads*, 12> tensors() {
    return {&q, &k, &v, &d_out, &a, &b, &c, &out, &to_d_out, &to_q, &to_k, &to_v};
  }
  // Notes where the rows of another unit are, those of a `whole` problem.
  void comes_next(Problem whole, int64_t text, int64_t head) {
    if (texts != nullptr) whole = whole.text(text), text = 0;
    const auto others = whole.tensors();
    const auto mine = tensors();
    for (size_t i = 0; i < mine.size(); ++i) {
      if (*mine[i]) mine[i]->ahead = others[i]->at(text, head, 0);
    }
  }
  // Queries at a time: few enough that their weights stay in cache, and nearly equal blocks.
  int64_t rows() const {
    const int64_t some = least(66, most(24, 6144 / most(whole(), 1)));
    return ceil_div(queries, most(ceil_div(queries, some), 1));
  }
};

// One thread's memory: keys and values of a head, as they are and transposed, and the blocks.
template <typename A>
struct Buffers {
  int64_t whole, rows, d, e;  // padded keys, queries of a block, padded head sizes
  A *k, *k_t, *v, *v_t, *b, *b_t, *c, *c_t;
  A *q, *d_out, *a, *out;
  A *p, *dp, *g, *r;
  A *to_k, *to_v;
  A *bias, *keep;

  // `order`: which derivative is computed.
  Buffers(const Problem<A>& s, int order, Arena<A>& arena) {
    whole = s.whole(), rows = s.rows();
    d = padded(s.q.width, s.kCount), e = padded(s.v.width, s.kCount);
    const auto part = [&](bool there, int64_t n, int64_t width) {
      return there ? arena.take(n * width) : nullptr;
    };
    k = part(true, whole, d), k_t = part(true, whole, d);
    v = part(true, whole, e), v_t = part(order > 0, whole, e);
    b = part(bool(s.b), whole, d), b_t = part(bool(s.b), whole, d);
    c = part(bool(s.c), whole, e), c_t = part(bool(s.c), whole, e);
    q = part(true, rows, d), d_out = part(order > 0, rows, e), a = part(bool(s.a), rows, d);
    out = part(true, rows, most(d, e));
    p = part(true, rows, whole), dp = part(order > 0, rows, whole);
    g = part(order > 1, rows, whole), r = part(order > 1, rows, whole);
    to_k = part(order > 0, whole, d), to_v = part(order > 0, whole, e);
    bias = part(true, 1, whole), keep = part(true, 1, whole);
  }
};

template <typename A>
void read_keys(const Heads& from, int64_t b, int64_t h, int64_t keys, const Buffers<A>& w, A* to,
               A* transposed) {
  const int64_t width = padded(from.width, Problem<A>::kCount);
  pack(from, b, h, 0, keys, to);
  std::fill(to + keys * width, to + w.whole * width, A(0));
  if (transposed != nullptr) transpose(to, w.whole, width, transposed);
}

// f(problem, buffers, row terms, b, group) for every head of keys, in parallel.
template <typename A, typename F>
void for_units(const Problem<A>& s, int order, const F& f) {
  const int64_t units = s.batch * s.groups;
  const int64_t work = s.heads / most(s.groups, 1) * s.queries * s.keys * (order + 1);
  const int64_t grain = most(1, kGrain / most(1, work));
  const auto range = [&](int64_t begin, int64_t end) {
    Arena<A> count;
    Buffers<A>(s, order, count);
    const std::unique_ptr<A[]> memory(new A[count.used + s.kCount]);
    const auto address = reinterpret_cast<uintptr_t>(memory.get());
    Arena<A> arena{reinterpret_cast<A*>(padded(address, 64))};
    const Buffers<A> w(s, order, arena);
    RowTerms<A> terms = s.terms;
    terms.use(w.bias, w.keep);
    // what waits for memory is a short head; its queries are one block
    const bool ahead = s.heads == s.groups && s.queries <= s.rows();
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t b = unit / s.groups, group = unit % s.groups;
      Problem<A> own = s.texts == nullptr ? s : s.text(b);
      if (ahead && unit + 1 < end) own.comes_next(s, (unit + 1) / s.groups, (unit + 1) % s.groups);
      if (s.texts == nullptr) {
        f(own, w, terms, b, group);
        continue;
      }
      Buffers<A> part = w;
      part.whole = own.whole(), part.rows = most(1, least(w.rows, own.queries));
      terms.keys = own.keys, terms.whole = part.whole, terms.filled = false;
      terms.position = s.texts->position.data() + b * s.texts->length;
      f(own, part, terms, b, group);
    }
  };
  if (units <= grain) return range(0, units);
  torch::stable::parallel_for(0, units, grain, range);
}

// f(block) for the blocks of all heads of queries of a group.
template <typename A, typename F>
void for_blocks(const Problem<A>& s, const Buffers<A>& w, RowTerms<A>& terms, int64_t b,
                int64_t group, const F& f) {
  const int64_t share = s.heads / s.groups;
  for (int64_t h = group * share; h < (group + 1) * share; ++h) {
    terms.at(b, h);
    for (int64_t first = 0; first < s.queries; first += w.rows) {
      const int64_t rows = least(w.rows, s.queries - first);
      int64_t column = 0, end = w.whole;
      if (terms.banded) {
        column = terms.first(first) / s.kCount * s.kCount;
        end = padded(terms.end(first + rows - 1), s.kCount);
      }
      f(Block{b, h, first, rows, column, most(end - column, 0)});
    }
  }
}

}  // namespace fastmeta
