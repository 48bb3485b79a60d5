"""Findings: the worst over the right points, targets, and nothing that no record gives."""

import json

import pytest

from mla_kernels.measure.allocations import Footprint, Latency
from mla_kernels.measure.records import Suite, Verification, save_record
from mla_kernels.measure.workloads import lognormal, normal, spread_evenly, uniform
from mla_kernels.study import __main__ as study
from mla_kernels.study import findings as module
from mla_kernels.study.findings import findings, is_met, markdown, replace_between_markers, table


def values(*records):
    return {finding["key"]: finding["value"] for finding in findings(records)}


def one(key, *records):
    return next(finding for finding in findings(records) if finding["key"] == key)


def test_no_record_no_finding():
    assert findings([]) == []


def test_keys_against_peers_are_absent_until_there_are_peers(roofline, bandwidth):
    found = values(roofline, bandwidth)
    assert not [key for key in found if "peer" in key or "flashmla" in key]
    assert "decode.host_us" not in found and "verification.passed" not in found


def test_every_key_that_these_records_allow(roofline, bandwidth):
    found = values(roofline, bandwidth)
    names = "bandwidth_fraction skeleton_fraction peak_tflops varlen_penalty b1_h16_kv4096_us"
    assert {f"decode.{name}" for name in names.split()} <= set(found)
    assert {"energy.pj_per_byte", "roofline.knee", "bandwidth.fixed_cost_us"} <= set(found)


def test_bandwidth_fraction_is_the_worst_of_its_points(card):
    long = uniform(64, 16384, h_q=16)
    counted = card.point("mla_kernels", long, us=long_us(long, 0.8, card))
    held = card.point("mla_kernels", long, "sustained", us=long_us(long, 0.7, card))
    heads = card.point(
        "mla_kernels", uniform(64, 16384, h_q=64), us=long_us(uniform(64, 16384, h_q=64), 0.6, card)
    )
    assert values(card.record("roofline", [counted, heads]))[
        "decode.h64_bandwidth_fraction"
    ] == pytest.approx(0.6)
    others = [
        card.point("mla_kernels", uniform(64, 8192, h_q=16), us=1e5),  # fewer than 2^20 tokens
        card.point("mla_kernels", uniform(64, 16384, h_q=33), us=1e5),  # more rows than memory-bound
        card.point("mla_kernels", uniform(64, 16384, h_q=16, s_q=4), us=1e5),
        card.point("block:stream", long, us=1e5),
    ]
    found = one("decode.bandwidth_fraction", card.record("roofline", [counted, *others]))
    assert found["value"] == pytest.approx(0.8) and found["point"].startswith("burst, h_q 16, s_q 1, b 64")
    found = one("decode.bandwidth_fraction", card.record("roofline", [counted, held, *others]))
    assert found["value"] == pytest.approx(0.7) and found["record"] == "h200/roofline"


def long_us(workload, share, card):
    from mla_kernels.measure.figures import moved_bytes

    return moved_bytes(workload) / (share * card.read) / 1e6


def test_worst_over_several_records_names_the_record(card):
    workload = uniform(64, 16384, h_q=16)
    fast = card.record("roofline", [card.point("mla_kernels", workload, us=long_us(workload, 0.9, card))])
    slow = card.record("bandwidth", [card.point("mla_kernels", workload, us=long_us(workload, 0.6, card))])
    for pair in ((fast, slow), (slow, fast)):
        found = one("decode.bandwidth_fraction", *pair)
        assert (found["value"], found["record"]) == (pytest.approx(0.6), "h200/bandwidth")


def test_skeleton_fraction_compares_the_same_workload_and_mode(card):
    big, bigger = uniform(64, 16384, h_q=128), uniform(32, 65536, h_q=128, s_q=2)
    points = []
    for workload, mode, ours, skeleton in (
        (big, "burst", 100.0, 95.0),
        (bigger, "burst", 100.0, 90.0),
        (big, "sustained", 100.0, 92.0),
        (uniform(64, 16384, h_q=64), "burst", 100.0, 10.0),  # none of the following count
        (uniform(16, 16384, h_q=128), "burst", 100.0, 10.0),
        (uniform(64, 4096, h_q=128), "burst", 100.0, 10.0),
    ):
        points += [card.point("mla_kernels", workload, mode, us=ours)]
        points += [card.point("block:skeleton", workload, mode, us=skeleton)]
    found = one("decode.skeleton_fraction", card.record("roofline", points))
    assert found["value"] == pytest.approx(0.90) and "s_q 2" in found["point"]
    assert "decode.skeleton_fraction" not in values(card.record("roofline", points[::2]))


