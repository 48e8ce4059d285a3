"""Sweeps: each member is its single run, whatever runs beside it; what is finished stays."""

import contextlib
import dataclasses
import functools
import hashlib
import json
import os
import pathlib
import re
from typing import NamedTuple

import chex
import forked
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from quick_compilation import BIT_FOR_BIT
from small_decoders import arithmetic_decoder

from experiments import ppo
from experiments import sweep as experiment
from experiments.settings import training
from klrl import inputs, population, programs
from klrl.devices import parallel
from klrl.errors import UserError
from klrl.models import policy_model, save_policy, save_scalar, scalar_model
from klrl.report.frontier import FIGURES
from klrl.run import loop, metrics
from klrl.run.workdir import create_workdir, find_workdir
from klrl.tasks import arithmetic

ROOT = pathlib.Path(__file__).parents[1]
DECODER = arithmetic_decoder(num_heads=2, mlp_dim=16, max_len=16)
NUM_ITERATIONS = 3
TINY = {
  "policy": "policy",
  "prompts": "prompts.jsonl",
  "reward_model": "reward",
  "max_completion_len": 3,
  "num_iterations": NUM_ITERATIONS,
  "batch_size": 8,
  "num_epochs": 1,
  "num_minibatches": 2,
  "num_eval_rows": 16,
  "num_samples": 1,
  "kl_every": 2,
  "save_every": 1,
  "mesh": "sweep=1,data=1",
  "best_of_n": False,
}


@pytest.fixture(scope="module", autouse=True)
def workplace(tmp_path_factory, compiled_once):
  """A folder with models, prompts and rewards, in which all tests of this file work."""
  directory = tmp_path_factory.mktemp("sweeps")
  with contextlib.chdir(directory):
    key, tokenizer = jax.random.key(0), arithmetic.make_tokenizer()
    # Larger than the usual initialisation, so that distributions are far from uniform.
    policy, reward = (
      jax.device_get(jax.tree.map(lambda x: 3 * x, model.init(key)))
      for model in (policy_model(DECODER), scalar_model(DECODER))
    )
    reward["head"] = np.asarray(jax.random.normal(key, reward["head"].shape))
    save_policy(pathlib.Path("policy"), DECODER, policy, tokenizer)
    save_scalar(pathlib.Path("reward"), DECODER, reward, tokenizer)
    with open("prompts.jsonl", "w") as file:
      for record in arithmetic.prompt_records(held_out=False)[:20]:
        file.write(json.dumps(record) + "\n")
    pathlib.Path("reward.py").write_text(
      "calls = []\n"
      "def sevens(prompts, completions, answer, **columns):\n"
      "  calls.append(len(completions))\n"
      "  assert len(answer) == len(prompts) == len(completions)\n"
      "  return [completion.count('7') for completion in completions]\n"
      "def length(prompts, completions, **columns):\n"
      "  return [len(completion) for completion in completions]\n"
    )
    yield directory


def make_config(name="ppo", **changes):
  kind = experiment.config_class(name)
  known = {field.name for field in dataclasses.fields(kind)}
  return kind(**{**{key: x for key, x in TINY.items() if key in known}, **changes})


def set_up(config, mesh):
  models = inputs.load_models(config.sources(), **training.model_directories(config))
  return programs.set_up(config, mesh, models, inputs.load_task(config.sources(), models))


def swept(*configs):
  """Returns of each sweep, without judge and folders, (states, metrics), each of all iterations.

  One compiled program runs them all: their members differ in what is traced.
  """
  members = [experiment.members_of(config) for config in configs]
  mesh = parallel.sweep_mesh(configs[0].mesh, len(members[0]))
  setup, lift, found = set_up(members[0][0].config, mesh), None, []
  for of_sweep in members:
    state, shardings = population.init_members(setup, [member.config for member in of_sweep])
    if lift is None:
      per_batch = configs[0].members_per_batch
      lift = functools.partial(parallel.map_members, mesh, members_per_batch=per_batch)
      step = programs.make_step_fn(setup, shardings, lift=lift, guard=population.guarded)
    states, metrics = [], []
    for iteration in range(NUM_ITERATIONS):
      state, pairs = step(state, iteration)
      states.append(jax.device_get(state))
      metrics.append(jax.device_get(pairs))
    found.append((states, metrics))
  return found


