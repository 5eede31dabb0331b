"""Takes messages in from channels and hands answers out; owns no conversation."""
