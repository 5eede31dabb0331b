"""`make bench-peers`: engines that people would pick instead, measured with the same turn in the same run."""
