#include "cuda/attention/launch.h"
#include "cuda/ffi/common.h"

namespace jaxkern {
namespace {

constexpr auto F32 = ffi::DataType::F32;
constexpr auto BF16 = ffi::DataType::BF16;
constexpr auto F16 = ffi::DataType::F16;
constexpr auto S32 = ffi::DataType::S32;

// Reads the shape off query and key, and checks the three operands.
AttentionShape operand_shape(Checks& checks, ffi::AnyBuffer query, ffi::AnyBuffer key,
                             ffi::AnyBuffer value) {
  checks.rank("query", query, 4).rank("key", key, 4);
  if (checks.failed()) return {};
  const auto q = query.dimensions(), k = key.dimensions();
  const AttentionShape s = {.B = q[0], .T = q[1], .S = k[1], .N = q[2], .K = k[2], .H = q[3]};
  checks.dtype("query", query, {BF16, F16})
      .dtype("key", key, {query.element_type()})
      .dtype("value", value, {query.element_type()})
      .shape("key", key, {s.B, s.S, s.K, s.H})
      .shape("value", value, {s.B, s.S, s.K, s.H})
      .that(s.H == 64 || s.H == 128, "query", "has head dim " + std::to_string(s.H), "64 or 128")
      .that(s.B > 0 && s.T > 0 && s.N > 0, "query", "is empty", "at least one element")
      .that(s.S > 0 && s.K > 0, "key", "is empty", "at least one element")
      .that(s.K > 0 && s.N % s.K == 0, "query", "has " + std::to_string(s.N) + " heads",
            "a multiple of key's " + std::to_string(s.K));
  return s;
}

ffi::Error attention_fwd(cudaStream_t stream, ffi::AnyBuffer query, ffi::AnyBuffer key,
                         ffi::AnyBuffer value, ffi::Result<ffi::AnyBuffer> out,
                         ffi::Result<ffi::AnyBuffer> lse, ffi::Result<ffi::AnyBuffer> tile_counter,
                         float scale, bool is_causal) {
  Checks checks("attention_fwd");
  const AttentionShape s = operand_shape(checks, query, key, value);
  checks.shape("out", *out, {s.B, s.T, s.N, s.H})
      .dtype("out", *out, {query.element_type()})
      .shape("lse", *lse, {s.B, s.N, s.T})
      .dtype("lse", *lse, {F32})
      .shape("tile_counter", *tile_counter, {1})
      .dtype("tile_counter", *tile_counter, {S32})
      .that(scale > 0, "scale", "is " + std::to_string(scale), "a positive number");
  if (checks.failed()) return checks.error();
  const AttentionFwdParams params = {
      .dtype = to_dtype(query.element_type()),
      .shape = s,
      .query = query.untyped_data(),
      .key = key.untyped_data(),
      .value = value.untyped_data(),
      .out = out->untyped_data(),
      .lse = lse->typed_data<float>(),
      .tile_counter = tile_counter->typed_data<int32_t>(),
      .scale = scale,
      .is_causal = is_causal,
  };
  return launch_error("attention_fwd", launch_attention_fwd(params, stream));
}

ffi::Error attention_bwd(cudaStream_t stream, ffi::AnyBuffer query, ffi::AnyBuffer key,
                         ffi::AnyBuffer value, ffi::AnyBuffer out, ffi::AnyBuffer lse,
                         ffi::AnyBuffer dout, ffi::AnyBuffer dlse,
                         ffi::Result<ffi::AnyBuffer> dquery, ffi::Result<ffi::AnyBuffer> dkey,
                         ffi::Result<ffi::AnyBuffer> dvalue, ffi::Result<ffi::AnyBuffer> lse_log2,
                         ffi::Result<ffi::AnyBuffer> delta,
                         ffi::Result<ffi::AnyBuffer> dquery_accum, float scale, bool is_causal) {
  Checks checks("attention_bwd");
  const AttentionShape s = operand_shape(checks, query, key, value);
  const int64_t Tp = attention_padded_length(s.T);
  const auto same_dtype = {query.element_type()};
  checks.shape("out", out, {s.B, s.T, s.N, s.H})
      .dtype("out", out, same_dtype)
      .shape("lse", lse, {s.B, s.N, s.T})
      .dtype("lse", lse, {F32})
      .shape("dout", dout, {s.B, s.T, s.N, s.H})
      .dtype("dout", dout, same_dtype)
      .shape("dlse", dlse, {s.B, s.N, s.T})
      .dtype("dlse", dlse, {F32})
      .shape("dquery", *dquery, {s.B, s.T, s.N, s.H})
      .dtype("dquery", *dquery, same_dtype)
      .shape("dkey", *dkey, {s.B, s.S, s.K, s.H})
      .dtype("dkey", *dkey, same_dtype)
      .shape("dvalue", *dvalue, {s.B, s.S, s.K, s.H})
      .dtype("dvalue", *dvalue, same_dtype)
      .shape("lse_log2", *lse_log2, {s.B, s.N, Tp})
      .dtype("lse_log2", *lse_log2, {F32})
      .shape("delta", *delta, {s.B, s.N, Tp})
      .dtype("delta", *delta, {F32})
      .shape("dquery_accum", *dquery_accum, {s.B, s.N, Tp, s.H})
      .dtype("dquery_accum", *dquery_accum, {F32})
      .that(scale > 0, "scale", "is " + std::to_string(scale), "a positive number");
  if (checks.failed()) return checks.error();
  const AttentionBwdParams params = {
      .dtype = to_dtype(query.element_type()),
      .shape = s,
      .query = query.untyped_data(),
      .key = key.untyped_data(),
      .value = value.untyped_data(),
      .out = out.untyped_data(),
      .lse = lse.typed_data<float>(),
      .dout = dout.untyped_data(),
      .dlse = dlse.typed_data<float>(),
      .dquery = dquery->untyped_data(),
      .dkey = dkey->untyped_data(),
      .dvalue = dvalue->untyped_data(),
      .lse_log2 = lse_log2->typed_data<float>(),
      .delta = delta->typed_data<float>(),
      .dquery_accum = dquery_accum->typed_data<float>(),
      .scale = scale,
      .is_causal = is_causal,
  };
  return launch_error("attention_bwd", launch_attention_bwd(params, stream));
}

}  // namespace

JAXKERN_DEFINE_HANDLER(AttentionFwd, attention_fwd,
                       ffi::Ffi::Bind()
                           .Ctx<Stream>()
                           .Arg<ffi::AnyBuffer>()  // query
                           .Arg<ffi::AnyBuffer>()  // key
                           .Arg<ffi::AnyBuffer>()  // value
                           .Ret<ffi::AnyBuffer>()  // out
                           .Ret<ffi::AnyBuffer>()  // lse
                           .Ret<ffi::AnyBuffer>()  // tile_counter
                           .Attr<float>("scale")
                           .Attr<bool>("is_causal"));

JAXKERN_DEFINE_HANDLER(AttentionBwd, attention_bwd,
                       ffi::Ffi::Bind()
                           .Ctx<Stream>()
                           .Arg<ffi::AnyBuffer>()  // query
                           .Arg<ffi::AnyBuffer>()  // key
                           .Arg<ffi::AnyBuffer>()  // value
                           .Arg<ffi::AnyBuffer>()  // out
                           .Arg<ffi::AnyBuffer>()  // lse
                           .Arg<ffi::AnyBuffer>()  // dout
                           .Arg<ffi::AnyBuffer>()  // dlse
                           .Ret<ffi::AnyBuffer>()  // dquery
                           .Ret<ffi::AnyBuffer>()  // dkey
                           .Ret<ffi::AnyBuffer>()  // dvalue
                           .Ret<ffi::AnyBuffer>()  // lse_log2
                           .Ret<ffi::AnyBuffer>()  // delta
                           .Ret<ffi::AnyBuffer>()  // dquery_accum
                           .Attr<float>("scale")
                           .Attr<bool>("is_causal"));

}  // namespace jaxkern