def singles(config, num_iterations=NUM_ITERATIONS):
  """Yields (state, metrics of each iteration) of the single runs, by one compiled program."""
  members = experiment.members_of(config)
  setup = set_up(members[0].config, parallel.make_mesh(members[0].config.mesh))
  shardings = parallel.state_shardings(setup.mesh, programs.init_run(setup))
  step = programs.make_step_fn(setup, shardings)
  for member in members:
    state = jax.device_put(
      programs.init_run(setup._replace(config=member.config)),
      shardings,
    )
    found = []
    for iteration in range(num_iterations):
      state, pairs = step(state, iteration)
      found.append(jax.device_get(pairs))
    yield jax.device_get(state), found


def member_of(tree, i):
  return jax.tree.map(lambda x: x[i], tree)


MANY = {
  "ppo": {"sweep": "beta,learning_rate,clip_eps_high=0.1:1e-3:0.2,0.7:1e-2:0.01", "seeds": 2},
  "grpo": {
    "sweep": "beta=0,0.3;entropy_coef=0,0.1",
    "learning_rate": 1e-3,
    "staleness": 1,
    "reference_update": "ema",
    "reference_decay": 0.5,
    "group_size": 4,
    "normalise_scores": True,
  },
}


@functools.cache
def many(name):
  return swept(make_config(name, **MANY[name]))[0]


@pytest.mark.parametrize("name", MANY)
def test_a_member_is_its_single_run_bit_for_bit(name):
  (*_, state), found = many(name)
  for i, (single, single_found) in enumerate(singles(make_config(name, **MANY[name]))):
    chex.assert_trees_all_equal(member_of(state.run, i), single)
    for of_all, of_one in zip(found, single_found, strict=True):
      chex.assert_trees_all_equal(member_of(of_all, i), jax.tree.map(np.asarray, of_one))
  assert (state.diverged_at == np.zeros(4)).all()
  found = state.run.params["policy"]["decoder"]["embed"]["embedding"]
  assert all(np.abs(found[i] - found[j]).max() > 1e-5 for i in range(4) for j in range(i))


def test_all_that_a_member_starts_with_is_its_own():
  config = make_config("grpo", **{**MANY["grpo"], "sweep": "beta=0.1,0.3"}, seeds=2)
  members = experiment.members_of(config)
  setup = set_up(members[0].config, parallel.make_mesh("data=1"))
  state, _ = population.init_members(setup, [member.config for member in members])
  for i, member in enumerate(members):
    single = programs.init_run(setup._replace(config=member.config))
    chex.assert_trees_all_equal(jax.device_get(member_of(state.run, i)), jax.device_get(single))


def test_a_diverging_member_stays_as_it_was_and_touches_no_other():
  ((first, _, state), found), ((*_, good), good_found) = swept(
    *(
      make_config("reinforce", sweep=f"learning_rate=1e-3,{second},1e-2")
      for second in ("1e30", "1e-4")
    )
  )
  # Its first step ends at numbers that are finite, its second does not.
  assert state.diverged_at.tolist() == [0, 2, 0] and not good.diverged_at.any()
  for i in (0, 2):
    chex.assert_trees_all_equal(member_of(state, i), member_of(good, i))
    for of_bad, of_good in zip(found, good_found, strict=True):
      chex.assert_trees_all_equal(member_of(of_bad, i), member_of(of_good, i))
  assert state.run.iteration.tolist() == [3, 1, 3]
  chex.assert_tree_all_finite(state.run.params)
  chex.assert_trees_all_equal(member_of(state.run, 1), member_of(first.run, 1))


