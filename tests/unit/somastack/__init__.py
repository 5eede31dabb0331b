"""The standalone stack's rules that need no process: ports, delays, files, and what is shown."""
