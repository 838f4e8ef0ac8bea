// Gathers one instruction set's kernels into its table. A null entry is a kernel that is not built for it.
#include "isa/isa.h"
#include "isa_kernels.h"

#define FUSETUNE_STRING_(x) #x
#define FUSETUNE_STRING(x) FUSETUNE_STRING_(x)

namespace fusetune::FUSETUNE_ISA {

const Kernels table = {
    /*isa=*/FUSETUNE_STRING(FUSETUNE_ISA),
    /*lanes=*/kLanes,
    /*quantize_4bit=*/quantize_4bit,
    /*dequantize_4bit=*/dequantize_4bit,
    /*linear=*/linear,
    /*linear_dx=*/linear_dx,
#if defined(FUSETUNE_HAS_INT16)
    /*linear_4bit_int16=*/linear_4bit_int16,
#else
    /*linear_4bit_int16=*/nullptr,
#endif
    /*lora_shrink=*/lora_shrink,
    /*lora_ds_db=*/lora_ds_db,
    /*lora_da=*/lora_da,
    /*multi_lora_shrink=*/multi_lora_shrink,
    /*multi_lora_expand=*/multi_lora_expand,
    /*multi_lora_ds_db=*/multi_lora_ds_db,
    /*multi_lora_da=*/multi_lora_da,
    /*dora_norm=*/dora_norm,
    /*rms_norm=*/rms_norm,
    /*rms_norm_dx=*/rms_norm_dx,
    /*bottleneck=*/bottleneck,
    /*bottleneck_backward=*/bottleneck_backward,
    /*cross_entropy=*/cross_entropy,
    /*cross_entropy_backward=*/cross_entropy_backward,
    /*fusion_attend=*/fusion_attend,
    /*fusion_attend_backward=*/fusion_attend_backward,
    /*prompt_embed=*/prompt_embed,
    /*prompt_embed_dprompt=*/prompt_embed_dprompt,
    /*prompt_embed_dweight=*/prompt_embed_dweight,
    /*prefix_attend=*/prefix_attend,
    /*prefix_attend_backward=*/prefix_attend_backward,
    /*attention=*/attention,
    /*attention_backward=*/attention_backward,
    /*rotary=*/rotary,
    /*glu=*/glu,
    /*glu_backward=*/glu_backward,
    /*scale_columns=*/scale_columns,
    /*scale_columns_backward=*/scale_columns_backward,
    /*importance=*/importance,
    /*dropout=*/dropout,
    /*fma_peak=*/fma_peak,
};

}  // namespace fusetune::FUSETUNE_ISA
