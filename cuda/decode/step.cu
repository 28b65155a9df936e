// Instances of the decode step: JAXKERN_WEIGHT and JAXKERN_HEAD_DIM come from the table in
// CMakeLists.txt.
#include "cuda/decode/step.h"

#include "cuda/decode/launch.h"

namespace jaxkern::decode {

template <class Step>
bool has_room(const DecodeParams& params) {
  return Step::shared_bytes(params) <= tile::kMaxSharedBytes;
}

// For up to kBatch sequences.
template <class Weight, int kHeadDim, int kBatch, int kStages, int... kOthers>
cudaError_t launch(const DecodeParams& params, cudaStream_t stream) {
  using Step = DecodeStep<Weight, kHeadDim, kBatch, kStages>;
  if constexpr (sizeof...(kOthers) > 0) {
    // Vectors of one sequence may be too wide for an instance that wants them whole.
    if (params.batch > kBatch || !has_room<Step>(params)) {
      return launch<Weight, kHeadDim, kOthers...>(params, stream);
    }
  } else {
    static_assert(kBatch == kMaxBatch);
  }
  static_assert(kBatch == 1 || Step::bytes_with(kPartColumns) <= tile::kMaxSharedBytes);
  return launch_decode_step_sm90<Step>(params, stream);
}

// Sequences, and as many stages as there is room for beside their vectors.
template <class Weight, int kHeadDim>
cudaError_t launch_decode_step_of(const DecodeParams& params, cudaStream_t stream) {
  // Less where heads or weights make chunks larger.
  constexpr int kLess = (kHeadDim > 64) + (Weights<Weight>::kScaleBytes > 0);
  return launch<Weight, kHeadDim, 1, 12 - kLess, 4, 11 - kLess, 8, 10 - kLess, 16, 7 - kLess>(
      params, stream);
}

using tile::bf16, tile::e4m3;
template cudaError_t launch_decode_step_of<JAXKERN_WEIGHT, JAXKERN_HEAD_DIM>(const DecodeParams&,
                                                                             cudaStream_t);

}  // namespace jaxkern::decode
