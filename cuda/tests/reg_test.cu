// tile/reg.cuh: where a register tile's elements lie, and the maps and reductions over them; and of
// tile/ptx/matrix.cuh a matrix's transposition in registers.
#include "cuda/tile/reg.cuh"

#include "cuda/host/launch.h"
#include "cuda/tests/test.h"
#include "cuda/tile/ptx/matrix.cuh"

namespace jaxkern {

constexpr int kRows = 64;

// The element of a 64-row tile that register `r` of thread `t` holds, from the PTX ISA's figure of
// wgmma's accumulator fragment.
int fragment_index(int t, int r, int cols) {
  const int warp = t / 32, lane = t % 32;
  const int row = 16 * warp + lane / 4 + 8 * (r / 2 % 2);
  const int col = 8 * (r / 4) + 2 * (lane % 4) + r % 2;
  return row * cols + col;
}

// The number of the register that holds each element: thread * registers + register.
template <int kCols>
__global__ void layout_kernel(int* owner) {
  tile::RegisterTile<float, kRows, kCols> x;
  for (int j = 0; j < kCols / 8; ++j) {
    for (int i = 0; i < 2; ++i) {
      for (int c = 0; c < 2; ++c) {
        const int at = tile::fragment_row(i) * kCols + tile::fragment_col(j) + c;
        owner[at] = threadIdx.x * (kCols / 2) + static_cast<int>(&x.at(j, i, c) - x.data);
      }
    }
  }
}

// Copies between a row-major array and a register tile.
template <int kCols>
__device__ void read(tile::RegisterTile<float, kRows, kCols>& x, const float* from) {
#pragma unroll
  for (int k = 0; k < kCols / 2; ++k) {
    x.data[k] = from[tile::fragment_row(k / 2 % 2) * kCols + tile::fragment_col(k / 4) + k % 2];
  }
}
template <int kCols>
__device__ void write(float* to, const tile::RegisterTile<float, kRows, kCols>& x) {
#pragma unroll
  for (int k = 0; k < kCols / 2; ++k) {
    to[tile::fragment_row(k / 2 % 2) * kCols + tile::fragment_col(k / 4) + k % 2] = x.data[k];
  }
}

template <class T, int kCols>
__global__ void maps_kernel(const float* in, float* zeroed, float* scaled, float* row_scaled,
                            float* rounded, float* sliced) {
  tile::RegisterTile<float, kRows, kCols> x, y;
  read(x, in);

  read(y, in);
  tile::zero(y);
  write(zeroed, y);

  y = x;
  tile::scale(y, 3.0f);
  write(scaled, y);

  tile::RowVector rows;
  for (int i = 0; i < 2; ++i) rows[i] = tile::fragment_row(i) + 1.0f;
  y = x;
  tile::scale_rows(y, rows);
  write(row_scaled, y);

  tile::RegisterTile<T, kRows, kCols> half;
  tile::convert(half, x);
#pragma unroll
  for (int k = 0; k < kCols / 4; ++k) {
    const float2 pair = tile::pair(half, k / 2, k % 2);
    y.at(k / 2, k % 2, 0) = pair.x;
    y.at(k / 2, k % 2, 1) = pair.y;
  }
  write(rounded, y);

  tile::RegisterTile<T, kRows, 16> slice;
  tile::convert(slice, x, kCols - 16);
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    const float2 pair = tile::pair(slice, k / 2, k % 2);
    float* at = sliced + tile::fragment_row(k % 2) * 16 + tile::fragment_col(k / 2);
    at[0] = pair.x;
    at[1] = pair.y;
  }
}

