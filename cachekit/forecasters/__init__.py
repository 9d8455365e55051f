"""What to return instead of computing: pure forecasters over tensors."""

from cachekit.forecasters._forecaster import Forecaster
from cachekit.forecasters._hold import hold
from cachekit.forecasters._newton import newton
from cachekit.forecasters._taylor import taylor

__all__ = ["Forecaster", "hold", "newton", "taylor"]