def against_peers(card, workload, ours, mode="burst", **theirs):
    """Our point and those of peers, by their times."""
    points = [card.point("mla_kernels", workload, mode, us=ours)]
    return points + [card.point(f"peer:{name}", workload, mode, us=us) for name, us in theirs.items()]


def test_the_worst_ratio_is_against_the_best_peer_of_each_point(card):
    points = against_peers(card, uniform(16, 4096, h_q=16), 20.0, flash_mla=40.0, fa3=30.0)
    points += against_peers(card, uniform(1, 4096, h_q=16), 10.0, flash_mla=9.5, fa3=15.0)
    points += against_peers(card, uniform(64, 16384, h_q=16), 10.0, "sustained", fa3=12.0)
    record = card.record("peers", points)
    found = one("decode.worst_ratio_vs_best_peer", record)
    assert found["value"] == pytest.approx(0.95) and is_met(found) is False
    assert found["point"] == "burst, h_q 16, s_q 1, b 1, kv 4096, against flash_mla"
    found = values(record)
    assert found["decode.geomean_vs_best_peer"] == pytest.approx((1.5 * 0.95) ** 0.5)  # bursts alone
    assert found["decode.geomean_vs_flashmla"] == pytest.approx((2.0 * 0.95) ** 0.5)


def test_the_worst_ratio_counts_points_under_load(card):
    points = against_peers(card, uniform(64, 16384, h_q=16), 10.0, "sustained", fa3=9.0)
    points += against_peers(card, uniform(64, 16384, h_q=16), 10.0, fa3=12.0)
    assert values(card.record("peers", points))["decode.worst_ratio_vs_best_peer"] == pytest.approx(0.9)


def test_a_peer_that_failed_is_no_opponent(card):
    workload = uniform(16, 4096, h_q=16)
    ours, peer = against_peers(card, workload, 20.0, fa3=10.0)
    gone = {"status": "failed", "reason": "wrong result", "samples_us": [], "error": None}
    record = card.record("peers", [ours, peer.model_copy(update=gone)])
    assert not [key for key in values(record) if "peer" in key or "flashmla" in key]
    other = card.point("peer:flash_mla", workload, us=22.0)
    record = card.record("peers", [ours, peer.model_copy(update=gone), other])
    assert values(record)["decode.worst_ratio_vs_best_peer"] == pytest.approx(1.1)


def test_compute_bound_ratios_are_of_their_points_and_mode(card):
    big, longer = uniform(64, 16384, h_q=128), uniform(32, 65536, h_q=128, s_q=2, causal=True)
    points = against_peers(card, big, 100.0, fa3=108.0, flash_mla=111.0)
    points += against_peers(card, longer, 100.0, fa3=106.0)
    points += against_peers(card, big, 100.0, "sustained", fa3=112.0)
    for workload in (uniform(64, 4096, h_q=128), uniform(16, 65536, h_q=128), uniform(64, 16384, h_q=64)):
        points += against_peers(card, workload, 100.0, fa3=50.0) + against_peers(
            card, workload, 100.0, "sustained", fa3=50.0
        )
    record = card.record("peers", points)
    burst, held = (one(f"decode.compute_vs_best_peer_{mode}", record) for mode in ("burst", "sustained"))
    assert burst["value"] == pytest.approx(1.06) and "s_q 2" in burst["point"] and is_met(burst)
    assert held["value"] == pytest.approx(1.12) and is_met(held)


