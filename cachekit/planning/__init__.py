"""Record once, replay every policy, plan to a target.

Every linear forecaster gives a fixed combination of values that were computed, so the Gram matrix of the values of one
uncached run says how far any plan is off at any step, without the model.
"""

from cachekit.planning.plan import Plan, plan
from cachekit.planning.replay import Replay, replay_steps
from cachekit.planning.trace import Trace

__all__ = ["Plan", "Replay", "Trace", "plan", "replay_steps"]
