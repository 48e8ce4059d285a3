"""Which model fits which TPU slice, from programs that are optimised for it ahead of time.

    python -m benchmarks.fits --only="PPO, Llama 3.1 8B"

A row is an algorithm, the shape of a model and a slice. Its programs are those of klrl's own dry
run, with all chips on `fsdp`: neither weights nor TPUs are needed, but libtpu is. The judge is left
out, since it runs a few times in a run and holds less than an update.

Every iteration has 256 rows of 512 tokens of prompt and 512 of completion: completions of PPO and
GRPO, whose groups have 8; texts of SFT; or pairs of DPO, which are two texts each. There is one
gradient step, of parts with at most 4 texts on a chip. Activations are in bfloat16 and computed
anew in the backward pass; trained parameters and moments are in float32, frozen parameters in
bfloat16. PPO has four models of one shape, GRPO has a reward function on the host, and LoRA has
rank 16.

Programs are optimised and not compiled to machine code (`klrl.cost.ahead`), which takes memory too
and is not counted, so that a row fits up to `ROOM` of the chip.

What does not fit by its models alone, is not compiled: `--held` prints what parameters, moments
and gradients take of each chip. The share of the memory is that of the program which takes most of
it; the bound is the sum over an iteration's programs of the time that each takes at least. A row
that is in the file of results is not compiled again. With --smallest smaller slices of the same
chip are compiled too: the smallest that holds the models first, until one fits.
"""

import argparse
import functools
import itertools
import json
import math
import pathlib
import re
import tempfile

import tokenizers

from benchmarks import results
from klrl.errors import UserError

FILE = pathlib.Path(__file__).parent / "results" / "fits.json"
NUM_ROWS, ROWS_OF_PART = 256, 4
PROMPT_LEN = COMPLETION_LEN = 512

# Of the config.json of each; Llama 3 has no model between 8B and 70B.
_LLAMA = {
  "model_type": "llama",
  "vocab_size": 128256,
  "num_attention_heads": 32,
  "num_key_value_heads": 8,
  "max_position_embeddings": 131072,
  "rms_norm_eps": 1e-5,
  "rope_theta": 500000.0,
}
_QWEN = {
  "model_type": "qwen3",
  "vocab_size": 151936,
  "num_key_value_heads": 8,
  "head_dim": 128,
  "max_position_embeddings": 40960,
  "rms_norm_eps": 1e-6,
  "rope_theta": 1000000.0,
}
SHAPES = {
  "Llama 3.2 1B": _LLAMA
  | {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "head_dim": 64}
  | {"tie_word_embeddings": True},
  "Llama 3.1 8B": _LLAMA
  | {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "head_dim": 128}
  | {"tie_word_embeddings": False},
  "Qwen 3 1.7B": _QWEN
  | {"hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 28}
  | {"num_attention_heads": 16, "tie_word_embeddings": True},
  "Qwen 3 8B": _QWEN
  | {"hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36}
  | {"num_attention_heads": 32, "tie_word_embeddings": False},
  "Qwen 3 32B": _QWEN
  | {"hidden_size": 5120, "intermediate_size": 25600, "num_hidden_layers": 64}
  | {"num_attention_heads": 64, "tie_word_embeddings": False},
}
# How many models are trained, and how many are frozen.
MODELS = {"PPO": (2, 2), "GRPO": (1, 1), "GRPO with LoRA": (0, 1), "SFT": (1, 0), "DPO": (1, 1)}
ALGORITHMS = tuple(MODELS)
MEMORY = {"v5e": 16, "v5p": 95, "v6e": 32}  # GiB of a chip
SLICES = ("v5e:4x4", "v5e:16x16", "v5p:4x4x4", "v6e:8x8")
SMALLER = {
  "v5e": ("2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16"),
  "v5p": ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4"),
  "v6e": ("2x2", "2x4", "4x4", "4x8", "8x8"),
}
BOUNDS = ("compute", "memory", "interconnect", "at_least")
ROOM = 0.95


def name_of(algorithm: str, shape: str, topology: str) -> str:
  """Returns the name of a row."""
  return f"{algorithm}, {shape}, {topology}"


def num_chips(topology: str) -> int:
  """Returns how many chips a slice such as v5e:4x4 has."""
  return math.prod(map(int, topology.partition(":")[2].split("x")))


def num_parameters(shape: dict) -> int:
  """Returns how many parameters a language model of that config.json has."""
  width, mlp, heads = (
    shape[x] for x in ("hidden_size", "intermediate_size", "num_attention_heads")
  )
  head_dim = shape["head_dim"]
  attention = 2 * width * head_dim * (heads + shape["num_key_value_heads"])
  norms = 2 * width + (2 * head_dim if shape["model_type"] == "qwen3" else 0)
  ends = (1 if shape["tie_word_embeddings"] else 2) * shape["vocab_size"] * width + width
  return ends + shape["num_hidden_layers"] * (attention + 3 * width * mlp + norms)


def held(algorithm: str, shape: dict, topology: str) -> float:
  """Returns the bytes of a chip's parameters, moments and gradients; what is computed comes on top.

  A trained parameter has 16 bytes and a frozen one has 2. LoRA's adapters are left out, and so are
  those parameters that only critics and reward models lack.
  """
  trained, frozen = MODELS[algorithm]
  return num_parameters(shape) * (16 * trained + 2 * frozen) / num_chips(topology)


def share_held(algorithm: str, shape: str, topology: str) -> float:
  """Returns which share of a chip's memory `held` is."""
  memory = MEMORY[topology.partition(":")[0]] * 2**30
  return held(algorithm, SHAPES[shape], topology) / memory


def table_of_held() -> str:
  """Returns the table of what the models of each row take of a chip, in Markdown."""
  head = ["algorithm", "model", *SLICES, *(f"fewest chips of {chip}" for chip in MEMORY)]
  lines = [head, ["---"] * len(head)]
  for algorithm in ALGORITHMS:
    for name in SHAPES:
      cells = [algorithm, name]
      for topology in SLICES:
        share = share_held(algorithm, name, topology)
        cells.append(f"{share:.0%}" if share <= 1 else f"**{share:.0%}**")
      for chip in MEMORY:
        slices = [f"{chip}:{size}" for size in SMALLER[chip]]
        fitting = [each for each in slices if share_held(algorithm, name, each) <= 1]
        cells.append(str(num_chips(fitting[0])) if fitting else "more")
      lines.append(cells)
  return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def write_inputs(folder: pathlib.Path, shape: dict) -> None:
  """Writes a model directory without weights, prompts, texts, pairs and a reward function."""
  fields = {"bos_token_id": None, "eos_token_id": 1, "pad_token_id": 0, "hidden_act": "silu"}
  (folder / "config.json").write_text(json.dumps(shape | fields | {"torch_dtype": "bfloat16"}))
  (folder / "tokenizer.json").write_text(_tokenizer(shape["vocab_size"]))

  def lines(name, record):
    records = [record(f"w{i + 3}") for i in range(20)]
    (folder / name).write_text("".join(json.dumps(x) + "\n" for x in records))

  def text(first, num):
    return " ".join([first, *["w4"] * (num - 1)])

  def of(first, last):
    # The tokenizer's end of the text is one more token.
    return {"prompt": text(first, PROMPT_LEN)} | {x: text(x, COMPLETION_LEN - 1) for x in last}

  lines("prompts.jsonl", lambda first: of(first, ()))
  lines("texts.jsonl", lambda first: of(first, ("completion",)))
  lines("pairs.jsonl", lambda first: of(first, ("chosen", "rejected")))
  reward = "def score(prompts, completions, **columns):\n  return [0.0] * len(completions)\n"
  (folder / "reward.py").write_text(reward)


@functools.cache
def _tokenizer(vocab_size: int) -> str:
  words = {f"w{i}": i for i in range(vocab_size)}
  tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="w2"))
  tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
  return tokenizer.to_str()


