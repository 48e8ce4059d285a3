"""Tests of what a compiled program's text says of bytes and loops, in parts of such texts."""

import importlib.util
import os
import pathlib

import forked
import pytest

from klrl.cost import hlo


def bytes_of(text):
  return hlo.costs(text, {"fsdp": 4}).bytes


def program(parameters, *lines):
  """Returns the computation that runs, of operands that are named p0, p1, and so on."""
  given = [f"  %p{i} = {shape} parameter({i})" for i, shape in enumerate(parameters)]
  return "\n".join(["ENTRY %main () -> () {", *given, *(f"  {line}" for line in lines), "}"])


def fused(name, parameters, *lines):
  return program(parameters, *lines).replace("ENTRY %main", f"%{name}") + "\n\n"


# A collective that is started, passed on by a step of other work, and done: all three have it.
GATHER = "all-gather(%p0), channel_id=7, replica_groups={{0,1,2,3}}, dimensions={0}"
STEPS = (
  fused(
    "starting",
    ["f32[8]{0}"],
    f"%g = f32[32]{{0}} {GATHER}",
    'ROOT %s = (f32[8]{0}, f32[32]{0}) custom-call(%g), custom_call_target="AsyncCollectiveStart"',
  )
  + fused(
    "step",
    ["f32[8]{0}", "f32[32]{0}", "f32[100]{0}"],
    f"%g = f32[32]{{0}} {GATHER}",
    "%n = f32[100]{0} negate(%p2)",
    "ROOT %t = (f32[100]{0}, f32[8]{0}, f32[32]{0}, f32[32]{0}) tuple(%n, %p0, %p1, %g)",
  )
  + fused(
    "ending",
    ["f32[8]{0}", "f32[32]{0}"],
    f"%g = f32[32]{{0}} {GATHER}",
    'ROOT %d = f32[32]{0} custom-call(%p0, %p1, %g), custom_call_target="AsyncCollectiveDone"',
  )
  + program(
    ["f32[8]{0}", "f32[100]{0}"],
    "%a = (f32[8]{0}, f32[32]{0}) fusion(%p0), calls=%starting, "
    "output_to_operand_aliasing={{0}: (0, {})}",
    "%a0 = f32[8]{0} get-tuple-element(%a), index=0",
    "%a1 = f32[32]{0} get-tuple-element(%a), index=1",
    "%b = (f32[100]{0}, f32[8]{0}, f32[32]{0}, f32[32]{0}) fusion(%a0, %a1, %p1), calls=%step, "
    "output_to_operand_aliasing={{1}: (0, {}), {2}: (1, {}), {3}: (1, {})}",
    "%b1 = f32[8]{0} get-tuple-element(%b), index=1",
    "%b2 = f32[32]{0} get-tuple-element(%b), index=2",
    "ROOT %c = f32[32]{0} fusion(%b1, %b2), calls=%ending, "
    "output_to_operand_aliasing={{}: (1, {})}",
  )
)


def test_what_the_steps_of_a_spread_collective_pass_on_is_not_moved_by_them():
  # The start reads 8 numbers and writes 32; the step reads and writes 100 of other work.
  assert bytes_of(STEPS) == 4 * (8 + 32 + 100 + 100)


def test_a_buffer_that_a_step_passes_on_counts_where_the_step_reads_it_too():
  text = STEPS.replace("negate(%p2)", "multiply(%p2, %p1)")
  assert bytes_of(text) == bytes_of(STEPS) + 4 * 32


def test_what_a_fusion_makes_anew_counts_though_it_lies_where_an_operand_lay():
  text = fused("f", ["f32[32]{0}"], "ROOT %n = f32[32]{0} negate(%p0)")
  call = "ROOT %f1 = f32[32]{0} fusion(%p0), calls=%f, output_to_operand_aliasing={{}: (0, {})}"
  assert bytes_of(text + program(["f32[32]{0}"], call)) == 4 * (32 + 32)


