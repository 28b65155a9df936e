// tile/mma.cuh: products at every width, of every type and from every kind of operand, with and
// without accumulation. A is (64, kK), B is (kK, kN); both lie at an offset in a larger shared tile
// whose other elements are NaN.
#include "cuda/tile/mma.cuh"

#include "cuda/host/launch.h"
#include "cuda/tests/test.h"
#include "cuda/tile/tma.cuh"

namespace jaxkern {

enum class Source { kMajor, mnMajor, kRegisters };

template <class TA, class TB, int kN, Source kA, Source kB>
struct Product {
  static constexpr int kK = 256 / sizeof(TA);  // two panels of a k-major tile
  static constexpr int kPaddedN = tile::ceil_div(kN, 64) * 64;
  static constexpr int kOffsetA = 64;
  static constexpr int kOffsetB = kB == Source::kMajor ? 8 : 64;
  template <class T, bool kTransposed, int kRows, int kCols>
  using Tile = tile::SharedTile<T, kTransposed ? kCols : kRows, kTransposed ? kRows : kCols>;
  using TileA = Tile<TA, kA == Source::mnMajor, 64 + kOffsetA, kK>;
  using TileB = Tile<TB, kB == Source::mnMajor, kB == Source::mnMajor ? kPaddedN + 64 : kN + 8, kK>;
  struct Storage {
    TileA a[2];  // the second is the operand
    TileB b;
  };
};

template <class Tile, class T>
__device__ void put(Tile& y, int row, int col, T value) {
  constexpr int kChunk = 16 / sizeof(T);
  reinterpret_cast<T*>(y.chunk(row, col / kChunk * kChunk))[col % kChunk] = value;
}

template <class TA, class TB, int kN, Source kA, Source kB>
__global__ void __launch_bounds__(128, 1)
    mma_kernel(const TA* a, const TB* b, float* d, bool accumulate) {
  using P = Product<TA, TB, kN, kA, kB>;
  constexpr int kK = P::kK;
  auto& shared = tile::shared_storage<typename P::Storage>();
  uint32_t* words = reinterpret_cast<uint32_t*>(&shared);
  for (size_t i = threadIdx.x; i < sizeof(shared) / 4; i += blockDim.x) words[i] = 0xffffffff;
  __syncthreads();
  for (int i = threadIdx.x; i < 64 * kK; i += blockDim.x) {
    const int row = P::kOffsetA + i / kK, k = i % kK;
    kA == Source::mnMajor ? put(shared.a[1], k, row, a[i]) : put(shared.a[1], row, k, a[i]);
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
    tile::RegisterTile<TA, 64, kK> rows;
    tile::load(rows, shared.a[1], P::kOffsetA);
    tile::mma_fence(sum);
    tile::mma(sum, rows, operand_b, accumulate);
  } else if constexpr (kA == Source::kMajor) {
    tile::mma_fence(sum);
    const auto first = tile::settled(tile::k_major<64>(shared.a[0]));
    tile::mma(sum, first.of_tile(1).of_rows(P::kOffsetA), operand_b, accumulate);
  } else {
    tile::mma_fence(sum);
    tile::mma(sum, tile::mn_major<64>(shared.a[1], P::kOffsetA), operand_b, accumulate);
  }
  tile::mma_commit();
  tile::mma_wait<0>(sum);
#pragma unroll
  for (int k = 0; k < kN / 2; ++k) d[place(k)] = sum.data[k];
}

template <class TA, class TB>
using Kernel = void (*)(const TA*, const TB*, float*, bool);

template <class TA, class TB>
void test_kernel(Kernel<TA, TB> kernel, int shared_bytes, int N, int kK, Source source_a,
                 Source source_b) {
  constexpr const char* kNames[] = {"k-major", "mn-major", "registers"};
  const std::string name = "N " + std::to_string(N) + ", A " + tile::ElementType<TA>::kName + " " +
                           kNames[static_cast<int>(source_a)] + ", B " +
                           tile::ElementType<TB>::kName + " " + kNames[static_cast<int>(source_b)];
  const auto a = test::integers<TA>(64 * kK, N);
  const auto b = test::integers<TB>(kK * N, N + 1);
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
  const test::Array<TA> in_a(a);
  const test::Array<TB> in_b(b);
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

template <class TA, int kN, Source kA, Source kB, class TB = TA>
void test_product() {
  using P = Product<TA, TB, kN, kA, kB>;
  test_kernel<TA, TB>(mma_kernel<TA, TB, kN, kA, kB>, sizeof(typename P::Storage), kN, P::kK, kA,
                      kB);
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
  using tile::e4m3;
  (test_product<e4m3, 16 * (kSixteenths + 1), Source::kMajor, Source::kMajor>(), ...);
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
  test_product<tile::e4m3, 128, Source::kMajor, Source::kMajor, tile::e5m2>();
  test_product<tile::e5m2, 128, Source::kMajor, Source::kMajor, tile::e4m3>();
  test_product<tile::e5m2, 128, Source::kMajor, Source::kMajor>();
  return test::finish();
}
