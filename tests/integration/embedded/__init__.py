"""The embedded servers on the real binaries: start, faults, identities."""
