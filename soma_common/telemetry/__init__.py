"""Logs, metrics, trace context and the admin port: what a service tells about itself."""
