// Instances of the product of scaled matrices for few rows of lhs: JAXKERN_TOKENS comes from the
// table in CMakeLists.txt.
#include "cuda/matmul/few_rows.h"

#include "cuda/matmul/instances.h"

namespace jaxkern {

template <int kTokens>
cudaError_t launch_scaled_matmul_few_rows(const ScaledMatmulParams& p, cudaStream_t stream) {
  return select_out(p.out_dtype, [&]<class Out>() {
    const auto run = [&]<BlockScales kScales, bool kFastAccumulation>() {
      return launch_few_rows_sm90<Out, kScales, kFastAccumulation, kTokens>(p, stream);
    };
    if (p.lhs_scaling == Scaling::kBlock1x128) {
      return run.template operator()<BlockScales::k1x128By128x128, false>();
    }
    return p.fast_accumulation ? run.template operator()<BlockScales::kNone, true>()
                               : run.template operator()<BlockScales::kNone, false>();
  });
}

template cudaError_t launch_scaled_matmul_few_rows<JAXKERN_TOKENS>(const ScaledMatmulParams&,
                                                                   cudaStream_t);

}  // namespace jaxkern
