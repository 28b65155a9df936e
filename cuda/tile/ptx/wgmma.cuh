// Warpgroup matrix multiply: D(64 x N) = A(64 x K) B(K x N) + D, float32 accumulation; K is 16 for
// 16-bit elements and 32 for 8-bit ones. One function per operand source; the instruction shape N
// and the element types are parameters.
// NOTE: 8-bit products lose low bits: the sum of an instruction keeps about 14 (docs/matmul.md).
#pragma once

#include <cstdint>

namespace jaxkern::tile::ptx {

__device__ __forceinline__ void wgmma_fence() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

__device__ __forceinline__ void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

template <int kPending>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" : : "n"(kPending) : "memory");
}

// No instruction: the compiler may not move a use of `x` across this point.
__device__ __forceinline__ void register_fence(float& x) { asm volatile("" : "+f"(x)::"memory"); }

// `Type::kName` is the PTX element type. `kTransA`, `kTransB`: the operand in shared memory is
// M- or N-major (its contiguous axis is not the reduction axis).
template <int kN>
struct Wgmma;

// clang-format off
#define JK_REGS_0 "%0, %1, %2, %3, %4, %5, %6, %7"
#define JK_REGS_1 "%8, %9, %10, %11, %12, %13, %14, %15"
#define JK_REGS_2 "%16, %17, %18, %19, %20, %21, %22, %23"
#define JK_REGS_3 "%24, %25, %26, %27, %28, %29, %30, %31"
#define JK_REGS_4 "%32, %33, %34, %35, %36, %37, %38, %39"
#define JK_REGS_5 "%40, %41, %42, %43, %44, %45, %46, %47"
#define JK_REGS_6 "%48, %49, %50, %51, %52, %53, %54, %55"
#define JK_REGS_7 "%56, %57, %58, %59, %60, %61, %62, %63"
#define JK_REGS_8 "%64, %65, %66, %67, %68, %69, %70, %71"
#define JK_REGS_9 "%72, %73, %74, %75, %76, %77, %78, %79"
#define JK_REGS_10 "%80, %81, %82, %83, %84, %85, %86, %87"
#define JK_REGS_11 "%88, %89, %90, %91, %92, %93, %94, %95"
#define JK_REGS_12 "%96, %97, %98, %99, %100, %101, %102, %103"
#define JK_REGS_13 "%104, %105, %106, %107, %108, %109, %110, %111"
#define JK_REGS_14 "%112, %113, %114, %115, %116, %117, %118, %119"
#define JK_REGS_15 "%120, %121, %122, %123, %124, %125, %126, %127"

#define JK_NAMES_8 JK_REGS_0
#define JK_NAMES_16 JK_NAMES_8 ", " JK_REGS_1
#define JK_NAMES_24 JK_NAMES_16 ", " JK_REGS_2
#define JK_NAMES_32 JK_NAMES_24 ", " JK_REGS_3
#define JK_NAMES_40 JK_NAMES_32 ", " JK_REGS_4
#define JK_NAMES_48 JK_NAMES_40 ", " JK_REGS_5
#define JK_NAMES_56 JK_NAMES_48 ", " JK_REGS_6
#define JK_NAMES_64 JK_NAMES_56 ", " JK_REGS_7
#define JK_NAMES_72 JK_NAMES_64 ", " JK_REGS_8
#define JK_NAMES_80 JK_NAMES_72 ", " JK_REGS_9
#define JK_NAMES_88 JK_NAMES_80 ", " JK_REGS_10
#define JK_NAMES_96 JK_NAMES_88 ", " JK_REGS_11
#define JK_NAMES_104 JK_NAMES_96 ", " JK_REGS_12
#define JK_NAMES_112 JK_NAMES_104 ", " JK_REGS_13
#define JK_NAMES_120 JK_NAMES_112 ", " JK_REGS_14
#define JK_NAMES_128 JK_NAMES_120 ", " JK_REGS_15

#define JK_OUT_AT(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), \
                     "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), "+f"(d[i + 7])
#define JK_OUT_8 JK_OUT_AT(0)
#define JK_OUT_16 JK_OUT_8, JK_OUT_AT(8)
#define JK_OUT_24 JK_OUT_16, JK_OUT_AT(16)
#define JK_OUT_32 JK_OUT_24, JK_OUT_AT(24)
#define JK_OUT_40 JK_OUT_32, JK_OUT_AT(32)
#define JK_OUT_48 JK_OUT_40, JK_OUT_AT(40)
#define JK_OUT_56 JK_OUT_48, JK_OUT_AT(48)
#define JK_OUT_64 JK_OUT_56, JK_OUT_AT(56)
#define JK_OUT_72 JK_OUT_64, JK_OUT_AT(64)
#define JK_OUT_80 JK_OUT_72, JK_OUT_AT(72)
#define JK_OUT_88 JK_OUT_80, JK_OUT_AT(80)
#define JK_OUT_96 JK_OUT_88, JK_OUT_AT(88)
#define JK_OUT_104 JK_OUT_96, JK_OUT_AT(96)
#define JK_OUT_112 JK_OUT_104, JK_OUT_AT(104)
#define JK_OUT_120 JK_OUT_112, JK_OUT_AT(112)
#define JK_OUT_128 JK_OUT_120, JK_OUT_AT(120)

