// How many heads work at the same time under a mask that makes tiles differ in work (see
// tile/scheduler.cuh).
#pragma once

#include <algorithm>
#include <cstdint>

namespace jaxkern {

// Forward: heads in a section, of whose keys and values `head_bytes` each are streamed. Blocks that
// run together should be of similar length, since then they read the same keys at about the same
// time, which the L2 cache serves once: so many heads. But of long ones not so many that memory has
// to feed them all.
// NOTE: at head dim 256, 8k causal, 2 heads ran at 530 TFLOP/s, 16 at 740.
inline int heads_in_forward_section(int64_t head_bytes) {
  return static_cast<int>(std::clamp<int64_t>((64 << 20) / head_bytes, 16, 32));
}

// Backward: key/value heads in a section, of whose queries `head_bytes` each are streamed. Here few
// are better, since blocks that run in step add to the same rows of dQ.
inline int kv_heads_in_backward_section(int64_t head_bytes) {
  return static_cast<int>(std::max<int64_t>((16 << 20) / head_bytes, 1));
}

// Backward, repeatable, without a mask: key/value heads that take turns side by side.
// NOTE: at head dim 128, 8k, 8, 16, 32 of them ran at 0.91, 0.88, 0.82 of the default's speed.
constexpr int heads_in_line(int head_dim) { return head_dim == 128 ? 8 : 16; }

}  // namespace jaxkern
