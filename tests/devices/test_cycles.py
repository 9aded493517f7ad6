"""The compiler's estimates, read from a program's text that has one of everything."""

import re

import pytest

from world_distill.devices import cycles

# A loop of 40 turns with a product, a kernel and a sum that is scattered; around it a copy, a gather that two passes
# over values hide, and a reduction.
PROGRAM = """\
HloModule jit_step, is_scheduled=true

FileNames
1 "/somewhere/world_distill/models/layers.py"
2 "/elsewhere/jax/numpy.py"

FunctionNames
1 "Linear.__call__"

FileLocations
1 {file_name_id=1 function_name_id=1 line=40 end_line=40 column=1 end_column=9}
2 {file_name_id=2 function_name_id=1 line=7 end_line=7 column=1 end_column=9}

StackFrames
1 {file_location_id=1 parent_frame_id=1}
2 {file_location_id=2 parent_frame_id=1}

%product (p0: bf16[8,4], p1: bf16[4,4]) -> bf16[8,4] {
  %p0 = bf16[8,4]{1,0} parameter(0)
  %p1 = bf16[4,4]{1,0} parameter(1)
  ROOT %convolution.1 = bf16[8,4]{1,0} convolution(%p0, %p1), dim_labels=bf_io->bf
}

%values (p0: bf16[8,4]) -> bf16[8,4] {
  %p0.1 = bf16[8,4]{1,0} parameter(0)
  ROOT %tanh.1 = bf16[8,4]{1,0} tanh(%p0.1)
}

%sums (p0: bf16[8,4]) -> f32[8] {
  %p0.2 = bf16[8,4]{1,0} parameter(0)
  ROOT %reduce.1 = f32[8]{0} reduce(%p0.2), dimensions={1}
}

%moved (p0: bf16[8,4]) -> bf16[4,8] {
  %p0.3 = bf16[8,4]{1,0} parameter(0)
  %slice.1 = bf16[8,4]{1,0} slice(%p0.3), slice={[0:8], [0:4]}
  ROOT %transpose.1 = bf16[4,8]{1,0} transpose(%slice.1), dimensions={1,0}
}

%all-reduce-scatter.1 (input: bf16[1024,4]) -> bf16[256,4] {
  %input = bf16[1024,4]{1,0} parameter(0)
  %all-reduce.9 = bf16[1024,4]{1,0} all-reduce(%input), channel_id=2, replica_groups={{0,1,2,3}}, to_apply=%add
  ROOT %dynamic-slice.9 = bf16[256,4]{1,0} dynamic-slice(%all-reduce.9), dynamic_slice_sizes={256,4}
}

%condition (arg: (s32[], bf16[8,4])) -> pred[] {
  %arg.1 = (s32[], bf16[8,4]{1,0}) parameter(0)
  %constant.1 = s32[]{:T(128)} constant(40)
  %count.1 = s32[] get-tuple-element(%arg.1), index=0
  ROOT %compare.1 = pred[] compare(%count.1, %constant.1), direction=LT
}

%body (arg: (s32[], bf16[8,4])) -> (s32[], bf16[8,4]) {
  %arg.2 = (s32[], bf16[8,4]{1,0}) parameter(0)
  %x.1 = bf16[8,4]{1,0} get-tuple-element(%arg.2), index=1
  %fusion.1 = bf16[8,4]{1,0} fusion(%x.1, %x.1), kind=kOutput, calls=%product, \
metadata={op_name="a" stack_frame_id=2}, backend_config={"window_config":{"estimated_cycles":"500"}}
  %splash.3 = (f32[8,4]{1,0}, bf16[8,4]{1,0}) custom-call(%fusion.1), custom_call_target="tpu_custom_call", \
frontend_attributes={kernel_metadata={
  "words": 1
}}, metadata={op_name="k"}
  %scattered.1 = bf16[256,4]{1,0} fusion(%fusion.1), kind=kCustom, calls=%all-reduce-scatter.1
  ROOT %tuple.1 = (s32[], bf16[8,4]{1,0}) tuple(%arg.2, %fusion.1)
}

ENTRY %main (p: bf16[8,4]) -> f32[8] {
  %p.9 = bf16[8,4]{1,0} parameter(0)
  %all-gather-start.1 = (bf16[100,4]{1,0}, bf16[400,4]{1,0}) all-gather-start(%p.9), channel_id=1, \
replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_1'}, dimensions={0}
  %fusion.2 = bf16[8,4]{1,0} fusion(%p.9), kind=kLoop, calls=%values, backend_config={"estimated_cycles":"70"}
  %fusion.3 = bf16[8,4]{1,0} fusion(%fusion.2), kind=kLoop, calls=%values, backend_config={"estimated_cycles":"30"}
  %all-gather-done.1 = bf16[400,4]{1,0} all-gather-done(%all-gather-start.1)
  %while.1 = (s32[]{:T(128)}, /*index=1*/bf16[8,4]{1,0}) while(%p.9), condition=%condition, body=%body
  %y.1 = bf16[8,4]{1,0} get-tuple-element(%while.1), index=1
  %copy.1 = bf16[8,4]{0,1} copy(%y.1), backend_config={"estimated_cycles":"11"}
  %fusion.4 = bf16[4,8]{1,0} fusion(%copy.1), kind=kLoop, calls=%moved, backend_config={"estimated_cycles":"9"}
  ROOT %fusion.5 = f32[8]{0} fusion(%copy.1), kind=kLoop, calls=%sums, backend_config={"estimated_cycles":"5"}
}
"""


