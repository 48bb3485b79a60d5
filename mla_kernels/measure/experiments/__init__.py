"""The experiments, by name. Each says its question first; ``run(scope, progress, **options)`` measures it."""

from types import ModuleType

from . import bandwidth, paging, peers, prefill, roofline, tuning, varlen

EXPERIMENTS: dict[str, ModuleType] = {
    "roofline": roofline,
    "bandwidth": bandwidth,
    "peers": peers,
    "varlen": varlen,
    "paging": paging,
    "prefill": prefill,
    "tuning": tuning,
}