SLICE = (
  "ROOT %s = f32[1,16]{1,0} dynamic-slice(%b, %p1, %p1), dynamic_slice_sizes={1,16}",
  ["f32[64,16]{1,0}", "s32[]"],
)


def test_a_fusion_in_a_fusion_reads_of_what_it_slices_the_slice():
  line, parameters = SLICE
  inner = fused("inner", parameters, "%b = f32[64,16]{1,0} bitcast(%p0)", line)
  outer = fused(
    "outer",
    parameters,
    "%b = f32[64,16]{1,0} bitcast(%p0)",
    "%i = f32[1,16]{1,0} fusion(%b, %p1), calls=%inner",
    "ROOT %n = f32[1,16]{1,0} negate(%i)",
  )
  call = "ROOT %f = f32[1,16]{1,0} fusion(%p0, %p1), calls=%outer"
  assert bytes_of(inner + outer + program(parameters, call)) == 4 * (16 + 1 + 16)
  # All of it where the fusion around it looks at all of it.
  whole = outer.replace("negate(%i)", "add(%i, %r)").replace(
    "  ROOT", "  %r = f32[1,16]{1,0} reduce(%b), to_apply=%add\n  ROOT"
  )
  assert bytes_of(inner + whole + program(parameters, call)) == 4 * (64 * 16 + 1 + 16)


def updating(base, root="ROOT %d = f32[64,16]{1,0} dynamic-update-slice(%b, %p1, %p2, %p2)"):
  parameters = ["f32[64,16]{1,0}", "f32[2,16]{1,0}", "s32[]"]
  text = fused("f", parameters, f"%b = f32[64,16]{{1,0}} {base}", root)
  call = "ROOT %c = f32[64,16]{1,0} fusion(%p0, %p1, %p2), calls=%f"
  return text, parameters, call


def test_an_update_in_place_is_all_that_is_written():
  text, parameters, call = updating("bitcast(%p0)")
  assert bytes_of(text + program(parameters, call)) == 4 * (32 + 1 + 32)
  # What is made new around the update is written too.
  text, _, _ = updating("negate(%p0)")
  assert bytes_of(text + program(parameters, call)) == 4 * (64 * 16 + 32 + 1 + 64 * 16)
  # A copy that comes from a faster memory is new.
  text, _, _ = updating("bitcast(%p0)")
  faster = ["f32[64,16]{1,0:S(1)}", *parameters[1:]]
  assert bytes_of(text + program(faster, call)) == 4 * (32 + 1 + 64 * 16)


def test_what_looks_at_an_updated_buffer_reads_it():
  text, parameters, call = updating(
    "bitcast(%p0)",
    "%d = f32[64,16]{1,0} dynamic-update-slice(%b, %p1, %p2, %p2)\n"
    "  %r = f32[16]{0} reduce(%d), to_apply=%add\n"
    "  ROOT %t = (f32[64,16]{1,0}, f32[16]{0}) tuple(%d, %r)",
  )
  call = call.replace("= f32[64,16]{1,0}", "= (f32[64,16]{1,0}, f32[16]{0})")
  assert bytes_of(text + program(parameters, call)) == 4 * (64 * 16 + 32 + 1 + 32 + 16)


def test_a_scatter_moves_what_it_adds_and_not_the_table():
  parameters = ["f32[1000,16]{1,0}", "s32[3]{0}", "f32[3,16]{1,0}"]
  line = "ROOT %s = f32[1000,16]{1,0} scatter(%p0, %p1, %p2), to_apply=%add"
  # Rows of the table are read, added to and written.
  assert bytes_of(program(parameters, line)) == 4 * (3 + 3 * 48)


