// The operators of an LSTM cell that all coordinates share, on the CPU. Coordinates lie in vector
// lanes, panel by panel; gates never leave the cache, and the backward passes compute them again.

#include <tuple>

#include "cpu/coordinate_cell.h"
#include "math/coordinate_lstm.h"

namespace fastmeta {
namespace {

template <typename S, int B>
struct Rows {  // the numbers of a unit in a panel
  using A = acc_t<S>;
  using L = Lanes<A, B>;
  static constexpr int64_t kWidth = kPanelWidth<A>;
  int64_t H;
  FM_HD L at(const A* rows, int64_t row, int64_t lane) const {
    return L::template load<true>(rows + row * kWidth + lane, 0);
  }
  FM_HD void put(A* rows, int64_t row, int64_t lane, const L& value) const {
    value.template store<true>(rows + row * kWidth + lane, 0);
  }
  FM_HD LstmUnit<L> unit(const A* sums, const A* c, int64_t j, int64_t lane) const {
    return LstmUnit<L>::of(at(sums, j, lane), at(sums, H + j, lane), at(sums, 2 * H + j, lane),
                           at(sums, 3 * H + j, lane), at(c, j, lane));
  }
  FM_HD void put_gates(A* sums, int64_t j, int64_t lane, const LstmParts<L>& of) const {
    put(sums, j, lane, of.i);
    put(sums, H + j, lane, of.f);
    put(sums, 2 * H + j, lane, of.g);
    put(sums, 3 * H + j, lane, of.o);
  }
};

template <typename S>
struct LstmForward {
  using A = acc_t<S>;
  static constexpr int64_t kWidth = kPanelWidth<A>;
  const LstmCell<S>& cell;
  S *new_h, *new_c;

  struct Work {
    LaneBuffer<A> z, sums, c;
    Work(const LstmCell<S>& cell, const LstmForward&)
        : z(cell.weights.K * kWidth), sums(4 * cell.H * kWidth), c(cell.H * kWidth) {}
    void start() {}
  };
  template <int B>
  FM_HD void panel(Work& work, int64_t first, int64_t count) const {
    const int64_t H = cell.H;
    const Rows<S, B> rows{H};
    cell.read_rows(cell.x, cell.h, first, count, A(1), work.z.data);
    to_lanes(row_of(cell.c, first, H), count, H, work.c.data);
    mix<B, false>(4 * H, cell.weights.K, cell.weights.rows.data(), work.z.data, work.sums.data);
    for (int64_t j = 0; j < H; ++j) {
      for (int64_t l = 0; l < kWidth; l += Lanes<A, B>::kCount) {
        const auto unit = rows.unit(work.sums.data, work.c.data, j, l);
        rows.put(work.c.data, j, l, unit.cell);
        rows.put(work.sums.data, j, l, unit.h());
      }
    }
    from_lanes(work.sums.data, count, H, row_of(new_h, first, H));
    from_lanes(work.c.data, count, H, row_of(new_c, first, H));
  }
  void finish(int64_t, const Work&) const {}
};

template <typename S>
struct LstmBackward {
  using A = acc_t<S>;
  static constexpr int64_t kWidth = kPanelWidth<A>;
  const LstmCell<S>& cell;
  const S *gh, *gc;
  S *dx, *dh, *dc;
  LstmSums<A>* sums;  // null where not wanted

  struct Work {
    LaneBuffer<A> z, sums, c, gh, gc, acc;
    Work(const LstmCell<S>& cell, const LstmBackward& pass)
        : z(cell.weights.K * kWidth),
          sums(4 * cell.H * kWidth),
          c(cell.H * kWidth),
          gh(cell.H * kWidth),
          gc(cell.H * kWidth),
          acc(pass.sums ? 4 * cell.H * cell.weights.K * 64 / int64_t(sizeof(A)) : 0) {}
    void start() { std::fill(acc.memory.begin(), acc.memory.end(), A(0)); }
  };
  template <int B>
  FM_HD void panel(Work& work, int64_t first, int64_t count) const {
    using L = Lanes<A, B>;
    const int64_t F = cell.F, H = cell.H, K = cell.weights.K;
    const Rows<S, B> rows{H};
    const L one = L::all(A(1));
    cell.read_rows(cell.x, cell.h, first, count, A(1), work.z.data);
    to_lanes(row_of(cell.c, first, H), count, H, work.c.data);
    to_lanes(row_of(gh, first, H), count, H, work.gh.data);
    to_lanes(row_of(gc, first, H), count, H, work.gc.data);
    mix<B, false>(4 * H, K, cell.weights.rows.data(), work.z.data, work.sums.data);
    for (int64_t j = 0; j < H; ++j) {
      for (int64_t l = 0; l < kWidth; l += L::kCount) {
        const auto unit = rows.unit(work.sums.data, work.c.data, j, l);
        L q;
        const auto of =
            lstm_gradient(unit, one, rows.at(work.gh.data, j, l), rows.at(work.gc.data, j, l), q);
        rows.put_gates(work.sums.data, j, l, of);
        rows.put(work.c.data, j, l, of.c);
      }
    }
    from_lanes(work.c.data, count, H, row_of(dc, first, H));
    if (sums != nullptr) outer<B>(4 * H, K, work.sums.data, work.z.data, work.acc.data);
    if (dx != nullptr || dh != nullptr) {
      mix<B, false>(F + H, 4 * H, cell.weights.columns.data(), work.sums.data, work.z.data);
      cell.write_rows(work.z.data, first, count, dx, dh);
    }
  }
  void finish(int64_t part, const Work& work) const {
    if (sums != nullptr) sums->keep(part, work.acc.data);
  }
};

template <typename S>
struct LstmSecond {
  using A = acc_t<S>;
  static constexpr int64_t kWidth = kPanelWidth<A>;
  const LstmCell<S>& cell;
  const LstmWeights<A>& direction;  // of the weights and the bias
  const S *ux, *uh, *uc, *gh, *gc;
  S *dgh, *dgc, *dx, *dh, *dc;
  LstmSums<A>* sums;

