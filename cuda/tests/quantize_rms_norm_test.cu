// The source RmsNorm of cuda/quantize against a scalar loop, bit by bit.
#include "cuda/tests/quantize_cases.h"

namespace jaxkern {

// rstd given, and computed: then with the bits that a first call finds, which are about right, in
// every orientation and with every scaling.
template <class T>
void test_rms_norm(const char* dtype, int rows, int cols, int shift = 0) {
  std::mt19937 random(rows * 41 + cols);
  const auto draw = [&](int size) {
    Matrix x = {1, size, {}};
    for (int i = 0; i < size; ++i) {
      x.data.push_back(
          std::ldexp(static_cast<float>(random() % 4096 + 1), -12 - int(random() % 4)));
    }
    return x;
  };
  constexpr float kEpsilon = 0.25f;
  const Matrix weight = draw(cols);
  const auto weight_in = placed<float>(weight, shift);
  for (const Input input : {Input::kMixed, Input::kSwitching, Input::kNotFinite}) {
    const bool given = input != Input::kSwitching;
    const auto name = std::string("rms_norm ") + dtype + " " + std::to_string(rows) + "x" +
                      std::to_string(cols) + (given ? ", rstd given" : "") +
                      (input == Input::kNotFinite ? ", not finite" : "");
    const Matrix x = make_input<T>(rows, cols, input);
    Matrix rstd = draw(rows);
    const auto rstd_in = placed<float>(rstd, shift);
    const Buffer rstd_out(sizeof(float) * rows, 4 * shift);
    QuantizeParams params = {};
    params.weight = weight_in.data() + shift;
    params.rstd_in = given ? rstd_in.data() + shift : nullptr;
    params.rstd = given ? nullptr : rstd_out.data<float>();
    params.epsilon = kEpsilon;
    if (!given) {
      QuantizeParams first = params;
      const auto x_in = placed<T>(x, shift);
      const Buffer values(x.data.size(), 0), scale(sizeof(float) * rows, 0);
      first.inputs[0] = x_in.data() + shift;
      first.outputs[0].values = values.data();
      first.outputs[0].scale = scale.data<float>();
      first.rows = rows;
      first.cols = cols;
      first.dtype = kDType<T>;
      first.format = kE4M3.dtype;
      first.scaling = Scaling::kRow;
      test::check(quantize::launch_source<quantize::RmsNorm>(first, nullptr), name);
      rstd.data = rstd_out.host<float>(name + ": rstd");
      rstd_out.poison();
      std::vector<float> ratios, ones(rows, 1.0f);
      for (int r = 0; r < rows; ++r) {
        double sum = 0;
        for (int c = 0; c < cols; ++c) sum += std::pow(double(x.data[size_t(r) * cols + c]), 2);
        ratios.push_back(rstd.data[r] * std::sqrt(sum / cols + kEpsilon));
      }
      test::compare(name + ": rstd", ratios, ones, rows, 1e-5f);
    }
    Matrix z = x;
    for (size_t i = 0; i < z.data.size(); ++i) {
      const float normal = x.data[i] * rstd.data[i / cols];
      z.data[i] = test::round_to<T>(normal * weight.data[i % cols]);
    }
    const auto check_rstd = [&](const std::string& what) {
      if (given) return;
      test::compare(what + ": rstd", rstd_out.host<float>(what + ": rstd"), rstd.data, rows);
      rstd_out.poison();
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
  test_rms_norm<T>(dtype, 256, 384);
  test_rms_norm<T>(dtype, 3, 5);
  test_rms_norm<T>(dtype, 257, 1000);
  test_rms_norm<T>(dtype, 144, 136);
  test_rms_norm<T>(dtype, 3, 40000);
  test_rms_norm<T>(dtype, 130, 200, 1);
}

}  // namespace jaxkern

int main() {
  using namespace jaxkern;
  test_dtype<tile::bf16>("bf16");
  test_dtype<tile::f16>("f16");
  test_dtype<float>("f32");
  return test::finish();
}