@pytest.mark.parametrize(
  ("shape", "lines", "moved"),
  [
    # Copies between main memory and a faster one.
    ("f32[9]{0}", ["%c = (f32[9]{0:S(1)}, f32[9]{0}, u32[]{:S(2)}) copy-start(%p0)"], 36),
    (
      "f32[9]{0:S(1)}",
      [
        "%c = (f32[9]{0}, f32[9]{0:S(1)}, u32[]{:S(2)}) copy-start(%p0)",
        "ROOT %d = f32[9]{0} copy-done(%c)",
      ],
      36,
    ),
    ("f32[9]{0}", ["ROOT %c = f32[3]{0:S(1)} slice(%p0), slice={[0:3]}"], 12),
    ("f32[9]{0:S(1)}", ["ROOT %c = f32[3]{0} slice(%p0), slice={[0:3]}"], 12),
    # A start of many kinds has its result in its type, or has not.
    (
      "f32[8]{0}",
      [
        "%s = f32[8]{0} all-reduce-start(%p0), replica_groups={{0,1,2,3}}, to_apply=%add",
        "ROOT %d = f32[8]{0} all-reduce-done(%s)",
      ],
      32 + 32,
    ),
    # Whole tiles are moved: of 8 by 128 where the last axis is the inner one, or the first.
    ("bf16[3,9,64]{2,1,0:T(8,128)(2,1)}", ["%n = f32[1]{0:S(1)} reduce(%p0)"], 3 * 16 * 128 * 2),
    ("bf16[3,9,64]{0,1,2:T(8,128)(2,1)}", ["%n = f32[1]{0:S(1)} reduce(%p0)"], 128 * 16 * 64 * 2),
    # Nothing is written by these.
    ("f32[9]{0}", ['%a = f32[9]{0} custom-call(), custom_call_target="AllocateBuffer"'], 0),
    ("f32[9]{0}", ['%a = f32[9]{0} custom-call(%p0), custom_call_target="ConcatBitcast"'], 0),
    ("f32[9]{0}", ['%a = f32[9]{0} custom-call(%p0), custom_call_target="Work"'], 72),
  ],
)
def test_bytes_are_those_of_main_memory(shape, lines, moved):
  assert bytes_of(program([shape], *lines)) == moved


def test_work_of_another_thread_counts_once_and_for_what_it_is():
  """A TPU gathers rows by other cores, and copies slices, while it computes."""
  parameters = ["f32[1000,16]{1,0}", "s32[3]{0}"]
  rows = "ROOT %g = f32[3,16]{1,0:S(1)} gather(%p0, %p1), slice_sizes={1,16}"
  text = fused("rows", parameters, rows) + program(
    parameters,
    "%a = ((f32[1000,16]{1,0}, s32[3]{0}), f32[3,16]{1,0:S(1)}, u32[]{:S(2)}) "
    "async-start(%p0, %p1), calls=%rows",
    "ROOT %b = f32[3,16]{1,0:S(1)} async-done(%a)",
  )
  assert bytes_of(text) == 4 * (3 * 16 + 3)
  call = 'custom-call(%p0, %p1), custom_call_target="Others", called_computations={%rows}'
  wrapped = text.replace("calls=%rows", "calls=%wrapped")
  wrapped = fused("wrapped", parameters, f"ROOT %w = f32[3,16]{{1,0:S(1)}} {call}") + wrapped
  assert bytes_of(wrapped) == 4 * (3 * 16 + 3)
  # A function of numbers that a call is given is no such work.
  less = fused("rows", ["f32[]", "f32[]"], "ROOT %c = pred[] compare(%p0, %p1), direction=LT")
  line = 'ROOT %k = f32[3]{0} custom-call(%p0), custom_call_target="TopK", '
  assert bytes_of(less + program(["f32[9]{0}"], line + "called_computations={%rows}")) == 4 * 12


