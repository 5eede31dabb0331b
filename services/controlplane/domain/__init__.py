"""Pure rules of the controlplane: values and decisions, no I/O, no clock of its own."""
