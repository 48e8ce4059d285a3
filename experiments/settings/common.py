"""From a frozen config to absl flags and back; the fields that every experiment has.

A field of an experiment's `Config` is declared once, with its default, help and range:

    beta: float = setting(0.1, "KL coefficient ...", minimum=0.0)

`launch(main, Config)` makes the flags of the same names, parses the command line and calls
`main(config)`. Importing an experiment defines no flag.
"""

import dataclasses
import inspect
import os
import pathlib
import signal
import sys
from typing import Any, ClassVar

import jax
from absl import app, flags, logging

from experiments.settings import learning_rates, usage
from klrl.algorithm.optimizer import SCHEDULES
from klrl.devices import compilation, processes
from klrl.errors import PeerLost, UserError, troubles_told
from klrl.models import REMAT
from klrl.run import checkpoint, trackers
from klrl.run.evaluations import BY_DEFAULT
from klrl.run.loop import Interrupted
from klrl.run.progress import console, fail, say_once
from klrl.run.workdir import check_writable, is_read
from klrl.tasks.registry import TASKS


def setting(
  default,
  help: str,
  *,
  choices: tuple[str, ...] | None = None,
  minimum: float | None = None,
  maximum: float | None = None,
  read_when: tuple[str, tuple] | None = None,
) -> Any:
  """Returns a dataclass field that is also a flag.

  Args:
    default: the default; its type is the flag's.
    help: one line with the unit.
    choices: the values allowed.
    minimum: smallest value allowed.
    maximum: largest value allowed.
    read_when: (other field, values): this field is read only while the other field has one of these
      values; setting it otherwise is an error, so that no flag is silently without effect.
  """
  metadata = {
    "help": help,
    "choices": choices,
    "minimum": minimum,
    "maximum": maximum,
    "read_when": read_when,
  }
  return dataclasses.field(default=default, metadata=metadata)


def again(config_class, name: str, *, default) -> Any:
  """Returns the setting `name` of `config_class` with another default."""
  metadata = config_class.__dataclass_fields__[name].metadata
  return dataclasses.field(default=default, metadata=metadata)


