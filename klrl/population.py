"""Many runs as one program: the training state gets a leading axis of members.

A member equals the single run with the same flags: it has parameters, optimizer, controller,
coefficients and a key of its own, under the same function. Prompts, the frozen reference and the
reward model are shared. Members that differ in `TRACED` fields alone have the same program and run
together as a group. A group in progress is one state with one checkpoint; a finished member is a
folder like that of any run.
"""

import dataclasses
import functools
import hashlib
import itertools
import json
import pathlib
import shutil
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

from klrl import programs, rlhf, schema
from klrl.algorithm import Hypers, learner
from klrl.devices import parallel, processes
from klrl.errors import UserError
from klrl.figures import labels
from klrl.inputs import Models, Task
from klrl.report.frontier import frontier
from klrl.run import loop, metrics, progress
from klrl.run.evaluations import OfMembers, best_figures
from klrl.run.summary import read_summary
from klrl.run.workdir import create_workdir, write_text

# Traced fields: members that differ in these alone share a program.
TRACED = (*Hypers._fields, "seed")
# Fields of TrainState in which members may differ at the start.
_OWN = ("controller", "trust_region", "hypers", "key")

_WATCHED = labels("score/mean", "gold/mean", "kl/ref_k1")
_SHOWN = (
  *(
    (f"{key}_{which}", text)
    for key, label in _WATCHED
    for which, text in (("median", label), ("least", "from"), ("most", "to"))
  ),
  *labels("sweep/diverged"),
)


# The content of members.json: which members run together, and on how many places.
_MEMBERS = {"members": schema.list_of(schema.text()), "places": schema.integer(1)}


class Member(NamedTuple):
  """One run of a sweep."""

  name: str  # of its folder, e.g. "beta=0.1,seed=1"
  values: dict[str, Any]  # of the swept fields, the seed among them
  config: Any  # of the single run that it equals

  def folder(self, workdir: pathlib.Path) -> pathlib.Path:
    return workdir / "members" / self.name

  def is_finished(self, workdir: pathlib.Path) -> bool:
    return read_summary(self.folder(workdir)) is not None

  def structure(self) -> dict[str, Any]:
    """Returns the swept values that are not traced."""
    return {name: value for name, value in self.values.items() if name not in TRACED}


class SweepState(NamedTuple):
  """The states of all members of a group; leading axis M."""

  run: learner.TrainState
  diverged_at: jax.Array  # [M] int32, the iteration, from 1, that was not finite; 0: none was


def train_members(
  workdir: pathlib.Path,
  members: list[Member],
  load: Callable[[Any], tuple[Models, Task]],
  *,
  experiment: str,
  mesh: str,
  members_per_batch: int,
  seed: int,
) -> dict[str, Any]:
  """Runs the members that have not finished, writes `frontier.json` and returns its content.

  Args:
    workdir: the sweep's folder; each member has one in `members`.
    members: of distinct names.
    load: load(config) -> what a run starts from; called once for each group.
    experiment: what the members are runs of.
    mesh: as `parallel.sweep_mesh` takes it.
    members_per_batch: as `parallel.map_members` takes it.
    seed: of the judge, the same for all members.
  """
  groups = group_members(workdir, members)
  num_running = sum(map(len, groups))
  progress.console.print(
    f"{len(members)} members, {len(members) - num_running} of them finished before; "
    f"{num_running} to run in {len(groups)} compiled program{'s' * (len(groups) != 1)}",
  )
  for i, group in enumerate(groups):
    structure = ", ".join(f"{name}={value}" for name, value in group[0].structure().items())
    if structure:
      progress.console.print(f"Program {i + 1} of {len(groups)}: {structure}")
    models, task = load(group[0].config)
    start = models.base.get("policy") or models.policy_params
    _run_group(
      workdir,
      [member._replace(config=member.config.fitted(start)) for member in group],
      models,
      task,
      experiment=experiment,
      mesh=mesh,
      members_per_batch=members_per_batch,
      seed=seed,
    )
  found = processes.on_writer(frontier)(workdir, members)
  write_text(workdir / "frontier.json", json.dumps(found, indent=2) + "\n")
  return found


