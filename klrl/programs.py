"""The compiled functions of a run, and the step of an iteration that calls them."""

import contextlib
import dataclasses
import functools
import hashlib
import math
import pathlib
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from klrl.algorithm import Algorithm, completions, learner, memory
from klrl.devices import free_memory, parallel, processes
from klrl.inputs import Models, Task
from klrl.models import Policy, ScalarModel, TokenizerInfo, join
from klrl.run import pending, progress
from klrl.sampling import Packing, Rollout, beginning_with, make_sample_fn
from klrl.tasks import data, reward_calls, rewards, verifier, widths

_SLOW_REWARD_SHARE = 0.5
_MOST_UPDATES = 3  # for each width of prompts; an update is the largest program
_SHARES = 0.25, 0.375, 0.5, 0.75  # of the rows of a rollout, into which its texts are packed
_SAVED = 0.15  # the least share of the tokens for which another update is compiled


class Setup(NamedTuple):
  """What is the same during a whole run, and for all members of a sweep."""

  config: Any  # of the experiment
  algorithm: Algorithm
  models: Models
  task: Task
  mesh: jax.sharding.Mesh
  frozen: dict  # parameters on the devices: of the base, the reference, the reward model
  sample: Callable[..., Rollout] | None = None


def set_up(config, mesh, models: Models, task: Task) -> Setup:
  """Returns the setup of a run, with its frozen parameters on the devices."""
  frozen = {
    "base": models.base,
    "reference": models.reference_params,
    "reward_model": models.reward_params,
  }
  algorithm = dataclasses.replace(config.algorithm(), max_completion_len=task.max_completion_len)
  frozen = parallel.put_once(mesh, frozen)
  setup = Setup(config, algorithm, models, task, mesh, frozen)
  return setup._replace(sample=_sample_fn(setup, models.sampler))


def _sample_fn(setup: Setup, policy: Policy) -> Callable[..., Rollout]:
  """Returns what draws the completions of an iteration from `policy`."""
  return make_sample_fn(
    policy,
    max_completion_len=setup.task.max_completion_len,
    eos_id=setup.models.tokenizer.eos_ids,
    pad_id=setup.models.tokenizer.pad_id,
    group_size=setup.algorithm.group_size,
    sampler_mesh=setup.config.sampler_mesh,
    given=beginning_with(setup.task.prefill),
  )


def init_run(setup: Setup) -> learner.TrainState:
  """Returns the state before the first iteration, on the devices, by `parallel.state_shardings`.

  Nothing else shares its buffers, and no device ever holds more of its parameters and moments than
  its shard.
  """
  algorithm, models = setup.algorithm, setup.models
  params = {"policy": models.policy_params}
  if models.value_model is not None:
    params["value"] = models.value_params
  own = functools.partial(parallel.put_own, setup.mesh)
  key = jax.random.key(setup.config.seed)
  state = learner.init_state(algorithm, setup.config.hypers(), own(params), key)
  replay = algorithm.staleness and memory.empty_replay(_rollout_shapes(setup), algorithm.staleness)
  state = state._replace(
    reference=algorithm.reference_rule and own(params["policy"]),
    replay=replay or None,
  )
  return parallel.put(state, parallel.state_shardings(setup.mesh, state))


def _rollout_shapes(setup: Setup):
  """Returns the shapes of the rollout of an iteration."""
  models, training, num_rows = setup.models, setup.task.training, setup.algorithm.samples
  params = join(models.base, {"policy": models.policy_params})["policy"]
  prompts = training.tokens[:1].repeat(num_rows, axis=0)
  mask = training.mask[:1].repeat(num_rows, axis=0)
  return jax.eval_shape(setup.sample, params, prompts, mask, jax.random.key(0), temperature=1.0)


def _alone(fn: Callable, in_axes) -> Callable:
  """Returns `fn`: the `lift` of a run by itself."""
  del in_axes
  return fn


