// tile/smem.cuh: the swizzled layout of shared tiles, and copies between them and registers; and
// tile/ptx/async.cuh, copies to shared memory by single threads.
#include "cuda/tile/smem.cuh"

#include "cuda/host/launch.h"
#include "cuda/tests/test.h"
#include "cuda/tile/ptx/async.cuh"

namespace jaxkern {

constexpr int kRows = 128;

// The place of an element in a tile's memory, counted in elements: the 128-byte swizzle of the PTX
// ISA, over panels of 128 bytes.
int swizzled(int row, int col, int rows = kRows, int element_bytes = 2) {
  const int panel_cols = 128 / element_bytes, chunk_cols = 16 / element_bytes;
  const int panel = col / panel_cols, chunk = col % panel_cols / chunk_cols;
  return (panel * rows + row) * panel_cols + (chunk ^ (row % 8)) * chunk_cols + col % chunk_cols;
}

// x(r, c) = in[r, c]
template <int kCols>
__device__ void read(tile::RegisterTile<float, 64, kCols>& x, const float* in) {
  for (int k = 0; k < kCols / 2; ++k) {
    x.data[k] = in[tile::fragment_row(k / 2 % 2) * kCols + tile::fragment_col(k / 4) + k % 2];
  }
}
template <class T, int kCols>
__device__ void read(tile::RegisterTile<T, 64, kCols>& x, const T* in) {
  for (int k = 0; k < kCols / 4; ++k) {
    const T* at = in + tile::fragment_row(k % 2) * kCols + tile::fragment_col(k / 2);
    x.data[k] = tile::pack<T>(at[0], at[1]);
  }
}

// Registers -> shared: the tile as it lies in memory.
template <class T, int kCols>
__global__ void store_kernel(const T* in, T* raw) {
  auto& shared = tile::shared_storage<tile::SharedTile<T, kRows, kCols>>();
  for (int row0 = 0; row0 < kRows; row0 += 64) {
    tile::RegisterTile<T, 64, kCols> x;
    read(x, in + row0 * kCols);
    tile::store(shared, row0, x);
  }
  __syncthreads();
  for (int i = threadIdx.x; i < kRows * kCols; i += blockDim.x) raw[i] = shared.data[i];
}

// The same transposed: `in` is (128, kCols), the tile (kCols, 128).
template <class T, int kCols>
__global__ void store_transposed_kernel(const T* in, T* raw) {
  auto& shared = tile::shared_storage<tile::SharedTile<T, kCols, kRows>>();
  for (int row0 = 0; row0 < kRows; row0 += 64) {
    tile::RegisterTile<T, 64, kCols> x;
    read(x, in + row0 * kCols);
    tile::store_transposed(shared, x, row0);
  }
  __syncthreads();
  for (int i = threadIdx.x; i < kRows * kCols; i += blockDim.x) raw[i] = shared.data[i];
}

// A tile given as it lies in memory -> registers.
template <class T, int kCols>
__global__ void load_kernel(const T* raw, float* out) {
  auto& shared = tile::shared_storage<tile::SharedTile<T, kRows, kCols>>();
  for (int i = threadIdx.x; i < kRows * kCols; i += blockDim.x) shared.data[i] = raw[i];
  __syncthreads();
  for (int row0 = 0; row0 < kRows; row0 += 64) {
    tile::RegisterTile<T, 64, kCols> x;
    tile::load(x, shared, row0);
    for (int k = 0; k < kCols / 4; ++k) {
      const float2 pair = tile::pair(x, k / 2, k % 2);
      float* at = out + (row0 + tile::fragment_row(k % 2)) * kCols + tile::fragment_col(k / 2);
      at[0] = pair.x;
      at[1] = pair.y;
    }
  }
}

// chunk(): reads a tile that is given as it lies in memory.
template <class T, int kCols>
__global__ void chunk_kernel(const T* raw, T* out) {
  auto& shared = tile::shared_storage<tile::SharedTile<T, kRows, kCols>>();
  for (int i = threadIdx.x; i < kRows * kCols; i += blockDim.x) shared.data[i] = raw[i];
  __syncthreads();
  for (int i = threadIdx.x; i < kRows * kCols; i += blockDim.x) {
    const int row = i / kCols, col = i % kCols;
    out[i] = reinterpret_cast<const T*>(shared.chunk(row, col / 8 * 8))[col % 8];
  }
}

template <int kCols>
__global__ void fragments_kernel(const float* in, float* in_shared, float* out) {
  auto& shared = tile::shared_storage<float[64 * kCols]>();
  tile::RegisterTile<float, 64, kCols> x, y;
  for (int k = 0; k < kCols / 2; ++k) x.data[k] = in[threadIdx.x * (kCols / 2) + k];
  tile::store_fragments(shared, x);
  __syncthreads();
  for (int i = threadIdx.x; i < 64 * kCols; i += blockDim.x) in_shared[i] = shared[i];
  tile::load_fragments(y, shared);
  for (int k = 0; k < kCols / 2; ++k) out[threadIdx.x * (kCols / 2) + k] = y.data[k];
}

template <class T, int kCols>
void test_tile(const std::string& name) {
  constexpr int kSize = kRows * kCols;
  constexpr int kBytes = tile::SharedTile<T, kRows, kCols>::kBytes;
  const auto x = test::integers<T>(kSize, kCols, 200);
  std::vector<T> raw(kSize);
  for (int i = 0; i < kSize; ++i) raw[swizzled(i / kCols, i % kCols)] = x[i];
  const test::Array<T> in(x), in_raw(raw), stored(kSize), chunks(kSize);
  const test::Array<float> loaded(kSize);
  test::check(launch(store_kernel<T, kCols>, 1, 128, kBytes, nullptr, in.data(), stored.data()),
              "store");
  test::check(launch(load_kernel<T, kCols>, 1, 128, kBytes, nullptr, in_raw.data(), loaded.data()),
              "load");
  test::check(launch(chunk_kernel<T, kCols>, 1, 128, kBytes, nullptr, in_raw.data(), chunks.data()),
              "chunk");
  test::synchronize("shared tiles");
  const std::string where = " " + name + ", columns " + std::to_string(kCols);
  test::compare("store, in memory order" + where, stored.host(), raw, 64);
  test::compare("load" + where, loaded.host(), x, kCols);
  test::compare("chunk" + where, chunks.host(), x, kCols);
}

template <class T, int kCols>
void test_transposed(const std::string& name) {
  constexpr int kSize = kRows * kCols;
  constexpr int kBytes = tile::SharedTile<T, kCols, kRows>::kBytes;
  const auto x = test::integers<T>(kSize, kCols, 200);
  std::vector<T> raw(kSize);
  for (int i = 0; i < kSize; ++i) raw[swizzled(i % kCols, i / kCols, kCols, sizeof(T))] = x[i];
  const test::Array<T> in(x), stored(kSize);
  test::check(
      launch(store_transposed_kernel<T, kCols>, 1, 128, kBytes, nullptr, in.data(), stored.data()),
      "store_transposed");
  test::synchronize("transposed tiles");
  test::compare("store_transposed " + name + ", rows " + std::to_string(kCols), stored.host(), raw,
                64);
}

template <int kCols>
void test_float_store() {
  constexpr int kSize = kRows * kCols;
  const auto x = test::integers<float>(kSize, kCols, 1 << 20);
  std::vector<float> raw(kSize);
  for (int i = 0; i < kSize; ++i) raw[swizzled(i / kCols, i % kCols, kRows, 4)] = x[i];
  const test::Array<float> in(x), stored(kSize);
  test::check(
      launch(store_kernel<float, kCols>, 1, 128, kSize * 4, nullptr, in.data(), stored.data()),
      "store");
  test::synchronize("float32 tiles");
  test::compare("store float32, columns " + std::to_string(kCols), stored.host(), raw, 32);
}

template <int kCols>
void test_fragments() {
  constexpr int kSize = 64 * kCols, kEach = kCols / 2;
  const auto x = test::integers<float>(kSize, kCols, 1 << 20);
  std::vector<float> wanted(kSize);
  for (int i = 0; i < kSize; ++i) {
    const int thread = i / kEach, k = i % kEach;
    wanted[k / 4 * 512 + thread * 4 + k % 4] = x[i];  // 16 bytes of every thread in turn
  }
  const test::Array<float> in(x), in_shared(kSize), out(kSize);
  test::check(launch(fragments_kernel<kCols>, 1, 128, kSize * 4, nullptr, in.data(),
                     in_shared.data(), out.data()),
              "fragments");
  test::synchronize("fragments");
  const std::string where = ", columns " + std::to_string(kCols);
  test::compare("store_fragments" + where, in_shared.host(), wanted, 4);
  test::compare("load_fragments" + where, out.host(), x, kEach);
}

// Sums of runs of four, of which a thread has kRuns under way at once; every third does not exist.
constexpr int kThreads = 64, kRuns = 9;

__global__ void async_kernel(const float* in, float* sums) {
  __shared__ alignas(16) float runs[kRuns][kThreads][4];
  for (int run = 0; run < kRuns; ++run) {
    tile::ptx::copy_async_16(runs[run][threadIdx.x], in + (run * kThreads + threadIdx.x) * 4,
                             run % 3 != 2);
  }
  tile::ptx::wait_all_copies_async();
  for (int run = 0; run < kRuns; ++run) {
    const float* x = runs[run][threadIdx.x];
    sums[run * kThreads + threadIdx.x] = x[0] + x[1] + x[2] + x[3];
  }
}

void test_async() {
  constexpr int kSize = kRuns * kThreads;
  const auto x = test::integers<float>(4 * kSize, 3, 1 << 10);
  std::vector<float> wanted(kSize);
  for (int i = 0; i < kSize; ++i) {
    if (i / kThreads % 3 == 2) continue;
    for (int k = 0; k < 4; ++k) wanted[i] += x[4 * i + k];
  }
  const test::Array<float> in(x), sums(kSize);
  test::check(launch(async_kernel, 1, kThreads, 0, nullptr, in.data(), sums.data()), "async");
  test::synchronize("async");
  test::compare("copies of runs", sums.host(), wanted, kThreads);
}

}  // namespace jaxkern

int main() {
  using namespace jaxkern;
  test_tile<tile::bf16, 64>("bf16");
  test_tile<tile::bf16, 128>("bf16");
  test_tile<tile::bf16, 256>("bf16");
  test_tile<tile::f16, 128>("f16");
  test_transposed<tile::bf16, 64>("bf16");
  test_transposed<tile::bf16, 80>("bf16");
  test_transposed<tile::f16, 128>("f16");
  test_transposed<float, 16>("float32");
  test_transposed<float, 64>("float32");
  test_float_store<32>();
  test_float_store<64>();
  test_fragments<16>();
  test_fragments<64>();
  test_fragments<128>();
  test_async();
  return test::finish();
}
