// cuda/quantize against a scalar loop, bit by bit: all sources, groups, orientations and types, at
// sizes that tiles and vectors do not divide.
#include "cuda/quantize/quantize.h"

#include <memory>

#include "cuda/tests/test.h"

namespace jaxkern {

constexpr int kBlock = kScaleBlock;
constexpr int kGuard = 512;  // bytes behind each array
constexpr int kPoison = 0x55;

struct Format {
  const char* name;
  DType dtype;
  float largest;
  int mantissa_bits, least_exponent;
};
constexpr Format kE4M3 = {"e4m3", DType::kFloat8E4M3, 448.0f, 3, -6};
constexpr Format kE5M2 = {"e5m2", DType::kFloat8E5M2, 57344.0f, 2, -14};

constexpr int kNan = 0x7f;  // stands for all the codes of NaN

// The code of x, rounded to nearest even.
int encode(float x, const Format& f) {
  if (std::isnan(x)) return kNan;
  const double size = std::min(std::fabs(x), f.largest);
  const int exponent = size == 0 ? f.least_exponent : std::max(std::ilogb(size), f.least_exponent);
  const int units = static_cast<int>(std::nearbyint(std::ldexp(size, f.mantissa_bits - exponent)));
  return (std::signbit(x) ? 0x80 : 0) |
         (((exponent - f.least_exponent) << f.mantissa_bits) + units);
}

bool is_nan(uint8_t code, const Format& f) {
  return (code & 0x7f) > (f.dtype == DType::kFloat8E4M3 ? 0x7e : 0x7c);
}

struct Matrix {
  int rows, cols;
  std::vector<float> data;

  Matrix transposed() const {
    Matrix t = {cols, rows, std::vector<float>(data.size())};
    for (int r = 0; r < rows; ++r) {
      for (int c = 0; c < cols; ++c) t.data[size_t(c) * rows + r] = data[size_t(r) * cols + c];
    }
    return t;
  }
};

struct Quantized {
  std::vector<int> values;
  std::vector<float> scale;
  std::vector<bool> specified;  // of scale
};

float scale_of(const std::vector<float>& group, const Format& f) {
  float amax = 0;
  for (const float x : group) {
    if (!std::isfinite(x)) return NAN;
    amax = std::max(amax, std::fabs(x));
  }
  int exponent = -126;
  while (std::ldexp(double(amax), -exponent) > f.largest) ++exponent;
  return std::ldexp(1.0f, exponent);
}

Quantized quantized(const Matrix& x, Scaling scaling, const Format& f, float scale_in) {
  const auto [R, C, data] = x;
  const int group_rows = scaling == Scaling::kTensor         ? R
                         : scaling == Scaling::kBlock128x128 ? kBlock
                                                             : 1;
  const int group_cols = scaling == Scaling::kTensor || scaling == Scaling::kRow ? C : kBlock;
  const int row_groups = tile::ceil_div(R, group_rows), col_groups = tile::ceil_div(C, group_cols);
  const bool by_columns = scaling == Scaling::kBlock1x128;
  const int pitch = by_columns ? tile::ceil_div(R, 4) * 4 : col_groups;

  Quantized q;
  q.values.resize(data.size());
  q.scale.resize(scaling == Scaling::kTensor ? 0 : size_t(by_columns ? col_groups : R) * pitch);
  if (scaling == Scaling::kBlock128x128) q.scale.resize(size_t(row_groups) * col_groups);
  q.specified.resize(q.scale.size());
  std::vector<float> group;
  for (int i = 0; i < row_groups; ++i) {
    for (int j = 0; j < col_groups; ++j) {
      const int row_end = std::min(R, (i + 1) * group_rows);
      const int col_end = std::min(C, (j + 1) * group_cols);
      float scale = scale_in;
      if (scaling != Scaling::kTensor) {
        group.clear();
        for (int r = i * group_rows; r < row_end; ++r) {
          const float* row = data.data() + size_t(r) * C;
          group.insert(group.end(), row + j * group_cols, row + col_end);
        }
        scale = scale_of(group, f);
        const size_t at = by_columns ? size_t(j) * pitch + i : size_t(i) * pitch + j;
        q.scale[at] = scale;
        q.specified[at] = true;
      }
      const float inverse = 1.0f / scale;
      for (int r = i * group_rows; r < row_end; ++r) {
        for (int c = j * group_cols; c < col_end; ++c) {
          q.values[size_t(r) * C + c] = encode(data[size_t(r) * C + c] * inverse, f);
        }
      }
    }
  }
  return q;
}

// Bytes on the device, `shift` of them unused, then what is asked for, then a guard.
class Buffer {
 public:
  Buffer(size_t bytes, int shift) : bytes_(bytes), shift_(shift), all_(shift + bytes + kGuard) {
    test::check(cudaMemset(all_.data(), kPoison, shift + bytes + kGuard), "cudaMemset");
  }
  template <class T = uint8_t>
  T* data() const {
    return reinterpret_cast<T*>(all_.data() + shift_);
  }
  // What lies between the guards, which must be as they were.
  template <class T = uint8_t>
  std::vector<T> host(const std::string& what) const {
    const std::vector<uint8_t> all = all_.host();
    size_t intact = 0;
    for (size_t i = 0; i < all.size(); ++i) {
      const bool guard = i < size_t(shift_) || i >= shift_ + bytes_;
      intact += guard && all[i] == kPoison;
    }
    test::expect(intact == size_t(shift_ + kGuard), what + ": bytes around it");
    std::vector<T> copy(bytes_ / sizeof(T));
    if (bytes_ > 0) std::memcpy(copy.data(), all.data() + shift_, bytes_);
    return copy;
  }

