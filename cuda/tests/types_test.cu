// tile/types.cuh: packing rounds to nearest even, 8-bit types to finite numbers; unpacking of pairs
// inverts it.
#include "cuda/tile/types.cuh"

#include "cuda/host/launch.h"
#include "cuda/tests/test.h"

namespace jaxkern {

static_assert(tile::ceil_div(0, 4) == 0 && tile::ceil_div(1, 4) == 1);
static_assert(tile::ceil_div(4, 4) == 1 && tile::ceil_div(5, 4) == 2);

template <class T>
__global__ void pack_kernel(const float* x, float* y, int pairs) {
  const int i = threadIdx.x;
  if (i >= pairs) return;
  const float2 pair = tile::unpack<T>(tile::pack<T>(x[2 * i], x[2 * i + 1]));
  y[2 * i] = pair.x;
  y[2 * i + 1] = pair.y;
}

template <class T>
void test_pack(const char* name) {
  std::vector<float> x = {0.0f,           -0.0f,          1.0f,   -2.5f,    3.14159274f, 1e-3f,
                          65504.0f,       1e30f,          -1e30f, INFINITY, -INFINITY,   NAN,
                          1.00390625f,    1.01171875f,     // halfway between two bfloat16
                          1.00048828125f, 1.00146484375f,  // halfway between two float16
                          6e-8f,          1e-40f};
  std::vector<float> wanted;
  for (float value : x) wanted.push_back(test::round_to<T>(value));
  const test::Array<float> in(x), out(x.size());
  const int pairs = static_cast<int>(x.size() / 2);
  test::check(launch(pack_kernel<T>, 1, 32, 0, nullptr, in.data(), out.data(), pairs), name);
  test::synchronize(name);
  test::compare(std::string("pack and unpack ") + name, out.host(), wanted, 2);
}

template <class T>
__global__ void pack8_kernel(const float* x, uint32_t* y, int words) {
  const int i = threadIdx.x;
  if (i < words) y[i] = tile::pack<T>(x[4 * i], x[4 * i + 1], x[4 * i + 2], x[4 * i + 3]);
}

// What follows every finite number of the type, halfway to the next one and just beside that, both
// signs, and what lies outside. The oracle searches the 256 numbers there are.
template <class T>
void test_pack8(const char* name, float largest) {
  std::vector<float> numbers;
  for (int code = 0; code < 0x7f; ++code) {
    T number;
    number.__x = static_cast<__nv_fp8_storage_t>(code);
    if (const float x = test::to_float(number); x <= largest) numbers.push_back(x);
  }
  std::vector<float> x = {INFINITY, -INFINITY, NAN, 1e30f, -1e30f, 1e-30f, 2 * largest, -0.0f};
  for (size_t i = 0; i + 1 < numbers.size(); ++i) {
    const float half = (numbers[i] + numbers[i + 1]) / 2;
    for (const float value :
         {numbers[i], half, std::nextafter(half, 0.0f), std::nextafter(half, largest)}) {
      x.push_back(value);
      x.push_back(-value);
    }
  }
  std::vector<float> wanted;
  for (const float value : x) {
    const float size = std::min(std::fabs(value), largest);
    size_t best = 0;
    for (size_t i = 0; i < numbers.size(); ++i) {
      const float error = std::fabs(numbers[i] - size), least = std::fabs(numbers[best] - size);
      if (error < least || (error == least && i % 2 == 0)) best = i;  // codes of even numbers are
    }
    wanted.push_back(std::isnan(value) ? NAN : std::copysign(numbers[best], value));
  }
  while (x.size() % 4 != 0) x.push_back(0.0f), wanted.push_back(0.0f);

  const int words = static_cast<int>(x.size() / 4);
  const test::Array<float> in(x);
  const test::Array<uint32_t> out(words);
  test::check(launch(pack8_kernel<T>, 1, 1024, 0, nullptr, in.data(), out.data(), words), name);
  test::synchronize(name);
  const std::vector<uint32_t> packed = out.host();
  std::vector<float> got;
  for (size_t i = 0; i < x.size(); ++i) {
    T number;
    number.__x = static_cast<__nv_fp8_storage_t>(packed[i / 4] >> (8 * (i % 4)));
    got.push_back(test::to_float(number));
  }
  test::compare(std::string("pack ") + name, got, wanted, 4);
}

}  // namespace jaxkern

int main() {
  jaxkern::test_pack8<jaxkern::tile::e4m3>("e4m3", 448.0f);
  jaxkern::test_pack8<jaxkern::tile::e5m2>("e5m2", 57344.0f);
  jaxkern::test_pack<jaxkern::tile::bf16>("bf16");
  jaxkern::test_pack<jaxkern::tile::f16>("f16");
  return jaxkern::test::finish();
}
