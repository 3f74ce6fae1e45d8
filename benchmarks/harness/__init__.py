"""How things are measured: machine, timing, checks."""
