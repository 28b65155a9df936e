// Instances of the decode step: JAXKERN_HEAD_DIM comes from the table in CMakeLists.txt.
#include "cuda/decode/step.h"

#include "cuda/decode/launch.h"

namespace jaxkern::decode {

template <int kHeadDim>
cudaError_t launch_decode_step_of(const DecodeParams& params, cudaStream_t stream) {
  if (params.batch == 1) {
    constexpr int kStages = kHeadDim == 64 ? 12 : 11;
    return launch_decode_step_sm90<DecodeStep<kHeadDim, 1, kStages>>(params, stream);
  }
  if (params.batch <= 4) {
    return launch_decode_step_sm90<DecodeStep<kHeadDim, 4, 9>>(params, stream);
  }
  return launch_decode_step_sm90<DecodeStep<kHeadDim, kMaxBatch, 7>>(params, stream);
}

template cudaError_t launch_decode_step_of<JAXKERN_HEAD_DIM>(const DecodeParams&, cudaStream_t);

}  // namespace jaxkern::decode
