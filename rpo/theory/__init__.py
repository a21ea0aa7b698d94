"""The theorem on finite bandits: game (the three problems and their solutions), checks, closed_forms, bandits, toy."""
