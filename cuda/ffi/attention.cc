#include "cuda/attention/launch.h"
#include "cuda/ffi/common.h"

namespace jaxkern {

// Of both targets. Lengths and segments come as optional pairs of operands, in this order.
struct AttentionAttributes {
  float scale, soft_cap;
  int32_t left, right;
  bool bottom_right, has_lengths, has_segments;
  bool deterministic;  // backward; forward always is
};

}  // namespace jaxkern

XLA_FFI_REGISTER_STRUCT_ATTR_DECODING(jaxkern::AttentionAttributes, StructMember<float>("scale"),
                                      StructMember<float>("soft_cap"),
                                      StructMember<int32_t>("left"), StructMember<int32_t>("right"),
                                      StructMember<bool>("bottom_right"),
                                      StructMember<bool>("has_lengths"),
                                      StructMember<bool>("has_segments"),
                                      StructMember<bool>("deterministic"));

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
      .that(s.H == 64 || s.H == 128 || s.H == 256, "query", "has head dim " + std::to_string(s.H),
            "64, 128 or 256")
      .that(s.B > 0 && s.T > 0 && s.N > 0, "query", "is empty", "at least one element")
      .that(s.S > 0 && s.K > 0, "key", "is empty", "at least one element")
      .that(s.K > 0 && s.N % s.K == 0, "query", "has " + std::to_string(s.N) + " heads",
            "a multiple of key's " + std::to_string(s.K));
  return s;
}

AttentionOptions operand_options(Checks& checks, const AttentionShape& s,
                                 const AttentionAttributes& given, ffi::RemainingArgs arrays) {
  const size_t wanted = 2 * given.has_lengths + 2 * given.has_segments;
  checks.that(given.scale > 0, "scale", "is " + std::to_string(given.scale), "a positive number")
      .that(given.soft_cap >= 0, "soft_cap", "is " + std::to_string(given.soft_cap),
            "a positive number, or 0")
      .that(given.left >= 0 && given.right >= 0, "left and right", "are negative", "at least 0")
      .that(arrays.size() == wanted, "the call",
            "has " + std::to_string(arrays.size()) + " operands of lengths and segments",
            std::to_string(wanted));
  AttentionOptions options = {
      .scale = given.scale,
      .soft_cap = given.soft_cap,
      .left = given.left,
      .right = given.right,
      .bottom_right = given.bottom_right,
  };
  size_t next = 0;
  const auto take = [&](const char* name, std::initializer_list<int64_t> dims) -> const int* {
    if (checks.failed()) return nullptr;
    const ffi::AnyBuffer buffer = arrays.get<ffi::AnyBuffer>(next++).value();
    checks.dtype(name, buffer, {S32}).shape(name, buffer, dims);
    return static_cast<const int*>(buffer.untyped_data());
  };
  if (given.has_lengths) {
    options.query_lengths = take("query_lengths", {s.B});
    options.key_lengths = take("key_lengths", {s.B});
  }
  if (given.has_segments) {
    options.query_segments = take("query_segments", {s.B, s.T});
    options.key_segments = take("key_segments", {s.B, s.S});
  }
  return options;
}

ffi::Error attention_fwd(cudaStream_t stream, ffi::AnyBuffer query, ffi::AnyBuffer key,
                         ffi::AnyBuffer value, ffi::RemainingArgs arrays,
                         ffi::Result<ffi::AnyBuffer> out, ffi::Result<ffi::AnyBuffer> lse,
                         ffi::Result<ffi::AnyBuffer> workspace, AttentionAttributes given) {
  Checks checks("attention_fwd");
  const AttentionShape s = operand_shape(checks, query, key, value);
  const AttentionOptions options = operand_options(checks, s, given, arrays);
  checks.shape("out", *out, {s.B, s.T, s.N, s.H})
      .dtype("out", *out, {query.element_type()})
      .shape("lse", *lse, {s.B, s.N, s.T})
      .dtype("lse", *lse, {F32})
      .shape("workspace", *workspace, {attention_fwd_workspace(s)})
      .dtype("workspace", *workspace, {S32});
  if (checks.failed()) return checks.error();
  const AttentionFwdParams params = {
      .dtype = to_dtype(query.element_type()),
      .shape = s,
      .options = options,
      .query = query.untyped_data(),
      .key = key.untyped_data(),
      .value = value.untyped_data(),
      .out = out->untyped_data(),
      .lse = lse->typed_data<float>(),
      .workspace = workspace->typed_data<int32_t>(),
  };
  return launch_error("attention_fwd", launch_attention_fwd(params, stream));
}

ffi::Error attention_bwd(cudaStream_t stream, ffi::AnyBuffer query, ffi::AnyBuffer key,
                         ffi::AnyBuffer value, ffi::AnyBuffer out, ffi::AnyBuffer lse,
                         ffi::AnyBuffer dout, ffi::AnyBuffer dlse, ffi::RemainingArgs arrays,
                         ffi::Result<ffi::AnyBuffer> dquery, ffi::Result<ffi::AnyBuffer> dkey,
                         ffi::Result<ffi::AnyBuffer> dvalue, ffi::Result<ffi::AnyBuffer> lse_log2,
                         ffi::Result<ffi::AnyBuffer> delta,
                         ffi::Result<ffi::AnyBuffer> dquery_accum,
                         ffi::Result<ffi::AnyBuffer> workspace, AttentionAttributes given) {
  Checks checks("attention_bwd");
  const AttentionShape s = operand_shape(checks, query, key, value);
  const AttentionOptions options = operand_options(checks, s, given, arrays);
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
      .shape("workspace", *workspace, {attention_bwd_workspace(s)})
      .dtype("workspace", *workspace, {S32});
  if (checks.failed()) return checks.error();
  const AttentionBwdParams params = {
      .dtype = to_dtype(query.element_type()),
      .shape = s,
      .options = options,
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
      .workspace = workspace->typed_data<int32_t>(),
      .deterministic = given.deterministic,
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
                           .RemainingArgs()
                           .Ret<ffi::AnyBuffer>()  // out
                           .Ret<ffi::AnyBuffer>()  // lse
                           .Ret<ffi::AnyBuffer>()  // workspace
                           .Attrs<AttentionAttributes>());

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
                           .RemainingArgs()
                           .Ret<ffi::AnyBuffer>()  // dquery
                           .Ret<ffi::AnyBuffer>()  // dkey
                           .Ret<ffi::AnyBuffer>()  // dvalue
                           .Ret<ffi::AnyBuffer>()  // lse_log2
                           .Ret<ffi::AnyBuffer>()  // delta
                           .Ret<ffi::AnyBuffer>()  // dquery_accum
                           .Ret<ffi::AnyBuffer>()  // workspace
                           .Attrs<AttentionAttributes>());

}  // namespace jaxkern
