"""Tests, by level: the folder is the level (see CONTRIBUTING.md)."""