@processes.on_writer
def group_members(workdir: pathlib.Path, members: list[Member]) -> list[list[Member]]:
  """Returns the members that have to run, in groups that share a program.

  Members that began together go on together, whatever else the sweep has by now.
  """
  by_name = {member.name: member for member in members}
  pending = {member.name: member for member in unfinished_of(workdir, members)}
  groups = []
  for path in sorted(workdir.glob("groups/*/members.json")):
    names = _members_in(path)["members"]
    if by_name.keys() >= set(names) and pending.keys() & set(names):
      groups.append([by_name[name] for name in names])
      pending = {name: member for name, member in pending.items() if name not in names}
  by_structure: dict[str, list[Member]] = {}
  for member in pending.values():
    by_structure.setdefault(json.dumps(member.structure()), []).append(member)
  return groups + list(by_structure.values())


def unfinished_of(workdir: pathlib.Path, members: list[Member]) -> list[Member]:
  """Returns the members that have no summary yet."""
  return [member for member in members if not member.is_finished(workdir)]


def _run_group(
  workdir, members, models, task, *, experiment, mesh, members_per_batch, seed
) -> None:
  """Trains `members` together and writes the folder of each that has not finished."""
  config = members[0].config
  announced = rlhf.announce(config)
  names = [member.name for member in members]
  hashed = hashlib.sha256(json.dumps(names).encode()).hexdigest()[:8]
  group_dir = workdir / "groups" / hashed
  begun = processes.on_writer(_places_of)(group_dir)
  # The saved state has this many places; the number of devices may have changed.
  mesh_of = parallel.mesh_of_places if begun else parallel.sweep_mesh
  mesh = mesh_of(mesh, begun or len(members))
  num_places = parallel.places(mesh, begun or len(members), members_per_batch=members_per_batch)
  if begun not in (None, num_places):
    raise UserError(
      f"{group_dir} began with {begun} places for members, and these devices have {num_places}. "
      "Go on with as many devices as it began with; JAX_NUM_CPU_DEVICES sets those of a processor."
    )
  setup = programs.set_up(config, mesh, models, task)
  if num_places > len(members):
    progress.console.print(
      f"{len(members)} members are computed in {num_places} places, as many on each device; what "
      "the places left over compute, a copy of the last member, is thrown away."
    )
  # An empty place repeats the last member, and its results are not read.
  configs = [member.config for member in members]
  configs += configs[-1:] * (num_places - len(members))
  state, shardings = init_members(setup, configs)
  start, state = loop.restore_or_init(group_dir, state, keep=config.keep)

  @functools.cache
  def judge_at(temperature):
    """Returns (a `Judge`, judgement of the start): the same noise whatever a member's seed."""
    own = dataclasses.replace(config, seed=seed, temperature=temperature)
    judge = rlhf.make_judge(setup._replace(config=own))
    return judge, rlhf.judge_start(setup, judge.judge, start)

  for member in members:
    judge_at(member.config.temperature)
  group_dir.mkdir(parents=True, exist_ok=True)
  write_text(group_dir / "members.json", json.dumps({"members": names, "places": num_places}))
  unfinished = processes.on_writer(unfinished_of)(workdir, members)
  for member in unfinished:
    create_workdir(member.folder(workdir), experiment, member.config)
  lift = functools.partial(parallel.map_members, mesh, members_per_batch=members_per_batch)
  step = programs.make_step_fn(setup, shardings, lift=lift, guard=guarded, workdir=group_dir)
  folders = [member.folder(workdir) for member in members]
  step, read = _diverging(step), _recording(folders, start)
  params_of = make_params_fn(mesh, state.run.params)

  def evaluations_of(i, member):
    judge, _ = judge_at(member.config.temperature)
    return rlhf.make_evaluations(
      folders[i],
      setup._replace(config=member.config),
      judge.evaluate,
      lambda state: params_of(state.run.params, i),
    )

  iterations = loop.iterate(
    step,
    state,
    start=start,
    workdir=group_dir,
    evaluations=OfMembers(list(itertools.starmap(evaluations_of, enumerate(members)))),
    read=read,
    **config.loop_settings(),
  )
  state = progress.watch(
    iterations,
    state,
    title=f"{len(members)} members",
    start=start,
    total=config.num_iterations,
    keys=_SHOWN,
  )
  diverged_at = parallel.fetch(state.diverged_at).tolist()
  betas = parallel.fetch(state.run.controller.beta)
  for i, member in enumerate(members):
    if member not in unfinished:
      continue
    (judge, _), before = judge_at(member.config.temperature)
    params = params_of(state.run.params, i)
    best = best_figures(member.folder(workdir), member.config.keep_best)
    figures = (
      rlhf.with_symptoms(announced, member.folder(workdir), member.name)
      | best
      | {
        "learning_rate": member.config.learning_rate,
        "diverged_at": diverged_at[i] or None,
        "num_members": len(members),  # whose time `wall_seconds` is
      }
    )
    if diverged_at[i]:
      progress.warn(
        f"{member.name} was not finite at iteration {diverged_at[i]}; it stays as it was before."
      )
    if processes.is_writer() and (group_dir / "timing.jsonl").exists():
      shutil.copy(group_dir / "timing.jsonl", member.folder(workdir))
    after = judge(params, when="after")
    # The parameters of a diverged member are finite, but its forward pass may not be.
    known = {name: x if x is None or np.isfinite(x) else None for name, x in after.figures.items()}
    rlhf.write_results(
      member.folder(workdir),
      setup._replace(config=member.config),
      params,
      before,
      after._replace(figures=known),
      figures,
      beta=betas[i],
    )
  processes.on_writer((group_dir / "members.json").unlink)()
  processes.on_writer(shutil.rmtree)(group_dir / "checkpoints")


