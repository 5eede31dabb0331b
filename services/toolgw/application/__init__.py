"""Use cases of the toolgw, one file each, speaking to the outside through the ports of `ports.py`."""
