// Instances of the decode step: JAXKERN_WEIGHT and JAXKERN_HEAD_DIM come from the table in
// CMakeLists.txt.
#include "cuda/decode/step.h"

#include "cuda/decode/launch.h"

namespace jaxkern::decode {

// With as many stages as there is room for beside the model's vectors.
template <class Weight, int kHeadDim, int kBatch, int kStages, int... kFewer>
cudaError_t launch(const DecodeParams& params, cudaStream_t stream) {
  using Step = DecodeStep<Weight, kHeadDim, kBatch, kStages>;
  if constexpr (sizeof...(kFewer) > 0) {
    if (Step::shared_bytes(params) > tile::kMaxSharedBytes) {
      return launch<Weight, kHeadDim, kBatch, kFewer...>(params, stream);
    }
  } else {
    constexpr size_t kVectors = kBatch * max_values(kBatch) * sizeof(tile::bf16);
    constexpr size_t kScratch = std::max(kVectors, sizeof(typename Step::Attention::Storage));
    static_assert(sizeof(typename Step::Storage) + kScratch <= tile::kMaxSharedBytes);
  }
  return launch_decode_step_sm90<Step>(params, stream);
}

template <class Weight, int kHeadDim>
cudaError_t launch_decode_step_of(const DecodeParams& params, cudaStream_t stream) {
  constexpr bool kSmall = kHeadDim == 64;
  if (params.batch == 1) return launch<Weight, kHeadDim, 1, kSmall ? 12 : 11>(params, stream);
  if (params.batch <= 4) {
    return launch<Weight, kHeadDim, 4, kSmall ? 11 : 10, kSmall ? 8 : 7>(params, stream);
  }
  return launch<Weight, kHeadDim, kMaxBatch, kSmall ? 9 : 8, kSmall ? 7 : 6>(params, stream);
}

template cudaError_t launch_decode_step_of<tile::JAXKERN_WEIGHT, JAXKERN_HEAD_DIM>(
    const DecodeParams&, cudaStream_t);

}  // namespace jaxkern::decode
