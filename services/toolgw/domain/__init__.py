"""Pure rules of the toolgw: values and decisions, no I/O, no clock of its own."""
