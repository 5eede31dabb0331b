"""The message bus: how to connect, its subjects and its inbound streams."""
