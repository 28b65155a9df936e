// cuda/quantize against a scalar loop, bit by bit: all groups and orientations, at sizes that tiles
// and vectors do not divide, from all types; SwiGLU from two, to save the compiler's time.
// quantize_rms_norm_test has RmsNorm.
#include "cuda/tests/quantize_cases.h"

namespace jaxkern {

template <class T>
void test_size(const char* dtype, int rows, int cols, int shift = 0) {
  static constexpr const char* kInputs[] = {"mixed", "switching", "not finite"};
  static constexpr const char* kScalings[] = {"tensor", "row", "1x128", "128x128"};
  const auto size = std::to_string(rows) + "x" + std::to_string(cols);
  for (const Input input : {Input::kMixed, Input::kSwitching, Input::kNotFinite}) {
    const Matrix x = make_input<T>(rows, cols, input);
    for (const Format& f : {kE4M3, kE5M2}) {
      for (const Scaling scaling :
           {Scaling::kTensor, Scaling::kRow, Scaling::kBlock1x128, Scaling::kBlock128x128}) {
        const auto name = std::string(dtype) + " " + size + " " + kInputs[int(input)] + " to " +
                          f.name + ", " + kScalings[int(scaling)];
        const float scale_in = input == Input::kSwitching ? 0.37f : 0x1p-7f;
        test_case<T>(name, {x}, {x}, scaling, f, scale_in, shift);
        if (scaling == Scaling::kTensor && input == Input::kMixed) {
          test_case<T>(name + " of NaN", {x}, {x}, scaling, f, NAN, shift);
        }
      }
    }
  }
}

// Sources of several inputs. The sigmoid is exactly 0, 0.5 or 1 at the gates used here, so that
// everything else is tested bit by bit; test_sigmoid has the numbers between.
template <class T>
void test_swiglu(const char* dtype, int rows, int cols, int shift = 0) {
  std::mt19937 random(rows * 37 + cols);
  Matrix gate = make_input<T>(rows, cols, Input::kMixed);
  for (float& value : gate.data) {
    const float sizes[] = {0.0f, -128.0f, 64.0f, 32.0f + random() % 256};
    value = test::round_to<T>(sizes[random() % 4]);
  }
  Matrix up = make_input<T>(rows, cols, Input::kSwitching), dh = up;
  std::shuffle(dh.data.begin(), dh.data.end(), random);
  up.data[random() % up.data.size()] = NAN;
  Matrix h = up, dgate = up, dup = up;
  for (size_t i = 0; i < h.data.size(); ++i) {
    const float g = gate.data[i], u = up.data[i], d = dh.data[i];
    const float s = g == 0 ? 0.5f : g > 0 ? 1.0f : 0.0f;
    h.data[i] = test::round_to<T>(g * s * u);
    dgate.data[i] = test::round_to<T>(d * u * (s * (1.0f + g * (1.0f - s))));
    dup.data[i] = test::round_to<T>(d * (g * s));
  }
  for (const Format& f : {kE4M3, kE5M2}) {
    for (const Scaling scaling : {Scaling::kRow, Scaling::kBlock1x128, Scaling::kBlock128x128}) {
      const auto name = std::string(dtype) + " " + std::to_string(rows) + "x" +
                        std::to_string(cols) + " to " + f.name + ", scaling " +
                        std::to_string(int(scaling));
      test_case<T, quantize::Swiglu>("swiglu " + name, {gate, up}, {h}, scaling, f, 0, shift);
      test_case<T, quantize::SwigluGrad>("swiglu grad " + name, {gate, up, dh}, {dgate, dup},
                                         scaling, f, 0, shift);
    }
  }
}

__global__ void sigmoid_kernel(const float* x, float* y, int size) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < size) y[i] = quantize::sigmoid(x[i]);
}

void test_sigmoid() {
  std::vector<float> x, wanted;
  for (int i = -80 * 1024; i <= 80 * 1024; ++i) {
    x.push_back(i / 1024.0f);
    wanted.push_back(1.0);
  }
  const int size = static_cast<int>(x.size());
  const test::Array<float> in(x), out(x.size());
  sigmoid_kernel<<<tile::ceil_div(size, 256), 256>>>(in.data(), out.data(), size);
  test::synchronize("sigmoid");
  std::vector<float> ratios = out.host();
  for (int i = 0; i < size; ++i) ratios[i] *= 1.0 + std::exp(-double(x[i]));
  // The argument of the power is rounded: at -80 that is 2^-24 of 115.
  test::compare("sigmoid", ratios, wanted, size, 1e-5f);
}

template <class T>
void test_dtype(const char* dtype) {
  test_size<T>(dtype, 128, 128);  // one tile
  test_size<T>(dtype, 256, 384);  // six
  test_size<T>(dtype, 1, 1);
  test_size<T>(dtype, 3, 5);
  test_size<T>(dtype, 64, 16);     // aligned, less than a tile
  test_size<T>(dtype, 1000, 8);    // transposed rows are no multiples of 16 bytes
  test_size<T>(dtype, 130, 200);   // a little more than a tile
  test_size<T>(dtype, 144, 136);   // the same, all aligned
  test_size<T>(dtype, 257, 1000);  // x aligned, rows of the transpose odd
  test_size<T>(dtype, 144, 131);   // the other way round
  test_size<T>(dtype, 3, 40000);   // wider than the registers of a block
  test_size<T>(dtype, 3, 40001);
  test_size<T>(dtype, 256, 384, 1);  // sizes are aligned, arrays are not
  test_size<T>(dtype, 130, 200, 1);
}

template <class T>
void test_swiglu_sizes(const char* dtype) {
  test_swiglu<T>(dtype, 256, 384);
  test_swiglu<T>(dtype, 3, 5);
  test_swiglu<T>(dtype, 257, 1000);
  test_swiglu<T>(dtype, 144, 136);
  test_swiglu<T>(dtype, 3, 40000);
  test_swiglu<T>(dtype, 130, 200, 1);
}

// Scales of columns of matrices of many tiles, to one format.
template <class T>
void test_columns(const char* dtype, int rows, int cols) {
  const auto name = std::string(dtype) + " " + std::to_string(rows) + "x" + std::to_string(cols);
  const Matrix x = make_input<T>(rows, cols, Input::kMixed);
  test_case<T>("columns of " + name, {x}, {x}, Scaling::kRow, kE4M3, 0, 0);
  Matrix gate = x;  // silu(128) is 128
  for (float& value : gate.data) value = 128.0f;
  const Matrix up = make_input<T>(rows, cols, Input::kSwitching);
  Matrix h = up;
  for (float& value : h.data) value = test::round_to<T>(value * 128.0f);
  test_case<T, quantize::Swiglu>("columns of swiglu " + name, {gate, up}, {h}, Scaling::kRow, kE4M3,
                                 0, 0);
}

}  // namespace jaxkern

int main() {
  using namespace jaxkern;
  test_sigmoid();
  test_dtype<tile::bf16>("bf16");
  test_dtype<tile::f16>("f16");
  test_dtype<float>("f32");
  test_swiglu_sizes<tile::bf16>("bf16");
  test_swiglu_sizes<float>("f32");
  test_columns<tile::bf16>("bf16", 260, 25728);  // more tiles than a GPU has at a time
  test_columns<tile::bf16>("bf16", 40000, 72);   // of one column of them, too
  test_columns<float>("f32", 260, 25728);
  return test::finish();
}
