"""What to return instead of computing: pure forecasters over tensors."""

from cachekit.forecasters._forecaster import Clock, Forecaster
from cachekit.forecasters._hold import hold
from cachekit.forecasters._named import named
from cachekit.forecasters._newton import newton
from cachekit.forecasters._taylor import taylor
from cachekit.forecasters._two_point import two_point

__all__ = ["Clock", "Forecaster", "hold", "named", "newton", "taylor", "two_point"]
