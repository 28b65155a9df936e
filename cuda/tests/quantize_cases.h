// Quantisation by a scalar loop, and cases of the kernels that are compared with it bit by bit.
#pragma once

#include <functional>
#include <memory>

#include "cuda/quantize/quantize.h"
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
    poison();
  }
  void poison() const {
    test::check(cudaMemset(all_.data(), kPoison, shift_ + bytes_ + kGuard), "cudaMemset");
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
        workspace(
            sizeof(int32_t) * quantize_workspace(scaling, has_natural, has_transposed, rows, cols),
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
               int shift, const QuantizeParams& others = {},
               const std::function<void(const std::string&)>& check_others = {}) {
  std::vector<std::unique_ptr<test::Array<T>>> in;
  for (const Matrix& x : inputs) in.emplace_back(new test::Array<T>(placed<T>(x, shift)));
  const test::Array<float> scale_array(std::vector<float>{scale_in});
  for (const int wanted : {1, 2, 3}) {
    const bool has_natural = wanted & 1, has_transposed = wanted & 2;
    const std::string what = name + (has_natural ? " natural" : "") +
                             (has_transposed ? " transposed" : "") + (shift ? ", not aligned" : "");
    QuantizeParams params = others;
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
    test::check(quantize::launch_format<Source, T>(params, nullptr), what);
    test::synchronize(what);
    for (size_t o = 0; o < outputs.size(); ++o) {
      results[o]->check(what + (o > 0 ? " (second matrix)" : ""), f);
    }
    if (check_others) check_others(what);
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

}  // namespace jaxkern
