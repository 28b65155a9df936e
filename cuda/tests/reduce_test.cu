// tile/reduce.cuh: sums and maxima over lanes and over rows of threads, at every width.
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

__global__ void max_kernel(const uint32_t* x, uint32_t* of_lanes, uint32_t* of_row) {
  __shared__ uint32_t scratch[tile::kMaxWarps];
  const int thread = threadIdx.y * blockDim.x + threadIdx.x;
  of_lanes[thread] = tile::warp_max(x[thread], blockDim.x < 32 ? blockDim.x : 32);
  of_row[thread] = tile::row_max(x[thread], scratch);
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

std::vector<int> maxima(const std::vector<uint32_t>& x, int width) {
  std::vector<int> result(x.size());
  for (size_t i = 0; i < x.size(); ++i) {
    const auto first = x.begin() + i / width * width;
    result[i] = static_cast<int>(*std::max_element(first, first + width));
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

void test_max(int width, int rows) {
  std::vector<uint32_t> x;
  for (const int i : test::integers<int>(width * rows, width, 1000)) x.push_back(i + 1000);
  const test::Array<uint32_t> in(x), of_lanes(x.size()), of_row(x.size());
  test::check(launch(max_kernel, 1, dim3(width, rows), 0, nullptr, in.data(), of_lanes.data(),
                     of_row.data()),
              "max");
  test::synchronize("max");
  const std::string where = ", " + std::to_string(rows) + " rows of " + std::to_string(width);
  auto compare = [&](const char* what, const test::Array<uint32_t>& got, int lanes) {
    const std::vector<uint32_t> host = got.host();
    test::compare(what + where, std::vector<int>(host.begin(), host.end()), maxima(x, lanes),
                  width);
  };
  compare("warp_max", of_lanes, std::min(width, 32));
  compare("row_max", of_row, width);
}

}  // namespace jaxkern

int main() {
  for (int width = 1; width <= 32; width *= 2) jaxkern::test_warp_sum(width);
  for (int width = 1; width <= 1024; width *= 2) {
    for (int threads : {32, 128, 1024}) {
      if (width > threads) continue;
      jaxkern::test_row_sum(width, threads / width);
      jaxkern::test_max(width, threads / width);
    }
  }
  return jaxkern::test::finish();
}
