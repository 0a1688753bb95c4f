"""The engine: K inner steps of T tasks in one batch, and their exact meta-gradient."""
