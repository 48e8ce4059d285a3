"""Commands that are killed, signalled or refused a file, and then given again: nothing is lost.

Each is a process of its own, as a user's. `benchmarks/soak.py` does the same at every operation on
files, and more. Damaged checkpoints are in `loop_test`, damaged files of a run in `workdir_test`,
`metrics_test` and `evaluations_test`, locks in `lock_test`, changed inputs in `fingerprints_test`.
"""

import os

import pytest

from benchmarks import faults
from benchmarks.faults import Fault

# Two iterations on the tree, with all that a run saves: 177 operations on files.
COMMAND = ("reinforce", faults.TREE)
# What happens to the same command one time after the other, how it ends, and what it says then.
LIVES = (
  # A model of a stage is half there.
  (Fault(faults.TORN, holding="open runs/stages/tree-0/.config.json"), -9, ""),
  (Fault(holding="os.rename run/config.json"), -9, ""),
  (Fault(faults.FULL, holding="os.mkdir run/checkpoints/1"), 1, "File too large at"),
  (Fault(faults.READ_ONLY, holding="open run/timing.jsonl"), 1, "Read-only file system"),
  (Fault(faults.TORN, holding="open run/metrics.jsonl"), -9, ""),
  (Fault(faults.TERM, holding="open run/timing.jsonl"), 130, "Stopped after iteration 1 of 2"),
)
# What happens to it after that, while the last checkpoint is written in the background. It may be
# whole before, and then the run has ended.
KILLS = (
  # The best model is aside, and the better one is not yet in its place.
  Fault(holding="os.rename run/model_best.partial"),
  # In a save, while the one before is there.
  Fault(holding="os.rename run/checkpoints/2"),
  # The checkpoint before goes, and is half gone.
  Fault(holding="os.remove run/checkpoints/1/default/manifest"),
  Fault(holding="os.rename run/summary.json"),
)


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
  return tmp_path_factory.mktemp("compiled")


def test_whatever_happens_to_a_run_the_same_command_goes_on_bit_for_bit(tmp_path, compiled):
  whole = faults.run(*COMMAND, tmp_path / "whole", compiled=compiled)
  assert whole.status == 0, whole.said
  for fault, status, words in LIVES:
    life = faults.run(*COMMAND, tmp_path / "parts", compiled=compiled, fault=fault)
    assert (life.status, words in life.said) == (status, True), (fault, life.said)
    assert "Traceback" not in life.said, (fault, life.said)
  statuses = []
  for fault in KILLS:
    life = faults.run(*COMMAND, tmp_path / "parts", compiled=compiled, fault=fault)
    assert life.status in (-9, 0) and "Traceback" not in life.said, (fault, life.said)
    statuses.append(life.status)
  assert statuses[0] == -9
  last = faults.run(*COMMAND, tmp_path / "parts", compiled=compiled)
  assert last.status == 0, last.said
  expected = faults.results_of(tmp_path / "whole/run")
  found = faults.results_of(tmp_path / "parts/run")
  assert found.keys() == expected.keys()
  assert [name for name in expected if found[name] != expected[name]] == []
  # The one before may be there in parts, since the kill in its removal; the next save removes it.
  assert "2" in os.listdir(tmp_path / "parts/run/checkpoints")