def make_programs(
  setup: Setup, shardings, *, lift=_alone, guard=lambda fn: fn
) -> dict[str, Callable]:
  """Returns the compiled functions of an iteration; those that change the state donate it.

  If the device scores and all rollouts have one width there is one, `iterate(state, frozen,
  prompts, prompt_mask, rows, pretraining) -> (state, metrics)`. Otherwise there are two,
  `rollout(state, frozen, prompts, prompt_mask) -> rollout` and `update(state, frozen, rollout,
  rows, pretraining) -> (state, metrics)`, which is compiled for each width. If the host scores,
  `update` takes the scores in place of the rows. Where such rollouts are trained on late, it takes
  the new one, and packing and scores of the one that `waiting(state, frozen) -> rollout` returns.
  `drawn_by(state, frozen)` is a number of the state, another one for every other rollout.
  `fitting(state, frozen, rollout)` says with which of `packings_of(setup)` a rollout may be updated
  on. `frozen` are the distinct arrays of `setup.frozen`.

  Args:
    setup: of the run.
    shardings: of the state.
    lift: lift(fn, in_axes) turns a function of one run into one of several, as `vmap` does; the
      default leaves it as it is. Metrics of several runs have a leading axis.
    guard: wraps each function (state, ...) -> (state, ...) before it is lifted.
  """
  algorithm, models, task, sample = setup.algorithm, setup.models, setup.task, setup.sample
  # A reference that follows the policy has the same architecture.
  reference = models.policy if algorithm.reference_rule else models.reference
  parts = (algorithm, models.policy, models.value_model, reference)
  rehearse = _sample_fn(setup, reference) if algorithm.rehearses else None
  options = {"rehearse": rehearse, "sampler": models.sampler}
  _, whole = parallel.distinct(setup.frozen)

  def lifted(fn, in_axes):
    of_whole = lift(guard(fn), in_axes)

    @functools.wraps(fn)
    def of_distinct(state, distinct, *arguments):
      return of_whole(state, whole(distinct), *arguments)

    return parallel.on_mesh(setup.mesh, of_distinct)

  jit = functools.partial(jax.jit, donate_argnums=0, out_shardings=(shardings, None))

  if not task.rewards:
    score = make_score_fn(models.reward_model)
    gold = make_gold_fn(task.training, models.tokenizer)
    if len(widths_of_completions(setup)) == 1:
      iterate = learner.make_iteration_fn(*parts, sample, score, gold, **options)
      return {"iterate": jit(lifted(iterate, (0, None, None, None, None, None)))}
    update = learner.make_scored_update_fn(*parts, score, gold, **options)
  else:
    update = learner.make_update_after_sampling_fn(*parts, **options)

  def rollout(state, *arguments):
    return state, learner.sample_rollout(sample, state, *arguments)

  def waiting(state, frozen):
    del frozen
    return state, memory.waiting(state.replay, state.iteration)

  def drawn_by(state, frozen):
    del frozen
    # Moments and the value model take no part in it, and are most of the state.
    return state, _sum_of_words((state.params["policy"], state.hypers, state.key, state.iteration))

  def fitting(state, frozen, rollout):
    del frozen
    return state, learner.fitting(algorithm, state, rollout, packings_of(setup))

  def of_state(fn, in_axes):
    with_state = lifted(fn, in_axes)

    @functools.wraps(fn)  # A profile shows the name.
    def without_state(*arguments):
      return with_state(*arguments)[1]

    return jax.jit(without_state)

  return {
    "rollout": of_state(rollout, (0, None, None, None)),
    "waiting": of_state(waiting, (0, None)),
    "drawn_by": of_state(drawn_by, (0, None)),
    "fitting": of_state(fitting, (0, None, 0)),
    "update": jit(lifted(update, (0, None, 0, 0 if task.rewards else None, None))),
  }


def prompt_rows(algorithm: Algorithm, iteration: int, num_prompts: int, *, seed: int) -> np.ndarray:
  """Returns the index of the prompt that each completion of an iteration continues.

  The `group_size` completions of a prompt are neighbouring rows, as advantage rules read them.
  """
  num_groups = algorithm.samples // algorithm.group_size
  rows = data.batch_rows(seed, iteration, num_groups, num_prompts)
  return np.repeat(rows, algorithm.group_size)


