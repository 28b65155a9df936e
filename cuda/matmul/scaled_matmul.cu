// Instances of the product of scaled matrices: JAXKERN_LHS and JAXKERN_RHS come from the table in
// CMakeLists.txt.
#include "cuda/matmul/scaled_matmul.h"

#include "cuda/matmul/instances.h"

namespace jaxkern {
namespace {

template <class Lhs, class Rhs, class Out>
cudaError_t launch_with_scales(const ScaledMatmulParams& p, cudaStream_t stream) {
  const auto run = [&]<BlockScales kScales, bool kFastAccumulation>() {
    constexpr ScaledMatmulConfig kConfig = scaled_matmul_config(kScales, kFastAccumulation);
    using Matmul = ScaledMatmul<Lhs, Rhs, Out, kScales, kFastAccumulation, kConfig>;
    return launch_scaled_matmul_sm90<Matmul>(p, stream);
  };
  if (p.lhs_scaling != Scaling::kBlock1x128) {
    return p.fast_accumulation ? run.template operator()<BlockScales::kNone, true>()
                               : run.template operator()<BlockScales::kNone, false>();
  }
  return p.rhs_scaling == Scaling::kBlock1x128
             ? run.template operator()<BlockScales::k1x128By1x128, false>()
             : run.template operator()<BlockScales::k1x128By128x128, false>();
}

}  // namespace

template <class Lhs, class Rhs>
cudaError_t launch_scaled_matmul_of(const ScaledMatmulParams& params, cudaStream_t stream) {
  return select_out(params.out_dtype,
                    [&]<class Out>() { return launch_with_scales<Lhs, Rhs, Out>(params, stream); });
}

template cudaError_t launch_scaled_matmul_of<tile::JAXKERN_LHS, tile::JAXKERN_RHS>(
    const ScaledMatmulParams&, cudaStream_t);

}  // namespace jaxkern
