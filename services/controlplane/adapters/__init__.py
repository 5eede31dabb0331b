"""The controlplane's technologies, one file each: what comes in and what goes out."""