def init_members(setup: programs.Setup, configs: list) -> tuple[SweepState, SweepState]:
  """Returns (the state at the start of the runs of `configs`, on the devices, its shardings).

  No device ever holds more than its shard of it and one array.
  """
  num_members = len(configs)
  runs = [
    learner.init_state(config.algorithm(), config.hypers(), {}, jax.random.key(config.seed))
    for config in configs
  ]
  own = {
    name: jax.tree.map(lambda *leaves: jnp.stack(leaves), *(getattr(run, name) for run in runs))
    for name in _OWN
  }
  common = programs.init_run(setup)._replace(**dict.fromkeys(_OWN))

  def stacked(leaf):
    return jax.ShapeDtypeStruct((num_members, *leaf.shape), leaf.dtype)

  shapes = SweepState(
    jax.tree.map(stacked, common)._replace(**own), jax.ShapeDtypeStruct((num_members,), jnp.int32)
  )
  shardings = parallel.state_shardings(setup.mesh, shapes, members=True)

  def repeat(leaf, sharding):
    repeated = _repeated(leaf, num_members, sharding)
    leaf.delete()
    return repeated

  shared = jax.tree.map(repeat, common, shardings.run._replace(**dict.fromkeys(_OWN)))

  def build(own):
    return own, jnp.zeros(num_members, jnp.int32)

  own_shardings = {name: getattr(shardings.run, name) for name in _OWN}, shardings.diverged_at
  own, diverged_at = jax.jit(build, out_shardings=own_shardings)(own)
  return SweepState(shared._replace(**own), diverged_at), shardings


@functools.partial(jax.jit, static_argnums=(1, 2))
def _repeated(leaf, times: int, sharding):
  repeated = jnp.broadcast_to(leaf, (times, *leaf.shape))
  return jax.lax.with_sharding_constraint(repeated, sharding)


def _places_of(group_dir: pathlib.Path) -> int | None:
  path = group_dir / "members.json"
  return _members_in(path)["places"] if path.exists() else None