def widths_of_completions(setup: Setup) -> list[int]:
  """Returns how many columns of completions an update may read, see `widths.below`."""
  widest = setup.task.max_completion_len
  return [widest] if _has_fixed_width(setup) else widths.below(widest)[:_MOST_UPDATES]


def packings_of(setup: Setup) -> list[Packing]:
  """Returns how an update may pack a rollout of the whole width, beginning with the fewest rows.

  None where completions are short or a rotation has long divisors, or where one program draws the
  rollouts and trains on late ones, so that nobody sees them between. And which of the groups that
  were drawn are kept is not known before the update.
  """
  is_unseen = setup.algorithm.staleness and not setup.task.rewards
  is_short = len(widths.below(setup.task.max_completion_len)) == 1
  if is_unseen or is_short or _has_long_divisors(setup) or setup.algorithm.oversampling > 1:
    return []
  # What reads long rows on a TPU knows no texts that continue the same prompt, see `models.kernel`.
  is_known = setup.mesh.devices.flat[0].platform != "tpu"
  return [Packing(share, setup.algorithm.group_size if is_known else 1) for share in _SHARES]


def _has_fixed_width(setup: Setup) -> bool:
  """Returns whether all rollouts need one width: the memory of late ones has one.

  And a rotation with long divisors would choose these by the width.
  """
  return bool(setup.algorithm.staleness) or _has_long_divisors(setup)


def _has_long_divisors(setup: Setup) -> bool:
  models = setup.models
  others = (models.reference, models.value_model, models.reward_model)
  return any(model is not None and model.config.short_len for model in (models.policy, *others))


