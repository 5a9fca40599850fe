"""The trainer and all around it: run folder, signals, monitor, cost, one process or several on this machine."""
