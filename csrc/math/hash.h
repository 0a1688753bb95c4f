// What dropout drops: a hash of a seed and of an element's place, the same on every device; with
// reference/hashing.py, its definition.
#pragma once

#include "common/host_device.h"

namespace fastmeta {

// A hash of 32 bits (lowbias32).
FM_HD uint32_t mixed(uint32_t x) {
  x = (x ^ (x >> 16)) * 0x7FEB352Du;
  x = (x ^ (x >> 15)) * 0x846CA68Bu;
  return x ^ (x >> 16);
}

// How many of the words from 0 mean that an element is dropped, with probability p.
FM_HD uint32_t dropped_words(double p) {
  const double words = p * 4294967296.0;
  return words < 4294967295.0 ? uint32_t(words) : 0xFFFFFFFFu;
}

// A seed, as two words.
struct Seed {
  uint32_t low = 0, high = 0;
  Seed() = default;
  FM_HD explicit Seed(int64_t seed) : low(uint32_t(seed)), high(uint32_t(uint64_t(seed) >> 32)) {}
};

}  // namespace fastmeta
