"""What the Makefile runs: setup, gates, code generation. No part of the product."""
