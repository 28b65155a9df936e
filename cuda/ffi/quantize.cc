#include "cuda/ffi/common.h"
#include "cuda/quantize/launch.h"

namespace jaxkern {
namespace {

constexpr auto F32 = ffi::DataType::F32;
constexpr auto BF16 = ffi::DataType::BF16;
constexpr auto F16 = ffi::DataType::F16;
constexpr auto F8E4M3FN = ffi::DataType::F8E4M3FN;
constexpr auto F8E5M2 = ffi::DataType::F8E5M2;
constexpr auto S32 = ffi::DataType::S32;

// One orientation of a matrix, which the caller may leave out: values then have shape [0].
struct Orientation {
  std::string suffix;  // of names in messages
  ffi::AnyBuffer values, scale;

  bool wanted() const { return values.dimensions().size() != 1; }
  void* values_data() const { return wanted() ? values.untyped_data() : nullptr; }
  float* scale_data(Scaling scaling) const {
    return wanted() && scaling != Scaling::kTensor ? static_cast<float*>(scale.untyped_data())
                                                   : nullptr;
  }

  void check(Checks& checks, Scaling scaling, bool wanted, ffi::DataType format, int64_t rows,
             int64_t cols) const {
    const std::string values_name = "values" + suffix, scale_name = "scale" + suffix;
    checks.dtype(scale_name, scale, {F32});
    if (!wanted) {
      checks.shape(values_name, values, {0}).shape(scale_name, scale, {0});
      return;
    }
    checks.shape(values_name, values, {rows, cols}).dtype(values_name, values, {format});
    switch (scaling) {
      case Scaling::kTensor:
        checks.shape(scale_name, scale, {0});
        break;
      case Scaling::kRow:
        checks.shape(scale_name, scale, {rows});
        break;
      case Scaling::kBlock1x128:
        checks.shape(scale_name, scale, {scale_blocks(cols), padded_scale_row(rows)});
        break;
      case Scaling::kBlock128x128:
        checks.shape(scale_name, scale, {scale_blocks(rows), scale_blocks(cols)});
        break;
    }
  }
};

// The results of one matrix.
struct Output {
  Orientation natural, transposed;
  ffi::AnyBuffer workspace;
};

struct Input {
  const char* name;
  ffi::AnyBuffer data;
};

// What kRmsNorm has beside x.
struct Norm {
  ffi::AnyBuffer weight, rstd_in, rstd;  // of the last two one has shape [0]
  float epsilon;

