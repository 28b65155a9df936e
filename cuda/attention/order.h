// How many heads a section of tile/scheduler.cuh takes.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cuda/host/device.h"

namespace jaxkern {

// Heads whose streamed operands share the L2 cache: `head_bytes` each for a key/value head, `group`
// query heads to it. Half of the cache is left to everything else.
inline int heads_in_l2(const DeviceInfo& device, int64_t head_bytes, int group) {
  const int64_t heads = device.l2_bytes / 2 / std::max<int64_t>(head_bytes, 1);
  return static_cast<int>(std::clamp<int64_t>(heads, 1, 1024)) * group;
}

}  // namespace jaxkern