STAGES = "runs/stages"  # where the embedded stages leave their models
AS_IN_FILE = "file"  # of the models that a run starts from
_INTERIM_ROWS = 128
CHOSEN = -1.0  # a learning rate that the experiment chooses
ACCEPT_CHANGED_INPUTS = setting(
  False, "go on where prompts, reward, tokenizer or weights are not what they were at the start"
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LabConfig:
  """The fields of every experiment. Constructing one checks all ranges (UserError)."""

  workdir: str = setting("", "folder of the run; default: runs/EXPERIMENT-HASH of the flags")
  seed: int = setting(0, "seed of sampling and minibatch order", minimum=0)
  compilation_cache: str = setting(
    compilation.AUTO,
    "folder from which the next start reads compiled programs; auto: klrl/compiled in the user's "
    "cache, or what JAX_COMPILATION_CACHE_DIR says; none: each start compiles",
  )

  def __post_init__(self):
    for field in dataclasses.fields(self):
      value, rule = getattr(self, field.name), field.metadata
      if isinstance(field.default, float):  # 1 and 1.0 are one configuration, with one hash.
        value = float(value)
        object.__setattr__(self, field.name, value)
      if rule["choices"] and value not in rule["choices"]:
        raise UserError(f"--{field.name}={value}: must be one of {', '.join(rule['choices'])}.")
      # `not >=` rather than `<`: NaN fails too.
      if rule["minimum"] is not None and not value >= rule["minimum"]:
        raise UserError(f"--{field.name}={value}: must be at least {rule['minimum']}.")
      if rule["maximum"] is not None and not value <= rule["maximum"]:
        raise UserError(f"--{field.name}={value}: must be at most {rule['maximum']}.")
      if value != field.default:
        check_is_read(self, field)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig(LabConfig):
  """Training, checkpoints and devices."""

  rate_factor: ClassVar[float] = 1.0  # of the learning rate of a model of the user's

  init_seed: int = setting(0, "seed of fresh parameters and of the stages before", minimum=0)
  data_seed: int = setting(0, "seed of what is held out, and of the order of prompts", minimum=0)
  num_iterations: int = setting(100, "iterations", minimum=1)
  batch_size: int = setting(256, "rows per iteration", minimum=1)
  accumulation: int = setting(
    1,
    "parts a gradient is computed in, one after the other: less memory, same result; a CPU takes "
    "more of them where they are faster",
    minimum=1,
  )
  max_grad_norm: float = setting(1.0, "largest global gradient norm", minimum=0.0)
  learning_rate: float = setting(
    CHOSEN,
    "peak learning rate of Adam; -1: one tuned for the embedded models, or for --policy=DIR one by "
    "its size, which is said when it is read",
    minimum=CHOSEN,
  )
  learning_rate_schedule: str = setting(
    "cosine", "how the learning rate falls, to a tenth of its peak", choices=SCHEDULES
  )
  warmup_iterations: int = setting(
    0, "iterations over which the learning rate rises to its peak", minimum=0
  )
  dtype: str = setting(
    "float32",
    "what activations are computed in; moments are float32, see --param_dtype for parameters",
    choices=("float32", "bfloat16"),
  )
  param_dtype: str = setting(
    "float32",
    "what trained parameters are stored in; bfloat16 takes half the memory, but each step is "
    "rounded, and one below about 1/500 of a weight is lost",
    choices=("float32", "bfloat16"),
  )
  frozen_dtype: str = setting(
    AS_IN_FILE,
    "what parameters of the reference, the reward model and LoRA's base are stored in; where the "
    "policy starts as its reference, both start from the rounded numbers",
    choices=(AS_IN_FILE, "float32", "bfloat16"),
  )
  save_dtype: str = setting(
    AS_IN_FILE,
    "what the weights of saved models are rounded to; file: as those that the run started from",
    choices=(AS_IN_FILE, "float32", "bfloat16"),
  )
  remat: str = setting(
    "none",
    "what the backward pass computes anew, for less memory: none; all but products with weights "
    "(dots); each layer (full)",
    choices=tuple(REMAT),
  )
  lora_rank: int = setting(
    0, "rank of the adapters that are trained in place of the model; 0: the model", minimum=0
  )
  mesh: str = setting("", "devices, e.g. data=4,fsdp=2; default: all of them on data")
  save_every: int = setting(50, "iterations between checkpoints", minimum=1)
  keep: int = setting(2, "checkpoints that are kept", minimum=1)
  accept_changed_inputs: bool = ACCEPT_CHANGED_INPUTS
  profile: bool = setting(
    False, "write a trace of a few iterations to WORKDIR/profile, and show what took longest"
  )
  tensorboard: bool = setting(False, "write event files to WORKDIR/tensorboard")
  wandb_project: str = setting(
    "", "project of Weights & Biases to log to; WANDB_MODE=offline writes to WORKDIR/wandb alone"
  )

  def __post_init__(self):
    super().__post_init__()
    if self.warmup_iterations >= self.num_iterations:
      raise UserError(
        f"--warmup_iterations={self.warmup_iterations} leaves nothing of "
        f"--num_iterations={self.num_iterations}."
      )
    self.check_divides("accumulation", self.batch_size, "--batch_size")

  def choose_learning_rate(self, *, embedded: float) -> None:
    """Sets a learning rate that nobody gave to `embedded`, tuned for models of the embedded task.

    That of a model of the user's, to which this one would do harm, is chosen by `fitted`.
    """
    if self.learning_rate == CHOSEN and not self.policy:
      object.__setattr__(self, "learning_rate", embedded)
    if self.learning_rate < 0 and self.learning_rate != CHOSEN:
      raise UserError(f"--learning_rate={self.learning_rate}: must be at least 0, or -1.")

  def fitted(self, params) -> "RunConfig":
    """Returns the config with a learning rate; one that nobody gave fits the model of `params`.

    Where adapters are trained, `params` are those of the model that they adapt.
    """
    if self.learning_rate != CHOSEN:
      return self
    size = sum(leaf.size for leaf in jax.tree.leaves(params))
    rate = learning_rates.of_size(size, factor=self.rate_factor, lora_rank=self.lora_rank)
    reason = learning_rates.reason(size, rate, lora_rank=self.lora_rank)
    say_once(reason)
    return dataclasses.replace(self, learning_rate=rate)

  def check_has_frozen(self) -> None:
    """Raises UserError where `frozen_dtype` is set and there is no base of adapters to read it."""
    if self.frozen_dtype != AS_IN_FILE and not self.lora_rank:
      raise UserError("--frozen_dtype is set, but nothing reads it without --lora_rank.")

  def check_divides(self, name: str, number: int, of: str) -> None:
    """Raises UserError where the field `name` does not divide `number`, which is called `of`."""
    if number % getattr(self, name):
      raise UserError(f"{of} = {number} is not a multiple of --{name}={getattr(self, name)}.")

  @property
  def saved_dtype(self) -> str:
    """`save_dtype` as `save_policy` takes it."""
    return "" if self.save_dtype == AS_IN_FILE else self.save_dtype

  def loop_settings(self) -> dict[str, Any]:
    """Returns the fields that `loop.iterate` takes under the same names."""
    names = ("num_iterations", "save_every", "keep", "profile", "tensorboard", "wandb_project")
    return {name: getattr(self, name) for name in names}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChatFields:
  """Chats, and what ends a completion; to be mixed into a config that has `policy`."""

  chat: bool = setting(
    False, "text is what the user says to the model, in its chat template; messages always are"
  )
  chat_template: str = setting(
    "", "file with a Jinja template, or a name among the model's; default: the model's own"
  )
  system_prompt: str = setting("", "opens each chat that has no message of the system")
  stop_tokens: str = setting(
    "",
    "tokens that end a completion beside the model's own, by text or id, e.g. '<end_of_turn>,106'",
  )

  def check_chat(self, data: str) -> None:
    """Raises UserError where one of these is set, and there are no data of the user's."""
    for name in inspect.get_annotations(ChatFields):
      if getattr(self, name) and not getattr(self, data):
        raise UserError(f"--{name} is set, but nothing reads it without --{data}.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class PromptFields(ChatFields):
  """Prompts; to be mixed into a config that has `policy`."""

  task: str = setting(
    "arithmetic",
    "the embedded task: " + "; ".join(f"{name} {task.about}" for name, task in TASKS.items()),
    choices=tuple(TASKS),
    read_when=("policy", ("",)),
  )
  prompts: str = setting(
    "",
    "rows with prompt (text or a chat), or messages: JSON lines, Parquet, or OWNER/NAME[:SPLIT] of "
    "the hub; default: the embedded task's",
  )
  prompt_template: str = setting(
    "{prompt}", r"a prompt, made of a row's columns, e.g. 'Question: {question}\nAnswer:'"
  )
  max_prompt_len: int = setting(
    0,
    "most tokens of a prompt, longer ones are left out (0: what the context leaves, and a longer "
    "one is an error)",
    minimum=0,
  )
  max_completion_len: int = setting(
    0, "most tokens of a completion; 0: the embedded task's limit, else 64", minimum=0
  )


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScoreFields:
  """Where scores come from."""

  reward_model: str = setting("", "model directory that scores; default: the embedded stage")
  reward: str = setting(
    "",
    "what scores: FILE.py:FUNCTION with f(prompts, completions, **columns), or math, or model; "
    "several with weights as model,0.1*FILE.py:FUNCTION; default: model",
  )
  reward_timeout: float = setting(
    0.0,
    "seconds that one call of a reward function, or its file, may take; 0: as long as it likes",
    minimum=0.0,
  )
  reward_retries: int = setting(
    0, "times that a reward function is called again if it fails or takes too long", minimum=0
  )

  def check_scores(self) -> None:
    """Raises UserError where something is set that only reward functions read."""
    for name in ("reward_timeout", "reward_retries"):
      if getattr(self, name) and self.reward in ("", "model"):
        raise UserError(f"--{name} is set, but nothing reads it without a function in --reward.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class JudgeFields:
  """How a policy is judged on held-out prompts."""

  num_eval_rows: int = setting(512, "completions that a policy is judged by", minimum=2)
  eval_completions: int = setting(
    4,
    "completions per prompt for pass@k and maj@k, of the first num_eval_rows / k prompts; read by "
    "tasks whose answers can be checked",
    minimum=1,
  )
  eval_batch_size: int = setting(
    0,
    "completions that a model draws at once where it is judged; 0: as many as an iteration has "
    "prompts but at least 128, and all of them in experiments.evaluate",
    minimum=0,
  )
  num_samples: int = setting(8, "completions shown in the report", minimum=0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluationFields(JudgeFields):
  """How a policy is judged while it trains."""

  eval_every: int = setting(
    BY_DEFAULT,
    "iterations between evaluations on held-out prompts while it trains; -1: about ten times in a "
    "run, 0: never",
    minimum=BY_DEFAULT,
  )
  num_interim_rows: int = setting(
    0,
    "completions of such an evaluation, at most num_eval_rows; 0: all of them, and 128 for "
    "--policy=DIR, which takes longer to draw them",
    minimum=0,
  )
  keep_best: str = setting(
    "",
    "the figure of the evaluations whose best model is kept in WORKDIR/model_best, beside the last "
    "one: score, or gold where answers can be checked",
    choices=("", "score", "gold"),
  )

  def check_evaluations(self) -> None:
    """Raises UserError where something is set that only evaluations read, and there are none."""
    for name in ("num_interim_rows", "keep_best"):
      if getattr(self, name) and not self.eval_every:
        raise UserError(f"--{name} is set, but nothing reads it with --eval_every=0.")

  def prompts_per_iteration(self) -> int:
    """Returns how many prompts, whose cache a device holds at once, an iteration has."""
    return self.batch_size

  def drawn_at_once(self) -> int:
    """Returns how many completions a model draws at once when it is judged."""
    enough = self.eval_batch_size or max(self.prompts_per_iteration(), _INTERIM_ROWS)
    return min(enough, self.num_eval_rows)

  def read_at_once(self) -> int:
    """Returns how many completions models read at once: a part, as a gradient is in parts."""
    return -(-self.drawn_at_once() // self.accumulation)

  def interim_rows(self) -> int:
    """Returns how many completions an evaluation draws while the policy trains."""
    # With the rows of the judge before and after nothing is compiled anew.
    rows = min(_INTERIM_ROWS, self.num_eval_rows) if self.policy else self.num_eval_rows
    return min(self.num_interim_rows or rows, self.num_eval_rows)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SftStageFields:
  """The embedded SFT stage; to be mixed into a config that has `policy`."""

  sft_iterations: int = setting(
    700, "iterations of the embedded SFT stage", minimum=1, read_when=("policy", ("",))
  )


@dataclasses.dataclass(frozen=True, kw_only=True)
class StageFields(SftStageFields):
  """The stage of the embedded reward model; comes after that of SFT."""

  reward_model_iterations: int = setting(
    1000, "iterations of the embedded reward model stage", minimum=1, read_when=("policy", ("",))
  )


@dataclasses.dataclass(frozen=True, kw_only=True)
class DryRunFields:
  """What a run would cost, without running it; see `klrl.cost.dry_run`."""

  dry_run: bool = setting(
    False, "compile only, and say what memory, work and traffic each device would have"
  )
  topology: str = setting(
    "",
    "TPU slice to compile for, e.g. v5e:16x16 or v5p:8x8x8; default: the devices that are there",
    read_when=("dry_run", (True,)),
  )


def check_is_read(config, field: dataclasses.Field) -> None:
  """Raises UserError where nothing reads `field` under the other values of `config`."""
  if not is_read(config, field):
    other, values = field.metadata["read_when"]
    given = "|".join(map(str, values))
    raise UserError(
      f"--{field.name} is set, but nothing reads it with --{other}={getattr(config, other)}; "
      f"it is read {f'with --{other}={given}' if given else f'without --{other}'}."
    )


def define_flags(config_class) -> None:
  """Defines one absl flag for each field of `config_class`."""
  define = {
    bool: flags.DEFINE_bool,
    int: flags.DEFINE_integer,
    float: flags.DEFINE_float,
    str: flags.DEFINE_string,
  }
  for field in dataclasses.fields(config_class):
    if field.metadata["choices"]:
      flags.DEFINE_enum(
        field.name, field.default, field.metadata["choices"], field.metadata["help"]
      )
    else:
      define[type(field.default)](field.name, field.default, field.metadata["help"])


def config_from_flags(config_class):
  """Returns the config that the parsed flags describe."""
  fields = dataclasses.fields(config_class)
  config = config_class(**{field.name: flags.FLAGS[field.name].value for field in fields})
  for field in fields:
    if flags.FLAGS[field.name].present:
      check_is_read(config, field)
  return config


def check_machine(config) -> None:
  """Sets up this machine, or raises UserError where it lacks what `config` asks for.

  It is called before any stage.
  """
  for name in trackers.TRACKERS:
    if getattr(config, name, False):
      trackers.check(name)
  if config.workdir:
    processes.on_writer(check_writable)(pathlib.Path(config.workdir))
  if not getattr(config, "dry_run", False):  # It says how long compilation takes.
    compilation.keep(config.compilation_cache)


def launch(main, config_class, *, prepare=lambda: None, argument: str = "") -> None:
  """Runs `main(config)` with the config from the command line; the body of every main guard.

  `prepare` is called before anything is computed. `argument` is the setting that may be given
  without its name.
  """
  define_flags(config_class)

  def parse(arguments):
    if {"--help", "-h", "-help", "--helpshort"} & set(arguments[1:]):
      print(usage.text(config_class, inspect.getdoc(sys.modules["__main__"]) or ""), end="")
      sys.exit(0)
    try:
      return flags.FLAGS(arguments)
    except flags.UnrecognizedFlagError as error:
      message = usage.unknown(config_class, error.flagname)
    except flags.Error as error:
      message = f"{error}.".removeprefix("ERROR:: ")  # absl's, before ours
    fail(message)
    sys.exit(1)

  def call(arguments):
    if not flags.FLAGS["verbosity"].present:
      # Orbax tells of every step of a save, and in 300 lines of what it raises as well.
      logging.set_verbosity(logging.FATAL)
    sys.unraisablehook = checkpoint.without_leftovers(sys.unraisablehook)
    status = 0
    try:
      named = (field.name for field in dataclasses.fields(config_class))
      given = {name: flags.FLAGS[name].value for name in named}
      processes.connect(given)
      prepare()
      console.quiet = not processes.is_writer()
      if argument and len(arguments) == 2:
        flags.FLAGS[argument].parse(arguments.pop())
      if len(arguments) > 1:
        raise UserError(f"Unexpected argument {arguments[1]!r}; every setting is a --flag=value.")
      with troubles_told():
        config = config_from_flags(config_class)
        check_machine(config)
        main(config)
    except PeerLost as error:
      processes.end_alone(str(error))
    except UserError as error:
      fail(str(error))
      processes.leave(str(error))
      status = 1
    except Interrupted as stop:
      console.print(str(stop), soft_wrap=True)
      status = 130
    except KeyboardInterrupt:  # Outside the loop, or a second Ctrl-C inside it.
      # In every process: the others say that one is gone, and to see what that one said.
      print("Interrupted. The same command goes on from what was saved.", flush=True)
      os._exit(130)  # An orderly exit crashes where XLA is compiling.
    # All is saved and said. Another Ctrl-C would only make the interpreter's own end fail.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if processes.is_alone():
      processes.leave_threads(status)
    sys.exit(status)

  app.run(call, flags_parser=parse)