 private:
  size_t bytes_;
  int shift_;
  test::Array<uint8_t> all_;
};

void compare(const std::string& what, const Buffer& values, const Buffer& scale,
             const Quantized& wanted, int cols, const Format& f) {
  std::vector<int> codes;
  for (const uint8_t code : values.host(what + " values")) {
    codes.push_back(is_nan(code, f) ? kNan : code);
  }
  test::compare(what + " values", codes, wanted.values, cols);
  std::vector<float> scales = scale.host<float>(what + " scale");
  for (size_t i = 0; i < scales.size(); ++i) {
    if (!wanted.specified[i]) scales[i] = wanted.scale[i];
  }
  test::compare(what + " scale", scales, wanted.scale, cols);
}

template <class T>
constexpr DType kDType = DType::kFloat32;
template <>
constexpr DType kDType<tile::bf16> = DType::kBFloat16;
template <>
constexpr DType kDType<tile::f16> = DType::kFloat16;

// Elements of x as an array, `shift` of them behind its start, NaN around them.
template <class T>
test::Array<T> placed(const Matrix& x, int shift) {
  std::vector<T> elements(shift, T(NAN));
  for (const float value : x.data) elements.push_back(T(value));
  elements.insert(elements.end(), kGuard, T(NAN));
  return test::Array<T>(elements);
}

// The results of one matrix, in memory, and what they should be.
struct Result {
  Result(const Matrix& x, Scaling scaling, const Format& f, float scale_in, bool has_natural,
         bool has_transposed, int shift)
      : rows(x.rows),
        cols(x.cols),
        natural(quantized(x, scaling, f, scale_in)),
        transposed(quantized(x.transposed(), scaling, f, scale_in)),
        values(has_natural ? x.data.size() : 0, shift),
        values_t(has_transposed ? x.data.size() : 0, shift),
        scale(has_natural ? sizeof(float) * natural.scale.size() : 0, 4 * shift),
        scale_t(has_transposed ? sizeof(float) * transposed.scale.size() : 0, 4 * shift),
        workspace(scaling == Scaling::kRow && has_transposed ? sizeof(int32_t) * (rows + cols) : 0,
                  0),
        params{has_natural ? values.data() : nullptr,
               has_natural && scaling != Scaling::kTensor ? scale.data<float>() : nullptr,
               has_transposed ? values_t.data() : nullptr,
               has_transposed && scaling != Scaling::kTensor ? scale_t.data<float>() : nullptr,
               workspace.data<int32_t>()} {}

  void check(const std::string& what, const Format& f) const {
    if (params.values) compare(what + ":", values, scale, natural, cols, f);
    if (params.values_t) compare(what + ": transposed", values_t, scale_t, transposed, rows, f);
    workspace.host(what + ": workspace");
  }