// P0 .. P7: the operand numbers that follow the R accumulator registers.
#define JK_WGMMA(N, R, P0, P1, P2, P3, P4, P5, P6, P7)                                            \
  template <>                                                                                     \
  struct Wgmma<N> {                                                                               \
    template <class Type, int kTransA, int kTransB>                                               \
    __device__ __forceinline__ static void shared_shared(float (&d)[R], uint64_t a, uint64_t b,   \
                                                         int accumulate) {                        \
      asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " P2 ", 0;\n"                                \
                   "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." P5 "." P5 " "                \
                   "{" JK_NAMES_##R "}, " P0 ", " P1 ", p, 1, 1, " P3 ", " P4 ";\n}\n"            \
                   : JK_OUT_##R                                                                   \
                   : "l"(a), "l"(b), "r"(accumulate), "n"(kTransA), "n"(kTransB),                 \
                     "C"(Type::kName));                                                           \
    }                                                                                             \
    template <class TypeA, class TypeB>                                                           \
    __device__ __forceinline__ static void shared_shared(float (&d)[R], uint64_t a, uint64_t b,   \
                                                         int accumulate) {                        \
      asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " P2 ", 0;\n"                                \
                   "wgmma.mma_async.sync.aligned.m64n" #N "k32.f32." P3 "." P4 " "                \
                   "{" JK_NAMES_##R "}, " P0 ", " P1 ", p, 1, 1;\n}\n"                            \
                   : JK_OUT_##R                                                                   \
                   : "l"(a), "l"(b), "r"(accumulate), "C"(TypeA::kName), "C"(TypeB::kName));      \
    }                                                                                             \
    template <class Type, int kTransB>                                                            \
    __device__ __forceinline__ static void register_shared(float (&d)[R], const uint32_t* a,      \
                                                           uint64_t b, int accumulate) {          \
      asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " P5 ", 0;\n"                                \
                   "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." P7 "." P7 " "                \
                   "{" JK_NAMES_##R "}, {" P0 ", " P1 ", " P2 ", " P3 "}, " P4 ", p, 1, 1, "      \
                   P6 ";\n}\n"                                                                    \
                   : JK_OUT_##R                                                                   \
                   : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate),         \
                     "n"(kTransB), "C"(Type::kName));                                             \
    }                                                                                             \
  };

JK_WGMMA(16, 8, "%8", "%9", "%10", "%11", "%12", "%13", "%14", "%15")
JK_WGMMA(32, 16, "%16", "%17", "%18", "%19", "%20", "%21", "%22", "%23")
JK_WGMMA(48, 24, "%24", "%25", "%26", "%27", "%28", "%29", "%30", "%31")
JK_WGMMA(64, 32, "%32", "%33", "%34", "%35", "%36", "%37", "%38", "%39")
JK_WGMMA(80, 40, "%40", "%41", "%42", "%43", "%44", "%45", "%46", "%47")
JK_WGMMA(96, 48, "%48", "%49", "%50", "%51", "%52", "%53", "%54", "%55")
JK_WGMMA(112, 56, "%56", "%57", "%58", "%59", "%60", "%61", "%62", "%63")
JK_WGMMA(128, 64, "%64", "%65", "%66", "%67", "%68", "%69", "%70", "%71")
JK_WGMMA(144, 72, "%72", "%73", "%74", "%75", "%76", "%77", "%78", "%79")
JK_WGMMA(160, 80, "%80", "%81", "%82", "%83", "%84", "%85", "%86", "%87")
JK_WGMMA(176, 88, "%88", "%89", "%90", "%91", "%92", "%93", "%94", "%95")
JK_WGMMA(192, 96, "%96", "%97", "%98", "%99", "%100", "%101", "%102", "%103")
JK_WGMMA(208, 104, "%104", "%105", "%106", "%107", "%108", "%109", "%110", "%111")
JK_WGMMA(224, 112, "%112", "%113", "%114", "%115", "%116", "%117", "%118", "%119")
JK_WGMMA(240, 120, "%120", "%121", "%122", "%123", "%124", "%125", "%126", "%127")
JK_WGMMA(256, 128, "%128", "%129", "%130", "%131", "%132", "%133", "%134", "%135")
// clang-format on

#undef JK_WGMMA
#undef JK_OUT_128
#undef JK_OUT_120
#undef JK_OUT_112
#undef JK_OUT_104
#undef JK_OUT_96
#undef JK_OUT_88
#undef JK_OUT_80
#undef JK_OUT_72
#undef JK_OUT_64
#undef JK_OUT_56
#undef JK_OUT_48
#undef JK_OUT_40
#undef JK_OUT_32
#undef JK_OUT_24
#undef JK_OUT_16
#undef JK_OUT_8
#undef JK_OUT_AT
#undef JK_NAMES_128
#undef JK_NAMES_120
#undef JK_NAMES_112
#undef JK_NAMES_104
#undef JK_NAMES_96
#undef JK_NAMES_88
#undef JK_NAMES_80
#undef JK_NAMES_72
#undef JK_NAMES_64
#undef JK_NAMES_56
#undef JK_NAMES_48
#undef JK_NAMES_40
#undef JK_NAMES_32
#undef JK_NAMES_24
#undef JK_NAMES_16
#undef JK_NAMES_8
#undef JK_REGS_15
#undef JK_REGS_14
#undef JK_REGS_13
#undef JK_REGS_12
#undef JK_REGS_11
#undef JK_REGS_10
#undef JK_REGS_9
#undef JK_REGS_8
#undef JK_REGS_7
#undef JK_REGS_6
#undef JK_REGS_5
#undef JK_REGS_4
#undef JK_REGS_3
#undef JK_REGS_2
#undef JK_REGS_1
#undef JK_REGS_0

}  // namespace jaxkern::tile::ptx
