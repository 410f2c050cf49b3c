"""Memory traffic: what instructions read and write of main memory, those of loops as often as they run."""

import jax
import jax.numpy as jnp
import pytest

from dit_jax.planning.traffic import memory_traffic
from tests.planning.test_collectives import BODY, CONDITION, program

SIZE = 64


def traffic_of(function, *shapes) -> float:
    args = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return memory_traffic(jax.jit(function).lower(*args).compile().as_text())


def test_a_loop_reads_and_writes_as_often_as_it_runs():
    def repeated(length):
        return lambda w, x: jax.lax.scan(lambda x, _: (jnp.tanh(x @ w), None), x, None, length=length)[0]

    few, many = (traffic_of(repeated(n), (SIZE, SIZE), (8, SIZE)) for n in (4, 40))
    assert few > 4 * 4 * SIZE * SIZE  # bytes of w, in each pass
    assert many == pytest.approx(10 * few, rel=0.1)


def test_a_loop_over_stacked_parameters_reads_those_of_each_pass():
    def blocks(ws, x):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), x), x, ws)

    few, many = (traffic_of(blocks, (n, SIZE, SIZE), (8, SIZE)) for n in (4, 40))
    assert few > 4 * 4 * SIZE * SIZE
    assert many == pytest.approx(10 * few, rel=0.2)  # not a hundred times, as if each pass read all


def test_the_loops_of_gradients_and_of_accumulation_count_with_each_pass():
    def gradients(batches, w):
        loss = lambda w, x: (jax.lax.scan(lambda x, _: (jnp.tanh(x @ w), None), x, None, length=4)[0] ** 2).sum()  # noqa: E731
        return jax.lax.scan(lambda total, x: (total + jax.grad(loss)(w, x), None), jnp.zeros_like(w), batches)[0]

    few, many = (traffic_of(gradients, (n, 8, SIZE), (SIZE, SIZE)) for n in (3, 30))
    assert few > 3 * (4 + 4) * 4 * SIZE * SIZE  # forward and backward
    assert many == pytest.approx(10 * few, rel=0.1)


LOOP = "%w = f32[8] while(%p), condition=%condition, body=%body"
FUSED = """%fused (a: f32[9,8], i: s32[], u: f32[1,8]) -> (f32[8], f32[9,8], f32[9,8]) {
  %a = f32[9,8]{1,0} parameter(0)
  %i = s32[] parameter(1)
  %u = f32[1,8]{1,0} parameter(2)
  %s = f32[1,8]{1,0} dynamic-slice(%a, %i, %i), dynamic_slice_sizes={1,8}
  %b = f32[8]{0} bitcast(%s)
  %d = f32[9,8]{1,0} dynamic-update-slice(%a, %u, %i, %i)
  ROOT %t = (f32[8]{0}, f32[9,8]{1,0}, f32[9,8]{1,0}) tuple(%b, %d, %a)
}

"""
ARGUMENTS = ("%a = f32[9,8] parameter(0)", "%i = s32[] parameter(1)", "%u = f32[1,8] parameter(2)")


@pytest.mark.parametrize(
    ("instructions", "moved"),
    [
        (("%a = f32[8,8] parameter(0)", "ROOT %d = f32[8,8]{1,0:T(8,128)} dot(%a, %a), x={}"), 3 * 256),
        # On the chip: S(1); a copy from there writes, one to there reads; the end of it moves nothing.
        (("%a = f32[8,8]{1,0:T(8,128)S(1)} parameter(0)", "ROOT %n = bf16[8,8]{1,0} negate(%a)"), 128),
        (
            (
                "%a = f32[8]{0:T(128)} parameter(0)",
                "%c = (f32[8]{0:T(128)S(1)}, f32[8]{0:T(128)}, u32[]{:S(2)}) copy-start(%a)",
                "ROOT %d = f32[8]{0:T(128)S(1)} copy-done(%c)",
            ),
            32,
        ),
        (
            (
                "%a = f32[9,8]{1,0} parameter(0)",
                "%s = ((f32[9,8]{1,0}), f32[2,8]{1,0:S(1)}, s32[]{:S(2)}) slice-start(%a), slice={[0:2], [0:8]}",
            ),
            64,
        ),
        ((*ARGUMENTS, "ROOT %s = f32[1,8] dynamic-slice(%a, %i, %i), dynamic_slice_sizes={1,8}"), 2 * 32 + 2 * 4),
        ((*ARGUMENTS, "ROOT %s = f32[9,8] dynamic-update-slice(%a, %u, %i, %i)"), 2 * 32 + 2 * 4),
        # Of `a` a row is read and a row replaced; the rest of it is handed on.
        ((*ARGUMENTS, "%f = (f32[8], f32[9,8], f32[9,8]) fusion(%a, %i, %u), kind=kLoop, calls=%fused"), 4 * 32 + 4),
        (('%a = f32[8] custom-call(), custom_call_target="AllocateBuffer"',), 0),
        (("%a = f32[8] parameter(0)", "%t = (f32[8]) tuple(%a)", "%g = f32[8] get-tuple-element(%t), index=0"), 0),
    ],
)  # fmt: skip
def test_an_instruction_moves_its_operands_and_its_result(instructions, moved):
    assert memory_traffic(program(*instructions, computations=FUSED)) == moved


def test_of_branches_the_most_is_counted_and_an_endless_loop_is_an_error():
    body = "%body (b: f32[8]) -> f32[8] {\n  %b = f32[8] parameter(0)\n  ROOT %n = f32[8] negate(%b)\n}\n\n"
    large = body.replace("body", "large").replace("[8]", "[80]")
    branches = program("%c = f32[8] conditional(%i), branch_computations={%body, %large}", computations=body + large)
    assert memory_traffic(branches) == 640
    assert memory_traffic(program(LOOP, computations=CONDITION + body)) == 7 * 64
    endless = CONDITION.replace("constant(7)", "parameter(0)")
    with pytest.raises(ValueError, match="the loop w does not say how often it runs"):
        memory_traffic(program(LOOP, computations=endless + BODY))
