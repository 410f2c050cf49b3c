"""Collectives count as often as they run, and weigh what a device sends; the least is what the maths says."""

import math

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from dit_jax.config import MeshConfig
from dit_jax.parallel.mesh import BATCH_AXES, make_mesh
from dit_jax.planning.collectives import least_bytes, parse_collectives, summarize


def program(*instructions, computations=""):
    lines = "\n".join(f"  {instruction}" for instruction in instructions)
    return f"HloModule jit_f\n\n{computations}\nENTRY %main (p: f32[4]) -> f32[4] {{\n{lines}\n}}\n"


ADD = "to_apply=%add"
ALL_EIGHT = "replica_groups=[1,8]<=[8]"
PART_OF_AN_AXIS = "replica_groups=mesh['a'=4,'b'=2], device_ids=([4,2]T(1,0)) {'a':(2)2}"


@pytest.mark.parametrize(
    ("instruction", "kind", "sent", "asynchronous"),
    [
        ("%a = f32[64,8]{1,0} all-gather(%p), replica_groups=[2,4]<=[8], dimensions={0}", "all-gather", 1536, 0),
        # The layout's parentheses are no operands, and a result in on-chip memory, S(1), is sent like another.
        ("ROOT %a = bf16[64,8]{1,0:T(8,128)(2,1)S(1)} all-gather(%p), replica_groups={{0,1}}", "all-gather", 512, 0),
        (f"%r = (f32[16]{{0}}, /*index=1*/bf16[8]) all-reduce(%p, %q), {ALL_EIGHT}, {ADD}", "all-reduce", 140, 0),
        (f"%r = f32[8]{{0}} reduce-scatter(%p), replica_groups=[2,4]<=[4,2]T(1,0), {ADD}", "reduce-scatter", 96, 0),
        ("%t = bf16[4,2,8]{2,1,0} all-to-all(%p), replica_groups=mesh['a'=4,'b'=2] {'a'}", "all-to-all", 96, 0),
        (f"%t = f32[8]{{0}} all-to-all(%p), {PART_OF_AN_AXIS}", "all-to-all", 16, 0),
        ("%c = f32[8]{0} collective-permute(%p), source_target_pairs={{0,1},{1,0}}", "collective-permute", 32, 0),
        ("%g = (f32[16]{0}, f32[32]{0}) all-gather-start(%p), replica_groups={{0,1}}", "all-gather", 64, 1),
        ("%g = ((f32[2], f32[2]), (f32[4], f32[4])) all-gather-start(%p), replica_groups={{0,1}}", "all-gather", 16, 1),
        (f"%r = f32[16]{{0}} all-reduce-start(%p), replica_groups={{{{0,1}}}}, {ADD}", "all-reduce", 64, 1),
        ("%c = (f32[8], f32[8], u32[]{:S(2)}, u32[]) collective-permute-start(%p)", "collective-permute", 32, 1),
        (f"%r = pred[8]{{0}} all-reduce(%p), replica_groups={{}}, {ADD}", "all-reduce", 14, 0),  # of all eight
    ],
)  # fmt: skip
def test_a_collective_sends_what_a_ring_sends(instruction, kind, sent, asynchronous):
    assert summarize(parse_collectives(program(instruction), 8)) == {
        kind: {"count": 1, "asynchronous": asynchronous, "bytes": sent}
    }


def test_the_end_of_a_collective_and_a_collective_of_one_device_are_not_counted():
    text = program(
        "%s = f32[16]{0} all-reduce-start(%p), replica_groups=[4,2]<=[8]",
        "%d = f32[16]{0} all-reduce-done(%s)",
        "%g = f32[16]{0} all-gather(%p), replica_groups=[8,1]<=[8]",
    )
    assert summarize(parse_collectives(text, 8)) == {"all-reduce": {"count": 1, "asynchronous": 1, "bytes": 64}}


BODY = """%body (b: (s32[], f32[8])) -> (s32[], f32[8]) {
  %g = f32[8]{0} all-gather(%b), replica_groups={{0,1}}
}

"""
CONDITION = """%condition (c: (s32[], f32[8])) -> pred[] {
  %limit = s32[]{:T(128)} constant(7)
  ROOT %lt = pred[] compare(%i, %limit), direction=LT
}

"""


def test_a_collective_in_a_loop_counts_with_each_pass():
    loop = "%w = (s32[], f32[8]) while(%p), condition=%condition, body=%body"
    note = ', backend_config={"known_trip_count":{"n":"3"}}'
    for text, passes in ((loop, 7), (loop + note, 3)):
        (collective,) = parse_collectives(program(text, computations=CONDITION + BODY), 2)
        assert collective.times == passes and collective.sent_bytes == 16
    nested = BODY.replace("%body", "%outer").replace(BODY.splitlines()[1], "  " + loop)
    outer = loop.replace("body=%body", "body=%outer") + note.replace("3", "2")
    (collective,) = parse_collectives(program(outer, computations=CONDITION + BODY + nested), 2)
    assert collective.times == 14


def test_a_loop_that_does_not_say_how_often_it_runs_is_an_error_if_it_has_collectives():
    endless = CONDITION.replace("constant(7)", "parameter(0)")
    loop = "%w = (s32[], f32[8]) while(%p), condition=%condition, body=%body"
    with pytest.raises(ValueError, match="the loop w does not say"):
        parse_collectives(program(loop, computations=endless + BODY), 2)
    assert not parse_collectives(program(loop, computations=endless + BODY.replace("all-gather", "negate")), 2)


