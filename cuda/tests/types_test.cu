// tile/types.cuh: packing of pairs rounds to nearest even and unpacking inverts it.
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

}  // namespace jaxkern

int main() {
  jaxkern::test_pack<jaxkern::tile::bf16>("bf16");
  jaxkern::test_pack<jaxkern::tile::f16>("f16");
  return jaxkern::test::finish();
}
