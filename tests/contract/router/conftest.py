"""Brings the fixtures of the real store here."""

from tests.integration.router.conftest import store

__all__ = ["store"]