def make_step_fn(
  setup: Setup,
  shardings,
  *,
  lift=_alone,
  guard=lambda fn: fn,
  workdir: pathlib.Path | None = None,
  ahead_of: learner.TrainState | None = None,
) -> Callable:
  """Returns step(state, iteration) -> (state, metrics) for `loop.iterate`; see `make_programs`.

  In the folder `workdir` rollouts wait for scores of the host; without one they are not kept. For
  states like `ahead_of` the programs are compiled in a thread that begins now.
  """
  algorithm, models, task = setup.algorithm, setup.models, setup.task
  mesh, frozen, data_seed = setup.mesh, setup.frozen, setup.config.data_seed
  programs = make_programs(setup, shardings, lift=lift, guard=guard)
  distinct, _ = parallel.distinct(frozen)
  rows_sharding = parallel.by_rows(mesh)
  tokens, mask = task.training.tokens, task.training.mask
  of_prompts = [mask.shape[1]] if _has_fixed_width(setup) else widths.below(mask.shape[1])
  of_completions = widths_of_completions(setup)

  def prompts_of(rows):
    """Returns the prompts of `rows` and their mask, each device its own; the host has the file."""
    width = widths.narrowest(of_prompts, mask[rows, ::-1])
    return parallel.put((tokens[rows, -width:], mask[rows, -width:]), rows_sharding)

  def rows_of(iteration):
    num_prompts = len(task.training.tokens)
    return prompt_rows(algorithm, iteration, num_prompts, seed=data_seed)

  def pretraining_of(iteration):
    if task.pretraining is None:
      return None
    num_texts = len(task.pretraining.tokens)
    rows = data.batch_rows(data_seed + 1, iteration, algorithm.batch_size, num_texts)
    texts = jax.tree.map(lambda x: x[rows], task.pretraining)
    return parallel.put(texts, rows_sharding)

  def compiled(shapes):
    """Yields the programs of the first iteration, each when it is compiled."""
    rows = rows_of(0)
    given, texts = (shapes, distinct, *prompts_of(rows)), pretraining_of(0)
    rows = parallel.put(rows, rows_sharding)
    if "iterate" in programs:
      yield programs["iterate"].lower(*given, rows, texts).compile()
      return
    lowered = programs["rollout"].lower(*given)
    yield (rollout := lowered.compile())
    sampled = jax.tree.map(_shape_of, lowered.out_info, rollout.output_shardings)
    shape = sampled.finished.shape
    scores = parallel.by_rows(mesh, members=len(shape) > 1)
    scores = jax.ShapeDtypeStruct(shape, np.float32, sharding=scores) if task.rewards else rows
    yield programs["update"].lower(shapes, distinct, sampled, scores, texts).compile()

  ahead = _Ahead()
  if ahead_of is not None:
    shapes = jax.tree.map(lambda x: _shape_of(x, x.sharding), ahead_of)
    names = ["iterate"] if "iterate" in programs else ["rollout", "update"]
    ahead = _Ahead(names, compiled(shapes))

  if "iterate" in programs:

    def step(state, iteration):
      prompts, texts = prompts_of(rows_of(iteration)), pretraining_of(iteration)
      rows = rows_of(memory.trained_on(iteration, algorithm.staleness))
      rows = parallel.put(rows, rows_sharding)
      ahead.wait("iterate")
      return programs["iterate"](state, distinct, *prompts, rows, texts)

    return step

  shortened = jax.jit(completions.shortened, static_argnums=1)
  packings = packings_of(setup)

  def without_padding(state, rollout, is_used, num_tokens):
    """Returns the rollout as an update reads it with the least padding.

    It is in the fewest columns that hold what is True in `is_used` [..., T], or, where that saves
    enough, in all of them but packed. All of its completions have `num_tokens`.
    """
    width, widest = widths.narrowest(of_completions, is_used), task.max_completion_len
    num_rows, prompt_len = rollout.finished.size, rollout.prompt_mask.shape[-1]
    on_device = parallel.on_mesh(mesh, parallel.rows_per_device)(algorithm.batch_size)
    plain = prompt_len / math.gcd(algorithm.group_size, on_device) + width
    # Fewer rows cannot hold the tokens, and more save too little.
    least, most = num_tokens / num_rows, (1 - _SAVED) * plain
    if any(least <= packing.share * (prompt_len + widest) <= most for packing in packings):
      fits = parallel.fetch(programs["fitting"](state, distinct, rollout))
      fits = fits.reshape(-1, len(packings)).all(axis=0)
      for packing, fit in zip(packings, fits, strict=True):
        if fit and packing.share * (prompt_len + widest) <= most:
          return rollout._replace(packing=packing)
    return rollout if width == widest else shortened(rollout, width)

  if not task.rewards:

    @functools.partial(jax.jit, out_shardings=parallel.replicated(mesh))
    def used_columns(mask):
      return mask.any(axis=range(mask.ndim - 1)), mask.sum()

    def step_in_two(state, iteration):
      rows = rows_of(iteration)
      ahead.wait("rollout")
      rollout = programs["rollout"](state, distinct, *prompts_of(rows))
      used = parallel.fetch(used_columns(rollout.completion_mask))
      new = without_padding(state, rollout, *used)
      if new is rollout:  # A short one has a program of its own.
        ahead.wait("update")
      rows = parallel.put(rows, rows_sharding)
      return programs["update"](state, distinct, new, rows, pretraining_of(iteration))

    return step_in_two

  score = lift(make_score_fn(models.reward_model), (None, 0, None))
  score = jax.jit(parallel.on_mesh(mesh, score))
  gold = make_gold_fn(task.training, models.tokenizer)
  gold = gold and jax.jit(lift(gold, (0, None)))
  reads_model = any(reward.fn is None for reward in task.rewards)
  notice_slow, notice_unscored = _said_once(_slow_reward), _said_once(_unscored)
  before = None  # of the last iteration: when it began, its reward's seconds, its completions
  mark_of = _make_mark_fn(setup, lambda state: programs["drawn_by"](state, distinct))
  in_files = pending.iterations(workdir) if workdir else set()
  late = {}  # of the iterations before: rollouts that wait, and the same where fetching is quick
  gathered = jax.jit(lambda rollout: rollout, out_shardings=parallel.replicated(mesh))

  def sampled_or_kept(path, state, rows, *, in_file):
    """Returns the rollout on the devices and on the host, the latter also in a file."""
    arguments = state, distinct, *prompts_of(rows)
    if in_file and (arrays := pending.kept(path, mark_of(state, rows))) is not None:
      progress.console.print(f"What was sampled before is scored: {path.name}")
      on_host = Rollout(**arrays)
      places = programs["rollout"].lower(*arguments).compile().output_shardings
      return parallel.put(on_host, places), on_host
    ahead.wait("rollout")
    # It starts before anything waits for the update before it.
    rollout = programs["rollout"](*arguments)
    mark = path and mark_of(state, rows)
    on_host = parallel.fetch(rollout)
    if path:
      arrays = {name: x for name, x in on_host._asdict().items() if x is not None}
      pending.keep(path, mark, arrays)
    return rollout, on_host

  def sampled_while_another_waits(state, iteration, trained):
    """Returns the new rollout, and the one of iteration `trained` on the devices and on the host.

    The new one is not there yet: the devices draw it while the host scores the other one. That is
    in the state, so that it needs no file.
    """
    found = late.pop(trained, None)
    if found is None:  # The run goes on from here.
      found = (programs["waiting"](state, distinct),) * 2
    rollout, everywhere = found
    on_host = parallel.fetch(everywhere)
    return programs["rollout"](state, distinct, *prompts_of(rows_of(iteration))), rollout, on_host

  def step_with_host_reward(state, iteration):
    nonlocal before
    trained = memory.trained_on(iteration, algorithm.staleness)
    rows = rows_of(trained)
    began = time.monotonic()
    if before is not None:
      last_began, reward_seconds, num = before
      notice_slow(reward_seconds, began - last_began, num)
    device_rows = parallel.put(rows, rows_sharding)
    path = workdir and trained == iteration and pending.path_of(workdir, iteration)
    if trained == iteration:
      rollout, on_host = sampled_or_kept(path, state, rows, in_file=iteration in in_files)
      new = rollout
    else:
      new, rollout, on_host = sampled_while_another_waits(state, iteration, trained)
    if algorithm.staleness:
      # Other processes have a part of it, and later they would be asked behind the update.
      late[iteration] = new, new if processes.is_alone() else gathered(new)

    def as_read():
      """Returns the rollout that is trained on, as it is read."""
      chosen = on_host.completion_mask
      return without_padding(state, rollout, chosen, chosen.sum())

    # While the devices draw another one, the host scores before it asks them anything.
    read = as_read() if new is rollout else rollout
    # One call scores the rows of all members.
    shape = rollout.finished.shape
    flat = jax.tree.map(lambda x: x.reshape(-1, *x.shape[len(shape) :]), on_host)
    texts = data.completion_texts(models.tokenizer, flat)
    records = [task.training.records[row] for row in rows] * (len(texts) // len(rows))
    texts = data.with_prefill(texts, records)
    sampled = time.monotonic()
    model_scores = None
    if reads_model:
      model_scores = parallel.fetch(score(frozen, read, device_rows)).reshape(-1)
    ids = reward_calls.Ids(*data.token_ids(flat))
    scores, each = rewards.shared_scores(
      task.rewards, records, texts, model_scores, ids, unit=algorithm.group_size
    )
    scored = time.monotonic()
    if new is not rollout:
      read = as_read()
    if np.isnan(scores).any() and read.packing is not None:
      read = rollout  # What no reward scored has no place in its row.
    notice_unscored(scores, iteration)
    if read is rollout:  # A short one has a program of its own.
      ahead.wait("update")
    new = read if new is rollout else new._replace(packing=read.packing)
    scores = parallel.put(scores.reshape(shape), parallel.by_rows(mesh, members=len(shape) > 1))
    state, pairs = programs["update"](state, distinct, new, scores, pretraining_of(iteration))
    if path:
      pending.drop(path)
    if len(each) > 1:
      for name, x in each.items():
        by_member = x.reshape(shape)
        counts = (~np.isnan(by_member)).sum(axis=-1)
        pairs[f"score/{name}"] = np.nansum(by_member, axis=-1), counts
    if gold is not None:
      pairs["gold/mean"] = (gold(rollout, device_rows).sum(axis=-1), len(rows))
    before = began, scored - sampled, len(texts)
    return state, pairs

  return step_with_host_reward


def _shape_of(x, sharding) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)


