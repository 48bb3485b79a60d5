"""Running a list of steps, with nothing measured: what is prepared, kept on the way, left out for time."""

from types import SimpleNamespace

import pytest

from mla_kernels import device
from mla_kernels.measure import __main__ as command
from mla_kernels.measure import ceilings, experiment, peers, points, provenance
from mla_kernels.measure.experiments import EXPERIMENTS
from mla_kernels.measure.points import Step
from mla_kernels.measure.records import load_record
from mla_kernels.measure.workloads import uniform


@pytest.fixture
def machine(make_point, make_record, monkeypatch):
    """A machine whose clock moves a second a step. ``seen`` lists (workload, absent) of what was measured."""
    whole = make_record()
    state = SimpleNamespace(seen=[], now=0.0, missing={}, prepared=[], stop_at=None, built=[])

    def measure(step, *, l2_bytes, seed, absent):
        if len(state.seen) == state.stop_at:
            raise KeyboardInterrupt
        state.seen.append((step.workload, dict(absent)))
        state.now += 1.0 + experiment.loaded_seconds([step])
        found = {"status": "skipped", "reason": "is a test", "samples_us": []}
        made = [make_point(name, **found) for name in step.implementations]
        return [point.model_copy(update={"workload": step.workload}) for point in made]

    def prepare(names, dtypes, progress):
        state.prepared.append((names, dtypes))
        return {name: reason for name, reason in state.missing.items() if name in names}

    monkeypatch.setattr(device, "hopper_available", lambda: True)
    monkeypatch.setattr(provenance, "run_section", lambda command: whole.run)
    monkeypatch.setattr(
        provenance, "source_section", lambda further: state.built.extend(further) or whole.source
    )
    monkeypatch.setattr(provenance, "device_section", lambda: whole.device)
    monkeypatch.setattr(provenance, "software_section", lambda: whole.software)
    monkeypatch.setattr(ceilings, "measure_ceilings", lambda load: (tuple(whole.ceilings), ()))
    monkeypatch.setattr(points, "measure", measure)
    monkeypatch.setattr(peers, "prepare", prepare)
    monkeypatch.setattr(experiment.time, "perf_counter", lambda: state.now)
    return state


def run(steps, **options):
    return experiment.run_steps("peers", "full", steps, lambda line: None, **options)


def steps(count, **fields):
    return [Step(uniform(2, 64 * (i + 1), h_q=16), **fields) for i in range(count)]


def test_all_is_measured_where_no_limit_is_given(machine):
    record = run(steps(3))
    assert len(record.points) == 3 and record.method.notes == []


def test_a_limit_leaves_out_the_last_and_says_so(machine):
    record = run(steps(9), limit_seconds=5)
    assert [p.workload.lengths[0] for p in record.points] == [64, 128, 192, 256, 320, 384]
    assert record.method.notes == ["stopped after 5 s: 3 of 9 workloads not measured"]


def test_a_limit_keeps_time_for_sustained_load(machine):
    loaded = Step(uniform(2, 6400, h_q=16), sustain=("mla_kernels",))
    record = run([loaded, *steps(9)], limit_seconds=8)
    lengths = [p.workload.lengths[0] for p in record.points]
    assert lengths[-1] == 6400 and len(lengths) == 6


def test_the_record_so_far_is_kept_on_the_way(machine):
    kept = []
    run(steps(experiment.KEEP_EVERY + 1), keep=kept.append)
    assert [len(record.points) for record in kept] == [experiment.KEEP_EVERY]
    assert kept[0].method.notes == ["unfinished: 20 of 21 workloads measured"]


def test_peers_are_prepared_first_and_those_that_cannot_run_are_not_tried(machine):
    machine.missing = {"fa3": "no library"}
    names = ("mla_kernels", "peer:fa3", "peer:flash_mla", "block:stream")
    run([Step(uniform(1, 64, h_q=16), names), Step(uniform(1, 64, h_q=16, dtype="fp16"), names[::2])])
    assert machine.prepared == [(("fa3", "flash_mla"), ("bf16",)), (("flash_mla",), ("fp16",))]
    assert [absent for _, absent in machine.seen] == [{"peer:fa3": "no library"}, {}]


@pytest.fixture
def few_steps(monkeypatch):
    monkeypatch.setattr(EXPERIMENTS["peers"], "steps", lambda scope: steps(experiment.KEEP_EVERY + 5))


def test_command_writes_the_record_and_no_more(machine, few_steps, tmp_path):
    assert command.main(["record", "peers", "--out", str(tmp_path)]) == 0
    assert len(load_record(tmp_path / "peers.json").points) == 25
    assert [path.name for path in tmp_path.iterdir()] == ["peers.json"]


def test_command_that_is_interrupted_leaves_what_it_has(machine, few_steps, tmp_path, capsys):
    (tmp_path / "peers.json").write_text("as it was")
    machine.stop_at = 23
    assert command.main(["record", "peers", "--out", str(tmp_path)]) == 130
    unfinished = tmp_path / "peers.json.unfinished"
    assert (tmp_path / "peers.json").read_text() == "as it was" and str(unfinished) in capsys.readouterr().err
    record = load_record(unfinished)
    assert len(record.points) == 23 and record.method.notes == ["unfinished: 23 of 25 workloads measured"]


def test_command_takes_a_limit(machine, few_steps, tmp_path):
    assert command.main(["record", "peers", "--out", str(tmp_path), "--limit-seconds", "3"]) == 0
    assert len(load_record(tmp_path / "peers.json").points) == 4