@pytest.fixture(scope="module")
def found():
    return cycles.estimate(PROGRAM)


def test_loops_count_as_often_as_they_turn_and_each_cycle_is_of_a_kind(found):
    assert found.cycles == {"products": 40 * 500, "layouts": 11 + 9, "reductions": 5, "elementwise": 70 + 30}
    assert found.total == sum(found.cycles.values()) and found.endless == 0
    assert found.kernels == {"splash": 40}


def test_the_most_expensive_come_first_with_the_line_that_made_them(found):
    first, second = found.largest(2)
    assert (first.cycles, first.runs, first.kind) == (20_000, 40, "products")
    assert first.source == "world_distill/models/layers.py:40"  # not the line of JAX that it called
    assert first.what == "fusion bf16[8,4]"
    assert (second.cycles, second.runs, second.source) == (100, 2, "")  # both passes over values


def test_a_collective_sends_what_a_ring_of_its_chips_sends(found):
    gather, scatter = found.collectives
    assert (gather.kind, gather.runs, gather.sent) == ("all-gather", 1, 400 * 4 * 2 * 3 / 4)
    assert (scatter.kind, scatter.runs, scatter.sent) == ("reduce-scatter", 40, 1024 * 4 * 2 * 3 / 4)


def test_chips_wait_for_what_no_other_work_hides(found):
    gather, scatter = found.collectives
    assert (gather.hidden, scatter.hidden) == (100, 0)
    # 2400 bytes at 100 a second take 24 s, of which 100 cycles at 10 a second hide 10.
    assert found.waiting(hertz=10.0, bandwidth=100.0) == pytest.approx(24 - 10 + 40 * 6144 / 100)
    assert found.waiting(hertz=1.0, bandwidth=100.0) == pytest.approx(40 * 6144 / 100)


@pytest.mark.parametrize(
    "text, ways",
    [
        ("{{0,4},{1,5}}", 2), ("[2,8]<=[16]", 8), ("mesh['a'=2,'b'=4,'c'=2] {'a','c'}", 4),
        ("mesh['a'=64,'b'=1,'c'=4], device_ids=([4,64]T(1,0)) {'a'}", 64),
    ],
)  # fmt: skip
def test_groups_of_chips_are_read_in_each_form(text, ways):
    program = PROGRAM.replace("mesh['axis_0'=2,'axis_1'=4] {'axis_1'}", text)
    found = cycles.estimate(program)
    assert found.collectives[0].sent == 400 * 4 * 2 * (ways - 1) / ways and not found.unread


def test_groups_in_another_form_are_counted():
    found = cycles.estimate(PROGRAM.replace("mesh['axis_0'=2,'axis_1'=4] {'axis_1'}", "tiled<9>"))
    assert found.unread == 1 and found.collectives[0].sent == 0


def test_one_that_is_sent_beside_products_counts_once_and_they_hide_it():
    """Its start, a product that goes on with it, and its end are fusions of one channel. Another has its own."""

    def gather(name, body, channel):
        return f"""
%{name} (p: bf16[8,4]) -> bf16[8,4] {{
  %q = bf16[8,4]{{1,0}} parameter(0)
{body}  %all-gather.7 = bf16[400,4]{{1,0}} all-gather(%q), channel_id={channel}, replica_groups={{{{0,1,2,3}}}}
}}
"""

    inside = "  %convolution.7 = bf16[8,4]{1,0} convolution(%q, %q), dim_labels=bf_io->bf\n"
    parts = gather("start", "", 9) + gather("part", inside, 9) + gather("end", "", 9) + gather("other", "", 10)
    entry = """
ENTRY %main (p: bf16[8,4]) -> bf16[8,4] {
  %p.1 = bf16[8,4]{1,0} parameter(0)
  %async-collective-start.1 = bf16[400,4]{1,0} fusion(%p.1), kind=kCustom, calls=%start
  %fusion.1 = bf16[8,4]{1,0} fusion(%p.1), kind=kOutput, calls=%part, backend_config={"estimated_cycles":"300"}
  %async-collective-done.1 = bf16[400,4]{1,0} fusion(%p.1), kind=kCustom, calls=%end
  ROOT %async-collective-start.2 = bf16[400,4]{1,0} fusion(%p.1), kind=kCustom, calls=%other
}
"""
    found = cycles.estimate("HloModule jit_f\n" + parts + entry)
    assert [(one.sent, one.hidden) for one in found.collectives] == [(2400, 300), (2400, 0)]
    assert found.cycles["products"] == 300


def test_what_the_compiler_does_not_know_counts_as_none():
    number = re.search(r'"estimated_cycles":"(\d+)"', PROGRAM)
    found = cycles.estimate(PROGRAM.replace(number[0], f'"estimated_cycles":"{2**63 - 1}"', 1))
    assert found.unknown == 1 and 0 < found.total < cycles.estimate(PROGRAM).total


def test_programs_of_other_platforms_have_no_estimate():
    assert cycles.estimate("HloModule jit_f\n\nENTRY %main (p: f32[2]) -> f32[2] {\n}\n").total == 0
    assert cycles.estimate("").total == 0
