"""GRPO and PPO in plain PyTorch with `transformers`: what a loop without a trainer takes.

On a CPU it computes in float32. On a GPU it computes in bfloat16, in parts of 8 rows, with a static
cache and with `torch.compile` around both passes.
"""

import copy

import torch
import transformers
import workload

args = workload.arguments()
size = workload.SIZES[args.size]
on_gpu = torch.cuda.is_available()
device, dtype = ("cuda", torch.bfloat16) if on_gpu else ("cpu", torch.float32)
rows_of_part = 8 if on_gpu else size.num_rows

torch.manual_seed(0)
config = transformers.Qwen2Config(
  **size.qwen2_config(), bos_token_id=None, eos_token_id=None, pad_token_id=0
)
policy = transformers.Qwen2ForCausalLM(config).to(device, dtype)
assert sum(x.numel() for x in policy.parameters()) == size.num_parameters
reference = copy.deepcopy(policy).eval().requires_grad_(False)
trained = [policy]
if args.algorithm == "ppo":
  critic = transformers.Qwen2ForTokenClassification(
    transformers.Qwen2Config(**config.to_dict() | {"num_labels": 1, "classifier_dropout": 0.0})
  ).to(device, dtype)
  trained.append(critic)
parameters = [x for model in trained for x in model.parameters()]
adam = torch.optim.AdamW(parameters, lr=workload.LEARNING_RATE, fused=True)
how = transformers.GenerationConfig(
  max_new_tokens=size.completion_len,
  do_sample=True,
  temperature=1.0,
  top_k=0,
  top_p=1.0,
  pad_token_id=0,
  eos_token_id=None,
  disable_compile=not on_gpu,
  cache_implementation="static" if on_gpu else None,
)


def log_probs(model, texts):
  """Returns the log-probabilities of the completions [B, T]."""
  # Logits of a place are those of the token behind it.
  logits = model(texts, logits_to_keep=size.completion_len + 1, use_cache=False).logits[:, :-1]
  drawn = texts[:, -size.completion_len :, None]
  return logits.float().gather(-1, drawn)[..., 0] - logits.float().logsumexp(-1)


def values(texts):
  """Returns what the critic says before each token of the completions [B, T]."""
  return critic(texts, use_cache=False).logits[:, -size.completion_len - 1 : -1, 0].float()


if on_gpu:
  log_probs, values = torch.compile(log_probs), torch.compile(values)


def generate(prompts):
  policy.eval()
  with torch.no_grad():
    return policy.generate(prompts, attention_mask=torch.ones_like(prompts), generation_config=how)


def surrogate(new, old, advantages):
  ratio = (new - old).exp()
  clipped = ratio.clamp(1 - workload.CLIP, 1 + workload.CLIP)
  return -torch.minimum(ratio * advantages, clipped * advantages).mean()


def grpo_loss(texts, scores):
  """Returns the loss of a part; `scores` are the advantages of its rows."""
  with torch.no_grad():
    ref = log_probs(reference, texts)
  new = log_probs(policy, texts)
  kl = (ref - new).expm1() - (ref - new)  # k3
  return surrogate(new, new.detach(), scores[:, None]) + workload.BETA * kl.mean()


def ppo_loss(texts, scores):
  """Returns the loss of a part, with the KL in the reward and advantages by GAE(0.95)."""
  with torch.no_grad():
    ref = log_probs(reference, texts)
  new, value = log_probs(policy, texts), values(texts)
  old, old_value = new.detach(), value.detach()
  rewards = -workload.BETA * (old - ref)
  rewards[:, -1] += scores
  following = torch.cat([old_value[:, 1:], torch.zeros_like(old_value[:, :1])], dim=1)
  deltas, advantages = rewards + following - old_value, torch.zeros_like(rewards)
  last = torch.zeros_like(scores)
  for t in reversed(range(size.completion_len)):
    last = deltas[:, t] + 0.95 * last
    advantages[:, t] = last
  return surrogate(new, old, advantages) + 0.5 * (value - old_value - advantages).square().mean()


def update(texts, scores):
  policy.train()
  loss_of = ppo_loss if args.algorithm == "ppo" else grpo_loss
  for part, own in zip(texts.split(rows_of_part), scores.split(rows_of_part), strict=True):
    (loss_of(part, own) * len(part) / len(texts)).backward()
  torch.nn.utils.clip_grad_norm_(parameters, workload.MAX_GRAD_NORM)
  adam.step()
  adam.zero_grad(set_to_none=True)


def wait(result):
  if on_gpu:
    torch.cuda.synchronize()


clock = workload.Clock(args.warm, args.timed)
generate, update = clock.timed("generate", generate, wait), clock.timed("update", update, wait)
clock.begin()
for _ in range(clock.num_iterations):
  shape = size.num_prompts, size.prompt_len
  prompts = torch.randint(workload.FIRST_WORD, size.vocab_size, shape, device=device)
  texts = generate(prompts.repeat_interleave(size.group_size, 0))
  assert texts.shape == (size.num_rows, size.prompt_len + size.completion_len)
  words = [" ".join(f"w{i}" for i in row[size.prompt_len :]) for row in texts.tolist()]
  scores = torch.tensor([workload.score(x) for x in words], device=device)
  if args.algorithm == "grpo":
    groups = scores.view(-1, size.group_size)
    deviations = groups - groups.mean(1, keepdim=True)
    scores = (deviations / (groups.std(1, keepdim=True) + 1e-4)).view(-1)
  update(texts, scores)
  clock.end_iteration()
clock.report(versions={"torch": torch.__version__, "transformers": transformers.__version__})
