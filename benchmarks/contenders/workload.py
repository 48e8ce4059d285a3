"""The work that klrl and its peers are timed on, and the clock that times them.

It imports the standard library alone, since each peer runs in an environment of its own. A
contender is a program beside this file; it prints one line of JSON, which `Clock.report` makes.
"""

import argparse
import dataclasses
import json
import os
import random
import resource
import time

# Before a peer's library is imported. No peer may look for a model on the hub.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
os.environ |= {"TOKENIZERS_PARALLELISM": "false", "TRL_EXPERIMENTAL_SILENCE": "1"}

FIRST_WORD = (
  8  # Smaller ids are special: 0 is padding, 1 ends a text where a peer needs such a one.
)
BETA, CLIP, LEARNING_RATE, MAX_GRAD_NORM = 0.04, 0.2, 1e-6, 1.0


@dataclasses.dataclass(frozen=True)
class Size:
  """A Qwen2 decoder with a tied embedding in float32, and the texts of an iteration."""

  num_layers: int
  width: int
  num_heads: int
  mlp_dim: int
  vocab_size: int
  prompt_len: int
  completion_len: int
  num_prompts: int
  group_size: int = 4

  @property
  def num_rows(self) -> int:
    return self.num_prompts * self.group_size

  @property
  def num_body(self) -> int:
    """The parameters of the linear maps of all layers, as many keys as queries."""
    return self.num_layers * (4 * self.width**2 + 3 * self.width * self.mlp_dim)

  @property
  def num_parameters(self) -> int:
    biases_and_scales = self.num_layers * 5 * self.width + self.width
    return self.num_body + self.vocab_size * self.width + biases_and_scales

  def qwen2_config(self) -> dict:
    """Returns the fields of a config.json, as `transformers.Qwen2Config` takes them."""
    return {
      "vocab_size": self.vocab_size,
      "hidden_size": self.width,
      "intermediate_size": self.mlp_dim,
      "num_hidden_layers": self.num_layers,
      "num_attention_heads": self.num_heads,
      "num_key_value_heads": self.num_heads,
      "max_position_embeddings": 1024,
      "tie_word_embeddings": True,
      "attention_dropout": 0.0,
    }


SIZES = {
  "small": Size(4, 256, 4, 1024, 4096, prompt_len=32, completion_len=64, num_prompts=16),
  "large": Size(6, 512, 8, 1536, 32000, prompt_len=64, completion_len=64, num_prompts=4),
  "toy": Size(1, 32, 2, 64, 64, prompt_len=4, completion_len=4, num_prompts=2),
}
# For a GPU: 64 completions, 1,024 tokens with their prompt.
_ON_GPU = {"prompt_len": 512, "completion_len": 512, "num_prompts": 8, "group_size": 8}
SIZES |= {
  "0.1B": Size(12, 768, 12, 2048, 32000, **_ON_GPU),
  "0.6B": Size(24, 1408, 22, 3840, 32000, **_ON_GPU),
  "1.2B": Size(24, 2048, 16, 5120, 32000, **_ON_GPU),
}

ALGORITHMS = ("grpo", "ppo", "log_probs", "log_probs_gradient")
# [B, T], V and D of the log-probabilities, which are computed from hidden states.
LOG_PROBS = {"large": (8, 512, 32000, 512), "toy": (2, 8, 64, 32)}


def flops(size: Size, algorithm: str) -> float:
  """Returns the floating-point operations of an iteration that computes each row by itself.

  Two for each multiply-add of a linear map and of causal attention; the vocabulary where a token is
  drawn or scored alone. One pass draws, one is the reference's, and a trained pass counts thrice.
  """

  generated = _body(size, size.prompt_len + size.completion_len - 1) + _head(size)
  return generated + flops_of_update(size, algorithm)


def flops_of_update(size: Size, algorithm: str) -> float:
  """Returns those of `flops` without drawing."""
  body = _body(size, size.prompt_len + size.completion_len)
  return 4 * (body + _head(size)) + (4 * body if algorithm == "ppo" else 0)


def _body(size: Size, num_fed: int) -> float:
  """Returns those of a pass of all rows over the layers, each row with `num_fed` tokens."""
  attention = 2 * size.num_layers * size.width * num_fed**2
  return size.num_rows * (2 * size.num_body * num_fed + attention)