// y += x, y += x * row + 1, and that times the column + 1; y is 2 x.
template <int kCols>
__global__ void sums_kernel(const float* in, float* added, float* by_rows, float* by_both,
                            float* by_cols) {
  __shared__ float cols[kCols], offsets[kCols];
  for (int i = threadIdx.x; i < kCols; i += blockDim.x) {
    cols[i] = i + 1.0f;
    offsets[i] = i - 5.0f;
  }
  __syncthreads();
  tile::RegisterTile<float, kRows, kCols> x, y;
  tile::RowVector rows;
  for (int i = 0; i < 2; ++i) rows[i] = tile::fragment_row(i) + 1.0f;
  read(x, in);
  const auto start = [&] {
    y = x;
    tile::scale(y, 2.0f);
  };
  start();
  tile::add(y, x);
  write(added, y);
  start();
  tile::add_scaled(y, x, rows);
  write(by_rows, y);
  start();
  tile::add_scaled(y, x, rows, cols);
  write(by_both, y);
  start();
  tile::scale_add_row(y, cols, offsets);
  write(by_cols, y);
}

template <int kCols>
__global__ void reductions_kernel(const float* in, float* max, float* sum) {
  tile::RegisterTile<float, kRows, kCols> x;
  read(x, in);
  for (int i = 0; i < 2; ++i) {
    float part_max = -INFINITY, part_sum = 0.0f;
#pragma unroll
    for (int j = 0; j < kCols / 8; ++j) {
      const float2 pair = tile::pair(x, j, i);
      part_max = fmaxf(part_max, fmaxf(pair.x, pair.y));
      part_sum += pair.x + pair.y;
    }
    // All four threads of a row must have the result: each writes a copy of its own.
    max[tile::fragment_row(i) * 4 + threadIdx.x % 4] = tile::row_max(part_max);
    sum[tile::fragment_row(i) * 4 + threadIdx.x % 4] = tile::row_sum(part_sum);
  }
}

__global__ void movmatrix_kernel(const uint32_t* in, uint32_t* out) {
  out[threadIdx.x] = tile::ptx::movmatrix_transposed(in[threadIdx.x]);
}

// Of numbers from 0 to 63, row by row.
void test_movmatrix() {
  std::vector<uint32_t> rows, columns;
  for (uint32_t lane = 0; lane < 32; ++lane) {
    rows.push_back(2 * lane | (2 * lane + 1) << 16);
    const uint32_t row = lane / 4, col = lane % 4 * 2;
    columns.push_back((8 * col + row) | (8 * (col + 1) + row) << 16);
  }
  const test::Array<uint32_t> in(rows), out(32);
  test::check(launch(movmatrix_kernel, 1, 32, 0, nullptr, in.data(), out.data()), "movmatrix");
  test::synchronize("movmatrix");
  const std::vector<uint32_t> got = out.host();
  test::compare("movmatrix_transposed", std::vector<int>(got.begin(), got.end()),
                std::vector<int>(columns.begin(), columns.end()), 4);
}

template <int kCols>
void test_layout() {
  const test::Array<int> owner(kRows * kCols);
  test::check(launch(layout_kernel<kCols>, 1, 128, 0, nullptr, owner.data()), "layout");
  test::synchronize("layout");
  std::vector<int> wanted(kRows * kCols, -1);
  for (int t = 0; t < 128; ++t) {
    for (int r = 0; r < kCols / 2; ++r) {
      wanted[fragment_index(t, r, kCols)] = t * (kCols / 2) + r;
    }
  }
  test::compare("fragment layout, columns " + std::to_string(kCols), owner.host(), wanted, kCols);
}

