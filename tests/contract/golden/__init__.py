"""What earlier releases wrote: examples of every message, made by their own code, that today's code must read alike."""
