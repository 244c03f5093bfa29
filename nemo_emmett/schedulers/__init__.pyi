from .infinite import InfiniteLR as InfiniteLR

__all__ = ["InfiniteLR"]
