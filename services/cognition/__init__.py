"""The brain: runs turns as journaled steps against a model; keeps no durable state."""
