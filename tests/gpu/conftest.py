"""The GPU suite: skipped where there is no Hopper GPU; ``--record PATH`` leaves its outcome as a record.

python -m pytest tests/gpu -q --record data/h200/verification.json
"""

import math
import sys
from collections import Counter
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path.insert(0, str(ROOT))  # a GPU machine may hold a checkout that is not installed

SUITES = pytest.StashKey[dict[str, Counter]]()
WORST = pytest.StashKey[dict[str, float]]()


def pytest_addoption(parser):
    parser.addoption("--record", metavar="PATH", type=Path, help="write the outcome of tests/gpu as a record")


def pytest_configure(config):
    config.stash[SUITES], config.stash[WORST] = {}, {}
    if config.getoption("record", None):
        from mla_kernels.measure import provenance

        try:  # now, not after minutes of GPU time
            provenance.commit()
        except provenance.UnknownCommit as error:
            raise pytest.UsageError(str(error)) from None


def pytest_collection_modifyitems(config, items):
    from mla_kernels.device import hopper_available

    if hopper_available():
        return
    for item in items:
        if item.path.is_relative_to(HERE):
            item.add_marker(pytest.mark.skip(reason="needs a Hopper GPU (compute capability 9.0)"))


@pytest.fixture(scope="session")
def worst(pytestconfig) -> dict[str, float]:
    """Largest errors by name, for the record."""
    return pytestconfig.stash[WORST]


@pytest.fixture(autouse=True)
def unchecked(monkeypatch):
    """Tests ask for checked mode themselves."""
    monkeypatch.delenv("MLA_KERNELS_CHECK", raising=False)


class _Counting:
    """Outcomes by file. A plugin object, as conftest hooks for reports do not get the config."""

    def __init__(self, suites):
        self.suites = suites

    def pytest_runtest_logreport(self, report):
        path = ROOT / report.nodeid.partition("::")[0]
        if not path.is_relative_to(HERE):
            return
        if report.failed or report.when == "call" or (report.when == "setup" and report.skipped):
            suite = self.suites.setdefault(path.stem.removeprefix("test_"), Counter())
            suite[report.outcome] += 1


def pytest_sessionstart(session):
    session.config.pluginmanager.register(_Counting(session.config.stash[SUITES]))


def pytest_terminal_summary(terminalreporter, config):
    for name, value in sorted(config.stash[WORST].items()):
        terminalreporter.write_line(f"worst {name}: {value:.2e}")
    path, suites = config.getoption("record", None), config.stash[SUITES]
    if path is None:
        return
    if not any(counts["passed"] + counts["failed"] for counts in suites.values()):
        terminalreporter.write_line(f"no test ran, so {path} was not written")
        return
    _write_record(path, suites, config.stash[WORST])
    terminalreporter.write_line(f"wrote {path}")


def _write_record(path, suites, worst):
    from mla_kernels.measure import provenance, records

    verification = records.Verification(
        suites={
            name: records.Suite(passed=c["passed"], failed=c["failed"], skipped=c["skipped"])
            for name, c in sorted(suites.items())
        },
        worst={name: value for name, value in sorted(worst.items()) if math.isfinite(value)},
    )
    record = records.Record(
        experiment="verification",
        run=provenance.run_section("make test-gpu"),
        source=provenance.source_section(),
        device=provenance.device_section(),
        software=provenance.software_section(),
        verification=verification,
    )
    records.save_record(record, path)
