"""Which model fits which TPU slice, from programs that are compiled for it ahead of time.

    python -m benchmarks.fits --only="PPO, Llama 3.1 8B"

A row is an algorithm, the shape of a model and a slice. Its programs are compiled by klrl's own dry
run, in a process of its own, with all chips on `fsdp`: neither weights nor TPUs are needed, but
libtpu is. A row that is in the file of results is not compiled again. The judge is left out, since
it runs a few times in a run and holds less than an update.

Every iteration has 256 rows of 512 tokens of prompt and 512 of completion: completions of PPO and
GRPO, whose groups have 8; texts of SFT; and halves of DPO's pairs. There is one gradient step, of
parts with at most 4 rows on a chip. Activations are in bfloat16 and computed anew in the backward
pass; trained parameters and moments are in float32, frozen parameters in bfloat16. PPO has four
models of one shape, GRPO has a reward function on the host, and LoRA has rank 16.

`--held` compiles nothing: it prints what parameters, moments and gradients take of each chip.

The share of the memory is that of the program which takes most of it; the bound is the sum over an
iteration's programs of the time that each takes at least. With --smallest smaller slices of the
same chip are compiled too, as long as they fit.
"""

import argparse
import json
import math
import pathlib
import re
import subprocess
import sys
import tempfile

import tokenizers

from benchmarks import results

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
_BYTES = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


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


def table_of_held() -> str:
  """Returns the table of what the models of each row take of a chip, in Markdown."""
  head = ["algorithm", "model", *SLICES, *(f"fewest chips of {chip}" for chip in MEMORY)]
  lines = [head, ["---"] * len(head)]
  for algorithm in ALGORITHMS:
    for name, shape in SHAPES.items():
      cells = [algorithm, name]
      for topology in SLICES:
        share = held(algorithm, shape, topology) / MEMORY[topology.partition(":")[0]] / 2**30
        cells.append(f"{share:.0%}" if share <= 1 else f"**{share:.0%}**")
      for chip, memory in MEMORY.items():
        fitting = [
          f"{chip}:{size}"
          for size in SMALLER[chip]
          if held(algorithm, shape, f"{chip}:{size}") <= memory * 2**30
        ]
        cells.append(str(num_chips(fitting[0])) if fitting else "more")
      lines.append(cells)
  return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def write_inputs(folder: pathlib.Path, shape: dict) -> None:
  """Writes a model directory without weights, prompts, texts, pairs and a reward function."""
  fields = {"bos_token_id": None, "eos_token_id": 1, "pad_token_id": 0, "hidden_act": "silu"}
  (folder / "config.json").write_text(json.dumps(shape | fields | {"torch_dtype": "bfloat16"}))
  words = {f"w{i}": i for i in range(shape["vocab_size"])}
  tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="w2"))
  tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
  tokenizer.save(str(folder / "tokenizer.json"))

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