class Run(NamedTuple):
  """The fields of a run that a guard looks at."""

  params: dict
  iteration: jax.Array


def test_a_figure_that_is_not_finite_is_divergence_too():
  def run(iteration, figure):
    state = population.SweepState(Run({"x": jnp.ones(2)}, jnp.int32(iteration)), jnp.int32(0))

    def step(run):
      found = {"a": (figure, 1), "drawn": jnp.zeros((2, 3), bool)}
      return Run({"x": 2 * run.params["x"]}, run.iteration + 1), found

    return population.guarded(step)(state)[0]

  assert run(4, 0.5).diverged_at == 0 and run(4, 0.5).run.params["x"][0] == 2
  for figure in (np.nan, np.inf):
    assert run(4, figure).diverged_at == 5 and run(4, figure).run.params["x"][0] == 1


def test_the_parameters_of_a_member_are_sent_alone():
  mesh = parallel.make_mesh("sweep=2,fsdp=2")
  kernel = jax.random.normal(jax.random.key(0), (4, 8, 6)).at[2, 0].set(-0.0)
  params = {"kernel": kernel}
  placed = parallel.put(params, parallel.state_shardings(mesh, params, members=True))
  params_of = population.make_params_fn(mesh, params)
  assert "all-gather" not in params_of.lower(placed, 2).compile().as_text()
  for i in range(4):
    own = jax.device_get(params_of(placed, i)["kernel"])
    np.testing.assert_array_equal(own.view(np.int32), np.asarray(kernel[i]).view(np.int32))


def test_devices_and_batches_of_members_change_nothing_but_rounding():
  (*_, one), one_found = many("ppo")
  layout = {"mesh": "sweep=2,fsdp=2", "members_per_batch": 2}
  config = make_config(**MANY["ppo"], **layout)
  assert not any("sweep" in member.config.mesh for member in experiment.members_of(config))
  (((*_, several), several_found),) = swept(config)
  for a, b in zip(one_found, several_found, strict=True):
    chex.assert_trees_all_close(a, b, rtol=1e-4, atol=1e-5)
  chex.assert_trees_all_close(one.run.params, several.run.params, atol=1e-5)


