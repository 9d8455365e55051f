"""Record once, replay every policy, plan to a target.

Every forecaster here gives a fixed combination of values that were computed. So the inner products of the values of one
uncached run say how far any plan is off at any step, without the model.
"""
