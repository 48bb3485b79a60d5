"""How variants are built: what cannot run is refused with its limit, names say what changed."""

import dataclasses
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mla_kernels import compiler, tuning
from mla_kernels.tuning import PAIR_ROWS, ROWS, VARIANTS, DecodeTuning, TuningError

OF_64 = VARIANTS[64]


def replaced(of_rows=64, **changes):
    return dataclasses.replace(VARIANTS[of_rows], **changes)


@pytest.mark.parametrize(
    ("rows", "changes", "message"),
    [
        (64, {"rows": 48}, r"rows is 48, must be one of 8, 16, 32, 64"),
        (64, {"score_registers": 164}, r"score_registers is 164, must be a multiple of 8 in \[24, 240\]"),
        (64, {"score_registers": 248}, r"score_registers is 248"),
        (64, {"value_registers": 120}, r"value_registers is 120, must be a multiple of 8 in \[128, 240\]"),
        (64, {"producer_registers": 16}, r"producer_registers is 16, must be a multiple of 8 in \[24, 128\]"),
        (64, {"score_registers": 168}, r"is 520, must be at most 512, .* 512 threads .*: take from one"),
        (
            64,
            {"register_steps": 12},
            r"shared memory is 23\d,\d{3} bytes .* at most 232,448: take fewer group",
        ),
        (64, {"group_slots": 6}, r"shared memory is"),
        (8, {"group_slots": 7}, r"shared memory is"),
        (64, {"rotary_slots": 1}, r"rotary_slots is 1, must be at least 2"),
        (16, {"rotary_slots": 1}, r"rotary_slots is 1, must be at least 2"),
        (64, {"group_slots": 2}, r"group_slots is 2, must be at least 3"),
        (64, {"group_slots": 3, "ahead_boxes": 5}, r"group_slots is 3, must be at least 4"),
        (64, {"ahead_boxes": 0}, r"ahead_boxes is 0, must be in \[1, 8\]"),
        (64, {"ahead_boxes": 9}, r"ahead_boxes is 9"),
        (64, {"register_steps": 36}, r"register_steps is 36, must be in \[1, 35\]"),
        (32, {"ahead_boxes": 1}, r"ahead_boxes is 1, must be 0 for 32 rows"),
        (64, {"item_units": 0}, r"item_units is 0, must be at least 1"),
        (64, {"min_tiles": 0}, r"min_tiles is 0, must be at least 1"),
        (64, {"align_percent": -1}, r"align_percent is -1, must be in \[0, 100\]"),
        (8, {"align_percent": 101}, r"align_percent is 101, must be in \[0, 100\]"),
        (64, {"ahead_boxes": 2.0}, r"ahead_boxes is 2\.0, must be of type int"),
        (64, {"programmatic": 1}, r"programmatic is 1, must be of type bool"),
        (128, {"value_registers": 248}, r"value_registers is 248, must be a multiple of 8 in \[168, 240\]"),
        (128, {"producer_registers": 32}, r"is 512, must be at most 504, .* 384 threads .*: take from one"),
        (128, {"score_registers": 160}, r"score_registers is 160, must be 0 for 128 rows"),
        (128, {"group_slots": 3}, r"rotary_slots is 4, must be group_slots"),
        (128, {"group_slots": 2, "rotary_slots": 2}, r"group_slots is 2, must be at least 3"),
        (128, {"register_steps": 0}, r"register_steps is 0, must be 4, 8 or 12"),
        (128, {"group_slots": 5, "rotary_slots": 5}, r"shared memory is"),
    ],
)
def test_what_cannot_run_is_refused(rows, changes, message):
    with pytest.raises(TuningError, match=message):
        replaced(rows, **changes)


values = st.fixed_dictionaries(
    {
        "rows": st.sampled_from([*ROWS, 24]),
        "group_slots": st.integers(0, 8),
        "rotary_slots": st.integers(0, 6),
        "value_registers": st.integers(14, 32).map(lambda n: 8 * n) | st.integers(0, 300),
        "score_registers": st.integers(2, 32).map(lambda n: 8 * n) | st.integers(0, 300),
        "producer_registers": st.integers(2, 17).map(lambda n: 8 * n) | st.integers(0, 300),
        "item_units": st.integers(-1, 9),
        "min_tiles": st.integers(-1, 9),
        "align_percent": st.integers(-10, 120),
        "register_steps": st.integers(-1, 40),
        "ahead_boxes": st.integers(-1, 10),
        "programmatic": st.booleans(),
    }
)


