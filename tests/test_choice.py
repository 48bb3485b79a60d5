"""Which variant serves which call: shares against the schedule's walk, choices against measured times."""

import dataclasses
import json
import math
import statistics

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mla_kernels import choice, decode, plan
from mla_kernels.choice import SHIPPED, Cost, Share, TuningTable, group_size
from mla_kernels.tuning import PAGES, PAIR_ROWS, ROWS, VARIANTS, TuningError
from tests.measured_calls import MEASURED

COST = Cost(5.0, 1.0, 3.0)
ALL_ROWS = (*ROWS, PAIR_ROWS)
SMS = 132


@pytest.mark.parametrize(
    ("row_blocks", "group"),
    [(1, 1), (2, 2), (3, 3), (4, 4), (5, 1), (6, 6), (8, 4), (16, 4), (13, 1)],
)
def test_row_blocks_side_by_side(row_blocks, group):
    """132 SMs: 2, 3, 4 and 6 abreast keep all of them busy, 5 would leave two idle and 8 four."""
    assert group_size(row_blocks, SMS) == group


@given(st.integers(1, 300), st.integers(1, 144))
def test_a_group_is_of_row_blocks_that_fit(row_blocks, ctas):
    assert 1 <= group_size(row_blocks, ctas) <= min(row_blocks, ctas, 8)


@pytest.mark.parametrize(
    ("rows", "shape", "share"),
    [
        # (query rows, b, tiles). One item, 132 SMs: a tile each.
        (16, (16, 1, 16), Share(1, True)),
        (16, (16, 1, 200), Share(2, True)),
        (16, (16, 1, 1), Share(1, False)),
        # 4 items: 33 SMs each, so 2 tiles each.
        (32, (32, 4, 64), Share(2, True)),
        # 64 items: two SMs each, four stay idle.
        (16, (16, 64, 16), Share(8, True)),
        # Two row blocks abreast: 66 pairs of SMs for 64 items, which stay whole; 66 fill them exactly.
        (8, (16, 64, 16), Share(16, False)),
        (8, (16, 66, 16), Share(16, False)),
        # 67 whole ones would take a pair twice as long, so they are cut: 67 * (16 + 1) / 66 units.
        (8, (16, 67, 16), Share(18, True)),
        # 128 items of 64 rows and 2 blocks: two each, with what the second costs besides its tiles.
        (64, (128, 128, 16), Share(16 + 3 + 16, False)),
        # As many items as SMs; twice as many.
        (8, (8, 132, 64), Share(64, False)),
        (8, (8, 264, 64), Share(64 + 1 + 64, False)),
        # Nothing to read.
        (8, (8, 1, 0), Share(0, False)),
    ],
)
def test_a_share_by_hand(rows, shape, share):
    assert Share.of(VARIANTS[rows], *shape, SMS) == share


@pytest.mark.parametrize(("percent", "share"), [(1, Share(62, True)), (2, Share(64, False))])
def test_alignment_takes_no_more_than_its_percent(percent, share):
    """124 items, 132 SMs: whole they are 64 tiles, and 124 * 65 / 132, rounded up twice, 63: 1.6 % more."""
    tuning = dataclasses.replace(VARIANTS[8], align_percent=percent)
    assert Share.of(tuning, 8, 124, 64, SMS) == share


