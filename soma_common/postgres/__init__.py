"""PostgreSQL: connecting with limits on every wait, and numbered migrations."""
