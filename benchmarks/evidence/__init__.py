"""The accuracy benchmark: sets, rows, runs that can be broken off, statistics, tables and pictures."""
