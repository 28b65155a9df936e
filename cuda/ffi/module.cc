// The Python module jaxkern._C: the handlers by target name, and how they were built.

#include <cuda_runtime_api.h>
#include <nanobind/nanobind.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>

#include <string>
#include <utility>

#include "cuda/attention/params.h"
#include "xla/ffi/api/c_api.h"

namespace nb = nanobind;

// One line per target: its name, its handler.
#define JAXKERN_TARGETS(TARGET)                                \
  TARGET("jaxkern.attention_bwd", AttentionBwd)                \
  TARGET("jaxkern.attention_fwd", AttentionFwd)                \
  TARGET("jaxkern.decode_step", DecodeStep)                    \
  TARGET("jaxkern.quantize", Quantize)                         \
  TARGET("jaxkern.quantize_four_bit", QuantizeFourBit)         \
  TARGET("jaxkern.quantize_rms_norm", QuantizeRmsNorm)         \
  TARGET("jaxkern.quantize_swiglu", QuantizeSwiglu)            \
  TARGET("jaxkern.quantize_swiglu_grad", QuantizeSwigluGrad)   \
  TARGET("jaxkern.quantized_matmul", QuantizedMatmul)          \
  TARGET("jaxkern.quantized_matmul_grad", QuantizedMatmulGrad) \
  TARGET("jaxkern.rms_norm_bwd", RmsNormBwd)                   \
  TARGET("jaxkern.rms_norm_fwd", RmsNormFwd)                   \
  TARGET("jaxkern.row_amax", RowAmax)                          \
  TARGET("jaxkern.scaled_matmul", ScaledMatmul)                \
  TARGET("jaxkern.weight_to_fp8", WeightToFp8)

#define JAXKERN_DECLARE(name, Handler) extern "C" XLA_FFI_Error* Handler(XLA_FFI_CallFrame*);
JAXKERN_TARGETS(JAXKERN_DECLARE)

namespace {

nb::dict registrations() {
  nb::dict targets;
#define JAXKERN_REGISTER(name, Handler) \
  targets[name] = nb::capsule(reinterpret_cast<void*>(Handler));
  JAXKERN_TARGETS(JAXKERN_REGISTER)
  return targets;
}

// 13000 is CUDA 13.0.
std::string cuda_version() {
  return std::to_string(CUDART_VERSION / 1000) + "." + std::to_string(CUDART_VERSION % 1000 / 10);
}

nb::dict build_info() {
  nb::dict info;
  info["cuda"] = cuda_version();
  info["architectures"] = JAXKERN_CUDA_ARCHS;
  info["nvcc"] = JAXKERN_NVCC_ORIGIN;
  info["ffi_api"] = std::to_string(XLA_FFI_API_MAJOR) + "." + std::to_string(XLA_FFI_API_MINOR);
  return info;
}

std::pair<int64_t, int64_t> attention_workspaces(int64_t B, int64_t T, int64_t S, int64_t N,
                                                 int64_t K, int64_t H) {
  const jaxkern::AttentionShape shape = {B, T, S, N, K, H};
  return {jaxkern::attention_fwd_workspace(shape), jaxkern::attention_bwd_workspace(shape)};
}

}  // namespace

NB_MODULE(_C, m) {
  m.def("registrations", &registrations, "The XLA FFI handlers: capsules by target name.");
  m.def("build_info", &build_info, "What the kernels were compiled with and for.");
  m.def("attention_workspaces", &attention_workspaces,
        "Words of 32 bits that the attention kernels want, forward and backward.");
}
