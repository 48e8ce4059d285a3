"""Many runs of one experiment in one program: every beta and every seed, on one mesh.

    python -m experiments.sweep --experiment=ppo --sweep="beta=0,0.03,0.1,0.3,1" --seeds=2

`--sweep` is a grid over any flags of the experiment, which may be given beside it as ever:

    beta=0.1,0.3                                      two runs
    beta=0.1,0.3;learning_rate=1e-4,5e-4              each with each: four runs
    beta,learning_rate=0.1:1e-4,0.3:5e-4              in pairs: two runs

and `--seeds=K` runs all of it with the seeds from --seed on. Coefficients and seeds are traced, so
they share one compiled program; a value that makes another program (an estimator, a number of
epochs) makes a group of its own. Members are put on the mesh's axis `sweep`, and their parameters
on the others: --mesh=sweep=4,fsdp=2. Without one they are put on all devices, and every core of a
processor without an accelerator is one. A device computes its members one after another, or
--members_per_batch of them at a time, which is faster where one alone leaves it idle.

A member is trained as the single run with the same flags; all are judged with the same noise, that
of --seed. What the sweep leaves in its folder: a folder for each member in `members`, like any
run's, `frontier.json`, what each reached at which KL to the reference, and `report.html`, which
beta to take. The folder's name is made of all flags but --sweep and --seeds, so that further values
run alone and join the others. `python -m experiments.ppo --flagfile=FOLDER/flags.txt
--workdir=FOLDER` makes the report of a member.

The page compares the members with best-of-n sampling from the policy at the start, and with the
best policies for each beta. A run of `experiments.best_of_n`, in the folder `best_of_n`, estimates
both; --nobest_of_n leaves it out.

Six betas with two seeds take about six minutes on 2 cores, all stages included.
"""

import dataclasses
import difflib
import itertools
import json
import pathlib
import sys
from typing import Any

from absl import flags
from rich.table import Table

from experiments import best_of_n, distill, grpo, ppo, reinforce
from experiments.settings import common, training, usage
from experiments.settings.common import LabConfig, setting
from klrl import inputs, population
from klrl.cost import dry_run
from klrl.devices import parallel, processes
from klrl.errors import UserError
from klrl.figures import KL, find, shown
from klrl.report.of_sweep import write_page
from klrl.run import fingerprints, lock, progress
from klrl.run.workdir import NOT_PART_OF_THE_RESULT, create_workdir, find_workdir

EXPERIMENTS = {"ppo": ppo, "grpo": grpo, "reinforce": reinforce, "distill": distill}


@dataclasses.dataclass(frozen=True, kw_only=True)
class SweepConfig(LabConfig):
  """What a sweep has beside the flags of its experiment."""

  experiment: str = setting("ppo", "what is run", choices=tuple(EXPERIMENTS))
  sweep: str = setting("", 'the grid, e.g. "beta=0.1,0.3;learning_rate=1e-4,5e-4"')
  seeds: int = setting(1, "seeds of each, from --seed on", minimum=1)
  members_per_batch: int = setting(
    1, "most members that a device computes at a time; more: equal to rounding", minimum=1
  )
  best_of_n: bool = setting(
    True, "draw best-of-n beside members that share what they start from and are scored by"
  )


def config_class(experiment: str) -> type:
  """Returns the dataclass of a sweep: the settings of `experiment`, and the sweep's own.

  Which settings go together is for each member to check, whose values are not known yet.
  """
  fields = [
    (
      field.name,
      field.type,
      dataclasses.field(
        default=field.default,
        metadata={
          **field.metadata,
          "read_when": None,
          "group": usage.group_of(EXPERIMENTS[experiment].Config, field.name),
        },
      ),
    )
    for field in dataclasses.fields(EXPERIMENTS[experiment].Config)
  ]
  own = ("experiment", str, setting(experiment, "what is run", choices=tuple(EXPERIMENTS)))
  return dataclasses.make_dataclass(
    "Config", [*fields, own], bases=(SweepConfig,), frozen=True, kw_only=True
  )


def main(config, *, root: str = "runs") -> pathlib.Path:
  """Runs the members that have not finished and returns the sweep's folder."""
  members = members_of(config)
  workdir = find_workdir("sweep", config, root=root)
  if config.dry_run:
    return _dry_run(config, workdir, members)
  with lock.held(workdir, wait=not config.workdir):
    _run(config, workdir, members, root)
  return workdir