  struct Work {
    LaneBuffer<A> z, u, sums, along, gates, c, uc, gh, gc, acc;
    Work(const LstmCell<S>& cell, const LstmSecond& pass)
        : z(cell.weights.K * kWidth),
          u(cell.weights.K * kWidth),
          sums(4 * cell.H * kWidth),
          along(4 * cell.H * kWidth),
          gates(4 * cell.H * kWidth),
          c(cell.H * kWidth),
          uc(cell.H * kWidth),
          gh(cell.H * kWidth),
          gc(cell.H * kWidth),
          acc(pass.sums ? 4 * cell.H * cell.weights.K * 64 / int64_t(sizeof(A)) : 0) {}
    void start() { std::fill(acc.memory.begin(), acc.memory.end(), A(0)); }
  };
  template <int B>
  FM_HD void panel(Work& work, int64_t first, int64_t count) const {
    using L = Lanes<A, B>;
    const int64_t F = cell.F, H = cell.H, K = cell.weights.K;
    const Rows<S, B> rows{H};
    const L one = L::all(A(1));
    cell.read_rows(cell.x, cell.h, first, count, A(1), work.z.data);
    cell.read_rows(ux, uh, first, count, A(0), work.u.data);
    to_lanes(row_of(cell.c, first, H), count, H, work.c.data);
    to_lanes(row_of(uc, first, H), count, H, work.uc.data);
    to_lanes(row_of(gh, first, H), count, H, work.gh.data);
    to_lanes(row_of(gc, first, H), count, H, work.gc.data);
    const A* const w = cell.weights.rows.data();
    mix<B, false>(4 * H, K, w, work.z.data, work.sums.data);
    mix<B, false>(4 * H, K, w, work.u.data, work.along.data);
    mix<B, true>(4 * H, K, direction.rows.data(), work.z.data, work.along.data);
    for (int64_t j = 0; j < H; ++j) {
      for (int64_t l = 0; l < kWidth; l += L::kCount) {
        const auto unit = rows.unit(work.sums.data, work.c.data, j, l);
        const L own_gh = rows.at(work.gh.data, j, l);
        L q, d_gh, d_gc;
        const auto of = lstm_gradient(unit, one, own_gh, rows.at(work.gc.data, j, l), q);
        const LstmParts<L> d{rows.at(work.along.data, j, l), rows.at(work.along.data, H + j, l),
                             rows.at(work.along.data, 2 * H + j, l),
                             rows.at(work.along.data, 3 * H + j, l), rows.at(work.uc.data, j, l)};
        const auto second = lstm_second(unit, one, own_gh, q, d, d_gh, d_gc);
        rows.put_gates(work.gates.data, j, l, of);
        rows.put_gates(work.sums.data, j, l, second);
        rows.put(work.c.data, j, l, second.c);
        rows.put(work.gh.data, j, l, d_gh);
        rows.put(work.gc.data, j, l, d_gc);
      }
    }
    from_lanes(work.gh.data, count, H, row_of(dgh, first, H));
    from_lanes(work.gc.data, count, H, row_of(dgc, first, H));
    from_lanes(work.c.data, count, H, row_of(dc, first, H));
    if (sums != nullptr) {
      outer<B>(4 * H, K, work.sums.data, work.z.data, work.acc.data);
      outer<B>(4 * H, K, work.gates.data, work.u.data, work.acc.data);
    }
    if (dx != nullptr || dh != nullptr) {
      const A* const back = cell.weights.columns.data();
      mix<B, false>(F + H, 4 * H, back, work.sums.data, work.z.data);
      mix<B, true>(F + H, 4 * H, direction.columns.data(), work.gates.data, work.z.data);
      cell.write_rows(work.z.data, first, count, dx, dh);
    }
  }
  void finish(int64_t part, const Work& work) const {
    if (sums != nullptr) sums->keep(part, work.acc.data);
  }
};

std::tuple<Tensor, Tensor> forward(Tensor x, Tensor h, Tensor c, Tensor w_ih, Tensor w_hh,
                                   Tensor bias) {
  const int64_t M = x.size(0), H = h.size(1);
  const Tensor new_h = if_wanted(true, {M, H}, x), new_c = if_wanted(true, {M, H}, x);
  with_any_dtype(x, [&](auto zero) {
    using S = decltype(zero);
    const LstmCell<S> cell(x, h, c, w_ih, w_hh, bias);
    cell.run(LstmForward<S>{cell, rows_or_null<S>(new_h), rows_or_null<S>(new_c)});
  });
  return {new_h, new_c};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> backward(Optional gh, Optional gc,
                                                                    Tensor x, Tensor h, Tensor c,
                                                                    Tensor w_ih, Tensor w_hh,
                                                                    Tensor bias, int64_t needs) {
  const int64_t M = x.size(0), F = x.size(1), H = h.size(1);
  const Tensor dx = if_wanted(needs & kX, {M, F}, x), dh = if_wanted(needs & kH, {M, H}, x);
  const Tensor dc = if_wanted(needs & kC, {M, H}, x);
  const Tensor dw_ih = if_wanted(needs & kW, {4 * H, F}, x);
  const Tensor dw_hh = if_wanted(needs & kW, {4 * H, H}, x);
  const Tensor db = if_wanted(needs & kW, {4 * H}, x);
  with_any_dtype(x, [&](auto zero) {
    using S = decltype(zero);
    const LstmCell<S> cell(x, h, c, w_ih, w_hh, bias);
    LstmSums<acc_t<S>> sums(F, H, M, needs & kW);
    cell.run(LstmBackward<S>{cell, rows_or_null<S>(gh), rows_or_null<S>(gc), rows_or_null<S>(dx),
                             rows_or_null<S>(dh), rows_or_null<S>(dc),
                             needs & kW ? &sums : nullptr});
    sums.finish(rows_or_null<S>(dw_ih), rows_or_null<S>(dw_hh), rows_or_null<S>(db));
  });
  return {dx, dh, dc, dw_ih, dw_hh, db};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> double_backward(
    Optional ux, Optional uh, Optional uc, Optional uw_ih, Optional uw_hh, Optional ub, Optional gh,
    Optional gc, Tensor x, Tensor h, Tensor c, Tensor w_ih, Tensor w_hh, Tensor bias,
    int64_t needs) {
  const int64_t M = x.size(0), F = x.size(1), H = h.size(1);
  const Tensor dgh = if_wanted(needs & kG, {M, H}, x), dgc = if_wanted(needs & kG, {M, H}, x);
  const Tensor dx = if_wanted(needs & kX, {M, F}, x), dh = if_wanted(needs & kH, {M, H}, x);
  const Tensor dc = if_wanted(needs & kC, {M, H}, x);
  const Tensor dw_ih = if_wanted(needs & kW, {4 * H, F}, x);
  const Tensor dw_hh = if_wanted(needs & kW, {4 * H, H}, x);
  const Tensor db = if_wanted(needs & kW, {4 * H}, x);
  with_any_dtype(x, [&](auto zero) {
    using S = decltype(zero);
    const LstmCell<S> cell(x, h, c, w_ih, w_hh, bias);
    const LstmWeights<acc_t<S>> direction(F, H, uw_ih, uw_hh, ub, S{});
    LstmSums<acc_t<S>> sums(F, H, M, needs & kW);
    cell.run(LstmSecond<S>{cell, direction, rows_or_null<S>(ux), rows_or_null<S>(uh),
                           rows_or_null<S>(uc), rows_or_null<S>(gh), rows_or_null<S>(gc),
                           rows_or_null<S>(dgh), rows_or_null<S>(dgc), rows_or_null<S>(dx),
                           rows_or_null<S>(dh), rows_or_null<S>(dc), needs & kW ? &sums : nullptr});
    sums.finish(rows_or_null<S>(dw_ih), rows_or_null<S>(dw_hh), rows_or_null<S>(db));
  });
  return {dgh, dgc, dx, dh, dc, dw_ih, dw_hh, db};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastmeta, CPU, m) {
  m.impl("coordinate_lstm", TORCH_BOX(&forward));
  m.impl("coordinate_lstm_backward", TORCH_BOX(&backward));
  m.impl("coordinate_lstm_double_backward", TORCH_BOX(&double_backward));
}

}  // namespace fastmeta
