"""Responses drawn by a vLLM server: its process, its HTTP interface, the actor's weights in it."""
