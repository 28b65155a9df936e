// Instances of one source: JAXKERN_SOURCE comes from the table in CMakeLists.txt.
#include "cuda/quantize/quantize.h"

namespace jaxkern::quantize {

template cudaError_t launch_source<JAXKERN_SOURCE>(const QuantizeParams&, cudaStream_t);

}  // namespace jaxkern::quantize