def test_energy_and_error_are_over_the_least_of_the_peers(card):
    workload, small = uniform(64, 16384, h_q=128), uniform(16, 4096, h_q=16)
    points = against_peers(card, workload, 100.0, "sustained", fa3=110.0, flash_mla=105.0)
    points += against_peers(card, small, 20.0, fa3=30.0, flash_mla=40.0, torch_decompressed=90.0)
    errors = {
        "mla_kernels": 2.2e-3,
        "peer:fa3": 2.0e-3,
        "peer:flash_mla": 2.4e-3,
        "peer:torch_decompressed": 1e-4,
    }
    points = [
        p.model_copy(update={"error": p.error.model_copy(update={"out_rel_l2": errors[p.implementation]})})
        for p in points
    ]
    found = values(card.record("peers", points))
    assert found["decode.error_vs_best_peer"] == pytest.approx(1.1)  # decompressed is another problem
    joules = [p.sustained.energy_j / p.sustained.calls for p in points[:3]]
    assert found["decode.energy_vs_best_peer"] == pytest.approx(joules[0] / min(joules[1:]))


def test_host_time_and_memory(card, record_of_peers):
    found = values(record_of_peers)
    assert found["decode.host_us"] == 9.0
    assert found["decode.memory_vs_best_peer"] == pytest.approx(1_010_000 / 1_050_000)
    assert found["decode.decompressed_memory"] == pytest.approx(30_050_000 / 1_010_000)


def test_a_record_of_peers_gives_every_key_against_them(card, record_of_peers):
    found = values(record_of_peers)
    ratio, to_flashmla = 1 / 0.8, 1 / 0.7
    for key in ("worst_ratio", "geomean"):
        assert found[f"decode.{key}_vs_best_peer"] == pytest.approx(ratio)
    assert found["decode.geomean_vs_flashmla"] == pytest.approx(to_flashmla)
    for mode in ("burst", "sustained"):
        assert found[f"decode.compute_vs_best_peer_{mode}"] == pytest.approx(ratio)
    assert found["decode.skeleton_fraction"] == pytest.approx(1 / 1.1)
    assert {"decode.varlen_penalty", "decode.bandwidth_fraction", "decode.b1_h16_kv4096_us"} <= found.keys()


def test_varlen_penalty_is_the_worst_against_even_lengths(card):
    points = []
    for draw, us in ((normal, 103.0), (lognormal, 108.0)):
        varied = draw(128, 4096, 2048, seed=1, h_q=16)
        points += [card.point("mla_kernels", varied, us=us)]
        points += [card.point("mla_kernels", spread_evenly(varied), us=100.0)]
    found = one("decode.varlen_penalty", card.record("bandwidth", points))
    assert found["value"] == pytest.approx(0.08) and "lognormal" in found["point"]
    assert "decode.varlen_penalty" not in values(card.record("bandwidth", points[::2]))  # nothing even


def test_single_sequence_time_is_that_of_a_cold_cache(card):
    workload = uniform(1, 4096, h_q=16)
    warm = card.point("mla_kernels", workload, kv_sets=1, us=5.0)
    assert "decode.b1_h16_kv4096_us" not in values(card.record("bandwidth", [warm]))
    cold = card.point("mla_kernels", workload, us=9.0)
    half = card.point("mla_kernels", uniform(1, 4096, h_q=16, dtype="fp16"), us=99.0)
    record = card.record("bandwidth", [warm, cold, half])
    assert values(record)["decode.b1_h16_kv4096_us"] == 9.0
    assert values(record)["bandwidth.l2_speedup"] == pytest.approx(9 / 5)


def test_peak_is_the_best_burst(card):
    workload = uniform(64, 16384, h_q=128)
    flop = 2 * 128 * 64 * 16384 * 1088
    points = [card.point("mla_kernels", workload, us=flop / 500e6)]
    points += [card.point("mla_kernels", uniform(32, 16384, h_q=128), us=flop / 2 / 600e6)]
    points += [card.point("mla_kernels", uniform(16, 16384, h_q=128), "sustained", us=flop / 4 / 700e6)]
    points += [card.point("block:mma", workload, us=flop / 900e6)]
    assert values(card.record("roofline", points))["decode.peak_tflops"] == pytest.approx(600)


def test_failed_points_count_for_nothing(card):
    workload = uniform(64, 16384, h_q=16)
    failed = card.point("mla_kernels", workload).model_copy(
        update={"status": "failed", "reason": "CUDA error", "samples_us": []}
    )
    assert not [key for key in values(card.record("roofline", [failed])) if key.startswith("decode.")]


def test_a_missing_ceiling_costs_only_what_needs_it(card, roofline):
    found = values(roofline.model_copy(update={"ceilings": []}))
    assert "decode.bandwidth_fraction" not in found and "roofline.ridge" not in found
    assert "decode.peak_tflops" in found


