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

// One orientation of the result, which the caller may leave out: values then have shape [0].
struct Orientation {
  const char *values_name, *scale_name;
  ffi::AnyBuffer values, scale;
  int64_t rows, cols;

  bool wanted() const { return values.dimensions().size() != 1; }
  void* values_data() const { return wanted() ? values.untyped_data() : nullptr; }
  float* scale_data(Scaling scaling) const {
    return wanted() && scaling != Scaling::kTensor ? static_cast<float*>(scale.untyped_data())
                                                   : nullptr;
  }

  void check(Checks& checks, Scaling scaling) const {
    checks.dtype(scale_name, scale, {F32});
    if (!wanted()) {
      checks.shape(values_name, values, {0}).shape(scale_name, scale, {0});
      return;
    }
    checks.shape(values_name, values, {rows, cols}).dtype(values_name, values, {F8E4M3FN, F8E5M2});
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

ffi::Error quantize(cudaStream_t stream, ffi::AnyBuffer x, ffi::AnyBuffer scale_in,
                    ffi::Result<ffi::AnyBuffer> values, ffi::Result<ffi::AnyBuffer> scale,
                    ffi::Result<ffi::AnyBuffer> values_t, ffi::Result<ffi::AnyBuffer> scale_t,
                    ffi::Result<ffi::AnyBuffer> workspace, int32_t scaling_number) {
  Checks checks("quantize");
  checks.rank("x", x, 2)
      .dtype("x", x, {F32, BF16, F16})
      .that(0 <= scaling_number && scaling_number <= 3, "scaling",
            "is " + std::to_string(scaling_number), "0 to 3");
  if (checks.failed()) return checks.error();
  const auto scaling = static_cast<Scaling>(scaling_number);
  const int64_t rows = x.dimensions()[0], cols = x.dimensions()[1];
  const Orientation natural = {"values", "scale", *values, *scale, rows, cols};
  const Orientation transposed = {"values_t", "scale_t", *values_t, *scale_t, cols, rows};
  natural.check(checks, scaling);
  transposed.check(checks, scaling);
  const bool needs_workspace = scaling == Scaling::kRow && transposed.wanted();
  checks
      .that(natural.wanted() || transposed.wanted(), "values and values_t", "are empty",
            "one of them")
      .dtype("scale_in", scale_in, {F32})
      .shape("scale_in", scale_in, {scaling == Scaling::kTensor ? 1 : 0})
      .dtype("workspace", *workspace, {S32})
      .shape("workspace", *workspace, {needs_workspace ? rows + cols : 0});
  const ffi::AnyBuffer& one = natural.wanted() ? natural.values : transposed.values;
  if (natural.wanted() && transposed.wanted()) {
    checks.dtype("values_t", *values_t, {values->element_type()});
  }
  if (checks.failed() || rows == 0 || cols == 0) return checks.error();
  const QuantizeParams params = {
      .x = x.untyped_data(),
      .scale_in = static_cast<const float*>(scale_in.untyped_data()),
      .values = natural.values_data(),
      .scale = natural.scale_data(scaling),
      .values_t = transposed.values_data(),
      .scale_t = transposed.scale_data(scaling),
      .workspace = static_cast<int32_t*>(workspace->untyped_data()),
      .rows = rows,
      .cols = cols,
      .dtype = to_dtype(x.element_type()),
      .format = to_dtype(one.element_type()),
      .scaling = scaling,
  };
  return launch_error("quantize", launch_quantize(params, stream));
}

}  // namespace

JAXKERN_DEFINE_HANDLER(Quantize, quantize,
                       ffi::Ffi::Bind()
                           .Ctx<Stream>()
                           .Arg<ffi::AnyBuffer>()  // x
                           .Arg<ffi::AnyBuffer>()  // scale_in
                           .Ret<ffi::AnyBuffer>()  // values
                           .Ret<ffi::AnyBuffer>()  // scale
                           .Ret<ffi::AnyBuffer>()  // values_t
                           .Ret<ffi::AnyBuffer>()  // scale_t
                           .Ret<ffi::AnyBuffer>()  // workspace
                           .Attr<int32_t>("scaling"));

}  // namespace jaxkern
