"""GRPO in plain PyTorch with `transformers`: what a loop without a trainer takes."""

import copy
import sys

import torch
import transformers
import workload

args = workload.arguments()
size = workload.SIZES[args.size]
if args.algorithm != "grpo":
  sys.exit("The plain loop is of GRPO.")

torch.manual_seed(0)
config = transformers.Qwen2Config(
  **size.qwen2_config(), bos_token_id=None, eos_token_id=None, pad_token_id=0
)
policy = transformers.Qwen2ForCausalLM(config).float()
assert sum(x.numel() for x in policy.parameters()) == size.num_parameters
reference = copy.deepcopy(policy).eval().requires_grad_(False)
adam = torch.optim.AdamW(policy.parameters(), lr=workload.LEARNING_RATE, fused=True)
how = transformers.GenerationConfig(
  max_new_tokens=size.completion_len,
  do_sample=True,
  temperature=1.0,
  top_k=0,
  top_p=1.0,
  pad_token_id=0,
  eos_token_id=None,
  disable_compile=True,
)


def log_probs(model, texts):
  """Returns the log-probabilities of the completions [B, T]."""
  # Logits of a place are those of the token behind it.
  logits = model(texts, logits_to_keep=size.completion_len + 1, use_cache=False).logits[:, :-1]
  drawn = texts[:, -size.completion_len :, None]
  return logits.gather(-1, drawn)[..., 0] - logits.logsumexp(-1)


def generate(prompts):
  policy.eval()
  with torch.no_grad():
    return policy.generate(prompts, attention_mask=torch.ones_like(prompts), generation_config=how)


def update(texts, advantages):
  with torch.no_grad():
    ref = log_probs(reference, texts)
  policy.train()
  new = log_probs(policy, texts)
  ratio = (new - new.detach()).exp()
  clipped = ratio.clamp(1 - workload.CLIP, 1 + workload.CLIP)
  gain = torch.minimum(ratio * advantages, clipped * advantages)
  kl = (ref - new).expm1() - (ref - new)  # k3
  (workload.BETA * kl - gain).mean().backward()
  torch.nn.utils.clip_grad_norm_(policy.parameters(), workload.MAX_GRAD_NORM)
  adam.step()
  adam.zero_grad(set_to_none=True)


clock = workload.Clock(args.warm, args.timed)
generate, update = clock.timed("generate", generate), clock.timed("update", update)
clock.begin()
for _ in range(clock.num_iterations):
  shape = size.num_prompts, size.prompt_len
  prompts = torch.randint(workload.FIRST_WORD, size.vocab_size, shape)
  texts = generate(prompts.repeat_interleave(size.group_size, 0))
  assert texts.shape == (size.num_rows, size.prompt_len + size.completion_len)
  words = [" ".join(f"w{i}" for i in row[size.prompt_len :]) for row in texts.tolist()]
  scores = torch.tensor([workload.score(x) for x in words]).view(-1, size.group_size)
  deviations = scores - scores.mean(1, keepdim=True)
  update(texts, (deviations / (scores.std(1, keepdim=True) + 1e-4)).view(-1, 1))
  clock.end_iteration()
clock.report(versions={"torch": torch.__version__, "transformers": transformers.__version__})
