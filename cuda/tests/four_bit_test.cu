// tile/four_bit.cuh: every code in every place of a word.
#include "cuda/tile/four_bit.cuh"

#include "cuda/host/launch.h"
#include "cuda/tests/test.h"

namespace jaxkern {

// y[word][i][half]: value i of a half.
template <class T, bool kIntegers>
__global__ void expand_kernel(const uint32_t* words, float* y) {
  const int i = threadIdx.x + blockIdx.x * blockDim.x;
  uint32_t a[4];
  if constexpr (kIntegers) {
    tile::expand_integers<T>(words[i], a);
  } else {
    tile::expand_e2m1<T>(words[i], a);
  }
  for (int k = 0; k < 4; ++k) {
    const float2 pair = tile::unpack<T>(a[k]);
    y[8 * i + 2 * k] = pair.x;
    y[8 * i + 2 * k + 1] = pair.y;
  }
}

// The bits of a code at the place of value i, from the half's lowest.
uint32_t place_e2m1(uint32_t code, int i) {
  constexpr int kPlaces[4][4] = {{6, 7, 8, 15}, {3, 4, 5, 12}, {0, 1, 2, 9}, {14, 10, 11, 13}};
  uint32_t bits = 0;
  for (int bit = 0; bit < 4; ++bit) bits |= (code >> bit & 1) << kPlaces[i][bit];
  return bits;
}

template <class T, bool kIntegers>
void test_expand(const std::string& what, float scale, float larger) {
  constexpr float kMagnitudes[] = {0.0f, 0.5f, 1.0f, 1.5f, 2.0f, 3.0f, 4.0f, 6.0f};
  constexpr int kWords = 1024;
  std::mt19937 random(1);
  std::vector<uint32_t> words(kWords, 0);
  std::vector<float> wanted;
  for (uint32_t& word : words) {
    for (int k = 0; k < 8; ++k) {
      const uint32_t code = random() % 16;
      const uint32_t bits = kIntegers ? code << 4 * (k / 2) : place_e2m1(code, k / 2);
      word |= bits << 16 * (k % 2);
      const float magnitude = kMagnitudes[code & 7];
      wanted.push_back(kIntegers ? code + larger : (code & 8 ? -magnitude : magnitude) * scale);
    }
  }
  const test::Array<uint32_t> in(words);
  const test::Array<float> out(wanted.size());
  const auto kernel = expand_kernel<T, kIntegers>;
  test::check(launch(kernel, kWords / 128, 128, 0, nullptr, in.data(), out.data()), what);
  test::synchronize(what);
  test::compare(what, out.host(), wanted, 8);
}

}  // namespace jaxkern

int main() {
  using namespace jaxkern;
  test_expand<tile::bf16, false>("e2m1 as bfloat16", 0x1p-126f, 0.0f);
  test_expand<tile::f16, false>("e2m1 as float16", 0x1p-14f, 0.0f);
  test_expand<tile::bf16, true>("integers as bfloat16", 1.0f, 128.0f);
  test_expand<tile::f16, true>("integers as float16", 1.0f, 1024.0f);
  return test::finish();
}