def test_a_conditional_counts_with_the_branch_that_sends_most():
    small, large = BODY.replace("%body", "%small"), BODY.replace("%body", "%large").replace("[8]{0}", "[80]{0}")
    for attributes in ("branch_computations={%small, %large}", "true_computation=%large, false_computation=%small"):
        text = program(f"%c = f32[8] conditional(%i, %p, %p), {attributes}", computations=small + large)
        assert summarize(parse_collectives(text, 2)) == {"all-gather": {"count": 1, "asynchronous": 0, "bytes": 160}}


def test_a_chain_of_fusions_on_tpu_is_one_asynchronous_collective():
    def computation(name):
        return BODY.replace("%body", name)

    text = program(
        "%async-collective-start.1 = (f32[4], f32[8], u32[]) fusion(%p), kind=kCustom, calls=%fused_computation.1",
        "%fusion.4 = (f32[4], f32[8], u32[]) fusion(%x), kind=kOutput, calls=%async_collective_fusion.2",
        "%async-collective-done.1 = f32[8] fusion(%x), kind=kCustom, calls=%fused_computation.3",
        computations="".join(
            computation(f"%{name}")
            for name in ("fused_computation.1", "async_collective_fusion.2", "fused_computation.3")
        ),
    )
    assert summarize(parse_collectives(text, 2)) == {"all-gather": {"count": 1, "asynchronous": 1, "bytes": 16}}


def test_a_collective_of_a_sparse_core_is_asynchronous():
    text = program(
        '%g.1.call-start = ((f32[4], token[]), f32[8]) call-start(%p, %t), async_execution_thread="sparsecore", '
        "to_apply=%called_computation.7",
        "%g.1.call-done = f32[8] call-done(%g.1.call-start)",
        computations=BODY.replace("%body", "%called_computation.7"),
    )
    assert summarize(parse_collectives(text, 2)) == {"all-gather": {"count": 1, "asynchronous": 1, "bytes": 16}}


def test_an_all_reduce_and_a_slice_in_one_fusion_on_tpu_are_a_reduce_scatter():
    scatter = """%all-reduce-scatter.1 (i: f32[16]) -> f32[4] {
  %r = f32[16]{0} all-reduce(%i), replica_groups={{0,1,2,3}}, to_apply=%add
  ROOT %s = f32[4]{0} dynamic-slice(%r, %id), dynamic_slice_sizes={4}
}

"""
    text = program("%fusion.9 = f32[4]{0} fusion(%p), kind=kCustom, calls=%all-reduce-scatter.1", computations=scatter)
    assert summarize(parse_collectives(text, 4)) == {"reduce-scatter": {"count": 1, "asynchronous": 0, "bytes": 48}}


def test_the_collectives_of_a_program_of_eight_devices_are_those_it_must_have():
    mesh = make_mesh(MeshConfig(data=4, fsdp=2))
    steps, size = 5, 64

    def loop(w, x):
        def step(x, _):
            x = jnp.tanh(x @ w)
            return x, x.sum()  # over all devices: an all-reduce of one number

        return jax.lax.scan(step, x, None, length=steps)

    args = [
        jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, spec))
        for shape, spec in (
            ((size, size), PartitionSpec(None, "fsdp")),
            ((16, size), PartitionSpec(("data", "fsdp"))),
        )
    ]
    text = jax.jit(loop, out_shardings=NamedSharding(mesh, PartitionSpec())).lower(*args).compile().as_text()
    summary = summarize(parse_collectives(text, 8))
    assert summary["all-reduce"]["count"] == steps
    assert summary["all-reduce"]["bytes"] == steps * 2 * 7 / 8 * 4
    gathered_x = 7 / 8 * 16 * size * 4
    assert summary["all-gather"]["bytes"] in (
        1 / 2 * size * size * 4 + gathered_x,  # w once, before the loop
        steps * 1 / 2 * size * size * 4 + gathered_x,
    )


def split(mesh, spec, shape=(96, 40), dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))


def test_the_least_of_data_parallelism_is_an_all_reduce_of_the_gradients():
    mesh = make_mesh(MeshConfig(data=8, fsdp=1))
    params = {"kernel": split(mesh, PartitionSpec("fsdp")), "bias": split(mesh, PartitionSpec(), (40,))}
    least = least_bytes(params, BATCH_AXES, gathered_itemsize=2)
    assert least == {"all-gather": 0, "reduce-scatter": 0, "all-reduce": 2 * 7 / 8 * 4 * (96 * 40 + 40)}


def test_the_least_of_fsdp_gathers_twice_and_scatters_once_and_sums_its_part_over_data():
    mesh, size = make_mesh(MeshConfig(data=2, fsdp=4)), 96 * 40
    params = {"kernel": split(mesh, PartitionSpec("fsdp", None)), "bias": split(mesh, PartitionSpec(), (40,))}
    for parts in (1, 3):
        assert least_bytes(params, BATCH_AXES, gathered_itemsize=2, num_parts=parts) == pytest.approx(
            {
                "all-gather": parts * 2 * 3 / 4 * 2 * size,
                "reduce-scatter": parts * 3 / 4 * 4 * size,
                "all-reduce": 2 * 1 / 2 * 4 * size / 4 + 2 * 7 / 8 * 4 * 40,
            }
        )


def test_an_axis_that_does_not_split_the_batch_leaves_each_device_its_share():
    mesh = make_mesh(MeshConfig(data=2, fsdp=4))
    params = split(mesh, PartitionSpec("data", "fsdp"))
    least = least_bytes(params, ("data",), gathered_itemsize=4)
    assert least["all-gather"] == 2 * 1 / 2 * 4 * math.prod((96, 40)) / 4 and least["all-reduce"] == 0
