// Where a block's time goes, as benchmarks/decode_kernel.cu prints it where it is compiled with
// JAXKERN_PROBES. Nothing else is.
#pragma once

#include "cuda/decode/params.h"

namespace jaxkern::decode {

// What a phase consists of: weights into registers (of the head: the draw of the last step's
// tokens), a wait for what others send, what has come into shared memory, the product, and what is
// sent.
enum Part { kTake, kWait, kReceive, kMultiply, kSend, kParts };

// In shared memory.
struct Probe {
#ifdef JAXKERN_PROBES
  uint32_t last, cycles[kPhases][kParts];

  __device__ void begin() {
    if (threadIdx.x != 0) return;
    for (auto& phase : cycles) {
      for (uint32_t& part : phase) part = 0;
    }
    last = clock();
  }
  // What has passed since the last call.
  __device__ void take(Phase phase, Part part) {
    if (threadIdx.x != 0) return;
    const uint32_t now = clock();
    cycles[phase][part] += now - last;
    last = now;
  }
  __device__ void end() const;
#else
  __device__ __forceinline__ void begin() {}
  __device__ __forceinline__ void take(Phase, Part) {}
  __device__ __forceinline__ void end() const {}
#endif
};

#ifdef JAXKERN_PROBES
__device__ uint32_t probed_cycles[kMaxMultiprocessors][kPhases][kParts];

inline __device__ void Probe::end() const {
  if (threadIdx.x != 0) return;
  for (int phase = 0; phase < kPhases; ++phase) {
    for (int part = 0; part < kParts; ++part) {
      probed_cycles[blockIdx.x][phase][part] = cycles[phase][part];
    }
  }
}
#endif

}  // namespace jaxkern::decode