@given(values)
def test_a_tuning_is_within_every_limit_or_refused_in_words(fields):
    try:
        made = DecodeTuning(**fields)
    except TuningError as error:
        assert "must be" in str(error) and ": " in str(error)
        return
    registers = (made.value_registers, made.value_registers, made.score_registers, made.producer_registers)
    assert all(r % 8 == 0 and 24 <= r <= 240 for r in registers)
    assert sum(registers) * 128 <= 65536 and made.value_registers >= 128 >= made.producer_registers
    assert sum(size for _, size in made.shared_plan()) == made.shared_bytes <= 227 * 1024
    assert all(size > 0 for _, size in made.shared_plan())
    assert made.group_slots >= 3 and made.rotary_slots >= 2 and made.item_units >= 1
    assert made.min_tiles >= 1 and 0 <= made.align_percent <= 100
    assert DecodeTuning.parse(",".join(filter(None, (f"rows={made.rows}", made.changes())))) == made


@given(values, st.sampled_from(["group_slots", "rotary_slots"]))
def test_more_slots_take_more_memory(fields, name):
    try:
        less = DecodeTuning(**fields)
        more = dataclasses.replace(less, **{name: getattr(less, name) + 1})
    except TuningError:
        return
    assert more.shared_bytes >= less.shared_bytes + tuning.BOX_BYTES


OTHERS = [(rows, {"rotary_slots": 4, "group_slots": 4}) for rows in ROWS]
OTHERS.append((PAIR_ROWS, {"register_steps": 8}))


@pytest.mark.parametrize(("rows", "changes"), [*((rows, {}) for rows in VARIANTS), *OTHERS])
def test_the_plan_of_shared_memory_is_the_kernels(rows, changes):
    """The compiler's sizeof(SharedMemory), which it names in an error, is what the plan adds up to."""
    from cuda.bindings import nvrtc

    made = replaced(rows, **changes)
    config = made.kernel_config("bf16")
    code = f'#include "{config.source}"\ntemplate <int> struct Is;\nIs<sizeof(SharedMemory)> is;\n'
    options = [*compiler.compile_options(config), f"-I{compiler.CUDA_DIR}"]
    _, program = nvrtc.nvrtcCreateProgram(code.encode(), b"size.cu", 0, [], [])
    nvrtc.nvrtcCompileProgram(program, len(options), [option.encode() for option in options])
    log = b" " * nvrtc.nvrtcGetProgramLogSize(program)[1]
    nvrtc.nvrtcGetProgramLog(program, log)
    sizes = set(re.findall(r"Is<(\d+)", log.decode()))
    assert sizes == {str(made.shared_bytes)}, f"tuning.shared_plan is not SharedMemory: {log.decode()[:600]}"


@pytest.mark.parametrize("rows", VARIANTS)
def test_macros_name_every_choice_that_a_cubin_has(rows):
    made = VARIANTS[rows]
    macros = dict(made.kernel_config("bf16").defines)
    for field in dataclasses.fields(DecodeTuning):
        if field.name != "programmatic":
            assert macros[f"MLA_{field.name.upper()}"] == getattr(made, field.name)


def test_names_of_cubins_tell_variants_apart():
    variants = [OF_64, replaced(ahead_boxes=1), replaced(ahead_boxes=1, item_units=1), VARIANTS[8]]
    names = {v.kernel_config(e, w).name for v in variants for e in ("bf16", "fp16") for w in tuning.WORK}
    assert len(names) == len(variants) * 2 * 4
    assert OF_64.kernel_config("bf16").name == "decode_rows-bf16-64"
    assert variants[1].kernel_config("fp16", "mma").name == "decode_rows-fp16-64-mma+ahead_boxes=1"


def test_programmatic_launch_is_the_same_cubin_launched_otherwise():
    plain, other = (replaced(programmatic=p).kernel_config("bf16") for p in (True, False))
    assert dataclasses.replace(other, programmatic=True) == plain != other


def test_a_name_says_what_changed():
    made = replaced(ahead_boxes=1, programmatic=False)
    assert made.changes() == "ahead_boxes=1,programmatic=0"
    assert DecodeTuning.parse("rows=64,ahead_boxes=1,programmatic=0") == made
    assert replaced(min_tiles=2, align_percent=0).changes() == "min_tiles=2,align_percent=0"
    assert OF_64.changes() == "" and DecodeTuning.parse("rows=64") == OF_64


