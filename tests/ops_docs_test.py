"""Every public op has its types, an example that runs, and a place in the overview."""

import doctest
import inspect
import re

import jax
import jax.numpy as jnp
import pytest

from klrl import ops

OPS = {
  name: op
  for name, op in vars(ops).items()
  if callable(op) and op.__module__.startswith("klrl.ops")
}


NUMBER = r"-?\d+\.?\d*(?:e[-+]\d+)?"


class _Rounded(doctest.OutputChecker):
  """Takes an output for what is wanted if its numbers are, to the three digits that are shown."""

  def check_output(self, want, got, _):
    texts = [re.sub(r"\s", "", re.sub(NUMBER, "#", text)) for text in (want, got)]
    numbers = [[float(number) for number in re.findall(NUMBER, text)] for text in (want, got)]
    return texts[0] == texts[1] and numbers[1] == pytest.approx(numbers[0], rel=1e-3, abs=5.1e-4)


@pytest.mark.parametrize("name", OPS)
def test_an_op_has_an_example_and_it_runs(name):
  globs = {"jax": jax, "jnp": jnp, "ops": ops}
  example = doctest.DocTestParser().get_doctest(OPS[name].__doc__, globs, name, None, None)
  assert example.examples, f"klrl.ops.{name} has no example: two to six lines, with a number"
  report = []
  runner = doctest.DocTestRunner(_Rounded())
  assert not runner.run(example, out=report.append).failed, "".join(report)


@pytest.mark.parametrize("name", [name for name in OPS if not inspect.isclass(OPS[name])])
def test_an_op_is_typed(name):
  signature = inspect.signature(OPS[name])
  types = [parameter.annotation for parameter in signature.parameters.values()]
  assert inspect.Parameter.empty not in [*types, signature.return_annotation]


def test_help_of_the_package_lists_every_op():
  assert set(OPS) <= set(re.findall(r"\w+", ops.__doc__))
