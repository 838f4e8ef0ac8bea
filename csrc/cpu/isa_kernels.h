// What the kernel files of csrc/cpu define once per instruction set: each is compiled with FUSETUNE_ISA set to
// scalar, avx2, avx512 or neon and puts its functions into the namespace of that name.
//
// Everything a kernel file defines must be in that namespace or static, and it must not instantiate templates of
// the standard library that end up as shared symbols (std::vector's methods): the linker keeps one copy of those,
// perhaps the one compiled for an instruction set that this CPU lacks.
#pragma once
#include <type_traits>

#include "kernels.h"

namespace fusetune::FUSETUNE_ISA {

extern const Kernels table;

// Declares functions with the types that the table has.
template <class Pointer>
using Function = std::remove_pointer_t<Pointer>;

Function<decltype(Kernels::quantize_4bit)> quantize_4bit;
Function<decltype(Kernels::dequantize_4bit)> dequantize_4bit;
Function<decltype(Kernels::linear)> linear;
Function<decltype(Kernels::linear_dx)> linear_dx;
Function<decltype(Kernels::linear_4bit_int16)> linear_4bit_int16;
Function<decltype(Kernels::lora_shrink)> lora_shrink;
Function<decltype(Kernels::lora_ds_db)> lora_ds_db;
Function<decltype(Kernels::lora_da)> lora_da;
Function<decltype(Kernels::multi_lora_shrink)> multi_lora_shrink;
Function<decltype(Kernels::multi_lora_expand)> multi_lora_expand;
Function<decltype(Kernels::multi_lora_ds_db)> multi_lora_ds_db;
Function<decltype(Kernels::multi_lora_da)> multi_lora_da;
Function<decltype(Kernels::dora_norm)> dora_norm;
Function<decltype(Kernels::rms_norm)> rms_norm;
Function<decltype(Kernels::rms_norm_dx)> rms_norm_dx;
Function<decltype(Kernels::bottleneck)> bottleneck;
Function<decltype(Kernels::bottleneck_backward)> bottleneck_backward;
Function<decltype(Kernels::cross_entropy)> cross_entropy;
Function<decltype(Kernels::cross_entropy_backward)> cross_entropy_backward;
Function<decltype(Kernels::fusion_attend)> fusion_attend;
Function<decltype(Kernels::fusion_attend_backward)> fusion_attend_backward;
Function<decltype(Kernels::prompt_embed)> prompt_embed;
Function<decltype(Kernels::prompt_embed_dprompt)> prompt_embed_dprompt;
Function<decltype(Kernels::prompt_embed_dweight)> prompt_embed_dweight;
Function<decltype(Kernels::prefix_attend)> prefix_attend;
Function<decltype(Kernels::prefix_attend_backward)> prefix_attend_backward;
Function<decltype(Kernels::attention)> attention;
Function<decltype(Kernels::attention_backward)> attention_backward;
Function<decltype(Kernels::rotary)> rotary;
Function<decltype(Kernels::glu)> glu;
Function<decltype(Kernels::glu_backward)> glu_backward;
Function<decltype(Kernels::scale_columns)> scale_columns;
Function<decltype(Kernels::scale_columns_backward)> scale_columns_backward;
Function<decltype(Kernels::importance)> importance;
Function<decltype(Kernels::dropout)> dropout;
Function<decltype(Kernels::fma_peak)> fma_peak;

}  // namespace fusetune::FUSETUNE_ISA