@pytest.mark.parametrize(
    "text",
    ["", "rows", "ahead_boxes=1", "rows=64,boxes=1", "rows=64,ahead_boxes=x", "rows=64,rows=8", "rows=7"],
)
def test_a_wrong_name_is_refused(text):
    with pytest.raises(TuningError):
        DecodeTuning.parse(text)


def test_what_ships_has_every_number_of_rows():
    assert {rows: made.rows for rows, made in VARIANTS.items()} == {n: n for n in (*ROWS, PAIR_ROWS)}


@pytest.mark.parametrize("tuning", VARIANTS.values(), ids=lambda tuning: f"{tuning.rows} rows")
def test_parts_of_all_ctas_have_room_in_what_ships(tuning):
    assert tuning.most_parts >= 132


def test_a_short_ring_merges_fewer_parts():
    """Else a merge would take no unit at a time, and never end."""
    short = replaced(group_slots=4)
    slice_bytes = 2 * 512 + 32 * 12 + 8 * 4  # a unit of each half, the stats of two warps' rows, scales
    ring = (4 * 4 + short.rotary_slots) * tuning.BOX_BYTES
    assert short.most_parts * slice_bytes <= ring < (short.most_parts + 1) * slice_bytes
    assert short.most_parts < 132


@pytest.mark.parametrize("vectors", [1, 2], ids=["fp32", "fp16"])
@pytest.mark.parametrize("rows", VARIANTS)
@pytest.mark.parametrize("groups", [3, 4, 5, 6])
@pytest.mark.parametrize("rotary", [2, 3, 4])
def test_a_unit_of_every_part_has_room(rows, groups, rotary, vectors):
    """``Merge`` of cuda/merge.cuh: else it would take no unit at a time. fp16 elements have parts in fp32."""
    slots = {"group_slots": groups, "rotary_slots": groups if rows == PAIR_ROWS else rotary}
    try:
        made = replaced(rows, **slots)
    except TuningError:
        return  # it is none
    runs, own_warps = (2, 4) if rows == 64 else (1, 8)
    warp_units, warp_rows = min(rows, 64) // 2 // vectors, rows if rows < 64 else 16
    units = warp_units * own_warps
    (_, values), (_, rotary_bytes), *_ = made.shared_plan()
    scales = 8 * 4
    for parts in range(2, min(132 // made.cluster_ctas, made.most_parts) + 1):
        for slices in (parts - 1, parts):
            for part in range(slices):
                begin, end = units * part // slices, units * (part + 1) // slices
                touched = (end - 1) // warp_units - begin // warp_units + 1 if rows >= 64 else 1
                room = values + rotary_bytes - parts * (touched * warp_rows * 12 + scales)
                assert begin == end or room >= parts * runs * 512, (parts, slices)


def test_each_page_size_has_its_way_into_tiles():
    ways = {size: tuning.pages_of(size, ragged=False) for size in tuning.PAGE_SIZES}
    assert ways[64] == "tiles" and ways[128] == "tiles128" and ways[256] == "tiles256"
    assert {ways[size] for size in (8, 16, 32)} == {"pieces"} and {ways[s] for s in (1, 2, 4)} == {"tokens"}
    assert {tuning.pages_of(size, ragged=True) for size in tuning.PAGE_SIZES} == {"pieces", "tokens"}


def test_pairs_take_pages_that_are_tiles_alone():
    pair = VARIANTS[PAIR_ROWS]
    assert [pages for pages in tuning.PAGES if pair.serves(pages)] == ["tiles", "tiles128", "tiles256"]
    with pytest.raises(TuningError, match="rows for pages in pieces is 128, must be at most 64"):
        pair.kernel_config("bf16", pages="pieces")


@pytest.mark.parametrize("rows", ROWS)
def test_loaders_of_small_pages_get_registers_and_the_ring_still_fits(rows):
    shipped = VARIANTS[rows]
    assert shipped.for_pages("tiles") is shipped is shipped.for_pages("tiles256")
    for pages in ("pieces", "tokens"):
        made = shipped.for_pages(pages)  # checks itself
        assert made.producer_registers >= tuning.loader_registers(pages, rows) > 32
        macros = dict(shipped.kernel_config("bf16", pages=pages).defines)
        assert macros["MLA_PAGE_SIZE"] == tuning.PAGES[pages]
        assert macros["MLA_GROUP_SLOTS"] == made.group_slots
