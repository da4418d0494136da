"""Ray lives here and nowhere else: CLI, Serve app, gateway, deployments, placement, health, metrics export."""
