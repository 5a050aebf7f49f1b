"""Rollouts on a server of vLLM: its process, its HTTP client, and the way of weights to it."""
