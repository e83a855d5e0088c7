"""What balancing does on real data, and what it costs: each module a script or a part of one."""
