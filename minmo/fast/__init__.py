"""The serving engine: `FastMinMo`, a MinMo on packed weights."""

from minmo.fast.engine import FastMinMo

__all__ = ["FastMinMo"]
