// The source RmsNorm of cuda/quantize against a scalar loop, bit by bit, from bf16 and float32.
#include "cuda/tests/quantize_cases.h"

namespace jaxkern {

// Positive numbers below 1.
Matrix draw(int size, std::mt19937& random) {
  Matrix x = {1, size, {}};
  for (int i = 0; i < size; ++i) {
    x.data.push_back(std::ldexp(static_cast<float>(random() % 4096 + 1), -12 - int(random() % 4)));
  }
  return x;
}

// rstd that quantising rows leaves in rstd_out, which is poisoned again.
template <class T>
std::vector<float> computed_rstd(const std::string& name, const Matrix& x, QuantizeParams params,
                                 const Buffer& rstd_out) {
  const auto in = placed<T>(x, 0);
  const Buffer values(x.data.size(), 0), scale(sizeof(float) * x.rows, 0);
  params.inputs[0] = in.data();
  params.outputs[0].values = values.data();
  params.outputs[0].scale = scale.data<float>();
  params.rows = x.rows;
  params.cols = x.cols;
  params.dtype = kDType<T>;
  params.format = kE4M3.dtype;
  params.scaling = Scaling::kRow;
  test::check(quantize::launch_format<quantize::RmsNorm, T>(params, nullptr), name);
  std::vector<float> rstd = rstd_out.host<float>(name + ": rstd");
  rstd_out.poison();
  return rstd;
}

// rstd given or computed: then x is of small integers, whose squares have the same sum in any
// order.
template <class T>
void test_size(const char* dtype, int rows, int cols, int shift = 0) {
  std::mt19937 random(rows * 41 + cols);
  constexpr float kEpsilon = 0.25f;
  const Matrix weight = draw(cols, random);
  const auto weight_in = placed<float>(weight, shift);
  for (const Input input : {Input::kMixed, Input::kSwitching, Input::kNotFinite}) {
    const bool given = input != Input::kSwitching;
    const auto name = std::string("rms_norm ") + dtype + " " + std::to_string(rows) + "x" +
                      std::to_string(cols) + (given ? ", rstd given" : "") +
                      (input == Input::kNotFinite ? ", not finite" : "");
    Matrix x = make_input<T>(rows, cols, input), rstd = draw(rows, random);
    if (!given) {
      for (float& value : x.data) value = static_cast<float>(int(random() % 9) - 4);
      for (int r = 0; r < rows; ++r) {
        float sum = 0;
        for (int c = 0; c < cols; ++c) {
          const float value = x.data[size_t(r) * cols + c];
          sum += value * value;
        }
        rstd.data[r] = 1 / std::sqrt(sum / cols + kEpsilon);
      }
    }
    const auto rstd_in = placed<float>(rstd, shift);
    const Buffer rstd_out(sizeof(float) * rows, 4 * shift);
    const Buffer progress(sizeof(int32_t) * quantize_progress(rows), 0);
    QuantizeParams params = {};
    params.weight = weight_in.data() + shift;
    params.rstd_in = given ? rstd_in.data() + shift : nullptr;
    params.rstd = given ? nullptr : rstd_out.data<float>();
    params.progress = given ? nullptr : progress.data<int32_t>();
    params.epsilon = kEpsilon;
    if (!given) {
      // The device's reciprocal square root is off by an unit or two of the last place.
      const Matrix wanted = rstd;
      rstd.data = computed_rstd<T>(name, x, params, rstd_out);
      std::vector<float> ratios;
      for (int r = 0; r < rows; ++r) ratios.push_back(rstd.data[r] / wanted.data[r]);
      test::compare(name + ": rstd", ratios, std::vector<float>(rows, 1.0f), rows, 1e-6f);
    }
    Matrix z = x;
    for (size_t i = 0; i < z.data.size(); ++i) {
      const float normal = x.data[i] * rstd.data[i / cols];
      z.data[i] = test::round_to<T>(normal * weight.data[i % cols]);
    }
    const auto check_rstd = [&](const std::string& what) {
      if (given) return;
      test::compare(what + ": rstd", rstd_out.host<float>(what + ": rstd"), rstd.data, rows);
      progress.host(what + ": progress");
      rstd_out.poison();
      progress.poison();
    };
    for (const Format& f : {kE4M3, kE5M2}) {
      for (const Scaling scaling : {Scaling::kRow, Scaling::kBlock1x128, Scaling::kBlock128x128}) {
        test_case<T, quantize::RmsNorm>(
            name + " to " + f.name + ", scaling " + std::to_string(int(scaling)), {x}, {z}, scaling,
            f, 0, shift, params, check_rstd);
      }
    }
  }
}

template <class T>
void test_dtype(const char* dtype) {
  test_size<T>(dtype, 256, 384);
  test_size<T>(dtype, 3, 5);
  test_size<T>(dtype, 257, 1000);
  test_size<T>(dtype, 144, 136);
  test_size<T>(dtype, 3, 40000);   // wider than the registers of a block
  test_size<T>(dtype, 2500, 136);  // more panels than rstd is ahead
  test_size<T>(dtype, 130, 200, 1);
}

}  // namespace jaxkern

int main() {
  using namespace jaxkern;
  test_dtype<tile::bf16>("bf16");
  test_dtype<float>("f32");
  return test::finish();
}
