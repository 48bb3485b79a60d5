"""The experiments, by name. Each says its question first, and has ``run(scope, progress) -> Record``."""

from types import ModuleType

from . import bandwidth, roofline

EXPERIMENTS: dict[str, ModuleType] = {"roofline": roofline, "bandwidth": bandwidth}
