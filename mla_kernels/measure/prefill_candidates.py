"""Variants of the prefill kernel as implementations: "mla_kernels[polynomials=0]" is the shipped one of the
workload's head dims but for that (``mla_kernels.prefill_tuning`` names the choices)."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator

from mla_kernels.compiler import CompileError, KernelConfig, compile_kernel
from mla_kernels.prefill_tuning import VARIANTS, PrefillTuning, PrefillTuningError, shipped_prefill_configs

from .calls import PrefillWorkload
from .candidates import changes_of, is_candidate

Named = tuple[str, PrefillWorkload]


def prefill_tuning_of(implementation: str, workload: PrefillWorkload) -> PrefillTuning:
    """Raises PrefillTuningError for a choice that there is not, or does not fit."""
    shipped = VARIANTS[workload.d_qk, workload.d_v]
    types = {field.name: type(getattr(shipped, field.name)) for field in dataclasses.fields(shipped)}
    changes = {}
    for change in changes_of(implementation).split(","):
        name, _, value = change.partition("=")
        if name not in types or not value.isdigit():
            raise PrefillTuningError(f"{change!r} must be one of {', '.join(types)} and a number: correct it")
        changes[name] = types[name](int(value))
    return dataclasses.replace(shipped, **changes)


def serving_names(workload: PrefillWorkload) -> set[str]:
    """Names of the kernels that ship for its head dims and type: any of them may serve it."""
    wanted = {
        "MLA_BF16": workload.dtype == "bf16",
        "MLA_HEAD_DIM": workload.d_qk,
        "MLA_HEAD_DIM_V": workload.d_v,
    }
    return {
        config.name for config in shipped_prefill_configs() if wanted.items() <= dict(config.defines).items()
    }


def prefill_configs(named: Iterable[Named]) -> list[KernelConfig]:
    """The cubins of the candidates among (implementation, workload) that fit."""
    return list({config.name: config for _, _, config in _candidates(named) if config}.values())


def prepare_prefill(named: Iterable[Named]) -> dict[tuple[str, str], str]:
    """Compile the candidates; by (dtype, implementation): why one cannot be built."""
    absent = {}
    for name, workload, config in _candidates(named):
        try:
            if config is None:
                prefill_tuning_of(name, workload)
            else:
                compile_kernel(config)
        except (PrefillTuningError, CompileError) as error:
            absent[workload.dtype, name] = f"{type(error).__name__}: {error}"
    return absent


def _candidates(named: Iterable[Named]) -> Iterator[tuple[str, PrefillWorkload, KernelConfig | None]]:
    """Each once; None for one that does not fit."""
    seen = set()
    for name, workload in named:
        key = name, workload.d_qk, workload.d_v, workload.dtype
        if not is_candidate(name) or key in seen:
            continue
        seen.add(key)
        try:
            yield name, workload, prefill_tuning_of(name, workload).kernel_config(workload.dtype)
        except PrefillTuningError:
            yield name, workload, None