class _Ahead:
  """A thread that compiles programs, while the main one compiles others and judges the start.

  A call waits for its program, and then finds it in JAX's own cache.
  """

  def __init__(self, names: Sequence[str] = (), compiled: Iterator | None = None):
    self._is_over = {name: threading.Event() for name in names}
    if names:
      threading.Thread(target=self._run, args=(compiled,), name="compile ahead").start()

  def _run(self, compiled):
    for is_over in self._is_over.values():
      with contextlib.suppress(Exception):  # The call fails as well, and tells why.
        next(compiled)
      free_memory.give_back()
      is_over.set()

  def wait(self, name: str) -> None:
    if name in self._is_over:
      self._is_over[name].wait()


def _make_mark_fn(setup: Setup, drawn_by: Callable) -> Callable:
  """Returns mark(state, rows) -> text, which is another for every other rollout of a state."""
  models, task = setup.models, setup.task
  words = jax.jit(_sum_of_words)
  limits = task.max_completion_len, models.tokenizer.eos_ids, models.tokenizer.pad_id
  settings = models.sampler.config, *limits, setup.algorithm.group_size

  @functools.cache
  def of_frozen():
    return int(words(setup.frozen["base"])) if setup.frozen["base"] else 0

  def mark(state, rows):
    of_state = parallel.fetch(drawn_by(state)).tolist()
    told = hashlib.blake2b(repr((Rollout._fields, settings, of_frozen(), of_state)).encode())
    for x in (task.training.tokens, task.training.mask):
      told.update(np.ascontiguousarray(x[rows]))
    return told.hexdigest()

  return mark


