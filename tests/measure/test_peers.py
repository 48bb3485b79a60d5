"""Peers without a GPU: what is missing says so, and what plain PyTorch can run is right."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from mla_kernels.measure import points
from mla_kernels.measure.peers import PEERS, PeerUnavailable, fetch, find, flash_mla
from mla_kernels.measure.peers.interface import sha256
from mla_kernels.measure.workloads import materialize, uniform
from mla_kernels.reference import mla_decode_reference

FROM_WHEELS = ("flash_mla", "fa3", "flashinfer_fa3", "flashinfer_fa2", "fa2_decompressed", "vllm_triton")


@pytest.mark.parametrize("name", FROM_WHEELS)
def test_a_peer_that_was_not_fetched_names_the_remedy(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLA_KERNELS_PEERS", str(tmp_path))
    with pytest.raises(PeerUnavailable, match=r"is not among the fetched peers: run `make peers`"):
        find(f"peer:{name}")


def test_flashinfer_needs_the_metadata_of_tvm_ffi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without it `import tvm_ffi` raises PackageNotFoundError."""
    monkeypatch.setenv("MLA_KERNELS_PEERS", str(tmp_path))
    for name in ("flashinfer/mla/_core.py", "tvm_ffi/__init__.py"):
        path = tmp_path / "site" / name
        path.parent.mkdir(parents=True)
        path.touch()
    with pytest.raises(
        PeerUnavailable, match=r"apache_tvm_ffi-\*\.dist-info/METADATA is not among the fetched peers"
    ):
        find("peer:flashinfer_fa3")


def test_a_wheel_is_fetched_again_when_more_is_wanted_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLA_KERNELS_PEERS", str(tmp_path))
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "one.py").write_text("one")
    wheel = fetch.Wheel("one", "1.0", 0.1, (), ("one.py",))
    entry = {"version": "1.0", "files": {"site/one.py": sha256(tmp_path / "site" / "one.py")}}
    assert fetch._is_whole(entry, wheel)
    assert not fetch._is_whole(entry, replace(wheel, members=("one.py", "one-*.dist-info/METADATA")))
    (tmp_path / "site" / "one.py").write_text("another")
    assert not fetch._is_whole(entry, wheel)


def test_an_unknown_peer_is_named_with_those_that_exist() -> None:
    with pytest.raises(ValueError, match=r"peer 'fa9' is unknown; known are flash_mla, fa3"):
        points.bind("peer:fa9", materialize(uniform(1, 64, h_q=2), device="cpu"))


@pytest.mark.parametrize("name", ["torch_absorbed", "torch_decompressed"])
@pytest.mark.parametrize(("s_q", "causal"), [(1, False), (3, True)])
def test_plain_pytorch_agrees_with_the_oracle(name: str, s_q: int, causal: bool) -> None:
    workload = uniform(3, 130, h_q=4, s_q=s_q).model_copy(update={"lengths": [130, 64, 7], "causal": causal})
    inputs = materialize(workload, device="cpu")
    accuracy = points.check(inputs, PEERS[name].bind(inputs), seed=0)
    assert accuracy.out_rel_l2 < 1.2e-2


def test_the_check_sees_a_wrong_peer() -> None:
    inputs = materialize(uniform(2, 100, h_q=4), device="cpu")
    right = PEERS["torch_decompressed"].bind(inputs)

    def wrong() -> object:
        result = right.calls[0]()
        right.unpack(result)[0].mul_(1.1)
        return result

    assert points.check(inputs, replace(right, calls=[wrong]), seed=0).out_rel_l2 > 0.09


@pytest.mark.parametrize(("s_q", "causal"), [(1, False), (3, True)])
def test_flash_mla_is_given_the_output_that_it_wants(
    s_q: int, causal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shapes as its C++ interface checks and returns them; the oracle in the kernel's place."""

    def dense_decode_fwd(q, kv_cache, head_dim_v, lengths, table, scale, is_causal, metadata, splits, out):
        b, s_q, h_q, _ = q.shape
        assert out.shape == (b, 1, s_q * h_q, head_dim_v) and out.is_contiguous() and out.dtype == q.dtype
        assert (metadata is None) == (splits is None)
        result, lse = mla_decode_reference(
            q, kv_cache, table, lengths, softmax_scale=scale, causal=is_causal and s_q > 1
        )
        out.copy_(result.view(out.shape))
        return out.view(b, 1, s_q, h_q, -1).transpose(1, 2).reshape(b, s_q, h_q, -1), lse, lengths, lengths

    library = SimpleNamespace(dense_decode_fwd=dense_decode_fwd)
    monkeypatch.setattr(flash_mla, "load_operators", lambda path, namespace: library)
    workload = uniform(3, 130, h_q=4, s_q=s_q).model_copy(update={"lengths": [130, 64, 7], "causal": causal})
    inputs = materialize(workload, device="cpu")
    bound = PEERS["flash_mla"].bind(inputs)
    assert points.check(inputs, bound, seed=0).out_rel_l2 < 5e-3
    out, _ = bound.unpack(bound.calls[0]())
    assert out.data_ptr() == bound.out.data_ptr(), "one output, allocated once"
