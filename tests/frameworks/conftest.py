"""Files that the tests here run or import, and that can't be imported without a framework."""

collect_ignore_glob = ["under_*.py", "rank_runs.py"]
