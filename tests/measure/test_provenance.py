"""A record names the tree it measured, or there is no record."""

import re
import subprocess

import pytest

from mla_kernels.measure import provenance
from mla_kernels.measure.provenance import UnknownCommit, gpu_folder, run_section


@pytest.fixture
def tree(tmp_path, monkeypatch):
    """An empty source tree, outside any checkout."""
    monkeypatch.setattr(provenance, "ROOT", tmp_path)
    monkeypatch.delenv(provenance.COMMIT_VARIABLE, raising=False)
    provenance.commit.cache_clear()
    provenance._run_identity.cache_clear()
    yield tmp_path
    provenance.commit.cache_clear()
    provenance._run_identity.cache_clear()


@pytest.fixture
def checkout(tree):
    def git(*arguments):
        identity = ["-c", "user.name=t", "-c", "user.email=t@example.com"]
        subprocess.run(["git", "-C", tree, *identity, *arguments], check=True, capture_output=True)

    git("init")
    (tree / "kernel.cu").write_text("one")
    git("add", ".")
    git("commit", "-m", "one")
    return tree


def test_commit_of_a_clean_checkout(checkout):
    revision, dirty = provenance.commit()
    assert re.fullmatch("[0-9a-f]{40}", revision) and not dirty


def test_changes_make_it_dirty_unless_they_are_records(checkout):
    (checkout / "data" / "h200").mkdir(parents=True)
    (checkout / "data" / "h200" / "roofline.json").write_text("{}")
    assert not provenance.commit()[1]
    provenance.commit.cache_clear()
    (checkout / "kernel.cu").write_text("two")
    assert provenance.commit()[1]


def test_a_tree_inside_another_checkout_is_not_that_checkout(checkout, monkeypatch):
    inner = checkout / "site-packages"
    inner.mkdir()
    monkeypatch.setattr(provenance, "ROOT", inner)
    with pytest.raises(UnknownCommit):
        provenance.commit()


@pytest.mark.parametrize(
    ("named", "expected"), [("0123456", ("0123456", False)), ("a" * 40 + "-dirty", ("a" * 40, True))]
)
def test_the_environment_names_the_commit_outside_a_checkout(tree, monkeypatch, named, expected):
    monkeypatch.setenv(provenance.COMMIT_VARIABLE, named)
    assert provenance.commit() == expected
    run = run_section("python -m mla_kernels.measure record roofline")
    assert (run.commit, run.dirty) == expected and run.id.endswith(named[:7])
    assert run_section("other").id == run.id


@pytest.mark.parametrize("named", [None, "main", "012345", "0123456-changed"])
def test_no_commit_no_record(tree, monkeypatch, named):
    if named is not None:
        monkeypatch.setenv(provenance.COMMIT_VARIABLE, named)
    with pytest.raises(UnknownCommit, match=f"MLA_KERNELS_COMMIT is {named or ''!r}"):
        run_section("x")


@pytest.mark.parametrize(
    ("name", "folder"),
    [("NVIDIA H200", "h200"), ("NVIDIA H100 80GB HBM3", "h100-80gb-hbm3"), ("Tesla V100", "tesla-v100")],
)
def test_folder_of_a_gpu(name, folder):
    assert gpu_folder(name) == folder
