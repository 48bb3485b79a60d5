"""What the compiler made of the kernels, and what each choice in them is worth (the tuner's record)."""

from __future__ import annotations

from collections.abc import Iterable

import pandas as pd

from mla_kernels.choice import SHIPPED
from mla_kernels.compiler import compile_kernel, resource_report
from mla_kernels.measure import candidates
from mla_kernels.measure.figures import DECODE
from mla_kernels.measure.records import Record

from . import style


def resources(element: str = "bf16") -> pd.DataFrame:
    """What the compiler made of each shipped variant, read from cubins compiled here (no GPU needed)."""
    rows = []
    for tuning in SHIPPED.variants:
        report = resource_report(compile_kernel(tuning.kernel_config(element)))
        rows.append(
            {
                "kernel": tuning.kernel_config(element).name,
                "registers at launch": report.registers,
                "values": tuning.value_registers,
                "scores": tuning.score_registers,
                "producer": tuning.producer_registers,
                "stack bytes": report.stack_bytes,
                "LDL + STL": report.local_loads + report.local_stores,
                "HGMMA": report.hgmma,
                "UTMALDG": report.utmaldg,
                "code, KB": report.code_bytes / 1024,
            }
        )
    return pd.DataFrame(rows)


def ablations(record: Record) -> pd.DataFrame:
    """One row a variant: its speed over the shipped one of the same rows a CTA, where that serves.

    ``gain`` is the geometric mean, ``worst`` and ``best`` single workloads; ``stack`` bytes: it spills.
    """
    stack = {kernel.name: kernel.stack_bytes for kernel in record.source.kernels}
    data = [
        {
            "rows": candidates.rows_of(name),
            "variant": candidates.changes_of(name),
            "gain": candidates.gain(ratios),
            "worst": min(ratios.values()),
            "best": max(ratios.values()),
            "workloads": len(ratios),
            "stack": stack.get(candidates.tuning_of(name).kernel_config("bf16").name, 0),
        }
        for name, ratios in candidates.speeds(record.points).items()
    ]
    columns = ["rows", "variant", "gain", "worst", "best", "workloads", "stack"]
    return pd.DataFrame(data, columns=columns).sort_values(["rows", "gain"], ignore_index=True)


def plot_ablations(record: Record, rows: Iterable[int]) -> pd.DataFrame:
    """Speed of each variant over the shipped one, a panel a number of rows a CTA; lines span workloads."""
    data, wanted = ablations(record), list(rows)
    data = data[data.rows.isin(wanted)]
    height = 1.6 + 0.26 * max(data.rows.value_counts(), default=0)
    figure, panels = style.new_figure(len(wanted), width=12, height=height, squeeze=False)
    for axes, of_rows in zip(panels[0], wanted, strict=True):
        part = data[data.rows == of_rows].reset_index(drop=True)
        for i, row in part.iterrows():
            colour = style.ALARM if row.stack else style.COLOURS[DECODE]
            axes.plot([row.worst, row.best], [i, i], color=colour, linewidth=1.6)
            axes.plot(row.gain, i, "o", color=colour)
        axes.axvline(1, color=style.CEILING, linestyle="--", linewidth=1.1)
        axes.set_yticks(range(len(part)), _labels(part.variant), fontsize=7)
        axes.grid(visible=False, axis="y")
        axes.set(title=f"{of_rows} rows a CTA", xlabel="speed / shipped")
    style.show(figure, record)
    return data


# What a label says for a field's name.
_SHORT = {"value_registers": "values", "score_registers": "scores", "producer_registers": "producer"}


def _labels(variants: pd.Series) -> pd.Series:
    """What the variants of a panel change."""
    changes = variants.str.replace(r"^rows=\d+,?", "", regex=True).replace("", "as shipped")
    for name, short in _SHORT.items():
        changes = changes.str.replace(name, short)
    return changes.str.replace(",", ", ")


def not_built(record: Record) -> pd.DataFrame:
    """Variants that were meant and cannot be, with the reason."""
    found = candidates.not_built(record.points)
    rows = [(candidates.changes_of(name), reason) for name, reason in found.items()]
    return pd.DataFrame(rows, columns=["variant", "reason"])


def in_words(data: pd.DataFrame, gain: float = 1.01) -> str:
    """The slowest of ``ablations``, and those that are faster than what ships by more than noise."""
    worst, best = data.loc[data.gain.idxmin()], data.loc[data.gain.idxmax()]
    faster = int((data.gain > gain).sum())
    text = (
        f"The slowest is `{worst.variant}`: {worst.gain:.2f} of the shipped speed. {faster} of {len(data)} "
        f"variants are over {gain - 1:.0%} faster than what ships"
    )
    return text + (f", most `{best.variant}` ({best.gain:.3f})." if faster else ".")
