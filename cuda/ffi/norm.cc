#include "cuda/ffi/common.h"
#include "cuda/norm/launch.h"

namespace jaxkern {
namespace {

constexpr auto F32 = ffi::DataType::F32;
constexpr auto BF16 = ffi::DataType::BF16;
constexpr auto F16 = ffi::DataType::F16;

ffi::Error rms_norm_fwd(cudaStream_t stream, ffi::AnyBuffer x, ffi::AnyBuffer scale,
                        ffi::Result<ffi::AnyBuffer> y, ffi::Result<ffi::AnyBuffer> rstd,
                        float epsilon) {
  Checks checks("rms_norm_fwd");
  if (checks.rank("x", x, 2).failed()) return checks.error();
  const int64_t rows = x.dimensions()[0], width = x.dimensions()[1];
  checks.dtype("x", x, {F32, BF16, F16})
      .shape("scale", scale, {width})
      .dtype("scale", scale, {F32, x.element_type()})
      .shape("y", *y, {rows, width})
      .dtype("y", *y, {x.element_type()})
      .shape("rstd", *rstd, {rows})
      .dtype("rstd", *rstd, {F32});
  if (checks.failed() || rows == 0 || width == 0) return checks.error();
  const RmsNormFwdParams params = {
      .x = x.untyped_data(),
      .scale = scale.untyped_data(),
      .y = y->untyped_data(),
      .rstd = rstd->typed_data<float>(),
      .rows = rows,
      .width = width,
      .epsilon = epsilon,
      .dtype = to_dtype(x.element_type()),
      .scale_dtype = to_dtype(scale.element_type()),
  };
  return launch_error("rms_norm_fwd", launch_rms_norm_fwd(params, stream));
}

ffi::Error rms_norm_bwd(cudaStream_t stream, ffi::AnyBuffer x, ffi::AnyBuffer scale,
                        ffi::AnyBuffer rstd, ffi::AnyBuffer dy, ffi::Result<ffi::AnyBuffer> dx,
                        ffi::Result<ffi::AnyBuffer> dscale,
                        ffi::Result<ffi::AnyBuffer> dscale_partial) {
  Checks checks("rms_norm_bwd");
  if (checks.rank("x", x, 2).failed()) return checks.error();
  const int64_t rows = x.dimensions()[0], width = x.dimensions()[1];
  checks.dtype("x", x, {F32, BF16, F16})
      .shape("scale", scale, {width})
      .dtype("scale", scale, {F32, x.element_type()})
      .shape("rstd", rstd, {rows})
      .dtype("rstd", rstd, {F32})
      .shape("dy", dy, {rows, width})
      .dtype("dy", dy, {x.element_type()})
      .shape("dx", *dx, {rows, width})
      .dtype("dx", *dx, {x.element_type()})
      .shape("dscale", *dscale, {width})
      .dtype("dscale", *dscale, {F32})
      .shape("dscale_partial", *dscale_partial, {kRmsNormMaxPartials, width})
      .dtype("dscale_partial", *dscale_partial, {F32});
  if (checks.failed() || rows == 0 || width == 0) return checks.error();
  const RmsNormBwdParams params = {
      .x = x.untyped_data(),
      .scale = scale.untyped_data(),
      .rstd = rstd.typed_data<float>(),
      .dy = dy.untyped_data(),
      .dx = dx->untyped_data(),
      .dscale = dscale->typed_data<float>(),
      .dscale_partial = dscale_partial->typed_data<float>(),
      .rows = rows,
      .width = width,
      .dtype = to_dtype(x.element_type()),
      .scale_dtype = to_dtype(scale.element_type()),
  };
  return launch_error("rms_norm_bwd", launch_rms_norm_bwd(params, stream));
}

}  // namespace

JAXKERN_DEFINE_HANDLER(RmsNormFwd, rms_norm_fwd,
                       ffi::Ffi::Bind()
                           .Ctx<Stream>()
                           .Arg<ffi::AnyBuffer>()  // x
                           .Arg<ffi::AnyBuffer>()  // scale
                           .Ret<ffi::AnyBuffer>()  // y
                           .Ret<ffi::AnyBuffer>()  // rstd
                           .Attr<float>("epsilon"));

JAXKERN_DEFINE_HANDLER(RmsNormBwd, rms_norm_bwd,
                       ffi::Ffi::Bind()
                           .Ctx<Stream>()
                           .Arg<ffi::AnyBuffer>()    // x
                           .Arg<ffi::AnyBuffer>()    // scale
                           .Arg<ffi::AnyBuffer>()    // rstd
                           .Arg<ffi::AnyBuffer>()    // dy
                           .Ret<ffi::AnyBuffer>()    // dx
                           .Ret<ffi::AnyBuffer>()    // dscale
                           .Ret<ffi::AnyBuffer>());  // dscale_partial

}  // namespace jaxkern
