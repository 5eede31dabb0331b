"""Tenants, agents and their configuration, and the feed that carries them to the others."""
