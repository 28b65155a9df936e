#include "cuda/ffi/common.h"
#include "cuda/matmul/launch.h"

namespace jaxkern {
namespace {

constexpr auto F32 = ffi::DataType::F32;
constexpr auto BF16 = ffi::DataType::BF16;
constexpr auto F16 = ffi::DataType::F16;
constexpr auto F8E4M3FN = ffi::DataType::F8E4M3FN;
constexpr auto F8E5M2 = ffi::DataType::F8E5M2;
constexpr auto U32 = ffi::DataType::U32;

// The scales of B matrices (rows, K) have the shape that `scaling` says.
void check_scales(Checks& checks, std::string_view name, const ffi::AnyBuffer& scales,
                  Scaling scaling, int64_t B, int64_t rows, int64_t K) {
  checks.dtype(name, scales, {F32});
  switch (scaling) {
    case Scaling::kTensor:
      checks.shape(name, scales, {B, 1});
      return;
    case Scaling::kRow:
      checks.shape(name, scales, {B, rows});
      return;
    case Scaling::kBlock1x128:
      checks.shape(name, scales, {B, scale_blocks(K), padded_scale_row(rows)});
      return;
    case Scaling::kBlock128x128:
      checks.shape(name, scales, {B, scale_blocks(rows), scale_blocks(K)});
      return;
  }
  checks.that(false, name, "scaling " + std::to_string(static_cast<int>(scaling)), "0 to 3");
}

ffi::Error scaled_matmul(cudaStream_t stream, ffi::AnyBuffer lhs, ffi::AnyBuffer rhs,
                         ffi::AnyBuffer lhs_scale, ffi::AnyBuffer rhs_scale, ffi::AnyBuffer bias,
                         ffi::Result<ffi::AnyBuffer> out, int32_t lhs_scaling, int32_t rhs_scaling,
                         bool fast_accumulation) {
  Checks checks("scaled_matmul");
  if (checks.rank("lhs", lhs, 3).rank("rhs", rhs, 3).failed()) return checks.error();
  const int64_t B = lhs.dimensions()[0], M = lhs.dimensions()[1], K = lhs.dimensions()[2];
  const int64_t N = rhs.dimensions()[1];
  const bool has_bias = bias.element_count() > 0;
  checks.dtype("lhs", lhs, {F8E4M3FN, F8E5M2})
      .that(K % 16 == 0, "lhs", "has K " + std::to_string(K), "a multiple of 16")
      .shape("rhs", rhs, {B, N, K})
      .dtype("rhs", rhs, {F8E4M3FN, F8E5M2})
      .that(N % 8 == 0, "rhs", "has N " + std::to_string(N), "a multiple of 8")
      .shape("bias", bias, {has_bias ? N : 0})
      .dtype("bias", bias, {F32})
      .shape("out", *out, {B, M, N})
      .dtype("out", *out, {BF16, F16, F32});
  check_scales(checks, "lhs_scale", lhs_scale, Scaling(lhs_scaling), B, M, K);
  check_scales(checks, "rhs_scale", rhs_scale, Scaling(rhs_scaling), B, N, K);
  if (checks.failed() || B * M * N == 0) return checks.error();
  const ScaledMatmulParams params = {
      .lhs_dtype = to_dtype(lhs.element_type()),
      .rhs_dtype = to_dtype(rhs.element_type()),
      .out_dtype = to_dtype(out->element_type()),
      .lhs_scaling = Scaling(lhs_scaling),
      .rhs_scaling = Scaling(rhs_scaling),
      .fast_accumulation = fast_accumulation,
      .B = B,
      .M = M,
      .N = N,
      .K = K,
      .lhs = lhs.untyped_data(),
      .rhs = rhs.untyped_data(),
      .lhs_scale = lhs_scale.typed_data<float>(),
      .rhs_scale = rhs_scale.typed_data<float>(),
      .bias = has_bias ? bias.typed_data<float>() : nullptr,
      .out = out->untyped_data(),
  };
  return launch_error("scaled_matmul", launch_scaled_matmul(params, stream));
}

// Columns that share a scale: what the format has, or for integers one of three numbers.
bool is_block(FourBitFormat format, int32_t block) {
  if (format == FourBitFormat::kNvfp4) return block == 16;
  if (format == FourBitFormat::kMxfp4) return block == 32;
  return block == 32 || block == 64 || block == 128;
}

// The weight (B, N, K) of operands and attributes. Fills checks with what is wrong with them.
FourBitWeight four_bit_weight(Checks& checks, const ffi::AnyBuffer& data, int32_t format_code,
                              int32_t block, bool zero_points) {
  const auto format = FourBitFormat(format_code);
  checks.that(format_code >= 0 && format_code <= 2, "format", std::to_string(format_code), "0 to 2")
      .that(is_block(format, block), "block", std::to_string(block), "one of the format");
  if (checks.failed()) return {};
  const FourBitWeight w = {
      .format = format,
      .blocks = kFourBitColumns / block,
      .zero_points = zero_points,
      .data = data.untyped_data(),
      .row_scale = nullptr,
  };
  const auto sizes = data.dimensions();
  checks.shape("data", data, {sizes[0], sizes[1], sizes[2], w.tile_bytes() / 4})
      .dtype("data", data, {U32});
  return w;
}

ffi::Error quantized_matmul(cudaStream_t stream, ffi::AnyBuffer x, ffi::AnyBuffer data,
                            ffi::AnyBuffer row_scale, ffi::Result<ffi::AnyBuffer> out,
                            int32_t format, int32_t block, bool zero_points) {
  Checks checks("quantized_matmul");
  if (checks.rank("x", x, 3).rank("data", data, 4).failed()) return checks.error();
  FourBitWeight w = four_bit_weight(checks, data, format, block, zero_points);
  if (checks.failed()) return checks.error();
  w.row_scale = static_cast<const float*>(row_scale.untyped_data());
  const int64_t B = data.dimensions()[0], M = x.dimensions()[1];
  const int64_t N = data.dimensions()[1] * kFourBitRows;
  const int64_t K = data.dimensions()[2] * kFourBitColumns;
  checks.shape("x", x, {B, M, K})
      .dtype("x", x, {BF16, F16})
      .shape("row_scale", row_scale, {B, N})
      .dtype("row_scale", row_scale, {F32})
      .shape("out", *out, {B, M, N})
      .dtype("out", *out, {x.element_type(), F32});
  if (checks.failed() || B * M * N == 0) return checks.error();
  const QuantizedMatmulParams params = {
      .x_dtype = to_dtype(x.element_type()),
      .out_dtype = to_dtype(out->element_type()),
      .B = B,
      .M = M,
      .N = N,
      .K = K,
      .x = x.untyped_data(),
      .w = w,
      .out = out->untyped_data(),
  };
  return launch_error("quantized_matmul", launch_quantized_matmul(params, stream));
}

ffi::Error quantized_matmul_grad(cudaStream_t stream, ffi::AnyBuffer dy, ffi::AnyBuffer data,
                                 ffi::AnyBuffer sum_scale, ffi::AnyBuffer row_factor,
                                 ffi::Result<ffi::AnyBuffer> dx, int32_t format, int32_t block,
                                 bool zero_points) {
  Checks checks("quantized_matmul_grad");
  if (checks.rank("dy", dy, 3).rank("data", data, 4).failed()) return checks.error();
  const FourBitWeight w = four_bit_weight(checks, data, format, block, zero_points);
  if (checks.failed()) return checks.error();
  const int64_t B = data.dimensions()[0], M = dy.dimensions()[1];
  const int64_t N = data.dimensions()[1] * kFourBitRows;
  const int64_t K = data.dimensions()[2] * kFourBitColumns;
  checks.shape("dy", dy, {B, M, N})
      .dtype("dy", dy, {BF16, F16})
      .shape("sum_scale", sum_scale, {B})
      .dtype("sum_scale", sum_scale, {F32})
      .shape("row_factor", row_factor, {B, w.format == FourBitFormat::kMxfp4 ? N : 0})
      .dtype("row_factor", row_factor, {dy.element_type()})
      .shape("dx", *dx, {B, M, K})
      .dtype("dx", *dx, {dy.element_type(), F32});
  if (checks.failed() || B * M * K == 0) return checks.error();
  const QuantizedMatmulParams params = {
      .x_dtype = to_dtype(dy.element_type()),
      .out_dtype = to_dtype(dx->element_type()),
      .B = B,
      .M = M,
      .N = N,
      .K = K,
      .x = dy.untyped_data(),
      .w = w,
      .out = dx->untyped_data(),
      .sum_scale = sum_scale.typed_data<float>(),
      .row_factor = row_factor.untyped_data(),
  };
  return launch_error("quantized_matmul_grad", launch_quantized_matmul_grad(params, stream));
}

ffi::Error weight_to_fp8(cudaStream_t stream, ffi::AnyBuffer data, ffi::AnyBuffer row_scale,
                         ffi::Result<ffi::AnyBuffer> values, ffi::Result<ffi::AnyBuffer> scale,
                         int32_t format, int32_t block, bool zero_points) {
  Checks checks("weight_to_fp8");
  if (checks.rank("data", data, 4).failed()) return checks.error();
  FourBitWeight w = four_bit_weight(checks, data, format, block, zero_points);
  if (checks.failed()) return checks.error();
  w.row_scale = static_cast<const float*>(row_scale.untyped_data());
  const int64_t B = data.dimensions()[0], strips = data.dimensions()[1];
  const int64_t panels = data.dimensions()[2], N = strips * kFourBitRows;
  checks.shape("row_scale", row_scale, {B, N})
      .dtype("row_scale", row_scale, {F32})
      .shape("values", *values, {B, N, panels * kFourBitColumns})
      .dtype("values", *values, {F8E4M3FN})
      .shape("scale", *scale, {B, N})
      .dtype("scale", *scale, {F32});
  if (checks.failed() || B * strips * panels == 0) return checks.error();
  const WeightToFp8Params params = {
      .w = w,
      .strips = B * strips,
      .panels = static_cast<int32_t>(panels),
      .values = values->untyped_data(),
      .scale = scale->typed_data<float>(),
  };
  return launch_error("weight_to_fp8", launch_weight_to_fp8(params, stream));
}

}  // namespace

JAXKERN_DEFINE_HANDLER(ScaledMatmul, scaled_matmul,
                       ffi::Ffi::Bind()
                           .Ctx<Stream>()
                           .Arg<ffi::AnyBuffer>()  // lhs
                           .Arg<ffi::AnyBuffer>()  // rhs
                           .Arg<ffi::AnyBuffer>()  // lhs_scale
                           .Arg<ffi::AnyBuffer>()  // rhs_scale
                           .Arg<ffi::AnyBuffer>()  // bias
                           .Ret<ffi::AnyBuffer>()  // out
                           .Attr<int32_t>("lhs_scaling")
                           .Attr<int32_t>("rhs_scaling")
                           .Attr<bool>("fast_accumulation"));

JAXKERN_DEFINE_HANDLER(QuantizedMatmul, quantized_matmul,
                       ffi::Ffi::Bind()
                           .Ctx<Stream>()
                           .Arg<ffi::AnyBuffer>()  // x
                           .Arg<ffi::AnyBuffer>()  // data
                           .Arg<ffi::AnyBuffer>()  // row_scale
                           .Ret<ffi::AnyBuffer>()  // out
                           .Attr<int32_t>("format")
                           .Attr<int32_t>("block")
                           .Attr<bool>("zero_points"));

JAXKERN_DEFINE_HANDLER(QuantizedMatmulGrad, quantized_matmul_grad,
                       ffi::Ffi::Bind()
                           .Ctx<Stream>()
                           .Arg<ffi::AnyBuffer>()  // dy
                           .Arg<ffi::AnyBuffer>()  // data
                           .Arg<ffi::AnyBuffer>()  // sum_scale
                           .Arg<ffi::AnyBuffer>()  // row_factor
                           .Ret<ffi::AnyBuffer>()  // dx
                           .Attr<int32_t>("format")
                           .Attr<int32_t>("block")
                           .Attr<bool>("zero_points"));

JAXKERN_DEFINE_HANDLER(WeightToFp8, weight_to_fp8,
                       ffi::Ffi::Bind()
                           .Ctx<Stream>()
                           .Arg<ffi::AnyBuffer>()  // data
                           .Arg<ffi::AnyBuffer>()  // row_scale
                           .Ret<ffi::AnyBuffer>()  // values
                           .Ret<ffi::AnyBuffer>()  // scale
                           .Attr<int32_t>("format")
                           .Attr<int32_t>("block")
                           .Attr<bool>("zero_points"));

}  // namespace jaxkern
