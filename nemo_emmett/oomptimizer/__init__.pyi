from .profile import Profile as Profile

__all__ = ["Profile"]
