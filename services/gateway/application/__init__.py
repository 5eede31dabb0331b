"""Use cases of the gateway, one file each, speaking to the outside through the ports of `ports.py`."""
