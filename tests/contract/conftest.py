"""Leaves out what can't be imported without the extra `bases`."""

from importlib.util import find_spec

collect_ignore = [] if find_spec("pytorch_optimizer") else ["package_bases.py", "test_pytorch_optimizer.py"]
