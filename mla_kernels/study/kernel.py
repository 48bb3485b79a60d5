"""The Jupyter kernel that notebooks run in."""

from ipykernel.kernelspec import get_kernel_dict
from jupyter_client.kernelspec import KernelSpec
from jupyter_client.manager import AsyncKernelManager
from traitlets import default


class ThisInterpreter(AsyncKernelManager):
    """A kernel of the running Python, whatever kernelspec named `python3` the user has registered."""

    @property
    def kernel_spec(self) -> KernelSpec:
        """ipykernel under `sys.executable`."""
        return KernelSpec(**get_kernel_dict())

    @default("transport_encryption")
    def _encrypt(self) -> str:
        # ipykernel 7 writes a warning into every run without it
        return "auto"
