// dropout: which words keep an element, and by how much those are scaled.
#pragma once

#include <cmath>
#include <cstdint>

namespace bbb_fast {

// An element is kept, times scale, where its word is at least `least`.
struct Dropout {
  uint32_t least;
  double scale;

  explicit Dropout(double p) {
    const double dropped = std::nearbyint(p * 0x1p32);
    const bool all = dropped >= 0x1p32;
    least = all ? 0 : static_cast<uint32_t>(dropped);
    scale = all ? 0.0 : 1.0 / (1.0 - p);
  }
};

}  // namespace bbb_fast