def _run(config, workdir: pathlib.Path, members: list[population.Member], root: str) -> None:
  beside = best_of_n_config(config, members, workdir)
  if beside:
    find_workdir("best_of_n", beside)  # A run of other models or prompts there is an error.
  running = sum(map(len, population.group_members(workdir, members)))
  mesh = parallel.sweep_mesh(config.mesh, max(1, running))
  # Members of one program have the same inputs.
  for member in {json.dumps(member.structure()): member for member in members}.values():
    training.check_before_stages(member.config, mesh)

  def load(member_config):
    sources = member_config.sources()
    directories = training.model_directories(member_config)
    stages = training.stages_of(member_config, directories)
    create_workdir(workdir, "sweep", config, read={*read, *stages})
    models = inputs.load_models(sources, **directories)
    return models, inputs.load_task(sources, models)

  if config.experiment == "distill":
    train = distill.make_train_fn(config, root)
    members = [
      member._replace(config=distill.with_teacher(member.config, train)) for member in members
    ]
  read = {path for member in members for path in fingerprints.paths_of(member.config)}
  read.add(training.source_of(members[0].config))
  create_workdir(workdir, "sweep", config, read=read)
  progress.console.print(f"Sweep of {config.experiment}: results go to {workdir}", soft_wrap=True)
  found = population.train_members(
    workdir,
    members,
    load,
    experiment=config.experiment,
    mesh=config.mesh,
    members_per_batch=config.members_per_batch,
    seed=config.seed,
  )
  page = processes.on_writer(write_page)(workdir)
  if beside:  # All there is to see stands already, should it fail.
    best_of_n.main(beside, root=root)
    page = processes.on_writer(write_page)(workdir, best_of_n=True)
  show_frontier(found)
  progress.console.print(f"Report: {page}", soft_wrap=True)


def best_of_n_config(config, members, workdir: pathlib.Path) -> best_of_n.Config | None:
  """Returns the settings of the best-of-n that belongs on the axes of a sweep; None without one.

  It draws from the policy that all members start with, and that is their reference, and is scored
  and judged as they are.
  """
  if not (config.best_of_n and members[0].config.reads_scores()):
    return None
  shared = {field.name for field in dataclasses.fields(best_of_n.Config)} - {"workdir", "seed"}
  shared &= {field.name for field in dataclasses.fields(members[0].config)}
  if config.reference or {*shared, "reference"} & members[0].values.keys():
    return None
  values = {name: getattr(config, name) for name in shared}
  own = {"seed": config.seed, "workdir": str(workdir / "best_of_n"), "num_enumerated": 0}
  return best_of_n.Config(**values, **own)


def _dry_run(config, workdir: pathlib.Path, members: list[population.Member]) -> pathlib.Path:
  """Says what each compiled group of members that have not finished would cost a device."""
  reports = []
  for group in population.group_members(workdir, members):
    configs = [member.config for member in group]
    if config.experiment == "distill":
      train = distill.make_train_fn(config, "")
      configs = [distill.with_teacher(member, train) for member in configs]
    found = dry_run.of_members(
      configs,
      *training.shapes_of_inputs(configs[0]),
      mesh=config.mesh,
      members_per_batch=config.members_per_batch,
    )
    dry_run.show(found)
    reports += found
  dry_run.write(workdir, reports)
  return workdir


def members_of(config) -> list[population.Member]:
  """Returns the members of the grid, in its order, the seeds of each beside one another.

  Raises:
    UserError: `--sweep` cannot be read, or a member is no valid configuration of the experiment.
  """
  experiment = EXPERIMENTS[config.experiment]
  fields = {field.name: field for field in dataclasses.fields(experiment.Config)}
  axes = [_axis(part, fields) for part in filter(None, config.sweep.split(";"))]
  names = [name for points in axes for name in points[0]]
  for name in names:
    if names.count(name) > 1:
      raise UserError(f"--sweep={config.sweep}: {name} is swept twice.")
    if getattr(config, name) != fields[name].default:
      raise UserError(f"--{name} and --sweep={config.sweep} both say what {name} is.")
  shared = {name: getattr(config, name) for name in fields}
  shared |= {"workdir": "", "mesh": parallel.without_sweep(config.mesh)}
  members = {}
  for points in itertools.product(*axes):
    for seed in range(config.seed, config.seed + config.seeds):
      values = {name: value for point in points for name, value in point.items()} | {"seed": seed}
      member_name = ",".join(f"{name}={_text(value)}" for name, value in values.items())
      try:
        member = experiment.Config(**shared | values)
        member.check_horizon()
      except UserError as error:
        raise UserError(f"Member {member_name}: {error}") from error
      if member_name in members:
        raise UserError(f"--sweep={config.sweep}: {member_name} is there twice.")
      members[member_name] = population.Member(member_name, values, member)
  return list(members.values())


