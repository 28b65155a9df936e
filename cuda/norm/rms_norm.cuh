// RMSNorm (Zhang and Sennrich, 2019): y = x * rstd * scale, rstd = 1 / sqrt(mean(x^2) + epsilon).
//
// Blocks are (threads of a row, rows): the threads that share threadIdx.y own one row of x. Each
// keeps kSlots vectors of it in registers from the first pass to the second; the rest of a wider
// row is read twice. A vector is 16 bytes, or one element where the rows are not aligned to 16
// bytes.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <type_traits>

#include "cuda/norm/params.h"
#include "cuda/tile/reduce.cuh"

namespace jaxkern::norm {

inline constexpr int kSlots = 4;
inline constexpr int kBwdThreads = 512;  // per block: leaves 128 registers for two rows in flight

// kVec elements as float. NOTE: kept in 32-bit words; as separate 16-bit elements, nvcc gives each
// a register of its own and the backward spills.
template <typename T, int kVec>
struct alignas(kVec == 1 ? alignof(T) : 16) Vec {
  static constexpr int kPerWord = kVec == 1 ? 1 : 4 / sizeof(T);
  struct Elements {
    T values[kPerWord];
  };
  using Word = std::conditional_t<kVec == 1, Elements, uint32_t>;

  Word words[kVec / kPerWord];

