"""Which folder the measurements' commands read."""

import pytest

from mla_kernels.measure.__main__ import main
from mla_kernels.measure.provenance import DATA, DATA_VARIABLE, data_folder


def test_the_environment_names_the_folder(tmp_path, monkeypatch):
    monkeypatch.setenv(DATA_VARIABLE, str(tmp_path))
    assert data_folder() == tmp_path
    monkeypatch.setenv(DATA_VARIABLE, "")
    assert data_folder() == DATA


@pytest.mark.parametrize("command", ["list", "check"])
def test_commands_read_the_folder_of_the_environment(command, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv(DATA_VARIABLE, str(tmp_path))
    (tmp_path / "h200").mkdir()
    (tmp_path / "h200" / "torn.json").write_text("")
    assert main([command]) == (1 if command == "check" else 0)
    printed = capsys.readouterr()
    assert str(tmp_path / "h200" / "torn.json") in printed.out + printed.err


def test_list_says_that_there_is_nothing_yet(tmp_path, capsys):
    assert main(["list", "--data", str(tmp_path)]) == 0
    assert f"no records yet under {tmp_path}" in capsys.readouterr().out