def _axis(part: str, fields: dict[str, dataclasses.Field]) -> list[dict[str, Any]]:
  """Returns the points of one axis of the grid, each {field: value}."""
  left, equals, right = part.partition("=")
  names = [name.strip() for name in left.split(",")]
  for name in names:
    if name == "seed":
      raise UserError(f"--sweep={part}: seeds are swept by --seeds=K, from --seed on.")
    if name not in fields or name in (*NOT_PART_OF_THE_RESULT, "mesh"):
      close = difflib.get_close_matches(name, [*fields], n=1)
      meant = f" Did you mean {close[0]!r}?" if close else ""
      raise UserError(f"--sweep={part}: {name!r} is no setting that members may differ in.{meant}")
  points = []
  for point in filter(None, right.split(",")):
    texts = point.split(":") if len(names) > 1 else [point]
    if len(texts) != len(names):
      raise UserError(
        f"--sweep={part}: {point!r} has not one value for each of {', '.join(names)}; values of "
        "settings that go together are joined by a colon."
      )
    pairs = zip(names, texts, strict=True)
    points.append({name: _value(fields[name], text.strip(), part) for name, text in pairs})
  if not equals or not points:
    raise UserError(f"--sweep={part}: write FLAG=VALUE,VALUE,...")
  return points


def _value(field: dataclasses.Field, text: str, part: str):
  """Returns `text` as a value of `field`, of the type that its flag has."""
  kind = type(field.default)
  try:
    if kind is bool:
      return {"true": True, "false": False}[text.lower()]
    return kind(text)
  except (ValueError, KeyError) as error:
    raise UserError(f"--sweep={part}: {text!r} is no {kind.__name__}.") from error


def _text(value) -> str:
  """Returns what stands for `value` in the name of a folder."""
  return f"{value:.12g}" if isinstance(value, float) else str(value).replace("/", "_")


def show_frontier(found: dict[str, Any]) -> None:
  """Prints the members, sorted by what they differ in."""
  records = sorted(found["members"], key=lambda record: list(record["values"].values()))
  columns = ("gold", "score", KL, "objective_gap", "tv_to_optimum")
  names = list(records[0]["values"])
  rows = [(["before", *[""] * (len(names) - 1)], found["before"])]
  rows += [([_text(value) for value in record["values"].values()], record) for record in records]
  columns = [name for name in columns if any(row.get(name) is not None for _, row in rows)]
  table = Table(title="Held-out prompts; KL in nats per sequence", title_justify="left")
  for name in (*names, *(find(name).label for name in columns), ""):
    table.add_column(name, justify="right")
  for cells, row in rows:
    cells += [shown(name, row.get(name), row.get(f"{name}_stderr")) for name in columns]
    diverged_at = row.get("diverged_at")
    mark = "*" if row.get("pareto") else ""
    table.add_row(*cells, f"diverged at {diverged_at}" if diverged_at else mark)
  progress.console.print(table)
  progress.console.print(
    f"* no other member has more {found['gain']} at no more KL, nor as much at less KL."
  )


def _chosen_experiment(arguments: list[str]) -> str:
  """Returns the value of `--experiment` in a command line: it says which other flags there are."""
  own = flags.FlagValues()
  flags.DEFINE_enum("experiment", "ppo", tuple(EXPERIMENTS), "what is run", flag_values=own)
  try:
    own(arguments, known_only=True)
  except flags.Error:  # The real parser will say it.
    return "ppo"
  return own.experiment


if __name__ == "__main__":
  chosen = config_class(_chosen_experiment(sys.argv))
  common.launch(main, chosen, prepare=parallel.use_every_core)