LOOP = (
  fused(
    "body",
    ["(s32[], f32[4,4]{1,0})"],
    "%i = s32[] get-tuple-element(%p0), index=0",
    "%x = f32[4,4]{1,0} get-tuple-element(%p0), index=1",
    "%step = s32[] constant(3)",
    "%next = s32[] add(%i, %step)",
    "%y = f32[4,4]{1,0} dot(%x, %x), lhs_contracting_dims={1}, rhs_contracting_dims={0}",
    "ROOT %t = (s32[], f32[4,4]{1,0}) tuple(%next, %y)",
  )
  + fused(
    "condition",
    ["(s32[], f32[4,4]{1,0})"],
    "%i = s32[] get-tuple-element(%p0), index=0",
    "%end = s32[] constant(10)",
    "ROOT %c = pred[] compare(%i, %end), direction=LT",
  )
  + program(
    ["f32[4,4]{1,0}", "s32[]"],
    "%zero = s32[] constant(2)",
    "%start = s32[] copy(%zero)",
    "%t = (s32[], f32[4,4]{1,0}) tuple(%start, %p0)",
    "ROOT %w = (s32[], f32[4,4]{1,0}) while(%t), condition=%condition, body=%body",
  )
)


def test_a_loop_runs_as_often_as_its_counter_is_below_its_bound():
  found = hlo.costs(LOOP, {"fsdp": 4})
  assert (found.flops, found.unknown_loops) == (3 * 2 * 4**3, 0)  # 2, 5 and 8
  for known, unknown in (("copy(%zero)", "copy(%p1)"), ("add(%i, %step)", "add(%i, %i)")):
    assert hlo.costs(LOOP.replace(known, unknown), {"fsdp": 4}).unknown_loops == 1


OF_A_TPU = """
import functools, jax, jax.numpy as jnp
from klrl.cost import ahead, hlo
from klrl.devices import parallel
def costs(fn, rows, shape, layers, topology, size):
  mesh = parallel.make_mesh(f"fsdp={size}", parallel.topology_devices(topology))
  def array(shape, *axes):
    sharding = jax.NamedSharding(mesh, jax.P(*axes))
    return jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=sharding)
  up, down = (array((layers, *x), None, "fsdp") for x in (shape, shape[::-1]))
  lowered = jax.jit(fn).lower(array((size * rows, shape[0]), "fsdp"), up, down)
  return hlo.costs(ahead.optimised(lowered, topology)[0], {"fsdp": size})
def layers(x, up, down):
  @jax.checkpoint
  def layer(x, weights):
    return x + jnp.tanh(x @ weights[0]) @ weights[1], None
  return jax.lax.scan(layer, x, (up, down))[0]
def loss(weights, x):
  return (layers(x, *weights).astype(jnp.float32) ** 2).sum()
forward = costs(layers, 1024, (4096, 4096), 8, "v5e:4x4", 16)
print(forward.flops, forward.collectives["collective-permute", "fsdp"])
gradient = lambda x, *weights: jax.grad(loss)(weights, x)
print(costs(gradient, 512, (4096, 16384), 8, "v5e:8x8", 64).bytes)
"""


@pytest.mark.skipif(not importlib.util.find_spec("libtpu"), reason="needs the compiler for TPUs")
def test_a_layer_of_a_tpu_moves_its_gathered_weights_as_often_as_it_makes_and_reads_them():
  # The compiler for TPUs knows no flags of CPUs.
  environment = {name: x for name, x in os.environ.items() if name != "XLA_FLAGS"}
  root = pathlib.Path(__file__).parents[1]
  status, said = forked.Process(["-c", OF_A_TPU], root, environment).finished()
  assert status == 0, said[-3000:]
  products, moved = said.splitlines()[-2:]
  flops, sent = map(float, products.split())
  # Shards of two matrices are passed on while they are multiplied, in loops of two steps at once.
  assert flops == 8 * 2 * 2 * 1024 * 4096**2
  needed = 8 * 2 * 15 * 2 * 256 * 4096  # Each of 16 shards to 15 others.
  assert needed <= sent <= 1.2 * needed
  # Of each of two matrices: gathered and read forward; gathered and read backward, by the product
  # that is computed anew (of the first alone) and by the gradient of what it multiplied. Its own
  # gradient is made, added up over devices, copied to its place, and all places were cleared.
  matrix = 8 * 4096 * 16384 * 2
  needed = matrix * (2 * (2 + 2 + 1 + 2 + 2 + 1) + 1)
  assert needed < float(moved) < 1.05 * needed
