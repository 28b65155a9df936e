#include "cuda/decode/launch.h"

#include "cuda/decode/step.h"

namespace jaxkern::decode {

cudaError_t launch_decode_step(const DecodeParams& params, cudaStream_t stream) {
  return params.head_dim == 64 ? launch_decode_step_of<64>(params, stream)
                               : launch_decode_step_of<128>(params, stream);
}

int64_t decode_workspace_bytes(const DecodeParams& params) {
  int64_t bytes;
  plan_step(params, &bytes);
  return bytes;
}

}  // namespace jaxkern::decode
