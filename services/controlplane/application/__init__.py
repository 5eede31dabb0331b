"""Use cases of the controlplane, one file each, speaking to the outside through the ports of `ports.py`."""
