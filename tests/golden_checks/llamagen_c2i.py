"""The authors' class-conditional LlamaGen generator."""

from tests.golden_checks._llamagen import check

__all__ = ["check"]