def test_coefficients_of_the_card_come_back(card, roofline, bandwidth):
    found = values(roofline, bandwidth)
    assert found["bandwidth.fixed_cost_us"] == pytest.approx(card.fixed_us, rel=1e-6)
    assert found["bandwidth.slope"] == pytest.approx(card.read * card.read_share, rel=1e-6)
    assert found["roofline.ridge"] == pytest.approx(card.matmul / card.read)
    assert found["energy.static_w"] == pytest.approx(card.static_w, rel=1e-6)
    assert found["energy.pj_per_byte"] == pytest.approx(card.w_per_tb_s, rel=1e-6)
    assert found["energy.pj_per_flop"] == pytest.approx(card.w_per_tflops, rel=1e-6)
    # the knee is the ridge of the kernel's own two rates, but for the fixed cost
    own = card.matmul * card.matmul_share / (card.read * card.read_share)
    assert found["roofline.knee"] == pytest.approx(own, rel=0.05)


def test_counters_against_counted_bytes(card):
    workload = uniform(128, 4096, h_q=16)
    counted = 128 * 4096 * 1152 + 128 * 16 * (576 + 512) * 2
    point = card.point("mla_kernels", workload, counters={"dram_read_bytes": 1.02 * counted})
    record = card.record("bandwidth", [point, card.point("mla_kernels", uniform(64, 4096, h_q=16))])
    assert values(record)["bandwidth.bytes_read"] == pytest.approx(1.02)


def test_verification(card):
    outcome = Verification(
        suites={"a": Suite(passed=3, failed=0, skipped=1), "b": Suite(passed=4, failed=1, skipped=0)},
        worst={"out_rel_l2/bf16": 2e-3, "lse_max_abs/bf16": 1e-6, "lse_max_abs/fp16": 3e-6},
    )
    record = card.record("verification", [], ceilings=[], verification=outcome)
    found = values(record)
    assert (found["verification.passed"], found["verification.failed"]) == (7, 1)
    assert found["verification.lse_max_abs"] == 3e-6 and "verification.out_rel_l2_fp16" not in found
    met = {finding["key"]: is_met(finding) for finding in findings([record])}
    assert met["verification.failed"] is False and met["verification.out_rel_l2_bf16"] is True


@pytest.mark.parametrize(
    "value, target, met",
    [(0.94, "≥ 0.94", True), (0.939, "≥ 0.94", False), (8, "≤ 8", True), (9, "≤ 8", False)],
)
def test_targets(value, target, met):
    assert is_met({"value": value, "target": target}) is met
    assert is_met({"value": value, "target": ""}) is None


def test_table_selects_by_pattern(roofline):
    assert set(table(findings([roofline]), "energy.*").finding.str.partition(".")[0]) == {"energy"}


@pytest.fixture
def data(tmp_path, roofline, bandwidth):
    for record in (roofline, bandwidth):
        save_record(record, tmp_path / "h200" / f"{record.experiment}.json")
    return tmp_path


