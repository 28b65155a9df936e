// How many heads work at the same time under a causal mask (see tile/scheduler.cuh).
#pragma once

#include <algorithm>
#include <cstdint>

namespace jaxkern {

// Key/value heads whose streamed operands, `head_bytes` each, share the L2 cache (50 MB and more on
// Hopper) with everything else.
inline int kv_heads_in_l2(int64_t head_bytes) {
  constexpr int64_t kBudget = 16 << 20;
  return static_cast<int>(std::clamp<int64_t>(kBudget / head_bytes, 1, 1 << 10));
}

}  // namespace jaxkern