def dry_run_of(algorithm: str, folder: pathlib.Path, topology: str, mesh: str) -> list[dict]:
  """Returns the reports of a dry run of an iteration; `topology` "" is this machine's devices."""
  from experiments import dpo, grpo, ppo, sft
  from experiments.settings import training
  from klrl.cost import dry_run

  pairs = algorithm == "DPO"
  num_texts = NUM_ROWS * 2 if pairs else NUM_ROWS
  size = int(mesh.partition("=")[2])
  shared = {
    "policy": str(folder),
    "mesh": mesh,
    "dry_run": True,
    "topology": topology,
    "batch_size": NUM_ROWS,
    "accumulation": max(1, num_texts // (size * ROWS_OF_PART)),
    "dtype": "bfloat16",
    "remat": "full",
    "workdir": str(folder / "run"),
    "learning_rate": 1e-6,
  }
  if algorithm in ("SFT", "DPO"):
    experiment, data = (dpo, "pairs") if pairs else (sft, "texts")
    experiment.main(experiment.Config(data=f"{folder}/{data}.jsonl", **shared))
    return json.loads((folder / "run" / "dry_run.json").read_text())
  shared |= {
    "prompts": f"{folder}/prompts.jsonl",
    "max_completion_len": COMPLETION_LEN,
    "num_epochs": 1,
    "num_minibatches": 1,
  }
  if algorithm == "PPO":
    config = ppo.Config(reward_model=str(folder), **shared)
  else:
    rank = 16 if algorithm == "GRPO with LoRA" else 0
    config = grpo.Config(reward=f"{folder}/reward.py:score", lora_rank=rank, **shared)
  return dry_run.of_iteration(config, *training.shapes_of_inputs(config))


def figures_of(reports: list[dict], topology: str) -> dict:
  """Returns the figures of a row from those of its programs; of a refused one the memory."""
  memory = max(report["memory"]["total"] for report in reports)
  share = memory / 2**30 / MEMORY[topology.partition(":")[0]]
  is_known = all("flops" in report for report in reports)
  figures = {"fits": int(is_known and share <= ROOM), "memory, GiB": memory / 2**30, "share": share}
  for report in reports if is_known else ():
    for bound in BOUNDS:
      figures[f"{bound}, s"] = figures.get(f"{bound}, s", 0.0) + report["seconds"][bound]
  for report in reports if is_known else ():
    for sent in report["collectives"]:
      over = f"over {sent['axes']}, GB"
      figures[over] = figures.get(over, 0.0) + sent["bytes"] / 1e9
  return {name: float(f"{x:.4g}") if name != "fits" else x for name, x in figures.items()}


def refused(message: str) -> float | None:
  """Returns the bytes that the compiler asks for where it says that a chip has too few of them.

  They are those of intermediate values alone.
  """
  found = re.search(r"HLO temporaries \(([\d.]+)G\) exceeds", message)
  return float(found[1]) * 2**30 if found else None


def row_of(algorithm: str, shape: str, topology: str) -> dict | None:
  """Returns the figures of a row, or None where a program of it is not optimised."""
  with tempfile.TemporaryDirectory() as folder:
    folder = pathlib.Path(folder)
    write_inputs(folder, SHAPES[shape])
    try:
      reports = dry_run_of(algorithm, folder, topology, f"fsdp={num_chips(topology)}")
    except UserError as error:
      memory = refused(str(error))
      if memory is None:
        print(error, flush=True)
        return None
      reports = [{"memory": {"total": memory}}]
  return figures_of(reports, topology)


def candidates(algorithm: str, shape: str, topology: str) -> list[str]:
  """Returns the slices of the chip up to `topology` that hold the models, the smallest first."""
  chip, _, size = topology.partition(":")
  sizes = SMALLER[chip]
  slices = [f"{chip}:{each}" for each in sizes[: sizes.index(size) + 1]]
  return [each for each in slices if share_held(algorithm, shape, each) <= ROOM]


def smallest(rows: dict, algorithm: str, shape: str, topology: str) -> str:
  """Returns the smallest slice of the chip that is known to fit, and "" where none is known.

  Where a smaller one that holds the models was not compiled, it is "at most" that.
  """
  known = None
  for each in candidates(algorithm, shape, topology):
    row = rows.get(name_of(algorithm, shape, each))
    if row and row["fits"]:
      return each if known is None else f"at most {each}"
    known = known if row else each  # A smaller one of which nothing is known.
  return ""


def table(rows: dict) -> str:
  """Returns the table of all rows of the four slices, in Markdown."""
  head = ("algorithm", "model", "slice", "fits", "memory", "an iteration, at least", "bounded by")
  head += ("sent by a chip", "smallest that fits")
  lines = [head, ["---"] * len(head)]
  for key in itertools.product(ALGORITHMS, SHAPES, SLICES):
    row, held_alone = rows.get(name_of(*key)), share_held(*key)
    if held_alone > ROOM:
      lines.append([*key, "no", f"{held_alone:.0%} by the models alone", "", "", "", ""])
    elif row is None:
      lines.append([*key, "not compiled", "", "", "", "", ""])
    elif "at_least, s" not in row:
      lines.append([*key, "no", f"more than {row['share']:.0%}", "", "", "", ""])
    else:
      bound = max(BOUNDS[:-1], key=lambda bound: row[f"{bound}, s"])
      sent = [(name, x) for name, x in row.items() if name.startswith("over ")]
      sent = ", ".join(f"{x:.3g} GB {name.removesuffix(', GB')}" for name, x in sent)
      seconds = f"{row['at_least, s']:.3g} s"
      cells = "yes" if row["fits"] else "no", f"{row['share']:.0%}", seconds, bound, sent
      lines.append([*key, *cells, smallest(rows, *key)])
  return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def main() -> None:
  """Compiles the rows that are not in the file of results, and prints the table."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--only", default="", help="rows whose name has this text, or one of A|B")
  parser.add_argument("--held", action="store_true", help="only what models and moments take")
  parser.add_argument("--smallest", action="store_true", help="smaller slices too")
  args = parser.parse_args()
  if args.held:
    print(table_of_held())
    return
  rows = results.load()["fits"]["figures"] if FILE.exists() else {}

  def add(name, make):
    if name not in rows:
      figures = make()
      print(f"{name}: {figures or 'not compiled'}", flush=True)
      if figures is None:
        return False
      rows[name] = figures
      results.record("fits", dict(sorted(rows.items())))
    return rows[name].get("fits", 0)

  for key in itertools.product(ALGORITHMS, SHAPES, SLICES):
    if share_held(*key) > ROOM or not re.search(args.only, name_of(*key)):
      continue
    fits = add(name_of(*key), functools.partial(row_of, *key))
    for each in candidates(*key)[:-1] if args.smallest and fits else ():
      smaller = *key[:2], each
      if add(name_of(*smaller), functools.partial(row_of, *smaller)):
        break
  print(table(rows))


if __name__ == "__main__":
  main()
