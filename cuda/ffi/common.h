// What every handler needs: element types, checks with names in their messages, error mapping.
//
// A handler decodes its operands, checks them with Checks, fills the launcher's params, launches,
// and returns launch_error(). It never allocates, synchronises or throws.
#pragma once

#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstdint>
#include <initializer_list>
#include <string>
#include <string_view>
#include <utility>

#include "cuda/dtype.h"
#include "xla/ffi/api/ffi.h"

namespace jaxkern {

namespace ffi = xla::ffi;

using Stream = ffi::PlatformStream<cudaStream_t>;

// Defines the handler `Name` of a target. Handlers only launch, so they may go into a CUDA graph.
#define JAXKERN_DEFINE_HANDLER(Name, implementation, binding) \
  XLA_FFI_DEFINE_HANDLER_SYMBOL(Name, implementation, binding, {ffi::Traits::kCmdBufferCompatible})

inline std::string dtype_name(ffi::DataType dtype) {
  switch (dtype) {
    case ffi::DataType::F32:
      return "float32";
    case ffi::DataType::BF16:
      return "bfloat16";
    case ffi::DataType::F16:
      return "float16";
    case ffi::DataType::F8E4M3FN:
      return "float8_e4m3fn";
    case ffi::DataType::F8E5M2:
      return "float8_e5m2";
    case ffi::DataType::U32:
      return "uint32";
    case ffi::DataType::F8E8M0FNU:
      return "float8_e8m0fnu";
    case ffi::DataType::F4E2M1FN:
      return "float4_e2m1fn";
    case ffi::DataType::S4:
      return "int4";
    default:
      return "another type";
  }
}

// The launcher's name of a type that a check has let through.
inline DType to_dtype(ffi::DataType dtype) {
  switch (dtype) {
    case ffi::DataType::BF16:
      return DType::kBFloat16;
    case ffi::DataType::F16:
      return DType::kFloat16;
    case ffi::DataType::F8E4M3FN:
      return DType::kFloat8E4M3;
    case ffi::DataType::F8E5M2:
      return DType::kFloat8E5M2;
    default:
      return DType::kFloat32;
  }
}

template <typename Dims>
std::string shape_text(const Dims& dims) {
  std::string text;
  for (int64_t dim : dims) text += (text.empty() ? "[" : ", ") + std::to_string(dim);
  return text.empty() ? "[]" : text + "]";
}

// The checks of one call; keeps the first failure. Python has checked already and speaks to users,
// so a failure here is a caller's who went around it.
class Checks {
 public:
  explicit Checks(std::string_view op) : op_(op) {}

  Checks& rank(std::string_view name, const ffi::AnyBuffer& buffer, size_t wanted) {
    const auto dims = buffer.dimensions();
    if (dims.size() == wanted) return *this;
    return fail(name, "has shape " + shape_text(dims), std::to_string(wanted) + " dimensions");
  }

  Checks& shape(std::string_view name, const ffi::AnyBuffer& buffer,
                std::initializer_list<int64_t> wanted) {
    const auto dims = buffer.dimensions();
    if (std::equal(dims.begin(), dims.end(), wanted.begin(), wanted.end())) return *this;
    return fail(name, "has shape " + shape_text(dims), shape_text(wanted));
  }

  Checks& dtype(std::string_view name, const ffi::AnyBuffer& buffer,
                std::initializer_list<ffi::DataType> wanted) {
    const ffi::DataType got = buffer.element_type();
    if (std::find(wanted.begin(), wanted.end(), got) != wanted.end()) return *this;
    std::string names;
    for (ffi::DataType type : wanted) names += (names.empty() ? "" : " or ") + dtype_name(type);
    return fail(name, "is " + dtype_name(got), names);
  }

  // For everything else: checks.that(n % k == 0, "query", "has 6 heads", "a multiple of key's 4").
  Checks& that(bool ok, std::string_view name, const std::string& got, const std::string& wanted) {
    return ok ? *this : fail(name, got, wanted);
  }

  bool failed() const { return error_.failure(); }
  ffi::Error error() const { return error_; }

 private:
  Checks& fail(std::string_view name, const std::string& got, const std::string& wanted) {
    if (error_.success()) {
      error_ = ffi::Error::InvalidArgument(op_ + ": " + std::string(name) + " " + got +
                                           ", wanted " + wanted);
    }
    return *this;
  }

  std::string op_;
  ffi::Error error_;
};

inline ffi::Error launch_error(std::string_view op, cudaError_t error) {
  if (error == cudaSuccess) return ffi::Error::Success();
  std::string message = std::string(op) + ": " + cudaGetErrorString(error);
  if (error == cudaErrorNoKernelImageForDevice) {
    message += " (jaxkern's kernels need a GPU of compute capability 9.0)";
    return ffi::Error(ffi::ErrorCode::kUnimplemented, std::move(message));
  }
  return ffi::Error::Internal(std::move(message));
}

}  // namespace jaxkern
