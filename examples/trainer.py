"""QLoRA with transformers' Trainer; fusetune is the one line that is new.

python examples/trainer.py MODEL TEXT_FILE OUTPUT_FOLDER
"""

import sys

import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    DataCollatorForLanguageModeling,
    Trainer,
    TrainingArguments,
)

import fusetune


def main(name: str, text_file: str, output: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(name)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    nf4 = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
    )
    model = AutoModelForCausalLM.from_pretrained(name, quantization_config=nf4, dtype=torch.float32)
    model = get_peft_model(
        model, LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM")
    )
    print(fusetune.fuse(model))

    with open(text_file, encoding="utf-8") as file:
        lines = [line.strip() for line in file if line.strip()]
    trainer = Trainer(
        model,
        TrainingArguments(
            output, max_steps=20, per_device_train_batch_size=4, learning_rate=5e-4, report_to=[]
        ),
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
        train_dataset=[tokenizer(line, truncation=True, max_length=256) for line in lines],
    )
    trainer.train()
    model.save_pretrained(output)


if __name__ == "__main__":
    if len(sys.argv) != 4:
        sys.exit(__doc__)
    main(*sys.argv[1:])