def _members_in(path: pathlib.Path) -> dict[str, Any]:
  try:
    return schema.check(schema.read(path), _MEMBERS, path, required=_MEMBERS)
  except UserError as error:
    raise UserError(
      f"{error} Remove {path.parent}: its members start again, and finished members stay."
    ) from error


def make_params_fn(mesh: jax.sharding.Mesh, params) -> Callable:
  """Returns params_of(params of all members, i) -> those of member i, on every device of `sweep`.

  A slice would send all members to all devices. Instead the other members are set to minus
  infinity, and the maximum over members, which is sent once, is the member.
  """

  def own(x, i):
    is_own = (jnp.arange(len(x)) == i).reshape(-1, *[1] * (x.ndim - 1))
    return jnp.where(is_own, x, -jnp.inf).max(axis=0)

  def params_of(params, i):
    return jax.tree.map(lambda x: own(x, i), params)

  one = jax.eval_shape(params_of, params, 0)
  return jax.jit(params_of, out_shardings=parallel.state_shardings(mesh, one))


def guarded(fn: Callable) -> Callable:
  """Returns fn(run, ...) -> (run, found) as a function of one member's `SweepState`.

  If parameters or results are not finite, the run stays as it was, from then on.
  """

  @functools.wraps(fn)
  def step(state: SweepState, *arguments):
    run, found = fn(state.run, *arguments)
    found = jax.tree.map(jnp.asarray, found)
    finite = jnp.stack([jnp.isfinite(x).all() for x in jax.tree.leaves(run.params)]).all()
    # There are some hundred scalars, and to check each by itself takes two more seconds to compile.
    finite &= jnp.isfinite(ravel_pytree(found)[0]).all()
    diverged_at = jnp.where(
      finite | (state.diverged_at > 0), state.diverged_at, state.run.iteration + 1
    )
    run = jax.tree.map(lambda new, old: jnp.where(diverged_at > 0, old, new), run, state.run)
    return SweepState(run, diverged_at), found

  return step


def _diverging(step: Callable) -> Callable:
  """Returns `step` whose metrics are (pairs, when each member diverged)."""

  def diverging(state, iteration):
    state, pairs = step(state, iteration)
    # The next iteration starts before this is read, and the state is donated to it.
    return state, (pairs, state.diverged_at.copy())

  return diverging


def _recording(folders: list[pathlib.Path], start: int) -> Callable:
  """Returns read(iteration, (pairs, diverged_at)) -> pairs of all members, for `loop.iterate`.

  It appends to every member's `metrics.jsonl`. The figures of a diverged member are null. Of the
  watched figures, the median, the least and the most over the other members are returned as pairs.
  """
  for folder in folders:
    metrics.truncate(folder / "metrics.jsonl", start)

  def read(iteration, found):
    pairs, diverged_at = found
    pairs = jax.tree.map(lambda x: np.broadcast_to(x, diverged_at.shape), pairs)
    each = []
    for i, folder in enumerate(folders):
      figures = metrics.finalise({name: (s[i], n[i]) for name, (s, n) in pairs.items()})
      each.append(dict.fromkeys(figures) if diverged_at[i] else figures)
      metrics.append_line(folder / "metrics.jsonl", {"iteration": iteration, **each[i]})
    return _over_members(each, int((diverged_at[: len(folders)] > 0).sum()))

  return read


def _over_members(each: list[dict[str, float | None]], num_diverged: int) -> dict:
  found = {"sweep/diverged": (num_diverged, 1)}
  tokens = [figures["rollout/tokens"] or 0.0 for figures in each]
  found["rollout/tokens"] = (sum(tokens), 1)
  for key, _ in _WATCHED:
    values = [figures[key] for figures in each if figures.get(key) is not None]
    if values:
      for which, reduce in (("median", np.median), ("least", min), ("most", max)):
        found[f"{key}_{which}"] = (reduce(values), 1)
  return found
