"""Runs tools, each invocation at most once per idempotency key."""
