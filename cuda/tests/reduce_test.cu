// tile/reduce.cuh: sums over lanes and over rows of threads, at every width.
#include "cuda/tile/reduce.cuh"

#include "cuda/host/launch.h"
#include "cuda/tests/test.h"

namespace jaxkern {

__global__ void warp_sum_kernel(const float* x, float* y, int width) {
  y[threadIdx.x] = tile::warp_sum(x[threadIdx.x], width);
}

// Two sums in a row, as callers do: of x and of 2 x.
__global__ void row_sum_kernel(const float* x, float* once, float* twice) {
  __shared__ float scratch[2][tile::kMaxWarps];
  const int thread = threadIdx.y * blockDim.x + threadIdx.x;
  once[thread] = tile::row_sum(x[thread], scratch[0]);
  twice[thread] = tile::row_sum(2 * x[thread], scratch[1]);
}

std::vector<float> sums(const std::vector<float>& x, int width, float factor) {
  std::vector<float> result(x.size());
  for (size_t i = 0; i < x.size(); ++i) {
    float sum = 0.0f;
    for (int j = 0; j < width; ++j) sum += factor * x[i / width * width + j];
    result[i] = sum;
  }
  return result;
}

void test_warp_sum(int width) {
  const auto x = test::integers<float>(128, width, 1000);
  const test::Array<float> in(x), out(x.size());
  test::check(launch(warp_sum_kernel, 1, 128, 0, nullptr, in.data(), out.data(), width),
              "warp_sum");
  test::synchronize("warp_sum");
  test::compare("warp_sum, width " + std::to_string(width), out.host(), sums(x, width, 1.0f), 32);
}

void test_row_sum(int width, int rows) {
  const auto x = test::integers<float>(width * rows, width, 1000);
  const test::Array<float> in(x), once(x.size()), twice(x.size());
  test::check(launch(row_sum_kernel, 1, dim3(width, rows), 0, nullptr, in.data(), once.data(),
                     twice.data()),
              "row_sum");
  test::synchronize("row_sum");
  const std::string where = ", " + std::to_string(rows) + " rows of " + std::to_string(width);
  test::compare("row_sum" + where, once.host(), sums(x, width, 1.0f), width);
  test::compare("second row_sum" + where, twice.host(), sums(x, width, 2.0f), width);
}

}  // namespace jaxkern

int main() {
  for (int width = 1; width <= 32; width *= 2) jaxkern::test_warp_sum(width);
  for (int width = 1; width <= 1024; width *= 2) {
    for (int threads : {32, 128, 1024}) {
      if (width <= threads) jaxkern::test_row_sum(width, threads / width);
    }
  }
  return jaxkern::test::finish();
}