def _sum_of_words(tree) -> jax.Array:
  """Returns the sum of all words of the arrays, modulo 2**32, which is the same on any devices."""
  total = jnp.uint32(0)
  for leaf in jax.tree.leaves(tree):
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
      leaf = jax.random.key_data(leaf)
    if leaf.dtype != bool:
      leaf = jax.lax.bitcast_convert_type(leaf, f"uint{8 * leaf.dtype.itemsize}")
    total += leaf.sum(dtype=jnp.uint32)
  return total


def make_score_fn(reward_model: ScalarModel | None) -> Callable:
  """Returns score(frozen, rollout, rows) -> [B], the reward model's score; 0 without one."""
  if reward_model is None:
    return lambda frozen, rollout, rows: jnp.zeros(rollout.finished.shape)
  return lambda frozen, rollout, rows: completions.reward_model_scores(
    reward_model, frozen["reward_model"], rollout
  )


def make_gold_fn(prompts: data.Prompts, tokenizer: TokenizerInfo) -> Callable | None:
  """Returns gold(rollout, rows) -> [B], 1 for a right completion, else 0; None without answers."""
  if prompts.answers is None:
    return None
  answers = jnp.asarray(prompts.answers)
  return lambda rollout, rows: verifier.accuracy(
    completions.completion_tokens(rollout),
    rollout.completion_mask,
    answers[rows],
    pad_id=tokenizer.pad_id,
  )


def _said_once(message_of: Callable[..., str]) -> Callable[..., None]:
  """Returns a function that prints the first message of `message_of`, where "" is none."""
  said = False

  def say(*arguments):
    nonlocal said
    if not said and (message := message_of(*arguments)):
      said = True
      progress.console.print(message)

  return say


def _slow_reward(reward_seconds: float, iteration_seconds: float, num: int) -> str:
  """Returns what to say where the user's reward function takes most of an iteration."""
  if reward_seconds <= 1.0 or reward_seconds <= _SLOW_REWARD_SHARE * iteration_seconds:
    return ""
  return (
    f"The reward function takes {reward_seconds:.1f} s for {num} completions, "
    f"{reward_seconds / iteration_seconds:.0%} of an iteration."
  )


def _unscored(scores: np.ndarray, iteration: int) -> str:
  """Returns what to say where every reward abstained from a completion."""
  num = int(np.isnan(scores).sum())
  if not num:
    return ""
  return (
    f"Every reward abstained, by None, from {num} of {scores.size} completions of iteration "
    f"{iteration + 1}: nothing is learnt from these, and they are in no mean of scores."
  )
