"""What both programs of TRL begin with."""

import tokenizers
import torch
import transformers
import workload


def tokenizer(size: workload.Size):
  """Returns a tokenizer whose tokens are the words of the prompts."""
  inner = tokenizers.Tokenizer(
    tokenizers.models.WordLevel(workload.vocabulary(size), unk_token="<2>")
  )
  inner.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
  return transformers.PreTrainedTokenizerFast(
    tokenizer_object=inner,
    pad_token="<0>",
    eos_token="<1>",
    unk_token="<2>",
    padding_side="left",
  )


def model_config(size: workload.Size, **more):
  return transformers.Qwen2Config(
    **size.qwen2_config(), bos_token_id=None, eos_token_id=1, pad_token_id=0, **more
  )


def policy(size: workload.Size):
  """Returns a random policy in float32."""
  torch.manual_seed(0)
  made = transformers.Qwen2ForCausalLM(model_config(size)).float()
  assert sum(x.numel() for x in made.parameters()) == size.num_parameters
  return made


def trainer_settings(folder, size: workload.Size) -> dict:
  """Returns the settings that both trainers share."""
  return {
    "output_dir": str(folder / "out"),
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
    "per_device_train_batch_size": size.num_rows,
    "learning_rate": workload.LEARNING_RATE,
    "max_grad_norm": workload.MAX_GRAD_NORM,
    "lr_scheduler_type": "constant",
    "logging_strategy": "no",
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
    "dataloader_pin_memory": False,
  }