def reports_of(algorithm: str, folder: pathlib.Path, topology: str, mesh: str) -> list[dict]:
  """Returns the reports of a dry run of an iteration; `topology` "" is the devices of this machine.

  Raises:
    UserError: it does not fit.
  """
  from experiments import dpo, grpo, ppo, sft
  from experiments.settings import training
  from klrl.cost import dry_run

  pairs = algorithm == "DPO"
  num_rows = NUM_ROWS // 2 if pairs else NUM_ROWS
  size = int(mesh.partition("=")[2])
  shared = {
    "policy": str(folder),
    "mesh": mesh,
    "dry_run": True,
    "topology": topology,
    "batch_size": num_rows,
    "accumulation": max(1, NUM_ROWS // (size * ROWS_OF_PART)),
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


def figures_of(reports: list[dict]) -> dict:
  """Returns the figures of a row from the reports of its programs."""
  memory = max((report["memory"] for report in reports), key=lambda memory: memory["total"])
  whole = memory["of"] or float("inf")  # Nobody knows what a CPU has, nor how fast it is.
  figures = {
    "fits": int(memory["total"] <= whole),
    "memory, GiB": round(memory["total"] / 2**30, 2),
    "share": round(memory["total"] / whole, 3),
  }
  times = [report["seconds"] for report in reports if report["seconds"]]
  for bound in BOUNDS:
    figures[f"{bound}, s"] = round(sum(seconds[bound] for seconds in times), 3)
  for found in (found for report in reports for found in report["collectives"]):
    name = f"over {found['axes']}, GB"
    figures[name] = round(figures.get(name, 0.0) + found["bytes"] / 1e9, 2)
  return figures | {"compiled in, s": sum(report["compile_seconds"] for report in reports)}


def figures_of_message(message: str, topology: str) -> dict:
  """Returns the figures of a row that the compiler refuses, or cannot show, from what is said."""
  refused = re.search(r"does not fit.*?Used ([\d.]+)([KMGT]) of ([\d.]+)([KMGT])", message)
  hidden = re.search(r"fits: it takes ([\d.]+) GiB", message)
  if refused:
    used, unit, of, unit_of = refused.groups()
    used, of = float(used) * _BYTES[unit] / 2**30, float(of) * _BYTES[unit_of] / 2**30
  elif hidden:
    used, of = float(hidden[1]), MEMORY[topology.partition(":")[0]]
  else:
    raise SystemExit(message)
  return {"fits": int(not refused), "memory, GiB": round(used, 2), "share": round(used / of, 3)}


def compile_row(algorithm: str, shape: str, topology: str) -> dict:
  """Returns the figures of a row, in this process."""
  from klrl.errors import UserError

  with tempfile.TemporaryDirectory() as folder:
    folder = pathlib.Path(folder)
    write_inputs(folder, SHAPES[shape])
    try:
      reports = reports_of(algorithm, folder, topology, f"fsdp={num_chips(topology)}")
    except UserError as error:
      return figures_of_message(str(error), topology)
    return figures_of(reports)


def in_own_process(algorithm: str, shape: str, topology: str, seconds: float) -> dict | None:
  """Returns the figures of a row, or None where compilation takes longer or fails."""
  row = ["--row", algorithm, shape, topology]
  try:
    done = subprocess.run(
      [sys.executable, "-m", "benchmarks.fits", *row],
      capture_output=True,
      text=True,
      timeout=seconds,
    )
  except subprocess.TimeoutExpired:
    return None
  if done.returncode:
    print(done.stderr[-2000:], file=sys.stderr)
    return None
  return json.loads(done.stdout.splitlines()[-1])


def smaller_than(topology: str) -> list[str]:
  """Returns the smaller slices of the same chip, the largest first."""
  chip, _, size = topology.partition(":")
  sizes = SMALLER[chip]
  return [f"{chip}:{each}" for each in reversed(sizes[: sizes.index(size)])]


def smallest(rows: dict, algorithm: str, shape: str, topology: str) -> str:
  """Returns the smallest slice of the chip that is known to fit, and "" where none is known."""
  fitting = [
    each
    for each in (topology, *smaller_than(topology))
    if rows.get(name_of(algorithm, shape, each), {}).get("fits")
  ]
  return fitting[-1] if fitting else ""


def table(rows: dict) -> str:
  """Returns the table of all rows of the four slices, in Markdown."""
  head = ("algorithm", "model", "slice", "fits", "memory", "an iteration, at least", "bounded by")
  head += ("sent by a chip", "smallest that fits")
  lines = [head, ["---"] * len(head)]
  for name, row in rows.items():
    algorithm, shape, topology = name.split(", ")
    if topology not in SLICES:
      continue
    seconds = bound = ""
    if "at_least, s" in row:
      seconds = f"{row['at_least, s']:.3g} s"
      bound = max(BOUNDS[:-1], key=lambda bound: row[f"{bound}, s"])
    sent = [(key, x) for key, x in row.items() if key.startswith("over ")]
    sent = ", ".join(f"{x:.3g} GB {key.removesuffix(', GB')}" for key, x in sent)
    fits = "yes" if row["fits"] else "no"
    cells = (algorithm, shape, topology, fits, f"{row['share']:.0%}", seconds, bound, sent)
    lines.append([*cells, smallest(rows, algorithm, shape, topology)])
  return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def main() -> None:
  """Compiles the rows that are not in the file of results, and prints the table."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--only", default="", help="rows whose name has this text, or one of A|B")
  parser.add_argument("--held", action="store_true", help="only what models and moments take")
  parser.add_argument("--smallest", action="store_true", help="smaller slices too")
  parser.add_argument("--timeout", type=float, default=3600, help="seconds for a row")
  parser.add_argument("--row", nargs=3, help="compile this row alone, and print its figures")
  args = parser.parse_args()
  if args.held:
    print(table_of_held())
    return
  if args.row:
    print(json.dumps(compile_row(*args.row)))
    return
  rows = results.load()["fits"]["figures"] if FILE.exists() else {}

  def row_of(*key):
    name = name_of(*key)
    if name not in rows:
      figures = in_own_process(*key, args.timeout)
      print(f"{name}: {figures or 'not compiled'}", flush=True)
      if figures is None:
        return None
      rows[name] = figures
      results.record("fits", dict(sorted(rows.items())))
    return rows[name]

  wanted = [
    (algorithm, shape, topology)
    for algorithm in ALGORITHMS
    for shape in SHAPES
    for topology in SLICES
    if re.search(args.only, name_of(algorithm, shape, topology))
  ]
  for algorithm, shape, topology in wanted:
    row = row_of(algorithm, shape, topology)
    for smaller in smaller_than(topology) if args.smallest else ():
      if not (row and row["fits"]):
        break
      row = row_of(algorithm, shape, smaller)
  print(table(rows))


if __name__ == "__main__":
  main()
