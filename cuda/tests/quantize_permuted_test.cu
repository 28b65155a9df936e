// Rows as products of e4m3 with weights of four bits take them, against a scalar loop.
#include "cuda/quantize/quantize_permuted.h"

#include "cuda/tests/test.h"

namespace jaxkern {
namespace {

using tile::bf16, tile::e4m3, tile::f16;

constexpr size_t kGuard = 1024;  // elements, NaN, behind x and the results

template <class T>
constexpr DType kDType = std::is_same_v<T, float>  ? DType::kFloat32
                         : std::is_same_v<T, bf16> ? DType::kBFloat16
                                                   : DType::kFloat16;

template <class T>
void test_rows(std::string what, int64_t rows, int64_t cols) {
  const int64_t wide = tile::ceil_div(cols, 128) * 128;
  what += ", rows " + std::to_string(rows) + ", columns " + std::to_string(cols);
  std::mt19937 random(static_cast<unsigned>(rows + cols));
  std::normal_distribution<float> normal;
  std::vector<T> x(rows * cols);
  std::vector<float> values, scales;
  for (int64_t row = 0; row < rows; ++row) {
    T* const of_row = x.data() + row * cols;
    const float size = std::ldexp(1.0f, static_cast<int>(row % 9) - 8);
    for (int64_t col = 0; col < cols; ++col) of_row[col] = static_cast<T>(size * normal(random));
    if (row % 7 == 3) std::fill(of_row, of_row + cols, static_cast<T>(0.0f));
    if (row % 7 == 5) of_row[cols - 1] = static_cast<T>(row % 2 ? INFINITY : NAN);
    float amax = 0.0f;
    bool finite = true;
    for (int64_t col = 0; col < cols; ++col) {
      const float magnitude = std::fabs(test::to_float(of_row[col]));
      finite = finite && std::isfinite(magnitude);
      if (finite) amax = std::max(amax, magnitude);
    }
    float scale = 0x1p-126f;
    while (amax / scale > 448.0f) scale *= 2.0f;
    if (!finite) scale = NAN;
    scales.push_back(scale);
    for (int64_t at = 0; at < wide; ++at) {
      const int64_t col = at / 16 * 16 + at % 16 / 4 * 2 + at % 4 / 2 * 8 + at % 2;
      const float value = col < cols ? test::to_float(of_row[col]) / scale : 0.0f * scale;
      values.push_back(test::round_to<e4m3>(value));
    }
  }
  values.insert(values.end(), kGuard, NAN);
  scales.insert(scales.end(), kGuard, NAN);
  std::vector<unsigned char> nan(kGuard * sizeof(T), 0xff);
  x.insert(x.end(), reinterpret_cast<T*>(nan.data()), reinterpret_cast<T*>(nan.data()) + kGuard);

  const test::Array<T> in(x);
  const test::Array<e4m3> out(values.size());
  const test::Array<float> scale(scales.size());
  const QuantizePermutedParams params = {in.data(), out.data(), scale.data(), rows,
                                         cols,      wide,       kDType<T>};
  test::check(quantize::launch_permuted<T>(params, nullptr), what);
  test::synchronize(what);
  test::compare(what + ", values", out.host(), values, wide);
  test::compare(what + ", scales", scale.host(), scales, 1);
}

template <class T>
void test_dtype(const std::string& what) {
  test_rows<T>(what, 1, 16);
  test_rows<T>(what, 33, 128);            // rows that fill no block
  test_rows<T>(what, 70, 1072);           // columns that fill no panel
  test_rows<T>(what, 19, 4096);           // a row of several warps
  test_rows<T>(what, 9, 32 * 1024 + 48);  // more than slots hold
}

}  // namespace
}  // namespace jaxkern

int main() {
  using namespace jaxkern;
  test_dtype<tile::bf16>("bfloat16");
  test_dtype<tile::f16>("float16");
  test_dtype<float>("float32");
  return test::finish();
}
