// tile/scheduler.cuh: orders name every tile once, in the order they promise,
// and a queue hands each tile to one block, whose roles all see it.
#include "cuda/tile/scheduler.cuh"

#include "cuda/host/device.h"
#include "cuda/host/launch.h"
#include "cuda/tests/test.h"

namespace jaxkern {

__global__ void order_kernel(tile::TileOrder order, int* out) {
  for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < order.count();
       i += gridDim.x * blockDim.x) {
    const auto at = order.at(i);
    out[2 * i] = at.block;
    out[2 * i + 1] = at.head;
  }
}

__global__ void order_kernel(tile::MatrixOrder order, int* out) {
  for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < order.count();
       i += gridDim.x * blockDim.x) {
    const auto at = order.at(i);
    out[2 * i] = at.row;
    out[2 * i + 1] = at.col;
  }
}

// Sections of heads; in a section the blocks are the slow axis.
void test_tile_order(int blocks, int heads, int section) {
  std::vector<int> wanted;
  for (int first = 0; first < heads; first += section) {
    for (int block = 0; block < blocks; ++block) {
      for (int head = first; head < std::min(heads, first + section); ++head) {
        wanted.insert(wanted.end(), {block, head});
      }
    }
  }
  const test::Array<int> out(wanted.size());
  void (*kernel)(tile::TileOrder, int*) = order_kernel;
  test::check(
      launch(kernel, 4, 128, 0, nullptr, tile::TileOrder{blocks, heads, section}, out.data()),
      "TileOrder");
  test::synchronize("TileOrder");
  test::compare("TileOrder " + std::to_string(blocks) + " blocks, " + std::to_string(heads) +
                    " heads in sections of " + std::to_string(section),
                out.host(), wanted, 2);
}

// Groups of rows; in a group the columns are the slow axis.
void test_matrix_order(int rows, int cols, int group) {
  std::vector<int> wanted;
  for (int first = 0; first < rows; first += group) {
    for (int col = 0; col < cols; ++col) {
      for (int row = first; row < std::min(rows, first + group); ++row) {
        wanted.insert(wanted.end(), {row, col});
      }
    }
  }
  const test::Array<int> out(wanted.size());
  void (*kernel)(tile::MatrixOrder, int*) = order_kernel;
  test::check(launch(kernel, 4, 128, 0, nullptr, tile::MatrixOrder{rows, cols, group}, out.data()),
              "MatrixOrder");
  test::synchronize("MatrixOrder");
  test::compare("MatrixOrder " + std::to_string(rows) + " x " + std::to_string(cols) +
                    " in groups of " + std::to_string(group),
                out.host(), wanted, 2);
}

constexpr int kReaders = 2;  // warps

// Warp 0 draws tiles, the others note for each how often they got it, and in
// which block. The first reader reads as a warp, the second as a single thread.
__global__ void queue_kernel(int* counter, int* takes, int* takers, int count) {
  __shared__ tile::WorkQueue<int> queue;
  if (threadIdx.x == 0) {
    queue.init(kReaders);
    tile::ptx::fence_mbarrier_init();
  }
  __syncthreads();
  const int warp = threadIdx.x / tile::kWarpSize, lane = threadIdx.x % tile::kWarpSize;
  if (warp == 0) {
    if (lane != 0) return;
    tile::TileDraw draw(counter);
    tile::WorkWriter<int> work;
    for (; draw.tile < count; draw.advance()) work.put(queue, draw.tile);
    work.put(queue, count);  // the end
    return;
  }
  const bool alone = warp == 2;
  if (alone && lane != 0) return;
  tile::WorkReader<int> work;
  while (true) {
    const int index = work.take(queue);
    alone ? work.release(queue) : work.release_warp(queue);
    if (index >= count) return;
    if (lane == 0) {
      atomicAdd(&takes[index * kReaders + warp - 1], 1);
      takers[index * kReaders + warp - 1] = blockIdx.x;
    }
    if (blockIdx.x % 3 == 0) __nanosleep(5000);  // the other blocks take more
  }
}

void test_queue(int blocks, int count) {
  const test::Array<int> counter(std::vector<int>{0}), takers(count * kReaders);
  const test::Array<int> takes(std::vector<int>(count * kReaders, 0));
  test::check(launch(queue_kernel, blocks, (1 + kReaders) * tile::kWarpSize, 0, nullptr,
                     counter.data(), takes.data(), takers.data(), count),
              "WorkQueue");
  const std::string where = ": " + std::to_string(count) + " tiles, " + std::to_string(blocks) +
                            " blocks, by tile and reader";
  test::synchronize("WorkQueue" + where);
  test::compare("WorkQueue, times taken" + where, takes.host(),
                std::vector<int>(count * kReaders, 1), kReaders);
  std::vector<int> first = takers.host();
  for (int i = 0; i < count * kReaders; ++i) first[i] = first[i / kReaders * kReaders];
  test::compare("WorkQueue, block that took" + where, takers.host(), first, kReaders);
}

}  // namespace jaxkern

int main() {
  using namespace jaxkern;
  test_tile_order(7, 12, 4);
  test_tile_order(5, 13, 4);
  test_tile_order(1, 9, 1);
  test_tile_order(16, 3, 100);
  test_matrix_order(16, 16, 8);
  test_matrix_order(17, 5, 8);
  test_matrix_order(3, 40, 8);
  test_matrix_order(9, 1, 1);
  int multiprocessors;
  test::check(multiprocessor_count(&multiprocessors), "device");
  test_queue(multiprocessors, 1000);
  test_queue(multiprocessors, multiprocessors);
  test_queue(8, 3);
  test_queue(1, 50);
  return test::finish();
}