def test_a_device_holds_its_members_shard_of_their_parameters():
  config = make_config(sweep="beta=0,0.3,0.5,0.7", mesh="sweep=2,fsdp=2")
  configs = [member.config for member in experiment.members_of(config)]
  setup = set_up(configs[0], parallel.sweep_mesh(config.mesh, len(configs)))
  state, _ = population.init_members(setup, configs)
  kernel = state.run.params["policy"]["decoder"]["layers"]["mlp"]["up"]["kernel"]
  assert kernel.shape[0] == 4
  assert {shard.data.size for shard in kernel.addressable_shards} == {kernel.size // 4}
  assert tuple(state.run.key.sharding.spec) == ("sweep",)


@pytest.mark.parametrize(
  ("spec", "num_members", "per_batch", "sizes", "num_places"),
  [
    ("", 3, 1, (3, 1), 3),
    ("", 9, 1, (3, 1), 9),
    ("sweep=2,fsdp=2", 3, 1, (2, 2), 4),
    ("fsdp=2", 3, 1, (1, 2), 3),
    ("sweep=1", 12, 8, (1, 1), 12),
    ("sweep=1", 5, 4, (1, 1), 6),
    ("sweep=2", 5, 2, (2, 1), 8),
    ("sweep=2", 5, 9, (2, 1), 6),
  ],
)
def test_every_member_has_a_place(spec, num_members, per_batch, sizes, num_places):
  mesh = parallel.sweep_mesh(spec, num_members)
  assert (mesh.shape["sweep"], mesh.shape["fsdp"]) == sizes
  assert parallel.places(mesh, num_members, members_per_batch=per_batch) == num_places


REWARDED = {"reward": "2*reward.py:sevens,0.5*model,-1*reward.py:length"}


def test_own_rewards_score_all_members_in_one_call(monkeypatch):
  config = make_config(**REWARDED, sweep="beta=0,0.3", seeds=2)
  calls, real = [], programs.rewards.weighted_scores

  def counted(weighted, records, texts, *others):
    calls.append(len(texts))
    return real(weighted, records, texts, *others)

  monkeypatch.setattr(programs.rewards, "weighted_scores", counted)
  (((*_, state), found),) = swept(config)
  assert calls == [4 * 8] * NUM_ITERATIONS
  for i, (single, single_found) in enumerate(singles(config)):
    chex.assert_trees_all_equal(member_of(state.run, i), single)
    for of_all, of_one in zip(found, single_found, strict=True):
      own = jax.tree.map(lambda x, i=i: np.broadcast_to(x, 4)[i], of_all)
      assert metrics.finalise(own) == metrics.finalise(of_one)


def read_lines(path):
  return [json.loads(line) for line in path.read_text().splitlines()]


def contents(folder):
  """Returns {path: bytes} of a finished run, less what tells of time."""
  lines = [folder / f"{name}.jsonl" for name in ("metrics", "evaluations", "samples")]
  paths = [*lines, *folder.glob("*model/*")]
  return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def figures_of(folder):
  summary = json.loads((folder / "summary.json").read_text())
  timed = ("wall_seconds", "tokens_per_second", "diverged_at", "num_members")
  return {name: x for name, x in summary.items() if name not in timed}


def test_a_sweep_leaves_what_its_single_runs_leave_and_grows(caplog, capsys):
  grid = "beta,learning_rate,temperature=0.1:1e-3:2,0.5:1e-3:2,0.5:1e30:0.5"
  config = make_config(sweep=grid)
  with jax.log_compiles():
    workdir = experiment.main(config)
  compiled = [record.getMessage().split(" with ")[0] for record in caplog.records]
  assert compiled.count("Compiling jit(iteration)") == 1
  out = capsys.readouterr().out
  assert "3 members, 0 of them finished before; 3 to run in 1 compiled program" in out
  assert "temperature=0.5,seed=0 was not finite at iteration 1" in out.replace("\n", "")
  good, bad = (
    workdir / "members" / f"beta=0.5,learning_rate={x},seed=0"
    for x in ("0.001,temperature=2", "1e+30,temperature=0.5")
  )
  single = ppo.main(dataclasses.replace(experiment.members_of(config)[1].config, workdir="single"))
  assert figures_of(good) == figures_of(single)
  assert contents(good) == contents(single)
  assert {"model/model.safetensors", "value_model/model.safetensors"} <= contents(good).keys()
  # A member's folder is one that the experiment knows as its own.
  shown = ppo.main(dataclasses.replace(experiment.members_of(config)[1].config, workdir=str(good)))
  assert "finished before" in capsys.readouterr().out and (shown / "report.html").exists()
  lines = read_lines(bad / "metrics.jsonl")
  assert len(lines) == NUM_ITERATIONS
  assert {x for line in lines for name, x in line.items() if name != "iteration"} == {None}
  # Each is judged at its own temperature.
  assert figures_of(bad)["entropy_before"] < 0.8 * figures_of(good)["entropy_before"]

  found = json.loads((workdir / "frontier.json").read_text())
  assert [record["values"]["beta"] for record in found["members"]] == [0.1, 0.5, 0.5]
  assert [record["diverged_at"] for record in found["members"]] == [None, None, 1]
  summary = json.loads((good / "summary.json").read_text())
  for name in FIGURES:
    assert found["members"][1][name] == summary[f"{name}_after"], name
    assert found["before"][name] == summary[f"{name}_before"], name
  assert found["members"][1]["kl_ref_exact_stderr"] == summary["kl_ref_exact_stderr"]
  assert any(record["pareto"] for record in found["members"][:2])

  before = {path: path.stat().st_mtime_ns for path in (workdir / "members").glob("*/summary.json")}
  grown = experiment.main(dataclasses.replace(config, sweep=grid + ",0.9:1e-3:2"))
  assert grown == workdir and len(before) == 3
  assert before == {path: path.stat().st_mtime_ns for path in before}
  assert "4 members, 3 of them finished before; 1 to run" in capsys.readouterr().out
  assert len(json.loads((workdir / "frontier.json").read_text())["members"]) == 4
  assert not list(workdir.glob("groups/*/checkpoints"))


def test_an_interrupted_sweep_goes_on_bit_for_bit_on_other_devices(monkeypatch, request, tmp_path):
  if BIT_FOR_BIT not in os.environ:  # In a process of its own, which compiles as a run does.
    command = ["-m", "pytest", "-n0", f"{__file__}::{request.node.name}"]
    inherited = {name: x for name, x in os.environ.items() if not name.startswith("PYTEST")}
    own = inherited | {BIT_FOR_BIT: "1", "XLA_FLAGS": ""}
    # What goes on where it began compiles nothing anew.
    own |= {"JAX_COMPILATION_CACHE_DIR": str(tmp_path)}
    own |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    status, said = forked.Process(command, ROOT, own).finished()
    assert status == 0 and said.startswith("."), said  # It ran.
    return
  settings = {
    "mesh": "",
    "reward": "reward.py:sevens",
    "reward_model": "",
    "normalise_scores": True,
    "reference_update": "ema",
    "sweep": "learning_rate=1e-3,1e30,1e-2",
  }
  monkeypatch.setattr(jax, "device_count", lambda: 1)
  whole = experiment.main(make_config("reinforce", **settings, workdir="whole"))
  monkeypatch.setattr(jax, "device_count", lambda: 2)
  config = make_config("reinforce", **settings, workdir="parts")
  real, calls = loop._check_finite, []

  def interrupt_once(*arguments):
    calls.append(arguments)
    if len(calls) == 2:
      os.kill(os.getpid(), 2)
    return real(*arguments)

  monkeypatch.setattr(loop, "_check_finite", interrupt_once)
  with pytest.raises(loop.Interrupted, match="after iteration 2 of 3"):
    experiment.main(config)
  monkeypatch.setattr(jax, "device_count", lambda: 1)
  parts = experiment.main(config)
  assert len(calls) == NUM_ITERATIONS
  names = [member.name for member in experiment.members_of(config)]
  for name in names:
    assert contents(whole / "members" / name) == contents(parts / "members" / name)
    assert figures_of(whole / "members" / name) == figures_of(parts / "members" / name)
  assert (whole / "frontier.json").read_bytes() == (parts / "frontier.json").read_bytes()


def test_members_that_began_together_go_on_together(tmp_path):
  old = experiment.members_of(make_config(sweep="beta=0.1,0.3"))
  folder = tmp_path / "groups" / "some"
  folder.mkdir(parents=True)
  names = [member.name for member in old]
  (folder / "members.json").write_text(json.dumps({"members": names, "places": 2}))

  def groups(grid):
    found = population.group_members(tmp_path, experiment.members_of(make_config(sweep=grid)))
    return [[member.values["beta"] for member in group] for group in found]

  assert groups("beta=0.2,0.3,0.1") == [[0.1, 0.3], [0.2]]
  assert groups("beta=0.2,0.3") == [[0.2, 0.3]]
  finished = old[0].folder(tmp_path)
  finished.mkdir(parents=True)
  (finished / "summary.json").write_text("{}")
  # Written while the results of the group were: the rest of it goes on from its checkpoint.
  assert groups("beta=0.2,0.3,0.1") == [[0.1, 0.3], [0.2]]
  (folder / "members.json").unlink()
  assert groups("beta=0.2,0.3,0.1") == [[0.2, 0.3]]


@pytest.mark.parametrize(
  "content", ["", "{", "[]", '{"members": 3, "places": 1}', '{"members": []}', "[" * 10**5]
)
def test_a_damaged_file_of_a_group_is_named_with_what_to_do(tmp_path, content):
  (tmp_path / "groups/some").mkdir(parents=True)
  (tmp_path / "groups/some/members.json").write_text(content)
  with pytest.raises(UserError, match=r"members\.json.*Remove .*groups/some: its members start"):
    population.group_members(tmp_path, experiment.members_of(make_config(sweep="beta=0.1,0.3")))


def test_what_began_on_devices_that_are_not_there_is_left_alone():
  config = make_config(sweep="beta=0.15,0.35", members_per_batch=8)
  names = json.dumps([member.name for member in experiment.members_of(config)])
  workdir = find_workdir("sweep", config)
  create_workdir(workdir, "sweep", config)
  folder = workdir / "groups" / hashlib.sha256(names.encode()).hexdigest()[:8]
  folder.mkdir(parents=True)
  begun = json.dumps({"members": json.loads(names), "places": 15})  # Five on each of three.
  (folder / "members.json").write_text(begun)
  with pytest.raises(UserError, match=r"began with 15 places .* these devices have 16"):
    experiment.main(config)
  assert (folder / "members.json").read_text() == begun


def test_values_that_change_the_program_make_groups(tmp_path):
  members = experiment.members_of(
    make_config(
      sweep="beta=0.1,0.3;accumulation=1,2;trust_region_beta=1", trust_region="kl_old_new"
    )
  )
  groups = population.group_members(tmp_path, members)
  assert [[member.structure() for member in group] for group in groups] == [
    [{"accumulation": 1}] * 2,
    [{"accumulation": 2}] * 2,
  ]


@pytest.mark.parametrize(
  ("grid", "expected"),
  [
    ("", [{}]),
    ("beta=0,1", [{"beta": 0.0}, {"beta": 1.0}]),
    ("whiten_advantages=true,False", [{"whiten_advantages": True}, {"whiten_advantages": False}]),
    (
      "beta=1,2; gamma=0.5,1",
      [
        {"beta": 1.0, "gamma": 0.5},
        {"beta": 1.0, "gamma": 1.0},
        {"beta": 2.0, "gamma": 0.5},
        {"beta": 2.0, "gamma": 1.0},
      ],
    ),
    (
      "beta,accumulation=1:2,2:4",
      [{"beta": 1.0, "accumulation": 2}, {"beta": 2.0, "accumulation": 4}],
    ),
    (
      "reward=reward.py:sevens,reward.py:length",
      [{"reward": "reward.py:sevens"}, {"reward": "reward.py:length"}],
    ),
  ],
)
def test_a_grid_has_these_points(grid, expected):
  own = {"reward_model": ""} if grid.startswith("reward") else {}
  members = experiment.members_of(make_config(sweep=grid, seed=3, seeds=2, **own))
  values = [point | {"seed": seed} for point in expected for seed in (3, 4)]
  assert [member.values for member in members] == values
  for member in members:
    for name, value in member.values.items():
      assert getattr(member.config, name) == value
      assert type(getattr(member.config, name)) is type(value)
  assert len({member.name for member in members}) == len(members)


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"sweep": "betta=1,2"}, "--sweep=betta=1,2: 'betta' is no setting"),
    ({"sweep": "beta"}, "--sweep=beta: write FLAG=VALUE,VALUE"),
    ({"sweep": "beta="}, "--sweep=beta=: write FLAG=VALUE,VALUE"),
    ({"sweep": "beta=1,1.0"}, "beta=1,seed=0 is there twice"),
    ({"sweep": "beta=1;beta=2"}, "beta is swept twice"),
    ({"sweep": "beta=1,two"}, "--sweep=beta=1,two: 'two' is no float"),
    ({"sweep": "num_epochs=1.5"}, "'1.5' is no int"),
    ({"sweep": "whiten_advantages=yes"}, "'yes' is no bool"),
    ({"sweep": "beta,gamma=1:1,2"}, "'2' has not one value for each of beta, gamma"),
    ({"sweep": "seed=1,2"}, "seeds are swept by --seeds=K"),
    ({"sweep": "workdir=a,b"}, "'workdir' is no setting"),
    ({"sweep": "beta=1", "beta": 0.7}, "--beta and --sweep=beta=1 both say what beta is"),
    ({"sweep": "beta=1,-1"}, "Member beta=-1,seed=0: --beta=-1.0: must be at least 0"),
    ({"sweep": "beta=nan"}, "Member beta=nan,seed=0: --beta=nan"),
    (
      {"sweep": "beta=0.1,0", "controller": "doubling"},
      "Member beta=0,seed=0: --controller=doubling multiplies beta",
    ),
    (
      {"sweep": "batch_size=8,6", "batch_size": 512, "mesh": "sweep=1,data=4"},
      "--batch_size=6 cannot be split over 4",
    ),
    ({"sweep": "reward_model=nowhere"}, "nowhere"),
    ({"sweep": "beta=1", "mesh": "sweep=8"}, "needs 8 devices, JAX sees 4"),
  ],
)  # fmt: skip
def test_what_cannot_be_swept_is_said_at_once(changes, message):
  with pytest.raises(UserError, match=re.escape(message)):
    experiment.main(make_config(**changes))


