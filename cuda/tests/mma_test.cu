// tile/mma.cuh: products at every width and from every kind of operand, with and without
// accumulation. A is (64, kK), B is (kK, kN); both lie at an offset in a larger shared tile whose
// other elements are NaN.
#include "cuda/tile/mma.cuh"

#include "cuda/host/launch.h"
#include "cuda/tests/test.h"
#include "cuda/tile/tma.cuh"

namespace jaxkern {

constexpr int kK = 128;  // two panels of a k-major tile

enum class Source { kMajor, mnMajor, kRegisters };

template <class T, int kN, Source kA, Source kB>
struct Product {
  static constexpr int kPaddedN = tile::ceil_div(kN, 64) * 64;
  static constexpr int kOffsetA = 64;
  static constexpr int kOffsetB = kB == Source::kMajor ? 8 : 64;
  using TileA = std::conditional_t<kA == Source::mnMajor, tile::SharedTile<T, kK, 64 + kOffsetA>,
                                   tile::SharedTile<T, 64 + kOffsetA, kK>>;
  using TileB = std::conditional_t<kB == Source::mnMajor, tile::SharedTile<T, kK, kPaddedN + 64>,
                                   tile::SharedTile<T, kN + 8, kK>>;
  struct Storage {
    TileA a;
    TileB b;
  };
};

template <class Tile, class T>
__device__ void put(Tile& y, int row, int col, T value) {
  reinterpret_cast<T*>(y.chunk(row, col / 8 * 8))[col % 8] = value;
}

template <class T, int kN, Source kA, Source kB>
__global__ void __launch_bounds__(128, 1)
    mma_kernel(const T* a, const T* b, float* d, bool accumulate) {
  using P = Product<T, kN, kA, kB>;
  auto& shared = tile::shared_storage<typename P::Storage>();
  uint32_t* words = reinterpret_cast<uint32_t*>(&shared);
  for (size_t i = threadIdx.x; i < sizeof(shared) / 4; i += blockDim.x) words[i] = 0xffffffff;
  __syncthreads();
  for (int i = threadIdx.x; i < 64 * kK; i += blockDim.x) {
    const int row = P::kOffsetA + i / kK, k = i % kK;
    kA == Source::mnMajor ? put(shared.a, k, row, a[i]) : put(shared.a, row, k, a[i]);
  }
  for (int i = threadIdx.x; i < kK * kN; i += blockDim.x) {
    const int k = i / kN, col = P::kOffsetB + i % kN;
    kB == Source::mnMajor ? put(shared.b, k, col, b[i]) : put(shared.b, col, k, b[i]);
  }
  tile::tma::fence_writes();
  __syncthreads();

  tile::RegisterTile<float, 64, kN> sum;
  const auto place = [](int k) {
    return tile::fragment_row(k / 2 % 2) * kN + tile::fragment_col(k / 4) + k % 2;
  };
#pragma unroll
  for (int k = 0; k < kN / 2; ++k) sum.data[k] = d[place(k)];

  const auto operand_b = [&] {
    if constexpr (kB == Source::kMajor) return tile::k_major<kN>(shared.b, P::kOffsetB);
    if constexpr (kB == Source::mnMajor) return tile::mn_major<kN>(shared.b, P::kOffsetB);
  }();
  if constexpr (kA == Source::kRegisters) {
    tile::RegisterTile<T, 64, kK> rows;
    tile::load(rows, shared.a, P::kOffsetA);
    tile::mma_fence(sum);
    tile::mma(sum, rows, operand_b, accumulate);
  } else if constexpr (kA == Source::kMajor) {
    tile::mma_fence(sum);
    tile::mma(sum, tile::k_major<64>(shared.a, P::kOffsetA), operand_b, accumulate);
  } else {
    tile::mma_fence(sum);
    tile::mma(sum, tile::mn_major<64>(shared.a, P::kOffsetA), operand_b, accumulate);
  }
  tile::mma_commit();
  tile::mma_wait<0>(sum);
#pragma unroll
  for (int k = 0; k < kN / 2; ++k) d[place(k)] = sum.data[k];
}

template <class T>
using Kernel = void (*)(const T*, const T*, float*, bool);

template <class T>
void test_kernel(Kernel<T> kernel, int shared_bytes, int N, Source source_a, Source source_b) {
  constexpr const char* kNames[] = {"k-major", "mn-major", "registers"};
  const std::string name = std::string(tile::ElementType<T>::kName) + ", N " + std::to_string(N) +
                           ", A " + kNames[static_cast<int>(source_a)] + ", B " +
                           kNames[static_cast<int>(source_b)];
  const auto a = test::integers<T>(64 * kK, N);
  const auto b = test::integers<T>(kK * N, N + 1);
  const auto start = test::integers<float>(64 * N, N + 2, 1000);
  std::vector<float> product(64 * N, 0.0f);
  for (int row = 0; row < 64; ++row) {
    for (int k = 0; k < kK; ++k) {
      const float x = test::to_float(a[row * kK + k]);
      for (int col = 0; col < N; ++col) {
        product[row * N + col] += x * test::to_float(b[k * N + col]);
      }
    }
  }
  const test::Array<T> in_a(a), in_b(b);
  for (const bool accumulate : {false, true}) {
    std::vector<float> wanted = product;
    if (accumulate) {
      for (size_t i = 0; i < wanted.size(); ++i) wanted[i] += start[i];
    }
    // Without accumulation D begins as NaN, which must not matter.
    const test::Array<float> poisoned(start.size()), started(start);
    const auto& d = accumulate ? started : poisoned;
    test::check(launch(kernel, 1, 128, shared_bytes, nullptr, in_a.data(), in_b.data(), d.data(),
                       accumulate),
                name);
    test::synchronize(name);
    test::compare(name + (accumulate ? ", accumulated" : ""), d.host(), wanted, N);
  }
}

template <class T, int kN, Source kA, Source kB>
void test_product() {
  constexpr int kBytes = sizeof(typename Product<T, kN, kA, kB>::Storage);
  test_kernel<T>(mma_kernel<T, kN, kA, kB>, kBytes, kN, kA, kB);
}

template <class T, int kN>
void test_sources() {
  test_product<T, kN, Source::kMajor, Source::kMajor>();
  test_product<T, kN, Source::kMajor, Source::mnMajor>();
  test_product<T, kN, Source::mnMajor, Source::kMajor>();
  test_product<T, kN, Source::mnMajor, Source::mnMajor>();
  test_product<T, kN, Source::kRegisters, Source::kMajor>();
  test_product<T, kN, Source::kRegisters, Source::mnMajor>();
}

// N of 16, 32 ... 256. All sources at a few; at the rest each source once, as only N differs.
template <int... kSixteenths>
void test_widths(std::integer_sequence<int, kSixteenths...>) {
  (test_product<tile::bf16, 16 * (kSixteenths + 1), Source::kMajor, Source::mnMajor>(), ...);
  (test_product<tile::bf16, 16 * (kSixteenths + 1), Source::kRegisters, Source::kMajor>(), ...);
}

}  // namespace jaxkern

int main() {
  using namespace jaxkern;
  test_widths(std::make_integer_sequence<int, 16>());
  test_sources<tile::bf16, 80>();
  test_sources<tile::bf16, 256>();
  test_sources<tile::f16, 128>();
  return test::finish();
}
