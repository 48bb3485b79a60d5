"""FlashMLA's two functions: their signatures, what they refuse, and that they reach the decode operator."""

import inspect
import re
from inspect import Parameter

import pytest
import torch

from mla_kernels import flash_mla, portable
from mla_kernels.reference import mla_decode_reference

# FlashMLA 9241ae3, flash_mla/flash_mla_interface.py; the first nine are those of its first release (414a2f3).
WITH_KVCACHE = {
    "q": Parameter.empty,
    "k_cache": Parameter.empty,
    "block_table": Parameter.empty,
    "cache_seqlens": Parameter.empty,
    "head_dim_v": Parameter.empty,
    "tile_scheduler_metadata": Parameter.empty,
    "num_splits": None,
    "softmax_scale": None,
    "causal": False,
    "is_fp8_kvcache": False,
    "indices": None,
    "attn_sink": None,
    "extra_k_cache": None,
    "extra_indices_in_kvcache": None,
    "topk_length": None,
    "extra_topk_length": None,
}
# FlashMLA c28eca9; since then it takes anything and ignores it.
METADATA = [
    "cache_seqlens",
    "num_q_tokens_per_head_k",
    "num_heads_k",
    "num_heads_q",
    "is_fp8_kvcache",
    "topk",
]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SEQLENS = torch.tensor([20, 0], dtype=torch.int32, device=DEVICE)


def tensors():
    torch.manual_seed(0)
    q, cache = torch.randn(2, 2, 3, 576), torch.randn(4, 16, 1, 576)
    table = torch.tensor([[2, 1], [-1, -1]], dtype=torch.int32)
    return q.half().to(DEVICE), cache.half().to(DEVICE), table.to(DEVICE), SEQLENS


@pytest.fixture
def interpreted(monkeypatch):
    """The Hopper operator replaced by the Triton one, which needs no GPU."""
    pytest.importorskip("triton")
    monkeypatch.setattr("mla_kernels.decode.mla_decode", portable.mla_decode)


def test_signatures_are_flash_mla_s():
    parameters = inspect.signature(flash_mla.flash_mla_with_kvcache).parameters
    assert {name: p.default for name, p in parameters.items()} == WITH_KVCACHE
    assert all(p.kind is Parameter.POSITIONAL_OR_KEYWORD for p in parameters.values())
    assert list(inspect.signature(flash_mla.get_mla_metadata).parameters) == METADATA


def test_metadata_of_the_current_convention():
    metadata, num_splits = flash_mla.get_mla_metadata()
    assert isinstance(metadata, flash_mla.FlashMLASchedMeta) and num_splits is None


@pytest.mark.parametrize("arguments", [(6, 1), (6, 1, 3), (6, 1, 3, False, None)])
def test_metadata_of_the_earlier_convention(arguments):
    metadata, num_splits = flash_mla.get_mla_metadata(SEQLENS, *arguments)
    assert metadata.dtype == num_splits.dtype == torch.int32
    assert metadata.shape == (1, 8) and num_splits.shape == (3,)


@pytest.mark.parametrize("earlier", [False, True])
@pytest.mark.parametrize("causal", [False, True])
def test_equals_the_oracle(interpreted, earlier, causal):
    q, cache, table, seqlens = tensors()
    plan = flash_mla.get_mla_metadata(seqlens, 6, 1) if earlier else flash_mla.get_mla_metadata()
    out, lse = flash_mla.flash_mla_with_kvcache(q, cache, table, seqlens, 512, *plan, 0.1, causal)
    ref_out, ref_lse = mla_decode_reference(q, cache, table, seqlens, softmax_scale=0.1, causal=causal)
    assert (out.double() - ref_out).norm() <= 5e-4 * ref_out.norm()
    torch.testing.assert_close(lse.double(), ref_lse, rtol=0, atol=1e-5)


@pytest.mark.parametrize("plan", [(), (None,)])
def test_metadata_may_be_none(interpreted, plan):
    out, _ = flash_mla.flash_mla_with_kvcache(*tensors(), 512, None, *plan)
    expected, _ = portable.mla_decode(*tensors())
    assert torch.equal(out, expected)


@pytest.mark.parametrize(
    ("arguments", "given"),
    [
        ({"is_fp8_kvcache": True}, "is_fp8_kvcache is True, must be False"),
        ({"indices": torch.zeros(2, 1, 8)}, "indices is a Tensor, must be None"),
        ({"attn_sink": torch.zeros(3)}, "attn_sink is a Tensor, must be None"),
        ({"extra_k_cache": torch.zeros(1)}, "extra_k_cache is a Tensor"),
        ({"extra_indices_in_kvcache": torch.zeros(1)}, "extra_indices_in_kvcache is a Tensor"),
        ({"topk_length": torch.zeros(2)}, "topk_length is a Tensor"),
        ({"extra_topk_length": torch.zeros(2)}, "extra_topk_length is a Tensor"),
    ],
)
def test_what_is_not_built_says_so(arguments, given):
    with pytest.raises(NotImplementedError, match=re.escape(given) + r".*use FlashMLA itself"):
        flash_mla.flash_mla_with_kvcache(*tensors(), 512, *flash_mla.get_mla_metadata(), **arguments)


def test_metadata_of_what_is_not_built_says_so():
    with pytest.raises(NotImplementedError, match="is_fp8_kvcache is True"):
        flash_mla.get_mla_metadata(SEQLENS, 6, 1, 3, True)
    with pytest.raises(NotImplementedError, match="topk is 2048, must be None"):
        flash_mla.get_mla_metadata(SEQLENS, 6, 1, topk=2048)
    with pytest.raises(ValueError, match="num_heads_k is 2, must be 1"):
        flash_mla.get_mla_metadata(SEQLENS, 6, 2)


def test_wrong_metadata_is_refused():
    q, cache, table, seqlens = tensors()
    call = flash_mla.flash_mla_with_kvcache
    with pytest.raises(TypeError, match=r"tile_scheduler_metadata is a tuple.*first of the two"):
        call(q, cache, table, seqlens, 512, flash_mla.get_mla_metadata())
    with pytest.raises(TypeError, match=r"num_splits is a float.*softmax_scale and causal by name"):
        call(q, cache, table, seqlens, 512, flash_mla.FlashMLASchedMeta(), 0.1, True)
    with pytest.raises(ValueError, match="block_table is None"):
        call(q, cache, None, seqlens, 512, *flash_mla.get_mla_metadata())
    with pytest.raises(ValueError, match="k_cache has 2 KV heads, must have 1"):
        call(q, cache.expand(-1, -1, 2, -1), table, seqlens, 512, *flash_mla.get_mla_metadata())
