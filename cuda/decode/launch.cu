#include "cuda/decode/launch.h"

#include "cuda/decode/step.h"

namespace jaxkern::decode {

cudaError_t launch_decode_step(const DecodeParams& params, cudaStream_t stream) {
  const auto launch = [&]<class Weight>(Weight) {
    return params.head_dim == 64 ? launch_decode_step_of<Weight, 64>(params, stream)
                                 : launch_decode_step_of<Weight, 128>(params, stream);
  };
  switch (params.format) {
    case WeightFormat::kBf16:
      return launch(tile::bf16{});
    case WeightFormat::kFp8:
      return launch(tile::e4m3{});
    case WeightFormat::kNvfp4:
    case WeightFormat::kMxfp4:
      return launch(e2m1{});
    case WeightFormat::kInt4:
      return launch(s4{});
  }
  return cudaErrorInvalidValue;
}

int64_t decode_workspace_bytes(const DecodeParams& params) {
  int64_t bytes;
  plan_step(params, &bytes);
  return bytes;
}

}  // namespace jaxkern::decode
