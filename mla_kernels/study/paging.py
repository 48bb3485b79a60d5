"""Figures and tables of the notebook on the paged cache. Each figure returns the data it drew."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from mla_kernels.measure import figures
from mla_kernels.measure.allocations import Churn
from mla_kernels.measure.allocators import draw_lengths
from mla_kernels.measure.records import Record
from mla_kernels.serving.prefix_replay import DEPLOYMENTS, replay
from mla_kernels.serving.requests import Request

from . import style
from .definitions_of_sequences import footprint, page_ratio, saving

QUANTILES = (0.5, 0.9, 0.99, 0.999)


def page_sizes(record: Record) -> pd.DataFrame:
    """One row a point: time in µs, TB/s, and speed over pages of 64 at the same lengths."""
    rows = []
    for point in record.points:
        if point.status != "ok":
            continue
        w = point.workload
        name = f"h_q {w.h_q}, b {w.b}, kv {w.mean_len:g}" + ("" if w.sd_len == 0 else f"±{w.sd_len:g}")
        rows.append(
            {
                "lengths": name,
                "h_q": w.h_q,
                "page_size": w.page_size,
                "us": point.per_call_us,
                "tb_s": figures.tb_s(point),
                "ratio": page_ratio(record, point),
            }
        )
    return pd.DataFrame(rows)


def plot_page_sizes(record: Record) -> pd.DataFrame:
    """Speed over that of pages of 64, by page size."""
    data = page_sizes(record)
    figure, axes = style.new_figure()
    for (name, part), marker in zip(data.groupby("lengths", sort=False), "osD^v", strict=False):
        axes.plot(part.page_size, part.ratio, marker=marker, label=name)
    style.plain_log_ticks(axes, sorted(data.page_size.unique()))
    axes.axhline(1.0, color=style.CEILING, linestyle="--", linewidth=1.1, zorder=1)
    axes.set(
        xlabel="tokens a page", ylabel="speed over pages of 64", ylim=(0, 1.1), title="What small pages cost"
    )
    axes.legend(loc="lower right")
    style.show(figure, style.caption(record, pages=False))
    return data


def savings(record: Record) -> pd.DataFrame:
    """Share of the padded bytes that pages save, mean over the draws: a row a batch, a column a page size.

    "± of pages of 64": the standard error of that mean, NaN of a single draw.
    """
    sizes = sorted({f.page_size for f in record.footprints if f.page_size})
    rows = []
    for b in sorted({f.b for f in record.footprints}):
        row = {"b": b} | {f"pages of {size}": saving(record, b, size) for size in sizes}
        paged, own = footprint(record, "paged", b, 64), footprint(record, "allocated", b)
        padded = footprint(record, "padded", b)
        each = [1 - p / o for p, o in zip(paged.bytes, padded.bytes, strict=True)]
        row["± of pages of 64"] = statistics.stdev(each) / len(each) ** 0.5 if len(each) > 1 else float("nan")
        row["waste of pages of 64"] = 1 - sum(paged.tokens) * 1152 / sum(paged.bytes)
        row["against the longest of a model"] = saving(record, b, 64, "maximum")
        row["a tensor each, waste"] = 1 - sum(own.tokens) * 1152 / sum(own.bytes)
        rows.append(row)
    return pd.DataFrame(rows)


def padding_waste(b: int, batches: int = 100_000, seed: int = 2) -> float:
    """Share of a padded batch that is padding: mean over many batches of the experiment's lengths.

    No layout can save more than that. It comes from lengths alone: nothing is allocated.
    """
    lengths = np.reshape(draw_lengths(batches * b, seed), (batches, b))
    return float((1 - lengths.mean(axis=1) / lengths.max(axis=1)).mean())


def plot_savings(record: Record, chapter: float) -> pd.DataFrame:
    """Saving against padding to the batch's longest, by batch size and page size."""
    data = savings(record)
    columns = [name for name in data if name.startswith("pages of")]
    figure, axes = style.new_figure(width=7.5)
    for name, colour in zip(columns, style.sns.color_palette(style.SHADES, len(columns)), strict=True):
        axes.plot(data.b, data[name], marker="o", color=colour, label=name)
    style.plain_log_ticks(axes, data.b.tolist())
    style.ceiling(axes, chapter, "the chapter's 42 %")
    axes.set(
        xlabel="sequences in the batch",
        ylabel="share of the padded bytes saved",
        ylim=(0, 1),
        title="Memory saved on log-normal lengths",
    )
    axes.legend(fontsize=8)
    style.show(figure, style.caption(record, pages=False))
    return data


def latencies(record: Record) -> pd.DataFrame:
    """Quantiles in µs of every operation timed."""
    return pd.DataFrame(
        [
            {"allocator": found.allocator, "operation": found.operation, "times": found.count}
            | {f"p{100 * q:g}": found.quantile_us(q) for q in QUANTILES}
            | {"max": found.max_ns / 1e3}
            for found in record.latencies
        ]
    )


