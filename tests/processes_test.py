"""Several processes give what one with as many devices gives, stop together and fail together."""

import json
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys

import forked
import jax
import numpy as np
import pytest
from quick_compilation import QUICK
from small_decoders import arithmetic_decoder

from klrl.devices import processes
from klrl.errors import UserError
from klrl.models import policy_model, save_policy, save_scalar, scalar_model
from klrl.tasks import arithmetic

ROOT = pathlib.Path(__file__).parents[1]
OWN = ["--workdir=run", "--policy=policy", "--prompts=prompts.jsonl", "--max_completion_len=3"]
OWN += ["--num_iterations=3", "--batch_size=8", "--num_eval_rows=8", "--num_samples=1"]
OWN += ["--save_every=10"]
HOST = ["--reward_model=reward", "--reward=model,0.1*reward.py:sevens", "--learning_rate=1e-2"]
SINGLE = ["experiments.reinforce", *OWN, *HOST, "--lora_rank=2", "--keep_best=score"]
SWEEP = ["experiments.sweep", "--experiment=ppo", "--sweep=beta=0.1,0.5,3", *OWN, *HOST]
SWEEP += ["--mesh=sweep=2,fsdp=2", "--num_epochs=1", "--num_minibatches=2"]
# Two calls of the reward judge the start, and three each evaluate the members after 0 and after 1
# iteration, so this one is of the second iteration.
IN_SECOND = "10"
ONCE = ("summary.json", "frontier.json", "evaluation.json", "evaluate.json", "best_of_n.json")
NOT_THE_RESULT = ("seconds", "tokens_per_second", "device")
# Process 1 leaves its number, and the other may send it a signal.
REWARD = """
import os
import pathlib
import signal

other, index = pathlib.Path("other"), os.environ.get("JAX_PROCESS_ID", "0")
if index == "1":
  other.write_text(str(os.getpid()))


def sevens(prompts, completions, **columns):
  with open(f"calls{index}", "a") as calls:
    calls.write(f"{len(completions)}\\n")
  number = len(pathlib.Path(f"calls{index}").read_text().splitlines())
  if index == "0" and number == int(os.environ.get("AT_CALL", 0)):
    os.kill(int(other.read_text()), signal.SIGTERM)
  return [completion.count("7") for completion in completions]


def fails(prompts, completions, **columns):
  raise KeyError("a column")
"""


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
  """A folder with a policy, a reward model, prompts and rewards; and what has been compiled."""
  folder = tmp_path_factory.mktemp("inputs")
  tokenizer, key = arithmetic.make_tokenizer(), jax.random.key(0)
  config = arithmetic_decoder(num_heads=2, mlp_dim=16, max_len=16)
  save_policy(folder / "policy", config, policy_model(config).init(key), tokenizer)
  reward = scalar_model(config).init(key)
  reward["head"] = np.asarray(jax.random.normal(key, reward["head"].shape))
  save_scalar(folder / "reward", config, reward, tokenizer)
  records = arithmetic.prompt_records(held_out=False)[:20]
  (folder / "prompts.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
  pairs = [{"prompt": x["prompt"], "chosen": "12", "rejected": "7"} for x in records]
  (folder / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
  (folder / "reward.py").write_text(REWARD)
  return folder


def place(inputs, folder):
  return pathlib.Path(shutil.copytree(inputs, folder))


def environment_of(folder, *, devices=1, **own):
  folder.mkdir(exist_ok=True)
  inherited = {name: x for name, x in os.environ.items() if not name.startswith("JAX_")}
  common = {
    "JAX_PLATFORMS": "cpu",
    "PYTHONPATH": str(ROOT),
    "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices} {QUICK}",
    # A run that goes on compiles nothing anew.
    "JAX_COMPILATION_CACHE_DIR": str(folder / "cache"),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
  }
  return inherited | common | own


def start(folder, command, **own):
  return forked.Process(command, folder, environment_of(folder, **own))


def finished(process, status=0):
  found, output = process.finished()
  assert found == status, output
  return output


def one(folder, command, *, devices):
  return finished(start(folder, ["-m", *command], devices=devices))


def free_port():
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    return free.getsockname()[1]


def several(folders, command, *, status=0, **settings):
  """Returns what a process in each folder printed; `status` is that of all, or of each."""
  address = f"127.0.0.1:{free_port()}"
  told = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": str(len(folders))}
  started = [
    start(folder, command, **told, JAX_PROCESS_ID=str(i), **settings)
    for i, folder in enumerate(folders)
  ]
  ended = [process.finished() for process in started]
  statuses = status if isinstance(status, tuple) else (status,) * len(folders)
  assert tuple(found for found, _ in ended) == statuses, ended
  return [output for _, output in ended]


def two(folder, command, **settings):
  return several([folder] * 2, command, **settings)


def results(folder):
  """Returns all figures of all runs in a folder, {file: {name: figure}}."""
  found = {}
  for path in sorted((folder / "run").rglob("*.json*")):
    if (path.name.endswith(".jsonl") and path.name != "timing.jsonl") or path.name in ONCE:
      leaves, _ = jax.tree.flatten_with_path([json.loads(x) for x in lines_or_one(path)])
      found[str(path.relative_to(folder))] = {
        jax.tree_util.keystr(key): x
        for key, x in leaves
        if not any(name in jax.tree_util.keystr(key) for name in NOT_THE_RESULT)
      }
  return found


def lines_or_one(path):
  text = path.read_text()
  return text.splitlines() if path.suffix == ".jsonl" else [text]


def assert_same_results(found, expected, *, abs=1e-4):
  assert found.keys() == expected.keys() and found
  for file, figures in expected.items():
    assert found[file] == pytest.approx(figures, abs=abs), file


def test_a_sweep_that_one_process_interrupts_goes_on_in_both_and_equals_one(inputs, tmp_path):
  """Three members on four places of two devices each; rewards of the host's and a model's."""
  folder = place(inputs, tmp_path / "two")
  printed = two(folder, ["-m", *SWEEP], status=130, devices=2, AT_CALL=IN_SECOND)
  assert "Stopped after iteration 2 of 3" in printed[0] and "Stopped" not in printed[1]
  assert not list((folder / "run").rglob("summary.json"))
  (group,) = (folder / "run" / "groups").iterdir()
  assert [path.name for path in (group / "checkpoints").iterdir()] == ["2"]
  printed = two(folder, ["-m", *SWEEP], devices=2)
  assert "Report:" in printed[0] and "Report:" not in printed[1]
  assert not (group / "checkpoints").exists() and not (group / "members.json").exists()
  one(place(inputs, tmp_path / "one"), SWEEP, devices=4)
  expected = results(tmp_path / "one")
  assert len(expected) == 1 + 3 * 4 + 1 + 1  # the frontier, members, their group, best-of-n
  assert_same_results(results(folder), expected)


def test_four_processes_that_are_stopped_go_on_as_two_and_equal_one(inputs, tmp_path):
  command = ["experiments.grpo", *OWN, *HOST, "--group_size=2", "--eval_every=0"]
  folder = place(inputs, tmp_path / "four")
  printed = several([folder] * 4, ["-m", *command], status=130, AT_CALL="3")
  assert "Stopped after iteration 2 of 3" in printed[0] and not any(
    "Stopped" in x for x in printed[1:]
  )
  printed = two(folder, ["-m", *command], devices=2)
  assert "Report:" in printed[0] and "Report:" not in printed[1]
  one(place(inputs, tmp_path / "one"), command, devices=4)
  assert_same_results(results(folder), results(tmp_path / "one"), abs=1e-5)
  # Each of the four is asked for its own quarter of the rows.
  asked = [list(map(int, path.read_text().split())) for path in sorted(folder.glob("calls*"))]
  assert len(asked) == 4 and asked[2] == asked[3] == [2] * len(asked[2])


# One start of Python for all.
SEVERAL = """
from experiments import dpo, evaluate, grpo, reward_model
from klrl.devices import processes
from klrl.run.progress import console
from klrl.tasks import arithmetic

processes.connect()
console.quiet = not processes.is_writer()
many = arithmetic.demonstrations
arithmetic.demonstrations = lambda seed, num, **settings: many(seed, 200, **settings)
few = {"num_iterations": 3, "sft_iterations": 3, "batch_size": 8, "num_preferences": 200}
reward_model.main(reward_model.Config(**few, workdir="run/stages"))
judged = {"num_eval_rows": 8, "num_samples": 1, "max_completion_len": 3, "policy": "policy"}
run = judged | {"num_iterations": 2, "batch_size": 8, "learning_rate": 1e-2, "eval_every": 0}
own = {"prompts": "prompts.jsonl", "reward": "reward.py:sevens"}
grpo.main(grpo.Config(**run, **own, group_size=4, num_minibatches=1, workdir="run/grpo"))
dpo.main(dpo.Config(**run, data="pairs.jsonl", workdir="run/dpo"))
judged |= {"policy": "policy,run/grpo/model", "reference": "policy"}
evaluate.main(evaluate.Config(**judged, **own, workdir="run/evaluate"))
"""


def test_stages_groups_pairs_and_a_judge_of_two_processes_equal_those_of_one(inputs, tmp_path):
  folder, alone = place(inputs, tmp_path / "two"), place(inputs, tmp_path / "one")
  printed = two(folder, ["-c", SEVERAL])
  finished(start(alone, ["-c", SEVERAL], devices=2))
  assert "model in" in printed[0] and "model in" not in printed[1]
  found, expected = (
    json.loads((where / "run/stages/summary.json").read_text()) for where in (folder, alone)
  )
  assert expected["device"] == found["device"]
  assert_same_results(results(folder), results(alone), abs=1e-5)
  # Each process is asked for its own half of the rows.
  halves, whole = (
    [list(map(int, path.read_text().split())) for path in sorted(where.glob("calls*"))]
    for where in (folder, alone)
  )
  assert len(halves) == 2 and [[2 * x for x in half] for half in halves] == whole * 2


def test_open_mpi_needs_no_flag(inputs, tmp_path):
  if not shutil.which("mpirun"):
    pytest.skip("there is no mpirun: apt-get install openmpi-bin")
  folder = place(inputs, tmp_path / "two")
  command = ["mpirun", "-n", "2", sys.executable, "-m", *SINGLE]
  # Open MPI refuses root, and more processes than cores, and gives a process one core of its own.
  allowed = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
  allowed |= {"OMPI_MCA_rmaps_base_oversubscribe": "1"}
  allowed |= {"OMPI_MCA_hwloc_base_binding_policy": "none"}
  done = subprocess.run(
    command,
    cwd=folder,
    env=environment_of(folder, **allowed),
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
    timeout=500,
  )
  printed = done.stdout
  assert done.returncode == 0, printed
  assert printed.count("Report:") == 1
  assert json.loads((folder / "run" / "summary.json").read_text())["device"] == "2 x cpu"
  alone = place(inputs, tmp_path / "one")
  one(alone, SINGLE, devices=2)
  assert_same_results(results(folder), results(alone))


def test_open_mpi_that_jax_does_not_see_is_refused(tmp_path):
  code = "from klrl.devices import processes; processes.connect()"
  process = start(tmp_path, ["-c", code], OMPI_COMM_WORLD_SIZE="2")
  assert "mpirun -x JAX_COORDINATOR_ADDRESS=HOST:PORT" in finished(process, 1)


@pytest.mark.parametrize(
  ("settings", "message"),
  [
    ({"JAX_COORDINATOR_ADDRESS": "127.0.0.1"}, "write HOST:PORT of process 0"),
    ({"JAX_COORDINATOR_ADDRESS": "127.0.0.1:high"}, "write HOST:PORT of process 0"),
    ({"JAX_COORDINATOR_ADDRESS": "no.such.host.invalid:1234"}, "the host is not known here"),
    ({"JAX_NUM_PROCESSES": "two"}, "JAX_NUM_PROCESSES=two and JAX_PROCESS_ID=1: must be a number"),
    ({"JAX_PROCESS_ID": "2"}, "an index from 0 to below it"),
    ({"KLRL_MEET_SECONDS": "soon"}, "KLRL_MEET_SECONDS=soon: must be a positive whole number"),
  ],
)
def test_a_start_that_cannot_work_is_refused_at_once(monkeypatch, settings, message):
  told = {"JAX_COORDINATOR_ADDRESS": "127.0.0.1:1234"}
  told |= {"JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "1"}
  for name, value in (told | settings).items():
    monkeypatch.setenv(name, value)
  with pytest.raises(UserError, match=message):
    processes.connect()


# Nobody else is started.
MISSED = """
from klrl.devices import processes
processes._SECONDS_TO_WONDER, processes._SECONDS_TO_MEET = 0.5, 2
processes.connect()
"""


@pytest.mark.parametrize("index", [0, 1])
def test_a_process_that_nobody_joins_says_so_and_ends_with_a_message(tmp_path, index):
  process = start(
    tmp_path,
    ["-c", MISSED],
    JAX_COORDINATOR_ADDRESS=f"127.0.0.1:{free_port()}",
    JAX_NUM_PROCESSES="2",
    JAX_PROCESS_ID=str(index),
  )
  printed = finished(process, 1)
  assert "has waited 0.5 s for the others at 127.0.0.1" in printed
  assert (
    "has waited 2 s, too long (KLRL_MEET_SECONDS sets another number), for" in printed
    and "Abort" not in printed
  )


def test_a_port_that_is_taken_is_told_at_once(tmp_path):
  with socket.socket() as taken:
    taken.bind(("127.0.0.1", 0))
    taken.listen()
    told = {"JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "0"}
    told["JAX_COORDINATOR_ADDRESS"] = f"127.0.0.1:{taken.getsockname()[1]}"
    code = "from klrl.devices import processes; processes.connect()"
    printed = finished(start(tmp_path, ["-c", code], **told), 1)
  assert "UserError: The port of 127.0.0.1:" in printed and "is taken on this host" in printed


# Process 1 has another version, or takes the run for one of three processes.
OTHER = """
import os, sys
from klrl.devices import processes

if sys.argv[1:] and os.environ["JAX_PROCESS_ID"] == "1":
  os.environ["JAX_NUM_PROCESSES"] = "3"
elif os.environ["JAX_PROCESS_ID"] == "1":
  versions = processes._versions()
  processes._versions = lambda: versions | {"JAX": "0.0"}
processes.connect()
"""


def test_processes_with_different_numbers_of_processes_are_refused_at_once(tmp_path):
  for printed in two(tmp_path, ["-c", OTHER, "3"], status=1):
    assert "Process 1 has number of processes 3 and not 2 as process 0 has." in printed


def test_processes_of_different_code_are_refused(tmp_path):
  for printed in two(tmp_path, ["-c", OTHER], status=1):
    message = f"UserError: Process 1 has JAX 0.0 and not {jax.__version__} as process 0 has."
    assert message in printed


def test_processes_with_different_flags_are_refused(inputs, tmp_path):
  folders = [place(inputs, tmp_path / name) for name in "ab"]
  for folder, beta in zip(folders, ("0.1", "0.7"), strict=True):
    (folder / "flags").write_text(f"--beta={beta}\n")
  command = ["-m", "experiments.reinforce", *OWN, "--flagfile=flags"]
  for printed in several(folders, command, status=1):
    assert "Process 1 has --beta 0.7 and not 0.1 as process 0 has." in printed
  assert not (folders[0] / "run").exists()


def test_processes_that_read_different_files_are_refused(inputs, tmp_path):
  """A copy of a file on each host is another file with the same content."""
  folders = [place(inputs, tmp_path / name) for name in "ab"]
  (folders[1] / "reward.py").write_text(REWARD.replace('count("7")', 'count("3")'))
  command = ["-m", "experiments.reinforce", *OWN, "--reward=reward.py:sevens"]
  printed = several(folders, [*command, f"--workdir={tmp_path}/run"], status=1)
  message = "Process 1 reads another content than process 0 of reward.py."
  assert message in " ".join(printed[0].split()), printed
  assert not (tmp_path / "run" / "config.json").exists()


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    (["--reward=reward.py:fails"], "Error: The reward fails failed: KeyError: 'a column'"),
    (["--policy=nowhere", "--reward_model=reward"], "nowhere does not exist"),
  ],
)
def test_a_run_that_fails_ends_in_both_with_one_message(changes, message, inputs, tmp_path):
  command = ["-m", "experiments.reinforce", *OWN, *changes]
  printed = two(place(inputs, tmp_path / "two"), command, status=1)
  assert message in printed[0] and "Error" not in printed[1], printed
  assert "Traceback" not in printed[0] + printed[1]


def test_a_process_that_is_interrupted_alone_says_so_and_ends_the_others(inputs, tmp_path):
  folder = place(inputs, tmp_path / "two")
  (folder / "reward.py").write_text(f"{REWARD}\nif index == '1': raise KeyboardInterrupt\n")
  command = ["-m", "experiments.reinforce", *OWN, "--reward=reward.py:sevens"]
  printed = two(folder, command, status=(1, 130))
  assert "Process 0: Another process of this run has ended" in printed[0]
  assert "Interrupted. The same command goes on" in printed[1]


# Each line is run by both; process 1 sees another folder. What is raised is printed.
ALONE = """
import os
import numpy as np
from klrl.devices import processes
from klrl.run import workdir
from klrl.errors import UserError

def refuse(own, kind=UserError):
  if processes.is_writer() == own:
    raise kind("refused")

def shares(num_rows, unit):
  def own(rows):
    return np.array([[index * 1.0, row] for row in range(num_rows)[rows]]).reshape(-1, 2).T

  return processes.in_shares(own, num_rows, unit=unit).astype(int).tolist()

processes.connect()
index = int(os.environ["JAX_PROCESS_ID"])
tries = (
  lambda: processes.together(refuse)(False),
  lambda: processes.together(refuse)(True),
  lambda: processes.together(refuse)(False, OSError),
  lambda: processes.on_writer(refuse)(False),
  lambda: processes.on_writer(refuse)(True),
  lambda: processes.on_writer(lambda: [index, "x" * 5000])()[0],
  lambda: processes.anywhere(index == 1),
  lambda: processes.anywhere(index == 2),
  lambda: shares(7, 1),
  lambda: shares(7, 2),
  lambda: shares(1, 1),
  lambda: workdir._check_is_shared(workdir.pathlib.Path(".")),
  lambda: workdir._check_is_shared(workdir.pathlib.Path("..")),
)
if index == 1:
  workdir.os.access = lambda *_: False  # as on a disk that is mounted to be read
for attempt in tries:
  try:
    print("returned", attempt(), flush=True)
  except Exception as error:
    print(type(error).__name__, str(error)[:40], flush=True)
"""


def test_what_fails_in_one_process_fails_in_both(tmp_path):
  folders = [tmp_path / name for name in "ab"]
  printed = several(folders, ["-c", ALONE])
  printed = [[line for line in text.splitlines() if "Gloo" not in line] for text in printed]
  same = ["UserError refused"] * 2
  after = [
    "returned None",
    "UserError refused",
    "returned 0",
    "returned True",
    "returned False",
    "returned [[0, 0, 0, 0, 1, 1, 1], [0, 1, 2, 3, 4, 5, 6]]",
    "returned [[0, 0, 0, 0, 1, 1, 1], [0, 1, 2, 3, 4, 5, 6]]",
    "returned [[0], [0]]",
    "UserError . is not the same folder for all process",
    f"UserError {tmp_path}/a/.. is no folder"[:50],
  ]
  assert printed[0] == [*same, "UserError Process 1: OSError: refused", *after]
  assert printed[1] == [*same, "OSError refused", *after]
  assert not [path for folder in folders for path in folder.glob(".shared*")]


# A state of which each process holds a half.
SAVED = """
import os
import pathlib
import jax
import numpy as np
from klrl.devices import parallel, processes
from klrl.run import loop

processes.connect()
mesh = parallel.make_mesh("")
state = {"x": np.arange(8.0, dtype=np.float32), "key": jax.random.key(0)}
places = {"x": parallel.by_rows(mesh), "key": parallel.replicated(mesh)}
state = parallel.put(state, places)
step = jax.jit(lambda state: {**state, "x": state["x"] + 1}, out_shardings=places)
start, state = loop.restore_or_init(pathlib.Path("run"), state, keep=2)
print("start", start, flush=True)
number = int(os.environ.get("ITERATIONS", 4))
settings = {"start": start, "num_iterations": number, "save_every": 2, "keep": 2}
run = loop.iterate(lambda x, i: (step(x), {}), state, workdir=pathlib.Path("run"), **settings)
for _, state, _ in run:
  pass
print("ends with", parallel.fetch(state["x"])[[0, 7]].tolist(), flush=True)
"""


def test_a_damaged_checkpoint_is_left_by_both_processes_and_one_goes_on(tmp_path):
  (tmp_path / "run").mkdir()
  both = "start 0", "ends with [4.0, 11.0]"
  for text in two(tmp_path, ["-c", SAVED]):
    assert all(words in text for words in both), text
  (tmp_path / "run/checkpoints/4/default/manifest.ocdbt").write_bytes(b"garbage")
  for index, text in enumerate(two(tmp_path, ["-c", SAVED])):
    assert "start 2" in text and "ends with [4.0, 11.0]" in text, text
    assert index or "The checkpoint after iteration 4" in " ".join(text.split())
  assert sorted(path.name for path in (tmp_path / "run/checkpoints").iterdir()) == [
    *("2", "4", "4.damaged")
  ]
  # One process with one device goes on.
  text = finished(start(tmp_path, ["-c", SAVED], ITERATIONS="5"))
  assert "start 4" in text and "ends with [5.0, 12.0]" in text


# From the first save on, process 1 cannot write a file of any size.
REFUSED = SAVED.replace(
  "processes.connect()",
  """
import resource, signal
processes._SECONDS_UNHEARD = 3
processes.connect()
if not processes.is_writer():
  signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
  resource.setrlimit(resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))
""",
)


def test_a_process_that_cannot_write_its_part_ends_with_a_message_and_ends_the_others(tmp_path):
  (tmp_path / "run").mkdir()
  printed = two(tmp_path, ["-c", REFUSED], status=(-signal.SIGABRT, 1))
  message = "Process 1: Its part of a checkpoint cannot be written. File too large"
  assert message in printed[1] and "another task died" in printed[0]


# Process 0 waits for one that has ended; nothing may take longer than that.
LEFT = """
from klrl.devices import processes
processes._SECONDS_TO_FOLLOW = 4
processes.connect()
processes.wait_for_all("here")
if processes.is_writer():
  processes.wait_for_all("there")
processes.leave("a message")
"""


def test_a_process_that_ends_alone_says_why_and_ends_the_others(tmp_path):
  printed = two(tmp_path, ["-c", LEFT], status=-signal.SIGABRT)
  assert "Process 1 alone: a message" in printed[1] and "a message" not in printed[0]


# Process 1 is killed; process 0 waits for it, or does something else.
KILLED = """
import os, sys, time
from klrl.devices import processes
from klrl.errors import PeerLost, troubles_told

processes._SECONDS_UNHEARD = 3
processes.connect()
processes.wait_for_all("here")
if not processes.is_writer():
  os.kill(os.getpid(), 9)
try:
  with troubles_told():
    processes.wait_for_all("there") if sys.argv[1] == "waits" else time.sleep(60)
except PeerLost as error:
  processes.end_alone(str(error))
"""


@pytest.mark.parametrize(
  ("does", "status", "message"),
  [
    ("waits", 1, "Process 0: Another process of this run has ended or cannot be reached"),
    ("works", -signal.SIGABRT, "another task died"),
  ],
)
def test_one_that_is_killed_ends_the_others_with_a_message(tmp_path, does, status, message):
  printed = two(tmp_path, ["-c", KILLED, does], status=(status, -signal.SIGKILL))
  assert message in printed[0]
