// Packed rows [T, P]: addressing, and the division of a row into tiles and segments.
// All index arithmetic is int64.
#pragma once

#include "common/host_device.h"

namespace fastmeta {

// One unit of work: the columns [begin, end) of row t.
struct Tile {
  int64_t row, index, begin, end;
};

FM_HD constexpr Tile tile_at(int64_t unit, int64_t tiles_per_row, int64_t tile, int64_t columns) {
  const int64_t row = unit / tiles_per_row;
  const int64_t index = unit - row * tiles_per_row;
  return {row, index, index * tile, least((index + 1) * tile, columns)};
}
// 70000 rows of 70000 columns: offsets pass 2^32
static_assert(tile_at(70000LL * 35 - 1, 35, 2048, 70000).row == 69999);
static_assert(tile_at(70000LL * 35 - 1, 35, 2048, 70000).end == 70000);
static_assert(tile_at(3000000000LL, 1, 2048, 5).row == 3000000000LL);
static_assert(tile_at(3, 1LL << 22, 2048, 1LL << 33).begin == 6144);
static_assert(tile_at((1LL << 22) - 1, 1LL << 22, 2048, 1LL << 33).end == 1LL << 33);

// The last segment that starts at or before `column`: its owner, as empty segments own nothing.
// Stays within [0, segments) whatever the offsets hold.
FM_HD int64_t segment_of(const int64_t* offsets, int64_t segments, int64_t column) {
  int64_t low = 0, high = segments - 1;
  while (low < high) {
    const int64_t middle = (low + high + 1) / 2;
    if (offsets[middle] <= column) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  return low;
}

// Where the partial sum of (tile, segment) lies among a row's partials. Along a row the pairs that
// meet form a staircase, so tile + segment is different for each of them.
FM_HD constexpr int64_t partial_slot(int64_t tile, int64_t segment) { return tile + segment; }
FM_HD constexpr int64_t partial_slots(int64_t tiles_per_row, int64_t segments) {
  return tiles_per_row + segments - 1;
}

// The learning rate of (task, column); see fastmeta/reference/inner_update.py.
enum class RateKind { kRow, kColumn, kSegment };

template <typename A>
struct Rate {
  RateKind kind = RateKind::kRow;
  const A* data = nullptr;  // null: `value` everywhere
  A value = 0;
  int64_t row_stride = 0;  // 0: the same for all tasks
  int64_t columns = 1;     // 1, P or S
  const int64_t* offsets = nullptr;
  FM_HD A at(int64_t t, int64_t c) const {
    return data == nullptr ? value : data[t * row_stride + c];
  }
};

}  // namespace fastmeta
