"""The experiments, by name. Each says its question first; ``run(scope, progress, **options)`` measures it."""

from types import ModuleType

from . import bandwidth, peers, roofline, tuning

EXPERIMENTS: dict[str, ModuleType] = {
    "roofline": roofline,
    "bandwidth": bandwidth,
    "peers": peers,
    "tuning": tuning,
}