def _head(size: Size) -> float:
  """Returns those of the vocabulary at all tokens of the completions."""
  return size.num_rows * 2 * size.vocab_size * size.width * size.completion_len


def prompts(size: Size, count: int) -> list[str]:
  """Returns prompts of exactly `prompt_len` words, such as "w12 w9"."""
  rng = random.Random(0)
  words = range(FIRST_WORD, size.vocab_size)
  return [" ".join(f"w{rng.choice(words)}" for _ in range(size.prompt_len)) for _ in range(count)]


def vocabulary(size: Size) -> dict[str, int]:
  """Returns {word: id}, with names for the special ids too."""
  return {(f"w{i}" if i >= FIRST_WORD else f"<{i}>"): i for i in range(size.vocab_size)}


def score(completion: str) -> float:
  """Returns a reward that costs nothing and differs within a group."""
  return sum(map(ord, completion[-32:])) % 13 / 13


class Clock:
  """Seconds of each iteration and its parts, and what else the machine did meanwhile."""

  def __init__(self, num_warm: int, num_timed: int):
    self.num_warm, self.num_iterations = num_warm, num_warm + num_timed
    self._peak = self._loaded = 0.0
    self._rows, self._parts, self._last = [], {}, None

  def begin(self) -> None:
    """Call it when everything is loaded, before the first iteration, which compiles."""
    self._loaded = _status_mib("VmRSS")
    self._last = _now()

  def timed(self, part: str, fn, wait=lambda result: None):
    """Returns `fn`, whose seconds are added to `part`; `wait` waits for its result."""

    def call(*arguments, **named):
      began = time.perf_counter()
      result = fn(*arguments, **named)
      wait(result)
      self._parts[part] = self._parts.get(part, 0.0) + time.perf_counter() - began
      return result

    return call

  def end_iteration(self) -> None:
    """Call it when the parameters of the next iteration are there."""
    now = _now()
    seconds, own, all_busy = (x - y for x, y in zip(now, self._last, strict=True))
    others = max(0.0, all_busy - own) / seconds
    self._rows.append({"seconds": seconds, **self._parts, "cpu": own, "others": others})
    self._parts, self._last = {}, now
    if len(self._rows) == self.num_warm:
      _forget_peak()
    if len(self._rows) == self.num_iterations:
      self._peak = _status_mib("VmHWM")

  def report(self, **more) -> None:
    """Prints the line that `benchmarks.peers` reads; `extra_mib` is beside what was loaded."""
    rows = [{key: round(x, 4) for key, x in row.items()} for row in self._rows]
    found = {"first": rows[0], "timed": rows[self.num_warm :], "peak_mib": round(self._peak)}
    print(json.dumps(found | {"extra_mib": round(self._peak - self._loaded)} | more), flush=True)


def _now() -> tuple[float, float, float]:
  """Returns (seconds, CPU seconds of this process, those of the machine)."""
  usage = resource.getrusage(resource.RUSAGE_SELF)
  with open("/proc/stat") as file:
    busy = [int(x) for x in file.readline().split()[1:8]]
  del busy[3:5]  # idle, and waiting for a disk
  ticks = os.sysconf("SC_CLK_TCK")
  return time.perf_counter(), usage.ru_utime + usage.ru_stime, sum(busy) / ticks


def _forget_peak() -> None:
  with open("/proc/self/clear_refs", "w") as file:
    file.write("5")


def _status_mib(field: str) -> float:
  with open("/proc/self/status") as file:
    line = next(line for line in file if line.startswith(field))
  return int(line.split()[1]) / 1024


def time_calls(clock: Clock, call) -> None:
  """Runs `call()`, which waits for its result, as the iterations of `clock`."""
  clock.begin()
  for _ in range(clock.num_iterations):
    call()
    clock.end_iteration()


def arguments() -> argparse.Namespace:
  """Returns what every contender is told: size, algorithm, numbers of iterations, a folder."""
  parser = argparse.ArgumentParser()
  parser.add_argument("--size", choices=SIZES, default="small")
  parser.add_argument("--algorithm", choices=ALGORITHMS, default="grpo")
  parser.add_argument("--warm", type=int, default=2)
  parser.add_argument("--timed", type=int, default=3)
  parser.add_argument("--folder", required=True, help="for files; empty at first, and kept")
  return parser.parse_args()
