"""Pure rules of the router: values and decisions, no I/O, no clock of its own."""