def plot_latencies(record: Record, chapter: dict[str, float]) -> pd.DataFrame:
    """Median to p99 of what gives room out, with the chapter's figures (name -> µs) as lines."""
    data = latencies(record)
    data = data[~data.operation.str.startswith("free")].reset_index(drop=True)
    figure, axes = style.new_figure(width=8.5, height=4.6)
    names, colour = data.allocator + ", " + data.operation, style.COLOURS["mla_kernels"]
    axes.scatter(data.p50, data.index, color=colour, zorder=3, label="median")
    axes.hlines(data.index, data.p50, data.p99, color=colour, linewidth=3, label="to the 99th percentile")
    for (name, us), line in zip(chapter.items(), ("--", ":"), strict=True):
        axes.axvline(us, color=style.ALARM, linestyle=line, linewidth=1.1, label=f"chapter: {name}")
    axes.set_yticks(data.index, names)
    axes.invert_yaxis()
    style.plain_log_ticks(axes, [0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100])
    axes.set(xlabel="time of an operation on the host, µs", title="Finding room")
    figure.legend(loc="outside upper right", ncols=4, fontsize=8)
    style.show(figure, style.caption(record, pages=False))
    return data


def plot_churn(record: Record, *simulated: Churn) -> pd.DataFrame:
    """Bytes held while sequences come, grow and go: of the record's churns, and dashed what was simulated."""
    figure, axes = style.new_figure(width=7.5)
    parts = []
    for churn in (*record.churns, *simulated):
        part = pd.DataFrame({"live": churn.live_bytes, "held": churn.held_bytes}).assign(
            allocator=churn.allocator
        )
        part["event"] = (part.index + 1) * (churn.events // len(part))
        part["overhead"] = part.held / part.live - 1
        parts.append(part[part.event > churn.events // 10])  # rows have filled
        line = "--" if churn in simulated else "-"
        axes.plot(part.event, part.held / 1e6, line, label=f"{churn.allocator}, held")
    axes.plot(part.event, part.live / 1e6, color=style.CEILING, linewidth=1, label="the latents themselves")
    axes.set(xlabel="events", ylabel="MB", ylim=(0, None), title="A long churn")
    axes.legend(fontsize=8)
    style.show(figure, style.caption(record, pages=False))
    return pd.concat(parts, ignore_index=True)


def overheads(churn: pd.DataFrame) -> pd.DataFrame:
    """A row an allocator of plot_churn(): bytes held over those alive, less one.

    "median": at one moment. "peak": the most held over the most alive, which is what a card has to have room
    for, whether it was set aside at first, as a pool of pages is, or taken as needed.
    """
    by = churn.groupby("allocator", sort=False)
    return pd.DataFrame(
        {"median": by.overhead.median(), "peak": by.held.max() / by.live.max() - 1}
    ).reset_index()


def hits(requests: Sequence[Request]) -> pd.DataFrame:
    """Prefix hits of a trace on every deployment, simulated: the real cache, no model."""
    rows = []
    for deployment in DEPLOYMENTS:
        result = replay(requests, deployment.capacity_tokens)
        rows.append(
            {
                "weights, GB": deployment.weight_gb,
                "layers": deployment.layers,
                "card, GB": deployment.card_gb,
                "capacity, tokens": result.capacity_tokens,
                "hit rate": result.hit_rate,
                "prefill saved, tokens": result.hit_tokens,
                "evicted pages": result.evicted_pages,
            }
        )
    return pd.DataFrame(rows)


def hits_by_trace(data: pd.DataFrame, traces: Mapping[str, Sequence[Request]]) -> pd.DataFrame:
    """Hit rates of hits() as "this trace", beside those of other traces on the same deployments."""
    beside = data[["weights, GB", "card, GB", "capacity, tokens"]].assign(**{"this trace": data["hit rate"]})
    return beside.assign(**{name: hits(requests)["hit rate"] for name, requests in traces.items()})


def plot_hits(data: pd.DataFrame, chapter: dict[float, float], words: str) -> None:
    """Simulated hit rate against capacity, with the chapter's rate of each model."""
    figure, axes = style.new_figure(width=7.5)
    palette = style.sns.color_palette("colorblind")
    for (weight, part), colour in zip(data.groupby("weights, GB"), palette, strict=False):
        axes.plot(part["capacity, tokens"], part["hit rate"], marker="o", color=colour, label=f"{weight} GB")
        axes.axhline(chapter[weight], color=colour, linestyle=":", linewidth=1.2)
    axes.set_xscale("log")
    axes.set(
        xlabel="tokens that the card has room for",
        ylabel="simulated share of prompt tokens found",
        ylim=(0, 1),
        title="Prefix hits (dotted: the chapter's)",
    )
    axes.legend(title="weights")
    style.show(figure, words)
