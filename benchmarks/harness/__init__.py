"""How things are measured: the machine, timing, checks, workloads."""