template <class T, int kCols>
void test_maps(const std::string& name) {
  std::mt19937 random(kCols);
  std::vector<float> x(kRows * kCols), zero(x.size(), 0.0f), scaled, row_scaled, rounded, sliced;
  for (float& value : x) value = std::normal_distribution<float>()(random);
  for (size_t i = 0; i < x.size(); ++i) {
    scaled.push_back(x[i] * 3.0f);
    row_scaled.push_back(x[i] * (i / kCols + 1.0f));
    rounded.push_back(test::round_to<T>(x[i]));
    if (i % kCols + 16 >= kCols) sliced.push_back(rounded.back());
  }
  const test::Array<float> in(x), out0(x.size()), out1(x.size()), out2(x.size()), out3(x.size());
  const test::Array<float> out4(kRows * 16);
  test::check(launch(maps_kernel<T, kCols>, 1, 128, 0, nullptr, in.data(), out0.data(), out1.data(),
                     out2.data(), out3.data(), out4.data()),
              "maps");
  test::synchronize("maps");
  const std::string where = " " + name + ", columns " + std::to_string(kCols);
  test::compare("zero" + where, out0.host(), zero, kCols);
  test::compare("scale" + where, out1.host(), scaled, kCols);
  test::compare("scale_rows" + where, out2.host(), row_scaled, kCols);
  test::compare("convert" + where, out3.host(), rounded, kCols);
  test::compare("convert of the last 16 columns" + where, out4.host(), sliced, 16);
}

template <int kCols>
void test_sums() {
  const auto x = test::integers<float>(kRows * kCols, kCols, 100);
  std::vector<float> added, by_rows, by_both, by_cols;
  for (size_t i = 0; i < x.size(); ++i) {
    const float row = i / kCols + 1.0f, col = i % kCols + 1.0f;
    added.push_back(3.0f * x[i]);
    by_rows.push_back((2.0f + row) * x[i]);
    by_both.push_back((2.0f + row * col) * x[i]);
    by_cols.push_back(2.0f * x[i] * col + (col - 6.0f));
  }
  const test::Array<float> in(x), out0(x.size()), out1(x.size()), out2(x.size()), out3(x.size());
  test::check(launch(sums_kernel<kCols>, 1, 128, 0, nullptr, in.data(), out0.data(), out1.data(),
                     out2.data(), out3.data()),
              "sums");
  test::synchronize("sums");
  const std::string where = ", columns " + std::to_string(kCols);
  test::compare("add" + where, out0.host(), added, kCols);
  test::compare("add_scaled by rows" + where, out1.host(), by_rows, kCols);
  test::compare("add_scaled by rows and columns" + where, out2.host(), by_both, kCols);
  test::compare("scale_add_row" + where, out3.host(), by_cols, kCols);
}

template <int kCols>
void test_reductions() {
  const auto x = test::integers<float>(kRows * kCols, kCols, 1000);
  std::vector<float> max(kRows * 4), sum(kRows * 4);
  for (int row = 0; row < kRows; ++row) {
    float row_max = -INFINITY, row_sum = 0.0f;
    for (int col = 0; col < kCols; ++col) {
      row_max = std::fmax(row_max, x[row * kCols + col]);
      row_sum += x[row * kCols + col];
    }
    for (int copy = 0; copy < 4; ++copy) {
      max[4 * row + copy] = row_max;
      sum[4 * row + copy] = row_sum;
    }
  }
  const test::Array<float> in(x), got_max(max.size()), got_sum(sum.size());
  test::check(launch(reductions_kernel<kCols>, 1, 128, 0, nullptr, in.data(), got_max.data(),
                     got_sum.data()),
              "reductions");
  test::synchronize("reductions");
  test::compare("row_max, columns " + std::to_string(kCols), got_max.host(), max, 4);
  test::compare("row_sum, columns " + std::to_string(kCols), got_sum.host(), sum, 4);
}

template <int kCols>
void test_all() {
  test_layout<kCols>();
  test_maps<tile::bf16, kCols>("bf16");
  test_maps<tile::f16, kCols>("f16");
  test_sums<kCols>();
  test_reductions<kCols>();
}

}  // namespace jaxkern

int main() {
  jaxkern::test_movmatrix();
  jaxkern::test_all<16>();
  jaxkern::test_all<64>();
  jaxkern::test_all<176>();
  jaxkern::test_all<256>();
  return jaxkern::test::finish();
}