def test_command_prints_json(data, capsys):
    assert study.main(["findings", "--json", "--data", str(data)]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert [finding["key"] for finding in printed] == [
        d.key for d in module.DEFINITIONS if d.key in values(*module.load_all(data=data))
    ]
    assert all(set(finding) == {"key", "value", "unit", "target", "record", "point"} for finding in printed)


def test_command_updates_a_file_between_markers(data, tmp_path, capsys):
    page = tmp_path / "page.md"
    page.write_text(f"before\n{module.BEGIN}\nold\n{module.END}\nafter\n")
    assert study.main(["findings", "--update", str(page), "--data", str(data)]) == 0
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text
    assert "| `decode.peak_tflops` |" in text and "2026-01-01, commit 0123456789" in text
    page.write_text("no markers")
    assert study.main(["findings", "--update", str(page), "--data", str(data)]) == 1
    assert "page.md" in capsys.readouterr().err and page.read_text() == "no markers"


def test_command_names_a_record_that_cannot_be_used(data, capsys):
    path = data / "h200" / "roofline.json"
    path.write_text(path.read_text()[:-200])
    assert study.main(["findings", "--data", str(data)]) == 1
    assert "roofline.json" in capsys.readouterr().err


def test_command_without_records(tmp_path, capsys):
    assert study.main(["findings", "--data", str(tmp_path)]) == 0
    assert "no records under" in capsys.readouterr().out
    assert markdown([]) == "Nothing is recorded yet."


@pytest.mark.parametrize("typo", [("--gpu", "h20"), ("--data", "elsewhere")])
def test_command_leaves_the_table_alone_where_the_folder_is_missing(data, tmp_path, capsys, typo):
    page = tmp_path / "page.md"
    page.write_text(f"{module.BEGIN}\nold\n{module.END}\n")
    assert study.main(["findings", "--update", str(page), "--data", str(data), *typo]) == 2
    assert f"no folder {'elsewhere' if typo[0] == '--data' else data / 'h20'}" in capsys.readouterr().err
    assert "old" in page.read_text()


def test_command_tells_records_without_findings_from_no_records(tmp_path, capsys, card):
    save_record(card.record("bandwidth", [], ceilings=[]), tmp_path / "h200" / "bandwidth.json")
    assert study.main(["findings", "--data", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "no finding" in out and "no records" not in out


def test_markers_must_be_there_once():
    twice = f"{module.BEGIN}{module.END}" * 2
    with pytest.raises(ValueError, match="once"):
        replace_between_markers(twice, "x")


@pytest.fixture
def paging(card):
    """Two batches, three page sizes, times and bytes that are easily told."""
    sizes = {64: 100.0, 16: 125.0, 1: 200.0}
    base = uniform(128, 4096, h_q=16)
    points = [
        card.point("mla_kernels", base.model_copy(update={"page_size": size}), us=us)
        for size, us in sizes.items()
    ]
    many = uniform(128, 4096, h_q=128)  # bound by compute: kept apart
    points += [
        card.point("mla_kernels", many.model_copy(update={"page_size": size}), us=us)
        for size, us in {64: 100.0, 32: 160.0, 16: 250.0, 1: 400.0}.items()
    ]
    footprints = []
    for b, paged in ((4, 70), (8, 60), (16, 50)):
        footprints.append(
            Footprint(layout="paged", page_size=64, b=b, tokens=[1, 1], bytes=[paged, paged + 10])
        )
        footprints.append(Footprint(layout="padded", b=b, tokens=[1, 1], bytes=[100, 100]))
    latencies = [
        Latency.of("PageAllocator", "allocate 32 pages", [1000] * 98 + [4000] * 2, 60),
        Latency.of("cudaMalloc", "allocate a sequence", [20_000], 60),
    ]
    update = {"footprints": footprints, "latencies": latencies}
    return card.record("paging", points).model_copy(update=update)


def test_findings_of_the_paged_cache(paging):
    found = values(paging)
    assert found["paging.memory_saving"] == pytest.approx(0.25)  # b 4: the mean of 0.3 and 0.2
    assert found["paging.alloc_p99_us"] == pytest.approx(4.0, rel=0.03)
    assert found["paging.alloc_vs_cudamalloc"] == pytest.approx(20, rel=0.05)
    assert found["paging.page16_bandwidth_ratio"] == 0.8
    assert found["paging.page1_bandwidth_ratio"] == 0.5
    assert "paging.page32_bandwidth_ratio" not in found, "no such point was measured"
    compute = [found[f"paging.page{size}_compute_ratio"] for size in (32, 16, 1)]
    assert compute == [0.625, 0.4, 0.25]
    assert "decode.peak_tflops" not in found, "what serves the deployments' questions is not of the grid"


def test_findings_of_lengths_that_differ(card):
    varied = lognormal(8, 2048, 1024, h_q=16)
    times = {"mla_kernels": 10.0, "alternative:padded": 40.0, "alternative:loop": 30.0}
    times |= {"alternative:padded_kernel": 15.0, "alternative:kernel_loop": 50.0}
    points = [card.point(name, varied, us=us) for name, us in times.items()]
    points.append(card.point("mla_kernels", spread_evenly(varied), us=8.0))
    found = values(card.record("varlen", points))
    assert found["varlen.speedup_over_padded"] == 4
    assert found["varlen.speedup_over_traditional"] == 3
    assert found["varlen.speedup_over_padded_same_kernel"] == 1.5
    assert found["varlen.speedup_over_loop_same_kernel"] == 5
    assert found["varlen.penalty"] == pytest.approx(0.25)