  int rows, cols;
  Quantized natural, transposed;
  Buffer values, values_t, scale, scale_t, workspace;
  QuantizedMatrix params;
};

// The three orientations of one case. `shift`: elements that the arrays are away from alignment.
template <class T, class Source = quantize::Matrix>
void test_case(const std::string& name, const std::vector<Matrix>& inputs,
               const std::vector<Matrix>& outputs, Scaling scaling, const Format& f, float scale_in,
               int shift) {
  std::vector<std::unique_ptr<test::Array<T>>> in;
  for (const Matrix& x : inputs) in.emplace_back(new test::Array<T>(placed<T>(x, shift)));
  const test::Array<float> scale_array(std::vector<float>{scale_in});
  for (const int wanted : {1, 2, 3}) {
    const bool has_natural = wanted & 1, has_transposed = wanted & 2;
    const std::string what = name + (has_natural ? " natural" : "") +
                             (has_transposed ? " transposed" : "") + (shift ? ", not aligned" : "");
    QuantizeParams params = {};
    std::vector<std::unique_ptr<Result>> results;
    for (size_t o = 0; o < outputs.size(); ++o) {
      results.emplace_back(
          new Result(outputs[o], scaling, f, scale_in, has_natural, has_transposed, shift));
      params.outputs[o] = results[o]->params;
    }
    for (size_t i = 0; i < inputs.size(); ++i) params.inputs[i] = in[i]->data() + shift;
    params.scale_in = scaling == Scaling::kTensor ? scale_array.data() : nullptr;
    params.rows = inputs[0].rows;
    params.cols = inputs[0].cols;
    params.dtype = kDType<T>;
    params.format = f.dtype;
    params.scaling = scaling;
    test::check(quantize::launch_source<Source>(params, nullptr), what);
    test::synchronize(what);
    for (size_t o = 0; o < outputs.size(); ++o) {
      results[o]->check(what + (o > 0 ? " (second matrix)" : ""), f);
    }
  }
}

// The number of T that is `steps` after x, a positive one.
template <class T>
float neighbour(float x, int steps) {
  const auto bits = std::bit_cast<quantize::Bits<T>>(T(x));
  return test::to_float(std::bit_cast<T>(static_cast<quantize::Bits<T>>(bits + steps)));
}

enum class Input { kMixed, kSwitching, kNotFinite };

// Numbers of T.
//   kMixed      every 16 columns another magnitude, denormal ones among them; rows, columns and
//               blocks of zeros; outliers
//   kSwitching  every 32 elements or so a number at which scales of groups change, or one beside it
//   kNotFinite  kMixed with a few NaN and infinities
template <class T>
Matrix make_input(int rows, int cols, Input input) {
  constexpr bool kIsF16 = std::is_same_v<T, tile::f16>;
  constexpr int kLeast = kIsF16 ? -24 : -149, kMost = kIsF16 ? 15 : 100;
  std::mt19937 random(rows * 31 + cols);
  auto below = [&](int n) { return static_cast<int>(random() % n); };
  Matrix x = {rows, cols, {}};
  int exponent = 0;
  for (int r = 0; r < rows; ++r) {
    for (int c = 0; c < cols; ++c) {
      const float unit = static_cast<float>(below(1 << 16)) / (1 << 15) - 1.0f;
      if (input == Input::kSwitching) {
        const int k = below(20) - 10;
        const float edge = neighbour<T>(std::ldexp(1.75f, k), below(3) - 1);
        x.data.push_back(below(32) == 0 ? std::copysign(edge, unit) : std::ldexp(unit, k - 12));
        continue;
      }
      if (c % 16 == 0) exponent = below(3) ? below(12) - 6 : kLeast + below(kIsF16 ? 12 : 26);
      float value = std::ldexp(unit, exponent);
      if (below(4096) == 0) value = std::copysign(kIsF16 ? 65504.0f : 1e30f, unit);
      if (below(4096) == 0) value = std::ldexp(unit, below(kMost - kLeast) + kLeast);
      if (r % 7 == 3 || c % 11 == 5 || (r / kBlock + c / kBlock) % 5 == 1) value = 0.0f;
      if (below(16) == 0) value = -0.0f;
      x.data.push_back(value);
    }
  }
  if (input == Input::kNotFinite) {
    const size_t size = x.data.size();
    for (const float value : {NAN, INFINITY, -INFINITY, -NAN}) x.data[random() % size] = value;
  }
  for (float& value : x.data) value = test::to_float(T(value));
  return x;
}

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
  test_swiglu<T>(dtype, 256, 384);
  test_swiglu<T>(dtype, 3, 5);
  test_swiglu<T>(dtype, 257, 1000);
  test_swiglu<T>(dtype, 144, 136);
  test_swiglu<T>(dtype, 3, 40000);
  test_swiglu<T>(dtype, 130, 200, 1);
}

}  // namespace jaxkern

int main() {
  using namespace jaxkern;
  test_sigmoid();
  test_dtype<tile::bf16>("bf16");
  test_dtype<tile::f16>("f16");
  test_dtype<float>("f32");
  return test::finish();
}
