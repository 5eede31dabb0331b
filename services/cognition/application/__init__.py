"""Use cases of the cognition, one file each, speaking to the outside through the ports of `ports.py`."""
