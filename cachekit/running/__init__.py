"""What happens during a step: at the sites that stand where blocks stood, eagerly, in one graph, as programs."""