  void check(Checks& checks, QuantizeParams& params) const {
    const bool given = rstd_in.element_count() != 0;
    checks.shape("weight", weight, {params.cols})
        .dtype("weight", weight, {F32})
        .shape("rstd_in", rstd_in, {given ? params.rows : 0})
        .dtype("rstd_in", rstd_in, {F32})
        .shape("rstd", rstd, {given ? 0 : params.rows})
        .dtype("rstd", rstd, {F32});
    params.weight = static_cast<const float*>(weight.untyped_data());
    params.rstd_in = given ? static_cast<const float*>(rstd_in.untyped_data()) : nullptr;
    params.rstd = given ? nullptr : static_cast<float*>(rstd.untyped_data());
    params.epsilon = epsilon;
  }
};

// What all handlers do. Only kMatrix has a scale_in, and only kRmsNorm a norm.
ffi::Error quantize_source(const char* op, cudaStream_t stream, QuantizeSource source,
                           std::initializer_list<Input> inputs, const ffi::AnyBuffer* scale_in,
                           std::initializer_list<Output> outputs, int32_t scaling_number,
                           const Norm* norm = nullptr) {
  Checks checks(op);
  const auto& [first_name, x] = *inputs.begin();
  const int least = scale_in != nullptr ? 0 : 1;  // 0 is kTensor
  checks.rank(first_name, x, 2)
      .dtype(first_name, x, {F32, BF16, F16})
      .that(least <= scaling_number && scaling_number <= 3, "scaling",
            "is " + std::to_string(scaling_number), std::to_string(least) + " to 3");
  if (checks.failed()) return checks.error();
  const auto scaling = static_cast<Scaling>(scaling_number);
  const int64_t rows = x.dimensions()[0], cols = x.dimensions()[1];
  const auto& [natural, transposed, _] = *outputs.begin();
  const bool has_natural = natural.wanted(), has_transposed = transposed.wanted();
  const ffi::AnyBuffer& one = has_natural ? natural.values : transposed.values;
  checks.that(has_natural || has_transposed, "values and values_t", "are empty", "one of them")
      .dtype("values", one, {F8E4M3FN, F8E5M2});

  QuantizeParams params = {};
  params.rows = rows;
  params.cols = cols;
  params.dtype = to_dtype(x.element_type());
  params.format = to_dtype(one.element_type());
  params.scaling = scaling;
  params.source = source;
  if (scale_in != nullptr) {
    checks.dtype("scale_in", *scale_in, {F32})
        .shape("scale_in", *scale_in, {scaling == Scaling::kTensor ? 1 : 0});
    params.scale_in = static_cast<const float*>(scale_in->untyped_data());
  }
  if (norm != nullptr) norm->check(checks, params);
  const void** data = params.inputs;
  for (const auto& [name, input] : inputs) {
    checks.shape(name, input, {rows, cols}).dtype(name, input, {x.element_type()});
    *data++ = input.untyped_data();
  }
  QuantizedMatrix* to = params.outputs;
  for (const auto& [natural, transposed, workspace] : outputs) {
    natural.check(checks, scaling, has_natural, one.element_type(), rows, cols);
    transposed.check(checks, scaling, has_transposed, one.element_type(), cols, rows);
    const int64_t maxima = quantize_workspace(scaling, has_natural, has_transposed, rows, cols);
    const bool ahead = params.rstd != nullptr && computes_rstd_ahead(scaling, has_transposed);
    const int64_t words = maxima + (ahead ? quantize_progress(rows) : 0);
    checks.dtype("workspace", workspace, {S32}).shape("workspace", workspace, {words});
    auto* const workspace_data = static_cast<int32_t*>(workspace.untyped_data());
    if (ahead) params.progress = workspace_data;
    *to++ = {natural.values_data(), natural.scale_data(scaling), transposed.values_data(),
             transposed.scale_data(scaling), workspace_data};
  }
  if (checks.failed() || rows == 0 || cols == 0) return checks.error();
  return launch_error(op, launch_quantize(params, stream));
}

// The results of a matrix as a handler has them.
using Result = ffi::Result<ffi::AnyBuffer>;

Output output(Result values, Result scale, Result values_t, Result scale_t, Result workspace,
              const std::string& of = "") {
  return {{of, *values, *scale}, {of + "_t", *values_t, *scale_t}, *workspace};
}

ffi::Error quantize(cudaStream_t stream, ffi::AnyBuffer x, ffi::AnyBuffer scale_in, Result values,
                    Result scale, Result values_t, Result scale_t, Result workspace,
                    int32_t scaling) {
  return quantize_source("quantize", stream, QuantizeSource::kMatrix, {{"x", x}}, &scale_in,
                         {output(values, scale, values_t, scale_t, workspace)}, scaling);
}

ffi::Error quantize_swiglu(cudaStream_t stream, ffi::AnyBuffer gate, ffi::AnyBuffer up,
                           Result values, Result scale, Result values_t, Result scale_t,
                           Result workspace, int32_t scaling) {
  return quantize_source("quantize_swiglu", stream, QuantizeSource::kSwiglu,
                         {{"gate", gate}, {"up", up}}, nullptr,
                         {output(values, scale, values_t, scale_t, workspace)}, scaling);
}

ffi::Error quantize_swiglu_grad(cudaStream_t stream, ffi::AnyBuffer gate, ffi::AnyBuffer up,
                                ffi::AnyBuffer dh, Result values, Result scale, Result values_t,
                                Result scale_t, Result workspace, Result up_values, Result up_scale,
                                Result up_values_t, Result up_scale_t, Result up_workspace,
                                int32_t scaling) {
  return quantize_source(
      "quantize_swiglu_grad", stream, QuantizeSource::kSwigluGrad,
      {{"gate", gate}, {"up", up}, {"dh", dh}}, nullptr,
      {output(values, scale, values_t, scale_t, workspace),
       output(up_values, up_scale, up_values_t, up_scale_t, up_workspace, " of up")},
      scaling);
}

ffi::Error quantize_rms_norm(cudaStream_t stream, ffi::AnyBuffer x, ffi::AnyBuffer weight,
                             ffi::AnyBuffer rstd_in, Result values, Result scale, Result values_t,
                             Result scale_t, Result workspace, Result rstd, int32_t scaling,
                             float epsilon) {
  const Norm norm = {weight, rstd_in, *rstd, epsilon};
  return quantize_source("quantize_rms_norm", stream, QuantizeSource::kRmsNorm, {{"x", x}}, nullptr,
                         {output(values, scale, values_t, scale_t, workspace)}, scaling, &norm);
}

// --- Four bits -----------------------------------------------------------------------------------

struct Types {
  ffi::DataType values, scale;
};
// By FourBitFormat.
constexpr Types kTypes[] = {
    {ffi::DataType::F4E2M1FN, F8E4M3FN},
    {ffi::DataType::F4E2M1FN, ffi::DataType::F8E8M0FNU},
    {ffi::DataType::S4, BF16},
};

ffi::Error quantize_four_bit(cudaStream_t stream, ffi::AnyBuffer x, ffi::AnyBuffer tensor_scale,
                             Result values, Result scale, Result zero_point, int32_t format) {
  constexpr char kOp[] = "quantize_four_bit";
  Checks checks(kOp);
  checks.rank("x", x, 3)
      .dtype("x", x, {F32, BF16, F16})
      .rank("scale", *scale, 3)
      .that(0 <= format && format <= 2, "format", "is " + std::to_string(format), "0 to 2");
  if (checks.failed()) return checks.error();
  const auto which = static_cast<FourBitFormat>(format);
  const bool is_int4 = which == FourBitFormat::kInt4;
  const int64_t M = x.dimensions()[0], R = x.dimensions()[1], C = x.dimensions()[2];
  const int64_t blocks = scale->dimensions()[2], block = blocks == 0 ? 0 : C / blocks;
  const bool known = is_int4 ? block == 32 || block == 64 || block == 128
                             : block == (which == FourBitFormat::kNvfp4 ? 16 : 32);
  checks
      .that(known && blocks * block == C, "scale", "has shape " + shape_text(scale->dimensions()),
            "blocks of the format")
      .shape("scale", *scale, {M, R, blocks})
      .dtype("scale", *scale, {kTypes[format].scale})
      .shape("values", *values, {M, R, C})
      .dtype("values", *values, {kTypes[format].values})
      .shape("tensor_scale", tensor_scale, {which == FourBitFormat::kNvfp4 ? M : 0})
      .dtype("tensor_scale", tensor_scale, {F32})
      .dtype("zero_point", *zero_point, {ffi::DataType::S4});
  const bool has_zero_point = is_int4 && zero_point->dimensions().size() == 3;
  if (has_zero_point) {
    checks.shape("zero_point", *zero_point, {1, R, blocks});
  } else {
    checks.shape("zero_point", *zero_point, {0});
  }
  if (checks.failed() || x.element_count() == 0) return checks.error();

  QuantizeFourBitParams params = {};
  params.x = x.untyped_data();
  if (which == FourBitFormat::kNvfp4) {
    params.tensor_scale = static_cast<const float*>(tensor_scale.untyped_data());
  }
  params.values = values->untyped_data();
  params.scale = scale->untyped_data();
  params.zero_point = has_zero_point ? zero_point->untyped_data() : nullptr;
  params.matrices = M;
  params.size = R * C;
  params.block = static_cast<int32_t>(block);
  params.dtype = to_dtype(x.element_type());
  params.format = which;
  return launch_error(kOp, launch_quantize_four_bit(params, stream));
}

ffi::Error row_amax(cudaStream_t stream, ffi::AnyBuffer x, Result amax) {
  Checks checks("row_amax");
  checks.rank("x", x, 2).dtype("x", x, {F32, BF16, F16});
  if (checks.failed()) return checks.error();
  const int64_t rows = x.dimensions()[0], cols = x.dimensions()[1];
  checks.that(cols % 16 == 0, "x", "has " + std::to_string(cols) + " columns", "a multiple of 16")
      .shape("amax", *amax, {rows})
      .dtype("amax", *amax, {F32});
  if (checks.failed() || x.element_count() == 0) return checks.error();
  const RowAmaxParams params = {x.untyped_data(), static_cast<float*>(amax->untyped_data()), rows,
                                cols, to_dtype(x.element_type())};
  return launch_error("row_amax", launch_row_amax(params, stream));
}

// The results of a matrix: values, scale, values_t, scale_t, workspace.
template <class Binding>
auto with_output(Binding&& binding) {
  return std::move(binding)
      .template Ret<ffi::AnyBuffer>()
      .template Ret<ffi::AnyBuffer>()
      .template Ret<ffi::AnyBuffer>()
      .template Ret<ffi::AnyBuffer>()
      .template Ret<ffi::AnyBuffer>();
}

}  // namespace

JAXKERN_DEFINE_HANDLER(Quantize, quantize,
                       with_output(ffi::Ffi::Bind()
                                       .Ctx<Stream>()
                                       .Arg<ffi::AnyBuffer>()   // x
                                       .Arg<ffi::AnyBuffer>())  // scale_in
                           .Attr<int32_t>("scaling"));

JAXKERN_DEFINE_HANDLER(QuantizeSwiglu, quantize_swiglu,
                       with_output(ffi::Ffi::Bind()
                                       .Ctx<Stream>()
                                       .Arg<ffi::AnyBuffer>()   // gate
                                       .Arg<ffi::AnyBuffer>())  // up
                           .Attr<int32_t>("scaling"));

JAXKERN_DEFINE_HANDLER(QuantizeSwigluGrad, quantize_swiglu_grad,
                       with_output(with_output(ffi::Ffi::Bind()
                                                   .Ctx<Stream>()
                                                   .Arg<ffi::AnyBuffer>()    // gate
                                                   .Arg<ffi::AnyBuffer>()    // up
                                                   .Arg<ffi::AnyBuffer>()))  // dh
                           .Attr<int32_t>("scaling"));

JAXKERN_DEFINE_HANDLER(QuantizeRmsNorm, quantize_rms_norm,
                       with_output(ffi::Ffi::Bind()
                                       .Ctx<Stream>()
                                       .Arg<ffi::AnyBuffer>()   // x
                                       .Arg<ffi::AnyBuffer>()   // weight
                                       .Arg<ffi::AnyBuffer>())  // rstd_in
                           .Ret<ffi::AnyBuffer>()               // rstd
                           .Attr<int32_t>("scaling")
                           .Attr<float>("epsilon"));

JAXKERN_DEFINE_HANDLER(QuantizeFourBit, quantize_four_bit,
                       ffi::Ffi::Bind()
                           .Ctx<Stream>()
                           .Arg<ffi::AnyBuffer>()  // x
                           .Arg<ffi::AnyBuffer>()  // tensor_scale
                           .Ret<ffi::AnyBuffer>()  // values
                           .Ret<ffi::AnyBuffer>()  // scale
                           .Ret<ffi::AnyBuffer>()  // zero_point
                           .Attr<int32_t>("format"));

JAXKERN_DEFINE_HANDLER(RowAmax, row_amax,
                       ffi::Ffi::Bind()
                           .Ctx<Stream>()
                           .Arg<ffi::AnyBuffer>()    // x
                           .Ret<ffi::AnyBuffer>());  // amax

}  // namespace jaxkern
