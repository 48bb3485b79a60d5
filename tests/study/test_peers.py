"""Tables and figures of the comparison with other kernels."""

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import pytest

from mla_kernels.measure import peers as wrapped
from mla_kernels.measure.experiment import each_of
from mla_kernels.measure.experiments import peers as experiment
from mla_kernels.measure.workloads import lognormal, uniform
from mla_kernels.study import loading, peer_costs, peers
from mla_kernels.study.duels import duels

LIMIT_BYTES = 150 * 1024
FASTEST, RATIO = "FlashInfer fa3", 1 / 0.8  # on the card


@pytest.mark.parametrize("name", ["headroom", "grid", "by_peer", "further"])
def test_figures_of_speed(name, record_of_peers, shown):
    data = getattr(peers, f"plot_{name}")(record_of_peers)
    assert len(data) and data.ratio.to_numpy() == pytest.approx(RATIO)
    assert len(shown) == 1 and shown[0].stat().st_size < LIMIT_BYTES
    assert plt.get_fignums() == []


@pytest.mark.parametrize("name", ["under_load", "energy", "accuracy", "host", "memory"])
def test_figures_of_costs(name, record_of_peers, shown):
    assert len(getattr(peer_costs, f"plot_{name}")(record_of_peers))
    assert len(shown) == 1 and shown[0].stat().st_size < LIMIT_BYTES
    assert plt.get_fignums() == []


def test_every_workload_with_peers_is_compared_once_a_mode(record_of_peers):
    data = peers.compared(record_of_peers)
    ours = [p for p in record_of_peers.points if p.implementation == "mla_kernels"]
    assert len(data) == len(ours) == data.point.nunique()
    assert set(data.best) == {FASTEST} and data["peer:flash_mla"].to_numpy() == pytest.approx(1 / 0.7)
    assert (data.headroom > data.ratio).all()  # nothing on the card is at the floor


def test_kinds():
    varied = lognormal(8, 4096, 2048, h_q=16)
    kinds = {
        "grid": uniform(16, 4096, h_q=32),
        "several tokens": uniform(16, 4096, h_q=32, s_q=2, causal=True),
        "lengths differ": varied,
        "the same, even": experiment.spread_evenly(varied),
        "fp16": uniform(16, 4096, h_q=32, dtype="fp16"),
        "other head counts": uniform(16, 4096, h_q=40),
    }
    assert tuple(kinds) == peers.KINDS
    assert [peers.kind_of(workload) for workload in kinds.values()] == list(kinds)
    steps = each_of(experiment.steps("full"))
    off = {kind for step in steps if (kind := peers.kind_of(step.workload))} - {peers.KINDS[0]}
    assert off == set(peers.KINDS[1:])


def test_the_summary_counts_who_is_ahead(card):
    points = []
    for b, theirs in ((1, 90.0), (4, 100.0), (16, 144.0)):
        workload = uniform(b, 4096, h_q=16)
        points += [card.point("mla_kernels", workload, us=100.0), card.point("peer:fa3", workload, us=theirs)]
    (row,) = peers.summary(peers.compared(card.record("peers", points)), "kind").to_dict("records")
    assert (row["points"], row["at least as fast"]) == (3, 2)
    assert (row["worst"], row["best"]) == pytest.approx((0.9, 1.44))
    assert row["geometric mean"] == pytest.approx((0.9 * 1.44) ** (1 / 3))


def test_who_was_not_timed_says_why_and_how_often(card, record_of_peers):
    gone = {"status": "skipped", "reason": "no library", "samples_us": [], "error": None}
    points = [
        p.model_copy(update=gone) if (p.implementation, p.mode) == ("peer:fa3", "burst") else p
        for p in record_of_peers.points
        if (p.implementation, p.mode) != ("peer:fa3", "sustained")
    ]
    roster = peers.roster(record_of_peers.model_copy(update={"points": points})).set_index("implementation")
    assert roster.index[0] == "mla_decode" and roster["not timed"]["mla_decode"] == ""
    assert (
        roster["not timed"]["FA3 (q_v)"] == "12 × skipped: no library" and roster.workloads["FA3 (q_v)"] == 0
    )


def test_compute_bound_points_stand_beside_the_skeleton(record_of_peers):
    table = peers.compute_bound(record_of_peers)
    assert len(table) == 3 and table["ours / best peer"].to_numpy() == pytest.approx(RATIO)
    assert table["ours / skeleton"].dropna().to_numpy() == pytest.approx(1 / 1.1)


def test_uneven_lengths_cost_each_implementation(card, record_of_peers):
    table = peers.uneven(record_of_peers)
    assert {"mla_decode", FASTEST} <= set(table.implementation)
    assert table.worst.between(0.03, card.uneven - 1).all()


def test_energy_is_beside_the_thriftiest_peer(record_of_peers):
    table = peer_costs.energy(peer_costs.under_load(record_of_peers).query("mode == 'sustained'"))
    duel = next(duels(record_of_peers, "sustained"))
    joules = [p.sustained.energy_j / p.sustained.calls for p in (duel.ours, *duel.peers)]
    assert table["ours / theirs"].to_list() == pytest.approx([joules[0] / min(joules[1:])])


def test_host_and_memory_are_what_was_recorded(record_of_peers):
    hosts = peer_costs.host(record_of_peers).set_index("implementation")
    assert (
        hosts.call["mla_kernels"] == 9.0 and hosts.plan["mla_kernels"] == 0 and hosts.plan["peer:fa3"] == 50
    )
    memory = peer_costs.memory(record_of_peers)
    assert memory["mla_kernels"].to_numpy() == pytest.approx(1.01)
    assert memory["peer:torch_decompressed"].dropna().to_numpy() == pytest.approx(30.05)


def test_error_of_a_decompressed_form_is_not_compared(record_of_peers):
    assert peer_costs.accuracy(record_of_peers).ratio.to_numpy() == pytest.approx(1 / 1.1)


def test_live_without_any_peer_is_a_replay(monkeypatch, capsys):
    monkeypatch.setattr(loading, "hopper_available", lambda: True)
    monkeypatch.delenv(loading.SOURCE_VARIABLE, raising=False)
    for name in wrapped.FAST:
        monkeypatch.setattr(wrapped.PEERS[name], "available", lambda: "is not there", raising=False)
    assert peers.with_peers("auto") == peers.with_peers("live") == "replay"
    assert "make peers" in capsys.readouterr().out
    monkeypatch.setattr(wrapped.PEERS["fa3"], "available", lambda: None)
    assert peers.with_peers("auto") == "auto" and peers.with_peers("replay") == "replay"
