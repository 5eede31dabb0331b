"""Pure rules of the gateway: values and decisions, no I/O, no clock of its own."""
