// tile/cluster.cuh and multicast loads: blocks know their place, reach each other's barriers, and
// load each other's tiles.
#include "cuda/tile/cluster.cuh"

#include "cuda/host/launch.h"
#include "cuda/host/tensor_map.h"
#include "cuda/tests/test.h"
#include "cuda/tile/tma.cuh"

namespace jaxkern {

using T = tile::bf16;
constexpr int kRounds = 5;
constexpr int kWarps = 2;

// In every round all warps of a cluster meet at the barriers of all its blocks. out: rank, index,
// count, and what block 0 of the cluster had noted when the last round was over.
template <int kBlocks>
__global__ void __cluster_dims__(kBlocks, 1, 1) arrive_kernel(int* out, int* notes) {
  using Cluster = tile::Cluster<kBlocks>;
  __shared__ tile::Barrier barrier;
  if (threadIdx.x == 0) {
    barrier.init(kWarps * kBlocks);
    tile::ptx::fence_mbarrier_init();
  }
  Cluster::sync();
  for (int round = 0; round < kRounds; ++round) {
    if ((Cluster::rank() + round) % kBlocks == 0) __nanosleep(2000);
    Cluster::arrive_warp(barrier);
    barrier.wait(round % 2);
  }
  if (threadIdx.x == 0) notes[blockIdx.x] = kRounds;
  Cluster::sync();
  if (threadIdx.x == 0) {
    int* mine = out + 4 * blockIdx.x;
    mine[0] = Cluster::rank();
    mine[1] = Cluster::index();
    mine[2] = Cluster::count();
    mine[3] = *const_cast<volatile int*>(notes + blockIdx.x / kBlocks * kBlocks);
  }
}

template <int kBlocks>
void test_arrive(int clusters) {
  const int blocks = clusters * kBlocks;
  std::vector<int> wanted;
  for (int block = 0; block < blocks; ++block) {
    wanted.insert(wanted.end(), {block % kBlocks, block / kBlocks, clusters, kRounds});
  }
  const test::Array<int> out(wanted.size()), notes(blocks);
  test::check(launch(arrive_kernel<kBlocks>, blocks, kWarps * tile::kWarpSize, 0, nullptr,
                     out.data(), notes.data()),
              "cluster");
  test::synchronize("clusters of " + std::to_string(kBlocks));
  test::compare("clusters of " + std::to_string(kBlocks), out.host(), wanted, 4);
}

template <class Tile>
struct Storage {
  Tile tile;
  tile::Barrier full, empty;
};

// Cluster i loads rows [64 i, 64 i + 64), twice over, the second time 64 columns further.
template <int kBlocks, class Tile>
__global__ void __cluster_dims__(kBlocks, 1, 1)
    multicast_kernel(const __grid_constant__ CUtensorMap map, T* out) {
  using Cluster = tile::Cluster<kBlocks>;
  auto& shared = tile::shared_storage<Storage<Tile>>();
  if (threadIdx.x == 0) {
    shared.full.init(1);
    shared.empty.init(kWarps * kBlocks);
    tile::ptx::fence_mbarrier_init();
  }
  Cluster::sync();
  for (int round = 0; round < 2; ++round) {
    if (threadIdx.x == 0) {
      shared.empty.wait(round % 2 ^ 1);
      shared.full.arrive_expect(Tile::kBytes);
      const tile::tma::Corner at{64 * Cluster::index(), 64 * round};
      tile::tma::load_multicast<Cluster>(shared.tile, map, at, shared.full);
    }
    __syncwarp();
    shared.full.wait(round % 2);
    T* to = out + (blockIdx.x * 2 + round) * Tile::kRows * Tile::kCols;
    for (int i = threadIdx.x; i < Tile::kRows * Tile::kCols; i += blockDim.x) {
      const int row = i / Tile::kCols, col = i % Tile::kCols;
      to[i] = reinterpret_cast<const T*>(shared.tile.chunk(row, col / 8 * 8))[col % 8];
    }
    Cluster::arrive_warp(shared.empty);
  }
  Cluster::sync();
}

// box_rows: of what one block loads of one panel.
template <int kBlocks, class Tile>
void test_multicast(int clusters, int box_rows) {
  const int rows = 64 * clusters - 9, cols = 296;
  const auto x = test::integers<T>(rows * cols, kBlocks, 200);
  std::vector<T> wanted;
  for (int block = 0; block < clusters * kBlocks; ++block) {
    for (int i = 0; i < 2 * Tile::kRows * Tile::kCols; ++i) {
      const int row = block / kBlocks * 64 + i / Tile::kCols % Tile::kRows;
      const int col = i / (Tile::kRows * Tile::kCols) * 64 + i % Tile::kCols;
      wanted.push_back(row < rows && col < cols ? x[row * cols + col] : T(0.0f));
    }
  }
  const test::Array<T> in(x), out(wanted.size());
  CUtensorMap map;
  test::check(
      make_matrix_map(&map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, in.data(), rows, cols, box_rows),
      "map");
  test::check(launch(multicast_kernel<kBlocks, Tile>, clusters * kBlocks, kWarps * tile::kWarpSize,
                     sizeof(Storage<Tile>), nullptr, map, out.data()),
              "multicast");
  const std::string what = "multicast of " + std::to_string(Tile::kCols) +
                           " columns in clusters of " + std::to_string(kBlocks);
  test::synchronize(what);
  test::compare(what, out.host(), wanted, Tile::kCols);
}

constexpr int kPart = 16;  // columns

template <int kCols>
struct SendStorage {
  float received[7][64 * kCols];  // of each of the other blocks
  tile::Barrier ready, done;
};

// Blocks of a cluster, of which each adds up every so many-th part of what all have.
template <int kCols>
__global__ void send_kernel(const float* in, float* out) {
  auto& shared = tile::shared_storage<SendStorage<kCols>>();
  tile::RegisterTile<float, 64, kCols> x;
  const int blocks = gridDim.x, rank = blockIdx.x, thread = threadIdx.x;
  constexpr int kParts = kCols / kPart, kPartSize = 64 * kPart;
  if (thread == 0) {
    shared.ready.init(blocks > 1 ? blocks - 1 : 1);
    shared.done.init(1);
    tile::ptx::fence_mbarrier_init();
  }
  tile::start_cluster();
  for (int k = 0; k < kCols / 2; ++k) {
    x.data[k] = in[(rank * blockDim.x + thread) * (kCols / 2) + k];
  }
  if (thread == 0) {
    const int parts = (kParts - rank + blocks - 1) / blocks;
    shared.done.arrive_expect(parts * (blocks - 1) * kPartSize * 4);
    for (int i = 1; i < blocks; ++i) tile::arrive_at(shared.ready, (rank + i) % blocks);
  }
  if (blocks > 1) shared.ready.wait(0);
#pragma unroll
  for (int part = 0; part < kParts; ++part) {
    const int to = part % blocks;
    if (to == rank) continue;
    float* y = shared.received[(rank + blocks - to - 1) % blocks] + kPartSize * part;
    tile::send_fragments<kPart>(y, x, kPart * part, shared.done, to);
  }
  shared.done.wait(0);
#pragma unroll
  for (int part = 0; part < kParts; ++part) {
    if (part % blocks != rank) continue;
    for (int i = 0; i < blocks - 1; ++i) {
      tile::add_fragments_at<kPart>(x, kPart * part, shared.received[i] + kPartSize * part);
    }
  }
  for (int k = 0; k < kCols / 2; ++k) {
    out[(rank * blockDim.x + thread) * (kCols / 2) + k] = x.data[k];
  }
}

template <int kCols>
void test_send(int blocks) {
  const int size = 64 * kCols;
  const auto x = test::integers<float>(size * blocks, blocks, 1000);
  std::vector<float> wanted = x;
  for (size_t i = 0; i < x.size(); ++i) {
    const int rank = i / size, part = i % (kCols / 2) / (kPart / 2);
    for (int other = 0; other < blocks; ++other) {
      if (part % blocks == rank && other != rank) wanted[i] += x[other * size + i % size];
    }
  }
  const std::string what =
      std::to_string(kCols) + " columns sent in a cluster of " + std::to_string(blocks);
  const test::Array<float> in(x), out(x.size());
  test::check(launch_clusters(send_kernel<kCols>, blocks, blocks, 128, sizeof(SendStorage<kCols>),
                              nullptr, in.data(), out.data()),
              what);
  test::synchronize(what);
  test::compare(what, out.host(), wanted, kCols);
}

}  // namespace jaxkern

int main() {
  using namespace jaxkern;
  test_arrive<1>(3);
  test_arrive<2>(70);
  test_arrive<4>(5);
  using Panels = tile::SharedTile<T, 64, 256>;
  using Panel = tile::SharedTile<T, 64, 64>;
  test_multicast<1, Panels>(2, 64);
  test_multicast<2, Panels>(3, 64);
  test_multicast<4, Panels>(2, 64);
  test_multicast<2, Panel>(3, 32);
  test_multicast<4, Panel>(2, 16);
  test_send<16>(8);
  test_send<64>(3);
  test_send<64>(8);
  test_send<32>(1);
  return test::finish();
}
