// Gathers one instruction set's kernels into its table. A null entry is a kernel that is not built for it.
#include "isa_kernels.h"

#define FUSETUNE_STRING_(x) #x
#define FUSETUNE_STRING(x) FUSETUNE_STRING_(x)

namespace fusetune::FUSETUNE_ISA {

#if defined(FUSETUNE_ISA_AVX512)
constexpr int kTableLanes = 16;
#elif defined(FUSETUNE_ISA_AVX2)
constexpr int kTableLanes = 8;
#elif defined(FUSETUNE_ISA_NEON)
constexpr int kTableLanes = 4;
#else
constexpr int kTableLanes = 1;
#endif

const Kernels table = {
    /*isa=*/FUSETUNE_STRING(FUSETUNE_ISA),
    /*lanes=*/kTableLanes,
    /*quantize_4bit=*/quantize_4bit,
    /*dequantize_4bit=*/dequantize_4bit,
    /*linear=*/linear,
    /*linear_dx=*/linear_dx,
    /*linear_4bit_int16=*/linear_4bit_int16,
    /*lora_shrink=*/lora_shrink,
    /*lora_ds_db=*/lora_ds_db,
    /*lora_da=*/lora_da,
    /*cross_entropy=*/cross_entropy,
    /*cross_entropy_backward=*/cross_entropy_backward,
    /*dropout=*/dropout,
    /*fma_peak=*/fma_peak,
};

}  // namespace fusetune::FUSETUNE_ISA
