"""The standalone stack on the real NATS and PostgreSQL, with a stand-in for the five services."""
