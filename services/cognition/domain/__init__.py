"""Pure rules of the cognition: values and decisions, no I/O, no clock of its own."""
