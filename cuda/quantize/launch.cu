#include "cuda/quantize/launch.h"

#include "cuda/quantize/instances.h"

namespace jaxkern {

cudaError_t launch_quantize(const QuantizeParams& p, cudaStream_t stream) {
  switch (p.source) {
    case QuantizeSource::kMatrix:
      return quantize::launch_source<quantize::Matrix>(p, stream);
    case QuantizeSource::kSwiglu:
      return quantize::launch_source<quantize::Swiglu>(p, stream);
    case QuantizeSource::kSwigluGrad:
      return quantize::launch_source<quantize::SwigluGrad>(p, stream);
    case QuantizeSource::kRmsNorm:
      return quantize::launch_source<quantize::RmsNorm>(p, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace jaxkern
