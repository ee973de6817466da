"""One class per method: what its data looks like, what it captures, and how the fit becomes an artifact.

To add one: a module with a `MethodSpec` whose `method` names it, and a place in the union `FitSpec` of registry.py.
"""
