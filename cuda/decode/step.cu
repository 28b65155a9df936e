// Instances of the decode step: JAXKERN_WEIGHT and JAXKERN_HEAD_DIM come from the table in
// CMakeLists.txt.
#include "cuda/decode/step.h"

#include "cuda/decode/launch.h"

namespace jaxkern::decode {

template <class Weight, int kHeadDim>
cudaError_t launch_decode_step_of(const DecodeParams& params, cudaStream_t stream) {
  if (params.batch == 1) {
    constexpr int kStages = kHeadDim == 64 ? 12 : 10;
    return launch_decode_step_sm90<DecodeStep<Weight, kHeadDim, 1, kStages>>(params, stream);
  }
  if (params.batch <= 4) {
    constexpr int kStages = kHeadDim == 64 ? 8 : 7;
    return launch_decode_step_sm90<DecodeStep<Weight, kHeadDim, 4, kStages>>(params, stream);
  }
  constexpr int kStages = kHeadDim == 64 ? 7 : 6;
  return launch_decode_step_sm90<DecodeStep<Weight, kHeadDim, kMaxBatch, kStages>>(params, stream);
}

template cudaError_t launch_decode_step_of<tile::JAXKERN_WEIGHT, JAXKERN_HEAD_DIM>(
    const DecodeParams&, cudaStream_t);

}  // namespace jaxkern::decode
