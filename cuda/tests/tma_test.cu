// tile/tma.cuh: copies between tensors of odd sizes and shared tiles, and additions to memory.
#include "cuda/tile/tma.cuh"

#include "cuda/host/launch.h"
#include "cuda/host/tensor_map.h"
#include "cuda/tests/test.h"

namespace jaxkern {

using T = tile::bf16;
constexpr auto kDtype = CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;

template <class Tile>
struct LoadStorage {
  Tile tile;
  tile::Barrier full;
};

template <class Tile>
__device__ void copy_out(T* out, Tile& x) {
  for (int i = threadIdx.x; i < Tile::kRows * Tile::kCols; i += blockDim.x) {
    const int row = i / Tile::kCols, col = i % Tile::kCols;
    out[i] = reinterpret_cast<const T*>(x.chunk(row, col / 8 * 8))[col % 8];
  }
}

template <class Tile>
__device__ void copy_in(Tile& x, const T* in) {
  for (int i = threadIdx.x; i < Tile::kRows * Tile::kCols; i += blockDim.x) {
    const int row = i / Tile::kCols, col = i % Tile::kCols;
    reinterpret_cast<T*>(x.chunk(row, col / 8 * 8))[col % 8] = in[i];
  }
}

__device__ void init(tile::Barrier& barrier) {
  if (threadIdx.x == 0) {
    barrier.init(1);
    tile::ptx::fence_mbarrier_init();
  }
  __syncthreads();
}

template <class Tile, class At>
__global__ void load_kernel(const __grid_constant__ CUtensorMap map, At at, T* out) {
  auto& shared = tile::shared_storage<LoadStorage<Tile>>();
  init(shared.full);
  if (threadIdx.x == 0) {
    shared.full.arrive_expect(Tile::kBytes);
    tile::tma::load(shared.tile, map, at, shared.full);
  }
  shared.full.wait(0);
  copy_out(out, shared.tile);
}

// row0: where in the tile the rows to be stored begin.
template <class Tile, class At, class... Row>
__global__ void store_kernel(const __grid_constant__ CUtensorMap map, At at, const T* in,
                             Row... row0) {
  auto& shared = tile::shared_storage<Tile>();
  copy_in(shared, in);
  tile::tma::fence_writes();
  __syncthreads();
  if (threadIdx.x == 0) {
    tile::tma::store(map, at, shared, row0...);
    tile::tma::wait_stores_read();
  }
}

template <int kRows, int kCols>
void test_matrix(int rows, int cols, tile::tma::Corner at) {
  using Tile = tile::SharedTile<T, kRows, kCols>;
  const std::string where = " of " + std::to_string(kRows) + " x " + std::to_string(kCols) +
                            " at (" + std::to_string(at.row) + ", " + std::to_string(at.col) +
                            ") of " + std::to_string(rows) + " x " + std::to_string(cols);
  const auto x = test::integers<T>(rows * cols, rows, 200);
  const auto y = test::integers<T>(kRows * kCols, cols, 200);
  std::vector<T> loaded(kRows * kCols, T(0.0f));
  const test::Array<T> in(x), in_tile(y), out_tile(loaded.size()), out(x.size());
  std::vector<T> stored = out.host();
  for (int i = 0; i < kRows * kCols; ++i) {
    const int row = at.row + i / kCols, col = at.col + i % kCols;
    if (row >= rows || col >= cols) continue;
    loaded[i] = x[row * cols + col];
    stored[row * cols + col] = y[i];
  }
  CUtensorMap in_map, out_map;
  test::check(make_matrix_map(&in_map, kDtype, in.data(), rows, cols, kRows), "map");
  test::check(make_matrix_map(&out_map, kDtype, out.data(), rows, cols, kRows), "map");
  test::check(launch(load_kernel<Tile, tile::tma::Corner>, 1, 128, sizeof(LoadStorage<Tile>),
                     nullptr, in_map, at, out_tile.data()),
              "load");
  test::check(launch(store_kernel<Tile, tile::tma::Corner>, 1, 128, sizeof(Tile), nullptr, out_map,
                     at, in_tile.data()),
              "store");
  test::synchronize("matrix copies");
  test::compare("load" + where, out_tile.host(), loaded, kCols);
  test::compare("store" + where, out.host(), stored, cols);
}

template <int kPanels>
struct PanelStorage {
  alignas(1024) tile::e4m3 data[kPanels * 256 * 128];
  tile::Barrier full;
};

template <int kPanels>
__global__ void panels_kernel(const __grid_constant__ CUtensorMap map, int box_panels, int box_rows,
                              tile::tma::PanelCorner at, tile::e4m3* out) {
  auto& shared = tile::shared_storage<PanelStorage<kPanels>>();
  const int size = kPanels * box_rows * 128;
  init(shared.full);
  if (threadIdx.x == 0) {
    shared.full.arrive_expect(size);
    const uint64_t policy =
        kPanels > 1 ? tile::ptx::evict_first_policy() : tile::ptx::evict_last_policy();
    tile::tma::load_panels<kPanels>(shared.data, map, box_panels, box_rows, at, shared.full,
                                    policy);
  }
  shared.full.wait(0);
  for (int i = threadIdx.x; i < size; i += blockDim.x) {
    const int row = i / 128 % box_rows, col = i % 128;
    out[i] = shared.data[i / 128 * 128 + (col ^ row % 8 * 16)];
  }
}

template <int kPanels>
void test_panels(int rows, int cols, int box_rows, tile::tma::PanelCorner at) {
  using tile::e4m3;
  const auto x = test::integers<e4m3>(rows * cols, cols);
  std::vector<e4m3> wanted;
  for (int i = 0; i < kPanels * box_rows * 128; ++i) {
    const int row = at.row + i / 128 % box_rows;
    const int col = (at.panel + i / 128 / box_rows) * 128 + i % 128;
    wanted.push_back(row < rows && col < cols ? x[row * cols + col] : e4m3(0.0f));
  }
  const test::Array<e4m3> in(x), out(wanted.size());
  CUtensorMap map;
  int box_panels = kPanels;
  test::check(make_panel_map(&map, CU_TENSOR_MAP_DATA_TYPE_UINT8, in.data(), rows, cols, box_rows,
                             &box_panels),
              "map");
  const std::string what = std::to_string(kPanels) + " panels of " + std::to_string(box_rows) +
                           " rows of " + std::to_string(rows) + " x " + std::to_string(cols);
  test::expect(box_panels == (cols % 128 == 0 ? kPanels : 1), what + ": panels of a box");
  test::check(launch(panels_kernel<kPanels>, 1, 128, sizeof(PanelStorage<kPanels>), nullptr, map,
                     box_panels, box_rows, at, out.data()),
              what);
  test::synchronize(what);
  test::compare(what, out.host(), wanted, 128);
}

// Rank 4: (batch, rows, heads, kCols). The store moves `box_rows` rows of the tile, from `row0` on.
template <int kRows, int kCols>
void test_heads(int batch, int rows, int heads, tile::tma::Coordinate at, int row0, int box_rows) {
  using Tile = tile::SharedTile<T, kRows, kCols>;
  const std::string where = " of " + std::to_string(kRows) + " x " + std::to_string(kCols) +
                            " at row " + std::to_string(at.row) + " of " + std::to_string(rows);
  const size_t size = size_t(batch) * rows * heads * kCols;
  const auto x = test::integers<T>(size, rows, 200);
  const auto y = test::integers<T>(kRows * kCols, heads, 200);
  std::vector<T> loaded(kRows * kCols, T(0.0f));
  const test::Array<T> in(x), in_tile(y), out_tile(loaded.size()), out(size);
  std::vector<T> stored = out.host();
  for (int i = 0; i < kRows * kCols; ++i) {
    const auto place = [&](int row) {
      return ((size_t(at.batch) * rows + row) * heads + at.head) * kCols + i % kCols;
    };
    const int r = i / kCols;
    if (at.row + r < rows) loaded[i] = x[place(at.row + r)];
    const int to = at.row + r - row0;
    if (r >= row0 && r < row0 + box_rows && to < rows) stored[place(to)] = y[i];
  }
  CUtensorMap in_map, out_map;
  test::check(make_tensor_map(&in_map, kDtype, in.data(), batch, rows, heads, kCols, kRows), "map");
  test::check(make_tensor_map(&out_map, kDtype, out.data(), batch, rows, heads, kCols, box_rows),
              "map");
  test::check(launch(load_kernel<Tile, tile::tma::Coordinate>, 1, 128, sizeof(LoadStorage<Tile>),
                     nullptr, in_map, at, out_tile.data()),
              "load");
  test::check(launch(store_kernel<Tile, tile::tma::Coordinate, int>, 1, 128, sizeof(Tile), nullptr,
                     out_map, at, in_tile.data(), row0),
              "store");
  test::synchronize("rank-4 copies");
  test::compare("rank-4 load" + where, out_tile.host(), loaded, kCols);
  test::compare("rank-4 store" + where, out.host(), stored, kCols);
}

// A tile of fewer columns than the heads have, stored to column `col`, what sticks out dropped.
void test_store_to_column(int rows, int cols, int col) {
  using Tile = tile::SharedTile<T, 64, 64>;
  const tile::tma::Coordinate at{1, 8, 0};
  const auto y = test::integers<T>(Tile::kRows * Tile::kCols, cols, 200);
  const test::Array<T> in_tile(y), out(size_t(2) * rows * cols);
  std::vector<T> stored = out.host();
  for (int i = 0; i < Tile::kRows * Tile::kCols; ++i) {
    const int r = at.row + i / Tile::kCols, c = col + i % Tile::kCols;
    if (r < rows && c < cols) stored[(size_t(at.batch) * rows + r) * cols + c] = y[i];
  }
  CUtensorMap map;
  test::check(make_tensor_map(&map, kDtype, out.data(), 2, rows, 1, cols, Tile::kRows), "map");
  test::check(launch(store_kernel<Tile, tile::tma::Coordinate, int, int>, 1, 128, sizeof(Tile),
                     nullptr, map, at, in_tile.data(), 0, col),
              "store");
  test::synchronize("store to a column");
  test::compare("store to column " + std::to_string(col), out.host(), stored, cols);
}

constexpr int kBox = 64;  // values of a row

struct RowStorage {
  alignas(128) float values[kBox];
  tile::Barrier full;
};

__global__ void row_kernel(const __grid_constant__ CUtensorMap map, int row, int col, float* out) {
  auto& shared = tile::shared_storage<RowStorage>();
  init(shared.full);
  if (threadIdx.x == 0) {
    shared.full.arrive_expect(sizeof(shared.values));
    tile::tma::load(shared.values, map, row, col, shared.full);
  }
  shared.full.wait(0);
  for (int i = threadIdx.x; i < kBox; i += blockDim.x) out[i] = shared.values[i];
}

void test_row(int rows, int cols, int row, int col) {
  const auto x = test::integers<float>(rows * cols, cols, 1000);
  std::vector<float> wanted(kBox, 0.0f);
  for (int i = 0; i < kBox && col + i < cols; ++i) wanted[i] = x[row * cols + col + i];
  const test::Array<float> in(x), out(kBox);
  CUtensorMap map;
  test::check(make_row_map(&map, in.data(), rows, cols, kBox), "map");
  test::check(launch(row_kernel, 1, 32, sizeof(RowStorage), nullptr, map, row, col, out.data()),
              "row");
  test::synchronize("row");
  test::compare("row map, column " + std::to_string(col) + " of " + std::to_string(cols),
                out.host(), wanted, kBox);
}

// Every block adds its own numbers, through two buffers, to the same span.
__global__ void add_kernel(float* y, int count, int rounds) {
  auto& shared = tile::shared_storage<float[2][1024]>();
  for (int round = 0; round < rounds; ++round) {
    if (threadIdx.x == 0) tile::tma::wait_stores_read<1>();
    __syncthreads();
    for (int i = threadIdx.x; i < count; i += blockDim.x) {
      shared[round % 2][i] = static_cast<float>((i % 8 + 1) * (blockIdx.x + 1) + round);
    }
    tile::tma::fence_writes();
    __syncthreads();
    if (threadIdx.x == 0) tile::tma::add(y, shared[round % 2], count);
  }
  if (threadIdx.x == 0) tile::tma::wait_stores_read();
}

void test_add(int count, int blocks, int rounds) {
  std::vector<float> start(count + 4, 7.0f), wanted = start;  // the last four must stay
  for (int i = 0; i < count; ++i) {
    for (int block = 0; block < blocks; ++block) {
      for (int round = 0; round < rounds; ++round) wanted[i] += (i % 8 + 1) * (block + 1) + round;
    }
  }
  const test::Array<float> y(start);
  test::check(launch(add_kernel, blocks, 128, 8192, nullptr, y.data(), count, rounds), "add");
  test::synchronize("add");
  test::compare("add " + std::to_string(count), y.host(), wanted, count);
}

}  // namespace jaxkern

