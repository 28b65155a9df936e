#include "cuda/decode/launch.h"

#include "cuda/decode/step.h"

namespace jaxkern::decode {

cudaError_t launch_decode_step(const DecodeParams& params, cudaStream_t stream) {
  const auto launch = [&]<class Weight>(Weight) {
    return params.head_dim == 64 ? launch_decode_step_of<Weight, 64>(params, stream)
                                 : launch_decode_step_of<Weight, 128>(params, stream);
  };
  return params.fp8 ? launch(tile::e4m3{}) : launch(tile::bf16{});
}

int64_t decode_workspace_bytes(const DecodeParams& params) {
  int64_t bytes;
  plan_step(params, &bytes);
  return bytes;
}

}  // namespace jaxkern::decode