def walk(tuning, query_rows, b, tiles, ctas):
    """The line of work laid out unit by unit and cut, as ``WorkRange`` of cuda/schedule.cuh does."""
    blocks = -(-query_rows // tuning.rows)
    group = group_size(blocks, ctas)
    groups, items, units = ctas // group, b * -(-blocks // group), tuning.item_units
    share = max(-(-items * (tiles + units) // groups), tuning.min_tiles)
    parts = max(min(groups // items, tiles // tuning.min_tiles), 1)
    even = -(-items // groups) * (tiles + units) if items >= groups else -(-tiles // parts)
    if even * 100 <= (share + 1) * (100 + tuning.align_percent):
        share = even
        units = units if items >= groups else parts * share - tiles
    held, split = [0] * groups, False
    for item in range(items):
        first = item * (tiles + units) + units
        holders = [unit // share for unit in range(first, first + tiles)]
        split |= holders[0] != holders[-1]
        for holder in holders:
            held[holder] += 1
    return Share(max(held), split)


tunings = st.builds(
    lambda rows, units, percent: dataclasses.replace(VARIANTS[rows], item_units=units, align_percent=percent),
    st.sampled_from(ROWS),
    st.integers(1, 6),
    st.integers(0, 30),
)
shapes = st.tuples(
    st.sampled_from([1, 8, 16, 24, 64, 128, 200, 256]),
    st.integers(1, 150),
    st.integers(1, 80),
    st.sampled_from([132, 114, 78, 7]),
)


def compare_with_the_schedule(tuning, shape):
    """What items cost besides their tiles may be counted as tiles, for each that a share touches."""
    share, walked = Share.of(tuning, *shape), walk(tuning, *shape)
    touched = share.tiles // (shape[2] + tuning.item_units) + 2
    assert walked.tiles <= share.tiles <= walked.tiles + tuning.item_units * touched
    assert share.split >= walked.split


@given(tunings, shapes)
def test_a_share_is_what_the_schedule_gives_the_busiest(tuning, shape):
    compare_with_the_schedule(tuning, shape)


@given(tunings, shapes, st.integers(2, 6))
def test_a_share_has_the_least_tiles(tuning, shape, least):
    compare_with_the_schedule(dataclasses.replace(tuning, min_tiles=least), shape)


def counts(tuning, query_rows, b, ctas):
    """(groups of CTAs, items)"""
    blocks = -(-query_rows // tuning.rows)
    group = group_size(blocks, ctas)
    return ctas // group, b * -(-blocks // group)


@given(tunings, shapes)
def test_shares_hold_all_tiles_and_not_many_more(tuning, shape):
    query_rows, b, tiles, ctas = shape
    share, (groups, items) = Share.of(tuning, *shape), counts(tuning, query_rows, b, ctas)
    assert share.tiles * groups >= items * tiles
    fair = items * (tiles + tuning.item_units) / groups
    assert share.tiles <= (fair + 2) * (1 + tuning.align_percent / 100)
    assert share.tiles >= tiles or share.split


@given(tunings, shapes, st.integers(1, 4))
def test_what_comes_out_even_is_not_split(tuning, shape, each):
    query_rows, _, tiles, ctas = shape
    groups, items = counts(tuning, query_rows, 1, ctas)
    even = Share.of(tuning, query_rows, groups * each, tiles, ctas)
    assert even == Share(each * items * (tiles + tuning.item_units) - tuning.item_units, False)
    assert not Share.of(tuning, query_rows, 1, 1, ctas).split or items > groups


@given(tunings, shapes)
def test_twice_the_tiles_are_no_smaller_share(tuning, shape):
    query_rows, b, tiles, ctas = shape
    assert Share.of(tuning, query_rows, b, 2 * tiles, ctas).tiles >= Share.of(tuning, *shape).tiles


def test_what_a_cost_expects():
    assert COST.expected_us(Share(16, False), 0) == pytest.approx(5 + 16)
    assert COST.expected_us(Share(16, True), 0) == pytest.approx(5 + 3 + 16)
    # HBM alone: 1,000 pages of 73,728 bytes at 3.05 TB/s are 24.2 us.
    assert COST.expected_us(Share(0, False), 1000) == pytest.approx(5 + 24.2, rel=0.01)
    both = COST.expected_us(Share(16, False), round(16 / choice.PAGE_US))
    assert both == pytest.approx(5 + 16 * 2**0.25, rel=1e-3)


@pytest.mark.parametrize("field", ["start_us", "tile_us", "merge_us"])
@pytest.mark.parametrize("value", [0, -1.0, 1e7, float("nan"), "1", None, True])
def test_a_cost_that_is_none_is_refused(field, value):
    with pytest.raises(TuningError, match=f"{field} is .*, must be a positive number of microseconds: meas"):
        dataclasses.replace(COST, **{field: value})


@pytest.mark.parametrize("shape", MEASURED)
def test_what_is_chosen_is_nearly_the_fastest(shape):
    h_q, b, kv = shape
    rows = SHIPPED.serving(h_q, b, kv // 64).rows
    assert MEASURED[shape][rows] <= 1.08 * min(MEASURED[shape].values()), rows


@pytest.mark.parametrize(("spare_pages", "mean_loss"), [(0, 0.005), (4, 0.02)])
def test_what_is_chosen_is_the_fastest_nearly_everywhere(spare_pages, mean_loss):
    """Also where the page table has a few pages more than the lengths need."""
    losses = []
    for (h_q, b, kv), times in MEASURED.items():
        rows = SHIPPED.serving(h_q, b, kv // 64 + spare_pages).rows
        losses.append(times[rows] / min(times.values()) - 1)
    assert statistics.mean(losses) <= mean_loss


@pytest.mark.parametrize("shape", MEASURED)
def test_the_model_is_near_what_was_measured(shape):
    """Within a quarter, of what comes near the fastest: further off, another would be chosen elsewhere."""
    (h_q, b, kv), times = shape, MEASURED[shape]
    for cost, tuning in SHIPPED.entries:
        if times.get(tuning.rows, math.inf) <= 1.2 * min(times.values()):
            expected = cost.expected_us(Share.of(tuning, h_q, b, kv // 64, SMS), b * kv // 64)
            assert expected == pytest.approx(times[tuning.rows], rel=0.25), tuning.rows


def test_little_work_gets_few_rows_and_much_gets_many():
    assert SHIPPED.serving(128, 1, 16).rows <= 16
    assert SHIPPED.serving(128, 128, 256).rows == 128
    assert SHIPPED.serving(64, 128, 256).rows == 64
    assert SHIPPED.serving(8, 1, 16).rows == SHIPPED.serving(8, 128, 256).rows == 8


@given(st.integers(1, 2000))
def test_with_much_work_a_block_takes_as_many_rows_as_there_are(query_rows):
    """Past 128, in blocks of 128 or of 64, which fill the last one better."""
    served = SHIPPED.serving_many(query_rows).rows
    assert served in [n for n in ALL_ROWS if query_rows <= n][:1] or (query_rows > 128 and served >= 64)


def test_past_128_rows_blocks_of_64_serve_where_they_waste_less():
    served = {n: SHIPPED.serving_many(n).rows for n in (65, 128, 160, 200, 256, 320)}
    assert served == {65: 128, 128: 128, 160: 64, 200: 128, 256: 128, 320: 64}


@given(st.integers(1, 600), st.integers(1, 300), st.integers(0, 3000), st.integers(1, 132))
def test_every_call_is_served_by_the_cheapest(query_rows, b, pages, ctas):
    chosen = SHIPPED.serving(query_rows, b, pages, ctas)
    expected = {
        tuning: cost.expected_us(Share.of(tuning, query_rows, b, pages, ctas), b * pages)
        for cost, tuning in SHIPPED.entries
        if tuning.cluster_ctas <= ctas
    }
    assert expected[chosen] == min(expected.values())


@pytest.mark.parametrize("rows", [(), (8, 8), (16, 8), (8, 64, 32), (64, 64)])
def test_a_table_whose_rows_do_not_ascend_is_refused(rows):
    with pytest.raises(TuningError, match=r"rows of a table are \[.*\], must ascend: give each variant once"):
        TuningTable(tuple((COST, VARIANTS[n]) for n in rows))


def test_a_table_of_pairs_alone_is_refused():
    """Pages under 64 tokens and ragged queries would find no variant."""
    with pytest.raises(TuningError, match=r"rows of a table are \[128\], must be 64 or less in one"):
        TuningTable(((COST, VARIANTS[128]),))


def test_pairs_serve_pages_that_are_tiles_where_a_table_has_them():
    slow, fast = Cost(9.0, 4.0, 9.0), Cost(9.0, 0.1, 9.0)
    table = TuningTable(((slow, VARIANTS[64]), (fast, VARIANTS[128])))
    assert TuningTable.from_json(json.loads(json.dumps(table.to_json()))) == table
    served = {pages: table.serving(128, 64, 256, come=pages).rows for pages in PAGES}
    assert served == {"tiles": 128, "tiles128": 128, "tiles256": 128, "pieces": 64, "tokens": 64}
    # two of a launch's 132 CTAs to 128 rows: 66 shares of 64 * 256 tiles
    assert Share.of(VARIANTS[128], 128, 66, 256, 132) == Share(256, split=False)


def test_a_table_has_its_variants_by_rows():
    table = TuningTable(((COST, VARIANTS[8]), (COST, VARIANTS[64])))
    assert table.variants == (VARIANTS[8], VARIANTS[64]) and table.of_rows(64) is VARIANTS[64]
    with pytest.raises(KeyError):
        table.of_rows(16)
    assert tuple(tuning.rows for tuning in SHIPPED.variants) == ALL_ROWS


def test_a_table_survives_json():
    assert TuningTable.from_json(json.loads(json.dumps(SHIPPED.to_json()))) == SHIPPED


def without(field):
    [entry] = TuningTable(((COST, VARIANTS[8]),)).to_json()
    return json.dumps({"tuning": [{name: value for name, value in entry.items() if name != field}]})


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (None, "FileNotFoundError"),
        ("{", "JSONDecodeError"),
        ("[]", "holds no table"),
        ("{}", "KeyError: 'tuning'"),
        ('{"tuning": null}', "holds no table"),
        (without("start_us"), "'start_us': name every field"),
        (without("merge_us"), "'merge_us': name every field"),
        (without("rows"), "'rows': name every field"),
        (without("group_slots"), "'group_slots': name every field"),
        (without("none").replace('"rows"', '"lines": 1, "rows"'), "'lines': name every field"),
        (without("none").replace("5.0", "-5.0"), "start_us is -5.0"),
        ('{"tuning": [1]}', "name every field"),
        ('{"tuning": []}', "must ascend"),
    ],
)
def test_a_file_without_a_table_names_itself_and_the_remedy(tmp_path, content, found):
    path = tmp_path / "tuning.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(TuningError) as caught:
        choice.load_table(path)
    text = str(caught.value)
    assert text.startswith(f"{path}: ") and found in text and "unset MLA_KERNELS_TUNING" in text


@pytest.fixture
def table_of(monkeypatch, tmp_path):
    """Makes a table the one that ``MLA_KERNELS_TUNING`` names."""

    def use(table):
        path = tmp_path / "tuning.json"
        path.write_text(json.dumps({"tuning": table.to_json()}))
        monkeypatch.setenv("MLA_KERNELS_TUNING", str(path))
        choice.active_table.cache_clear()

    yield use
    monkeypatch.undo()
    choice.active_table.cache_clear()


def test_a_users_table_decides_what_is_launched(table_of):
    other = dataclasses.replace(VARIANTS[64], ahead_boxes=1)
    table_of(TuningTable(((Cost(5.0, 1.0, 1.0), VARIANTS[16]), (Cost(50.0, 1.0, 1.0), other))))
    few, many = ({"b": 1, "pages": 16}, {"b": 128, "pages": 64})
    assert plan.kernel_config(torch.bfloat16, 128, **few).name == "decode_swapped-bf16-16"
    assert plan.kernel_config(torch.float16, 128, **many).name == "decode_rows-fp16-64+ahead_boxes=1"
    assert len(decode.shipped_configs()) == 5 * 4  # as many ways of pages


def test_pairs_serve_many_rows_of_pages_that_are_tiles():
    many, few = {"b": 128, "pages": 64}, {"b": 1, "pages": 16}
    assert plan.kernel_config(torch.bfloat16, 128, **many).name == "decode_pair-bf16-128"
    assert plan.kernel_config(torch.bfloat16, 128, **many, page_size=16).name == "decode_rows-bf16-64-pieces"
    assert plan.kernel_config(torch.bfloat16, 128, **many, ragged=True).name == "decode_rows-bf16-64-pieces"
    assert plan.kernel_config(torch.bfloat16, 64, **many).name == "decode_rows-bf16-64"
    assert plan.kernel_config(torch.bfloat16, 128, **few).source == "decode_swapped.cu"
    assert len(decode.shipped_configs()) == 5 * 4 * 2 + 3 * 2


def test_without_one_the_shipped_table_is_used(monkeypatch):
    monkeypatch.delenv("MLA_KERNELS_TUNING", raising=False)
    choice.active_table.cache_clear()
    assert choice.active_table() is SHIPPED


def test_a_named_variant_is_launched_whatever_the_table_says():
    for tuning in VARIANTS.values():
        config = plan.kernel_config(torch.bfloat16, 8, 1, 1, variant=tuning)
        assert config == tuning.kernel_config("bf16")


@pytest.mark.parametrize("work", decode.BLOCKS)
def test_a_block_is_of_the_kernel_that_would_serve(work):
    for h_q, b, pages in ((128, 1, 16), (128, 128, 256), (8, 1, 1)):
        config = plan.kernel_config(torch.float16, h_q, b, pages, variant=work)
        assert config == SHIPPED.serving(h_q, b, pages).kernel_config("fp16", work)
