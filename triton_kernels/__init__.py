"""One-launch sweeps in Triton, for any GPU that Triton serves. Knows torch, never pyreg."""

if __name__ != "pyreg.triton_kernels":
    raise ImportError(
        f"pyreg's Triton kernels are imported as pyreg.triton_kernels, not as {__name__}: "
        "the Triton project ships a package named triton_kernels, which this one must not shadow"
    )

from .layout import Layout, unusable
from .penalties import PENALTIES
from .updates import UPDATES

__all__ = ["PENALTIES", "UPDATES", "Layout", "unusable"]
