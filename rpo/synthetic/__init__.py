"""The embedded task (data=gold): a grammar, a known gold reward, preference pairs and the demo's table."""
