"""Pruning inside of other people's training loops: Lightning, Transformers, Accelerate.

`import issp` imports none of this; each module needs the framework that it is named after.
"""
