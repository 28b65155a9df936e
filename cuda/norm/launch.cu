#include "cuda/norm/launch.h"

#include <algorithm>
#include <bit>

#include "cuda/host/device.h"
#include "cuda/host/launch.h"
#include "cuda/norm/rms_norm.cuh"

namespace jaxkern {
namespace norm {
namespace {

constexpr int kFwdThreads = 128;  // per block, unless one row takes more

// Threads per row: as few as hold the row in their slots, or else the most there may be.
int threads_per_row(int64_t vecs, int most) {
  const int64_t wanted = (vecs + kSlots - 1) / kSlots;
  return wanted >= most ? most : static_cast<int>(std::bit_ceil(static_cast<uint64_t>(wanted)));
}

// The elements of T in 16 bytes, or 1 where a row or an operand is not aligned to them.
template <typename T>
int vector_elements(int64_t width, std::initializer_list<const void*> operands) {
  constexpr int kVec = 16 / sizeof(T);
  auto aligned = [](const void* data) { return reinterpret_cast<uintptr_t>(data) % 16 == 0; };
  return width % kVec == 0 && std::all_of(operands.begin(), operands.end(), aligned) ? kVec : 1;
}

template <typename T, typename S, int kVec>
cudaError_t launch_fwd(const RmsNormFwdParams& p, cudaStream_t stream) {
  const int threads = threads_per_row(p.width / kVec, 1024);
  const int rows = std::max(1, kFwdThreads / threads);
  return launch(rms_norm_fwd_kernel<T, S, kVec>, (p.rows + rows - 1) / rows, dim3(threads, rows), 0,
                stream, p);
}

template <typename T, typename S, int kVec>
cudaError_t launch_bwd(const RmsNormBwdParams& p, cudaStream_t stream) {
  int multiprocessors;
  if (cudaError_t error = multiprocessor_count(&multiprocessors)) return error;
  const int threads = threads_per_row(p.width / kVec, kBwdThreads);
  const int rows = kBwdThreads / threads;
  const int most_blocks = std::min(multiprocessors, kRmsNormMaxPartials);
  const int blocks = static_cast<int>(std::min<int64_t>(most_blocks, (p.rows + rows - 1) / rows));
  if (cudaError_t error =
          launch(rms_norm_bwd_kernel<T, S, kVec>, blocks, dim3(threads, rows), 0, stream, p)) {
    return error;
  }
  constexpr int kColumns = 32, kRowStride = 8;
  return launch(rms_norm_bwd_dscale_kernel<kColumns, kRowStride>,
                (p.width + kColumns - 1) / kColumns, dim3(kColumns, kRowStride), 0, stream, p,
                blocks);
}

// Calls launch.operator()<T, S>() with the element types of x and scale.
template <typename Launch>
cudaError_t dispatch(DType dtype, DType scale_dtype, Launch launch) {
  const bool f32_scale = scale_dtype == DType::kFloat32;
  switch (dtype) {
    case DType::kFloat32:
      return launch.template operator()<float, float>();
    case DType::kBFloat16:
      return f32_scale ? launch.template operator()<__nv_bfloat16, float>()
                       : launch.template operator()<__nv_bfloat16, __nv_bfloat16>();
    case DType::kFloat16:
      return f32_scale ? launch.template operator()<__half, float>()
                       : launch.template operator()<__half, __half>();
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace
}  // namespace norm

cudaError_t launch_rms_norm_fwd(const RmsNormFwdParams& p, cudaStream_t stream) {
  return norm::dispatch(p.dtype, p.scale_dtype, [&]<typename T, typename S>() {
    return norm::vector_elements<T>(p.width, {p.x, p.scale, p.y}) == 1
               ? norm::launch_fwd<T, S, 1>(p, stream)
               : norm::launch_fwd<T, S, 16 / sizeof(T)>(p, stream);
  });
}

cudaError_t launch_rms_norm_bwd(const RmsNormBwdParams& p, cudaStream_t stream) {
  return norm::dispatch(p.dtype, p.scale_dtype, [&]<typename T, typename S>() {
    return norm::vector_elements<T>(p.width, {p.x, p.scale, p.dy, p.dx}) == 1
               ? norm::launch_bwd<T, S, 1>(p, stream)
               : norm::launch_bwd<T, S, 16 / sizeof(T)>(p, stream);
  });
}

}  // namespace jaxkern
