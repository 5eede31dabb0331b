"""The shared library: what every service needs and no service owns."""