def test_best_of_n_is_of_what_all_members_start_with(tmp_path):
  def beside(name="ppo", **changes):
    config = make_config(name, **{"best_of_n": True, "seed": 3, **changes})
    return experiment.best_of_n_config(config, experiment.members_of(config), tmp_path)

  found = beside(sweep="beta=0,1", temperature=0.7, data_seed=2)
  shared = ("policy", "reward_model", "prompts", "max_completion_len", "temperature", "data_seed")
  assert [getattr(found, name) for name in shared] == [
    "policy", "reward", "prompts.jsonl", 3, 0.7, 2,
  ]  # fmt: skip
  assert found.seed == 3 and found.workdir == str(tmp_path / "best_of_n")
  assert beside(best_of_n=False) is None
  assert beside(sweep="temperature=0.5,1") is None
  assert beside(reference="policy") is None
  assert beside(sweep="reference=,policy") is None
  assert beside("distill", teacher="policy") is None


def test_a_sweep_draws_best_of_n_and_refuses_another_in_its_place(capsys):
  config = make_config("reinforce", sweep="beta=0.2", best_of_n=True, num_iterations=1)
  workdir = experiment.main(config)
  path = workdir / "best_of_n" / "best_of_n.json"
  found = json.loads(path.read_text())
  assert found["exact"] is None and found["num_prompts"] == 2
  assert "best of n" in (workdir / "report.html").read_text()
  assert (
    "best of n"
    not in (
      experiment.main(dataclasses.replace(config, best_of_n=False)) / "report.html"
    ).read_text()
  )
  settings = json.loads((path.parent / "config.json").read_text())
  (path.parent / "config.json").write_text(json.dumps(settings | {"reward_model": "another"}))
  with pytest.raises(UserError, match="reward_model is 'another' there"):
    experiment.main(config)


def test_the_command_line_has_the_flags_of_the_experiment(tmp_path):
  (tmp_path / "some.flags").write_text("--experiment=grpo\n--group_size=4\n")
  command = ["--flagfile=" + str(tmp_path / "some.flags"), "--sweep=betta=1", "--seeds=2"]
  process = forked.Process(["-m", "experiments.sweep", *command], ROOT, dict(os.environ))
  status, said = process.finished()
  said = said.replace("\n", " ")
  assert status == 1, said
  assert "'betta' is no setting that members may differ in. Did you mean 'beta'?" in said
