// Instances of the product of scaled matrices: JAXKERN_LHS and JAXKERN_RHS come from the table in
// CMakeLists.txt.
#include "cuda/matmul/scaled_matmul.h"

#include "cuda/matmul/instances.h"

namespace jaxkern {
namespace {

template <class Lhs, class Rhs, class Out>
cudaError_t launch_with_scales(const ScaledMatmulParams& p, cudaStream_t stream) {
  constexpr auto kNone = BlockScales::kNone;
  if (p.fast_accumulation) return launch_fast_sm90<Lhs, Rhs, Out>(p, stream);
  if (p.lhs_scaling != Scaling::kBlock1x128) {
    return launch_promoted_sm90<Lhs, Rhs, Out, kNone>(p, stream);
  }
  return p.rhs_scaling == Scaling::kBlock1x128
             ? launch_promoted_sm90<Lhs, Rhs, Out, BlockScales::k1x128By1x128>(p, stream)
             : launch_promoted_sm90<Lhs, Rhs, Out, BlockScales::k1x128By128x128>(p, stream);
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
