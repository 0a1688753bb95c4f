// Texts of any length that lie one after another, without padding.
#pragma once

#include <vector>

#include "common/tensor.h"

namespace fastmeta {

// The rows of each text where texts of any length lie one after another in tensors [T, H, M, D]:
// row t * M + i is (t, i), and a text's rows are of one t.
struct Texts {
  int64_t each = 0;                   // M
  int64_t length = 0, longest = 0;    // L of the masks, and rows of the longest text
  std::vector<int64_t> first, count;  // [B]
  std::vector<int64_t> position;      // [B, L]: of a text's rows in the padded text
  std::vector<int64_t> others;        // rows of no text
  // places [B, L]: the row of every position, -1 for none.
  Texts(const int64_t* places, int64_t batch, int64_t length, int64_t each, int64_t rows)
      : each(each), length(length), first(batch), count(batch), position(batch * length) {
    std::vector<char> read(rows, 0);
    for (int64_t b = 0; b < batch; ++b) {
      for (int64_t j = 0; j < length; ++j) {
        const int64_t row = places[b * length + j];
        if (row < 0) continue;
        if (count[b] == 0) first[b] = row;
        STD_TORCH_CHECK(row < rows && row == first[b] + count[b] && row / each == first[b] / each,
                        "attention: rows of a text must follow each other, within ", each,
                        " of one task, got row ", row);
        position[b * length + count[b]++] = j;
        read[row] = 1;
      }
      longest = most(longest, count[b]);
    }
    for (int64_t row = 0; row < rows; ++row) {
      if (!read[row]) others.push_back(row);
    }
  }
};

}  // namespace fastmeta
