"""Meta-learning algorithms: thin, each reads like its paper."""
