"""Use cases of the router, one file each, speaking to the outside through the ports of `ports.py`."""
