// What the passes over coordinates share: the cell's arguments, how coordinates are divided among
// threads, and the sums that weight gradients are.
#pragma once

#include <vector>

#include "common/cpu.h"
#include "cpu/coordinate_panels.h"

namespace fastmeta {

using Optional = std::optional<Tensor>;

enum LstmNeeds : int64_t { kX = 1, kH = 2, kC = 4, kW = 8, kG = 16 };
constexpr int64_t kLstmParts = 64;  // sums over coordinates are made of at most so many

// A matrix [4H, F + H + 1]: weights of inputs and state and the bias, whose input is 1.
template <typename A>
struct LstmWeights {
  int64_t F, H, K;               // K = F + H + 1
  std::vector<A> rows, columns;  // [4H, K] and, without the bias, [F + H, 4H]

  template <typename S>
  void put(const Optional& from, int64_t count, int64_t at, S) {
    if (!from) return;
    const S* const data = static_cast<const S*>(from->const_data_ptr());
    for (int64_t n = 0; n < 4 * H; ++n) {
      for (int64_t k = 0; k < count; ++k) rows[size_t(n * K + at + k)] = A(data[n * count + k]);
    }
  }
  template <typename S>
  LstmWeights(int64_t f, int64_t h, const Optional& w_ih, const Optional& w_hh,
              const Optional& bias, S zero)
      : F(f), H(h), K(f + h + 1), rows(size_t(4 * h * K)), columns(size_t(4 * h * (f + h))) {
    put(w_ih, F, 0, zero);
    put(w_hh, H, F, zero);
    put(bias, 1, F + H, zero);
    transpose(4 * H, F + H, rows.data(), K, columns.data(), 4 * H);
  }
};

// A tensor of a row for each coordinate, or none.
template <typename S>
S* rows_or_null(const Optional& t) {
  return t && t->numel() > 0 ? static_cast<S*>(const_cast<void*>(t->const_data_ptr())) : nullptr;
}
template <typename S>
S* row_of(S* data, int64_t row, int64_t columns) {
  return data == nullptr ? nullptr : data + row * columns;
}

// Buffers of lanes, aligned to 64 bytes.
template <typename A>
struct LaneBuffer {
  std::vector<A> memory;
  A* data;
  explicit LaneBuffer(int64_t count) : memory(size_t(count) + 64 / sizeof(A)) {
    const auto address = (reinterpret_cast<uintptr_t>(memory.data()) + 63) & ~uintptr_t(63);
    data = reinterpret_cast<A*>(address);
  }
};

template <typename S>
struct LstmCell {
  using A = acc_t<S>;
  static constexpr int64_t kWidth = kPanelWidth<A>;
  int64_t M, F, H;
  const S *x, *h, *c;
  LstmWeights<A> weights;

  LstmCell(const Tensor& x, const Tensor& h, const Tensor& c, const Tensor& w_ih,
           const Tensor& w_hh, const Tensor& bias)
      : M(x.size(0)),
        F(x.size(1)),
        H(h.size(1)),
        x(rows_or_null<S>(x)),
        h(rows_or_null<S>(h)),
        c(rows_or_null<S>(c)),
        weights(F, H, w_ih, w_hh, bias, S{}) {}

  // Inputs and state of a panel as lanes, and ones: [F + H + 1].
  FM_HD void read_rows(const S* of_x, const S* of_h, int64_t first, int64_t count, A one,
                       A* to) const {
    to_lanes(row_of(of_x, first, F), count, F, to);
    to_lanes(row_of(of_h, first, H), count, H, to + F * kWidth);
    std::fill_n(to + (F + H) * kWidth, kWidth, one);
  }
  FM_HD void write_rows(const A* from, int64_t first, int64_t count, S* of_x, S* of_h) const {
    from_lanes(from, count, F, row_of(of_x, first, F));
    from_lanes(from + F * kWidth, count, H, row_of(of_h, first, H));
  }

  // Runs pass.panel(work, width of registers, first, count) for all panels in parts that depend on
  // M alone; pass.finish(part, work) after each.
  template <typename Pass>
  void run(const Pass& pass) const {
    const int64_t panels = ceil_div(M, kWidth), parts = least(panels, kLstmParts);
    if (parts == 0) return;
    parallel_ranges(parts, ceil_div(panels, parts) * kWidth * H, [&](int64_t from, int64_t to) {
      typename Pass::Work work(*this, pass);
      for (int64_t part = from; part < to; ++part) {
        work.start();
        with_registers([&](auto bytes) FM_INLINE_LAMBDA {
          for (int64_t p = panels * part / parts; p < panels * (part + 1) / parts; ++p) {
            pass.template panel<decltype(bytes)::value>(work, p * kWidth,
                                                        least(kWidth, M - p * kWidth));
          }
        });
        pass.finish(part, work);
      }
    });
  }
};

// Sums over coordinates [4H, F + H + 1]: lane by lane in a part, then the parts in order.
template <typename A>
struct LstmSums {
  int64_t F, H, K;
  std::vector<A> parts;

  LstmSums(int64_t f, int64_t h, int64_t coordinates, bool wanted) : F(f), H(h), K(f + h + 1) {
    const int64_t count = least(ceil_div(coordinates, kPanelWidth<A>), kLstmParts);
    if (wanted) parts.resize(size_t(count * 4 * h * K));
  }
  void keep(int64_t part, const A* lanes) {
    constexpr int64_t kCount = 64 / sizeof(A);
    A* const to = parts.data() + part * 4 * H * K;
    for (int64_t i = 0; i < 4 * H * K; ++i) {
      to[i] = Lanes<A, 16>::template load<true>(lanes + i * kCount, 0).sum();
    }
  }
  template <typename S>
  void finish(S* w_ih, S* w_hh, S* bias) const {
    if (w_ih == nullptr && w_hh == nullptr) return;
    const int64_t size = 4 * H * K, count = size > 0 ? int64_t(parts.size()) / size : 0;
    for (int64_t n = 0; n < 4 * H; ++n) {
      for (int64_t k = 0; k < K; ++k) {
        A sum = 0;
        for (int64_t p = 0; p < count; ++p) sum += parts[size_t(p * size + n * K + k)];
        S* const to = k < F ? w_ih + n * F + k : k < F + H ? w_hh + n * H + k - F : bias + n;
        *to = S(sum);
      }
    }
  }
};

}  // namespace fastmeta