int main() {
  using namespace jaxkern;
  test_matrix<64, 64>(64, 64, {0, 0});
  test_matrix<64, 64>(65, 72, {64, 64});
  test_matrix<128, 64>(100, 200, {0, 128});
  test_matrix<128, 64>(300, 136, {256, 128});
  test_matrix<64, 256>(70, 264, {40, 64});
  test_matrix<64, 256>(33, 8, {0, 0});
  test_matrix<64, 64>(50, 72, {128, 0});   // all of it lies below the matrix
  test_matrix<64, 128>(50, 72, {0, 128});  // or beside it

  test_panels<4>(70, 1024, 56, {0, 4});
  test_panels<4>(70, 640, 56, {56, 4});  // most of them lie beside the matrix
  test_panels<4>(70, 592, 8, {64, 2});
  test_panels<2>(300, 144, 256, {8, 0});
  test_panels<1>(64, 256, 64, {0, 1});

  test_heads<64, 64>(2, 64, 3, {1, 0, 2}, 0, 64);
  test_heads<128, 64>(2, 37, 3, {1, 0, 1}, 64, 64);
  test_heads<128, 128>(1, 200, 2, {0, 128, 1}, 0, 128);
  test_heads<128, 128>(3, 201, 2, {2, 128, 0}, 64, 64);

  test_store_to_column(50, 136, 64);
  test_store_to_column(80, 136, 128);

  test_row(5, 96, 3, 0);
  test_row(5, 96, 4, 64);
  test_row(1, 68, 0, 64);

  test_add(1024, 1, 1);
  test_add(1020, 132, 5);
  return test::finish();
}