  __device__ float operator[](int e) const {
    return static_cast<float>(
        __builtin_bit_cast(Elements, words[e / kPerWord]).values[e % kPerWord]);
  }
  __device__ void set(int e, float value) {
    auto elements = __builtin_bit_cast(Elements, words[e / kPerWord]);
    elements.values[e % kPerWord] = static_cast<T>(value);
    words[e / kPerWord] = __builtin_bit_cast(Word, elements);
  }
};

template <typename T, int kVec>
__device__ Vec<T, kVec> load(const T* row, int64_t v) {
  return reinterpret_cast<const Vec<T, kVec>*>(row)[v];
}

template <typename T, int kVec>
__device__ void store(T* row, int64_t v, const Vec<T, kVec>& vec) {
  reinterpret_cast<Vec<T, kVec>*>(row)[v] = vec;
}

// The index in its row of the vector in slot s; slot kSlots is the first that is not kept.
__device__ inline int slot_index(int s) { return s * blockDim.x + threadIdx.x; }

template <typename T, int kVec>
__device__ void load_slots(Vec<T, kVec> (&slots)[kSlots], const T* row, int64_t vecs) {
#pragma unroll
  for (int s = 0; s < kSlots; ++s) {
    const int64_t v = slot_index(s);
    slots[s] = v < vecs ? load<T, kVec>(row, v) : Vec<T, kVec>{};
  }
}

template <typename T, int kVec>
__device__ float sum_of_squares(const Vec<T, kVec>& x) {
  float sum = 0.0f;
#pragma unroll
  for (int e = 0; e < kVec; ++e) sum += x[e] * x[e];
  return sum;
}

template <typename T, typename S, int kVec>
__global__ void rms_norm_fwd_kernel(const RmsNormFwdParams p) {
  __shared__ float scratch[tile::kMaxWarps];
  const int64_t row = int64_t{blockIdx.x} * blockDim.y + threadIdx.y;
  const int64_t vecs = row < p.rows ? p.width / kVec : 0;  // a row past the end is empty
  const T* x_row = static_cast<const T*>(p.x) + row * p.width;
  T* y_row = static_cast<T*>(p.y) + row * p.width;

  Vec<T, kVec> x[kSlots];
  load_slots(x, x_row, vecs);
  float sum = 0.0f;
#pragma unroll
  for (int s = 0; s < kSlots; ++s) sum += sum_of_squares(x[s]);
  for (int64_t v = slot_index(kSlots); v < vecs; v += blockDim.x) {
    sum += sum_of_squares(load<T, kVec>(x_row, v));
  }
  const float mean = tile::row_sum(sum, scratch) / static_cast<float>(p.width);
  const float rstd = rsqrtf(mean + p.epsilon);
  if (threadIdx.x == 0 && row < p.rows) p.rstd[row] = rstd;

  auto write = [&](int64_t v, const Vec<T, kVec>& x_vec) {
    const auto scale = load<S, kVec>(static_cast<const S*>(p.scale), v);
    Vec<T, kVec> y = {};
#pragma unroll
    for (int e = 0; e < kVec; ++e) y.set(e, x_vec[e] * rstd * scale[e]);
    store(y_row, v, y);
  };
#pragma unroll
  for (int s = 0; s < kSlots; ++s) {
    if (slot_index(s) < vecs) write(slot_index(s), x[s]);
  }
  for (int64_t v = slot_index(kSlots); v < vecs; v += blockDim.x) {
    write(v, load<T, kVec>(x_row, v));
  }
}

// With xhat = x * rstd and g = dy * scale:
//   dx = rstd * (g - xhat * mean(g * xhat)),   dscale = sum over the rows of dy * xhat.
// A block strides over the rows, the next ones already loading, and leaves its share of dscale in
// row blockIdx.x of the workspace. Rows wider than the slots need blockDim.y == 1.
template <typename T, typename S, int kVec>
__global__ void __launch_bounds__(kBwdThreads) rms_norm_bwd_kernel(const RmsNormBwdParams p) {
  __shared__ float scratch[2][tile::kMaxWarps];
  __shared__ float shared_dscale[kBwdThreads * kVec];
  const int64_t first_row = int64_t{blockIdx.x} * blockDim.y;
  const int64_t row_step = int64_t{gridDim.x} * blockDim.y;
  float* partial = p.dscale_partial + blockIdx.x * p.width;

  Vec<T, kVec> x[kSlots], dy[kSlots], next_x[kSlots], next_dy[kSlots];
  float dscale[kSlots][kVec] = {};
  auto vecs_of = [&](int64_t row) { return row < p.rows ? p.width / kVec : 0; };
  auto load_next = [&](int64_t row) {
    load_slots(next_x, static_cast<const T*>(p.x) + row * p.width, vecs_of(row));
    load_slots(next_dy, static_cast<const T*>(p.dy) + row * p.width, vecs_of(row));
  };

  load_next(first_row + threadIdx.y);
  int parity = 0;
  for (int64_t block_row = first_row; block_row < p.rows; block_row += row_step, parity ^= 1) {
    const int64_t row = block_row + threadIdx.y;
    const int64_t vecs = vecs_of(row);
    const T* x_row = static_cast<const T*>(p.x) + row * p.width;
    const T* dy_row = static_cast<const T*>(p.dy) + row * p.width;
    T* dx_row = static_cast<T*>(p.dx) + row * p.width;
    const float rstd = row < p.rows ? p.rstd[row] : 0.0f;
#pragma unroll
    for (int s = 0; s < kSlots; ++s) x[s] = next_x[s], dy[s] = next_dy[s];
    load_next(row + row_step);

    auto dot = [&](int64_t v, const Vec<T, kVec>& x_vec, const Vec<T, kVec>& dy_vec) {
      const auto scale = load<S, kVec>(static_cast<const S*>(p.scale), v);
      float sum = 0.0f;
#pragma unroll
      for (int e = 0; e < kVec; ++e) sum += dy_vec[e] * scale[e] * x_vec[e];
      return sum;
    };
    float sum = 0.0f;  // of g * x
#pragma unroll
    for (int s = 0; s < kSlots; ++s) {
      if (slot_index(s) < vecs) sum += dot(slot_index(s), x[s], dy[s]);
    }
    for (int64_t v = slot_index(kSlots); v < vecs; v += blockDim.x) {
      sum += dot(v, load<T, kVec>(x_row, v), load<T, kVec>(dy_row, v));
    }
    const float mean = tile::row_sum(sum, scratch[parity]) * rstd / static_cast<float>(p.width);

    auto finish = [&](int64_t v, const Vec<T, kVec>& x_vec, const Vec<T, kVec>& dy_vec,
                      float (&dscale_vec)[kVec]) {
      const auto scale = load<S, kVec>(static_cast<const S*>(p.scale), v);
      Vec<T, kVec> dx = {};
#pragma unroll
      for (int e = 0; e < kVec; ++e) {
        const float xhat = x_vec[e] * rstd;
        dx.set(e, rstd * (dy_vec[e] * scale[e] - xhat * mean));
        dscale_vec[e] += dy_vec[e] * xhat;
      }
      store(dx_row, v, dx);
    };
#pragma unroll
    for (int s = 0; s < kSlots; ++s) {
      if (slot_index(s) < vecs) finish(slot_index(s), x[s], dy[s], dscale[s]);
    }
    for (int64_t v = slot_index(kSlots); v < vecs; v += blockDim.x) {
      float sums[kVec];
#pragma unroll
      for (int e = 0; e < kVec; ++e) {
        sums[e] = block_row == first_row ? 0.0f : partial[v * kVec + e];
      }
      finish(v, load<T, kVec>(x_row, v), load<T, kVec>(dy_row, v), sums);
#pragma unroll
      for (int e = 0; e < kVec; ++e) partial[v * kVec + e] = sums[e];
    }
  }

  // Sum the slots over threadIdx.y, halving the rows each time.
  float* mine = shared_dscale + (threadIdx.y * blockDim.x + threadIdx.x) * kVec;
#pragma unroll
  for (int s = 0; s < kSlots; ++s) {
#pragma unroll
    for (int e = 0; e < kVec; ++e) mine[e] = dscale[s][e];
    for (int rows = blockDim.y / 2; rows > 0; rows /= 2) {
      __syncthreads();
      if (threadIdx.y >= rows) continue;
#pragma unroll
      for (int e = 0; e < kVec; ++e) mine[e] += mine[rows * blockDim.x * kVec + e];
    }
    const int64_t v = slot_index(s);
    if (threadIdx.y == 0 && v < p.width / kVec) {
#pragma unroll
      for (int e = 0; e < kVec; ++e) partial[v * kVec + e] = mine[e];
    }
    __syncthreads();
  }
}

// dscale = the sum of the first `partials` rows of the workspace. Block: (columns, row stride).
template <int kColumns, int kRowStride>
__global__ void rms_norm_bwd_dscale_kernel(const RmsNormBwdParams p, int partials) {
  __shared__ float sums[kRowStride][kColumns];
  const int64_t column = int64_t{blockIdx.x} * kColumns + threadIdx.x;
  float sum = 0.0f;
  if (column < p.width) {
    for (int i = threadIdx.y; i < partials; i += kRowStride) {
      sum += p.dscale_partial[i * p.width + column];
    }
  }
  sums[threadIdx.y][threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.y != 0 || column >= p.width) return;
  for (int i = 1; i < kRowStride; ++i) sum += sums[i][threadIdx.x];
  p.dscale[column] = sum;
}

}  // namespace jaxkern::norm
